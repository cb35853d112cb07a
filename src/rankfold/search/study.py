"""A study: the user's model, calibration and selection data, and what a pass over them showed.

It holds no held-out example: ``open_inputs`` gives that part apart, to be sealed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import nn

from rankfold.certificate.certify import check_metric_values
from rankfold.certificate.statement import in_order_of_bets
from rankfold.data.account import Account
from rankfold.data.copies import refuse_copies, without_copies
from rankfold.data.example import example_input
from rankfold.data.given import LeftOut
from rankfold.data.parts import (
    PARTS,
    USUAL_LIMITS,
    Data,
    Limits,
    Part,
    as_part,
    refuse_unlike,
    select_part,
    split,
)
from rankfold.errors import InputError
from rankfold.integrations.transformers import own_text, pooling_of, task_hint
from rankfold.machine import processes
from rankfold.machine.freed_memory import trim_freed_memory
from rankfold.machine.offload import Offload
from rankfold.machine.progress import Progress
from rankfold.maths.linalg import Damping
from rankfold.model.find_layers import EmbeddingMatrix, find_embeddings, find_layers
from rankfold.model.unpack import unpack
from rankfold.objective import OBJECTIVES, Objective
from rankfold.search.kept_statistics import read_for
from rankfold.search.subject import Subject
from rankfold.settings import Settings
from rankfold.statistics.embeddings import EmbeddingRecorder, EmbeddingStatistics
from rankfold.statistics.labels import (
    Curvature,
    calibration_loss,
    choose_curvature,
    without_unlabelled,
)
from rankfold.statistics.layer_statistics import LayerStatistics, Whole
from rankfold.statistics.recorder import collect_statistics
from rankfold.statistics.trace import trace
from rankfold.tasks.evaluation import Metric, check_fast_path, evaluate, metric_values
from rankfold.tasks.losses import TEXT, Task
from rankfold.tasks.recognise import recognise_task
from rankfold.tasks.repeated import one_batch, refuse_random
from rankfold.tasks.supervised import LossFunction
from rankfold.tasks.tokens_as_meant import check_tokens, refuse_reading_ahead

OWN_TEXT = "own_text"  # the part that the model writes itself, beside the user's calibration part

# Examples used by default: calibration, selection, held-out. A sequence has hundreds of terms.
DEFAULT_LIMITS: dict[str, Limits] = dict.fromkeys(TEXT, (64, 32, 128))


@dataclass(frozen=True)
class Statistics:
    """What one pass over the calibration examples showed of each layer.

    Attributes:
        layers: By layer; empty for objectives that need none. Entries are dropped once used.
        embeddings: By embedding matrix, likewise.
        lacking: By layer, what its Grams lack, as shares of their mean eigenvalues (``shrinkage``).
        whole: By layer, of which side the Gram was kept whole.
        blocks: Names of the blocks that they were collected of one by one; empty where all came at
            once, or in groups of layers.
    """

    layers: dict[str, LayerStatistics] = field(default_factory=dict)
    embeddings: dict[str, EmbeddingStatistics] = field(default_factory=dict)
    lacking: Mapping[str, Damping] = field(default_factory=dict)
    whole: Mapping[str, Whole] = field(default_factory=dict)
    blocks: Sequence[str] = ()


class Labels(NamedTuple):
    """Which labels the gradients are taken of.

    Attributes:
        curvature: Where B comes from, None for objectives that need no gradients.
        calibration_loss: Mean loss of some calibration examples, None where no data is needed.
    """

    curvature: Curvature | None = None
    calibration_loss: float | None = None


@dataclass(frozen=True)
class Study:
    """A model, its calibration and selection data, and what a pass over them showed.

    Attributes:
        subject: The model as a set of matrices.
        task: Gives the loss.
        parts: ``calibration``, ``selection`` and, where the model wrote some, ``own_text``.
        held_out_units: How many independent units the sealed part has: examples, or groups.
        accounts: What became of the sources that the data were read from.
        left_out: Examples of the data that are in no part, by the reason.
        labels: Which labels the gradients were taken of.
        statistics: Of the matrices of ``subject.base``.
        offload: Where what is kept of all layers lies.
        damping_trials: Dampings tried and the change on selection data that each gave.
    """

    subject: Subject
    task: Task
    parts: Mapping[str, Part]
    held_out_units: int
    accounts: Sequence[Account]
    left_out: LeftOut
    labels: Labels
    statistics: Statistics
    offload: Offload
    damping_trials: tuple[tuple[Damping, float], ...] = ()

    def takes_step(self, settings: Settings) -> bool:
        """Whether the weights are moved by the gradient step before they are truncated."""
        return _takes_step(self.task, settings)

    def standing_on(
        self, base: nn.Module, dense: nn.Module, settings: Settings, progress: Progress
    ) -> Study:
        """The same study of what a round has made of the model, with statistics of its own."""
        subject = self.subject.standing_on(base, dense)
        found = _observed(
            subject, self.task, self.parts, self.labels, settings, self.offload, progress
        )
        return replace(self, subject=subject, statistics=found)


class Inputs(NamedTuple):
    """A model and its data as they are opened, before anything is computed.

    Attributes:
        subject: The model as a set of matrices.
        task: Gives the loss.
        parts: ``calibration`` and ``selection``.
        held_out: The part that a study knows nothing of but its number of units.
        accounts: What became of the sources that the data were read from.
        left_out: Examples of the data that are in no part, by the reason.
    """

    subject: Subject
    task: Task
    parts: Mapping[str, Part]
    held_out: Part
    accounts: Sequence[Account]
    left_out: LeftOut


def open_inputs(
    model: nn.Module,
    data: object,
    settings: Settings,
    *,
    loss: LossFunction | None = None,
    metrics: Sequence[Metric] = (),
) -> Inputs:
    """Find the layers, recognise the task, and choose the examples of each part.

    Args:
        model: The user's model.
        data: A data set or data loader, or ``rankfold.Data``.
        settings: What is asked for.
        loss: The user's own.
        metrics: Tried on one example.

    Raises:
        InputError: Names the input, what was expected, and what to do.
    """
    trim_freed_memory()  # what opening the model left
    unpacked = unpack(model)
    model = unpacked.model
    embeddings: dict[str, EmbeddingMatrix] = {}
    decided: dict[str, str | None] = {}
    if settings.embeddings:
        embeddings, reasons = find_embeddings(model, settings.include, settings.exclude)
        decided = {use: None for matrix in embeddings.values() for use in matrix.uses} | reasons
    layers, skipped = find_layers(model, settings.include, settings.exclude, decided)
    data = three_parts(data, settings)
    sample = select_part(data, "calibration", 1, settings.seed)
    originals = (unpacked.given, model)
    task = recognise_task(
        sample, loss, settings.task, originals, task_hint(model),
        pooling=lambda: pooling_of(unpacked.given),
    )  # fmt: skip
    parts = _choose_parts(data, task, settings)
    check_tokens(model, task, [*parts.values()])
    seen = trace(model, task, parts["calibration"], unpacked.given)
    refuse_random(model, task, parts["calibration"])
    refuse_reading_ahead(model, task, parts["calibration"])
    for part in parts.values():  # each may have a collate function of its own
        one_batch(part)
    _try_metrics(model, task, parts["calibration"].take([0]), metrics, settings)
    check_fast_path(unpacked.given, task, parts["calibration"])
    subject = Subject(unpacked, model, model, layers, embeddings, tuple(skipped), seen)
    held_out = parts.pop("held_out")
    return Inputs(subject, task, parts, held_out, data.accounts, data.left_out)


def three_parts(data: object, settings: Settings) -> Data:
    """The data as given in three parts, or split; a stream is read as far as limits allow."""
    if isinstance(data, Data):
        return data
    return split(data, settings.seed, limits=limits_of(settings))


def limits_of(settings: Settings, defaults: Limits = USUAL_LIMITS) -> Limits:
    """Most examples of each part."""
    asked = (settings.limit, settings.selection_limit, settings.held_out_limit)
    first, second, third = (limit or usual for limit, usual in zip(asked, defaults, strict=True))
    return first, second, third


def study_of(
    inputs: Inputs,
    settings: Settings,
    *,
    progress: Progress | None = None,
    offload: Offload | None = None,
    kept: Path | None = None,
) -> Study:
    """Pass over the calibration part once.

    Args:
        inputs: Of the model and its data.
        settings: What is asked for.
        progress: Shows the stages.
        offload: Where what is kept of all layers lies.
        kept: A folder of statistics (``collect.collect_into``); then nothing is passed over.

    Raises:
        InputError: Names the input, what was expected, and what to do.
    """
    offload = offload or Offload()
    subject, task, parts = inputs.subject, inputs.task, dict(inputs.parts)
    parts |= written_text(subject.model, task, parts["calibration"], settings, progress)
    objective = OBJECTIVES[settings.objective]
    check_agreement(task, objective, settings)
    if not objective.needs_data:
        unseen = [name for name in subject.layers if name not in subject.seen.rows]
        subject = subject.without(unseen, "not called in a forward pass on the first example")
    require_layers(subject)
    labels, statistics = Labels(), Statistics()
    check_needed(objective, settings, kept)
    if objective.needs_data:
        if kept is None:
            labels = processes.from_first(
                partial(labels_for, subject.model, task, parts["calibration"], objective, settings),
                "which labels the gradients are taken of",
            )
            statistics = _observed(subject, task, parts, labels, settings, offload, progress)
        else:
            labels, statistics = _read(kept, subject, task, parts, settings, offload)
        subject = _without_unreached(subject, statistics)
        require_layers(subject)
    units = units_of(inputs.held_out)
    known = (inputs.accounts, inputs.left_out)
    return Study(subject, task, parts, units, *known, labels, statistics, offload)


def units_of(part: Part) -> int:
    """Independent units of a part: examples, or the groups that they form."""
    return len(part.examples) if part.groups is None else len(set(part.groups))


def labels_for(
    model: nn.Module, task: Task, calibration: Part, objective: Objective, settings: Settings
) -> Labels:
    """Which labels the gradients are taken of, as settings say or the calibration loss shows."""
    loss, classes = calibration_loss(model, task, calibration)
    if not objective.needs_backward:
        return Labels(None, loss)
    if settings.curvature != "auto":
        return Labels(settings.curvature, loss)
    wanted = objective.output_gram != "full" or _takes_step(task, settings)
    return Labels(choose_curvature(loss, classes, wanted), loss)


def _observed(
    subject: Subject,
    task: Task,
    parts: Mapping[str, Part],
    labels: Labels,
    settings: Settings,
    offload: Offload,
    progress: Progress | None,
) -> Statistics:
    """Pass over the calibration examples with ``subject.base`` and keep its statistics."""
    found, recorder, blocks = collected(subject, task, parts, labels, settings, offload, progress)
    return _statistics(found, recorder, blocks)


def _statistics(
    found: dict[str, LayerStatistics], recorder: EmbeddingRecorder, blocks: Sequence[str] = ()
) -> Statistics:
    lacking = {name: statistics.lacking for name, statistics in found.items()}
    whole = {name: statistics.whole for name, statistics in found.items()}
    return Statistics(found, recorder.statistics(), lacking, whole, blocks)


def _read(
    folder: Path,
    subject: Subject,
    task: Task,
    parts: Mapping[str, Part],
    settings: Settings,
    offload: Offload,
) -> tuple[Labels, Statistics]:
    """Labels and statistics that a folder keeps."""
    kept, found, recorder = read_for(folder, subject, task, parts["calibration"], settings, offload)
    return Labels(kept.curvature, kept.calibration_loss), _statistics(found, recorder)


def check_needed(objective: Objective, settings: Settings, kept: Path | None) -> None:
    """Refuse a folder of statistics, to be read or written, for an objective that uses none.

    Raises:
        InputError: As said.
    """
    if kept is not None and not objective.needs_data:
        raise InputError(
            f"statistics are given, but the objective {settings.objective} uses none; leave them "
            "out, or use another objective."
        )


def collected(
    subject: Subject,
    task: Task,
    parts: Mapping[str, Part],
    labels: Labels,
    settings: Settings,
    offload: Offload,
    progress: Progress | None,
) -> tuple[dict[str, LayerStatistics], EmbeddingRecorder, Sequence[str]]:
    """Statistics of layers and embeddings, and at which blocks the model was cut for them."""
    recorder, blocks = EmbeddingRecorder(subject.embeddings), list[str]()
    objective = OBJECTIVES[settings.objective]
    found = collect_statistics(
        subject.base,
        task,
        parts["calibration"],
        subject.layers,
        curvature=labels.curvature,
        gradients=_takes_step(task, settings) or objective.allocation == "first-order",
        shrinkage=settings.shrinkage and objective.allocation == "multiplier",
        smaller_side=bool(settings.smaller_side) and objective.output_gram == "full",
        seed=settings.seed,
        prior=parts.get(OWN_TEXT),
        batch_size=settings.batch_size,
        progress=progress,
        embeddings=recorder,
        offload=offload,
        cut_at=blocks,
    )
    return found, recorder, blocks


def _takes_step(task: Task, settings: Settings) -> bool:
    """For a task of agreement the gradient is 0."""
    wanted = OBJECTIVES[settings.objective].step and settings.gradient_step
    return wanted and not task.agreement


def _without_unreached(subject: Subject, statistics: Statistics) -> Subject:
    """The matrices that the calibration data reach; statistics of others are dropped."""
    found = statistics.layers
    unreached = [name for name in subject.layers if name not in found]
    subject = subject.without(unreached, "not called in a forward pass on the calibration data")
    silent = [name for name, one in found.items() if one.is_silent]
    silent += [name for name, one in statistics.embeddings.items() if not one.uses]
    for name in silent:
        found.pop(name, None)
        statistics.embeddings.pop(name, None)
    return subject.without(silent, "the calibration data gave it no input or no gradient")


def _try_metrics(
    model: nn.Module, task: Task, one: Part, metrics: Sequence[Metric], settings: Settings
) -> None:
    """Refuse metrics that the certificate could not use, on one example and before any work."""
    if settings.accuracy_margin is not None and evaluate(model, task, one).correct is None:
        raise InputError(
            f"accuracy_margin is {settings.accuracy_margin}, but the task {task.name} has no "
            "accuracy; give a metric of your own (metrics=) or leave accuracy_margin out."
        )
    for metric in metrics:
        values, again = (metric_values(metric, model, one) for _ in range(2))
        check_metric_values(metric.name, "original", values, len(one.examples))
        if not torch.equal(values, again):
            raise InputError(
                f"the metric {metric.name} of the same example is {float(values[0]):g}, then "
                f"{float(again[0]):g}: it draws at random. Let it give the same for the same."
            )


def check_agreement(task: Task, objective: Objective, settings: Settings) -> None:
    """Refuse what needs a gradient of the loss, where the original's is 0."""
    what = None
    if objective.allocation == "first-order":
        what = f"the objective {settings.objective}"
    elif objective.needs_backward and settings.curvature == "empirical":
        what = "curvature 'empirical'"
    if task.agreement and what is not None:
        raise InputError(
            f"{what} is made of the loss' gradient, which is 0 for the task {task.name}: the "
            "original agrees with itself. Use objective kronecker or joint, and curvature auto."
        )


def require_layers(subject: Subject) -> None:
    """Refuse a model of which nothing can be factorized.

    Raises:
        InputError: Says why.
    """
    if not subject.matrices:
        counts = Counter(layer.reason for layer in subject.skipped)
        reasons = "; ".join(f"{reason} ({count})" for reason, count in counts.most_common(4))
        raise InputError(
            f"none of the {len(subject.skipped)} weighted layers of "
            f"{type(subject.model).__name__} can be factorized: {reasons or 'there are none'}. "
            "Check the data, the model's forward, and include= and exclude=."
        )


def _choose_parts(data: Data, task: Task, settings: Settings) -> dict[str, Part]:
    limits = limits_of(settings, DEFAULT_LIMITS.get(task.name, USUAL_LIMITS))
    parts = {
        name: without_unlabelled(select_part(data, name, limit, settings.seed), task)
        for name, limit in zip(PARTS, limits, strict=True)
    }
    refuse_unlike([*parts.values()])
    if data.split_here:
        parts = {part.name: part for part in without_copies(list(parts.values()))}
    refuse_copies(list(parts.values()))
    if settings.test == "betting":
        parts["held_out"] = in_order_of_bets(parts["held_out"])
    return parts


def written_text(
    model: nn.Module,
    task: Task,
    calibration: Part,
    settings: Settings,
    progress: Progress | None,
) -> dict[str, Part]:
    """Text that the model writes itself, so much that it is a share of what is calibrated on."""
    examples = calibration.examples
    count = round(settings.self_share / (1 - settings.self_share) * len(examples))
    if count == 0:
        return {}
    if task.name != "causal-lm":
        raise InputError(
            f"self_share is {settings.self_share}, but the task is {task.name}: only causal "
            "language models write text. Leave self_share at 0."
        )
    first = example_input(examples[0])
    ids = cast("torch.Tensor", first["input_ids"] if isinstance(first, Mapping) else first)
    windows = processes.from_first(
        lambda: own_text(model, count, len(ids), settings.seed, progress), "own text"
    )
    written = windows if torch.is_tensor(examples[0]) else [{"input_ids": w} for w in windows]
    return {OWN_TEXT: as_part("own text", written)}
