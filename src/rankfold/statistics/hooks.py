"""Hooks on layers, and the sums that they feed while calibration data pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rankfold.data.parts import Batch
from rankfold.errors import InputError
from rankfold.machine import processes
from rankfold.machine.offload import Offload
from rankfold.maths.dominant_rows import dominant_rows
from rankfold.model.backward import Which, each_gradient
from rankfold.model.evaluation_mode import evaluation_mode
from rankfold.model.layer_matrix import MatrixLayer, add_input_gram, call_input, output_rows
from rankfold.statistics.embeddings import EmbeddingRecorder
from rankfold.statistics.labels import Curvature, Draws, draws_of, sampled_losses, skip_draws
from rankfold.statistics.layer_statistics import LayerStatistics, Whole
from rankfold.statistics.sums import Sums
from rankfold.tasks.evaluation import running
from rankfold.tasks.losses import BatchLoss, Task


class Backward(NamedTuple):
    """A loss to go back from.

    Attributes:
        loss: Summed over the batch's terms.
        listening: Whether gradients at the layers' outputs belong to the curvature.
        half: To which gradients those of the weights belong, None for none.
    """

    loss: Tensor
    listening: bool
    half: int | None


class Losses:
    """Which losses each pass is gone back from.

    Args:
        curvature: Where B comes from; None goes back from none.
        gradients: Whether the mean gradients are wanted beside B.
        seed: Of the sampled labels; those of a pass depend on the passes before it.
        directions: Of the noise, for each example (``labels.sampled_losses``).
    """

    def __init__(self, curvature: Curvature | None, gradients: bool, seed: int, directions: int):
        self.curvature = curvature
        self.gradients = gradients and curvature is not None
        self._directions = directions
        self._generator = torch.Generator().manual_seed(seed)

    def of(self, result: BatchLoss, half: int | None) -> list[Backward]:
        """Those of one pass: for the curvature, the mean gradients, or both."""
        if self.curvature is None:
            return []
        found: list[Backward] = []
        of = half if self.gradients else None
        if self.curvature == "sampled":
            drawn = draws_of(result, self._directions)
            with self._turn(drawn):
                losses = sampled_losses(result, self._generator, self._directions)
            found = [Backward(loss, True, None) for loss in losses]
            if of is None:
                return found
        loss = (result.losses * result.terms).sum()
        return [*found, Backward(loss, self.curvature == "empirical", of)]

    @contextmanager
    def _turn(self, drawn: Draws | None) -> Iterator[None]:
        """Within, labels are drawn as one process would draw them for this batch."""
        every = processes.gathered(drawn, "labels drawn")
        for other in every[: processes.rank()]:
            skip_draws(other, self._generator)
        yield
        for other in every[processes.rank() + 1 :]:
            skip_draws(other, self._generator)

    def skip_turn(self) -> None:
        """Other processes have a batch that this one has none beside."""
        if self.curvature == "sampled":
            with self._turn(None):
                pass


def calibration_losses(model: nn.Module, task: Task, batch: Batch) -> BatchLoss:
    """What a batch of the calibration part gives.

    Raises:
        InputError: The model can't run on it, or a loss is not finite.
    """
    whose = getattr(task, "what", None)
    with running(batch, what="a batch of the calibration part", whose=whose):
        result = task.batch_loss(model, batch)
    if not bool(torch.isfinite(result.losses).all()):
        raise InputError(
            "the loss of a calibration example is NaN or infinite; expected finite losses. "
            "Check the model's weights and the data."
        )
    return result


class Recorder:
    """Owns the hooks, and the sums that they feed."""

    def __init__(
        self,
        layers: Mapping[str, MatrixLayer],
        losses: Losses,
        embeddings: EmbeddingRecorder,
        offload: Offload,
        whole: Mapping[str, Whole],
    ):
        self.layers = layers
        self.whole = whole
        self.offload = offload
        self.embeddings = embeddings
        self.curvature = losses.curvature
        self.gradients = losses.gradients
        self.losses = losses
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

    def observe(
        self,
        model: nn.Module,
        task: Task,
        batch: Batch,
        half: int | None,
        which: Which | None = None,
    ) -> None:
        """One pass: forward, then backward for the curvature, the mean gradients, or both.

        ``half`` says to which gradients the batch belongs, if to any; ``which`` is told the loss.
        """
        which = which or Which()
        self.begin_pass()
        result = calibration_losses(model, task, batch)
        self.end_forward(float(result.terms.sum()), half)
        losses = self.losses.of(result, half)
        for number, (loss, listening, of) in enumerate(losses):
            which.loss, more = number, number + 1 < len(losses)
            self.go_back([loss], None, listening=listening, half=of, more=more)

    def end_forward(self, terms: float, half: int | None) -> None:
        """The layers were called; the pass had so many terms of the loss."""
        self._inputs.clear()
        self.terms[half] += terms

    def begin_pass(self) -> None:
        """Forget what only matters within a pass."""
        self._inputs.clear()
        self._first_inputs.clear()
        self.passes += 1

    def go_back(
        self,
        roots: Sequence[Tensor],
        gradients: Sequence[Tensor] | None,
        *,
        listening: bool,
        half: int | None,
        more: bool = False,
        inputs: Sequence[Tensor] = (),
        use: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        """Go back from a loss that is summed over the batch's terms, or from known gradients.

        ``listening`` says whether the gradients at the layers' outputs belong to the curvature,
        ``half`` to which gradients those of the weights belong, if to any, and ``more`` whether
        another backward pass follows. ``use`` takes the gradients at ``inputs``.
        """
        names = list(self.layers)
        ends = [*self._first_inputs, *self.embeddings.weights] if half is None else self.trainable

        def add(place: int, gradient: Tensor) -> None:
            if use is not None and place >= len(ends):
                use(place - len(ends), gradient)
            # The weights of embeddings come after those of the layers, and take no step. A weight
            # may be read without its layer being called: then nothing else is known of it.
            elif half is not None and place < len(names) and names[place] in self.sums:
                self.sums[names[place]].gradients[half].add_(gradient.flatten(1))

        self._listens(listening)
        try:
            each_gradient(roots, [*ends, *inputs], add, gradients=gradients, retain_graph=more)
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
        return self.empty(name, leader, device)

    def empty(self, name: str, leader: str | None, device: torch.device) -> Sums:
        """Sums of a layer before it has seen anything."""
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
                rows=sums.rows,
                terms=(self.terms[0], self.terms[1], self.terms[None]),
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
