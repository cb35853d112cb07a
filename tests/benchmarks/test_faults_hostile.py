"""The invariant: a hostile folder runs nothing, reads nothing outside of itself, leaves no
traceback and no byte that a terminal interprets; and the watch that says so would see it."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.faults_hostile import _forked, _watch, _wrong, survived
from benchmarks.hostile_folders import Canary, canary_of, table


def test_a_few_folders_of_the_table_are_survived() -> None:
    assert survived(3) == (3, 3)


def test_the_table_is_large_and_says_one_thing_once() -> None:
    names = [(case.kind, case.name) for case in table()]
    assert len(names) >= 130
    assert len({*names}) == len(names)


def _import(folder: Path, outside: Path) -> None:
    (folder / "run.py").write_text("")
    exec(compile("", str(folder / "run.py"), "exec"))


BAD: list[Callable[[Path, Path], object]] = [
    _import,
    lambda folder, outside: (outside / "secret.txt").read_text(),
    lambda folder, outside: (folder / ".." / "outside" / "secret.txt").read_text(),
    lambda folder, outside: pickle.loads(pickle.dumps(Canary(canary_of(outside)))),
    lambda folder, outside: canary_of(outside).touch(),
    lambda folder, outside: subprocess.run(["true"]),
    lambda folder, outside: os.system("true"),
    lambda folder, outside: socket.create_connection(("127.0.0.1", 9), 0.1),
    lambda folder, outside: os.write(1, b"\x1b[31m"),
    lambda folder, outside: os.write(1, b"a\nFORGED: yes"),
    lambda folder, outside: 1 / 0,
    lambda folder, outside: os._exit(139),
]


@pytest.mark.parametrize("place", range(len(BAD)))
def test_the_watch_sees_what_happens(place: int, tmp_path: Path) -> None:
    folder, outside = tmp_path / "case" / "it", tmp_path / "outside"
    folder.mkdir(parents=True)
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    (folder.parent / "outside").symlink_to(outside)

    def bad() -> None:
        _watch(folder, outside)
        BAD[place](folder, outside)

    status, text = _forked(bad, folder)
    assert _wrong(status, text, folder.parent, outside) is not None
    status, text = _forked(lambda: print("fine"), folder)
    canary_of(outside).unlink(missing_ok=True)
    assert _wrong(status, text, folder.parent, outside) is None
