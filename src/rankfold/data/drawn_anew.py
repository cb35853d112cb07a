"""Whether a data set gives the same examples each time that it is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rankfold.data.example import Example, content_digest, example_digest
from rankfold.data.given import READ_TWICE, GivenExamples, drawn_anew
from rankfold.errors import InputError


def refuse_drawn_anew(
    given: GivenExamples, found: Sequence[Example], read: Callable[[int], Example]
) -> None:
    """Refuse a data set that gives other examples each time, or all of them in one memory.

    Raises:
        InputError: As said.
    """
    what = f"the data set ({type(given.items).__name__})"
    if given.is_kept or not found:
        return
    first = read(0)
    before = _digests(first)
    read(len(found) - 1)
    if _digests(first) != before:
        raise InputError(
            f"{what} writes every example into the memory of the one before; expected one of its "
            "own for each: return a copy (x.clone(), x.copy())."
        )
    again = {place * len(found) // READ_TWICE for place in range(READ_TWICE)}
    same = all(_digests(read(place)) == _digests(found[place]) for place in again)
    known = given.read_before
    if not same or (known is not None and [*map(example_digest, found)] != known):
        raise drawn_anew(what)


def _digests(example: Example) -> tuple[str, str | None]:
    """Of the input, and of all of an example; None where that holds other things than tensors."""
    try:
        return example_digest(example), content_digest(example)
    except InputError:
        return example_digest(example), None
