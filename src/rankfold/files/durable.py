"""Files that are there after a power cut, and folders that are exchanged in one step."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rankfold.files.locks import lock_now

PREFIX = ".rankfold-"  # of hidden files and folders that a run is writing
DRAFT = ".draft"  # at the end of the names of such files
_NO_SUCH_CALL = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_HERE = -100  # AT_FDCWD of Linux
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS


def sync_file(file: Path) -> None:
    """Return once a file's bytes are on the disk."""
    opened = os.open(file, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sync_folder(folder: Path) -> None:
    """Return once the names in a folder are on the disk, where the system can say so."""
    if os.name == "nt":  # it opens no folders
        return
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    except OSError as error:  # some network file systems sync no folders
        if error.errno not in {*_NO_SUCH_CALL, errno.EBADF}:
            raise
    finally:
        os.close(opened)


def sync_tree(folder: Path) -> None:
    """Return once all of a folder is on the disk, inner ones first."""
    for here, _, names in os.walk(folder, topdown=False):
        for name in names:
            if not (file := Path(here, name)).is_symlink():
                sync_file(file)
        sync_folder(Path(here))


def write_whole(file: Path, pieces: Iterable[bytes], mode: int) -> None:
    """Write a file that is there whole and on the disk, or not at all: then what stood there stays.

    Args:
        file: Where to.
        pieces: What, one after the other.
        mode: Permissions.

    Raises:
        OSError: The system refuses it.
    """
    place, name = tempfile.mkstemp(prefix=PREFIX, suffix=DRAFT, dir=file.parent)
    draft = Path(name)
    try:
        with os.fdopen(place, "wb") as out:
            lock_now(place)  # whoever finds the draft sees whether its writer lives
            out.writelines(pieces)
            out.flush()
            os.fsync(out.fileno())
        draft.chmod(mode)
        draft.replace(file)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync_folder(file.parent)


@contextmanager
def synced_meanwhile(*files: Path) -> Iterator[None]:
    """Written files go to the disk while something else is computed."""
    with ThreadPoolExecutor(1) as pool:
        done = [pool.submit(sync_file, file) for file in files]
        yield
        for one in done:
            one.result()


def exchange(one: Path, other: Path) -> bool:
    """Let two folders change their names in one step; False where the system has no such step."""
    library: Any = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    first, second = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        failed = library.renamex_np(first, second, _EXCHANGE)
    elif sys.platform == "linux" and hasattr(library, "renameat2"):
        failed = library.renameat2(_HERE, first, _HERE, second, _EXCHANGE)
    else:
        return False
    if not failed:
        return True
    number = ctypes.get_errno()
    if number in _NO_SUCH_CALL:
        return False
    raise OSError(number, os.strerror(number), str(other))
