"""Run calibration data through a model under hooks: the statistics of every layer.

For a loss that is the mean over N terms (tokens, images), and a layer ``y = W x``:

- ``input_gram`` A = mean over rows of ``x x^T``,
- ``output_gram`` B = 1/N sum over rows of ``g g^T``, g the gradient of the summed loss at y,
- ``gradients`` of the mean loss, one of each half of the examples (``halves``),

so that ``1/2 tr(B Delta A Delta^T)`` is the K-FAC model of the mean loss (a conv's positions are
counted once: in B), but for rows that dominate the gradient, which are counted apart
(``dominant_rows``). Only hooks live here; what they call is in ``rankfold.maths`` and
``layer_matrix``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rankfold.data.parts import Batch, Part
from rankfold.errors import InputError
from rankfold.machine.offload import Offload
from rankfold.machine.progress import Progress, SilentProgress
from rankfold.maths.dominant_rows import dominant_rows
from rankfold.maths.linalg import (
    UNDAMPED,
    Damping,
    add_gram,
    keep_below,
    mirrored,
    rows_of_same_gram,
)
from rankfold.maths.shrinkage import damping_of_half
from rankfold.model.backward import each_gradient
from rankfold.model.evaluation_mode import evaluation_mode
from rankfold.model.layer_matrix import (
    MatrixLayer,
    call_input,
    input_rows,
    kept_dtype,
    matrix_shape,
    output_rows,
)
from rankfold.statistics.embeddings import EmbeddingRecorder
from rankfold.statistics.labels import (
    TEXT,
    Curvature,
    noise_directions,
    sampled_losses,
)
from rankfold.statistics.layer_statistics import DominantRows, LayerStatistics
from rankfold.tasks.evaluation import on_device, running
from rankfold.tasks.losses import Task


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
    embeddings, offload = embeddings or EmbeddingRecorder({}), offload or Offload()
    directions = noise_directions(len(part.examples))
    recorder = _Recorder(layers, curvature, gradients, seed, directions, embeddings, offload)
    with recorder.attached(model):
        _observe_halves(recorder, model, task, part, shrinkage, batch_size, progress)
        if prior is not None:
            batches = prior.batches(batch_size)
            shown = progress.track(batches, "own text's statistics", len(batches))
            _observe(recorder, model, task, prior, shown, None)
            recorder.refuse_infinite()
    return recorder.statistics()


def _observe_halves(
    recorder: _Recorder,
    model: nn.Module,
    task: Task,
    part: Part,
    shrinkage: bool,
    batch_size: int | None,
    progress: Progress,
) -> None:
    """Pass the user's examples through the model, one half after the other."""
    first, second = (part.take(half) for half in halves(task.name, len(part.examples)))
    early, late = first.batches(batch_size), second.batches(batch_size)
    shown = iter(progress.track([*early, *late], "collect statistics", len(early) + len(late)))
    _observe(recorder, model, task, first, islice(shown, len(early)), 0)
    if shrinkage:
        recorder.keep_first_half()
    _observe(recorder, model, task, second, shown, 1)
    recorder.refuse_infinite()
    if shrinkage:
        recorder.compare_halves(progress)


def _observe(
    recorder: _Recorder,
    model: nn.Module,
    task: Task,
    part: Part,
    batches: Iterable[list[Any]],
    half: int | None,
) -> None:
    """Pass batches of a part through the model; ``half`` as in ``_Recorder.observe``."""
    for examples in batches:
        recorder.observe(model, task, on_device(part.collate(examples), model), half)


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

    def refuse_infinite(self, name: str, dtype: torch.dtype) -> None:
        """Refuse sums that are not finite, of a layer of this name and weight.

        Raises:
            InputError: As said.
        """
        for what, gram in {"inputs": self.input_gram, "output gradients": self.output_gram}.items():
            if not bool(torch.isfinite(gram).all()):
                wider = "float64" if dtype == torch.float32 else "float32"
                advice = "" if dtype == torch.float64 else f", or give the model in {wider}"
                raise InputError(
                    f"the squares of the {what} of the layer {name}, added up, are NaN or "
                    "infinite; expected finite ones. Its weight is "
                    f"{str(dtype).removeprefix('torch.')}: check the model's weights and the "
                    f"data{advice}."
                )

    def become_means(self, terms: Mapping[int | None, float]) -> None:
        """Divide each sum by what it is over; ``terms`` are numbers of the loss's, by half."""
        total = sum(terms.values())
        for gram, count in ((self.input_gram, max(1, self.rows)), (self.output_gram, total)):
            gram.copy_(mirrored(gram)).div_(count)
        if self.dominant is not None:
            inputs, squares = self.dominant.inputs, self.dominant.output_squares
            self.dominant = DominantRows(inputs / math.sqrt(total), squares / total)
        for half, gradient in enumerate(self.gradients):
            gradient /= terms[half]


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
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Hooks on, the model as passes need it, and all as before whatever happens."""
        with ExitStack() as stack:
            stack.enter_context(self.embeddings.attached())
            for name, layer in self.layers.items():
                hook = partial(self._saw_call, name)
                # Before hooks of the user's, which change what the layer itself gives.
                after = layer.register_forward_hook(hook, prepend=True, with_kwargs=True)
                stack.callback(after.remove)
                if self.curvature is not None:
                    before = layer.register_forward_pre_hook(
                        self._require_gradient, with_kwargs=True
                    )
                    stack.callback(before.remove)
            stack.enter_context(evaluation_mode(model, trainable=self.trainable))
            stack.enter_context(torch.set_grad_enabled(self.curvature is not None))
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
            sums.refuse_infinite(name, self.layers[name].weight.dtype)

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
                leader.lacking.input
                if leader
                else damping_of_half(first.input_diagonal, sums.input_gram)
            )
            outputs = damping_of_half(first.output_diagonal, sums.output_gram)
            sums.lacking = Damping(inputs, outputs)

    def observe(self, model: nn.Module, task: Task, batch: Batch, half: int | None) -> None:
        """One pass: forward, then backward for the curvature, the mean gradients, or both.

        ``half`` says to which gradients the batch belongs, if to any.
        """
        self._inputs.clear()
        self._first_inputs.clear()
        self.passes += 1
        with running(batch, what="a batch of the calibration part"):
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
        self.embeddings.terms = sum(self.terms.values())
        for sums in self.sums.values():
            sums.become_means(self.terms)
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
