"""Damaged folders through every door: refused, named, or equal to what was saved.

Each is opened in a process of its own with a limit of time and of memory: by ``load``, and by the
commands ``verify``, ``inspect``, ``inspect --json`` and ``export``. Not survived is a traceback, a
signal, another exit code, JSON that can't be read, other weights, or an export of other weights.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import rankfold
from benchmarks.damages import damage_bytes, damage_files, damage_json, damaged
from benchmarks.faults import Counts, register_fault
from benchmarks.faults_edits import make, net
from benchmarks.forked import ended, forked
from rankfold.certificate.document import JSON_FILE
from rankfold.cli import app
from rankfold.errors import InputError
from rankfold.files.digests import stream_digest, tensors_digest

SECONDS = 60  # for all doors of one folder, on a busy machine
GIGABYTE = 1 << 30
CODES = (0, 2, 4)
NET = ["--model", "benchmarks.faults_edits:net"]
HELD_OUT = ["--data", "benchmarks.faults_edits:held_out"]


def damaged_document(source: Path, number: int, target: Path) -> str:
    """Of every third folder the certificate is damaged, its signature or texts; gives how."""
    if number % 3:
        return damaged(source, number, target)
    draw = random.Random(number)
    shutil.copytree(source, target)
    ways: list[Callable[[], str]] = [
        lambda: damage_json(target / JSON_FILE, draw),
        lambda: damage_json(target / JSON_FILE, draw),
        lambda: damage_bytes(target / JSON_FILE, draw),
        lambda: damage_bytes(draw.choice(sorted(target.iterdir())), draw),
        lambda: damage_files(target, draw, JSON_FILE),
    ]
    return draw.choice(ways)()


def opened(folder: Path, out: Path, key: Path, weights: str, exported: str) -> None:
    """All doors, one after the other.

    Raises:
        AssertionError: One of them did what it must not.
    """
    try:
        model = rankfold.load(folder, net())
    except InputError:
        pass
    else:
        assert tensors_digest(model.state_dict()) == weights, "load gives other weights"
        with torch.no_grad():
            model(torch.zeros(1, 8))
    name = str(folder)
    for words in (
        ["verify", name, *HELD_OUT, *NET, "--key", str(key), "--json"],
        ["inspect", name],
        ["inspect", name, "--json"],
        ["export", name, "--to", "dense", "--out", str(out), *NET, "--json"],
    ):
        code = _code(words)
        assert code in CODES, f"{words[0]}: exit code {code}"
        if words[0] == "export" and code == 0:
            assert stream_digest(out / "model.safetensors") == exported, "export of other weights"


def _code(words: list[str]) -> int:
    sys.stdout.flush()
    start = os.lseek(1, 0, os.SEEK_END)
    try:
        app(words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    sys.stdout.flush()
    sys.stderr.flush()
    said = Path("/dev/fd/1").read_bytes()[start:].decode("utf-8", "replace")
    assert "Traceback" not in said, f"{words[0]}: {said}"
    if "--json" in words and code != 2:
        json.loads(said[said.index("{\n") :].partition("\nerror:")[0])
    return code


def _in_child(call: Callable[[], None], said: Path) -> str:
    """What went wrong in a process with limits; nothing where nothing did."""

    def limited() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + GIGABYTE, used + GIGABYTE))
        try:
            call()
        except SystemExit as end:  # a call has no exit code of its own
            raise AssertionError(f"it ended the process: {end.code}") from end

    code = ended(forked(limited, said, seconds=SECONDS, failed=1))
    return "" if code == 0 else f"exit {code}: {said.read_text(errors='replace')[-1500:]}"


def damaged_folders(folder: Path, times: int, first: int = 0) -> Counts:
    """So many damaged folders, by their numbers from ``first`` on."""
    made = make(folder)
    weights = tensors_digest(made.model.state_dict())
    rankfold.export(made.folder, folder / "exported", to="dense", model=net())
    exported = stream_digest(folder / "exported" / "model.safetensors")
    survived = 0
    for number in range(first, first + times):
        target, out = folder / "damaged", folder / "out"
        told = damaged_document(made.folder, number, target)

        def call(target: Path = target, out: Path = out) -> None:
            opened(target, out, made.key, weights, exported)

        problem = _in_child(call, folder / "said")
        if problem:
            print(f"not survived: folder {number}, {told}: {problem}", file=sys.stderr, flush=True)
        survived += not problem
        for one in (target, out):
            _removed(one)
    return Counts(times, survived)


def _removed(folder: Path) -> None:
    def again(function: Callable[..., Any], path: str, _: Any) -> None:
        os.chmod(path, 0o700)  # noqa: PTH101
        function(path)

    if folder.is_dir():
        shutil.rmtree(folder, onerror=again)


register_fault("damaged folders through load, verify, inspect and export", damaged_folders, 3000)
