"""Faults of real command lines: kills and signals at random moments, full disks, too little memory.

Each command is what ``rankfold`` runs, with its arguments, in a process that was forked after the
imports: so most moments fall into its work. A full disk is a file system of that size (tmpfs) where
this user may mount one, else a limit of the size of a file.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import rankfold
from benchmarks.faults import Counts, register_fault
from benchmarks.faults_edits import make, net
from benchmarks.forked import ended, forked
from rankfold.certificate.document import read_document
from rankfold.certificate.earlier_uses import VARIABLE
from rankfold.certificate.openings_file import read
from rankfold.cli import main
from rankfold.errors import InputError
from rankfold.files.digests import stream_digest
from rankfold.files.durable import PREFIX
from rankfold.files.leftovers import clean_leftovers

SECONDS = 120  # a command may take, on a busy machine
STEP = 1 << 16  # bytes between two sizes of a full disk
MEMORY = 1 << 24  # bytes between two limits of memory
MODEL, DATA = "benchmarks.faults_edits:net", ["--data", "benchmarks.faults_edits:parts"]
HELD_OUT = ["--data", "benchmarks.faults_edits:held_out"]
REFUSED = (0, 2)
SIGNALLED = (0, 129, 130, 143, -signal.SIGHUP, -signal.SIGTERM)  # the last before it is heard

Limits = Callable[[], object]


def lossless(out: Path) -> list[str]:
    return ["lossless", MODEL, *DATA, "--size", "0.6", "--out", str(out), "--overwrite"]


def exports(source: Path, out: Path) -> list[str]:
    where = ["--out", str(out), "--overwrite"]
    return ["export", str(source), "--to", "dense", "--model", MODEL, *where]


def verifies(source: Path) -> list[str]:
    return ["verify", str(source), *HELD_OUT, "--model", MODEL]


def begun(words: list[str], said: Path, record: Path, limits: Limits = lambda: None) -> int:
    """The process of a command line; what it says goes to a file, its openings to a record."""

    def run() -> None:
        os.environ[VARIABLE] = str(record)
        sys.argv = ["rankfold", *words]
        limits()
        main()

    return forked(run, said, seconds=SECONDS, failed=99)


def _hidden(folder: Path) -> list[str]:
    return [one.name for one in folder.rglob("*") if one.name.startswith(PREFIX)]


def _is_whole(folder: Path) -> bool:
    """Whether an artifact is what its own digests say, and an export the one that is expected."""
    try:
        rankfold.load(folder, net())
        read_document(folder)
    except InputError:
        return False
    return True


def _is_record(file: Path) -> bool:
    """Whether all lines of a record can be read, but for the one that was being written."""
    found = read(file)
    return len(found.damaged) <= (0 if found.ends else 1)


class Commands:
    """Three commands over and over in one folder: their arguments, and whether all is whole."""

    def __init__(self, folder: Path) -> None:
        made = make(folder)
        self.folder, self.source = folder, made.folder
        self.digest = {one.name: stream_digest(one) for one in made.folder.iterdir()}
        self.words: Mapping[str, Callable[[Path], list[str]]] = {
            "lossless": lossless,
            "export": partial(exports, self.source),
            "verify": lambda out: verifies(self.source),
        }

    def whole(self, name: str, out: Path) -> bool:
        now = {one.name: stream_digest(one) for one in self.source.iterdir()}
        if now != self.digest:
            return False
        if name == "lossless":
            return not out.exists() or _is_whole(out)
        return name != "export" or not out.exists() or (out / "export.json").is_file()


def _interrupted(folder: Path, times: int, sent: tuple[signal.Signals, ...]) -> Counts:
    """Signals at ``times`` random moments of each command, one after the other."""
    commands, draw, survived, tried = Commands(folder), random.Random(0), 0, 0
    for name, words in commands.words.items():
        start = time.monotonic()
        ended(begun(words(folder / "first"), folder / "said", folder / "record"))
        longest = time.monotonic() - start
        for number in range(times):
            root = folder / f"{name}-{number}"
            root.mkdir()
            if number % 2 and name == "lossless":  # every second one replaces an earlier result
                shutil.copytree(commands.source, root / "out")
            child = begun(words(root / "out"), root / "said", folder / "record")
            time.sleep(draw.uniform(0, longest))
            for one in sent:
                os.kill(child, one)
            code = ended(child)
            said = (root / "said").read_text(errors="replace") if (root / "said").exists() else ""
            killed = signal.SIGKILL in sent
            if killed:
                clean_leftovers(root)
            fine = killed or (code in SIGNALLED and "Traceback" not in said)
            fine = fine and not _hidden(root) and commands.whole(name, root / "out")
            fine = fine and _is_record(folder / "record")
            if not fine:
                print(f"not survived: {name} {number}, exit {code}: {said[-800:]}", file=sys.stderr)
            tried, survived = tried + 1, survived + fine
            shutil.rmtree(root)
    return Counts(tried, survived)


def kills(folder: Path, times: int) -> Counts:
    """kill -9: the old result or the new one, whole; what is hidden is found; a record of lines."""
    return _interrupted(folder, times, (signal.SIGKILL,))


def signals_twice(folder: Path, times: int) -> Counts:
    """A hangup and a polite kill: nothing is left, one message, a documented exit code."""
    return _interrupted(folder, times, (signal.SIGHUP, signal.SIGTERM))


@contextmanager
def disk(place: Path, size: int) -> Iterator[tuple[Path, Limits]]:
    """A folder on a disk of so many bytes, and limits for the process that writes there."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={max(size, 4096)}", "none", str(place)]
    if os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0:
        try:
            yield place, lambda: None
        finally:
            subprocess.run(["umount", "-l", str(place)], check=True)
        return

    def limits() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    yield place, limits


def full_disks(folder: Path, times: int) -> Counts:
    """Disks of 0, 64, 128, ... kB: for the result of a run, for an export, for the record."""
    commands, survived, tried = Commands(folder), 0, 0
    cases = [(name, step) for name in ("lossless", "export", "record") for step in range(times)]
    for name, step in cases:
        with disk(folder / f"{name}-{step}", step * STEP) as (place, limits):
            out = place / "out" if name != "record" else folder / "elsewhere"
            record = place / "record" if name == "record" else folder / "record"
            words = commands.words["export" if name == "export" else "lossless"](out)
            if name == "record" and step:
                _fill(place, 4096)
            code = ended(begun(words, folder / "said", record, limits))
            said = (folder / "said").read_text(errors="replace")
            fine = code in REFUSED and "Traceback" not in said and not _hidden(place)
            if name == "record":
                history = read_document(out)["data"]["history"] if code == 0 else {}
                kept = record.is_file() and read(record).openings
                fine = fine and bool(kept or history.get("trouble") or code)
            else:
                fine = fine and out.exists() == (code == 0) and commands.whole(name, out)
            if not fine:
                print(f"not survived: {name} {step}, exit {code}: {said[-800:]}", file=sys.stderr)
            tried, survived = tried + 1, survived + fine
    return Counts(tried, survived)


def _fill(place: Path, left: int) -> None:
    """Leave only so many bytes free."""
    free = shutil.disk_usage(place).free
    if free > left and os.path.ismount(place):
        (place / "filled").write_bytes(bytes(free - left))


def memory_limits(folder: Path, times: int) -> Counts:
    """Limits of memory 16 MiB apart: a result, or one message that says what was needed."""
    commands, survived, tried = Commands(folder), 0, 0
    for name, words in commands.words.items():
        for step in range(times):
            root = folder / f"{name}-{step}"
            root.mkdir()
            limits = partial(_limit_memory, step * MEMORY)
            code = ended(begun(words(root / "out"), root / "said", folder / "record", limits))
            said = (root / "said").read_text(errors="replace")
            message = "memory" in said and "error:" in said
            fine = code == 0 or (code == 2 and message)
            fine = fine and "Traceback" not in said and not _hidden(root)
            fine = fine and commands.whole(name, root / "out")
            if not fine:
                print(f"not survived: {name} {step}, exit {code}: {said[-800:]}", file=sys.stderr)
            tried, survived = tried + 1, survived + fine
    return Counts(tried, survived)


def _limit_memory(more: int) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more, used + more))


register_fault("kill -9 at random moments of lossless, export and verify, 100 each", kills, 100)
register_fault("SIGHUP and SIGTERM at random moments of the same", signals_twice, 34)
register_fault("disk full at each 64 kB of a result, an export and the record", full_disks, 8)
register_fault("memory limits 16 MiB apart for the same three commands", memory_limits, 12)
