"""New processes that have torch and transformers imported: forks of one that has, without rankfold.

Those imports take longer than most of what tests run in a process of its own. rankfold is not among
them, so that a fork can be one that has no rankfold.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from tests.command_line import TIMEOUT, environment

IMPORTED_BEFORE = [
    "torch",
    "safetensors.torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.gpt2.modeling_gpt2",
]

# It forks for each request a process that forks the new one, waits for it and says how it ended.
_PARENT = """
import contextlib, gc, importlib, json, os, signal, socket, sys, traceback

def run(request, streams):
    for place, stream in enumerate(streams, start=1):
        os.dup2(stream, place)
    os.closerange(3, 256)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["variables"])
    sys.argv[:] = ["-c", *request["words"]]
    sys.path[:0] = ["", *filter(None, request["variables"].get("PYTHONPATH", "").split(os.pathsep))]
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 0
    try:
        exec(compile(request["code"], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)

for name in sys.argv[2:]:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
gc.collect()
gc.freeze()
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
listening = socket.socket(fileno=int(sys.argv[1]))
while True:
    connection, _ = listening.accept()
    with connection:
        words, streams, _, _ = socket.recv_fds(connection, 1 << 20, 2)
        if not words:
            break
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listening.close()
            child = os.fork()
            if not child:
                run(json.loads(words), streams)
            for stream in streams:
                os.close(stream)
            connection.sendall(b"%d\\n" % child)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            connection.sendall(b"%d\\n" % status)
            os._exit(0)
        for stream in streams:
            os.close(stream)
"""


@functools.cache
def _address() -> str:
    """Where the process that forks listens; it is started once, and ends with this one."""
    folder = tempfile.TemporaryDirectory(prefix="rankfold-tests-")
    address = str(Path(folder.name) / "socket")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        parent = subprocess.Popen(
            [sys.executable, "-c", _PARENT, str(listening.fileno()), *IMPORTED_BEFORE],
            pass_fds=[listening.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, env=environment(),
        )  # fmt: skip

    @atexit.register
    def end() -> None:
        parent.kill()
        parent.wait()
        folder.cleanup()

    return address


class NewProcess:
    """Python code in a new process: what ``subprocess.Popen`` has of it, as far as tests ask.

    Attributes:
        pid: Of the new process.
        stdout: What it writes, as it writes it.
        stderr: The same, in a file.
        returncode: None while it runs; negative where a signal ended it.
    """

    def __init__(
        self, code: str, *words: object, cwd: Path, variables: Mapping[str, str] | None = None
    ) -> None:
        self.returncode: int | None = None
        self.stderr = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        read, write = os.pipe()
        self.stdout: TextIO = open(read, encoding="utf-8")  # noqa: SIM115, PTH123
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.settimeout(TIMEOUT)
        self._connection.connect(_address())
        request = {
            "code": textwrap.dedent(code), "words": [*map(str, words)], "cwd": str(cwd),
            "variables": dict(environment() if variables is None else variables),
        }  # fmt: skip
        streams = [write, self.stderr.fileno()]
        socket.send_fds(self._connection, [json.dumps(request).encode()], streams)
        os.close(write)
        self._said = self._connection.makefile("rb")
        self.pid = int(self._said.readline())

    def __enter__(self) -> NewProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        for opened in (self.stdout, self.stderr, self._said, self._connection):
            opened.close()

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = int(self._said.readline())
        return self.returncode

    def poll(self) -> int | None:
        if self.returncode is None:
            self._connection.settimeout(0)
            try:
                ended = bool(self._connection.recv(1, socket.MSG_PEEK))
            except BlockingIOError:
                ended = False
            finally:
                self._connection.settimeout(TIMEOUT)
            if ended:
                self.wait()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self) -> tuple[str, str]:
        """All that it wrote to both, when it has ended."""
        with self:
            said = self.stdout.read()
            self.wait()
            self.stderr.seek(0)
            return said, self.stderr.read()


def in_a_new_process(
    code: str, *words: object, cwd: Path, expect: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run Python code to its end."""
    process = NewProcess(code, *words, cwd=cwd)
    said, errors = process.communicate()
    assert process.returncode == expect, said + errors
    return subprocess.CompletedProcess([code, *map(str, words)], expect, said, errors)
