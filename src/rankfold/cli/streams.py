"""Streams that end no run: what can't be written to them is lost, not the result."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rankfold.errors import visible


class Unbreakable:
    r"""A stream of texts whose first error is kept, and that is quiet from then on.

    Characters that its encoding lacks are written as Python writes them: ``\\u4f60``.

    Attributes:
        error: What kept a text from being written.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """As a stream does."""
        if self.error is None:
            with self._noted():
                try:
                    self._stream.write(text)
                except UnicodeEncodeError:
                    encoding = self._stream.encoding
                    self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, texts: list[str]) -> None:
        """As a stream does."""
        for text in texts:
            self.write(text)

    def flush(self) -> None:
        """As a stream does."""
        if self.error is None:
            with self._noted():
                self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = error
            self._to_nowhere()

    def _to_nowhere(self) -> None:
        """What is still buffered would fail again when Python ends, with a message of its own."""
        with suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


class _Streams:
    """Stdout and stderr of a command."""

    def __init__(self) -> None:
        self.out, self.err = Unbreakable(sys.stdout), Unbreakable(sys.stderr)

    def code(self, code: int, not_printed: int, standing: str) -> int:
        """The exit code of a command, once all that it printed is written.

        Args:
            code: Of the command itself.
            not_printed: Where that is 0, and what was printed could not be written.
            standing: What the command has written to files, in words.

        Returns:
            The command's own, where whoever read stdout has closed it: they had read enough.
        """
        for stream in (self.out, self.err):
            stream.flush()
        error = self.out.error
        if error is None or error.errno == errno.EPIPE:
            return code
        result = f"; {standing}" if standing else ""
        self.err.write(f"error: stdout can't be written: {visible(error)}{result}\n")
        self.err.flush()
        return code or not_printed


@contextmanager
def unbreakable_streams() -> Iterator[_Streams]:
    """Within, nothing that is printed raises an error; what the shell has closed goes nowhere."""
    before = sys.stdout, sys.stderr
    with Path(os.devnull).open("w") as nowhere:
        sys.stdout, sys.stderr = (stream or nowhere for stream in before)
        streams = _Streams()
        sys.stdout, sys.stderr = streams.out, streams.err
        try:
            yield streams
        finally:
            sys.stdout, sys.stderr = before
