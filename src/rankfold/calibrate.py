"""Run calibration data through a model under hooks: the statistics of every layer.

For a loss that is the mean over N terms (tokens, images), and a layer ``y = W x``:

- ``input_gram`` A = mean over rows of ``x x^T``,
- ``output_gram`` B = 1/N sum over rows of ``g g^T``, g the gradient of the summed loss at y,
- ``gradients`` of the mean loss, one of each half of the examples (``halves``),

so that ``1/2 tr(B Delta A Delta^T)`` is the K-FAC model of the mean loss (a conv's positions are
counted once: in B), but for rows that dominate the gradient, which are counted apart
(``curvature``). Only hooks live here; the maths is in ``spectrum`` and ``layer_matrix``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankfold.backward import each_gradient
from rankfold.data import Batch, Part, default_batch_size
from rankfold.dominant_rows import dominant_rows
from rankfold.embedding_statistics import EmbeddingRecorder
from rankfold.errors import InputError
from rankfold.layer_matrix import (
    MatrixLayer,
    call_input,
    input_rows,
    kept_dtype,
    matrix_shape,
    output_rows,
)
from rankfold.linalg import (
    UNDAMPED,
    Damping,
    add_gram,
    keep_below,
    kept_below,
    mirrored,
    rows_of_same_gram,
)
from rankfold.modes import evaluation_mode
from rankfold.offload import Offload
from rankfold.progress import Progress, SilentProgress
from rankfold.shrinkage import held_out_damping
from rankfold.tasks import BatchLoss, Task, on_device, running

Curvature: TypeAlias = Literal["empirical", "sampled"]

# A model whose calibration loss is below this share of the loss of guessing (log K) has nearly
# memorised its labels: their gradients say little about the curvature around the model.
MEMORISED_SHARE = 0.15
# Tasks whose examples are pieces of text.
TEXT = ("causal-lm", "masked-lm", "seq2seq")
# Share of the probability spread over all classes before labels are sampled.
SMOOTHING = 0.1
# Directions of noise that all examples together get where the loss is a squared distance, and the
# most that one gets, each for another backward pass.
ENOUGH_DIRECTIONS = 2048
MOST_DIRECTIONS = 4


@dataclass(frozen=True)
class DominantRows:
    """What the rows that dominate a layer's gradient (``dominant_rows``) are of its statistics.

    They are few, so what has their Gram is kept in place of it.

    Attributes:
        inputs: ``(few, in)``; ``inputs^T inputs`` is 1/N sum over these rows of ``|g|^2 x x^T``.
        output_squares: ``(out,)``, 1/N sum over these rows of ``g^2``.
    """

    inputs: Tensor
    output_squares: Tensor


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one layer's matrix ``(out, in)``, in float32, or float64 for a float64 model.

    Attributes:
        input_gram: ``(in, in)``; the same tensor for layers that share their input.
        output_gram: ``(out, out)``, of all rows but dominant ones; None when no backward pass was
            asked for.
        gradients: Mean gradients ``(out, in)`` of the two halves, None when not asked for.
        shares_input_with: Name of the layer whose input Gram this is, or None.
        dominant: Of the rows that dominate the gradient; None where none do.
        lacking: What both Grams lack along their small eigenvalues (``shrinkage``), by what half of
            the examples lack; 0 where only one half reached the layer.
    """

    input_gram: Tensor
    output_gram: Tensor | None
    gradients: tuple[Tensor, Tensor] | None
    shares_input_with: str | None
    dominant: DominantRows | None = None
    lacking: Damping = UNDAMPED

    @property
    def gradient(self) -> Tensor:
        """Mean gradient over all examples, ``(out, in)``."""
        if self.gradients is None:
            raise ValueError("these statistics were collected without gradients")
        return (self.gradients[0] + self.gradients[1]) / 2

    @property
    def is_silent(self) -> bool:
        """Whether the data gave this layer no input, or no gradient."""
        grams = [self.input_gram] + ([] if self.output_gram is None else [self.output_gram])
        return any(float(gram.diagonal().sum()) == 0 for gram in grams)


@dataclass(frozen=True)
class Trace:
    """What one example's forward pass shows.

    Attributes:
        rows: For every module with a weight that was called: the rows that its matrix multiplies,
            of an embedding those that are looked up.
        flops: Floating-point operations (2 a multiply-add) of all weighted modules, one example.
        image_sizes: Height and width of the input of every call of a Conv2d.
    """

    rows: dict[str, int]
    flops: dict[str, int]
    image_sizes: dict[str, list[tuple[int, int]]]


def trace(model: nn.Module, task: Task, part: Part) -> Trace:
    """Run one calibration example forward and see which modules are called, on how many rows.

    Raises:
        InputError: The model can't run on it.
    """
    rows: dict[str, int] = {}
    flops: dict[str, int] = {}
    image_sizes: dict[str, list[tuple[int, int]]] = {}
    with ExitStack() as stack:
        for name, module in model.named_modules():
            weight = module._parameters.get("weight")
            if weight is None or weight.dim() < 2 or weight.numel() == 0:
                continue

            def count(
                module: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                output: Any,
                name: str = name,
                weight: Tensor = weight,
            ) -> None:
                if not torch.is_tensor(output):
                    return
                if isinstance(module, nn.Embedding):  # rows are fetched, nothing is computed
                    rows[name] = rows.get(name, 0) + output.numel() // weight.shape[1]
                else:
                    if isinstance(module, nn.Conv2d):
                        height, width = call_input(args, kwargs).shape[-2:]
                        image_sizes.setdefault(name, []).append((height, width))
                    calls = output.numel() // weight.shape[0]
                    rows[name] = rows.get(name, 0) + calls
                    flops[name] = flops.get(name, 0) + 2 * calls * weight.numel()

            stack.callback(module.register_forward_hook(count, with_kwargs=True).remove)
        batch = on_device(part.collate(part.examples[:1]), model)
        with evaluation_mode(model), running(batch):
            task.batch_loss(model, batch)
    return Trace(rows, flops, image_sizes)


SQUARED = 0  # in place of the number of logits, where the loss is a squared error
FEWEST = 8  # examples that say whether a model has memorised its data


def calibration_loss(model: nn.Module, task: Task, part: Part) -> tuple[float, int | None]:
    """Mean loss of a few calibration examples, from all over, and the number of logits.

    The number is ``SQUARED`` for a squared error and None for a user's loss.

    Raises:
        InputError: The loss is not finite.
    """
    few = part.spread(max(FEWEST, 2 * default_batch_size(part.examples[0]))).batches()
    losses = terms = 0.0
    classes = None
    with evaluation_mode(model):
        for examples in few:
            result = task.batch_loss(model, on_device(part.collate(examples), model))
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


def collect_statistics(
    model: nn.Module,
    task: Task,
    part: Part,
    layers: Mapping[str, MatrixLayer],
    *,
    curvature: Curvature | None,
    gradients: bool = True,
    shrinkage: bool = True,
    seed: int = 0,
    prior: Part | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
    embeddings: EmbeddingRecorder | None = None,
    offload: Offload | None = None,
) -> dict[str, LayerStatistics]:
    """One pass over the calibration examples; the model comes back as it was.

    Args:
        model: The model, whose weights are only read.
        task: Gives the loss.
        part: Calibration examples.
        layers: The layers of ``model`` to watch, by name.
        curvature: Where B comes from; None collects A alone, without a backward pass.
        gradients: Whether the mean gradients are collected beside B. Without them the backward
            pass leaves out the weights, which is half of its work.
        shrinkage: Whether the halves' Grams are compared, for which those of one are kept apart
            until the pass is over.
        seed: Seeds the sampled labels.
        prior: Examples of what the model meets elsewhere (its own text): they count for A and B
            like the others, and not for the gradients, which are those of the user's task.
        batch_size: Examples a batch; the statistics do not depend on it.
        progress: Shows the batches.
        embeddings: Sees the same passes.
        offload: Where the sums lie.

    Raises:
        InputError: The loss, or what a layer sees, is not finite.
    """
    progress = progress or SilentProgress()
    first, second = (part.take(half) for half in halves(task.name, len(part.examples)))
    directions = noise_directions(len(part.examples))
    embeddings = embeddings or EmbeddingRecorder({})
    recorder = _Recorder(
        layers, curvature, gradients, seed, directions, embeddings, offload or Offload()
    )

    def observe(source: Part, batches: Iterable[list[Any]], half: int | None) -> None:
        for examples in batches:
            recorder.observe(model, task, on_device(source.collate(examples), model), half)

    with (
        recorder.attached(),
        evaluation_mode(model, trainable=recorder.trainable),
        torch.set_grad_enabled(curvature is not None),
    ):
        early, late = first.batches(batch_size), second.batches(batch_size)
        shown = iter(progress.track([*early, *late], "collect statistics", len(early) + len(late)))
        observe(first, islice(shown, len(early)), 0)
        if shrinkage:
            recorder.keep_first_half()
        observe(second, shown, 1)
        recorder.refuse_infinite()
        if shrinkage:
            recorder.compare_halves(progress)
        if prior is not None:
            batches = prior.batches(batch_size)
            observe(prior, progress.track(batches, "own text's statistics", len(batches)), None)
            recorder.refuse_infinite()
    return recorder.statistics()


def halves(task: str, count: int) -> tuple[range, range]:
    """Places of two halves of the examples, the second one no smaller.

    Neighbouring windows of text are of one document, so its halves are the first and the second.
    Images are often listed class by class: there, and in all other data, every other one.
    """
    if task in TEXT:
        return range(count // 2), range(count // 2, count)
    return range(1, count, 2), range(0, count, 2)


class _Half(NamedTuple):
    """Sums of a layer over the first half of the examples.

    Of its Grams the diagonals; the rest is below the diagonals of the running ones
    (``linalg.keep_below``).
    """

    input_diagonal: Tensor
    output_diagonal: Tensor
    rows: int


@dataclass
class _Sums:
    """Running sums of one layer; ``leader`` names the layer whose input Gram it uses, if any.

    The Grams are added up on and above the diagonal (``linalg.add_gram``).
    """

    started: int
    leader: str | None
    input_gram: Tensor
    output_gram: Tensor
    gradients: tuple[Tensor, Tensor]
    rows: int = 0
    dominant: DominantRows | None = None
    first_half: _Half | None = None
    lacking: Damping = UNDAMPED

    def add_dominant(self, inputs: Tensor, gradients: Tensor) -> None:
        """Count dominant rows: their inputs ``(few, in)`` and gradients ``(few, out)``."""
        rows, squares = inputs * gradients.norm(dim=1, keepdim=True), gradients.square().sum(0)
        if self.dominant is not None:
            rows = torch.cat([self.dominant.inputs, rows])
            squares += self.dominant.output_squares
        self.dominant = DominantRows(rows_of_same_gram(rows), squares)


class _Recorder:
    """Owns the hooks, and the sums that they feed."""

    def __init__(
        self,
        layers: Mapping[str, MatrixLayer],
        curvature: Curvature | None,
        gradients: bool,
        seed: int,
        directions: int,
        embeddings: EmbeddingRecorder,
        offload: Offload,
    ):
        self.layers = layers
        self.offload = offload
        self.embeddings = embeddings
        self.curvature = curvature
        self.gradients = gradients and curvature is not None
        self.generator = torch.Generator().manual_seed(seed)
        self.directions = directions
        self.sums: dict[str, _Sums] = {}
        self.terms: dict[int | None, float] = {0: 0.0, 1: 0.0, None: 0.0}
        self.passes = 0
        self._listens(False)
        # The inputs of this pass and who saw each first; the references keep addresses unique.
        self._inputs: dict[tuple[object, ...], tuple[str, Tensor]] = {}
        # Inputs of this pass that depend on no layer: gradients that flow to them have been through
        # every layer's output on the way.
        self._first_inputs: list[Tensor] = []

    @property
    def trainable(self) -> list[Tensor]:
        """The weights that gradients are wanted of: of the layers, and of the embeddings."""
        if self.curvature is None:
            return []
        weights = [layer.weight for layer in self.layers.values()] if self.gradients else []
        return [*weights, *self.embeddings.weights]

    def _listens(self, listening: bool) -> None:
        """Whether gradients that arrive now belong to the curvature."""
        self.listening = self.embeddings.listening = listening

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks on, and off again whatever happens."""
        with ExitStack() as stack:
            stack.enter_context(self.embeddings.attached())
            for name, layer in self.layers.items():
                hook = partial(self._saw_call, name)
                stack.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
                if self.curvature is not None:
                    before = layer.register_forward_pre_hook(
                        self._require_gradient, with_kwargs=True
                    )
                    stack.callback(before.remove)
            yield

    def keep_first_half(self) -> None:
        """What comes now belongs to the second half of the user's examples."""
        for sums in self.sums.values():
            inputs, outputs = keep_below(sums.input_gram), keep_below(sums.output_gram)
            sums.first_half = _Half(inputs, outputs, sums.rows)

    def refuse_infinite(self) -> None:
        """Refuse statistics that are not finite: losses may be so where gradients are not.

        Raises:
            InputError: Names the layer.
        """
        for name, sums in self.sums.items():
            parts = {"inputs": sums.input_gram, "output gradients": sums.output_gram}
            for what, gram in parts.items():
                if not bool(torch.isfinite(gram).all()):
                    dtype = self.layers[name].weight.dtype
                    wider = "float64" if dtype == torch.float32 else "float32"
                    advice = "" if dtype == torch.float64 else f", or give the model in {wider}"
                    raise InputError(
                        f"the squares of the {what} of the layer {name}, added up, are NaN or "
                        "infinite; expected finite ones. Its weight is "
                        f"{str(dtype).removeprefix('torch.')}: check the model's weights and the "
                        f"data{advice}."
                    )

    def compare_halves(self, progress: Progress) -> None:
        """Judge the Grams of the first half by those of the second.

        The damping found is kept as it is, although all examples together lack less than a half of
        them: halved it is worse (docs/theory.md, 1).
        """
        layers = self.sums.values()
        for sums in progress.track(layers, "halves of the data compared", len(layers)):
            first, sums.first_half = sums.first_half, None
            if first is None or not 0 < first.rows < sums.rows:
                continue
            leader = self.sums.get(sums.leader or "")
            inputs = (
                leader.lacking.input if leader else _lacking(first.input_diagonal, sums.input_gram)
            )
            sums.lacking = Damping(inputs, _lacking(first.output_diagonal, sums.output_gram))

    def observe(self, model: nn.Module, task: Task, batch: Batch, half: int | None) -> None:
        """One pass: forward, then backward for the curvature, the mean gradients, or both.

        ``half`` says to which gradients the batch belongs, if to any.
        """
        self._inputs.clear()
        self._first_inputs.clear()
        self.passes += 1
        result = task.batch_loss(model, batch)
        self._inputs.clear()
        if not bool(torch.isfinite(result.losses).all()):
            raise InputError(
                "the loss of a calibration example is NaN or infinite; expected finite losses. "
                "Check the model's weights and the data."
            )
        self.terms[half] += float(result.terms.sum())
        if self.curvature is None:
            return
        sums_gradients = self.gradients and half is not None
        if self.curvature == "sampled":
            losses = sampled_losses(result, self.generator, self.directions)
            for left, sampled in zip(reversed(range(len(losses))), losses, strict=True):
                more = sums_gradients or left > 0
                self._backward(sampled, listening=True, half=None, more=more)
            if not sums_gradients:
                return
        loss = (result.losses * result.terms).sum()
        listening = self.curvature == "empirical"
        self._backward(loss, listening=listening, half=half if sums_gradients else None)

    def _backward(
        self, loss: Tensor, *, listening: bool, half: int | None, more: bool = False
    ) -> None:
        """Go back from a loss that is summed over the batch's terms.

        ``listening`` says whether the gradients at the layers' outputs belong to the curvature,
        ``half`` to which gradients those of the weights belong, if to any, and ``more`` whether
        another backward pass follows.
        """
        names = list(self.layers)

        def add(place: int, gradient: Tensor) -> None:
            # The weights of embeddings come after those of the layers, and take no step. A weight
            # may be read without its layer being called: then nothing else is known of it.
            if half is not None and place < len(names) and names[place] in self.sums:
                self.sums[names[place]].gradients[half].add_(gradient.flatten(1))

        ends = [*self._first_inputs, *self.embeddings.weights] if half is None else self.trainable
        self._listens(listening)
        try:
            each_gradient(loss, ends, add, retain_graph=more)
        finally:
            self._listens(False)

    def _require_gradient(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Let gradients flow through a layer whose input depends on no other."""
        inputs = call_input(args, kwargs)
        if not torch.is_grad_enabled() or inputs.requires_grad or not inputs.is_floating_point():
            return None
        inputs = inputs.detach().requires_grad_()
        self._first_inputs.append(inputs)
        return ((inputs, *args[1:]), kwargs) if args else (args, {**kwargs, "input": inputs})

    def _saw_call(
        self,
        name: str,
        layer: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> None:
        inputs = call_input(args, kwargs)
        key = _identity(inputs, self.layers[name])
        first = self._inputs.setdefault(key, (name, inputs))[0]
        sums = self.sums.get(name)
        if sums is None:
            sums = self.sums[name] = self._start(name, first, inputs.device)
        elif sums.leader is not None and sums.leader != first:
            self._part(sums)
        if sums.leader is None:
            _add_inputs(sums.input_gram, self.layers[name], inputs)
        sums.rows += output.numel() // matrix_shape(self.layers[name])[0]
        if output.requires_grad:
            # Rows of a sequence, or of an image's places in the last axes but one.
            several = isinstance(layer, nn.Linear) and output.dim() > 2
            of_rows = inputs.detach() if several else None
            output.register_hook(partial(self._saw_gradient, name, of_rows))

    def _start(self, name: str, first: str, device: torch.device) -> _Sums:
        """Empty sums; the input Gram is another's if both begin with the same input."""
        out, in_ = matrix_shape(self.layers[name])
        leader = None
        if first != name and self.sums[first].leader is None:
            leader = first if self.sums[first].started == self.passes else None
        dtype = kept_dtype(self.layers[name].weight)
        side = 0 if leader else in_
        back = 0 if self.curvature is None else out
        moved = out if self.gradients else 0
        zeros = partial(self.offload.zeros, dtype=dtype, device=device)
        return _Sums(
            started=self.passes,
            leader=leader,
            input_gram=zeros(side, side),
            output_gram=zeros(back, back),
            gradients=(zeros(moved, in_), zeros(moved, in_)),
        )

    def _part(self, sums: _Sums) -> None:
        """Stop sharing: go on from what the leader had seen before this pass."""
        leader = sums.leader
        assert leader is not None  # the caller has checked
        gram = self.offload.kept(self.sums[leader].input_gram.clone())
        for name, inputs in self._inputs.values():
            if name == leader:
                _add_inputs(gram, self.layers[leader], inputs, sign=-1)
        sums.input_gram, sums.leader = gram, None
        early = self.sums[leader].first_half
        if sums.first_half is not None and early is not None:
            sums.first_half = sums.first_half._replace(input_diagonal=early.input_diagonal)

    def _saw_gradient(self, name: str, inputs: Tensor | None, gradient: Tensor) -> None:
        """Add up the gradients at a layer's output; ``inputs`` where an example has several."""
        if not self.listening:
            return
        layer, sums = self.layers[name], self.sums[name]
        rows = output_rows(layer, gradient)
        if inputs is not None:
            squares = rows.square().sum(1)
            few = dominant_rows(squares.view(len(gradient), -1)).flatten()
            if bool(few.any()):
                sums.add_dominant(inputs.reshape(len(rows), -1)[few].to(rows.dtype), rows[few])
                rows = rows.where(~few[:, None], 0)
        add_gram(sums.output_gram, rows)

    def statistics(self) -> dict[str, LayerStatistics]:
        """Sums to means."""
        terms = sum(self.terms.values())
        self.embeddings.terms = terms
        for sums in self.sums.values():
            for gram, count in ((sums.input_gram, max(1, sums.rows)), (sums.output_gram, terms)):
                gram.copy_(mirrored(gram)).div_(count)
            if sums.dominant is not None:
                inputs, squares = sums.dominant.inputs, sums.dominant.output_squares
                sums.dominant = DominantRows(inputs / math.sqrt(terms), squares / terms)
            for half, gradient in enumerate(sums.gradients):
                gradient /= self.terms[half]
        backward = self.curvature is not None
        return {
            name: LayerStatistics(
                input_gram=self.sums[sums.leader or name].input_gram,
                output_gram=sums.output_gram if backward else None,
                gradients=sums.gradients if self.gradients else None,
                shares_input_with=sums.leader,
                dominant=sums.dominant,
                lacking=sums.lacking,
            )
            for name, sums in self.sums.items()
        }


def _lacking(early_diagonal: Tensor, running: Tensor) -> float:
    """The damping that a running Gram needed at its first half, by what came since."""
    if not len(running):
        return 0.0
    early = kept_below(running, early_diagonal)
    return held_out_damping(early, mirrored(running) - early)


def _add_inputs(gram: Tensor, layer: MatrixLayer, inputs: Tensor, sign: int = 1) -> None:
    for block in input_rows(layer, inputs):
        add_gram(gram, block, sign)


def _identity(inputs: Tensor, layer: MatrixLayer) -> tuple[object, ...]:
    """Equal for two layers of one forward pass exactly when they unfold the same values alike."""
    unfolding: tuple[object, ...] = ()
    if isinstance(layer, nn.Conv2d):
        unfolding = (
            layer.kernel_size,
            layer.stride,
            str(layer.padding),
            layer.dilation,
            layer.padding_mode,
        )
    place = (inputs.data_ptr(), inputs.shape, inputs.stride(), inputs.dtype)
    return (*place, inputs._version, *unfolding)
