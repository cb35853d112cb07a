"""Which labels the gradients are taken of: those of the data, or drawn from the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankfold.data.parts import FEWEST as FEWEST_OF_A_PART
from rankfold.data.parts import Batch, Part
from rankfold.errors import InputError
from rankfold.model.evaluation_mode import evaluation_mode
from rankfold.statistics.names import Curvature as Curvature
from rankfold.tasks.evaluation import on_device, running
from rankfold.tasks.losses import IGNORED, TEXT, BatchLoss, Task, labels_of
from rankfold.tasks.supervised import next_labels

# A model whose calibration loss is below this share of the loss of guessing (log K) has nearly
# memorised its labels: their gradients say little about the curvature around the model.
MEMORISED_SHARE = 0.15

# Share of the probability spread over all classes before labels are sampled.
SMOOTHING = 0.1

# Directions of noise that all examples together get where the loss is a squared distance, and the
# most that one gets, each for another backward pass.
ENOUGH_DIRECTIONS = 2048

MOST_DIRECTIONS = 4

SQUARED = 0  # in place of the number of logits, where the loss is a squared error

UNLABELLED = f"without a label to predict: all are masked ({IGNORED})"

FEWEST = 8  # examples that say whether a model has memorised its data


class Draws(NamedTuple):
    """What is drawn for a batch.

    Attributes:
        number: Of labels, or of examples with noise.
        noise: Shape of an example's noise; None where labels are drawn.
    """

    number: int
    noise: tuple[int, ...] | None


def without_unlabelled(part: Part, task: Task) -> Part:
    """The part without examples of which no token is to be predicted: no loss speaks of them.

    Raises:
        InputError: Too few are left.
    """
    if task.name not in (*TEXT, "token-classification"):
        return part
    unlabelled = {
        number: UNLABELLED
        for number, example in enumerate(part.examples)
        if not _is_labelled(task, part.collate([example]))
    }
    left = part.without(unlabelled)
    if len(left.examples) < FEWEST_OF_A_PART:
        raise InputError(
            f"of the {len(part.examples)} examples of the {part.name.replace('_', '-')} part "
            f"{len(unlabelled)} have no label to predict: all are masked ({IGNORED}). Give more "
            f"that have one; {FEWEST_OF_A_PART} are needed at least."
        )
    return left


def _is_labelled(task: Task, batch: Batch) -> bool:
    """Whether a token of the batch is to be predicted; True where that can't be seen."""
    causal = task.name == "causal-lm"
    labels = labels_of(batch)
    if labels is None and causal:
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
        labels = ids if torch.is_tensor(ids) else None
    if labels is None or labels.dim() != 2:
        return True
    if causal:
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        labels = next_labels(labels, mask if torch.is_tensor(mask) else None)
    return bool(labels.ne(IGNORED).any())


def calibration_loss(model: nn.Module, task: Task, part: Part) -> tuple[float, int | None]:
    """Mean loss of a few calibration examples, from all over, and the number of logits.

    The number is ``SQUARED`` for a squared error and None for a user's loss.

    Raises:
        InputError: The loss is not finite.
    """
    few = part.spread(max(FEWEST, 2 * part.batch_size(part.examples[0]))).batches()
    losses = terms = 0.0
    classes = None
    with evaluation_mode(model):
        for examples in few:
            batch = on_device(part.collate(examples), model)
            whose = getattr(task, "what", None)
            with running(batch, what="a batch of the calibration part", whose=whose):
                result = task.batch_loss(model, batch)
            losses += float((result.losses * result.terms).sum())
            terms += float(result.terms.sum())
            classes = None if result.logits is None else result.logits.shape[-1]
            classes = classes if result.squared is None else SQUARED
    if not math.isfinite(losses) or terms == 0:
        raise InputError(
            f"the mean loss of {len(few)} batches of calibration examples is "
            f"{losses}/{terms:.0f}; expected a finite loss of at least one term. Check the model's "
            "weights and the data."
        )
    return losses / terms, classes


def choose_curvature(calibration_loss: float, classes: int | None, labels: bool) -> Curvature:
    """Where B comes from: labels sampled from the predictions, or those of the data.

    Sampled labels give the curvature of the loss. The gradient step is worth more when it is
    whitened with the data's labels (docs/theory.md, 3), and FWSVD is published with them: there
    they are taken as long as they are not memorised.

    Args:
        calibration_loss: Mean loss of the calibration examples, in nats.
        classes: Number of logits, or None for a user's own loss, which can't be sampled. Of a
            squared error the gradients at the labels are no curvature at all: always sampled.
        labels: Whether those of the data are wanted where they tell anything.
    """
    if classes is None:
        return "empirical"
    if classes == SQUARED or not labels:
        return "sampled"
    memorised = calibration_loss < MEMORISED_SHARE * math.log(classes)
    return "sampled" if memorised else "empirical"


def draws_of(result: BatchLoss, directions: int) -> Draws | None:
    """What ``sampled_losses`` draws of a batch; None where it refuses to."""
    if result.squared is not None:
        return Draws(len(result.squared), (directions, *result.squared.shape[1:]))
    return None if result.logits is None else Draws(len(result.logits), None)


def skip_draws(drawn: Draws | None, generator: torch.Generator) -> None:
    """Draw what ``sampled_losses`` does of a batch, and leave it."""
    if drawn is None:
        return
    if drawn.noise is None:
        torch.rand(drawn.number, 1, generator=generator)
        return
    for _ in range(drawn.number):
        torch.randn(drawn.noise, generator=generator)


def sampled_losses(
    result: BatchLoss, generator: torch.Generator, directions: int = 1
) -> list[Tensor]:
    """Losses at labels drawn from what the model itself predicts, each summed over the terms.

    One cross-entropy with labels from its smoothed predictions; or squared errors from its own
    values plus noise, in so many directions. The Grams of their gradients add up to the curvature
    of the loss.

    Args:
        result: What the model gave, with its graph.
        generator: Draws the labels, on the CPU.
        directions: Of the noise, for each example.

    Raises:
        InputError: The loss shows neither logits nor squared values.
    """
    if result.squared is not None:
        # |f - y|^2 has the Hessian 2 I in f; e ~ N(0, I) gives E[(sqrt 2 e)(sqrt 2 e)^T] = 2 I.
        shape = (directions, *result.squared.shape[1:])
        # Drawn an example at a time: what it gets doesn't depend on those beside it.
        each = [torch.randn(shape, generator=generator) for _ in result.squared]
        noise = math.sqrt(2 / directions) * torch.stack(each, dim=1).to(result.squared)
        return [(result.squared * one).sum() for one in noise]
    if result.logits is None:
        raise InputError(
            "the sampled curvature needs logits, which a loss of your own does not show; "
            "use curvature='empirical'."
        )
    logits = result.logits.float()
    smooth = (1 - SMOOTHING) * logits.detach().softmax(-1) + SMOOTHING / logits.shape[-1]
    uniform = torch.rand(len(logits), 1, generator=generator).to(logits.device)
    drawn = (smooth.cumsum(-1) < uniform).sum(-1).clamp(max=logits.shape[-1] - 1)
    return [functional.cross_entropy(logits, drawn, reduction="sum")]


def noise_directions(examples: int) -> int:
    """How many directions of noise each example gets where the loss is a squared distance.

    Values have as many directions as features, and a few hundred examples show few of them.
    """
    return max(1, min(MOST_DIRECTIONS, ENOUGH_DIRECTIONS // examples))
