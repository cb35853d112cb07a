"""What the sum over layers misses: how much of the measured change belongs to each layer.

The predicted changes of the layers are those of each layer changed alone, by a curvature that is a
Kronecker product. Changed together, layers add to each other's errors or cancel them. One backward
pass shows it for all at once: along ``W + t Delta`` the divergence from the original is
``1/2 t^2 Delta^T H Delta`` with the full curvature H, so half its derivative at t = 1 is the
whole change, and the part of layer l, ``1/2 <dD/dW_l, Delta_l>``, counts its interactions with all
others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor, nn

from rankfold.data.parts import Batch, Part
from rankfold.forms.curve import Curve
from rankfold.machine import processes
from rankfold.machine.progress import Progress, SilentProgress
from rankfold.maths.linalg import inner
from rankfold.model.backward import each_gradient
from rankfold.model.blocks import checkpointed
from rankfold.model.evaluation_mode import evaluation_mode
from rankfold.model.layer_matrix import MatrixLayer
from rankfold.search.build import plan_weights, with_weights
from rankfold.search.round import Round
from rankfold.search.study import Study
from rankfold.search.trial import Trial
from rankfold.tasks.evaluation import on_device
from rankfold.tasks.losses import BatchLoss, Task, divergence

# Most examples that the shares are measured on, and how many for each calibration example. The
# divergence is 0 at the original whatever the sample, so its gradient is far less noisy than that
# of the loss, and few examples suffice.
SHARE_EXAMPLES = {"causal-lm": 32}
OTHER_SHARE_EXAMPLES = 512
SHARE_OF_CALIBRATION = 0.25
# A correction never changes a prediction by more than this, either way.
LARGEST_CORRECTION = 3.0
# Predictions below this part of the mean one are too small to be compared with.
NOISE_FLOOR = 0.02


def measured_shares(
    original: nn.Module,
    changed: nn.Module,
    task: Task,
    part: Part,
    names: Sequence[str],
    *,
    stationary: bool = False,
    blocks: Sequence[str] = (),
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """The part of each layer in the change from one model to the other, in units of the loss.

    With logits the change is the mean Kullback-Leibler divergence of the changed model's
    predictions from the original's. A loss of the user's own has no logits: then it is the second
    order part of the loss itself, ``1/2 <G' - G, Delta>``.

    Args:
        original: The model before.
        changed: The model after, of the same architecture.
        task: Gives the logits, or the losses.
        part: Examples.
        names: Layers with a ``weight`` that differs.
        stationary: Whether the loss is known to have no slope at the original.
        blocks: Of both models, whose activations are not held but computed again.
        batch_size: Examples a batch.
        progress: Shows the batches.

    Returns:
        By layer; the sum is the change of all layers together to second order.
    """
    progress = progress or SilentProgress()
    before, after = _weights(original, names), _weights(changed, names)
    sums = torch.zeros(len(names), dtype=torch.float64)
    terms = 0.0
    batches = processes.mine(part.batches(batch_size))
    for examples in progress.track(batches, "interactions of layers", len(batches)):
        batch = on_device(part.collate(examples), changed)
        with evaluation_mode(original):
            reference = task.batch_loss(original, batch)
        terms += float(reference.terms.sum())
        without_logits = reference.logits is None
        with evaluation_mode(changed, trainable=after), checkpointed(changed, blocks):
            loss = _divergence(reference, task.batch_loss(changed, batch))
            del reference  # logits of a large vocabulary, not needed to go back
            sums += _slopes(loss, after, before, after)
        if without_logits and not stationary:
            with checkpointed(original, blocks):
                sums -= _own_slopes(original, task, batch, before, after)
    of_all = processes.gathered((sums.tolist(), terms), "interactions of layers")
    sums = torch.tensor([one for one, _ in of_all], dtype=torch.float64).sum(0)
    terms = sum(one for _, one in of_all)
    return {name: 0.5 * float(slope) / terms for name, slope in zip(names, sums, strict=True)}


def corrections(
    shares: Mapping[str, float], predicted: Mapping[str, float], power: float
) -> dict[str, float]:
    """Factors that bring each layer's predicted changes nearer to its measured share.

    A power of measured / predicted, within ``LARGEST_CORRECTION``: the shares belong to the plan
    that they were measured at and move with it, so a part of the way (in logarithms) is gone.
    Layers that the plan left dense get the median of the others.

    Args:
        shares: From ``measured_shares``.
        predicted: Predicted change of each layer in the same plan, 0 where it stays dense.
        power: 1 for the whole way, half of the way for .5.
    """
    positive = [change for change in predicted.values() if change > 0]
    if not positive:
        return dict.fromkeys(predicted, 1.0)
    floor = NOISE_FLOOR * sum(positive) / len(positive)
    most = LARGEST_CORRECTION
    found = {
        name: min(most, max(1 / most, (max(0.0, shares[name] + floor) / (change + floor)) ** power))
        for name, change in predicted.items()
        if change > 0
    }
    middle = median(found.values())
    return {name: found.get(name, middle) for name in predicted}


def _weights(model: nn.Module, names: Sequence[str]) -> list[Tensor]:
    layers: list[MatrixLayer] = [model.get_submodule(name) for name in names]  # type: ignore[misc]
    return [layer.weight for layer in layers]


def _divergence(reference: BatchLoss, found: BatchLoss) -> Tensor:
    """Summed over the terms."""
    if reference.logits is None or found.logits is None:
        return (found.losses * found.terms).sum()
    return divergence(found.logits, reference.logits).sum()


def _own_slopes(
    model: nn.Module, task: Task, batch: Batch, before: list[Tensor], after: list[Tensor]
) -> Tensor:
    with evaluation_mode(model, trainable=before):
        found = task.batch_loss(model, batch)
        return _slopes((found.losses * found.terms).sum(), before, before, after)


def _slopes(
    loss: Tensor, weights: list[Tensor], before: list[Tensor], after: list[Tensor]
) -> Tensor:
    """``<dloss/dW, after - before>`` of each weight, float64."""
    slopes = torch.zeros(len(weights), dtype=torch.float64)

    @torch.no_grad()
    def add(place: int, gradient: Tensor) -> None:
        slopes[place] += inner(gradient, after[place], before[place])

    each_gradient(loss, weights, add)
    return slopes


def corrects(round_: Round) -> bool:
    """Whether plans are made again with measured interactions."""
    return bool(round_.settings.interactions) and round_.objective.allocation == "multiplier"


def corrected(round_: Round, measured: Trial) -> Round:
    """The curves with what a plan of theirs showed of each layer's share in the real change.

    Each layer's predictions are brought towards its measured share, and all of them to the change
    that the plan had on selection data, where it had one. A plan whose loss is not finite shows
    nothing: then the round stays.
    """
    if not math.isfinite(measured.change.mean):
        return round_
    study, base = round_.study, round_.study.subject.base
    names = list(study.subject.matrices)
    moves = round_.step is not None and round_.step.eta != 0
    moved = ((name, round_.moved(name)) for name in names)
    shares = measured_shares(
        with_weights(round_, base, moved) if moves else base,
        with_weights(round_, base, plan_weights(round_, measured.plan)),
        study.task,
        share_examples(study),
        names,
        stationary=study.task.agreement and base is study.subject.model,
        blocks=study.statistics.blocks,
        batch_size=round_.settings.batch_size,
        progress=round_.progress,
    )
    predicted = {name: choice.change for name, choice in measured.plan.items()}
    factors = corrections(shares, predicted, round_.settings.efforts.correction_power)
    known = round_.factors or dict.fromkeys(factors, 1.0)
    foreseen = math.fsum(factors[name] * change for name, change in predicted.items())
    harm = measured.change.mean - round_.gain
    level = harm / foreseen if harm > 0 and foreseen > 0 else 1.0
    level = min(LARGEST_CORRECTION, max(1 / LARGEST_CORRECTION, level))

    def rescaled(curves: Mapping[str, Curve]) -> dict[str, Curve]:
        return {
            name: replace(curve, changes=curve.changes * (level * factors[name]))
            for name, curve in curves.items()
        }

    return replace(
        round_,
        ranked=rescaled(round_.ranked),
        curves=rescaled(round_.curves),
        factors={name: known[name] * factor for name, factor in factors.items()},
        level=round_.level * level,
    )


def share_examples(study: Study) -> Part:
    """The examples that each layer's share is measured on, so many of either part.

    Of selection data where there are as many: the Grams have seen the calibration examples, and
    what is cut because these don't use it shows no change on them.
    """
    calibration, selection = study.parts["calibration"], study.parts["selection"]
    most = SHARE_EXAMPLES.get(study.task.name, OTHER_SHARE_EXAMPLES)
    few = max(1, min(most, round(SHARE_OF_CALIBRATION * len(calibration.examples))))
    part = selection if len(selection.examples) >= few else calibration
    return part.spread(few)
