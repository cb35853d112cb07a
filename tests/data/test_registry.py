"""Sources that a user registers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rankfold
from rankfold.cli.data_options import DataOptions
from rankfold.cli.open import OpenedModel, open_data, open_examples
from rankfold.data.parts import Data
from rankfold.data.sources import registry, source_kind
from rankfold.errors import InputError
from tests.command_line import rankfold as command

OPENED = OpenedModel(nn.Linear(2, 2), None, None)
READER = """
import torch

import rankfold


def read(path):
    rows = [line.split() for line in path.read_text().splitlines()]
    return [(torch.tensor([float(a), float(b)]), int(label)) for a, b, label in rows]


def register():
    rankfold.register_source(".rows", read)


def nothing():
    pass
"""
NET = """
from torch import nn


def net():
    return nn.Sequential(nn.Linear(2, 16), nn.Linear(16, 16), nn.Linear(16, 2))
"""


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})


def _rows(folder: Path) -> Path:
    file = folder / "data.rows"
    file.write_text("\n".join(f"{i / 7} {i % 5} {i % 2}" for i in range(60)))
    return file


def test_examples_of_a_registered_file(tmp_path: Path) -> None:
    def read(path: Path) -> list[tuple[torch.Tensor, int]]:
        return [(torch.tensor([float(i), len(path.read_text())]), i % 2) for i in range(40)]

    rankfold.register_source(".H5", read)
    file = tmp_path / "x.h5"
    file.write_bytes(b"\0\0\0")
    assert source_kind(str(file)) == "registered"
    assert open_examples(str(file), OPENED, DataOptions())[7][0].tolist() == [7, 3]
    assert len(open_data(str(file), OPENED, DataOptions()).held_out) == 12
    folder = tmp_path / "folder.h5"
    folder.mkdir()
    with pytest.raises(InputError, match=r"reader of \.h5 failed on .*folder\.h5: IsADirectory"):
        open_data(str(folder), OPENED, DataOptions())


def test_registered_parts_stay_apart(tmp_path: Path) -> None:
    parts = [[(torch.full((2,), float(p)), i % 2) for i in range(5)] for p in range(3)]
    rankfold.register_source(".h5", lambda _: Data(*parts))
    (tmp_path / "x.h5").touch()
    spec = str(tmp_path / "x.h5")
    assert open_data(spec, OPENED, DataOptions()).held_out[0][0].tolist() == [2, 2]
    assert open_examples(spec, OPENED, DataOptions(), 1)[0][0].tolist() == [1, 1]


def test_registered_records_are_read_like_others(tmp_path: Path) -> None:
    given: list[Any] = [{"a": i, "b": 1, "label": i % 2} for i in range(30)]
    rankfold.register_source(".rec", lambda _: iter(given), records=True)
    (tmp_path / "x.rec").touch()
    spec = str(tmp_path / "x.rec")
    found = open_examples(spec, OPENED, DataOptions())
    assert found[5][0].tolist() == [5, 1] and int(found[5][1]) == 1
    with pytest.raises(InputError, match=r"x\.rec has no column 'kind'; it has 'a', 'b', 'label'"):
        open_examples(spec, OPENED, DataOptions(label_column="kind"))
    given.append({"a": 1})
    with pytest.raises(InputError, match=r"as record 30 of .*; expected dictionaries"):
        open_examples(spec, OPENED, DataOptions())
    given.clear()
    with pytest.raises(InputError, match="found no record"):
        open_examples(spec, OPENED, DataOptions())


@pytest.mark.parametrize(
    ("suffix", "read", "message"),
    [
        ("h5", print, "expected one with its dot"),
        (".", print, "expected one with its dot"),
        (".tar.gz", print, "expected one with its dot"),
        (".CSV", print, r"rankfold reads \.csv files itself"),
        (".h5", "read", "is str; expected a function of a path"),
    ],
)
def test_what_cant_be_registered(suffix: str, read: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        rankfold.register_source(suffix, read)


def test_the_command_with_a_source_of_the_models_file(tmp_path: Path) -> None:
    _rows(tmp_path)
    (tmp_path / "net.py").write_text(READER + "\n\nregister()\n" + NET)
    done = command(
        *("lossless", "net.py:net", "--data", "data.rows", "--size", "0.9", "--out", "out"),
        "--json",
        cwd=tmp_path,
    )
    assert json.loads(done.stdout)["task"] == "classification"


def test_the_command_with_a_source_of_a_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "installed"
    about = installed / "rows_reader-1.0.dist-info"
    about.mkdir(parents=True)
    (installed / "rows_reader.py").write_text(READER)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: rows-reader\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[rankfold.sources]\nrows = rows_reader:register\n")
    paths = [str(installed), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    _rows(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    run = ("lossless", "net.py:net", "--data", "data.rows", "--size", "0.9", "--out")
    done = command(*run, "out", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["task"] == "classification"
    (about / "entry_points.txt").write_text("[rankfold.sources]\nrows = rows_reader:missing\n")
    failed = command(*run, "other", cwd=tmp_path, expect=2)
    assert "rows_reader:missing, the entry point that reads .rows, failed" in failed.stderr
    (about / "entry_points.txt").write_text("[rankfold.sources]\nrows = rows_reader:nothing\n")
    nothing = command(*run, "other", cwd=tmp_path, expect=2)
    assert "registered no such source" in nothing.stderr
