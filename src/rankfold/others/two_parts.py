"""Held-out examples, and those that the range of one example's change is taken from."""

from __future__ import annotations

from dataclasses import replace

import torch

from rankfold.data.given import up_to
from rankfold.data.parts import FEWEST, SAME, USUAL_LIMITS, Part, as_part, drawn
from rankfold.errors import InputError

SHARE = 0.25  # of the examples, for the range


def held_out_part(examples: object, limit: int | None, seed: int, name: str = "held_out") -> Part:
    """Different examples, all or ``limit`` of them drawn by ``seed``.

    Raises:
        InputError: An example can't be used.
    """
    given = up_to(examples, limit or USUAL_LIMITS[-1])
    chosen, _ = drawn(given, limit or USUAL_LIMITS[-1], seed, " (held_out_limit=)")
    part = as_part(name, chosen)
    seen: set[str] = set()
    again: dict[int, str] = {}
    for place, digest in enumerate(part.digests):
        if digest in seen:
            again[place] = SAME
        seen.add(digest)
    return part.without(again) if again else part


def divided(part: Part, seed: int, block: int = 1) -> tuple[Part, Part]:
    """Selection and held-out examples of one part, by ``seed``.

    Args:
        part: All examples.
        seed: Decides which go where.
        block: Consecutive examples that stay together, for windows of one text.

    Raises:
        InputError: There are too few.
    """
    numbers = range(len(part.examples))
    blocks = [[*numbers[start : start + block]] for start in range(0, len(numbers), block)]
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed)).tolist()
    first = max(1, round(SHARE * len(blocks)))
    chosen, others = (
        sorted(number for one in some for number in blocks[one])
        for some in (order[:first], order[first:])
    )
    if min(len(chosen), len(others)) < FEWEST:
        raise InputError(
            f"the data gives {len(part.examples)} different examples; expected {FEWEST} or more to "
            f"take the range of one example's change from, and {FEWEST} or more to be held out. "
            "Give more data, shorter windows of text with length=, or state largest_change=, "
            "which leaves all examples held out."
        )
    used = {f"used for the range of one example's change (seed {seed})": len(chosen)}
    held_out = part.take(others)
    return (
        replace(part.take(chosen), name="selection", left_out={}),
        replace(held_out, left_out={**part.left_out, **used}),
    )
