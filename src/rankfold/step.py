"""The gradient term: in which direction each weight moves, and how far all of them go."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from rankfold.calibrate import LayerStatistics
from rankfold.certify import paired_change
from rankfold.data import Part
from rankfold.layer_matrix import MatrixLayer, weight_matrix
from rankfold.linalg import damped
from rankfold.progress import Progress
from rankfold.spectrum import cross_validated_step
from rankfold.tasks import Evaluation, Task, evaluate

# A step counts as a gain only when the selection examples show it at this confidence.
GAIN_CONFIDENCE = 0.95
MOST_TRIALS = 6


@dataclass(frozen=True)
class Directions:
    """Where the gradient term moves the weights.

    Attributes:
        by_layer: ``(out, in)``; a weight moves by ``-eta * direction``.
        signal: Sum over layers of ``<S1, S2>``.
        noise: Sum over layers of the noise energy in S.
    """

    by_layer: dict[str, Tensor]
    signal: float
    noise: float


@dataclass(frozen=True)
class Step:
    """The step that the search chose.

    Attributes:
        eta: Length, 0 where no step was shown to help.
        directions: The directions.
        trials: ``(eta, measured change on selection data)`` of every length tried.
        gain: Measured change of the chosen step on selection data, 0 or negative.
    """

    eta: float
    directions: Directions
    trials: list[tuple[float, float]]
    gain: float

    def moved(self, name: str, layer: MatrixLayer) -> Tensor:
        """The layer's weight after the step, ``(out, in)``."""
        return moved_weight(layer, self.directions.by_layer[name], self.eta)


def moved_weight(layer: MatrixLayer, direction: Tensor, eta: float) -> Tensor:
    """The layer's weight ``(out, in)`` moved by ``-eta * direction``; itself for eta = 0."""
    weight = weight_matrix(layer)
    if eta == 0:
        return weight
    return weight - (eta * direction.to(weight.device)).to(weight.dtype)


def step_directions(
    layers: Mapping[str, MatrixLayer],
    statistics: MutableMapping[str, LayerStatistics],
    damping: float,
    progress: Progress,
    *,
    release: bool = False,
) -> Directions:
    """The direction of every layer; see ``spectrum.cross_validated_step``.

    With ``release``, each layer's gradients are dropped from ``statistics`` once used.
    """
    directions: dict[str, Tensor] = {}
    signal = noise = 0.0
    for name in progress.track(layers, "gradient step per layer", len(layers)):
        stats = statistics[name]
        if stats.gradients is None or stats.output_gram is None:
            raise ValueError("the gradient step needs statistics with gradients")
        step = cross_validated_step(
            stats.gradients,
            damped(stats.input_gram, damping),
            damped(stats.output_gram, damping),
        )
        directions[name] = step.direction.to(stats.gradients[0].dtype)
        if release:
            statistics[name] = replace(stats, gradients=None)
        signal += step.signal
        noise += step.noise
    return Directions(directions, signal, noise)


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
) -> Step:
    """Choose the step's length on selection data by half decades.

    The block-diagonal curvature does not see that all layers move the same loss at once; one more
    direction of curvature, the mean gradient of all layers together, gives
    ``eta = 1 / (1 + <S1, S2>)``. The search starts there and walks to the side that improves.
    Without an improvement that the selection examples show, the step is 0.

    Args:
        model: The model; its weights are moved in a copy.
        task: Gives the loss.
        part: Selection examples.
        original: Losses of the unmoved model on them.
        layers: Layers of ``model``.
        found: From ``step_directions``.
        batch_size: Examples a batch.
        progress: Shows the evaluations.
    """
    trials: list[tuple[float, float]] = []
    bounds: dict[float, float] = {}
    scratch = copy.deepcopy(model)

    def measure(eta: float) -> float:
        with torch.no_grad():
            for name, layer in layers.items():
                weight = cast("nn.Parameter", scratch.get_submodule(name).weight)
                moved = moved_weight(layer, found.by_layer[name], eta)
                weight.copy_(moved.view_as(weight))
        evaluation = evaluate(
            scratch,
            task,
            part,
            batch_size=batch_size,
            progress=progress,
            stage=f"step {eta:.1e} on selection data",
            finite=False,
        )
        change = paired_change(original, evaluation)
        trials.append((eta, change.mean))
        bounds[eta] = change.upper_bound(GAIN_CONFIDENCE)
        return change.mean

    best = 1 / (1 + max(0.0, found.signal))
    lowest = measure(best)
    for factor in (1 / math.sqrt(10), math.sqrt(10)):
        walked = False
        while len(trials) < MOST_TRIALS:
            eta = best * factor
            change = measure(eta)
            if not change < lowest:
                break
            best, lowest, walked = eta, change, True
        if walked:
            break
    if not bounds[best] < 0:
        return Step(0.0, found, trials, 0.0)
    return Step(best, found, trials, lowest)
