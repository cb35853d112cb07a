"""Files that are written whole, and what a writer that was killed leaves."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from rankfold import InputError
from rankfold.files.durable import PREFIX, write_whole
from rankfold.files.leftovers import clean_leftovers
from rankfold.files.unchanged import Unchanged

pytestmark = pytest.mark.skipif(os.name == "nt", reason="it forks, or makes files with holes")


def test_the_draft_of_a_killed_writer_is_removed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")

    def pieces() -> Iterator[bytes]:
        yield b"new"
        os.kill(os.getpid(), signal.SIGKILL)

    if not (child := os.fork()):
        write_whole(tmp_path / "file", pieces(), 0o644)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert len([*tmp_path.iterdir()]) == 2
    (line,) = clean_leftovers(tmp_path)
    assert line.startswith("removed")
    assert [one.name for one in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_the_draft_of_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    said: list[str] = []

    def pieces() -> Iterator[bytes]:
        yield b"new"
        said.extend(clean_leftovers(tmp_path))

    write_whole(tmp_path / "file", pieces(), 0o644)
    assert len(said) == 1 and said[0].startswith("left alone")
    assert clean_leftovers(tmp_path) == []
    assert (tmp_path / "file").read_bytes() == b"new"


@pytest.mark.parametrize("name", ["notes", "a.txt", "x.drafts"])
def test_a_file_of_the_users_is_left_alone(tmp_path: Path, name: str) -> None:
    mine = tmp_path / f"{PREFIX}{name}"
    mine.write_text("mine")
    assert clean_leftovers(tmp_path)[0].startswith("left alone")
    assert mine.read_text() == "mine"


@pytest.mark.parametrize(("size", "written"), [(4 << 40, 0), (4 << 40, 1 << 16), (1 << 30, 1)])
def test_a_file_of_holes_is_refused_at_once(tmp_path: Path, size: int, written: int) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(written))
    try:
        os.truncate(file, size)
    except OSError:
        pytest.skip("this file system has no files of such a size")
    with pytest.raises(InputError, match=r"model\.safetensors .* were ever written"):
        Unchanged({"the model": lambda: [file]})
