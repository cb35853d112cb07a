"""The gradient term: in which direction each weight moves, and how far all of them go."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from rankfold.certificate.change import Change, paired_change
from rankfold.data.parts import Part
from rankfold.files.json_file import finite
from rankfold.machine.at_once import is_small, work_on
from rankfold.machine.offload import Offload
from rankfold.machine.progress import Progress
from rankfold.machine.shared_out import shared_out
from rankfold.maths.gradient import (
    GradientStep,
    HarmlessRange,
    StepEstimator,
    gradient_step,
    harmless_range,
    step_length,
)
from rankfold.maths.linalg import Damping
from rankfold.model.copied import copied
from rankfold.model.layer_matrix import MatrixLayer, weight_matrix
from rankfold.model.replace import with_replaced
from rankfold.settings import Settings
from rankfold.statistics.grams import damped_grams
from rankfold.statistics.layer_statistics import LayerStatistics
from rankfold.tasks.evaluation import Evaluation, evaluate, joined
from rankfold.tasks.losses import Task

# A step counts as a gain only when the selection examples show it at this confidence.
GAIN_CONFIDENCE = 0.95
MOST_TRIALS = 6
# Fewest selection examples that lengths are compared on: lengths differ from each other far more
# than examples do. The best one is then measured on all of them.
FEWEST_COMPARED = {"causal-lm": 4}
OTHER_FEWEST_COMPARED = 128
# A fitted length nearer than this factor to one that was measured is not worth an evaluation.
SAME_LENGTH = 1.25
# A group of layers goes this much further, or less far, than all layers together.
GROUP_FACTOR = 2.0


@dataclass(frozen=True)
class Directions:
    """Where the gradient term moves the weights.

    Attributes:
        by_layer: ``(out, in)``; a weight moves by ``-eta * direction``.
        norms: ``|S|`` of each layer's estimate, in whitened coordinates.
        signals: ``<S1, S2>`` of each layer.
        noises: Energy of the noise in each layer's S.
    """

    by_layer: dict[str, Tensor]
    norms: dict[str, float]
    signals: dict[str, float]
    noises: dict[str, float]

    @property
    def signal(self) -> float:
        """Sum over layers of ``<S1, S2>``."""
        return sum(self.signals.values())

    @property
    def noise(self) -> float:
        """Sum over layers of the noise energy in S."""
        return sum(self.noises.values())

    def harmless(self, name: str, singular_values: Tensor) -> HarmlessRange:
        """The harmless range of one layer, see ``maths.gradient.harmless_range``."""
        return harmless_range(
            singular_values, self.norms[name], self.signals[name], self.noises[name]
        )


@dataclass(frozen=True)
class StepFit:
    """``dL(eta) = -slope eta + 1/2 curvature eta^2``, fitted to measured changes.

    Attributes:
        slope: In units of the loss.
        curvature: Likewise.
    """

    slope: float
    curvature: float

    @property
    def best(self) -> float:
        """The length at which the fitted change is lowest."""
        return self.slope / self.curvature

    def change(self, eta: float) -> float:
        """The fitted change at a length."""
        return -self.slope * eta + 0.5 * self.curvature * eta**2


def fit_step(trials: Sequence[tuple[float, float]]) -> StepFit | None:
    """The parabola through 0 nearest to the measured changes, each in units of its own square.

    Lengths span decades, so a plain least-squares fit would only see the longest; dividing each
    equation by its eta weighs them alike.

    Args:
        trials: ``(eta, measured change)``; lengths at which the loss rose are left out unless too
            few remain, since the loss is no parabola far from 0.

    Returns:
        None where the fit has no minimum at a positive length.
    """
    usable = [(eta, change) for eta, change in trials if eta > 0 and math.isfinite(change)]
    falling = [trial for trial in usable if trial[1] < 0]
    usable = falling if len(falling) > 1 else usable
    if len(usable) < 2:
        return None
    matrix = np.array([[-1.0, 0.5 * eta] for eta, _ in usable])
    values = np.array([change / eta for eta, change in usable])
    slope, curvature = np.linalg.lstsq(matrix, values, rcond=None)[0]
    return StepFit(float(slope), float(curvature)) if slope > 0 and curvature > 0 else None


@dataclass(frozen=True)
class Step:
    """The step that the search chose.

    Attributes:
        eta: Length, 0 where no step was shown to help.
        directions: The directions; of a step of 0 their norms alone: they are large as the model.
        trials: ``(eta, measured change)`` of every length tried, on some of the selection examples.
        gain: Measured change of the chosen step on selection data, 0 or negative.
        fit: What the trials taught, None where they show no parabola.
        scales: Factor on the length of each layer whose group goes another way than all together.
        group_trials: ``(group, factor, measured change)`` of every length tried for a group.
    """

    eta: float
    directions: Directions
    trials: list[tuple[float, float]]
    gain: float
    fit: StepFit | None = None
    scales: Mapping[str, float] = field(default_factory=dict)
    group_trials: Sequence[tuple[int, float, float]] = ()

    def moved(self, name: str, layer: MatrixLayer) -> Tensor:
        """The layer's weight after the step, ``(out, in)``."""
        eta = self.eta * self.scales.get(name, 1.0)
        if eta == 0:
            return weight_matrix(layer)
        return moved_weight(layer, self.directions.by_layer[name], eta)


def moved_weight(layer: MatrixLayer, direction: Tensor, eta: float) -> Tensor:
    """The layer's weight ``(out, in)`` moved by ``-eta * direction``; itself for eta = 0."""
    weight = weight_matrix(layer)
    if eta == 0:
        return weight
    return weight - (eta * direction.to(weight.device)).to(weight.dtype)


def step_directions(
    layers: Mapping[str, MatrixLayer],
    statistics: MutableMapping[str, LayerStatistics],
    damping: Damping,
    progress: Progress,
    *,
    estimator: StepEstimator = "cross-validated",
    release: bool = False,
    offload: Offload | None = None,
) -> Directions:
    """The direction of every layer; see ``maths.gradient.gradient_step``.

    With ``release``, each layer's gradients are dropped from ``statistics`` once used.
    ``offload`` says where directions lie.
    """
    offload = offload or Offload()

    def of_layer(name: str) -> GradientStep:
        stats = statistics[name]
        if stats.gradients is None:
            raise ValueError("the gradient step needs statistics with gradients")
        halves = list(stats.gradients)
        if release:
            statistics[name] = stats = replace(stats, gradients=None)
        gradients = (halves.pop(0) for _ in range(2))
        return gradient_step(gradients, *damped_grams(stats, damping), estimator)

    stage = "gradient step per layer"
    made = shared_out(
        [*layers],
        of_layer,
        small=lambda name: is_small(layers[name].weight),
        cost=lambda name: work_on(layers[name].weight),
        what=stage,
    )
    shown = progress.track(made, stage, len(layers))
    steps: dict[str, GradientStep] = {}
    for name, step in zip(layers, shown, strict=True):
        if release:  # also where another process took the step
            statistics[name] = replace(statistics[name], gradients=None)
        steps[name] = replace(step, direction=offload.kept(step.direction))
    return Directions(
        by_layer={name: step.direction for name, step in steps.items()},
        norms={name: step.norm for name, step in steps.items()},
        signals={name: step.signal for name, step in steps.items()},
        noises={name: step.noise for name, step in steps.items()},
    )


def search_step(
    model: nn.Module,
    task: Task,
    part: Part,
    original: Evaluation,
    layers: Mapping[str, MatrixLayer],
    found: Directions,
    *,
    batch_size: int | None,
    progress: Progress,
    groups: int = 1,
    compared_on: float = 1.0,
    offload: Offload | None = None,
) -> Step:
    """Choose the step's length on selection data.

    The search starts at ``maths.gradient.step_length`` of all layers together and walks by half
    decades to the side that improves; a parabola fitted to what was measured then proposes one
    more length. Lengths are compared on a part of the selection examples, the best is measured on
    all. Without an improvement that these show, the step is 0.

    With several groups, each in turn then goes ``GROUP_FACTOR`` further, or else less far, where
    that is better with all other lengths as they are.

    Args:
        model: The model; its weights are moved in a copy.
        task: Gives the loss.
        part: Selection examples.
        original: Losses of the unmoved model on them.
        layers: Layers of ``model``.
        found: From ``step_directions``.
        batch_size: Examples a batch.
        progress: Shows the evaluations.
        groups: Number of groups, of neighbouring layers and of nearly the same number.
        compared_on: Share of the examples on which lengths are compared.
        offload: Where the copy's weights lie.
    """
    scratch = _scratch(model, layers, offload or Offload())
    selection = _Selection(scratch, task, part, original, layers, batch_size, progress)
    few = selection.few(compared_on)
    lengths = _Lengths(selection.of(few), found)
    best = _walk(lengths, step_length(found.signal))
    fit = fit_step(lengths.trials)
    if fit is not None and all(_apart(fit.best, eta) for eta, _ in lengths.trials):
        if lengths.measure(fit.best) < lengths.changes[best].mean:
            best = fit.best
        fit = fit_step(lengths.trials)
    step = Step(best, found, lengths.trials, 0.0, fit)
    change = selection.with_rest(few, step, lengths.evaluations[best])
    if not change.upper_bound(GAIN_CONFIDENCE) < 0:
        return replace(step, eta=0.0, directions=replace(found, by_layer={}))
    step = replace(step, gain=change.mean)
    return step if groups == 1 else _by_group(selection, step, groups)


def _scratch(model: nn.Module, layers: Mapping[str, MatrixLayer], offload: Offload) -> nn.Module:
    """A copy of the model to move the layers' weights of."""
    if offload.folder is None:
        return copied(model, {})
    weights = {name: offload.copy(layer.weight.detach()) for name, layer in layers.items()}
    return with_replaced(model, {}, weights, share=True)


@dataclass(frozen=True)
class _Selection:
    """Selection examples, and a copy of the model to try steps with.

    Attributes:
        scratch: The copy; its weights are those of the step tried last.
        task: Gives the loss.
        part: The examples.
        original: Losses of the unmoved model on them.
        layers: Layers of the unmoved model.
        batch_size: Examples a batch.
        progress: Shows the evaluations.
    """

    scratch: nn.Module
    task: Task
    part: Part
    original: Evaluation
    layers: Mapping[str, MatrixLayer]
    batch_size: int | None
    progress: Progress

    def of(self, places: Sequence[int]) -> _Selection:
        """The examples with these numbers."""
        return replace(self, part=self.part.take(places), original=self.original.of(places))

    def few(self, share: float) -> Sequence[int]:
        """The numbers of so large a share of the examples, if they are enough to compare on."""
        least = FEWEST_COMPARED.get(self.task.name, OTHER_FEWEST_COMPARED)
        return self.part.spread_places(max(least, round(share * len(self.part.examples))))

    def with_rest(self, few: Sequence[int], step: Step, known: Evaluation) -> Change:
        """How a step changes the loss on all examples, of which a few were measured."""
        rest = sorted(set(range(len(self.part.examples))) - set(few))
        if not rest:
            return paired_change(self.original.of(few), known)
        measured = self.of(rest).evaluation(step, f"step {step.eta:.1e}, the rest")
        return paired_change(self.original.of([*few, *rest]), joined([known, measured]))

    def change(self, step: Step, stage: str) -> Change:
        """How a step changes the loss."""
        return paired_change(self.original, self.evaluation(step, stage))

    def evaluation(self, step: Step, stage: str) -> Evaluation:
        """Losses after a step."""
        with torch.no_grad():
            for name, layer in self.layers.items():
                weight = cast("nn.Parameter", self.scratch.get_submodule(name).weight)
                weight.copy_(step.moved(name, layer).view_as(weight))
        return evaluate(
            self.scratch,
            self.task,
            self.part,
            batch_size=self.batch_size,
            progress=self.progress,
            stage=f"{stage} on selection data",
            finite=False,
        )


class _Lengths:
    """Lengths that all layers together were moved by, and what each was measured to do.

    Attributes:
        trials: ``(eta, measured change)`` of every length, in the order in which they were tried.
        changes: The measured change of the loss, with its error, by length.
        evaluations: The losses themselves.
    """

    def __init__(self, selection: _Selection, directions: Directions):
        self._selection = selection
        self._directions = directions
        self.trials: list[tuple[float, float]] = []
        self.changes: dict[float, Change] = {}
        self.evaluations: dict[float, Evaluation] = {}

    def measure(self, eta: float) -> float:
        """Try a length: the measured change."""
        step = Step(eta, self._directions, [], 0.0)
        evaluation = self._selection.evaluation(step, f"step {eta:.1e}")
        change = paired_change(self._selection.original, evaluation)
        self.trials.append((eta, change.mean))
        self.evaluations[eta] = evaluation
        self.changes[eta] = change
        return change.mean


def _walk(lengths: _Lengths, start: float) -> float:
    """The best length found by half decades from a first one, to the side that improves."""
    best, lowest = start, lengths.measure(start)
    for factor in (1 / math.sqrt(10), math.sqrt(10)):
        walked = False
        while len(lengths.trials) < MOST_TRIALS:
            eta = best * factor
            change = lengths.measure(eta)
            if not change < lowest:
                break
            best, lowest, walked = eta, change, True
        if walked:
            break
    return best


def _by_group(selection: _Selection, step: Step, groups: int) -> Step:
    """The step with each group of layers in turn going further, or less far, where that helps."""
    tried: list[tuple[int, float, float]] = []
    found = neighbours(list(selection.layers), groups)
    for place, group in enumerate(found):
        for factor in (GROUP_FACTOR, 1 / GROUP_FACTOR):
            other = replace(step, scales={**step.scales, **dict.fromkeys(group, factor)})
            stage = f"group {place + 1} of {len(found)}, step x {factor:g}"
            gain = selection.change(other, stage).mean
            tried.append((place, factor, gain))
            if gain < step.gain:
                step = replace(other, gain=gain)
                break
    return replace(step, group_trials=tried)


def neighbours(names: Sequence[str], groups: int) -> list[Sequence[str]]:
    """The names in so many runs of nearly the same length, at least one name each."""
    groups = min(groups, len(names))
    ends = [len(names) * place // groups for place in range(groups + 1)]
    return [names[start:end] for start, end in pairwise(ends)]


def _apart(first: float, second: float) -> bool:
    return abs(math.log(first / second)) > math.log(SAME_LENGTH)


def step_report(step: Step | None, settings: Settings) -> dict[str, Any] | None:
    """Length, gain and trials of a gradient step, None where none was looked for."""
    if step is None:
        return None
    return {
        "eta": step.eta,
        "gain": step.gain,
        "estimator": settings.step_estimator,
        "signal": step.directions.signal,
        "noise": step.directions.noise,
        "trials": [{"eta": eta, "change": finite(change)} for eta, change in step.trials],
        "fit": None if step.fit is None else asdict(step.fit),
        "scales": dict(step.scales),
        "group_trials": [
            {"group": group, "factor": factor, "change": finite(change)}
            for group, factor, change in step.group_trials
        ],
    }
