"""All that a source holds is used by a run, or left out for a reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from rankfold.cli.data_options import DataOptions
from rankfold.cli.open import OpenedModel, evaluate_examples, open_data, open_examples
from rankfold.data.account import ReadExamples
from rankfold.data.given import NOT_DRAWN, GivenExamples, as_examples
from rankfold.data.parts import PARTS, Data, Limits, select_part, split
from rankfold.data.sources import read_npz
from rankfold.machine.progress import SilentProgress
from rankfold.report.data_lines import data_lines, source_lines
from tests.command_line import rankfold
from tests.small_tokenizers import FAMILIES

HOLES = (None, "", "  ")


def unaccounted(data: Data, limits: Limits) -> tuple[list[int], int]:
    """Units of each source, and examples of all sources, that nobody says a word of."""
    units = [a.given - a.used - sum(map(len, a.left_out.values())) for a in data.accounts]
    parts = [
        select_part(data, name, limit, 0).usage() for name, limit in zip(PARTS, limits, strict=True)
    ]
    assert all(p["given"] == p["examples"] + sum(p["left_out"].values()) for p in parts)
    told = sum(p["given"] for p in parts) + sum(count or 0 for count in data.left_out.values())
    return units, sum(account.used for account in data.accounts) - told


def _texts(different: int, again: int, holes: int) -> list[dict[str, Any]]:
    texts = [f"the film was {'abcdefghij'[n % 10] * (1 + n // 10)}" for n in range(different)]
    texts += texts[:again]
    rows: list[dict[str, Any]] = [{"text": t, "label": n % 2} for n, t in enumerate(texts)]
    return [*({"text": HOLES[n % 3], "label": 0} for n in range(holes)), *rows]


def _jsonl(folder: Path, *counts: int) -> str:
    rows = _texts(*counts)
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "x.jsonl")


def _csv(folder: Path, *counts: int) -> str:
    rows = [f"{row['text'] or ''},{row['label']}" for row in _texts(*counts)]
    (folder / "x.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return str(folder / "x.csv")


def _lines(folder: Path, *counts: int) -> str:
    (folder / "x.txt").write_text("\n".join(row["text"] or "" for row in _texts(*counts)) + "\n")
    return str(folder / "x.txt")


def _npz(folder: Path, different: int, again: int, holes: int) -> str:
    x = np.random.default_rng(0).normal(size=(different, 4)).astype(np.float32)
    x = np.concatenate([x, x[:again], x[:holes]])
    np.savez(folder / "x.npz", x=x, y=np.arange(len(x)) % 2)
    return str(folder / "x.npz")


def _images(folder: Path, different: int, again: int, holes: int) -> str:
    values = np.random.default_rng(0).integers(0, 256, (different, 4, 4, 3)).astype(np.uint8)
    for place in range(different + again):
        path = folder / "images" / "ab"[place % 2] / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values[place % different]).save(path)
    for place in range(holes):
        (folder / "images" / "a" / f"{place}.md").write_text("no image")
    return str(folder / "images")


SOURCES: dict[str, tuple[Callable[..., str], str]] = {
    "records": (_jsonl, "classification"),
    "table": (_csv, "classification"),
    "lines": (_lines, "embedding"),
    "arrays": (_npz, "classification"),
    "images": (_images, "classification"),
}


@pytest.mark.parametrize("source", SOURCES)
@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    different=st.integers(36, 48),
    again=st.integers(0, 6),
    holes=st.integers(0, 4),
    limits=st.tuples(*[st.integers(1, 14)] * 3),
    from_loader=st.booleans(),
)
def test_a_source_is_used_or_left_out_for_a_reason(
    source: str, different: int, again: int, holes: int, limits: Limits, from_loader: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("source")
    write, task = SOURCES[source]
    spec = write(folder, different, again, holes)
    tokenizer = FAMILIES["bert"]() if source in ("records", "table", "lines") else None
    opened = OpenedModel(nn.Flatten(), tokenizer, None)
    options = DataOptions(task=task, image_size=4 if source == "images" else None)
    if from_loader:  # of which every third is drawn, some twice
        found = open_examples(spec, opened, options)
        draws = [*range(0, len(found), 3), 0, 3] * 2 + [*range(1, len(found), 3)]
        data = split(DataLoader(found, batch_size=4, sampler=draws), 0)
        drawn_again = len(draws) - len({*draws})
        assert data.left_out[NOT_DRAWN] == len(found) - len({*draws})
        units, examples = unaccounted(data, limits)
        assert (units, examples + drawn_again) == ([0], 0)
        return
    data = open_data(spec, opened, options)
    assert unaccounted(data, limits) == ([0], 0)
    (account,) = data.accounts
    left = 0 if source == "arrays" else holes
    assert account.given - account.used == left


def test_each_of_three_sources_has_its_own_account(tmp_path: Path) -> None:
    found = []
    for place in range(3):
        (tmp_path / str(place)).mkdir()
        spec = _npz(tmp_path / str(place), 10 + place, 0, 0)
        found.append(open_examples(spec, OpenedModel(nn.Flatten(), None, None), DataOptions()))
    data = Data(*found)
    assert [account.used for account in data.accounts] == [10, 11, 12]
    assert unaccounted(data, (4, 99, 5)) == ([0, 0, 0], 0)


def test_what_was_read_keeps_account_and_padding_however_it_comes_in(tmp_path: Path) -> None:
    opened = OpenedModel(nn.Flatten(), FAMILIES["bert"](), None)
    found = open_examples(_jsonl(tmp_path, 2, 0, 1), opened, DataOptions(task="classification"))
    assert isinstance(found, ReadExamples) and len(found) == 2
    for given_as in (found, as_examples(found), DataLoader(found, batch_size=1)):
        examples = as_examples(given_as)
        assert isinstance(examples, GivenExamples)
        assert examples.account is found.account and examples.collate is found.collate
        assert examples.take([1]).account is found.account
    pair = ReadExamples([torch.tensor([1, 2]), torch.tensor([3, 4])], found.account)
    assert len(as_examples(pair)) == 2  # two windows are no pair of arrays
    arrays = read_npz(Path(_npz(tmp_path, 20, 0, 0)))
    assert as_examples(arrays).account is arrays.account  # type: ignore[union-attr]


def test_an_evaluation_says_what_became_of_its_source(tmp_path: Path) -> None:
    torch.manual_seed(0)
    opened = OpenedModel(nn.Linear(4, 2).eval(), None, None)
    examples = open_examples(_npz(tmp_path, 20, 0, 0), opened, DataOptions())
    found = evaluate_examples(opened, examples, limit=7, batch_size=None, progress=SilentProgress())
    (source,) = found["sources"]
    assert source["used"] == 20 == found["examples"] + sum(found["left_out"].values())


def test_a_run_tells_both_steps_once_in_report_terminal_and_card(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef net():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))\n"
    )
    _npz(tmp_path, 90, 5, 0)
    done = rankfold(
        "lossless", "net.py:net", "--data", "x.npz", "--size", "0.9", "--limit", "30",
        "--no-gradient-step", "--out", "out", cwd=tmp_path,
    )  # fmt: skip
    report = json.loads((tmp_path / "out" / "rankfold.json").read_text())
    (source,) = report["sources"]
    used = sum(part["given"] for part in report["data"].values())
    assert source["given"] == source["used"] == 95 == used + sum(report["left_out"].values())
    assert report["left_out"] == {"the same input as an example before": 5}
    card = (tmp_path / "out" / "README.md").read_text()
    shown = rankfold("inspect", "out", cwd=tmp_path).stdout
    for line in source_lines(report):
        assert card.count(f"- {line}\n") == shown.count(f"{line}\n") == done.stderr.count(line) == 1
        assert line not in done.stdout
    for line in data_lines(report):
        option = line.replace("limit=", "--limit")
        assert card.count(f"- {line}\n") == shown.count(option) == done.stdout.count(option) == 1
        assert option not in done.stderr
