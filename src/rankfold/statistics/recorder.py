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

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.data.parts import Batch, Part
from rankfold.errors import InputError
from rankfold.machine.at_once import at_once, is_small
from rankfold.machine.offload import Offload
from rankfold.machine.progress import Progress, SilentProgress
from rankfold.maths.dominant_rows import dominant_rows
from rankfold.model.backward import each_gradient
from rankfold.model.evaluation_mode import evaluation_mode
from rankfold.model.find_layers import LARGEST_SIDE
from rankfold.model.layer_matrix import (
    MatrixLayer,
    add_input_gram,
    call_input,
    matrix_shape,
    output_rows,
)
from rankfold.statistics.embeddings import EmbeddingRecorder
from rankfold.statistics.labels import (
    Curvature,
    noise_directions,
    sampled_losses,
)
from rankfold.statistics.layer_statistics import LayerStatistics, Whole
from rankfold.statistics.sums import Sums
from rankfold.tasks.evaluation import on_device, running
from rankfold.tasks.losses import TEXT, Task

# No Gram has more numbers than the model has parameters, so many times.
LARGEST_GRAM = 8


def collect_statistics(
    model: nn.Module,
    task: Task,
    part: Part,
    layers: Mapping[str, MatrixLayer],
    *,
    curvature: Curvature | None,
    gradients: bool = True,
    shrinkage: bool = True,
    smaller_side: bool = False,
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
        smaller_side: Keep whole Grams of the smaller side of each layer alone.
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
    largest = LARGEST_GRAM * sum(weight.numel() for weight in model.parameters())
    whole = {name: whole_grams(layer, smaller_side, largest) for name, layer in layers.items()}
    recorder = _Recorder(layers, curvature, gradients, seed, directions, embeddings, offload, whole)
    with recorder.attached(model):
        _observe_halves(recorder, model, task, part, shrinkage, batch_size, progress)
        if prior is not None:
            batches = prior.batches(batch_size)
            shown = progress.track(batches, "own text's statistics", len(batches))
            _observe(recorder, model, task, prior, shown, None)
            recorder.refuse_infinite()
    return recorder.statistics()


def whole_grams(layer: MatrixLayer, smaller_side: bool, largest: int) -> Whole:
    """Which Grams of a layer are kept whole.

    Args:
        layer: The layer.
        smaller_side: Whether that of the smaller side is enough.
        largest: Numbers that a Gram may have at most.
    """
    out, in_ = matrix_shape(layer)
    too_long = max(out, in_) > LARGEST_SIDE or max(out, in_) ** 2 > largest
    if out == in_ or not (smaller_side or too_long):
        return "both"
    return "output" if out < in_ else "input"


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
        _compare_halves(recorder.sums, progress)


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


def _compare_halves(of_layers: Mapping[str, Sums], progress: Progress) -> None:
    """Judge the Grams of the first half by those of the second.

    The damping found is kept as it is, although all examples together lack less than a half of
    them: halved it is worse (docs/theory.md, 1).
    """

    def compare(sums: Sums) -> None:
        sums.compare_halves(of_layers.get(sums.leader or ""))

    # Those that others take an input Gram from come first.
    layers = sorted(of_layers.values(), key=lambda sums: sums.leader is not None)
    alone = sum(sums.leader is None for sums in layers)
    done = chain.from_iterable(
        at_once(some, compare, lambda sums: is_small(sums.layer.weight))
        for some in (layers[:alone], layers[alone:])
    )
    for _ in progress.track(done, "halves of the data compared", len(layers)):
        pass


def halves(task: str, count: int) -> tuple[range, range]:
    """Places of two halves of the examples, the second one no smaller.

    Neighbouring windows of text are of one document, so its halves are the first and the second.
    Images are often listed class by class: there, and in all other data, every other one.
    """
    if task in TEXT:
        return range(count // 2), range(count // 2, count)
    return range(1, count, 2), range(0, count, 2)


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
        whole: Mapping[str, Whole],
    ):
        self.layers = layers
        self.whole = whole
        self.offload = offload
        self.embeddings = embeddings
        self.curvature = curvature
        self.gradients = gradients and curvature is not None
        self.generator = torch.Generator().manual_seed(seed)
        self.directions = directions
        self.sums: dict[str, Sums] = {}
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
            sums.keep_first_half()

    def refuse_infinite(self) -> None:
        """Refuse statistics that are not finite: losses may be so where gradients are not.

        Raises:
            InputError: Names the layer.
        """
        for name, sums in self.sums.items():
            sums.refuse_infinite(name)

    def observe(self, model: nn.Module, task: Task, batch: Batch, half: int | None) -> None:
        """One pass: forward, then backward for the curvature, the mean gradients, or both.

        ``half`` says to which gradients the batch belongs, if to any.
        """
        self._inputs.clear()
        self._first_inputs.clear()
        self.passes += 1
        whose = getattr(task, "what", None)
        with running(batch, what="a batch of the calibration part", whose=whose):
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
        # Layers that know the Gram of their inputs may share it.
        first = name
        if self.whole[name] != "output":
            key = _identity(inputs, self.layers[name])
            first = self._inputs.setdefault(key, (name, inputs))[0]
        sums = self.sums.get(name)
        if sums is None:
            sums = self.sums[name] = self._start(name, first, inputs.device)
        elif sums.leader is not None and sums.leader != first:
            self._part(sums)
        if sums.leader is None:
            sums.add_inputs(inputs)
        sums.add_outputs(output)
        if output.requires_grad:
            # Rows of a sequence, or of an image's places in the last axes but one.
            several = isinstance(layer, nn.Linear) and output.dim() > 2
            of_rows = inputs.detach() if several else None
            output.register_hook(partial(self._saw_gradient, name, of_rows))

    def _start(self, name: str, first: str, device: torch.device) -> Sums:
        """Empty sums; the input Gram is another's if both begin with the same input."""
        leader = None
        if first != name and self.sums[first].leader is None:
            leader = first if self.sums[first].started == self.passes else None
        return Sums.empty(
            self.layers[name],
            self.whole[name],
            self.passes,
            leader,
            backward=self.curvature is not None,
            gradients=self.gradients,
            offload=self.offload,
            device=device,
        )

    def _part(self, sums: Sums) -> None:
        """Stop sharing: go on from what the leader had seen before this pass."""
        leader = sums.leader
        assert leader is not None  # the caller has checked
        gram = self.offload.kept(self.sums[leader].input_gram.clone())
        for name, inputs in self._inputs.values():
            if name == leader:
                add_input_gram(gram, self.layers[leader], inputs, sign=-1)
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
        sums.add_gradients(rows)

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
                product=sums.product if sums.whole != "both" else None,
                dominant=sums.dominant,
                lacking=sums.lacking,
            )
            for name, sums in self.sums.items()
        }


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
