"""Bad input to the real command line: one message that names it, and nothing written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rankfold.cli.raised import OWN_CODE
from tests.cli.bad_files import MINE, write_bad_files
from tests.cli.bad_inputs import BAD
from tests.command_line import make_project, rankfold

# Rows in which the user's code raises something, or what it calls.
OF_OWN_CODE = {
    "raising data", "raises", "channels", "ragged data", "syntax below", "forward raises",
    "imports", "a stream that fails",
}  # fmt: skip
BOX = re.compile("[╭╮╰╯─│]")  # around the messages of typer


@pytest.fixture(scope="module")
def bad_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_project(tmp_path_factory.mktemp("bad"))
    write_bad_files(folder)
    return folder


def _files(folder: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of every file and folder."""
    found = [path for path in folder.rglob("*") if "__pycache__" not in path.parts]
    stats = {path: path.lstat() for path in found}
    return {
        path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items() if path.is_file()
    } | {path: (0, 0) for path in stats if path.is_dir()}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_one_message_that_names_it(case: str, bad_project: Path) -> None:
    arguments, fragments = BAD[case]
    before = _files(bad_project)
    code = OWN_CODE if case in OF_OWN_CODE else 2  # a traceback where it is the user's alone
    done = rankfold(*arguments, cwd=bad_project, expect=code)
    assert done.stdout == ""
    said = done.stderr.partition("error: ")[2] or done.stderr
    message = " ".join(BOX.sub("", said).split())
    assert not [fragment for fragment in fragments if fragment not in message], message
    assert _files(bad_project) == before
    assert (bad_project / "full" / "mine.txt").read_text() == MINE
