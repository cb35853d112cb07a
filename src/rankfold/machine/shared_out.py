"""Work on many layers: shared out among the processes of a run, and at once in each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from torch import Tensor

from rankfold.machine import processes
from rankfold.machine.at_once import at_once

Item = TypeVar("Item")
Result = TypeVar("Result")

EXCHANGES = 8  # of all results, so that no process waits long to see how far the others are
FEWEST = 4  # items a process between two exchanges


def shared_out(
    items: Sequence[Item],
    work: Callable[[Item], Result],
    *,
    small: Callable[[Item], bool],
    cost: Callable[[Item], float],
    what: str,
    keep: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Result]:
    """``map(work, items)``, each item by one process of the run alone, as ``at_once`` in it.

    Args:
        items: The same in all processes.
        work: What is done with each. It shares nothing with that of other items.
        small: Whether an item's work runs on one thread beside others, or alone with all.
        cost: How much an item's work takes.
        what: It is.
        keep: What becomes of tensors that others have found.

    Raises:
        InputError: Another process has failed or died.
    """
    if not processes.several():
        yield from at_once(items, work, small)
        return
    step = max(FEWEST * processes.size(), -(-len(items) // EXCHANGES))
    for start in range(0, len(items), step):
        some = items[start : start + step]
        owners = processes.owners([cost(item) for item in some])
        own = [item for item, owner in zip(some, owners, strict=True) if owner == processes.rank()]
        found = processes.gathered([*at_once(own, work, small)], what, keep)
        results = [iter(one) for one in found]
        for owner in owners:
            yield next(results[owner])
