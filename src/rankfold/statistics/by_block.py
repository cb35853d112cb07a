"""Statistics where memory is too small for the sums of all layers: block by block, or in groups.

Block by block (``cut``) two forward passes and one backward are made in all, and of sums and
activations those of one block are held. Where a model has no blocks that it can be cut at, groups
of layers are collected, each in passes of its own. Either way the sums of a layer are those that
one pass gives, to rounding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.errors import InputError, visible
from rankfold.machine import processes
from rankfold.machine.offload import Offload
from rankfold.machine.progress import Progress, SilentProgress
from rankfold.machine.tensor_file import TensorFile
from rankfold.model.blocks import block_of, find_blocks, graph_leaves, named_blocks
from rankfold.model.evaluation_mode import evaluation_mode
from rankfold.model.layer_matrix import MatrixLayer, kept_dtype, matrix_shape
from rankfold.statistics.cut import Call, Cut, Held, Pass, UnsuitableBlocksError
from rankfold.statistics.embeddings import EmbeddingRecorder
from rankfold.statistics.hooks import Recorder, calibration_losses
from rankfold.statistics.layer_statistics import LayerStatistics, Whole
from rankfold.statistics.passes import Passes, Run

OTHERWISE = "Name others (blocks=), or none."


def in_parts(
    passes: Passes, embeddings: EmbeddingRecorder, progress: Progress, cut_at: list[str]
) -> dict[str, LayerStatistics]:
    """Statistics of all layers, block by block where the model can be cut at blocks.

    ``cut_at`` gets their names.

    Raises:
        InputError: The blocks that were named are none that the model can be cut at.
    """
    named = bool(passes.offload.blocks)
    if processes.several():
        if named:
            raise InputError(
                "blocks are given, but several processes share this run: what a block leaves for "
                "the next one lies with one process. Leave blocks out, or start one process."
            )
        return in_groups(passes, embeddings, progress)
    if named:
        blocks = named_blocks(passes.model, passes.offload.blocks)
    else:
        blocks = find_blocks(passes.model)
    try:
        if not blocks:
            raise UnsuitableBlocksError("there are none")
        _check(passes, blocks, embeddings)
        found = by_block(passes, blocks, embeddings, progress)
        cut_at[:] = [*blocks]
        return found
    except UnsuitableBlocksError as error:
        if named:
            raise InputError(
                f"blocks: the model can't be cut at them: {error}. {OTHERWISE}"
            ) from error
    return in_groups(passes, embeddings, progress)


def in_groups(
    passes: Passes, embeddings: EmbeddingRecorder, progress: Progress
) -> dict[str, LayerStatistics]:
    """Statistics of all layers, of as many at once as memory has room for."""
    found: dict[str, LayerStatistics] = {}
    for place, group in enumerate(_groups(passes, passes.layers)):
        seen = embeddings if place == 0 else EmbeddingRecorder({})
        found |= _stored(passes.all_at_once(seen, progress, group, Offload()), passes.offload)
    return found


def by_block(
    passes: Passes,
    blocks: Mapping[str, nn.Module],
    embeddings: EmbeddingRecorder,
    progress: Progress,
) -> dict[str, LayerStatistics]:
    """Statistics of all layers, of one block after the other, the last one first.

    Raises:
        UnsuitableBlocksError: The model can't be cut at these blocks.
    """
    of_block: dict[str | None, dict[str, MatrixLayer]] = defaultdict(dict)
    for name, layer in passes.layers.items():
        of_block[block_of(name, [*blocks])][name] = layer
    outside = bool(of_block[None] or embeddings.embeddings)
    backward = passes.curvature is not None
    assert passes.offload.folder is not None  # where memory is short there is one
    with TensorFile(passes.offload.folder) as file:
        cut = Cut(passes.model, blocks, file, backward=backward, outside=outside)
        kept, order = _first_passes(passes, cut, of_block[None], embeddings, progress)
        called = [*dict.fromkeys(name for one in kept for name in one.passed.calls)]
        shown: list[str | None] = [*reversed(called), *([None] if outside else [])]
        found: dict[str, LayerStatistics] = {}
        for block in progress.track(shown, "statistics block by block", len(shown)):
            if block is None:
                found |= _of_outside(passes, cut, kept, of_block[None], embeddings)
            elif backward or of_block[block]:
                for layers, last in _groups_of_block(passes, of_block[block]):
                    found |= _of_block(passes, cut, kept, block, layers, last)
    return {name: found[name] for name in order if name in found}


@dataclass(frozen=True)
class _KeptPass:
    """One batch's pass.

    Attributes:
        passed: What it left of each block.
        terms: Of the loss.
        losses: ``listening`` and ``half`` of each loss that was gone back from (``Backward``).
    """

    passed: Pass
    terms: float
    losses: list[tuple[bool, int | None]]


def _first_passes(
    passes: Passes,
    cut: Cut,
    outside: Mapping[str, MatrixLayer],
    embeddings: EmbeddingRecorder,
    progress: Progress,
) -> tuple[list[_KeptPass], list[str]]:
    """All batches forward, and back to the outputs of the last block; layers as they are called."""
    kept: list[_KeptPass] = []
    blocks: list[str] = []
    losses, runs = passes.losses(), passes.runs()
    # All that gradients come to when the layers outside are watched.
    weights = [*(layer.weight for layer in outside.values()), *embeddings.weights]
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(passes.model, weights if cut.backward else ()))
        stack.enter_context(torch.set_grad_enabled(cut.backward))
        places = stack.enter_context(_watched(passes, cut, embeddings))
        for run in progress.track(runs, "collect statistics", len(runs)):
            with cut.keeping() as passed:
                result = calibration_losses(passes.model, passes.task, passes.batch(run))
            back = losses.of(result, run.half)
            for number, one in enumerate(back):
                passed.which.loss = number
                if one.loss.requires_grad and passed.starts:
                    torch.autograd.grad(
                        one.loss, passed.starts, retain_graph=True, allow_unused=True
                    )
            kinds = [(one.listening, one.half) for one in back]
            kept.append(_KeptPass(passed, float(result.terms.sum()), kinds))
            del result, back  # the graph of what comes after the last block
            blocks = blocks or [*passed.calls]
            if [*passed.calls] != blocks:
                raise UnsuitableBlocksError("other examples call others of them")
    _check_places(places, [*cut.blocks])
    return kept, [name for name in places if name in passes.layers]


def _groups_of_block(
    passes: Passes, layers: Mapping[str, MatrixLayer]
) -> Iterator[tuple[Mapping[str, MatrixLayer], bool]]:
    """As many layers of a block as memory has room for, and whether they are the last ones."""
    groups = _groups(passes, layers) or [{}]
    for place, group in enumerate(groups):
        yield group, place + 1 == len(groups)


def _of_block(
    passes: Passes,
    cut: Cut,
    kept: Sequence[_KeptPass],
    name: str,
    layers: Mapping[str, MatrixLayer],
    last: bool,
) -> dict[str, LayerStatistics]:
    """Statistics of layers of one block; ``last`` says whether gradients then go on."""
    recorder = passes.recorder(layers, offload=Offload())

    def observe(run: Run) -> None:
        one = kept[run.number]
        call = one.passed.calls[name]
        _observe_block(recorder, cut, name, call, one, run.half, last)
        if last:
            cut.go_on(one.passed, call, len(one.losses))

    with recorder.attached(passes.model):
        passes.show(recorder, observe, passes.runs(), SilentProgress())
    return _stored(recorder.statistics(), passes.offload)


def _observe_block(
    recorder: Recorder,
    cut: Cut,
    name: str,
    call: Call,
    one: _KeptPass,
    half: int | None,
    last: bool,
) -> None:
    """A pass of one block alone, back from the gradients at its outputs that are known."""
    inputs, leaves = cut.inputs(call)
    recorder.begin_pass()
    outputs = cut.run(name, call, inputs)
    recorder.end_forward(one.terms, half)
    slots = [held.slot for held in call.outputs if isinstance(held, Held) and held.slot is not None]

    def add(loss: int, place: int, gradient: Tensor) -> None:
        if last:
            leaves[place][1].add(loss, gradient)

    for number, (listening, of) in enumerate(one.losses):
        reached = [
            (output, gradient)
            for output, slot in zip(outputs, slots, strict=True)
            if output.requires_grad and (gradient := slot.gradient(number)) is not None
        ]
        if reached:
            recorder.go_back(
                [output for output, _ in reached],
                [gradient for _, gradient in reached],
                listening=listening,
                half=of,
                more=number + 1 < len(one.losses),
                inputs=[leaf for leaf, _ in leaves],
                use=partial(add, number),
            )


def _of_outside(
    passes: Passes,
    cut: Cut,
    kept: Sequence[_KeptPass],
    layers: Mapping[str, MatrixLayer],
    embeddings: EmbeddingRecorder,
) -> dict[str, LayerStatistics]:
    """Statistics of what is in no block, the blocks' outputs and gradients being known."""
    recorder = passes.recorder(layers, embeddings, Offload())

    def observe(run: Run) -> None:
        cut.current = kept[run.number].passed
        batch, which = passes.batch(run), cut.current.which
        recorder.observe(passes.model, passes.task, batch, run.half, which)

    with recorder.attached(passes.model), cut.bridged():
        passes.show(recorder, observe, passes.runs(), SilentProgress())
    return _stored(recorder.statistics(), passes.offload)


def _stored(found: Mapping[str, LayerStatistics], offload: Offload) -> dict[str, LayerStatistics]:
    """The statistics with their tensors where those of all layers lie; shared ones stay shared."""
    kept: dict[int, Tensor] = {}

    def keep(values: Tensor | None) -> Any:
        if values is None:
            return None
        if id(values) not in kept:
            kept[id(values)] = offload.kept(values)
        return kept[id(values)]

    return {
        name: replace(
            one,
            input_gram=keep(one.input_gram),
            output_gram=keep(one.output_gram),
            product=keep(one.product),
            gradients=None if one.gradients is None else tuple(map(keep, one.gradients)),
        )
        for name, one in found.items()
    }


def _groups(passes: Passes, layers: Mapping[str, MatrixLayer]) -> list[dict[str, MatrixLayer]]:
    """Neighbouring layers whose sums have room in memory together; one at least."""
    room = passes.offload.left_beside(passes.model) // 2  # the rest is for what passes need
    groups: list[dict[str, MatrixLayer]] = []
    left = 0
    for name, layer in layers.items():
        size = sums_size(layer, passes.whole[name], passes.curvature is not None, passes.gradients)
        if not groups or size > left:
            groups.append({})
            left = room
        groups[-1][name] = layer
        left -= size
    return groups


def sums_size(layer: MatrixLayer, whole: Whole, backward: bool, gradients: bool) -> int:
    """Bytes of a layer's sums (``Sums.empty``)."""
    out, in_ = matrix_shape(layer)
    values = in_ if whole == "output" else in_ * in_
    if backward:
        values += out if whole == "input" else out * out
        values += in_ * in_ if whole == "input" else 0
    values += out * out if whole == "output" else 0
    values += 2 * out * in_ if backward and gradients else 0
    return values * kept_dtype(layer.weight).itemsize


def _check(passes: Passes, blocks: Mapping[str, nn.Module], embeddings: EmbeddingRecorder) -> None:
    """Try on two examples whether each block runs again, alone, as it ran in the model.

    Raises:
        UnsuitableBlocksError: One doesn't; says why.
    """
    assert passes.offload.folder is not None  # where memory is short there is one
    backward = passes.curvature is not None
    weights = [*(layer.weight for layer in passes.layers.values()), *embeddings.weights]
    alone = [passes.part.take([place]) for place in (0, len(passes.part.examples) - 1)]
    batches = [passes.batch(Run(0, part, part.examples, None)) for part in alone]
    with ExitStack() as stack:
        file = stack.enter_context(TensorFile(passes.offload.folder))
        cut = Cut(passes.model, blocks, file, backward=backward, outside=True)
        stack.enter_context(evaluation_mode(passes.model, weights if backward else ()))
        stack.enter_context(torch.set_grad_enabled(backward))
        with _watched(passes, cut, embeddings) as places:
            try:
                with cut.keeping() as first:
                    result = calibration_losses(passes.model, passes.task, batches[0])
                with cut.keeping() as second:  # what it leaves must not matter to the first one
                    calibration_losses(passes.model, passes.task, batches[1])
            except InputError as error:  # whole, the model has run before
                raise UnsuitableBlocksError(str(error).rstrip(".")) from error
        _check_places(places, [*blocks])
        if not first.calls or [*first.calls] != [*second.calls]:
            none = "none of them is called"
            raise UnsuitableBlocksError("other examples call others" if first.calls else none)
        own = {id(layer.weight): block_of(n, [*blocks]) for n, layer in passes.layers.items()}
        _check_reached(None, graph_leaves([result.losses]), set(map(id, first.starts)), own)
        for name, call in first.calls.items():
            _check_again(cut, name, call, own)


def _check_again(cut: Cut, name: str, call: Call, own: Mapping[int, str | None]) -> None:
    """Refuse a block that gives other outputs when it runs again, or reads more than its inputs."""
    inputs, leaves = cut.inputs(call)
    try:
        outputs = cut.run(name, call, inputs)
    except Exception as error:
        raise UnsuitableBlocksError(
            f"{name} can't run again: {type(error).__name__}: {error}"
        ) from error
    before = [held for held in call.outputs if isinstance(held, Held) and held.slot is not None]
    for output, held in zip(outputs, before, strict=True):
        assert held.kept is not None  # the cut keeps outputs, too
        kept = cut.file.get(held.kept)
        rounding = torch.finfo(kept.dtype).eps ** 0.5
        if kept.shape != output.shape or not torch.allclose(
            output, kept, rtol=rounding, atol=rounding, equal_nan=True
        ):
            raise UnsuitableBlocksError(f"{name} gives something else when it runs again")
    _check_reached(name, graph_leaves(outputs), {id(leaf) for leaf, _ in leaves}, own)


def _check_reached(
    name: str | None,
    reached: Mapping[int, Tensor],
    inputs: set[int],
    own: Mapping[int, str | None],
) -> None:
    """Refuse a block that gradients leave for something else than its inputs and its layers."""
    for key in reached:
        if key in inputs or (key in own and own[key] == name):
            continue
        if name is None and key not in own:
            continue  # an embedding matrix
        where = "what is in none of them" if name is None else name
        raise UnsuitableBlocksError(f"{where} reads what it isn't called with")


@contextmanager
def _watched(
    passes: Passes, cut: Cut, embeddings: EmbeddingRecorder
) -> Iterator[dict[str, set[str | None]]]:
    """By layer, and by use of an embedding matrix, the blocks in which it is called; in order."""
    places: dict[str, set[str | None]] = {}
    uses = {n: m for matrix in embeddings.embeddings.values() for n, m in matrix.uses.items()}

    def saw(name: str, *_: object) -> None:
        places.setdefault(name, set()).add(cut.within)

    with ExitStack() as stack:
        for name, module in [*passes.layers.items(), *uses.items()]:
            stack.callback(module.register_forward_hook(partial(saw, name)).remove)
        yield places


def _check_places(places: Mapping[str, set[str | None]], blocks: Sequence[str]) -> None:
    """Refuse layers that are called in another block than they stand in."""
    for name, seen in places.items():
        stands = block_of(name, blocks)
        other = next((one for one in seen if one != stands), stands)
        if other != stands:
            where = "outside of it" if other is None else f"in {other}"
            raise UnsuitableBlocksError(
                f"{visible(name)} stands in {stands} and is called {where}"
                if stands
                else f"{visible(name)} stands in none of them and is called {where}"
            )
