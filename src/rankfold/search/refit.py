"""The factor at a layer's outputs, fitted once more to inputs that other layers have changed.

Each layer is factorized for the inputs that it had in the original model. In the factorized one it
gets others, and a part of what is wrong with its outputs then can be seen from these outputs
themselves. For the outputs y of a factorized layer, ``y*`` of the original and ``p`` the pivots
among y, of which all of y are combinations, the best linear change ``y + C p`` has

    C = E[(y* - y) pᵀ] (E[p pᵀ] + damping)⁻¹

It is a change of the layer's output factor: no rank and no form changes. Layers are fitted in the
order of their calls, each on what those before it give after they were fitted (SVD-LLM's update,
arXiv 2403.07378, 3.3, fits the same factor). A layer whose outputs are added to a stream is fitted
to what puts the sum right (``residual_connections``). Of that solution a share is taken: whole, it
would also fit what is particular to the calibration examples (docs/notebook/refit.md).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import chain
from operator import add

import torch
from torch import Tensor, nn

from rankfold.certificate.change import paired_change
from rankfold.data.parts import Batch, Part
from rankfold.forms.layer import ConvStandIn, FactorizedLayer
from rankfold.forms.output_change import (
    Group,
    OutputChange,
)
from rankfold.machine import processes
from rankfold.machine.offload import Offload
from rankfold.machine.progress import Progress
from rankfold.model.evaluation_mode import evaluation_mode
from rankfold.model.layer_matrix import kept_dtype
from rankfold.model.replace import put_modules
from rankfold.model.residual_connections import Residual, residual_connections
from rankfold.search.build import build, control
from rankfold.search.round import Round
from rankfold.search.side_by_side import Pairs, run_in_step
from rankfold.search.trial import Refit, Trial, try_on_selection
from rankfold.tasks.evaluation import on_device
from rankfold.tasks.last_token import goes_alone
from rankfold.tasks.losses import Task, field_of, output_of, without_labels

# The share that is taken of the solution, and what is added to E[p pᵀ], of its mean eigenvalue.
SHARE = 0.3
DAMPING = 0.001
# Most bytes that both models' waiting passes should hold, and how often a pass holds what the
# largest output of a layer takes (measured on SmolLM2: 85 windows of 512 tokens took 3.3 GiB).
MEMORY = 7 * 2**29
HELD = 7
# Rows for each output of a layer that its fit is known well enough from: small images have a
# thousand rows each, and more of them hardly change what few features explain.
ENOUGH_ROWS = 128
# Examples of the pass in which residual connections are looked for: it holds all that modules get.
LOOKED_AT = 4


@dataclass(frozen=True)
class Moments:
    """Sums over rows that a fit needs, float64.

    Attributes:
        rows: Number of rows.
        features: ``(k,)`` sum of p.
        errors: ``(r,)`` sum of y* - y.
        gram: ``(k, k)`` sum of p pᵀ.
        cross: ``(r, k)`` sum of (y* - y) pᵀ.
        power: ``(r,)`` sum of (y* - y)².
    """

    rows: int
    features: Tensor
    errors: Tensor
    gram: Tensor
    cross: Tensor
    power: Tensor

    @classmethod
    def of(cls, features: Tensor, errors: Tensor) -> Moments:
        """Of ``(n, k)`` features and ``(n, r)`` errors."""
        return cls(
            len(features),
            features.sum(0, dtype=torch.float64),
            errors.sum(0, dtype=torch.float64),
            (features.T @ features).double(),
            (errors.T @ features).double(),
            errors.square().sum(0, dtype=torch.float64),
        )

    def __add__(self, other: Moments) -> Moments:
        """Of both sets of rows together."""
        return Moments(
            self.rows + other.rows,
            self.features + other.features,
            self.errors + other.errors,
            self.gram + other.gram,
            self.cross + other.cross,
            self.power + other.power,
        )

    def means(self, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Of p pᵀ, (y* - y) pᵀ and (y* - y)²; centred: each less its mean."""
        gram, cross, power = (sums / self.rows for sums in (self.gram, self.cross, self.power))
        if centred:
            features, errors = self.features / self.rows, self.errors / self.rows
            gram = gram - torch.outer(features, features)
            cross = cross - torch.outer(errors, features)
            power = power - errors.square()
        return gram, cross, power


def best_change(moments: Moments, centred: bool, damping: float = DAMPING) -> Tensor:
    """The change ``(r, k)`` that leaves the smallest squared errors.

    Args:
        moments: Of one row or more.
        centred: Whether a shift takes what both means differ by.
        damping: Added to the diagonal of the features' second moments, of its mean.
    """
    gram, cross, _ = moments.means(centred)
    added = damping * gram.diagonal().mean()
    known = bool(torch.isfinite(cross).all() and torch.isfinite(gram).all())
    # Nothing to fit to, or outputs that a narrow type can't hold.
    if not (known and added > 0):
        return torch.zeros_like(cross)
    damped = gram + added * torch.eye(len(gram)).to(gram)
    change: Tensor = torch.linalg.solve(damped, cross.T).T
    return change


def lasting(moments: Moments, change: Tensor, centred: bool) -> float:
    """Which part of what a change explains of the errors it should explain of others, 0 to 1.

    R² of n rows and k features adjusted for what k features explain of any n rows (Ezekiel 1930),
    over R²: a head that sees each of few images once is left nearly as it is.
    """
    gram, cross, power = moments.means(centred)
    explained = (change * (2 * cross - change @ gram)).sum()
    share, (rows, features) = float(explained / power.sum()), (moments.rows, len(gram))
    if not (share > 0 and rows > features + 1):
        return 0.0
    return max(0.0, 1 - (1 - share) * (rows - 1) / (rows - features - 1)) / share


@dataclass(frozen=True)
class Fitted:
    """Layers that were fitted again.

    Attributes:
        modules: By name.
        residual: Those of them that were fitted to what they are added to.
        examples: Number of examples that they were fitted to.
    """

    modules: dict[str, FactorizedLayer]
    residual: list[str]
    examples: int


def fitted_again(
    original: nn.Module,
    factorized: nn.Module,
    names: Sequence[str],
    task: Task,
    part: Part,
    *,
    batch_size: int | None,
    progress: Progress,
    memory: float = math.inf,
    offload: Offload | None = None,
) -> Fitted:
    """The factorized layers with their output factors fitted to the original's outputs.

    Layers that a pass calls more than once, or not with the same rows in both models (experts),
    are left out, and those whose bias another module has, too.

    Args:
        original: The dense model whose outputs are aimed at.
        factorized: Its factorized twin, which comes back as it was.
        names: Layers.
        task: Runs a model.
        part: Calibration examples; used are as many as ``ENOUGH_ROWS`` and memory ask for.
        batch_size: Examples a batch.
        progress: Shows the layers.
        memory: Bytes that both models' waiting passes may hold, where ``MEMORY`` isn't less.
        offload: Where the fitted layers lie.
    """
    batch_size = 1 if goes_alone(factorized) else batch_size  # a pass calls each layer once
    modules = _with_own_bias(factorized, names)
    first = part.batches(batch_size)[0]
    seen = _outputs_of_one(factorized, modules, task, on_device(part.collate(first), factorized))
    if not seen:
        return Fitted({}, [], 0)
    modules = {name: modules[name] for name in seen}
    few = on_device(part.collate(first[:LOOKED_AT]), factorized)
    with evaluation_mode(factorized):
        residuals = residual_connections(
            factorized,
            {name: _channel_axis(module) for name, module in modules.items()},
            {name for name, _ in original.named_modules()},
            partial(_forward, task, factorized, few),
        )
    part = part.spread(min(len(part.examples), _examples(seen, modules, len(first), memory)))
    mine = processes.mine(part.batches(batch_size))
    batches = [on_device(part.collate(some), factorized) for some in mine]
    masks = [field_of(batch, "attention_mask") for batch in batches]
    fit = _Fit(modules, residuals, masks, offload or Offload())
    run_in_step(
        original,
        factorized,
        batches,
        partial(_forward, task),
        list(modules),
        {name: residual.streams for name, residual in residuals.items()},
        fit.visit,
        progress,
        "layers fitted again",
    )
    return Fitted(fit.in_their_modes(), fit.residual, len(part.examples))


def _with_own_bias(model: nn.Module, names: Sequence[str]) -> dict[str, FactorizedLayer]:
    """Those of these layers that take changes of their outputs, and whose bias has no other use."""
    held_by = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    return {
        name: module
        for name in names
        if isinstance(module := model.get_submodule(name), FactorizedLayer)
        and module.takes_changes
        and (module.bias is None or held_by[id(module.bias)] == 1)
    }


class _Fit:
    """Fits each layer that both models stop at.

    Args:
        modules: The layers, in the order of their calls.
        residuals: What the outputs are added to, of the layers where that is known.
        masks: Of each batch, which of its rows count (which tokens are no padding), or None.
        offload: Where the fitted layers lie.

    Attributes:
        found: Layers that were fitted.
        residual: Those of them that were fitted to what they are added to.
    """

    def __init__(
        self,
        modules: Mapping[str, FactorizedLayer],
        residuals: Mapping[str, Residual],
        masks: Sequence[Tensor | None],
        offload: Offload,
    ):
        self._offload = offload
        self._modules = modules
        self._residuals = residuals
        self._masks = masks
        self.found: dict[str, FactorizedLayer] = {}
        self.residual: list[str] = []

    def visit(self, name: str, pairs: Pairs, streams: Pairs) -> list[Tensor]:
        """Fit a layer; its outputs in each batch as they are then."""
        module, residual = self._modules[name], self._residuals.get(name)
        known: Sequence[tuple[Tensor, Tensor] | None] = streams or [None] * len(pairs)
        rows = [
            _Rows.of(module, *pair, mask, residual, stream)
            for pair, mask, stream in zip(pairs, self._masks, known, strict=True)
        ]
        summed = any(batch.streams is not None for batch in rows)
        if any(processes.gathered(summed, f"residual of {name}")):
            self.residual.append(name)
        change = _change(name, module, rows)
        self.found[name] = module.with_output_change(change)
        self._offload.in_files(self.found[name])
        changed = [change.of_outputs(batch.outputs, module.bias) for batch in rows]
        return [y.movedim(-1, _channel_axis(module)) for y in changed]

    def in_their_modes(self) -> dict[str, FactorizedLayer]:
        """The fitted layers, which were copied in evaluation mode, in the modes of the given."""
        for name, module in self.found.items():
            module.train(self._modules[name].training)
            olds = self._modules[name].parameters()
            for new, old in zip(module.parameters(), olds, strict=True):
                new.requires_grad_(old.requires_grad)
        return self.found


def _forward(task: Task, model: nn.Module, batch: Batch) -> None:
    """A pass of this model alone: an agreement's loss calls the original, too."""
    if task.agreement:
        output_of(model, without_labels(batch))
    else:
        task.batch_loss(model, batch)


def _channel_axis(module: FactorizedLayer) -> int:
    """Where the outputs stand, of a conv before its positions."""
    return -3 if isinstance(module, ConvStandIn) else -1


@dataclass(frozen=True)
class _Rows:
    """One batch at a layer.

    Attributes:
        wanted: ``(..., out)`` outputs of the original.
        outputs: ``(..., out)`` the layer's own.
        mask: Which rows count, None for all.
        residual: What the outputs are added to, None where that isn't known.
        streams: That in the original and here, ``(..., out)`` each; None where it isn't known.
    """

    wanted: Tensor
    outputs: Tensor
    mask: Tensor | None
    residual: Residual | None
    streams: tuple[Tensor, Tensor] | None

    @classmethod
    def of(
        cls,
        module: FactorizedLayer,
        wanted: Tensor,
        outputs: Tensor,
        mask: Tensor | None,
        residual: Residual | None,
        streams: tuple[Tensor, Tensor] | None,
    ) -> _Rows:
        """From tensors as the model has them, a conv's channels before its positions."""
        wanted, outputs = (y.movedim(_channel_axis(module), -1) for y in (wanted, outputs))
        if residual is not None and streams is not None:
            first, second = (stream.movedim(residual.axis, -1) for stream in streams)
            streams = first, second
        fits = mask is not None and mask.shape == outputs.shape[:-1]
        known = streams is not None and streams[0].shape == streams[1].shape == outputs.shape
        return cls(wanted, outputs, mask if fits else None, residual, streams if known else None)

    def moments(self, groups: Sequence[Group], bias: Tensor | None) -> list[Moments]:
        """Of each group of outputs."""
        wanted, outputs = self._counted(self.wanted), self._counted(self.outputs)
        errors = wanted - outputs
        if self.residual is not None and self.streams is not None:
            errors += self.residual.as_output(*map(self._counted, self.streams))
        return [
            Moments.of(group.features(outputs, bias), errors.index_select(1, group.rows))
            for group in groups
        ]

    def _counted(self, values: Tensor) -> Tensor:
        """The rows that count, ``(n, out)``."""
        kept = values.flatten(0, -2) if self.mask is None else values[self.mask != 0]
        return kept.to(kept_dtype(values))


def _change(name: str, module: FactorizedLayer, rows: Sequence[_Rows]) -> OutputChange:
    """The change of a layer's outputs, from those of the original and its own in each batch."""
    groups, bias = module.output_groups(), module.bias
    of_batches = [batch.moments(groups, bias) for batch in rows]
    own = [(rows[0].outputs.shape[-1], reduce(_added, of_batches))] if of_batches else []
    found = [*chain.from_iterable(processes.gathered(own, f"moments of {name}"))]
    outputs, together = found[0][0], reduce(_added, (moments for _, moments in found))
    coefficients: list[Tensor] = []
    shift = together[0].errors.new_zeros(outputs)
    for group, moments in zip(groups, together, strict=True):
        best = best_change(moments, centred=bias is not None)
        coefficients.append(SHARE * lasting(moments, best, centred=bias is not None) * best)
        # The mean error is known from few rows, too.
        shifted = SHARE * moments.errors - coefficients[-1] @ moments.features
        shift[group.rows] += torch.where(shifted.isfinite(), shifted / moments.rows, 0)
    return OutputChange(groups, coefficients, None if bias is None else shift)


def _added(some: list[Moments], more: list[Moments]) -> list[Moments]:
    return list(map(add, some, more))


def _outputs_of_one(
    model: nn.Module, modules: Mapping[str, nn.Module], task: Task, batch: Batch
) -> dict[str, Tensor]:
    """The output of each layer that one pass calls once, without its values, in order of calls."""
    seen: dict[str, Tensor] = {}
    often: set[str] = set()

    def saw(name: str, module: nn.Module, args: object, output: Tensor) -> None:
        if name in seen:
            often.add(name)
        seen[name] = output.to("meta")

    with ExitStack() as stack:
        for name, module in modules.items():
            handle = module.register_forward_hook(partial(saw, name), prepend=True)
            stack.callback(handle.remove)
        stack.enter_context(evaluation_mode(model))
        _forward(task, model, batch)
    return {name: output for name, output in seen.items() if name not in often}


def _examples(
    outputs: Mapping[str, Tensor], modules: Mapping[str, FactorizedLayer], batch: int, memory: float
) -> int:
    """How many examples layers are fitted to: as many as are needed, and as memory holds.

    Args:
        outputs: Of each layer for one batch.
        modules: The layers.
        batch: Number of examples of that batch.
        memory: Bytes that all of them may take.
    """
    held = HELD * 2 * max(y.numel() * y.element_size() for y in outputs.values()) / batch
    sides = {name: y.shape[_channel_axis(modules[name])] for name, y in outputs.items()}
    needed = max(ENOUGH_ROWS * sides[name] ** 2 * batch / y.numel() for name, y in outputs.items())
    return max(1, min(math.ceil(needed), int(min(memory, MEMORY) / held)))


def refits(round_: Round) -> bool:
    """Whether output factors are fitted once more to what other layers have changed."""
    return bool(round_.settings.refit) and round_.objective.allocation == "multiplier"


def refitted(trial: Trial) -> Trial:
    """A trial with its output factors fitted again, measured.

    The trial itself where it has no layer that can be.
    """
    round_ = trial.round
    study, model = round_.study, build(round_, trial.plan)
    fitted = fitted_again(
        control(round_) or study.subject.dense,
        model,
        [name for name, choice in trial.plan.items() if choice.rank is not None],
        study.task,
        study.parts["calibration"],
        batch_size=round_.settings.batch_size,
        progress=round_.progress,
        memory=study.offload.left_beside(model) // 2,
        offload=study.offload,
    )
    if not fitted.modules:
        return trial
    put_modules(model, fitted.modules)
    shown = f"size {trial.size:.3f}, refit, on selection data"
    evaluation = try_on_selection(round_, model, shown)
    change = paired_change(round_.original, evaluation)
    gain = change.mean - trial.change.mean
    refit = Refit(fitted.modules, fitted.residual, fitted.examples, gain)
    predicted = None if trial.predicted is None else trial.predicted + refit.gain
    return replace(trial, predicted=predicted, change=change, evaluation=evaluation, refit=refit)
