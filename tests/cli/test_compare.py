"""``rankfold compare``: runs side by side, and what of them may not be compared."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import rankfold
from rankfold.cli.tables import plain_console
from rankfold.report.runs import Row, comparison_lines, groups, multiplicity_line
from rankfold.report.several import several_figures, several_page
from tests.command_line import rankfold as command

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two sizes of a model on one part, and one of them on another."""
    place = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 3)).eval()
    data = [(torch.randn(12), n % 3) for n in range(160)]
    for name, size, used in (("a", 0.8, data[:120]), ("b", 0.6, data[:120]), ("c", 0.6, data)):
        result = rankfold.lossless(model, used, size=size, effort="fast", timing=name == "a")
        result.save(place / name)
    return place


def test_what_is_compared_and_what_is_not(folders):
    done = command("compare", "a", "b", "c", "--html", "out.html", "--json", cwd=folders)
    told = json.loads(done.stdout)
    assert [run["comparable"] for run in told["runs"]] == ["A", "A", "B"]
    assert told["runs"][0]["latency"].keys() == {"1", "8"} and told["runs"][1]["latency"] == {}
    assert "B has other held-out data than A" in told["notes"][0]
    assert "2 of these runs were judged on one held-out part" in told["notes"][-1]
    assert "chance of up to 10 %" in told["notes"][-1]
    text = (folders / "out.html").read_text()
    assert 'href="a/report.html"' in text and "B has other held-out data than A" in text
    shown = command("compare", "a", "b", "c", cwd=folders).stdout
    assert "held-out" in shown and "B has other held-out data than A" in shown
    alone = command("compare", "a", "b", cwd=folders).stdout
    assert "bytes" in alone and "other held-out" not in alone


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["a", "nothing"], "nothing can't be read"),
        (["."], None),
        (["a", "a"], "named twice"),
        (["a", "--html", "no/such.html"], "can't be written"),
    ],
)
def test_bad_input_is_named(folders, given, said):
    done = command("compare", *given, cwd=folders, expect=2 if said else 0)
    if said:
        assert said in done.stderr
    else:  # a folder of saved models
        assert done.stdout.count("lossless") + done.stdout.count("not shown") >= 3


ROW = Row(
    name="a", model="Net", algorithm="lossless", parameters=0.9, bytes=0.9, loss=1.0, change=0.001,
    standard_error=0.001, lower_bound=-0.001, upper_bound=0.003, confidence=0.95, margin=0.01,
    verdict="lossless", unit="nats", latency={1: 1.1}, held_out="d" * 64, original="o" * 64,
)  # fmt: skip


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"held_out": "e" * 64}, "B has other held-out data than A"),
        ({"original": "p" * 64}, "B has another original than A"),
        ({"unit": "bits"}, "B has another unit of the loss than A"),
        ({"margin": 0.02}, "the margins differ"),
        ({"confidence": 0.9}, "the confidences differ"),
    ],
)
def test_every_difference_is_told(other, said):
    rows = [ROW, replace(ROW, name="b", **other)]
    assert any(line.startswith(said) for line in comparison_lines(rows))
    assert comparison_lines([ROW, replace(ROW, name="b", change=0.5)]) == []


def test_no_more_than_seven_columns():
    from rankfold.cli.comparing import print_rows

    class Console:
        def print(self, table):
            self.columns = len(table.columns)

    for rows in ([ROW], [ROW, replace(ROW, held_out="e" * 64)], [replace(ROW, latency={})]):
        console = Console()
        print_rows(console, rows)
        assert console.columns <= 7
    assert plain_console is not None


def test_letters_and_chances():
    rows = [replace(ROW, held_out=f"{n:064d}") for n in range(30)]
    assert groups(rows)[24:28] == ["Y", "Z", "AA", "AB"]
    assert multiplicity_line(rows) is None
    assert "up to 6 %" in multiplicity_line([ROW, replace(ROW, confidence=0.99)])


def test_names_are_text_on_the_page():
    rows = [replace(ROW, name=HOSTILE, verdict="lossless")]
    text = several_page(rows, title=HOSTILE, lines=[HOSTILE], links={})
    assert HOSTILE not in text and "&lt;script&gt;" in text
    assert set(several_figures(rows)) == {"size-loss", "speed"}
    assert set(several_figures([replace(ROW, latency={})])) == {"size-loss"}
