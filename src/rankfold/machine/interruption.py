"""Ctrl-C and polite kills: what ends a command, when, and what may not be cut in two.

Nothing but the standard library is imported, since a command may be interrupted while it imports.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import current_thread, main_thread
from types import FrameType
from typing import Any

UNWINDING = 2.0  # seconds from a signal until the next one is raised, too
INTERRUPTED = "interrupted; nothing was saved"
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # the last is none of Windows
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


class Interruption(KeyboardInterrupt):
    """A signal that ends the command, as Ctrl-C does.

    Attributes:
        number: Of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def exit_code(interruption: KeyboardInterrupt) -> int:
    """128 and the number of the signal, as shells say it."""
    return 128 + getattr(interruption, "number", signal.SIGINT)


@contextmanager
def raising() -> Iterator[None]:
    """Within, the signals that end a command raise ``Interruption``; outside, what was set before.

    What ignores a signal (``nohup``) goes on ignoring it. One that comes while the first is being
    seen to (Ctrl-C twice, a hangup and a kill) changes nothing.
    """
    last = -UNWINDING

    def interrupt(number: int, _: FrameType | None) -> None:
        nonlocal last
        if time.monotonic() - last >= UNWINDING:
            last = time.monotonic()
            raise Interruption(number)

    with _handled(interrupt):
        yield


@contextmanager
def shielded() -> Iterator[None]:
    """Within, the signals that end a command wait: what is done here is done wholly.

    The first that came is handled at the end.
    """
    came: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        came.append(number)

    try:
        with _handled(note):
            yield
    finally:
        if came:
            signal.raise_signal(came[0])


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    before: dict[int, Any] = {}
    try:
        if current_thread() is main_thread():  # Python sets no handler elsewhere
            for number in SIGNALS:
                standing = signal.getsignal(number)
                if standing not in (signal.SIG_IGN, None):
                    before[number] = standing
                    signal.signal(number, handler)
        yield
    finally:
        for number, standing in before.items():
            signal.signal(number, standing)


def ignore_from_here() -> None:
    """The command is over: whatever comes now changes neither its exit code nor what it said."""
    for number in SIGNALS:
        with suppress(ValueError):  # no main thread
            signal.signal(number, signal.SIG_IGN)


def end_at_once() -> None:
    """Until a command has begun there is nothing to clean: a signal ends it with its message."""

    def end(number: int, _: FrameType | None) -> None:
        with suppress(OSError):
            os.write(2, f"{INTERRUPTED}\n".encode())
        os._exit(128 + number)

    for number in SIGNALS:
        with suppress(ValueError):  # no main thread
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, end)


def open_standard_streams() -> None:
    """Open what the shell has closed of stdin, stdout and stderr, to nowhere.

    Else the next file that is opened has the number of stdout, and what is printed goes into it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
            os.set_inheritable(opened, True)


def _is_command() -> bool:
    return Path(sys.argv[0] if sys.argv else "").stem == "rankfold"


if _is_command():  # importing torch takes seconds
    open_standard_streams()
    end_at_once()
