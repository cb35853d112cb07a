"""The record of earlier openings: kept, not kept, damaged, shared, and where it can't be kept.

Whatever is wrong with it, the certificate counts what came before, or says that it can't.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from rankfold.certificate.document import history_line
from rankfold.certificate.earlier_uses import (
    VARIABLE,
    History,
    record,
    record_file,
    recorded_before,
    trouble_ahead,
)
from rankfold.certificate.openings_file import Opening, read

FIRST = Opening("dense", ("a",), tuple(f"{i:016x}" for i in range(10)), "not shown", 0)
NONE = "no earlier opening"


def model(name: str, verdict: str = "lossless") -> Opening:
    return replace(FIRST, models=(name,), verdict=verdict)


def said(found: History) -> str:
    return history_line(asdict(found), 0.95)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RANKFOLD_OPENINGS", str(tmp_path / "deep" / "openings"))
    return tmp_path / "deep" / "openings"


def test_other_models_on_shared_examples_count_once_each(file: Path) -> None:
    assert record(FIRST) == History(True, 0, 0, 0)
    assert record(FIRST).others == 0
    second = replace(FIRST, models=("b",), examples=FIRST.examples[7:], verdict="lossless")
    assert record(second) == History(True, 1, 0, 3)
    third = record(replace(FIRST, models=("c",)), [replace(second, models=("d",))])
    assert (third.others, third.lossless, third.shared) == (3, 2, 10)
    assert NONE not in said(third)
    assert [one.others for one in recorded_before("dense", "b")] == [1]
    assert recorded_before("dense", "z") == recorded_before("other", "b") == []


def test_repetitions_other_originals_and_other_examples_do_not_count(file: Path) -> None:
    record(FIRST)
    assert record(FIRST).others == 0
    assert record(replace(FIRST, original="another", models=("b",))).others == 0
    assert record(replace(FIRST, models=("b",), examples=("f" * 16,))).others == 0


def test_a_repetition_takes_no_room_and_a_part_takes_it_once(file: Path) -> None:
    part = tuple(f"{i:016x}" for i in range(5000))
    record(replace(FIRST, examples=part))
    size = file.stat().st_size
    assert size < 12 * 5000
    record(replace(FIRST, examples=part))
    assert file.stat().st_size == size
    for number in range(20):
        record(replace(FIRST, examples=part, models=(str(number),)))
    assert file.stat().st_size < size + 20 * 300
    assert record(replace(FIRST, examples=part, models=("z",))).others == 21


# Damage: each is done to a real file


def written(file: Path) -> bytes:
    for name in "abc":
        record(model(name))
    return file.read_bytes()


def test_every_byte_may_be_another(file: Path) -> None:
    whole = written(file)
    for place in range(0, len(whole), 11):
        for other in (0xFF, 0x0A, whole[place] ^ 1):
            file.write_bytes(whole[:place] + bytes([other]) + whole[place + 1 :])
            found = record(model("d"))
            assert found.kept
            if whole[place] == other:
                continue
            assert found.others == 3 or found.trouble is not None, (place, other)
            assert NONE not in said(found)
            if found.trouble is not None:
                assert f"the record of openings at {file} could not be read: " in said(found)
            assert record(model("e")).others >= 1, (place, other)  # what was added is there


def test_a_line_that_was_cut_takes_no_other_with_it(file: Path) -> None:
    whole = written(file)
    ends = [place for place, byte in enumerate(whole) if byte == 0x0A]
    for length in range(1, len(whole), 2):
        file.write_bytes(whole[:length])
        found = record(model("d"))
        at_an_end = length in [end + 1 for end in ends] or length in ends
        assert (found.trouble is None) == at_an_end, length
        # A part without openings is no damage: its examples are there for the next.
        assert "d" in {one.models[0] for one in read(file).openings}, length


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe",
        b"\0" * 1000,
        b"{\n",
        b"[]\n",
        b"null\n",
        b'{"original": 1}\n',
        b'{"original": "dense", "models": 3, "examples": [], "verdict": "", "seed": 0}\n',
        b'{"original": "dense", "models": [], "examples": ["x"], "verdict": "", "seed": 0}\n',
        b'{"original": ' + b"[" * 100_000 + b"\n",
        b"9" * 6000 + b"\n",
    ],
)
@pytest.mark.parametrize("place", ["before", "between", "behind"])
def test_lines_that_say_nothing_are_told_and_kept(file: Path, content: bytes, place: str) -> None:
    first, _, rest = written(file).partition(b"\n")
    pieces = {"before": (content, first, rest), "between": (first, content, rest)}
    joined = pieces.get(place, (first, rest.removesuffix(b"\n"), content))
    file.write_bytes(b"\n".join(piece.removesuffix(b"\n") for piece in joined) + b"\n")
    found = record(model("d"))
    assert found.others == 3 and found.trouble is not None and "damaged" in found.trouble
    assert said(found).startswith(f"the record of openings at {file} could not be read: ")
    assert "at least 3 other models" in said(found)
    assert content.removesuffix(b"\n") in file.read_bytes()
    with pytest.raises(OSError, match="damaged"):
        recorded_before("dense", "a")


def test_what_an_earlier_version_wrote_is_kept_and_becomes_small(file: Path) -> None:
    part = tuple(f"{i:016x}" for i in range(1000))
    old = [replace(FIRST, examples=part, models=(str(number),)) for number in range(50)]
    old.append(replace(old[0], original="another"))
    file.parent.mkdir()
    lines = [json.dumps(asdict(one)) for one in old]
    file.write_text("\n".join([*lines[:20], '{"cut": ', *lines[20:]])[:-1])  # the last is cut, too
    file.chmod(0o640)
    before = file.stat().st_size
    found = record(replace(FIRST, examples=part))
    assert found.others == 50
    assert found.trouble is not None and "2 of 52 lines are damaged" in found.trouble
    assert "numbers, from 1: 21, 52" in found.trouble
    assert file.stat().st_size < before / 10
    assert file.stat().st_mode & 0o777 == 0o640
    assert '{"cut": ' in file.read_text()
    again = read(file)
    assert again.openings == [*old[:50], replace(FIRST, examples=part)]
    assert len(again.damaged) == 2 and not again.earlier


# Places that it can't be kept in


def a_folder(file: Path) -> None:
    file.mkdir(parents=True)


def a_pipe(file: Path) -> None:
    file.parent.mkdir()
    os.mkfifo(file)


def below_a_file(file: Path) -> None:
    file.parent.write_text("")


def a_loop(file: Path) -> None:
    file.parent.mkdir()
    file.symlink_to(file)


def endless(file: Path) -> None:
    file.parent.mkdir()
    file.touch()
    os.truncate(file, 1 << 42)


@pytest.mark.parametrize("place", [a_folder, a_pipe, below_a_file, a_loop, endless])
def test_a_place_that_holds_no_record_is_told(file: Path, place: Callable[[Path], None]) -> None:
    place(file)
    found = record(FIRST)
    assert not found.kept and found.trouble is not None
    assert f"the record of openings at {file} could not be" in said(found)
    assert NONE not in said(found) and "is not known" in said(found)


def test_nobodys_home_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANKFOLD_OPENINGS")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    for home in ("", "not/absolute"):
        monkeypatch.setenv("HOME", home)
        found = record(FIRST)
        assert not found.kept and "no home folder is known" in said(found)
        assert NONE not in said(found)
    assert not Path(".local").exists()


def test_where_it_is_and_how_it_is_turned_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANKFOLD_OPENINGS", "off")
    assert record_file() is None
    assert record(FIRST) == History(False, 0, 0, 0)
    assert "no record is kept on this machine" in said(record(FIRST))
    monkeypatch.delenv("RANKFOLD_OPENINGS")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert record_file() == tmp_path / "rankfold" / "openings"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")  # not allowed by its specification
    assert record_file() == Path.home() / ".local" / "state" / "rankfold" / "openings"


def in_a_process(run: Callable[..., None], *arguments: Any) -> None:
    process = multiprocessing.get_context("fork").Process(target=run, args=arguments)
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_a_full_disk_loses_nothing_and_is_told(file: Path) -> None:
    whole = written(file)

    def run(room: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + room, len(whole) + room))
        found = record(model("d"))
        assert found.others == 3 and not found.kept
        assert found.trouble is not None and "could not be written: File too large" in found.trouble
        assert file.read_bytes() == whole

    for room in (0, 1, 60):
        in_a_process(run, room)
    assert record(model("d")) == History(True, 3, 3, 10)


def test_of_eight_at_once_each_sees_those_before_it(file: Path) -> None:
    context = multiprocessing.get_context("fork")
    counts = context.Queue()

    def run(name: str) -> None:
        counts.put(record(model(name)).others)

    processes = [context.Process(target=run, args=(str(n),)) for n in range(8)]
    for process in processes:
        process.start()
    assert sorted(counts.get(timeout=60) for _ in processes) == [*range(8)]
    for process in processes:
        process.join()
    assert record(model("z")) == History(True, 8, 8, 10)


def test_a_lock_of_a_killed_process_is_free(file: Path) -> None:
    record(FIRST)

    def run() -> None:
        from rankfold.certificate.openings_file import locked

        with locked(file):
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert record(model("b")) == History(True, 1, 0, 10)


# Tried before there is anything to record


def test_what_keeps_the_record_from_being_kept_is_told_at_the_start(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert trouble_ahead() is None and not file.exists()
    whole = written(file)
    assert trouble_ahead() is None and file.read_bytes() == whole
    file.write_bytes(whole[:-9])
    assert "could not be read: 1 of" in str(trouble_ahead())
    assert file.read_bytes() == whole[:-9]
    file.unlink()
    file.mkdir()
    assert f"{file} can not be read and written: " in str(trouble_ahead())
    (file.parent / "a file").touch()
    monkeypatch.setenv(VARIABLE, str(file.parent / "a file" / "openings"))
    assert "can not be read and written: " in str(trouble_ahead())
    monkeypatch.setenv(VARIABLE, "off")
    assert trouble_ahead() is None
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_STATE_HOME", "")
    monkeypatch.setenv("HOME", "")
    assert "no home folder is known" in str(trouble_ahead())
