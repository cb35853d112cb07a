"""Passes of a model that are cut at its blocks: what goes in and out is kept in a file.

In a first pass each block runs without gradients, and what it gives is a new leaf of the graph: no
activation inside a block is held. Then, from the last block to the first, each one runs again alone
on what it was called with. The gradient at its outputs has come from all that is after it, and
those at its inputs go on to where the inputs are from: to an earlier block's outputs, through what
was computed between blocks, if anything was. A tensor that several blocks get (an encoder's output,
a mask) is one tensor here as well; its gradient is the sum of theirs.

``bridged`` runs what is outside of the blocks once more, the blocks' outputs and the gradients at
their inputs being known.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from rankfold.machine import offload
from rankfold.machine.tensor_file import Kept, TensorFile
from rankfold.model.backward import Which
from rankfold.model.blocks import forward_of


class UnsuitableBlocksError(Exception):
    """The model can't be cut at these blocks; says why."""


class Slot:
    """The gradients of one tensor, one for each loss, in a file."""

    def __init__(self, file: TensorFile) -> None:
        self._file = file
        self._kept: dict[int, Kept] = {}

    def add(self, loss: int, gradient: Tensor) -> None:
        """Add what another use of the tensor gives."""
        known = self._kept.pop(loss, None)
        if known is not None:
            gradient = self._file.get(known) + gradient
            self._file.free(known)
        self._kept[loss] = self._file.put(gradient)

    def gradient(self, loss: int) -> Tensor | None:
        """What was added; None where nothing was."""
        return self._file.get(self._kept[loss]) if loss in self._kept else None

    def drop(self) -> None:
        """It is not needed any more."""
        for kept in self._kept.values():
            self._file.free(kept)
        self._kept.clear()


@dataclass(frozen=True)
class Held:
    """A tensor that a block got or gave.

    Attributes:
        kept: Its values.
        slot: Of its gradient; None where it has none.
    """

    kept: Kept | None
    slot: Slot | None


@dataclass(frozen=True)
class Passed:
    """A place in what a block gave: the input with this number, as it came."""

    number: int


@dataclass
class Call:
    """One call of a block.

    Attributes:
        inputs: Of all arguments, in the order of ``tree_flatten``: ``Held`` for tensors.
        called: What puts them together.
        outputs: Likewise; ``Passed`` where an input is given on.
        gave: What puts them together.
        own: Inputs that this call is the first to get: their gradient is complete after it.
        ends: Scalars whose gradient flows to what was computed between blocks.
    """

    inputs: list[Any]
    called: TreeSpec
    outputs: list[Any] = field(default_factory=list)
    gave: TreeSpec | None = None
    own: set[int] = field(default_factory=set)
    ends: list[Tensor] = field(default_factory=list)


@dataclass
class Pass:
    """What the pass of one batch left of each block.

    Attributes:
        calls: In their order.
        starts: A scalar for each output of a block: gradients that flow to it are in its slot.
        which: Of the losses.
    """

    calls: dict[str, Call] = field(default_factory=dict)
    starts: list[Tensor] = field(default_factory=list)
    which: Which = field(default_factory=Which)


class Cut:
    """A model that is cut at its blocks.

    Args:
        model: The model.
        blocks: By name; each is called once in a pass, none within another.
        file: Where all is kept.
        backward: Whether gradients are wanted.
        outside: Whether those of what is outside of the blocks are wanted, too.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Mapping[str, nn.Module],
        file: TensorFile,
        *,
        backward: bool,
        outside: bool,
    ) -> None:
        self.blocks = blocks
        self.file = file
        self.backward = backward
        self.outside = outside
        self.within: str | None = None  # the block that runs
        self.current = Pass()
        self._last: str | None = None
        self._trouble: str | None = None  # raised once the model is through
        self._known: dict[int, tuple[weakref.ref[Tensor], int, Held]] = {}
        self._of_model = {
            tensor.untyped_storage().data_ptr()
            for tensor in [*model.parameters(), *model.buffers()]
        }

    @contextmanager
    def keeping(self) -> Iterator[Pass]:
        """While a pass runs: what it leaves of each block.

        Raises:
            UnsuitableBlocksError: The model can't be cut there.
        """
        self.current, self._known = Pass(), {}
        with self._in_place_of_forward(self._keep), ExitStack() as stack:
            if self.backward:
                hooks = torch.autograd.graph.saved_tensors_hooks(self._saved, self._read)
                stack.enter_context(hooks)
            yield self.current
        if self._trouble is not None:
            raise UnsuitableBlocksError(self._trouble)
        self._known = {}
        self._last = next(reversed(self.current.calls), None)

    @contextmanager
    def bridged(self) -> Iterator[None]:
        """While passes run whose blocks give what they gave before in the ``current`` one."""
        with self._in_place_of_forward(self._bridge):
            yield

    @contextmanager
    def _in_place_of_forward(self, run: Callable[..., Any]) -> Iterator[None]:
        with ExitStack() as stack:
            for name, block in self.blocks.items():
                stack.enter_context(forward_of(block, partial(run, name, block.forward)))
            yield

    def inputs(self, call: Call) -> tuple[list[Any], list[tuple[Tensor, Slot]]]:
        """The arguments of a call, flat, and which of them gradients are wanted of: leaves."""
        read: dict[int, Tensor] = {}
        leaves: list[tuple[Tensor, Slot]] = []
        for held in call.inputs:
            if not isinstance(held, Held) or id(held) in read:
                continue
            assert held.kept is not None  # of inputs it always is
            value = self.file.get(held.kept)
            if held.slot is not None:
                leaves.append((value.requires_grad_(), held.slot))
                value = value.clone()  # a block may change it in place, and no leaf
            read[id(held)] = value
        return [read.get(id(h), h) if isinstance(h, Held) else h for h in call.inputs], leaves

    def run(self, name: str, call: Call, inputs: Sequence[Any]) -> list[Tensor]:
        """A block again: those of its outputs that have a gradient."""
        args, kwargs = tree_unflatten(list(inputs), call.called)
        outputs, gave = tree_flatten(self.blocks[name].forward(*args, **kwargs))
        if gave != call.gave:
            raise UnsuitableBlocksError(f"{name} gives something else when it runs again")
        return [
            output
            for output, held in zip(outputs, call.outputs, strict=True)
            if isinstance(held, Held) and held.slot is not None
        ]

    def go_on(self, passed: Pass, call: Call, losses: int) -> None:
        """From a call's inputs on to where they are from; then the call's outputs are done with."""
        for loss in range(losses if call.ends else 0):
            passed.which.loss = loss
            torch.autograd.grad(call.ends, passed.starts, retain_graph=True, allow_unused=True)
        call.ends.clear()
        done = [held.slot for held in call.outputs if isinstance(held, Held)]
        if not self.outside:
            done += [h.slot for h in call.inputs if isinstance(h, Held) and id(h.slot) in call.own]
        for slot in done:
            if slot is not None:
                slot.drop()

    def _keep(self, name: str, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """A block's forward that keeps what went in and came out, and cuts the graph."""
        if self.within is not None or name in self.current.calls:
            again = f"{name} is called more than once in a pass"
            self._found(again if self.within is None else f"{name} is called within {self.within}")
            return forward(*args, **kwargs)
        inputs, called = tree_flatten((args, kwargs))
        call = self.current.calls[name] = Call([], called)
        tensors = {id(value): value for value in inputs if isinstance(value, Tensor)}
        versions = {key: value._version for key, value in tensors.items()}
        for value in inputs:
            call.inputs.append(self._held(call, value) if id(value) in tensors else value)
        self.within = name
        try:
            with torch.no_grad():
                result = forward(*args, **kwargs)
        finally:
            self.within = None
        if any(value._version != versions[key] for key, value in tensors.items()):
            self._found(f"{name} changes what it is called with")
        outputs, call.gave = tree_flatten(result)
        places = {id(value): place for place, value in enumerate(inputs)}
        given = [self._output(call, value, places) for value in outputs]
        return tree_unflatten(given, call.gave)

    def _found(self, trouble: str) -> None:
        self._trouble = self._trouble or trouble

    def _held(self, call: Call, value: Tensor) -> Held:
        """What is kept of an input; a tensor that is known stays one."""
        known = self._known.get(id(value))
        if known is not None and known[0]() is value and known[1] == value._version:
            held = known[2]
            if held.kept is None:
                held = Held(self.file.put(value), held.slot)
                self._know(value, held)
            return held
        slot = Slot(self.file) if self.backward and value.requires_grad else None
        held = Held(self.file.put(value), slot)
        if slot is not None:
            call.own.add(id(slot))
            if self.current.starts:
                which = self.current.which
                call.ends.append(_applied(_End, value, slot, which))
        self._know(value, held)
        return held

    def _know(self, value: Tensor, held: Held) -> None:
        self._known[id(value)] = weakref.ref(value), value._version, held

    def _output(self, call: Call, value: Any, places: Mapping[int, int]) -> Any:
        """What is given in place of an output, with what is kept of it."""
        if id(value) in places and isinstance(value, Tensor):
            call.outputs.append(Passed(places[id(value)]))
            return value
        if not isinstance(value, Tensor):
            call.outputs.append(value)
            return value
        slot = None
        if self.backward and (value.is_floating_point() or value.is_complex()):
            slot, start = Slot(self.file), torch.zeros((), requires_grad=True)
            self.current.starts.append(start)
            value = _applied(_Start, start, value, slot, self.current.which)
        held = Held(self.file.put(value) if self.outside else None, slot)
        call.outputs.append(held)
        self._know(value, held)
        return value

    def _bridge(self, name: str, _given: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """A block's forward that gives what it gave, and goes back to what went back."""
        call = self.current.calls[name]
        inputs, _ = tree_flatten((args, kwargs))
        slots = [
            held.slot if isinstance(held, Held) and id(held.slot) in call.own else None
            for held in call.inputs
        ]
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        own = [slot for value, slot in zip(inputs, slots, strict=True) if isinstance(value, Tensor)]
        values = [self.file.get(h.kept) for h in call.outputs if isinstance(h, Held) and h.kept]
        found: Sequence[Tensor] = values
        if torch.is_grad_enabled() and values:
            found = _applied(_Bridge, self.current.which, own, values, *tensors)
        left = iter(found)
        outputs = [
            inputs[one.number]
            if isinstance(one, Passed)
            else next(left)
            if isinstance(one, Held)
            else one
            for one in call.outputs
        ]
        assert call.gave is not None  # the call is over
        return tree_unflatten(outputs, call.gave)

    def _saved(self, tensor: Tensor) -> Tensor | Kept:
        """What is kept of what is computed between blocks: it is there until all went back."""
        after = self._last is not None and self._last in self.current.calls
        small = tensor.numel() * tensor.element_size() <= offload.SMALL
        if after or small or tensor.untyped_storage().data_ptr() in self._of_model:
            return tensor
        return self.file.put(tensor)

    def _read(self, saved: Tensor | Kept) -> Tensor:
        return saved if isinstance(saved, Tensor) else self.file.get(saved)


def _applied(function: Any, *args: Any) -> Any:
    """What a function with a backward pass of its own gives."""
    return function.apply(*args)


class _Start(torch.autograd.Function):
    """What a block gave, as a start of the graph: its gradient goes into a slot."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, value: Tensor, slot: Slot, which: Which) -> Tensor:
        ctx.slot, ctx.which = slot, which
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        ctx.slot.add(ctx.which.loss, gradient)
        return None, None, None, None


class _End(torch.autograd.Function):
    """A scalar behind what a block got: going back from it begins with what is in the slot."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, slot: Slot, which: Which) -> Tensor:
        ctx.slot, ctx.which, ctx.like = slot, which, (value.shape, value.dtype, value.device)
        return value.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None, None]:
        gradient = ctx.slot.gradient(ctx.which.loss)
        return _zeros(*ctx.like) if gradient is None else gradient, None, None


class _Bridge(torch.autograd.Function):
    """From what a block gets to what it gave, without the block."""

    @staticmethod
    def forward(
        ctx: Any, which: Which, slots: list[Slot | None], values: list[Tensor], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.which, ctx.slots = which, slots
        ctx.likes = [(value.shape, value.dtype, value.device) for value in inputs]
        ctx.mark_non_differentiable(*(v for v in values if not v.is_floating_point()))
        ctx.set_materialize_grads(False)
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None, None, None]
        for wanted, slot, like in zip(ctx.needs_input_grad[3:], ctx.slots, ctx.likes, strict=True):
            gradient = None
            if wanted:
                gradient = None if slot is None else slot.gradient(ctx.which.loss)
                gradient = _zeros(*like) if gradient is None else gradient
            found.append(gradient)
        return tuple(found)


def _zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros((), dtype=dtype, device=device).expand(shape)
