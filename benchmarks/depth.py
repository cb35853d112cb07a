"""Peak memory against depth: ``python -m benchmarks.depth``.

A Llama of random weights, 256 wide, with 6 to 48 blocks, made smaller by ``rankfold.lossless`` in a
process of its own each time: all at once, and with a limit of memory. Shown is the peak of the
anonymous part of resident memory, in all and beyond the weights' own bytes, by stage; the line
fitted to the peaks beyond the weights says how much a block adds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rankfold
from benchmarks.memory import anonymous_bytes
from rankfold import Data
from rankfold.machine import offload
from rankfold.machine.freed_memory import give_back_freed_memory

Item = TypeVar("Item")
DEPTHS = (6, 12, 24, 48)
WORDS, WIDTH, LENGTH = 512, 256, 128
SMALL = 1 << 14  # bytes that stay in memory: these layers are small, those of large models aren't
COUNTS = (16, 8, 16)  # examples of each part


class Peaks:
    """The highest anonymous memory of each stage; shown as a progress."""

    def __init__(self) -> None:
        self.of_stage: dict[str, int] = defaultdict(int)
        self.stage = "opening"
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.of_stage[self.stage] = max(self.of_stage[self.stage], anonymous_bytes())
            time.sleep(0.005)

    def track(self, items: Iterable[Item], stage: str, total: int) -> Iterator[Item]:
        """The items; memory is that of this stage while they last."""
        before, self.stage = self.stage, stage.split(" ")[0] + " " + " ".join(stage.split(" ")[1:3])
        try:
            yield from items
        finally:
            self.stage = before


def llama(depth: int) -> LlamaForCausalLM:
    """Random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=depth,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=LENGTH,
    )  # fmt: skip
    model: LlamaForCausalLM = LlamaForCausalLM(config).eval()
    return model


def work(depth: int, memory: str | None, effort: Any) -> dict[str, Any]:
    """Make one model smaller; its peaks."""
    give_back_freed_memory()
    offload.SMALL = SMALL
    torch.set_num_threads(1)
    model = llama(depth)
    weights = 4 * sum(p.numel() for p in model.parameters())
    generator = torch.Generator().manual_seed(1)
    first, second, third = (
        list(torch.randint(WORDS, (count, LENGTH), generator=generator)) for count in COUNTS
    )
    start, peaks, began = anonymous_bytes(), Peaks(), time.monotonic()
    options: dict[str, Any] = {} if memory is None else {"memory": memory}
    if memory is not None:
        options["offload_folder"] = tempfile.gettempdir()
    rankfold.lossless(
        model, Data(first, second, third), size=0.8, effort=effort, batch_size=2, progress=peaks,
        guard=None, **options,
    )  # fmt: skip
    return {
        "depth": depth,
        "weights": weights,
        "start": start,
        "peaks": dict(peaks.of_stage),
        "seconds": time.monotonic() - began,
    }


def main() -> None:
    """Print peaks by depth, and the line fitted to them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS)
    parser.add_argument("--effort", default="fast")
    parser.add_argument("--memory", default="limit", help="limit, none, or both")
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--stages", action="store_true", help="show every stage's peak")
    options = parser.parse_args()
    if options.work is not None:
        memory = None if options.memory == "none" else options.memory
        print(json.dumps(work(options.work, memory, options.effort)))
        return
    modes = ("none", "limit") if options.memory == "both" else (options.memory,)
    for mode in modes:
        beyond = []
        for depth in options.depths:
            weights = 4 * sum(p.numel() for p in llama(depth).parameters())
            memory = mode if mode == "none" else str(20 * weights // 4 // 1000) + "KB"
            command = [sys.executable, "-m", "benchmarks.depth", "--work", str(depth)]
            command += ["--memory", memory, "--effort", options.effort]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            peak = max(found["peaks"].values())
            over = peak - found["start"]
            beyond.append(over)
            print(
                f"memory {memory:>10} {depth:3} blocks, weights {weights / 1e6:6.1f} MB, peak "
                f"{peak / 1e6:7.1f} MB, since opened {over / 1e6:7.1f} MB, "
                f"{found['seconds']:5.1f} s",
                flush=True,
            )
            if options.stages:
                for stage, value in found["peaks"].items():
                    print(f"    {stage:40} {(value - found['start']) / 1e6:8.1f} MB")
        if len(beyond) > 1:
            slope, first = np.polyfit(options.depths, np.array(beyond) / 1e6, 1)
            print(f"memory {mode}: {first:.1f} MB and {slope:.2f} MB a block", flush=True)


if __name__ == "__main__":
    main()
