"""``--quiet`` and ``--verbose``: how much of a command's way is told on stderr."""

from __future__ import annotations

import io
import logging
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, TextIO

from rankfold.errors import visible

LOG = logging.getLogger("rankfold")


class Silenced(io.TextIOBase):
    """A stderr that drops what is printed on it.

    Attributes:
        loud: The stream behind it, for errors and warnings.
    """

    encoding = "utf-8"

    def __init__(self, loud: TextIO) -> None:
        super().__init__()
        self.loud = loud

    def write(self, text: str, /) -> int:
        """Print nothing."""
        return len(text)


def loud_stderr() -> Any:
    """Stderr, whatever is silenced."""
    return sys.stderr.loud if isinstance(sys.stderr, Silenced) else sys.stderr


@contextmanager
def told(command: str, values: Mapping[str, Any], *, quiet: bool, verbose: bool) -> Iterator[None]:
    """Within, stderr is silenced, or a log of the command is written on it, or neither.

    Args:
        command: Its name.
        values: Its options.
        quiet: Whether it is silenced.
        verbose: Whether there is a log.
    """
    if quiet:
        before = sys.stderr
        sys.stderr = Silenced(before)
        try:
            yield
        finally:
            sys.stderr = before
    elif verbose:
        with _logged(command, values):
            yield
    else:
        yield


@contextmanager
def _logged(command: str, values: Mapping[str, Any]) -> Iterator[None]:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    before = LOG.level, LOG.propagate
    LOG.addHandler(handler)
    LOG.setLevel(logging.DEBUG)
    LOG.propagate = False  # a model's own code may have set up logging
    began, spent = time.monotonic(), time.process_time()
    libraries = ", ".join(f"{name} {version(name)}" for name in ("rankfold", "torch", "numpy"))
    LOG.info("%s, Python %s, %s", libraries, platform.python_version(), platform.platform())
    if (torch := sys.modules.get("torch")) is not None:
        LOG.info("%d threads", torch.get_num_threads())
    given = {name.replace("_", "-"): visible(value) for name, value in values.items() if value}
    LOG.debug("%s: %s", command, ", ".join(f"{name} = {text}" for name, text in given.items()))
    try:
        yield
    finally:
        took, used = time.monotonic() - began, time.process_time() - spent
        LOG.info("%s took %.1f s, of the CPU %.1f s%s", command, took, used, _most_memory())
        LOG.removeHandler(handler)
        LOG.setLevel(before[0])
        LOG.propagate = before[1]


def _most_memory() -> str:
    if sys.platform == "win32":
        return ""
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    most *= 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return f", {most / 1e9:.2f} GB of memory at most"
