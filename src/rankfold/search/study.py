"""A model, its data, and what one pass over the calibration examples showed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from rankfold.certificate.certify import check_metric_values
from rankfold.certificate.earlier_uses import Opening
from rankfold.certificate.statement import order_seed
from rankfold.data.copies import refuse_copies, without_copies
from rankfold.data.parts import PARTS, Data, Part, as_part, example_input, select_part, split
from rankfold.errors import InputError
from rankfold.forms.embedding.modules import embedding_flops
from rankfold.forms.storage import Form, factor_parameters
from rankfold.integrations.transformers import own_text, task_hint
from rankfold.machine.device import device_of
from rankfold.machine.offload import Offload, check_offload
from rankfold.machine.progress import Progress
from rankfold.maths.linalg import Damping
from rankfold.model.find_layers import EmbeddingMatrix, Skipped, find_embeddings, find_layers
from rankfold.model.layer_matrix import MatrixLayer
from rankfold.model.unpack import Unpacked, unpack
from rankfold.objective import OBJECTIVES, Cost, Objective
from rankfold.search.layer_curves import rank_costs
from rankfold.settings import Settings
from rankfold.statistics.embeddings import EmbeddingRecorder, EmbeddingStatistics
from rankfold.statistics.labels import TEXT, Curvature, calibration_loss, choose_curvature
from rankfold.statistics.layer_statistics import LayerStatistics
from rankfold.statistics.recorder import collect_statistics
from rankfold.statistics.trace import Trace, trace
from rankfold.tasks.evaluation import Evaluation, Metric, evaluate, metric_values
from rankfold.tasks.losses import Task
from rankfold.tasks.recognise import recognise_task
from rankfold.tasks.supervised import LossFunction

OWN_TEXT = "own_text"  # the part that the model writes itself, beside the user's calibration part

# Examples used by default: calibration, selection, held-out. A sequence has hundreds of terms.
DEFAULT_LIMITS = dict.fromkeys(TEXT, (64, 32, 128))
OTHER_LIMITS = (2048, 2048, 10000)


@dataclass
class Collected:
    """A model, its data, and what one pass over the calibration examples showed.

    Attributes:
        model: The user's model, unpacked: the same function from plain layers.
        base: The model whose weights are factorized: the user's own, or in a later round what
            the one before made of it.
        dense: The user's model moved by the steps of earlier rounds, for the control.
        task: Gives the loss.
        parts: The examples used of each part.
        layers: Layers of ``base`` to factorize.
        embeddings: Embedding matrices of ``base`` to factorize, by the name of their first use.
        skipped: Layers that stay as they are.
        seen: Calls and FLOPs of one example.
        statistics: By layer; empty for objectives that need none.
        curvature: Where B came from, or None.
        calibration_loss: Mean loss of some calibration examples, or None.
        unpacked: The user's own model, and what was replaced in it.
        original: Losses of the model on the parts where they are known already.
        metrics: The user's metrics.
        original_metrics: Their values of the user's model on the held-out part, where known.
        openings: Of the held-out part, by this process.
        damping_trials: Dampings tried and the change on selection data that each gave.
        embedding_statistics: By the names in ``embeddings``.
        lacking: By layer, what its Grams lack, as shares of their mean eigenvalues
            (``shrinkage``); kept when the statistics are dropped.
        offload: Where what is kept of all layers lies.
    """

    model: nn.Module
    base: nn.Module
    dense: nn.Module
    task: Task
    parts: dict[str, Part]
    layers: dict[str, MatrixLayer]
    skipped: list[Skipped]
    seen: Trace
    statistics: dict[str, LayerStatistics]
    curvature: Curvature | None
    calibration_loss: float | None
    unpacked: Unpacked
    original: dict[str, Evaluation] = field(default_factory=dict)
    metrics: tuple[Metric, ...] = ()
    original_metrics: dict[str, Tensor] = field(default_factory=dict)
    openings: list[Opening] = field(default_factory=list)
    damping_trials: list[tuple[Damping, float]] = field(default_factory=list)
    embeddings: dict[str, EmbeddingMatrix] = field(default_factory=dict)
    embedding_statistics: dict[str, EmbeddingStatistics] = field(default_factory=dict)
    lacking: dict[str, Damping] = field(default_factory=dict)
    offload: Offload = field(default_factory=Offload)

    @property
    def matrices(self) -> dict[str, MatrixLayer | EmbeddingMatrix]:
        """All that can be factorized."""
        return {**self.layers, **self.embeddings}

    def original_losses(self, part: str, batch_size: int | None, progress: Progress) -> Evaluation:
        """Losses of the user's model on a part, evaluated once."""
        if part not in self.original:
            stage = f"original on {part.replace('_', '-')} data"
            self.original[part] = evaluate(
                self.unpacked.given,
                self.task,
                self.parts[part],
                batch_size=batch_size,
                progress=progress,
                stage=stage,
            )
        return self.original[part]

    def observe(self, settings: Settings, progress: Progress | None) -> None:
        """Pass over the calibration examples with ``base`` and keep its statistics."""
        recorder = EmbeddingRecorder(self.embeddings)
        objective = OBJECTIVES[settings.objective]
        self.statistics = collect_statistics(
            self.base,
            self.task,
            self.parts["calibration"],
            self.layers,
            curvature=self.curvature,
            gradients=self.takes_step(settings) or objective.allocation == "first-order",
            shrinkage=settings.shrinkage and objective.allocation == "multiplier",
            seed=settings.seed,
            prior=self.parts.get(OWN_TEXT),
            batch_size=settings.batch_size,
            progress=progress,
            embeddings=recorder,
            offload=self.offload,
        )
        self.embedding_statistics = recorder.statistics()
        self.lacking = {name: found.lacking for name, found in self.statistics.items()}

    def takes_step(self, settings: Settings) -> bool:
        """Whether the weights are moved by the gradient step before they are truncated.

        For a task of agreement the gradient is 0.
        """
        wanted = OBJECTIVES[settings.objective].step and settings.gradient_step
        return wanted and not self.task.agreement

    def cost_per_parameter(self, name: str, cost: Cost) -> int:
        """1 for parameters; for FLOPs a multiply-add for each row of one example."""
        return 1 if cost == "parameters" else 2 * self.seen.rows.get(name, 0)

    def rank_costs(self, name: str, form: Form, cost: Cost) -> Tensor:
        """Cost of every rank of a layer or an embedding matrix in a form, ``(r,)`` int64."""
        if name in self.layers:
            return rank_costs(self.layers[name], form, self.cost_per_parameter(name, cost))
        words, dim = self.embeddings[name].weight.shape
        ranks = range(1, min(words, dim) + 1)
        if cost == "parameters":
            return torch.tensor([factor_parameters(words, dim, rank, form) for rank in ranks])
        return torch.tensor([self.embedding_flops(name, rank, form) for rank in ranks])

    def dense_cost(self, name: str, cost: Cost) -> int:
        """Cost of a layer or an embedding matrix left dense."""
        if name in self.embeddings and cost == "flops":
            return self.embedding_flops(name, None, "pair")
        per_parameter = 1 if name in self.embeddings else self.cost_per_parameter(name, cost)
        return self.matrices[name].weight.numel() * per_parameter

    def embedding_flops(self, name: str, rank: int | None, form: Form) -> int:
        """Of all uses of an embedding matrix, for one example."""
        matrix = self.embeddings[name]
        words, dim = matrix.weight.shape
        looked_up, scored = (
            sum(self.seen.rows.get(use, 0) for use in uses)
            for uses in (matrix.lookups, matrix.heads)
        )
        return embedding_flops((words, dim), rank, form, looked_up, scored)

    def leave_dense(self, reason: str, names: Iterable[str]) -> None:
        """Move layers to the skipped ones."""
        for name in list(names):
            uses: Mapping[str, nn.Module]
            if name in self.embeddings:
                uses = self.embeddings.pop(name).uses
                self.embedding_statistics.pop(name, None)
            else:
                uses = {name: self.layers.pop(name)}
                self.statistics.pop(name, None)
            for use, layer in uses.items():
                count = sum(parameter.numel() for parameter in layer.parameters())
                self.skipped.append(Skipped(use, type(layer).__name__, count, reason))


def collect(
    model: nn.Module,
    data: object,
    settings: Settings,
    *,
    loss: LossFunction | None = None,
    metrics: Sequence[Metric] = (),
    progress: Progress | None = None,
    offload: Offload | None = None,
) -> Collected:
    """Find the layers, choose the examples, and pass over the calibration part once.

    Raises:
        InputError: Names the input, what was expected, and what to do.
    """
    offload = offload or Offload()
    check_offload(offload, device_of(model))
    unpacked = unpack(model)
    model = unpacked.model
    embeddings: dict[str, EmbeddingMatrix] = {}
    decided: dict[str, str | None] = {}
    if settings.embeddings:
        embeddings, reasons = find_embeddings(model, settings.include, settings.exclude)
        decided = {use: None for matrix in embeddings.values() for use in matrix.uses} | reasons
    layers, skipped = find_layers(model, settings.include, settings.exclude, decided)
    data = data if isinstance(data, Data) else split(data, settings.seed)
    sample = select_part(data, "calibration", 1, settings.seed)
    originals = (unpacked.given, model)
    task = recognise_task(sample, loss, settings.task, originals, task_hint(model))
    parts = _choose_parts(data, task, settings)
    _try_metrics(model, task, parts["calibration"].take([0]), metrics, settings)
    _add_own_text(model, task, parts, settings, progress)
    calibration = parts["calibration"]
    seen = trace(model, task, calibration)
    collected = Collected(
        model, model, model, task, parts, layers, skipped, seen, {}, None, None, unpacked
    )
    collected.metrics = tuple(metrics)
    collected.embeddings = embeddings
    collected.offload = offload
    objective = OBJECTIVES[settings.objective]
    _check_agreement(task, objective, settings)
    if not objective.needs_data:
        unseen = [name for name in layers if name not in seen.rows]
        collected.leave_dense("not called in a forward pass on the first example", unseen)
    _require_layers(collected)
    if objective.needs_data:
        collected.calibration_loss, classes = calibration_loss(model, task, calibration)
        if objective.needs_backward:
            labels = objective.output_gram != "full" or collected.takes_step(settings)
            collected.curvature = (
                choose_curvature(collected.calibration_loss, classes, labels)
                if settings.curvature == "auto"
                else settings.curvature
            )
        collected.observe(settings, progress)
        unreached = [name for name in layers if name not in collected.statistics]
        collected.leave_dense("not called in a forward pass on the calibration data", unreached)
        silent = [name for name, stats in collected.statistics.items() if stats.is_silent]
        silent += [name for name, s in collected.embedding_statistics.items() if not s.uses]
        collected.leave_dense("the calibration data gave it no input or no gradient", silent)
        _require_layers(collected)
    return collected


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
        values = metric_values(metric, model, one)
        check_metric_values(metric.name, "original", values, len(one.examples))


def _check_agreement(task: Task, objective: Objective, settings: Settings) -> None:
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


def _require_layers(collected: Collected) -> None:
    if not collected.matrices:
        counts = Counter(layer.reason for layer in collected.skipped)
        reasons = "; ".join(f"{reason} ({count})" for reason, count in counts.most_common(4))
        raise InputError(
            f"none of the {len(collected.skipped)} weighted layers of "
            f"{type(collected.model).__name__} can be factorized: {reasons or 'there are none'}. "
            "Check the data, the model's forward, and --include and --exclude."
        )


def _choose_parts(data: Data, task: Task, settings: Settings) -> dict[str, Part]:
    defaults = DEFAULT_LIMITS.get(task.name, OTHER_LIMITS)
    asked = (settings.limit, settings.selection_limit, settings.held_out_limit)
    parts = {
        name: select_part(data, name, limit or default, settings.seed)
        for name, limit, default in zip(PARTS, asked, defaults, strict=True)
    }
    if data.split_here:
        parts = {part.name: part for part in without_copies(list(parts.values()))}
    refuse_copies(list(parts.values()))
    if settings.test == "betting":
        # Bets need a random order, which nobody may choose: the data itself does.
        held_out = parts["held_out"]
        generator = torch.Generator().manual_seed(order_seed(held_out.digest))
        order = torch.randperm(len(held_out.examples), generator=generator)
        parts["held_out"] = held_out.take(order.tolist())
    return parts


def _add_own_text(
    model: nn.Module,
    task: Task,
    parts: dict[str, Part],
    settings: Settings,
    progress: Progress | None,
) -> None:
    """Add text that the model writes itself until it is a share of what is calibrated on."""
    examples = parts["calibration"].examples
    count = round(settings.self_share / (1 - settings.self_share) * len(examples))
    if count == 0:
        return
    if task.name != "causal-lm":
        raise InputError(
            f"self_share is {settings.self_share}, but the task is {task.name}: only causal "
            "language models write text. Leave self_share at 0."
        )
    first = cast("Any", example_input(examples[0]))
    ids = first["input_ids"] if isinstance(first, Mapping) else first
    windows = own_text(model, count, len(ids), settings.seed, progress)
    written = windows if torch.is_tensor(examples[0]) else [{"input_ids": w} for w in windows]
    parts[OWN_TEXT] = as_part("own text", written)
