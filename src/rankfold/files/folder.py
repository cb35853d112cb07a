"""A folder that appears complete or not at all; what would keep it from that is found before."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from rankfold.errors import InputError, visible

_PREFIX = ".rankfold-"  # of drafts, beside the folder that is written


def check_output(folder: Path, overwrite: bool, mark: str, *, reads: Iterable[Path] = ()) -> None:
    """Refuse an output folder that can't be written, before any work is done.

    Args:
        folder: Where to.
        overwrite: Whether an earlier output may be replaced.
        mark: The file by which an earlier output is known.
        reads: Files and folders that the work reads: a folder of them is not written into, and
            none of them is overwritten.

    Raises:
        InputError: It exists and is not empty (without ``overwrite``), is a file, a mount point, a
            link to nothing, the current folder or one that is read from, or nothing can be written
            where it shall stand.
    """
    _check_name(folder)
    with _naming(folder):
        _refuse_what_stands_there(folder, overwrite, mark)
        _refuse_what_is_read(folder, reads)
        with trial_folder(folder):
            pass


@contextmanager
def trial_folder(folder: Path) -> Iterator[Path]:
    """A folder of the same name where ``folder`` shall stand, which is removed again.

    Raises:
        InputError: The system refuses it, or what is written into it.
    """
    with _naming(folder):
        real = _real(folder)
        beside = next(one for one in real.parents if one.exists())
        inner = Path() if real.exists() else real.relative_to(beside)
        trial = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=beside))
        try:
            (trial / inner).mkdir(parents=True, exist_ok=True)
            yield trial / inner
        finally:
            shutil.rmtree(trial, ignore_errors=True)


def check_space(trial: Path, needed: int, folder: Path) -> None:
    """Refuse an output that has no room where it shall stand.

    Args:
        trial: From ``trial_folder(folder)``.
        needed: Bytes of its largest file, which are nearly all.
        folder: Where it shall stand, for messages.

    Raises:
        InputError: Says how much is needed, and how much there is.
    """
    free = shutil.disk_usage(trial).free
    if needed > free:
        raise InputError(
            f"the output folder {visible(folder)} can't be written: it needs up to {needed:,} "
            f"bytes, and {free:,} are free there. Make room or choose a folder on another disk."
        )
    with _naming(folder), (trial / "size").open("wb") as file:
        file.truncate(needed)  # takes no room, and shows the largest file that is allowed
    (trial / "size").unlink()


def _real(folder: Path) -> Path:
    """Where a folder stands, with links followed: what stands there is replaced, not the link."""
    return Path(os.path.realpath(folder))


@contextmanager
def _naming(
    folder: Path, advice: str = "Choose one in a folder where you may write."
) -> Iterator[None]:
    """What the system refuses names the output folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"the output folder {visible(folder)} can't be written: {visible(error)}. {advice}"
        ) from error


def _check_name(folder: Path) -> None:
    """Refuse a name that no system call takes."""
    try:
        if b"\0" not in os.fsencode(folder):
            return
        reason = "its name holds a zero byte"
    except UnicodeEncodeError:
        reason = "its name holds half of a character (a lone surrogate)"
    raise InputError(
        f"the output folder {visible(folder)} can't be written: {reason}. Choose another name."
    )


def _refuse_what_stands_there(folder: Path, overwrite: bool, mark: str) -> None:
    named = f"the output folder {visible(folder)}"
    for one in (folder, *folder.absolute().parents):
        if one.is_symlink() and not one.exists():
            raise InputError(
                f"the output {visible(folder)} can't be written: {visible(one)} is a link to "
                f"{visible(one.readlink())}, which does not exist. Make that folder, or choose "
                "another one."
            )
    real, here = _real(folder), Path.cwd()
    if not real.exists():
        return
    if not real.is_dir():
        raise InputError(
            f"the output {visible(folder)} is a file; expected a folder that is new or empty."
        )
    if os.path.ismount(real):
        raise InputError(
            f"{named} is a mount point, which can't be replaced; choose a new folder in it."
        )
    if real == here or real in here.parents:
        raise InputError(
            f"{named} is the current folder or holds it, so it can't be replaced; choose a new "
            "folder in it, such as out."
        )
    if not any(real.iterdir()):
        pass
    elif not overwrite:
        raise InputError(
            f"{named} exists and is not empty; choose another one or pass overwrite=True."
        )
    elif not (real / mark).is_file():
        raise InputError(
            f"{named} holds no {mark}, so it is no earlier result of this; it is not overwritten. "
            "Choose another folder or empty this one."
        )
    if not os.access(real, os.W_OK | os.X_OK):
        raise InputError(
            f"{named} can't be replaced: you may not write in it. Choose another one, or change "
            "its permissions."
        )


def _refuse_what_is_read(folder: Path, reads: Iterable[Path]) -> None:
    real = _real(folder)
    for one in reads:
        read = _real(one)
        if real == read or (real in read.parents and real.is_dir()):
            raise InputError(
                f"the output folder {visible(folder)} is or holds {visible(one)}, which is read "
                "here and would be overwritten; choose another one."
            )
        if read in real.parents and read.is_dir():
            raise InputError(
                f"the output folder {visible(folder)} lies in {visible(one)}, which is read here; "
                "choose one outside it."
            )


@contextmanager
def folder_in_one_step(target: Path) -> Iterator[Path]:
    """A draft folder that becomes ``target`` at the end, or vanishes."""
    real = _real(target)
    made = [one for one in real.parents if not one.exists()]  # the deepest first
    draft = backup = None
    try:
        with _naming(target, "Nothing was left there."):
            real.parent.mkdir(parents=True, exist_ok=True)
            draft = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=real.parent))
            draft.chmod(0o755)
            yield draft
            for file in draft.rglob("*"):  # safetensors writes files that only their owner can read
                file.chmod(0o755 if file.is_dir() else 0o644)
            if real.exists():
                backup = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=real.parent))
                real.replace(backup / "old")
            draft.replace(real)
    except BaseException:
        if backup is not None and (backup / "old").exists() and not real.exists():
            (backup / "old").replace(real)
        raise
    finally:
        for leftover in (draft, backup):
            if leftover is not None:
                shutil.rmtree(leftover, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # it isn't there, or holds what was written
                parent.rmdir()
