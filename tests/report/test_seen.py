"""What only the run sees: it is in no file that repeats, and shows private data to nobody."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import rankfold
from rankfold.certificate.opened import Changed
from rankfold.cli import app
from rankfold.errors import InputError
from rankfold.report import latency
from rankfold.report.latency import BATCHES
from rankfold.report.seen import SEEN_FILE, Seen, read_seen

TIMED = (SEEN_FILE, "report.html")


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 3)).eval()


DATA = [(torch.randn(12, generator=torch.Generator().manual_seed(n)), n % 3) for n in range(120)]


def run(**options):
    return rankfold.lossless(model(), DATA, size=0.7, effort="fast", **options)


@pytest.fixture(scope="module")
def timed():
    return run()


def contents(folder: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in folder.iterdir()}


def test_times_stand_in_no_file_that_repeats(timed, tmp_path, monkeypatch):
    monkeypatch.setenv("RANKFOLD_OPENINGS", "off")
    first, second = run(), run()
    assert [row["batch"] for row in first.latency["rows"]] == [*BATCHES]
    assert first.latency != second.latency
    found = [contents(one.save(tmp_path / str(n))) for n, one in enumerate((first, second))]
    assert found[0].keys() == found[1].keys() >= {*TIMED}
    differ = {name for name in found[0] if found[0][name] != found[1][name]}
    assert differ == {*TIMED}


def test_without_timing_all_files_repeat(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKFOLD_OPENINGS", "off")
    results = run(timing=False), run(timing=False)
    assert results[0].latency is None and not results[0].seen.stages
    found = [contents(one.save(tmp_path / str(n))) for n, one in enumerate(results)]
    assert found[0] == found[1]
    with pytest.raises(InputError, match="timing"):
        run(timing="no")


def test_the_page_is_left_out_and_made_later(timed, tmp_path):
    folder = timed.save(tmp_path / "out", page=False)
    assert not (folder / "report.html").exists() and (folder / SEEN_FILE).is_file()
    with pytest.raises(SystemExit) as ended:
        app(["report", str(folder)])
    assert ended.value.code == 0 and (folder / "report.html").is_file()
    (folder / "report.html").write_text("the user's own")
    with pytest.raises(SystemExit) as ended:
        app(["report", str(folder)])
    assert ended.value.code == 2
    # What the command has made is one of the folder's own files, and is replaced with it.
    timed.save(folder, overwrite=True, page=False)
    assert not (folder / "report.html").exists()
    # What a user has put there is not.
    (folder / "report.html").write_text("the user's own")
    with pytest.raises(InputError, match=r"report\.html"):
        timed.save(folder, overwrite=True)


def test_a_preparation_counts_its_stages_once_for_each_size():
    prepared = rankfold.prepare(model(), DATA, effort="fast")
    stages = [[s.name for s in prepared.lossless(size).seen.stages] for size in (0.9, 0.7)]
    assert "collect statistics" in stages[0] and "collect statistics" in stages[1]
    assert not any("size 0.8" in name or "size 0.9" in name for name in stages[1])


def test_a_model_that_cannot_be_timed_has_its_result_all_the_same(monkeypatch):
    def fails(calls, seconds):
        raise RuntimeError("one is too few")

    monkeypatch.setattr(latency, "timed_beside", fails)
    found = run()
    assert found.latency["rows"] == [] and "one is too few" in found.latency["missing"]
    assert "was not measured: RuntimeError" in latency.speed_sentence(found.latency)


class Words:
    """A tokenizer."""

    def decode(self, tokens, skip_special_tokens):
        return " ".join(f"word{n}\x1b" for n in tokens)


IMAGE, TOKENS = torch.rand(3, 16, 16), torch.arange(200)


@pytest.mark.parametrize(
    ("example", "tokenizer", "text", "image", "label"),
    [
        (TOKENS, Words(), "word0", False, None),
        (TOKENS, None, None, False, None),
        ({"input_ids": TOKENS, "labels": torch.tensor(2)}, Words(), "word0", False, "2"),
        ((IMAGE, torch.tensor(7)), None, None, True, "7"),
        ({"pixel_values": IMAGE, "labels": torch.tensor(1)}, Words(), None, True, "1"),
        ((torch.rand(12), torch.tensor(1)), Words(), None, False, "1"),
        ((torch.rand(5, 40, 40), torch.tensor(0.5)), Words(), None, False, "0.5"),
    ],
)
def test_an_example_is_shown_where_it_can_be(tmp_path, example, tokenizer, text, image, label):
    seen = Seen(changed=(Changed(4, 0.5, example),))
    (shown,) = seen.as_dict(tokenizer, {})["examples"]
    assert (shown["text"] or "").startswith(text or "") and (shown["text"] is None) == (not text)
    assert bool(shown["image"]) == image and shown["label"] == label
    assert "\x1b" not in json.dumps(shown) and "\\u001b" not in json.dumps(shown)
    assert len(shown["text"] or "") <= 401
    (tmp_path / SEEN_FILE).write_text(json.dumps(seen.as_dict(tokenizer, {})))
    assert read_seen(tmp_path)["examples"] == [shown]


def test_private_data_are_shown_nowhere(tmp_path, timed):
    assert timed.seen.changed
    found = run(private=True)
    assert found.seen.changed == ()
    folder = found.save(tmp_path / "out")
    assert read_seen(folder)["examples"] == []
    assert "Those that got worst" not in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    "change",
    [
        {"image": "https://example.org/a.png"},
        {"image": "data:text/html,<b>"},
        {"text": 3},
        {"change": "much"},
    ],
)
def test_a_damaged_file_is_named(tmp_path, change):
    one = {"place": "4", "change": 0.5, "label": None, "text": None, "image": None}
    told = {"stages": [], "latency": None, "examples": [{**one, **change}]}
    (tmp_path / SEEN_FILE).write_text(json.dumps(told))
    with pytest.raises(InputError, match=SEEN_FILE):
        read_seen(tmp_path)
