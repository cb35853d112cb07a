"""A run owns its output folder, from its start until the result stands there.

Beside the output lies a hidden folder, found by the output's name, with a lock that the system
frees when the run ends, however it ends. In it: ``draft``, what is being written; ``whole``, what
is complete and on the disk, or after the exchange what stood there before (``about.json`` tells
which); ``earlier``, what stood there, where the system can't exchange two folders in one step. So
what a dead run left can be told from what a living one is at, and is put right by the next run, by
``load`` and by ``rankfold clean``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankfold.errors import InputError, visible
from rankfold.files.durable import PREFIX, exchange, sync_file, sync_folder
from rankfold.files.listed import remove_listed
from rankfold.files.locks import lock_now
from rankfold.machine.interruption import shielded

LOCK, ABOUT, DRAFT, WHOLE, EARLIER = "lock", "about.json", "draft", "whole", "earlier"
PATIENCE = 1.0  # seconds until an output is said to be another run's: some own it for a moment
_PAUSE = 0.02

_mine = threading.local()  # what this thread owns, by the output


@dataclass
class Owned:
    """An output that this run owns.

    Attributes:
        output: Where the result shall stand, links followed.
        beside: The hidden folder.
        said: What became of what a dead run had left.
    """

    output: Path
    beside: Path
    said: list[str] = field(default_factory=list)
    _lock: int = -1
    _made: list[Path] = field(default_factory=list)
    _process: int = field(default_factory=os.getpid)

    def fresh_draft(self) -> Path:
        """An empty folder to write into, of the mode that a new folder has here."""
        draft = self.beside / DRAFT
        _remove(draft)
        draft.mkdir()
        return draft

    def file_mode(self) -> int:
        """The mode that a new file has here."""
        return stat.S_IMODE((self.beside / ABOUT).stat().st_mode)

    def complete(self) -> None:
        """The draft is whole, and all of it on the disk.

        Raises:
            OSError: The system refuses that; it is a draft still.
        """
        self.describe(self.beside / DRAFT)
        (self.beside / DRAFT).rename(self.beside / WHOLE)
        sync_folder(self.beside)

    def replace_output(self) -> None:
        """What is whole takes the output's name, in one step where the system has one.

        Raises:
            OSError: The system refuses that; what stood there stands there again.
        """
        whole, earlier = self.beside / WHOLE, self.beside / EARLIER
        if not stands(self.output):
            _move(whole, self.output)
        elif exchange(whole, self.output):
            sync_folder(self.output.parent)
        else:
            self.output.rename(earlier)
            try:
                whole.rename(self.output)
            except OSError:
                earlier.rename(self.output)
                raise
            sync_folder(self.output.parent)
        sync_folder(self.beside)

    def keep_in_sight(self) -> Path | None:
        """Where a whole folder that is not the output's is kept; None where there is none."""
        whole = self.beside / WHOLE
        if not whole.is_dir() or self._is_output_of_whole():
            return None
        kept = free_name(self.output, "saved")
        _move(whole, kept)
        return kept

    def put_right(self) -> None:
        """Give the output back what a dead run has left of it, and remove the rest.

        Raises:
            OSError: The system refuses that.
        """
        found = [name for name in (WHOLE, EARLIER, DRAFT) if (self.beside / name).is_dir()]
        shown = visible(self.output)
        for name in found:
            if name != DRAFT and not stands(self.output):
                _move(self.beside / name, self.output)
                self.said.append(f"restored {shown}: a run that was killed had left it hidden")
        if (kept := self.keep_in_sight()) is not None:
            self.said.append(
                f"a run that was killed had finished what was to replace {shown}; it is in "
                f"{visible(kept)} now"
            )
        if any((self.beside / name).is_dir() for name in found):
            self.said.append(f"removed what a run that was killed had left beside {shown}")
        self.clear()

    def clear(self) -> None:
        """Remove drafts and what was replaced; files that are not rankfold's stay in sight.

        Raises:
            OSError: The system refuses that.
        """
        _remove(self.beside / DRAFT)
        for name in (WHOLE, EARLIER):
            if (folder := self.beside / name).is_dir() and remove_listed(folder):
                kept = free_name(self.output, "kept")
                folder.rename(kept)
                self.said.append(
                    f"files that are not rankfold's lay in {visible(self.output)}; they are in "
                    f"{visible(kept)} now"
                )

    def describe(self, whole: Path | None = None) -> None:
        """Write down who owns the output, and which folder is to be it."""
        about: dict[str, Any] = {"name": self.output.name}
        about |= {"process": os.getpid(), "host": socket.gethostname()}
        if whole is not None:
            about["whole"] = whole.stat().st_ino
        new = self.beside / f"{ABOUT}.new"
        new.write_text(json.dumps(about) + "\n", encoding="utf-8")
        sync_file(new)
        new.replace(self.beside / ABOUT)

    def give_up(self) -> None:
        """Own it no longer: remove the hidden folder, and parents that stayed empty."""
        if self._process != os.getpid():  # a process that was forked from the owner
            return
        with suppress(OSError):  # what stays is found later
            _remove(self.beside / DRAFT)
            if not any((self.beside / name).exists() for name in (WHOLE, EARLIER)):
                for name in (f"{ABOUT}.new", ABOUT, LOCK):
                    (self.beside / name).unlink(missing_ok=True)
                self.beside.rmdir()
        os.close(self._lock)
        for parent in self._made:
            with suppress(OSError):  # it isn't there, or holds something
                parent.rmdir()

    def _is_output_of_whole(self) -> bool:
        """Whether the folder that was to be the output is the one that stands there."""
        number = described(self.beside).get("whole")
        return self.output.is_dir() and self.output.stat().st_ino == number


@contextmanager
def owned(folder: Path) -> Iterator[Owned]:
    """Own an output, in this thread; what owns it already goes on owning it.

    Raises:
        InputError: Another run owns it.
        OSError: The system refuses to write there.
    """
    output = real_path(folder)
    mine: dict[Path, Owned] = _mine.__dict__.setdefault("by_output", {})
    if output in mine and mine[output]._process == os.getpid():
        yield mine[output]
        return
    with ExitStack() as stack:
        with shielded():
            one = mine[output] = _taken(output, hidden_of(output), folder)
            stack.callback(_given_up, mine, output, one)
            one.put_right()
            one.describe()
            tell(one)
        yield one


def dead(beside: Path) -> Owned | None:
    """The output of a hidden folder whose run is dead, owned until ``give_up``; None of a live one.

    Raises:
        OSError: It can't be read, or is not the user's own.
    """
    name = described(beside).get("name")
    output = beside.parent / (name if isinstance(name, str) else "")
    if isinstance(name, str) and hidden_of(output) != beside:
        raise OSError(f"{beside} says that it belongs to {visible(name)}, which it does not")
    _refuse_others(beside)
    lock = _locked(beside)
    return None if lock is None else Owned(output, beside, _lock=lock)


def described(beside: Path) -> dict[str, Any]:
    """What the owner of a hidden folder says of itself; nothing where it was killed before."""
    try:
        told = json.loads((beside / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def hidden_of(output: Path) -> Path:
    """The hidden folder of an output."""
    digest = hashlib.sha256(os.fsencode(output.name)).hexdigest()
    return output.parent / f"{PREFIX}{digest[:16]}"


def real_path(folder: Path) -> Path:
    """Where a folder stands, with links followed: what stands there is replaced, not the link."""
    return Path(os.path.realpath(folder))


def stands(folder: Path) -> bool:
    """Whether anything is there, but for an empty folder."""
    return os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir()))


def free_name(output: Path, word: str) -> Path:
    """A name beside an output that nothing has yet."""
    stem = output.name.encode("utf-8", "surrogateescape")[:230].decode("utf-8", "ignore")
    names = (output.with_name(f"{stem}-{word}-{number}") for number in range(1, 100_000))
    return next(name for name in names if not os.path.lexists(name))


def tell(one: Owned) -> None:
    """Say on stderr what was put right."""
    for line in one.said:
        print(line, file=sys.stderr)
    one.said.clear()


def _taken(output: Path, beside: Path, named: Path) -> Owned:
    until = time.monotonic() + PATIENCE
    made: list[Path] = []
    while True:
        made += _parents_made(output.parent)
        try:
            with suppress(FileExistsError):
                beside.mkdir(0o700)
            _refuse_others(beside)
            lock = _locked(beside)
        except FileNotFoundError:  # its last owner is just removing it, or a parent
            if time.monotonic() > until:
                raise
            lock = None
        except OSError:
            for parent in made:
                with suppress(OSError):
                    parent.rmdir()
            raise
        if lock is not None:
            return Owned(output, beside, _lock=lock, _made=made)
        if time.monotonic() > until:
            raise InputError(
                f"another run{owner(beside)} is writing the output folder {visible(named)}; "
                "wait until it has ended, or choose another folder."
            )
        time.sleep(_PAUSE)


def _parents_made(parent: Path) -> list[Path]:
    """Make a folder and those above it; gives what was made, the deepest first."""
    made = [one for one in (parent, *parent.parents) if not one.exists()]
    try:
        if made:
            parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        for one in made:
            with suppress(OSError):
                one.rmdir()
        raise
    for one in made:
        sync_folder(one.parent)
    return made


def _refuse_others(beside: Path) -> None:
    """Nobody else may have put the hidden folder there: what is in it is deleted."""
    found = beside.lstat()
    mine = not hasattr(os, "geteuid") or found.st_uid == os.geteuid()
    if not stat.S_ISDIR(found.st_mode) or not mine:
        raise OSError(f"{beside} is in the way: it is no folder of yours")


def _locked(beside: Path) -> int | None:
    """An open file that is locked as long as this process lives; None where another has it."""
    file = beside / LOCK
    lock = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
    try:
        if lock_now(lock) and os.path.samestat(os.fstat(lock), file.stat()):
            return lock
    except FileNotFoundError:  # the owner before removed it after it was opened here
        pass
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return None


def _given_up(mine: dict[Path, Owned], output: Path, one: Owned) -> None:
    with shielded():
        del mine[output]
        one.give_up()
        tell(one)


def owner(beside: Path) -> str:
    """The process that owns an output, for messages; nothing where it didn't say."""
    about = described(beside)
    number, host = about.get("process"), about.get("host")
    if not isinstance(number, int):
        return ""
    elsewhere = "" if host == socket.gethostname() else f" on {visible(host)}"
    return f" (process {number}{elsewhere})"


def _move(one: Path, to: Path) -> None:
    if os.name == "nt" and to.is_dir():
        to.rmdir()  # elsewhere an empty folder is replaced
    one.rename(to)
    sync_folder(to.parent)


def _remove(draft: Path) -> None:
    if draft.is_dir():
        shutil.rmtree(draft)
