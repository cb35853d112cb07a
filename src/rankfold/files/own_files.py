"""What a file of a folder is: one that lies in it, not what it points at.

A folder of a stranger may hold links to a user's own files, pipes that never end, or names that
lead out of it. Of an artifact nothing is read that does not lie in it, and nothing is copied that
does not lie in the folder that it is copied from.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path, PureWindowsPath

from rankfold.errors import InputError, listed, visible

_ARTIFACT = "rankfold.json"  # MANIFEST_FILE, whose module stands above this one
_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def is_artifact(folder: Path) -> bool:
    """Whether rankfold has written a folder, so that it is whole without those around it."""
    return (folder / _ARTIFACT).is_file()


def check_own_files(folder: Path, files: Iterable[Path] | None = None) -> None:
    """Refuse a folder that holds anything but files and folders of its own.

    Links in a hub's cache to the blobs beside them are its own: huggingface_hub keeps files so.

    Args:
        folder: The folder; it may be given as a link itself.
        files: Of those that are looked at; all, where there is none.

    Raises:
        InputError: All that isn't its own is named.
    """
    try:
        found = _below(folder) if files is None else _leading_to(folder, files)
        problems = [f"{visible(one.name)}: {said}" for one in found if (said := _foreign(one))]
    except OSError as error:
        raise InputError(f"{visible(folder)} can't be read: {visible(error)}.") from error
    if problems:
        raise InputError(
            f"{visible(folder)} holds what is no file of its own:\n  {listed(problems)}\n"
            "Nothing outside of a folder is read or copied. Put the files themselves in their "
            "place, or take them out; of a hub, hf download into a folder of your own writes files."
        )


def is_plain_name(name: object) -> bool:
    """Whether a text that a file holds is the name of a file beside it, and no way elsewhere."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and "\0" not in name
        and name == Path(name).name == PureWindowsPath(name).name
    )


def _below(folder: Path) -> Iterator[Path]:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = folder / entry.name
        yield path
        if entry.is_dir(follow_symlinks=False):
            yield from _below(path)


def _leading_to(folder: Path, files: Iterable[Path]) -> Iterator[Path]:
    """The files, and the folders between them and ``folder``, each once."""
    between: dict[Path, None] = {}
    for file in files:
        parts = file.relative_to(folder).parts
        between |= dict.fromkeys(folder.joinpath(*parts[: n + 1]) for n in range(len(parts)))
    yield from between


def _foreign(path: Path) -> str | None:
    """What a path is, where it is no file or folder of its own."""
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return None if _is_blob(path) else f"a link to {visible(path.readlink())}"
    return next((name for is_kind, name in _KINDS if is_kind(mode)), None)


def _is_blob(link: Path) -> bool:
    """Whether a link in ``snapshots/COMMIT`` of a hub's cache leads to a file in its ``blobs``."""
    target = Path(os.path.normpath(link.parent / link.readlink()))
    snapshots = next((one for one in link.absolute().parents if one.name == "snapshots"), None)
    if snapshots is None or not target.is_absolute():
        target = target.absolute()
    if snapshots is None or target.parent != snapshots.parent / "blobs":
        return False
    return not (snapshots.parent / "blobs").is_symlink() and stat.S_ISREG(target.lstat().st_mode)
