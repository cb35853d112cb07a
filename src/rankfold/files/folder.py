"""A folder that appears complete or not at all; what would keep it from that is found before."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from rankfold.errors import InputError, check_flag, listed, visible
from rankfold.files.durable import sync_tree
from rankfold.files.listed import MARKS, unlisted
from rankfold.files.owned import Owned, owned, real_path, stands
from rankfold.machine.interruption import shielded

_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}

_written: list[Path] = []  # outputs that this process has put in place, in order


def written() -> tuple[Path, ...]:
    """The outputs that this process has put in place, whole, in order."""
    return tuple(_written)


@contextmanager
def owned_output(folder: Path) -> Iterator[None]:
    """A run is to write this folder: until the end, no other may.

    Raises:
        InputError: Another run owns it, or nothing can be written there.
    """
    _check_name(folder)
    with _naming(folder):
        _refuse_links_to_nothing(folder)
        _refuse_files(folder)
    with ExitStack() as stack:
        with _naming(folder):
            stack.enter_context(owned(folder))
        yield


def check_output(folder: Path, overwrite: bool, mark: str, *, reads: Iterable[Path] = ()) -> None:
    """Refuse an output folder that can't be written, before any work is done.

    Args:
        folder: Where to.
        overwrite: Whether an earlier output may be replaced.
        mark: The file by which an earlier output is known.
        reads: Files and folders that the work reads: a folder of them is not written into, and
            none of them is overwritten.

    Raises:
        InputError: It exists and is not empty (without ``overwrite``), holds what is not
            rankfold's, is a file, a mount point, a link to nothing, the current folder or one that
            is read from, another run writes it, or nothing can be written where it shall stand.
    """
    check_flag("overwrite", overwrite)
    _check_name(folder)
    with _naming(folder):
        _refuse_links_to_nothing(folder)
        _refuse_files(folder)
        _refuse_unmovable(folder)
        with owned(folder):
            _refuse_what_stands_there(folder, overwrite, mark)
            _refuse_what_is_read(folder, reads)
            _refuse_what_is_not_ours(folder)
            with trial_folder(folder):
                pass


@contextmanager
def trial_folder(folder: Path) -> Iterator[Path]:
    """A folder of the same name where ``folder`` shall stand, which is removed again.

    Raises:
        InputError: The system refuses it, or what is written into it.
    """
    with _naming(folder), owned(folder) as one:
        draft = one.fresh_draft()
        try:
            (trial := draft / one.output.name).mkdir()
            yield trial
        finally:
            with shielded():
                shutil.rmtree(draft, ignore_errors=True)


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


@contextmanager
def folder_in_one_step(target: Path, overwrite: bool = True) -> Iterator[Path]:
    """A draft folder that becomes ``target`` at the end, or vanishes.

    Readers find what stood there before or the new folder, and the new one is on the disk before
    the old one goes.

    Args:
        target: Where to.
        overwrite: Whether a folder that stands there may be replaced.

    Raises:
        InputError: The system refuses something, another run writes there, or something else
            stands there by now. What is complete then is kept, and its place is named.
    """
    with ExitStack() as stack:
        with _naming(target, "Nothing was left there."):
            one = stack.enter_context(owned(target))
            draft = one.fresh_draft()
            yield draft
            _set_modes(one, draft)
            sync_tree(draft)
        with shielded():
            _put_in_place(one, target, overwrite)


def _put_in_place(one: Owned, target: Path, overwrite: bool) -> None:
    """What is complete becomes the output, or is kept under another name."""
    try:
        one.complete()
        if stands(one.output) and not overwrite:
            raise FileExistsError(errno.EEXIST, "something was put there meanwhile")
        if stands(one.output) and not any((one.output / mark).is_file() for mark in MARKS):
            raise FileExistsError(errno.EEXIST, "something else was put there meanwhile")
        one.replace_output()
    except OSError as error:
        kept = one.keep_in_sight()
        if kept is None:
            raise InputError(_refused(target, error, "Nothing was left there.")) from error
        _written.append(kept)
        raise InputError(
            f"the output folder {visible(target)} can't be replaced: {visible(error)}. What is "
            f"finished was saved in {visible(kept)}; move it where you want it."
        ) from error
    _written.append(one.output)
    with suppress(OSError):  # what stays is found later
        one.clear()


def _set_modes(one: Owned, draft: Path) -> None:
    """Modes as a new folder has them here; what replaces something has that one's mode."""
    mode = one.file_mode()  # safetensors writes files that only their owner can read
    for file in draft.rglob("*"):
        earlier = one.output / file.relative_to(draft)
        if not file.is_dir():
            replaces = earlier.is_file() and not earlier.is_symlink()
            file.chmod(stat.S_IMODE(earlier.stat().st_mode) if replaces else mode)
    if one.output.is_dir():
        before = one.output.stat()
        if hasattr(os, "chown"):
            with suppress(OSError):  # a group that the user is not in
                os.chown(draft, -1, before.st_gid)
        draft.chmod(stat.S_IMODE(before.st_mode))


@contextmanager
def _naming(
    folder: Path, advice: str = "Choose one in a folder where you may write."
) -> Iterator[None]:
    """What the system refuses names the output folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(_refused(folder, error, advice)) from error


def _refused(folder: Path, error: Exception, advice: str) -> str:
    text = visible(error).rstrip(".")
    if getattr(error, "errno", None) in _FULL or "os error 28" in text or "code: 28" in text:
        with suppress(OSError):
            free = shutil.disk_usage(next(p for p in folder.parents if p.exists())).free
            text = f"{text}; {free:,} bytes are free there"
        advice = f"{advice} Make room, or choose a folder on another disk."
    return f"the output folder {visible(folder)} can't be written: {text}. {advice}"


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


def _refuse_links_to_nothing(folder: Path) -> None:
    for one in (folder, *folder.absolute().parents):
        if one.is_symlink() and not one.exists():
            raise InputError(
                f"the output {visible(folder)} can't be written: {visible(one)} is a link to "
                f"{visible(one.readlink())}, which does not exist. Make that folder, or choose "
                "another one."
            )


def _refuse_files(folder: Path) -> None:
    real = real_path(folder)
    if real.exists() and not real.is_dir():
        raise InputError(
            f"the output {visible(folder)} is a file; expected a folder that is new or empty."
        )


def _refuse_unmovable(folder: Path) -> None:
    """Refuse a folder that no other can take the place of."""
    real, here = real_path(folder), Path.cwd()
    named = f"the output folder {visible(folder)}"
    if not real.exists():
        return
    if os.path.ismount(real):
        raise InputError(
            f"{named} is a mount point, which can't be replaced; choose a new folder in it."
        )
    if real == here or real in here.parents:
        raise InputError(
            f"{named} is the current folder or holds it, so it can't be replaced; choose a new "
            "folder in it, such as out."
        )
    above = real.parent.stat()
    if hasattr(os, "geteuid") and above.st_mode & stat.S_ISVTX:
        owners = {0, above.st_uid, real.stat().st_uid}
        if os.geteuid() not in owners:
            raise InputError(
                f"{named} can't be replaced: it is another user's, in a folder where each may "
                "replace their own alone. Choose another one."
            )


def _refuse_what_stands_there(folder: Path, overwrite: bool, mark: str) -> None:
    real, named = real_path(folder), f"the output folder {visible(folder)}"
    if not real.exists():
        return
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


def _refuse_what_is_not_ours(folder: Path) -> None:
    """Refuse to overwrite what the earlier result does not list."""
    real = real_path(folder)
    if real.exists() and (foreign := unlisted(real)):
        names = listed([visible(name) for name in foreign])
        raise InputError(
            f"the output folder {visible(folder)} holds what rankfold did not write there:\n  "
            f"{names}\nIt is not overwritten: move that elsewhere, or choose another folder."
        )


def _refuse_what_is_read(folder: Path, reads: Iterable[Path]) -> None:
    real = real_path(folder)
    for one in reads:
        read = real_path(one)
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
