"""Factorized models in vLLM beside the dense one, in turn: ``run serving``.

    python -m benchmarks run serving --folders dense smaller-0.9 smaller-0.8 \
        --python .venv-serving/bin/python

The first folder is the dense model's, which transformers has saved. Each folder has a process of
its own, which stays; the processes are asked in turn, so that whatever else the machine does meets
them alike. The time of a token is that of many tokens without that of one, which holds the
prompt's. A round's ratio is a model's time over the dense model's in the same round: the median
over rounds is shown, with its quartiles, beside the ratio of the bytes of the weights, which is
what decoding at batch 1 is bound by. The same of CPU seconds says what other processes, which
share the cores, add to it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.rows import append_row

BATCHES = (1, 16)
PROMPT, TOKENS = 16, 32  # tokens of a prompt, and written for it
LENGTH = 512  # the longest text, in tokens
CHECKED = 20  # prompts whose tokens are compared with transformers'
RESULTS = Path(__file__).parent / "out" / "serving.jsonl"


@dataclass(frozen=True)
class ServingRow:
    """One model at one batch size.

    Attributes:
        folder: Its name.
        bytes_ratio: Bytes of its weights over the dense model's.
        ratio: Median over rounds of its time a token over the dense model's.
        low: First quartile.
        high: Third quartile.
        cpu_ratio: Median over rounds of its CPU time a token over the dense model's.
        tokens_per_second: Of all sequences together, by the median of its times.
        same: Prompts of ``checked`` for which transformers writes the same tokens.
        gap: The most by which a token that vLLM wrote is behind transformers' best, in logits.
    """

    folder: str
    dtype: str
    threads: int
    batch: int
    rounds: int
    bytes_ratio: float
    ratio: float
    low: float
    high: float
    cpu_ratio: float
    tokens_per_second: float
    checked: int
    same: int
    gap: float


def main(words: Sequence[str]) -> None:
    """Measure, append the rows, and print the table."""
    parser = ArgumentParser(prog="python -m benchmarks run serving", description=__doc__)
    parser.add_argument("--folders", nargs="+", type=Path, required=True)
    parser.add_argument("--python", default=".venv-serving/bin/python", help="that has vLLM")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--checked", type=int, default=CHECKED)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(words)
    engines = [
        Engine(options.python, folder, options.dtype, options.threads) for folder in options.folders
    ]
    try:
        rows = measure(engines, options)
    finally:
        for engine in engines:
            engine.close()
    for row in rows:
        append_row(options.results, row)
    print("\n".join(table(rows)))


class Engine:
    """A process that has one model open in vLLM."""

    def __init__(self, python: str, folder: Path, dtype: str, threads: int) -> None:
        self.folder = folder
        own = {
            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(threads),
        }  # fmt: skip
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks.serving_engine", str(folder), dtype, str(LENGTH)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, **own},
        )  # fmt: skip
        self._answer()  # that it is ready

    def ask(self, prompts: list[list[int]], tokens: int, check: bool = False) -> dict[str, Any]:
        """Let it write."""
        assert self.process.stdin is not None
        asked = {"prompts": prompts, "tokens": tokens, "check": check}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def seconds_a_token(self, batch: int) -> dict[str, float]:
        """Of each of ``batch`` sequences that are decoded together: wall and cpu."""
        prompts = prompts_of(batch)
        many = self.ask(prompts, TOKENS + 1)["seconds"]
        one = self.ask(prompts, 1)["seconds"]
        return {clock: (many[clock] - one[clock]) / TOKENS for clock in many}

    def weights(self) -> int:
        """Bytes of its files of weights."""
        return sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"vLLM ended while {self.folder} was open: try serving_engine alone")
        return dict(json.loads(line))


def prompts_of(count: int, length: int = PROMPT) -> list[list[int]]:
    """Prompts that differ, of ids that every vocabulary of language models has."""
    return [[100 + (37 * number + 11 * place) % 5000 for place in range(length)]
            for number in range(count)]  # fmt: skip


def measure(engines: Sequence[Engine], options: Any) -> list[ServingRow]:
    """A row for each model and batch."""
    dense, *_ = engines
    checks = [engine.ask(prompts_of(options.checked), TOKENS, check=True) for engine in engines]
    rows: list[ServingRow] = []
    for batch in options.batches:
        for engine in engines:
            engine.seconds_a_token(batch)  # warms up
        times = [[e.seconds_a_token(batch) for e in engines] for _ in range(options.rounds)]
        for place, (engine, check) in enumerate(zip(engines, checks, strict=True)):
            walls = [turn[place]["wall"] for turn in times]
            ratios, cpu = (
                [turn[place][clock] / turn[0][clock] for turn in times] for clock in ("wall", "cpu")
            )
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            rows.append(
                ServingRow(
                    folder=engine.folder.name, dtype=options.dtype, threads=options.threads,
                    batch=batch, rounds=options.rounds,
                    bytes_ratio=engine.weights() / dense.weights(), ratio=middle, low=low,
                    high=high,
                    cpu_ratio=statistics.median(cpu),
                    tokens_per_second=batch / statistics.median(walls),
                    checked=options.checked, same=sum(gap == 0 for gap in check["gaps"]),
                    gap=max(check["gaps"]),
                )
            )  # fmt: skip
    return rows


def table(rows: Sequence[ServingRow]) -> list[str]:
    """The rows in Markdown."""
    lines = [
        "| model | batch | tokens a second | time over dense: median (quartiles); CPU time | bytes "
        "over dense | time over bytes | same tokens as transformers |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        close = "" if row.gap == 0 else f", else within {row.gap:.1g}"
        lines.append(
            f"| {row.folder} | {row.batch} | {row.tokens_per_second:.1f} | {row.ratio:.3f} "
            f"({row.low:.3f} to {row.high:.3f}); {row.cpu_ratio:.3f} | {row.bytes_ratio:.3f} | "
            f"{row.ratio / row.bytes_ratio:.3f} | {row.same} of {row.checked}{close} |"
        )
    return lines
