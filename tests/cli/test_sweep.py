"""``rankfold sweep``: a folder for each size, one statement, what stays after an interruption."""

from __future__ import annotations

import json
import signal
import sys

import pytest
import torch
from torch import nn

import rankfold
from rankfold.artifact.manifest import read_report
from rankfold.cli import app
from rankfold.cli.sweeping import _numbers
from rankfold.errors import InputError
from rankfold.sweep import SweepFolder, state_sweep
from tests.command_line import make_project
from tests.command_line import rankfold as command

MODEL = ("net.py:net", "--weights", "net.safetensors", "--data", "data.npz")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def swept(work):
    done = command(
        "sweep", *MODEL, "--sizes", "0.5,0.9", "--out", "sweep", "--effort", "fast", cwd=work
    )
    return work / "sweep", done


def test_each_size_has_a_folder_and_all_one_statement(swept, work):
    folder, done = swept
    told = json.loads((folder / "sweep.json").read_text())
    assert told["statement"] == {
        "sizes": [0.9, 0.5], "size_of": "model", "margin": 0.01, "confidence": 0.95,
        "each": 0.975, "correction": "Bonferroni",
    }  # fmt: skip
    assert [row["name"] for row in told["done"]] == ["0.9", "0.5"]
    for row in told["done"]:
        report = read_report(folder / row["name"])
        assert report["certificate"]["confidence"] == 0.975
        assert report["ratio"] == row["parameters"] <= float(row["name"])
        command("verify", folder / row["name"], "--data", "data.npz", "--model", "net.py:net",
                "--weights", "net.safetensors", cwd=work)  # fmt: skip
    # The second certificate says that another model was judged on the same examples before.
    assert "chance of up to 5%, not 2.5%" in (folder / "0.5" / "certificate.txt").read_text()
    page = (folder / "report.html").read_text()
    assert 'href="0.5/report.html"' in page and "97.5% confidence" in page
    assert "97.5% confidence, so that all upper bounds hold together with 95%" in done.stdout


def test_another_sweep_replaces_it_only_when_asked_and_of_the_same_sizes(swept, work):
    folder, _ = swept
    again = ("sweep", *MODEL, "--out", "sweep")
    done = command(*again, "--sizes", "0.9,0.5", cwd=work, expect=2)
    assert "--overwrite" in done.stderr
    done = command(*again, "--sizes", "0.9", "--overwrite", cwd=work, expect=2)
    assert "0.5" in done.stderr
    assert (folder / "0.5" / "rankfold.json").is_file()


@pytest.mark.parametrize(
    ("sizes", "said"),
    [("0.9,x", "--sizes"), ("0.9,0.9", "twice"), ("0.9,1.5", "size"), ("", "--sizes")],
)
def test_bad_sizes_are_refused_before_anything_is_opened(work, sizes, said):
    done = command("sweep", *MODEL, "--sizes", sizes, "--out", "none", cwd=work, expect=2)
    assert said in done.stderr and "opening" not in done.stderr
    assert not (work / "none").exists()


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99, 0.99995])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 50])
def test_all_verdicts_together_have_the_confidence_that_was_asked_for(confidence, count):
    sizes = [(place + 1) / 100 for place in range(count)]
    found = state_sweep(sizes, "model", 0.01, confidence)
    assert found.sizes == tuple(sorted(sizes, reverse=True))
    assert confidence <= found.each < 1
    assert count * (1 - found.each) <= (1 - confidence) * (1 + 1e-9)


class _Stopped(rankfold.TerminalProgress):
    """Ctrl-C once a stage of the second size begins."""

    def __init__(self):
        super().__init__()
        self.opened = 0

    def track(self, items, stage, total):
        self.opened += stage == "factorized on held-out data"
        if self.opened == 2:
            signal.raise_signal(signal.SIGINT)
        yield from items


def test_an_interrupted_sweep_leaves_the_sizes_that_are_done(tmp_path, monkeypatch, work, capsys):
    monkeypatch.chdir(work)
    monkeypatch.setattr("sys.argv", ["rankfold"])
    monkeypatch.setattr(sys.modules["rankfold.cli.sweeping"], "TerminalProgress", _Stopped)
    out = tmp_path / "out"
    asked = ["sweep", *MODEL, "--sizes", "0.9,0.5", "--out", str(out), "--no-timing"]
    with pytest.raises(SystemExit) as ended:
        app(asked)
    assert ended.value.code == 130
    assert "the result is whole, in" in capsys.readouterr().err
    assert sorted(one.name for one in out.iterdir()) == ["0.9", "report.html", "sweep.json"]
    told = json.loads((out / "sweep.json").read_text())
    assert [row["name"] for row in told["done"]] == ["0.9"]
    assert read_report(out / "0.9")["ratio"] < 0.9


def test_a_sweep_in_python_is_the_same(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 3)).eval()
    data = [(torch.randn(12), place % 3) for place in range(120)]
    found = rankfold.sweep(model, data, sizes=[0.6, 0.8], effort="fast", timing=False)
    assert [round(row.confidence, 4) for row in found.rows] == [0.975, 0.975]
    assert found[0].ratio > found[1].ratio
    folder = found.save(tmp_path / "out")
    assert (folder / "0.8" / "rankfold.json").is_file() and (folder / "report.html").is_file()
    alone = rankfold.lossless(
        model, data, size=0.8, effort="fast", confidence=0.975, timing=False
    ).save(tmp_path / "alone")
    for name in ("model.safetensors", "rankfold.json"):
        assert (alone / name).read_bytes() == (folder / "0.8" / name).read_bytes()
    with pytest.raises(InputError, match="overwrite"):
        found.save(tmp_path / "out")
    found.save(tmp_path / "out", overwrite=True, page=False)
    assert not (folder / "report.html").exists()


def test_sizes_of_one_name_are_refused(tmp_path):
    statement = state_sweep([0.9, 0.90000001], "model", 0.01, None)
    with pytest.raises(InputError, match="one name"):
        SweepFolder(tmp_path / "out", statement, False).check()


def test_what_ended_before_its_first_size_is_no_obstacle(tmp_path):
    statement = state_sweep([0.9], "model", 0.01, None)
    target = SweepFolder(tmp_path / "out", statement, False)
    target.begin()
    target.begin()
    (tmp_path / "out" / "sweep.json").write_text("{}")
    with pytest.raises(InputError, match="not empty"):
        target.begin()


def test_numbers_are_read():
    assert _numbers("0.95, 0.9") == [0.95, 0.9]
