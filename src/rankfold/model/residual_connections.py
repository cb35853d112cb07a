"""Which layers' outputs are added to something that the model already has: residual connections.

A layer at the end of a residual branch adds to a stream, and what matters is the sum. If the stream
itself is wrong there, since earlier layers were factorized, the layer may make up for it. So it is
found which tensor a layer's output ``y`` is added to: in one pass, at each addition ``scale * y +
shift + stream``, whatever stands between (a batch norm, a layer scale, dropout).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

ADDITIONS: frozenset[object] = frozenset(
    (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)
)
# Rows at which two tensors are compared, and how many it takes at least.
ROWS, FEWEST_ROWS = 64, 4


@dataclass(frozen=True)
class Place:
    """Where a tensor is seen in each pass.

    Attributes:
        module: Name of a module that a pass calls once.
        argument: Position or keyword of its argument, None for its output.
    """

    module: str
    argument: int | str | None


@dataclass(frozen=True)
class Residual:
    """What a layer's output is added to.

    Attributes:
        streams: Where the other summands are seen, before the layer's output is known.
        axis: Of their channels, counted from the end.
        scale: ``(out,)`` what each output was multiplied by, float64; 0 where that isn't known.
    """

    streams: tuple[Place, ...]
    axis: int
    scale: Tensor

    def as_output(self, wanted: Tensor, stream: Tensor) -> Tensor:
        """What the outputs would have to be changed by to put a stream right, ``(..., out)``."""
        scale = self.scale.to(stream)
        return torch.where(scale == 0, 0, (wanted - stream) / scale)


def residual_connections(
    model: nn.Module,
    layers: Mapping[str, int],
    modules: Collection[str],
    run: Callable[[], object],
) -> dict[str, Residual]:
    """What each layer's output is added to, of those that are added to a tensor seen before.

    Args:
        model: In evaluation mode.
        layers: The axis of the outputs, -1 or -3, of layers that a pass calls once.
        modules: Names of modules where a stream may be seen.
        run: A forward pass of ``model`` without gradients.
    """
    seen = _Seen(layers)
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name in modules:
                before = module.register_forward_pre_hook(
                    partial(seen.arguments, name), with_kwargs=True
                )
                after = module.register_forward_hook(partial(seen.output, name))
                stack.callback(before.remove)
                stack.callback(after.remove)
        for name in layers:
            layer, hook = model.get_submodule(name), partial(seen.layer, name)
            handle = layer.register_forward_hook(hook, prepend=True)
            stack.callback(handle.remove)
        stack.enter_context(_Additions(seen))
        run()
    return seen.found()


def watch(
    model: nn.Module, places: Iterable[Place], see: Callable[[Place, Tensor], None]
) -> ExitStack:
    """Tell ``see`` the tensors at these places whenever they come; ends with the stack."""
    stack = ExitStack()

    def argument(place: Place, module: nn.Module, args: Any, kwargs: Any) -> None:
        see_tensor(place, dict([*enumerate(args), *kwargs.items()]).get(place.argument))

    def output(place: Place, module: nn.Module, args: object, output: object) -> None:
        see_tensor(place, output)

    def see_tensor(place: Place, value: object) -> None:
        if isinstance(value, Tensor):
            see(place, value)

    for place in places:
        module = model.get_submodule(place.module)
        handle = (
            module.register_forward_hook(partial(output, place))
            if place.argument is None
            else module.register_forward_pre_hook(partial(argument, place), with_kwargs=True)
        )
        stack.callback(handle.remove)
    return stack


class _Additions(TorchFunctionMode):
    """Tells the summands of every addition before it is done, and the sum after it."""

    def __init__(self, seen: _Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        parts: dict[str, _Part] = {}
        if func in ADDITIONS and len(args) == 2 and not kwargs:
            one, other = args
            if isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape:
                parts = self.seen.addition(one, other) | self.seen.addition(other, one)
        result = func(*args, **(kwargs or {}))
        if parts:
            self.seen.sum_of(parts, result)
        return result


@dataclass(frozen=True)
class _Part:
    """How a layer's output is contained in a summand: the axis of its channels, and its scale."""

    axis: int
    scale: Tensor


class _Seen:
    """What a pass has shown so far."""

    def __init__(self, channel_axes: Mapping[str, int]) -> None:
        self._channel_axes = channel_axes
        # By the tensor's id: held, so that no other gets it.
        self._tensors: dict[int, tuple[Tensor, int, list[tuple[Place, int]]]] = {}
        self._outputs: dict[str, tuple[torch.Size, Tensor, int]] = {}
        self._added: dict[str, _Part] = {}
        # For each stream of a layer, the places where it is seen.
        self._streams: dict[str, list[list[Place]]] = {}
        self._last_sum: tuple[Tensor, int, int, dict[str, _Part]] | None = None
        self._calls: Counter[str] = Counter()
        self._time = 0

    def found(self) -> dict[str, Residual]:
        """The connections whose streams stand at places that are passed once."""
        found: dict[str, Residual] = {}
        for name, streams in self._streams.items():
            once = [[p for p in places if self._calls[p.module] == 1] for places in streams]
            if all(once):
                part = self._added[name]
                found[name] = Residual(tuple(p[0] for p in once), part.axis, part.scale)
        return found

    def arguments(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._calls[name] += 1
        for key, value in [*enumerate(args), *kwargs.items()]:
            self._note(value, Place(name, key))

    def output(self, name: str, module: nn.Module, args: object, output: object) -> None:
        self._note(output, Place(name, None))

    def layer(self, name: str, module: nn.Module, args: object, output: Tensor) -> None:
        moved = output.movedim(self._channel_axes[name], -1)
        if moved.numel() >= FEWEST_ROWS * moved.shape[-1]:
            self._time += 1
            self._outputs[name] = moved.shape, _rows(moved), self._time

    def addition(self, summand: Tensor, stream: Tensor) -> dict[str, _Part]:
        """The layers whose outputs ``summand`` contains; remembers what they are added to."""
        parts = self._parts_of(summand)
        _, version, places = self._tensors.get(id(stream), (stream, -1, []))
        for name in parts:
            before = [place for place, time in places if time < self._outputs[name][2]]
            if before and version == stream._version:  # seen, and not changed in place since
                self._streams.setdefault(name, []).append(before)
        return parts

    def sum_of(self, parts: dict[str, _Part], result: Tensor) -> None:
        """Of a sum that these layers are part of: more may be added to it at once."""
        self._last_sum = result, result._version, self._time, parts

    def _parts_of(self, summand: Tensor) -> dict[str, _Part]:
        if self._last_sum is not None:
            result, version, time, parts = self._last_sum
            # Branches side by side, x + f(x) + g(x): no module was called since the first sum.
            if result is summand and version == summand._version and time == self._time:
                return parts
        for name, (shape, rows, _) in self._outputs.items():
            if name in self._added:
                continue
            # A Linear's channels may have been moved to where a conv has them (ConvNeXt).
            for axis in (self._channel_axes[name], -3):
                moved = summand.movedim(axis, -1) if summand.ndim >= -axis else summand
                if moved.shape != shape:
                    continue
                scale = _scale_between(rows, _rows(moved), summand.dtype)
                if scale is not None:
                    self._added[name] = _Part(axis, scale)
                    return {name: self._added[name]}
        return {}

    def _note(self, value: object, place: Place) -> None:
        self._time += 1
        if not isinstance(value, Tensor):
            return
        tensor, version, places = self._tensors.get(id(value), (value, value._version, []))
        if version != value._version:
            version, places = value._version, []
        self._tensors[id(value)] = tensor, version, [*places, (place, self._time)]


def _rows(values: Tensor) -> Tensor:
    """Some rows ``(n, channels)`` of a tensor ``(..., channels)``, float64."""
    rows = values.flatten(0, -2)
    places = torch.linspace(0, len(rows) - 1, min(ROWS, len(rows))).long()
    return rows[places.to(rows.device)].double()


def _scale_between(before: Tensor, after: Tensor, dtype: torch.dtype) -> Tensor | None:
    """``(channels,)`` by which each channel was multiplied, None where that is not all.

    A shift of each channel is not told.
    """
    before, after = before - before.mean(0), after - after.mean(0)
    power = before.square().sum(0)
    scale = torch.where(power > 0, (before * after).sum(0) / power, 0)
    left = after - scale * before
    allowed = max(1e-4, 4 * torch.finfo(dtype).eps) * float(after.abs().max())
    if not (math.isfinite(allowed) and allowed > 0 and float(left.abs().max()) <= allowed):
        return None
    return torch.where(scale.abs() > 1e-3 * scale.abs().max(), scale, 0)
