"""A user's model comes out of a run with the values that it went in with, whatever it does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rankfold.errors import InputError, listed, visible


class _Value(NamedTuple):
    """A parameter or buffer: where it stands, itself, and a copy of its values, on the CPU."""

    owner: nn.Module
    leaf: str
    tensor: Tensor
    values: Tensor


class KeptModel:
    """The values of a model's parameters and buffers.

    Args:
        model: The user's.
        keep: Where the copies of its tensors shall lie.
        known: Of a tensor the values that are kept elsewhere already, if they are.
    """

    def __init__(
        self,
        model: nn.Module,
        keep: Callable[[Tensor], Tensor],
        known: Callable[[Tensor], Tensor | None] = lambda _: None,
    ) -> None:
        def copied(tensor: Tensor) -> Tensor:
            there = known(tensor)
            return keep(tensor.detach().to("cpu", copy=True)) if there is None else there

        self._parameters = _values(model, "_parameters", copied)
        self._buffers = _values(model, "_buffers", copied)

    @contextmanager
    def as_it_was(self) -> Iterator[None]:
        """Around what runs the model: what it changes is put back, and named.

        Raises:
            InputError: A parameter changed, here or since the last time: then no losses are those
                of one model. Changed buffers are told on stderr: a model may count its calls.
        """
        before = _changed(self._parameters)
        if before:
            raise InputError(
                f"the model was changed since it was prepared:\n  {listed(before)}\n"
                "Prepare it again: what is known of it is of what it was."
            )
        try:
            yield
        finally:
            parameters, buffers = _changed(self._parameters), _changed(self._buffers)
            for values in (self._parameters, self._buffers):
                _put_back(values)
            if buffers:
                told = ", ".join(map(visible, buffers))
                print(f"the model's own code changed buffers; they are put back: {told}",
                      file=sys.stderr)  # fmt: skip
        if parameters:
            raise InputError(
                f"weights of the model changed during the run:\n  {listed(parameters)}\n"
                "They are put back, and there is no result: original and factorized model are "
                "compared with the same weights. Take the change out of the model's forward and "
                "hooks, or read its file in place of mapping it, if another program writes it."
            )


def _values(model: nn.Module, kind: str, keep: Callable[[Tensor], Tensor]) -> dict[str, _Value]:
    found: dict[str, _Value] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        for leaf, tensor in getattr(module, kind).items():
            plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
            if plain and not tensor.is_meta and id(tensor) not in seen:
                seen.add(id(tensor))
                values = keep(tensor)
                found[f"{name}.{leaf}" if name else leaf] = _Value(module, leaf, tensor, values)
    return found


def _stored(one: _Value) -> object:
    """What stands in the tensor's place now."""
    return one.owner._parameters.get(one.leaf, one.owner._buffers.get(one.leaf))


def _changed(values: dict[str, _Value]) -> list[str]:
    return [name for name, one in values.items() if not _same(one)]


def _same(one: _Value) -> bool:
    here = _stored(one)
    if not isinstance(here, Tensor):
        return False
    if here.shape != one.values.shape or here.dtype != one.values.dtype:
        return False
    first, second = (t.detach().cpu().contiguous().reshape(-1) for t in (here, one.values))
    return torch.equal(first.view(torch.uint8), second.view(torch.uint8))


def _put_back(values: dict[str, _Value]) -> None:
    """Into the very tensors that stood there."""
    for one in values.values():
        if not _same(one):
            if _stored(one) is not one.tensor:
                kind = "_parameters" if isinstance(one.tensor, nn.Parameter) else "_buffers"
                getattr(one.owner, kind)[one.leaf] = one.tensor
            with torch.no_grad():
                one.tensor.data.copy_(one.values)
