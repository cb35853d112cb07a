"""Processes of their own for what may hang, crash or be killed."""

from __future__ import annotations

import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def forked(function: Callable[[], object], said: Path, *, seconds: int, failed: int) -> int:
    """Start a process that only runs this; gives its number.

    Args:
        function: What it runs. ``SystemExit`` is its exit code, else 0.
        said: File that it writes to in place of stdout and stderr, also by their numbers.
        seconds: Until it is ended by an alarm.
        failed: Exit code where it raises anything else, whose traceback is written.
    """
    child = os.fork()
    if child:
        return child
    code = failed
    try:
        signal.alarm(seconds)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        file = os.open(said, os.O_CREAT | os.O_TRUNC | os.O_RDWR | os.O_APPEND)
        for number in (1, 2):
            os.dup2(file, number)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
        function()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            with suppress(OSError, ValueError):  # a full disk
                sys.stdout.flush()
                sys.stderr.flush()
        finally:
            os._exit(code)


def ended(child: int) -> int:
    """Exit code of a process once it ends; minus the number of a signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
