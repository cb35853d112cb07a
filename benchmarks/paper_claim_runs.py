"""What examines the published claim: the variants, and what measures them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from benchmarks.cifar10 import cifar10_test, normalised
from benchmarks.cifar_training import MEAN, STD, kept_images, load_trained, training_images
from benchmarks.field_models import limits_of
from benchmarks.observed import Observed, observe
from benchmarks.rows import Recorder
from rankfold.certificate.change import Change, weighted_mean
from rankfold.data.parts import Data
from rankfold.errors import InputError
from rankfold.forms.storage import Storage
from rankfold.objective import ObjectiveName
from rankfold.search.allocate import RankPlan
from rankfold.search.build import build, control
from rankfold.search.gradient_step import Step
from rankfold.search.interactions import corrects
from rankfold.search.plans import of_size
from rankfold.search.round import Round, start_round, with_storage
from rankfold.search.trial import lowest
from rankfold.settings import Settings
from rankfold.tasks.evaluation import Evaluation, on_device

CALIBRATION, SELECTION, TEST = 3_000, 2_000, 5_000
SMALLEST_TO = 0.002  # share of the parameters to which the smallest plan of a rule is searched
CONFIDENCE = 0.95
SETTINGS = ("kept", "memorised")
TESTS = ("kept", "test1000")


class Variant(NamedTuple):
    """One way to make the model smaller.

    Attributes:
        objective: What is minimised.
        form: What a rank costs. The publication has pairs of factors.
        smallest: The published compact rule (the smallest rank whose value is not positive) in
            place of the lossless one (the lowest value).
        rounds: Times that the statistics are collected.
    """

    objective: ObjectiveName
    form: Storage
    smallest: bool = False
    rounds: int = 1

    @property
    def label(self) -> str:
        rule = ", compact rule" if self.smallest else ""
        rounds = f", {self.rounds} rounds" if self.rounds > 1 else ""
        return f"{self.objective}, {self.form}{rule}{rounds}"


VARIANTS = (
    Variant("joint", "pivoted"),
    Variant("joint", "pivoted", rounds=2),
    Variant("kronecker", "pivoted"),
    Variant("activation", "pivoted"),
    Variant("svd", "pivoted"),
    Variant("first-order", "pivoted"),
    Variant("first-order", "pair"),  # as published
    Variant("first-order", "pair", smallest=True),  # as published, its second algorithm
)


@dataclass(frozen=True)
class Measured:
    """A model compared with the dense net on the same images; bounds are one-sided."""

    loss: float
    change: float
    standard_error: float
    lower: float
    upper: float
    accuracy: float
    accuracy_change: float
    accuracy_standard_error: float
    accuracy_lower: float
    accuracy_upper: float
    gained: int  # images that only the changed model classifies correctly
    lost: int  # images that only the dense one does


@dataclass(frozen=True)
class Row:
    """One model on one test set."""

    setting: str
    seed: int
    model: str  # a variant's label, or dense, control, temperature
    size: float | None  # what was asked for; None for models that are not smaller
    test: str
    images: int
    kept: float | None
    predicted: float | None
    measured: Measured | None  # None: the rule has no plan of this size
    eta: float | None
    curvature: str | None
    calibration_loss: float | None
    temperature: float | None = None

    @property
    def key(self) -> tuple[object, ...]:
        return (self.setting, self.seed, self.model, self.size, self.test)


class Tempered(nn.Module):
    """A net with its logits divided by a temperature."""

    def __init__(self, net: nn.Module, temperature: float) -> None:
        super().__init__()
        self.net, self.temperature = net, temperature

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x) / self.temperature
        return logits


def split_kept(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which kept images are calibration, selection and test."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    calibration, selection, test = order.split([CALIBRATION, SELECTION, TEST])
    return calibration, selection, test


def load_data(setting: str, seed: int) -> tuple[nn.Module, Data]:
    """The net; held out are first the kept test images, then the 1,000 test images."""
    net, mean_, std = load_trained("resnext")
    images, labels = kept_images()
    calibration, selection, test = split_kept(len(images), seed)
    calibration_set = TensorDataset(images[calibration], labels[calibration])
    if setting == "memorised":
        seen, seen_labels = training_images()
        order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(seed))
        drawn = order[:CALIBRATION]
        calibration_set = TensorDataset(normalised(seen[drawn], MEAN, STD), seen_labels[drawn])
    more_images, more_labels = cifar10_test(mean_, std)
    held_out = TensorDataset(
        torch.cat([images[test], more_images]), torch.cat([labels[test], more_labels])
    )
    data = Data(
        calibration=cast("Any", calibration_set),
        selection=cast("Any", TensorDataset(images[selection], labels[selection])),
        held_out=cast("Any", held_out),
    )
    return net, data


class Runner(Recorder[Row]):
    """Measures what is not measured yet, and writes each result as it comes."""

    def __init__(self, file: Path, device: str = "cpu") -> None:
        super().__init__(file, row_of)
        self.device = device
        self.observed: Observed
        self.moved: tuple[Step | None, Evaluation | None] | None = None

    def run(
        self, setting: str, seed: int, variants: Sequence[Variant], sizes: Sequence[float]
    ) -> None:
        """All rows of one setting and seed, from one pass over the calibration images."""
        missing = {
            variant: [size for size in sizes if not self._has(setting, seed, variant.label, size)]
            for variant in variants
        }
        if not any(missing.values()):
            return
        net, data = load_data(setting, seed)
        net.to(self.device)
        everything = Settings(objective="joint", seed=seed, **limits_of(data))
        self.observed = observe(net, data, everything, progress=self.progress)
        for objective in dict.fromkeys(v.objective for v in variants if missing[v]):
            settings = replace(everything, objective=objective)
            prepared = start_round(self.observed.study, settings, progress=self.progress)
            self._dense(setting, prepared)
            for variant in variants:
                if variant.objective == objective:
                    for size in missing[variant]:
                        ready = with_storage(prepared, variant.form)
                        asked = replace(ready.settings, rounds=variant.rounds)
                        self._measure(setting, replace(ready, settings=asked), variant, size)

    def _on_test(self, model: nn.Module, shown: str) -> Evaluation:
        return self.observed.losses(model, "held_out", shown, progress=self.progress)

    def _control(self, prepared: Round) -> Evaluation | None:
        """Losses of the dense net moved by the same steps, evaluated once a step."""
        if self.moved is None or self.moved[0] is not prepared.step:
            net = control(prepared)
            found = None if net is None else self._on_test(net, "control on test data")
            self.moved = prepared.step, found
        return self.moved[1]

    def _has(self, setting: str, seed: int, model: str, size: float | None) -> bool:
        return all((setting, seed, model, size, test) in self.done for test in TESTS)

    def _dense(self, setting: str, prepared: Round) -> None:
        """The dense net, and what moves its loss without making it smaller."""
        seed, dense = prepared.settings.seed, self.observed.original_losses("held_out")
        self._record(setting, prepared, "dense", None, dense, kept=1.0)
        control = self._control(prepared)
        if control is not None:
            self._record(
                setting, prepared, "control", None, control, kept=1.0, predicted=prepared.gain
            )
        if not self._has(setting, seed, "temperature", None):
            net = self.observed.model
            temperature = best_temperature(net, self.observed.parts["selection"].examples)
            tempered = self._on_test(Tempered(net, temperature), "temperature on test data")
            self._record(
                setting, prepared, "temperature", None, tempered, kept=1.0, temperature=temperature
            )

    def _measure(self, setting: str, prepared: Round, variant: Variant, size: float) -> None:
        budget = prepared.factorizable - (1 - size) * prepared.total
        try:
            stage, plan = chosen(prepared, variant, budget)
        except InputError:  # the first-order rules do not reach every size
            self._record(setting, prepared, variant.label, size, None)
            self._measure_smallest(setting, prepared, variant)
            return
        if is_dense(plan):
            evaluation = self._control(stage) or self.observed.original_losses("held_out")
        else:
            evaluation = self._on_test(build(stage, plan), f"{variant.label} {size} on test data")
        self._record(
            setting,
            stage,
            variant.label,
            size,
            evaluation,
            kept=stage.size(plan),
            predicted=stage.predicted(plan),
        )
        moved = self._control(stage) if variant.rounds > 1 else None
        if moved is not None:
            self._record(setting, stage, f"control, {variant.rounds} rounds", size, moved, kept=1.0)

    def _measure_smallest(self, setting: str, prepared: Round, variant: Variant) -> None:
        """The smallest plan that a rule has, where it doesn't reach the size asked for."""
        label = f"{variant.label}, its smallest"
        if self._has(setting, prepared.settings.seed, label, None):
            return
        least, most = 0.0, float(prepared.factorizable)
        plan = prepared.plan(most, smallest=variant.smallest)
        while most - least > SMALLEST_TO * prepared.total:
            middle = (least + most) / 2
            try:
                plan = prepared.plan(middle, smallest=variant.smallest)
                most = middle
            except InputError:
                least = middle
        evaluation = self._on_test(build(prepared, plan), f"{label} on test data")
        self._record(
            setting,
            prepared,
            label,
            None,
            evaluation,
            kept=prepared.size(plan),
            predicted=prepared.predicted(plan),
        )

    def _record(
        self,
        setting: str,
        prepared: Round,
        model: str,
        size: float | None,
        evaluation: Evaluation | None,
        *,
        kept: float | None = None,
        predicted: float | None = None,
        temperature: float | None = None,
    ) -> None:
        """One row a test set."""
        dense = self.observed.original_losses("held_out")
        for test, cut in zip(TESTS, (slice(0, TEST), slice(TEST, None)), strict=True):
            row = Row(
                setting=setting,
                seed=prepared.settings.seed,
                model=model,
                size=size,
                test=test,
                images=len(dense.losses[cut]),
                kept=kept,
                predicted=predicted,
                measured=None if evaluation is None else compare(dense, evaluation, cut),
                eta=prepared.step.eta if prepared.step else None,
                curvature=self.observed.curvature,
                calibration_loss=self.observed.calibration_loss,
                temperature=temperature,
            )
            if row.key in self.done:
                continue
            self.write(row)
            print(f"{setting} seed {row.seed} {test}: {model} {size} {_brief(row)}", flush=True)


def chosen(prepared: Round, variant: Variant, budget: float) -> tuple[Round, RankPlan]:
    """A plan for a budget and the stage that it is of: for objectives that predict the loss the
    best on selection images, as ``lossless`` takes it.

    Raises:
        InputError: No plan is that small.
    """
    plan = prepared.plan(budget, smallest=variant.smallest)
    if not corrects(prepared) or is_dense(plan):
        return prepared, plan
    best = lowest(of_size(prepared, budget))
    return best.round, best.plan


def is_dense(plan: RankPlan) -> bool:
    """Whether no layer is factorized."""
    return all(choice.rank is None for choice in plan.values())


@torch.no_grad()
def best_temperature(net: nn.Module, examples: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The temperature of the lowest mean loss, to 1 %."""
    images, labels = (
        on_device(torch.stack([*column]), net) for column in zip(*examples, strict=True)
    )
    logits = torch.cat([net(part) for part in images.split(250)]).double()
    candidates = [1.01**step for step in range(-100, 201)]
    return min(candidates, key=lambda t: F.cross_entropy(logits / t, labels).item())


def compare(dense: Evaluation, changed: Evaluation, cut: slice) -> Measured:
    """Paired changes of loss and accuracy on some of the images."""
    if dense.correct is None or changed.correct is None:
        raise ValueError("the accuracy of these evaluations is unknown")
    ones = torch.ones_like(dense.losses[cut])
    loss = weighted_mean((changed.losses - dense.losses)[cut], ones)
    hits = (changed.correct - dense.correct)[cut]
    accuracy: Change = weighted_mean(hits, ones)
    return Measured(
        loss=float(changed.losses[cut].mean()),
        change=loss.mean,
        standard_error=loss.standard_error,
        lower=loss.lower_bound(CONFIDENCE),
        upper=loss.upper_bound(CONFIDENCE),
        accuracy=float(changed.correct[cut].mean()),
        accuracy_change=accuracy.mean,
        accuracy_standard_error=accuracy.standard_error,
        accuracy_lower=accuracy.lower_bound(CONFIDENCE),
        accuracy_upper=accuracy.upper_bound(CONFIDENCE),
        gained=int((hits > 0).sum()),
        lost=int((hits < 0).sum()),
    )


def row_of(measured: dict[str, Any] | None, **fields: Any) -> Row:
    """A row from its fields as JSON has them."""
    return Row(**fields, measured=None if measured is None else Measured(**measured))


def _brief(row: Row) -> str:
    if row.measured is None:
        return "has no plan of this size"
    m = row.measured
    return (
        f"loss {m.change:+.4f} ± {m.standard_error:.4f}, accuracy {m.accuracy:.4f} "
        f"({m.accuracy_change:+.4f}), predicted {row.predicted}"
    )
