"""Faults that are injected for real, and how many are survived: ``python -m benchmarks faults``.

A fault is a name and a function that injects it as often as asked and gives how often it was tried
and how often survived; ``register_fault`` adds one. Survived means: the output is the old one or
the new one, whole, and what a killed run left is found and put right.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import rankfold
from rankfold import InputError
from rankfold.artifact.manifest import MANIFEST_FILE
from rankfold.artifact.save import save_artifact, try_saving
from rankfold.export.export import export
from rankfold.files.durable import PREFIX
from rankfold.files.folder import check_output, owned_output
from rankfold.files.leftovers import clean_leftovers
from rankfold.machine.interruption import raising


class Counts(NamedTuple):
    """How often a fault was injected, and survived."""

    tried: int
    survived: int


class Fault(NamedTuple):
    """A kind of fault.

    Attributes:
        name: For the table.
        inject: Injects it into a new folder, a number of times.
        times: How often, unless it is said otherwise.
    """

    name: str
    inject: Callable[[Path, int], Counts]
    times: int


FAULTS: list[Fault] = []


def register_fault(name: str, inject: Callable[[Path, int], Counts], times: int) -> None:
    """Add a kind of fault to the table."""
    FAULTS.append(Fault(name, inject, times))


def table(times: int | None = None, names: Iterable[str] = ()) -> tuple[list[str], bool]:
    """Inject all faults; the lines of the table, and whether all were survived.

    Args:
        times: How often each, in place of its own number.
        names: Of the faults; all, where none is given.
    """
    known = {fault.name for fault in FAULTS}
    if unknown := {*names} - known:
        raise InputError(
            f"there is no fault {sorted(unknown)[0]}; expected some of {sorted(known)}"
        )
    wanted = {*names} or known
    lines, survived = ["| fault | tried | survived |", "|---|---|---|"], True
    for fault in FAULTS:
        if fault.name in wanted:
            with tempfile.TemporaryDirectory() as folder:
                print(f"{fault.name} ...", file=sys.stderr, flush=True)
                found = fault.inject(Path(folder), times or fault.times)
            lines.append(f"| {fault.name} | {found.tried} | {found.survived} |")
            survived = survived and found.tried == found.survived > 0
    return lines, survived


SIDE = 200  # of the matrix that is saved: a file of 160 kB


def _model(value: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(SIDE, SIDE))
    nn.init.constant_(model[0].weight, value)  # type: ignore[arg-type]
    return model


def _save(out: Path, value: float, overwrite: bool = True) -> None:
    save_artifact(out, _model(value), {"layers": []}, overwrite=overwrite)


def _run(out: Path, value: float) -> None:
    """As the commands that make a model do: own the folder, try, save."""
    check_output(out, True, MANIFEST_FILE)
    with owned_output(out):
        try_saving(out, _model(value), overwrite=True)
        _save(out, value)


def _export(out: Path, source: Path, to: str) -> None:
    inputs = (SIDE,) if to == "pt2" else None
    given: Any = torch.ones(2, *inputs) if inputs else None
    export(source, out, to=to, model=_model(0), overwrite=True, inputs=given)


def _value(out: Path) -> float:
    """The number that all weights of a whole artifact are; an error of any other."""
    (value,) = set(rankfold.load(out, model=_model(-1)).state_dict()["0.weight"].view(-1).tolist())
    return float(value)


def _child(call: Callable[[], object]) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=_quietly, args=(call,))
    process.start()
    return process


def _quietly(call: Callable[[], object]) -> None:
    with Path(os.devnull).open("w") as nowhere:
        for number in (1, 2):
            os.dup2(nowhere.fileno(), number)
    code = 1
    with suppress(InputError):
        call()
        code = 0
    os._exit(code)


def _hidden(folder: Path) -> list[Path]:
    return [one for one in folder.rglob("*") if one.name.startswith(PREFIX)]


def _ended_in_between(
    folder: Path, times: int, call: Callable[[Path], object], whole: Callable[[Path], bool],
    sent: tuple[signal.Signals, ...],
) -> Counts:  # fmt: skip
    """Signals at random moments of a call; what stands must be whole, or never have stood."""
    draw, survived = random.Random(0), 0
    begun = time.monotonic()
    _child(lambda: call(folder / "first")).join()
    longest = time.monotonic() - begun
    for number in range(times):
        root = folder / str(number)
        root.mkdir()
        process = _child(lambda root=root: call(root / "out"))  # type: ignore[misc]
        time.sleep(draw.uniform(0, longest))
        for one in sent:
            with suppress(ProcessLookupError):
                os.kill(process.pid or 0, one)
        process.join()
        if any(one != signal.SIGKILL for one in sent):
            clean = not _hidden(root)
        else:
            clean_leftovers(root)
            clean = not _hidden(root)
        out = root / "out"
        survived += clean and (not out.exists() or whole(out))
    return Counts(times, survived)


def kills(folder: Path, times: int) -> Counts:
    """kill -9 at random moments of three commands: a run, and two exports."""
    source = folder / "source"
    _save(source, 1)
    commands: list[tuple[Callable[[Path], object], Callable[[Path], bool]]] = [
        (lambda out: _run(out, 1), lambda out: _value(out) == 1),
        (lambda out: _export(out, source, "dense"), lambda out: (out / "export.json").is_file()),
        (lambda out: _export(out, source, "pairs"), lambda out: (out / "export.json").is_file()),
    ]
    found = [Counts(0, 0)]
    for number, (call, whole) in enumerate(commands):
        place = folder / f"command-{number}"
        place.mkdir()
        share = -(-times // len(commands))
        found.append(_ended_in_between(place, share, call, whole, (signal.SIGKILL,)))
    return Counts(sum(one.tried for one in found), sum(one.survived for one in found))


def signals_twice(folder: Path, times: int) -> Counts:
    """A hangup and a kill, one after the other, at random moments of a run."""

    def run(out: Path) -> None:
        with suppress(KeyboardInterrupt), raising():
            _run(out, 1)

    sent = (signal.SIGHUP, signal.SIGTERM)
    return _ended_in_between(folder, times, run, lambda out: _value(out) == 1, sent)


def full_disks(folder: Path, times: int) -> Counts:
    """No file may be larger than a multiple of 64 kB: saving, and exports of three kinds."""
    source = folder / "source"
    _save(source, 1)
    tried = survived = 0
    calls: list[Callable[[Path], object]] = [
        lambda out: _save(out, 2),
        *(lambda out, to=to: _export(out, source, to) for to in ("dense", "pairs", "pt2")),
    ]
    for number, call in enumerate(calls):
        for step in range(times):
            root = folder / f"{number}-{step}"
            root.mkdir()
            process = _child(lambda: _limited(step << 16, call, root / "out"))  # noqa: B023
            process.join()
            written = (root / "out").exists()
            tried += 1
            survived += process.exitcode == (0 if written else 1) and not _hidden(root)
    return Counts(tried, survived)


def _limited(size: int, call: Callable[[Path], object], out: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    call(out)


def pairs_of_runs(folder: Path, times: int) -> Counts:
    """Two runs into one new folder at once: one result stands, the other run is refused."""
    survived = 0
    for number in range(times):
        root = folder / str(number)
        root.mkdir()
        both = [_child(lambda v=v: _new(root / "out", v)) for v in (1.0, 2.0)]  # type: ignore[misc] # noqa: B023
        for one in both:
            one.join()
        codes = [one.exitcode for one in both]
        won = codes.index(0) + 1.0 if 0 in codes else None
        survived += sorted(map(str, codes)) == ["0", "1"] and _value(root / "out") == won
    return Counts(times, survived)


def _new(out: Path, value: float) -> None:
    check_output(out, False, MANIFEST_FILE)
    with owned_output(out):
        check_output(out, False, MANIFEST_FILE)
        _save(out, value, overwrite=False)


def reads(folder: Path, times: int) -> Counts:
    """Reads while another process overwrites the artifact all the time."""
    out, survived = folder / "out", 0
    _save(out, 1)

    def overwrite() -> None:
        while True:
            for value in (2, 1):
                _save(out, value)

    process = _child(overwrite)
    for _ in range(times):
        with suppress(InputError, ValueError):
            survived += _value(out) in (1, 2)
    alive = process.is_alive()
    process.kill()
    process.join()
    clean_leftovers(folder)
    return Counts(times, survived if alive and not _hidden(folder) else 0)


register_fault("kill -9 at random moments of three commands", kills, 300)
register_fault("two signals at random moments of a run", signals_twice, 100)
register_fault("disk full at each 64 kB of saving and three exports", full_disks, 6)
register_fault("two runs into one new folder", pairs_of_runs, 60)
register_fault("reads while the artifact is overwritten", reads, 2000)
