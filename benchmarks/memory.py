"""Peak memory of a process that makes one compressed model: ``run memory``.

A process of its own does nothing but open the model, pass over the data and make the model: by a
method of the field, with the statistics that all of them share, or by ``rankfold.lossless`` as a
user calls it, which drops what it has used, in memory or with an offload folder. ``dense`` opens
the model and evaluates a batch.

Of resident memory the anonymous part has no other place to be; the pages of mapped files are
written out where memory is short. How many calibration examples there are changes it little.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

import rankfold
from benchmarks.field import open_study, sizes_of
from benchmarks.field_models import FIELD_MODELS, TASKS, limits_of
from benchmarks.methods import METHODS
from benchmarks.rows import append_row, read_rows
from benchmarks.speed import sibling
from rankfold.data.example import default_batch_size
from rankfold.machine.freed_memory import give_back_freed_memory
from rankfold.machine.progress import SilentProgress
from rankfold.model.evaluation_mode import evaluation_mode
from rankfold.model.sizes import model_parameters
from rankfold.tasks.losses import output_of, without_labels

DENSE, PRODUCT, OFFLOADED = "dense", "lossless", "lossless-offloaded"
PRODUCTS = (PRODUCT, OFFLOADED)
LABELS = {
    DENSE: "dense, evaluated only",
    PRODUCT: "`rankfold lossless`",
    OFFLOADED: "`rankfold lossless --offload-folder`",
}
SAMPLES_EVERY = 0.01  # seconds


@dataclass(frozen=True)
class MemoryRow:
    """Peak memory of a process that makes one model.

    Attributes:
        megabytes: Resident, in 10^6 bytes.
        anonymous: Of that the anonymous part; None in rows of before it was looked at.
        parameters: Of the dense model.
    """

    model: str
    seed: int
    method: str
    size: float | None
    megabytes: float
    anonymous: float | None = None
    parameters: int | None = None

    @property
    def key(self) -> tuple[object, ...]:
        return (self.model, self.seed, self.method, self.size)

    @property
    def label(self) -> str:
        return LABELS.get(self.method) or METHODS[self.method].label


def measure_memory(
    results: Path,
    name: str,
    seed: int,
    methods: Sequence[str],
    sizes: Sequence[float],
    threads: int,
    calibration: int | None,
) -> None:
    """One process after the other, each for one model."""
    file = sibling(results, "memory")
    done = {row.key for row in read_rows(file, MemoryRow)}
    product = [(method, size) for method in methods if method in PRODUCTS for size in sizes]
    others = sizes_of([method for method in methods if method in METHODS], sizes)
    for method, size in [(DENSE, None), *product, *others]:
        if (name, seed, method, size) in done:
            continue
        command = [sys.executable, "-m", "benchmarks.memory", name, str(seed), method]
        command += [str(size), str(threads), str(calibration or FIELD_MODELS[name][1])]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            # The exit status: a process that was killed for memory says nothing itself.
            said = (run.stderr.strip().splitlines() or [""])[-1]
            print(f"{name} {method} {size}: exit {run.returncode}, {said}", flush=True)
            continue
        resident, anonymous, parameters = run.stdout.split()[-3:]
        row = MemoryRow(
            name, seed, method, size, float(resident), float(anonymous), int(parameters)
        )
        append_row(file, row)
        found = f"{row.megabytes:.0f} MB, {row.anonymous:.0f} anonymous"
        print(f"{name} {method} {size}: {found}", flush=True)


def work(name: str, seed: int, method: str, size: float, calibration: int) -> int:
    """Make the model; gives the parameters of the dense one."""
    if method in METHODS:
        study, _ = open_study(name, seed, SilentProgress(), calibration)
        if not METHODS[method].fits(study):
            raise SystemExit(f"{method} is not for {name}")
        METHODS[method].prepare(study)(size)
        return model_parameters(study.collected.model)
    model, data = FIELD_MODELS[name][0](seed, calibration)
    if method == DENSE:
        count = default_batch_size(data.held_out[0])
        examples = [data.held_out[place] for place in range(count)]
        collate = data.collate or torch.utils.data.default_collate
        with evaluation_mode(model):
            output_of(model, without_labels(collate(examples)))
    else:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            rankfold.lossless(
                model,
                data,
                size=size,
                size_of="factorizable",
                offload_folder=folder if method == OFFLOADED else None,
                task=TASKS.get(name),
                seed=seed,
                **limits_of(data),
            )
    return model_parameters(model)


def anonymous_bytes() -> int:
    """Resident memory of this process that is of no file; on Linux."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["RssAnon"].split()[0])


@contextmanager
def peak_of_anonymous() -> Iterator[list[int]]:
    """Its first element is the most bytes of anonymous resident memory that this process had."""
    peak, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(SAMPLES_EVERY):
            peak[0] = max(peak[0], anonymous_bytes())

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield peak
    finally:
        over.set()
        watching.join()


def main() -> None:
    """Do the work in this process; prints the peaks in MB (10^6 bytes), and the parameters."""
    name, seed, method, size, threads, calibration = sys.argv[1:]
    torch.set_num_threads(int(threads))
    give_back_freed_memory()
    share = 1.0 if size == "None" else float(size)
    with peak_of_anonymous() as anonymous:
        parameters = work(name, int(seed), method, share, int(calibration))
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(resident / 1e6, anonymous[0] / 1e6, parameters)


if __name__ == "__main__":
    main()
