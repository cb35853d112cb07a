"""The record of earlier openings, kept and not kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rankfold.certificate.earlier_uses import Opening, history, record, record_file

FIRST = Opening("dense", ("a",), tuple(f"{i:016x}" for i in range(10)), "not shown", 0)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RANKFOLD_OPENINGS", str(tmp_path / "deep" / "openings"))
    return tmp_path / "deep" / "openings"


def test_other_models_on_shared_examples_count_once_each(file: Path) -> None:
    assert history(FIRST).others == 0
    assert record(FIRST) and record(FIRST)
    second = replace(FIRST, models=("b",), examples=FIRST.examples[7:], verdict="lossless")
    found = history(second)
    assert (found.kept, found.others, found.lossless, found.shared) == (True, 1, 0, 3)
    assert record(second)
    third = history(replace(FIRST, models=("c",)), [replace(second, models=("d",))])
    assert (third.others, third.lossless, third.shared) == (3, 2, 10)


def test_repetitions_other_originals_and_other_examples_do_not_count(file: Path) -> None:
    record(FIRST)
    assert history(FIRST).others == 0
    assert history(replace(FIRST, original="another", models=("b",))).others == 0
    assert history(replace(FIRST, models=("b",), examples=("f" * 16,))).others == 0


def test_damaged_lines_are_left_out(file: Path) -> None:
    record(FIRST)
    file.write_text('{\n[]\n{"original": 1}\n' + file.read_text())
    assert history(replace(FIRST, models=("b",))).others == 1
    file.write_bytes(b"\xff\xfe")
    assert history(replace(FIRST, models=("b",))).others == 0


def test_the_record_may_be_off_or_unwritable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANKFOLD_OPENINGS", "off")
    assert record_file() is None and not record(FIRST) and not history(FIRST).kept
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RANKFOLD_OPENINGS", str(tmp_path / "file" / "openings"))
    assert not record(FIRST)
    monkeypatch.delenv("RANKFOLD_OPENINGS")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert record_file() == tmp_path / "rankfold" / "openings"
    monkeypatch.delenv("XDG_STATE_HOME")
    assert record_file() == Path.home() / ".local" / "state" / "rankfold" / "openings"
