"""How often is ``rankfold certify`` wrong? The worlds of ``benchmarks.coverage``, by its own path.

    python -m benchmarks.coverage_given run      # some minutes on one core
    python -m benchmarks.coverage_given table

Each repetition draws a data set, divides it as the command does, states the range from the
selection examples, opens the rest once and makes the certificate with its file. The true mean
change lies exactly at the margin. A certificate is wrong where its bound is below the mean of the
changes cut at its range, which is what it claims; ``whole`` counts a "lossless" where the mean of
the uncut changes is at the margin, which no finite sample can exclude. Rows go to
``benchmarks/out/coverage_given.jsonl``.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.coverage import ALPHA, WORLDS, cut_means, true_mean
from benchmarks.documents import markdown
from benchmarks.rows import append_row, read_rows
from rankfold.certificate.bounds import share_bound
from rankfold.certificate.earlier_uses import VARIABLE
from rankfold.data.parts import Part
from rankfold.given_models import certify_models
from rankfold.machine.progress import Progress
from rankfold.others.source import Identity
from rankfold.others.two_parts import divided
from rankfold.settings import Settings
from rankfold.tasks.evaluation import Evaluation

RESULTS = Path(__file__).parent / "out" / "coverage_given.jsonl"
REPETITIONS = 1000
EXAMPLES = (40, 128)  # of a data set, before a quarter of it is taken for the range
MARGIN = 0.01


@dataclass(frozen=True)
class Row:
    """Rates in one world."""

    world: str
    examples: int
    repetitions: int
    false: int
    whole: int

    @property
    def most(self) -> float:
        """Upper 99 % bound of the rate (Clopper and Pearson)."""
        return share_bound(self.false, self.repetitions, 0.99)


class Drawn:
    """A model whose loss of each example is known: its number in the data set says which."""

    task, unit = "classification", "nats per example"

    def __init__(self, name: str, losses: Tensor) -> None:
        self.identity = Identity("simulated", name, name[0] * 64)
        self._losses = losses

    def check(self, part: Part) -> None:
        """Nothing can be wrong."""

    def losses(self, part: Part, progress: Progress, stage: str, *, finite: bool) -> Evaluation:
        """As they were drawn."""
        found = self._losses[[int(example) for example in part.examples]]
        return Evaluation(found, torch.ones_like(found), None)


def repeated(world: str, examples: int, repetitions: int) -> Row:
    """Certificates in one world.

    Raises:
        ValueError: Candidates are chosen in it, which nothing here does.
    """
    if WORLDS[world].plans > 1:
        raise ValueError(f"in the world {world} plans are chosen; none are here")
    numbers = [torch.tensor(number) for number in range(examples)]
    digests = [f"{number:064x}" for number in range(examples)]
    data = Part("held_out", numbers, list, digests)
    shift = MARGIN - true_mean(world)
    rng = np.random.default_rng([7, examples])
    changes = WORLDS[world].draw(rng, (repetitions, examples)) + shift
    original = Drawn("a", torch.zeros(examples, dtype=torch.float64))
    false = whole = 0
    for number, drawn in enumerate(changes):
        held_out, selection = divided(data, number)
        found = certify_models(
            original,
            Drawn("b", torch.from_numpy(drawn)),
            held_out,
            selection,
            margin=MARGIN,
            settings=Settings(seed=number),
        ).certificate
        assert found.highest is not None
        claimed = float(cut_means(world, np.array([found.highest - shift]))[0]) + shift
        false += found.upper_bound < claimed
        whole += found.holds
    return Row(world, examples, repetitions, int(false), int(whole))


def table(rows: Sequence[Row]) -> str:
    """As Markdown."""
    cells = [
        [
            row.world, str(row.examples), f"{row.false / row.repetitions:.1%}", f"{row.most:.1%}",
            f"{row.whole / row.repetitions:.1%}",
        ]
        for row in rows
    ]  # fmt: skip
    heads = ["world", "examples", "bound too low", "upper 99 % bound", "false lossless, whole mean"]
    return markdown(heads, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.command == "run":
        os.environ[VARIABLE] = "off"
        done = {(row.world, row.examples) for row in read_rows(options.results, Row)}
        for examples in EXAMPLES:
            for world in WORLDS:
                if WORLDS[world].plans == 1 and (world, examples) not in done:
                    row = repeated(world, examples, options.repetitions)
                    append_row(options.results, row)
                    print(f"{world}, {examples}: {row.false / row.repetitions:.1%}", flush=True)
    rows = read_rows(options.results, Row)
    print(table(rows))
    worst = max((row.false / row.repetitions for row in rows), default=0.0)
    print(f"highest rate {worst:.1%}; promised {ALPHA:.0%}")


if __name__ == "__main__":
    main()
