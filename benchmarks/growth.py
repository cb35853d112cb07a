"""How time and memory grow with tokens, width and depth: ``python -m benchmarks.growth``.

Language models without training, on random tokens: what is computed is the same. One size of
``lossless`` in a process of its own for each point; exponents by least squares of logarithms, over
what the smallest point has. Expected: linear in tokens and depth, at most cubic in width.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from rankfold.effort import EFFORTS, EffortName
from rankfold.keywords import Options

TARGETS = {"tokens": 1.0, "depth": 1.0, "width": 3.0}


@dataclass(frozen=True)
class Point:
    """One model and its data.

    Attributes:
        tokens: Of calibration, in windows of 128.
        width: Of the hidden states; the feed-forward layers are three times as wide.
        depth: Layers.
        effort: Of the run.
    """

    tokens: int = 2048
    width: int = 256
    depth: int = 4
    effort: EffortName = "standard"


AXES: dict[str, tuple[int, ...]] = {
    "tokens": (1024, 2048, 4096, 8192),
    "width": (128, 256, 512, 768),
    "depth": (2, 4, 8, 16),
}


def measured(point: Point) -> tuple[float, float]:
    """CPU seconds and peak resident memory (10^6 bytes) beyond those of a process that opens it."""
    empty, whole = (_child(point, run) for run in ("open", "lossless"))
    return whole[0] - empty[0], whole[1] - empty[1]


def _child(point: Point, run: str) -> tuple[float, float]:
    command = [sys.executable, "-m", "benchmarks.growth", run, json.dumps(asdict(point))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, megabytes = done.stdout.split()[-2:]
    return float(seconds), float(megabytes)


def run_here(run: str, point: Point) -> None:
    """Open, or factorize, in this process; prints what it took."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import rankfold
    from rankfold import Data
    from rankfold.machine.freed_memory import give_back_freed_memory

    torch.set_num_threads(1)
    torch.manual_seed(0)
    give_back_freed_memory()
    config = LlamaConfig(
        vocab_size=256, hidden_size=point.width, intermediate_size=3 * point.width,
        num_hidden_layers=point.depth, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=128,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    windows = list(torch.randint(256, (point.tokens // 128 + 16, 128)))
    data = Data(calibration=windows[16:], selection=windows[:8], held_out=windows[8:16])
    options: Options = {"effort": point.effort, "seed": 0, "limit": len(windows) - 16}
    if run == "lossless":
        rankfold.lossless(model, data, size=0.8, **options)
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(used.ru_utime + used.ru_stime, used.ru_maxrss / 1e3)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of a straight line through logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def main() -> None:
    """Measure all points and print the fits."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--effort", choices=[*EFFORTS], default="standard")
    parser.add_argument("--axes", nargs="+", choices=[*AXES], default=[*AXES])
    options = parser.parse_args()
    print("| axis | at | CPU, s | memory, MB |", "| --- | ---: | ---: | ---: |", sep="\n")
    fits = []
    for axis in options.axes:
        found = []
        for value in AXES[axis]:
            point = Point(**{axis: value, "effort": options.effort})
            found.append(measured(point))
            seconds, megabytes = found[-1]
            print(f"| {axis} | {value} | {seconds:.1f} | {megabytes:.0f} |", flush=True)
        of_time, of_memory = (exponent(AXES[axis], each) for each in zip(*found, strict=True))
        fits.append(f"| {axis} | {of_time:.2f} | {of_memory:.2f} | {TARGETS[axis]:g} |")
    print("", "| axis | time | memory | at most |", "| --- | ---: | ---: | ---: |", *fits, sep="\n")


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] in ("open", "lossless"):
        run_here(sys.argv[1], Point(**json.loads(sys.argv[2])))
    else:
        main()
