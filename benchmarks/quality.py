"""Loss against size for every objective: the tables of docs/results.md.

    python -m benchmarks.quality run resnet20 smollm2 --seeds 0 1
    python -m benchmarks.quality table

``run`` measures and appends one JSON line a result to ``benchmarks/out/quality.jsonl``; a result
that is there already is not measured again. ``table`` prints the tables from those lines.

Dense model, every objective, both forms and the control (the dense model moved by the joint
objective's step) are evaluated on the same examples, with the same statistics in a seed. A seed
draws the calibration and selection examples; the test examples stay the same. Size is the share
kept of the weights in the layers that can be factorized.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, cast, get_args

import torch
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.cifar_nets import cifar10_test, cifar10_train, load_cifar_net
from benchmarks.command_line import commands, parsed
from benchmarks.rows import Recorder, read_rows
from rankfold.certify import paired_change
from rankfold.collected import collect
from rankfold.data import Data
from rankfold.modules import FORMS, Form
from rankfold.objectives import OBJECTIVES, ObjectiveName
from rankfold.settings import Settings
from rankfold.stage import Stage
from rankfold.tasks import Evaluation

RESULTS = Path(__file__).parent / "out" / "quality.jsonl"
SELECTION_IMAGES = 300


@dataclass(frozen=True)
class Row:
    """One model evaluated on the test examples."""

    model: str
    seed: int
    objective: str
    form: str
    damping: float
    size: float | None  # None: the dense model, or the control
    kept: float  # share of the whole model's parameters
    loss: float
    accuracy: float
    change: float
    standard_error: float
    predicted: float | None
    eta: float | None
    curvature: str | None
    calibration_loss: float | None

    @property
    def key(self) -> tuple[object, ...]:
        return (self.model, self.seed, self.objective, self.form, self.damping, self.size)


def smollm2(seed: int, calibration: int) -> tuple[nn.Module, Data]:
    """64 x 512 tokens of train, 12 x 512 of valid, 32 x 512 of test."""
    from benchmarks.language_models import load_smollm2, wikitext2  # needs transformers

    model, tokenizer = load_smollm2()

    def windows(part: Any, count: int, draw: int) -> list[torch.Tensor]:
        return list(wikitext2(part, tokenizer, length=512, count=count, seed=draw))

    data = Data(
        calibration=windows("train", calibration, seed),
        selection=windows("valid", 12, seed),
        held_out=windows("test", 32, 0),
    )
    return cast("nn.Module", model), data


def resnet(name: str, seed: int, calibration: int) -> tuple[nn.Module, Data]:
    """Training images for the statistics; the 1,000 test images for selection and test."""
    model, mean_, std = load_cifar_net(name)
    images, labels = cifar10_test(mean_, std)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    selection, test = order[:SELECTION_IMAGES], order[SELECTION_IMAGES:]
    data = Data(
        calibration=cast("Any", TensorDataset(*cifar10_train(calibration, seed, mean_, std))),
        selection=cast("Any", TensorDataset(images[selection], labels[selection])),
        held_out=cast("Any", TensorDataset(images[test], labels[test])),
    )
    return model, data


MODELS: dict[str, tuple[Callable[[int, int], tuple[nn.Module, Data]], int]] = {
    "smollm2": (smollm2, 64),
    "resnet20": (lambda seed, n: resnet("akamaster_resnet20", seed, n), 2000),
    "chenyaofo_resnet20": (lambda seed, n: resnet("chenyaofo_resnet20", seed, n), 2000),
    "resnet56": (lambda seed, n: resnet("akamaster_resnet56", seed, n), 2000),
}


class Runner(Recorder[Row]):
    """Measures what is not measured yet, and writes each result as it comes."""

    def __init__(self, file: Path) -> None:
        super().__init__(file, Row)

    def run(
        self,
        name: str,
        seed: int,
        objectives: Sequence[ObjectiveName],
        forms: Sequence[Form],
        sizes: Sequence[float],
        dampings: Sequence[float],
    ) -> None:
        """All rows of one model and one seed, from one pass over the calibration examples."""
        wanted = [
            (objective, damping)
            for damping in dampings
            for objective in objectives
            if any(
                (name, seed, objective, form, damping, size) not in self.done
                for form in forms
                for size in sizes
            )
        ]
        if not wanted:
            return
        build, calibration = MODELS[name]
        model, data = build(seed, calibration)
        everything = Settings(objective="joint", seed=seed, limit=calibration)
        collected = collect(model, data, everything, progress=self.progress)
        for objective, damping in wanted:
            settings = Settings(objective=objective, seed=seed, limit=calibration, damping=damping)
            prepared = Stage.of(collected, settings, progress=self.progress)
            self._dense_and_control(name, prepared)
            for form in forms:
                for size in sizes:
                    self._measure(name, prepared.in_form(form), size)

    def _dense_and_control(self, name: str, prepared: Stage) -> None:
        self._record(name, prepared, "dense", "", None, prepared.original_held_out(), None, 1.0)
        control = prepared.control_held_out()
        if control is not None:
            self._record(name, prepared, "control", "", None, control, prepared.gain, 1.0)

    def _measure(self, name: str, prepared: Stage, size: float) -> None:
        settings = prepared.settings
        objective, form = settings.objective, settings.form
        if (name, settings.seed, objective, form, settings.damping, size) in self.done:
            return
        plan = prepared.plan(size * prepared.factorizable)
        stage = f"{objective} {form} {size} on test data"
        evaluation = prepared.held_out(prepared.build(plan), stage)
        self._record(
            name,
            prepared,
            objective,
            form,
            size,
            evaluation,
            prepared.predicted(plan),
            prepared.kept(plan),
        )

    def _record(
        self,
        name: str,
        prepared: Stage,
        objective: str,
        form: str,
        size: float | None,
        evaluation: Evaluation,
        predicted: float | None,
        kept: float,
    ) -> None:
        change = paired_change(prepared.original_held_out(), evaluation)
        row = Row(
            model=name,
            seed=prepared.settings.seed,
            objective=objective,
            form=form,
            damping=prepared.settings.dampings.input,
            size=size,
            kept=kept,
            loss=evaluation.mean,
            accuracy=evaluation.accuracy or 0.0,
            change=change.mean,
            standard_error=change.standard_error,
            predicted=predicted,
            eta=prepared.step.eta if prepared.step else None,
            curvature=prepared.collected.curvature,
            calibration_loss=prepared.collected.calibration_loss,
        )
        if row.key in self.done:
            return
        self.write(row)
        print(
            f"{name} seed {row.seed} {objective} {form} damping {row.damping} size {size}: "
            f"{row.change:+.4f} ± {row.standard_error:.4f}, predicted {predicted}",
            flush=True,
        )


def print_table(rows: Sequence[Row]) -> None:
    """One table a model and damping, as Markdown: mean over seeds, and their spread."""
    for name, damping in dict.fromkeys((row.model, row.damping) for row in rows):
        mine = [row for row in rows if (row.model, row.damping) == (name, damping)]
        sizes = sorted({row.size for row in mine if row.size is not None}, reverse=True)
        dense = [row for row in mine if row.objective == "dense"]
        seeds = sorted({row.seed for row in mine})
        perplexity = f" (perplexity {math.exp(dense[0].loss):.2f})" if "lm" in name else ""
        print(f"\n{name}, damping {damping}, seeds {seeds}, curvature {dense[0].curvature}")
        print(f"dense: test loss {dense[0].loss:.4f}{perplexity}, accuracy {dense[0].accuracy:.4f}")
        print("\n| objective | form |" + "".join(f" {size:g} |" for size in sizes))
        print("| --- | --- |" + " --- |" * len(sizes))
        for objective, form in dict.fromkeys((r.objective, r.form) for r in mine if r.size):
            cells = (
                _cell([r for r in mine if (r.objective, r.form, r.size) == (objective, form, size)])
                for size in sizes
            )
            print(f"| {objective} | {form} |" + "".join(f" {cell} |" for cell in cells))
        control = [row for row in mine if row.objective == "control"]
        if control:
            print(f"| control | | {_cell(control)} |" + " |" * (len(sizes) - 1))


def _cell(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    changes = [row.change for row in rows]
    cell = f"{mean(changes):+.4f} ± {mean(row.standard_error for row in rows):.4f}"
    if len(rows) > 1:
        cell += f", seeds ± {stdev(changes):.4f}"
    predictions = [row.predicted for row in rows if row.predicted is not None]
    if predictions:
        cell += f"; predicted {mean(predictions):+.4f}"
    return cell + f"; accuracy {mean(row.accuracy for row in rows):.3f}"


def main() -> None:
    parser, run = commands(__doc__, RESULTS, "table")
    run.add_argument("models", nargs="+", choices=[*MODELS])
    run.add_argument("--seeds", nargs="+", type=int, default=[0])
    run.add_argument("--objectives", nargs="+", choices=[*OBJECTIVES], default=[*OBJECTIVES])
    run.add_argument("--forms", nargs="+", choices=get_args(Form), default=[*FORMS])
    run.add_argument("--sizes", nargs="+", type=float, default=[0.95, 0.9, 0.8, 0.7])
    run.add_argument("--damping", nargs="+", type=float, default=[Settings().damping])
    options = parsed(parser)
    if options.command == "run":
        runner = Runner(options.results)
        for name in options.models:
            for seed in options.seeds:
                runner.run(
                    name,
                    seed,
                    options.objectives,
                    options.forms,
                    options.sizes,
                    options.damping,
                )
    print_table(read_rows(options.results, Row))


if __name__ == "__main__":
    main()
