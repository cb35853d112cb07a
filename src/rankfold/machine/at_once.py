"""Work on many layers: several at once where each is small, all threads on one where it is large.

LAPACK's routines gain little from a second thread below some thousand rows, and layers don't need
each other. Each small layer's work runs on one thread, whatever their number.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")

LARGE = 2048  # the smaller side of a matrix from which on it gets all threads


def is_small(matrix: Tensor) -> bool:
    """Whether the work on a matrix ``(out, in)`` on the CPU leaves the other threads idle."""
    return matrix.device.type == "cpu" and min(matrix.flatten(1).shape) < LARGE


def work_on(matrix: Tensor) -> float:
    """How much a decomposition of a matrix ``(out, in, ...)`` takes, beside those of others."""
    out, in_ = matrix.flatten(1).shape
    return float(out) ** 3 + float(in_) ** 3


def at_once(
    items: Iterable[Item], work: Callable[[Item], Result], small: Callable[[Item], bool]
) -> Iterator[Result]:
    """``map(work, items)``, as many items at once as torch has threads.

    Args:
        items: As many are taken ahead as there are threads.
        work: What is done with each. It shares nothing with that of other items.
        small: Whether an item's work runs on one thread beside others, or alone with all.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield from map(work, items)
        return
    waiting: deque[Future[Result]] = deque()
    with ExitStack() as stack:
        pool = ThreadPoolExecutor(
            threads, initializer=partial(_one_thread, torch.is_grad_enabled())
        )
        stack.callback(pool.shutdown, cancel_futures=True)
        for item in items:
            if not small(item):
                while waiting:
                    yield waiting.popleft().result()
                yield work(item)
                continue
            waiting.append(pool.submit(work, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _one_thread(gradients: bool) -> None:
    """What is set for each thread by itself."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(gradients)
