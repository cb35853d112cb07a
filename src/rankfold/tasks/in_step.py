"""Passes of a model over many batches, block by block: all of them go through one before the next.

A model whose weights lie in files is then read once for many batches. Each pass is a greenlet: it
has a stack of its own, in the same thread, and waits before each block. What is computed is what
passes one after the other compute, in the same order within each of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rankfold.model.blocks import find_blocks, forward_of

Result = TypeVar("Result")
HELD = 256_000_000  # bytes that waiting passes may hold: more of them go in a turn of their own


FEWEST = 3  # runs that are worth it
_checked: dict[object, bool] = {}  # whether passes of such a model may wait for each other


def once_for_many(
    model: nn.Module,
    runs: Sequence[Callable[[], Result]],
    same: Callable[[Result, Result], bool],
) -> Iterator[Result]:
    """What each run gives, in their order, block by block where the model can be run so.

    A model that keeps something of a pass on itself, between its blocks, can't. So the first two
    runs of each kind of model are made alone as well, and compared.

    Args:
        model: As of ``in_step``, as are the runs.
        runs: Made again, a run gives the same.
        same: Compares what two of them gave.
    """
    blocks = find_blocks(model)
    kind = type(model), *blocks, *map(type, blocks.values())
    if len(runs) < FEWEST or not blocks or not _checked.get(kind, True):
        yield from (run() for run in runs)
        return
    if kind not in _checked:
        alone = [run() for run in runs[:2]]
        try:
            _checked[kind] = all(map(same, alone, in_step(model, runs[:2])))
        except Exception:  # alone they went well
            _checked[kind] = False
    yield from in_step(model, runs) if _checked[kind] else (run() for run in runs)


def in_step(model: nn.Module, runs: Sequence[Callable[[], Result]]) -> Iterator[Result]:
    """What each run gives, in their order; as many as ``HELD`` allows go block by block.

    Args:
        model: Its blocks are where runs wait for each other. Without any they don't.
        runs: Each is a pass of this model, without gradients.
    """
    passes = _Passes(find_blocks(model))
    waiting = deque(runs)
    with passes.attached():
        while waiting:
            yield from passes.some(waiting)


class _Passes:
    """Passes that wait before a block.

    Args:
        blocks: By name.
    """

    def __init__(self, blocks: dict[str, nn.Module]):
        self._blocks = blocks
        self._runner = getcurrent()
        self._at: dict[greenlet, str] = {}
        self._held = 0

    def attached(self) -> ExitStack:
        """Stops before each block, and off again whatever happens."""
        with ExitStack() as stack:
            for name, block in self._blocks.items():
                run = partial(self._wait, name, block.forward)
                stack.enter_context(forward_of(block, run))
            return stack.pop_all()

    def some(self, runs: deque[Callable[[], Result]]) -> list[Result]:
        """Take as many runs as may wait at once, and run them to their end."""
        found: dict[greenlet, Result] = {}
        begun: list[greenlet] = []
        self._held = 0

        def go(one: greenlet) -> None:
            result = one.switch()
            if one.dead:
                found[one] = result

        try:
            while runs and (not begun or self._held < HELD):
                begun.append(greenlet(runs.popleft()))
                go(begun[-1])
            while self._at:
                name = next(iter(self._at.values()))
                for one in [one for one, at in self._at.items() if at == name]:
                    del self._at[one]
                    go(one)
        finally:  # where one failed, the others are unwound
            self._at.clear()
            for one in begun:
                if not one.dead:
                    one.throw()
        return [found[one] for one in begun]

    def _wait(self, name: str, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """A block's forward, once all that wait may go on."""
        one = getcurrent()
        # A state of torch that the pass has set would be that of the others, too.
        own = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
        if one is not self._runner and not own:
            new = one not in self._at
            self._held += new * sum(_bytes(value) for value in tree_leaves((args, kwargs)))
            self._at[one] = name
            self._runner.switch()
        return forward(*args, **kwargs)


def _bytes(value: object) -> int:
    return value.untyped_storage().nbytes() if isinstance(value, Tensor) else 0
