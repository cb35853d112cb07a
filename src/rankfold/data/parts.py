"""Three disjoint parts of a user's data: calibration, selection, held-out.

*Calibration* gives the statistics, *selection* chooses the step and the plan, *held-out* is
evaluated once, for the certificate. An example that appears in two parts is refused.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

import torch

from rankfold.data.account import Account, refuse_two_meanings
from rankfold.data.drawn_anew import refuse_drawn_anew
from rankfold.data.example import (
    Example,
    collated,
    default_batch_size,
    describe,
    example_digest,
    example_input,
    plain_example,
    shape,
)
from rankfold.data.given import GivenExamples, LeftOut, Stream, as_examples, up_to
from rankfold.data.input_settings import joined
from rankfold.data.padding import Padding
from rankfold.errors import InputError, check_kind

Batch: TypeAlias = Any
Examples: TypeAlias = Sequence[Example]
Collate: TypeAlias = Callable[[list[Example]], Batch]
Limits: TypeAlias = tuple[int, int, int]  # most examples of each part

PARTS = ("calibration", "selection", "held_out")
SHARES = (0.5, 0.2, 0.3)
USUAL_LIMITS: Limits = (2048, 2048, 10000)  # where examples have one term each
FEWEST = 4  # examples a part needs: two halves of two for calibration, a variance for the others
LIMIT_NAMES = dict(zip(PARTS, ("limit", "selection_limit", "held_out_limit"), strict=True))
SAME = "the same input as an example before"


@dataclass(frozen=True)
class Data:
    """Calibration, selection and held-out examples, each a sequence (or data set, or loader).

    An example is a ``(length,)`` integer tensor or a mapping with ``input_ids`` for language
    models, an ``(input, label)`` pair for classifiers, anything that ``collate`` takes otherwise.
    Arrays, numbers and lists of numbers stand for tensors. Columns of texts in mappings are left
    out; the report names them. Of a loader those examples count that it yields.

    Attributes:
        calibration: Examples for the statistics.
        selection: Examples for choosing the step and the plan.
        held_out: Examples for the certificate, evaluated once.
        collate: Turns a list of examples into a batch; by default each part's loader's own, or
            tensors are stacked.
        groups: For each held-out example what it belongs to, such as its document, where examples
            of one group are not independent: the groups are then the certificate's units.
        split_here: The parts were drawn from one data set by ``split``: copies in them are left
            out, not refused.
        left_out: Examples that stood in that data set and are in none of the parts, by the reason.

    Raises:
        InputError: A part is empty or too small, or ``groups`` doesn't fit.
    """

    calibration: Examples
    selection: Examples
    held_out: Examples
    collate: Collate | None = None
    groups: Sequence[object] | None = None
    split_here: bool = False
    left_out: LeftOut = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Open loaders, streams and columns, and refuse parts that are too small."""
        for part in PARTS:
            given = getattr(self, part)
            examples = as_examples(given)
            if not (isinstance(examples, GivenExamples) and examples.items is given):
                object.__setattr__(self, part, examples)
            count = len(up_to(examples, FEWEST))
            if count < FEWEST:
                raise InputError(
                    f"the {part.replace('_', '-')} part has {count} examples; "
                    f"it needs at least {FEWEST}. Give more data."
                )
        refuse_two_meanings(self.accounts)
        joined((account.source, account.inputs) for account in self.accounts)
        if self.groups is None:
            return
        check_kind("groups", self.groups, Sized, "a list with the group of each held-out example")
        held_out = len(up_to(self.held_out, len(self.groups) + 1))
        if len(self.groups) != held_out:
            raise InputError(
                f"there are {len(self.groups)} groups for {held_out} held-out examples; "
                "expected one an example."
            )

    def __repr__(self) -> str:
        counts = [
            f"{'a stream' if isinstance(one := getattr(self, part), Stream) else len(one)} "
            f"{part.replace('_', '-')}"
            for part in PARTS
        ]
        return f"<Data of {counts[0]}, {counts[1]} and {counts[2]} examples>"

    @property
    def accounts(self) -> list[Account]:
        """What became of the sources that the parts were read from, each once."""
        found: list[Account] = []
        for part in PARTS:
            account = getattr(getattr(self, part), "account", None)
            if isinstance(account, Account) and account not in found:
                found.append(account)
        return found


@dataclass(frozen=True)
class Part:
    """The examples of one part that a run uses.

    Attributes:
        name: ``calibration``, ``selection`` or ``held_out``.
        examples: The examples.
        collate: Turns a list of examples into a batch.
        digests: SHA-256 of each example's input, hexadecimal.
        groups: What each example belongs to, or None where they are independent.
        left_out: Examples that the user gave and a run does not use, by the reason.
        columns: Names of columns that are left out of every example: texts.
        places: Where each example stands in what the user gave; as here if None.
        source: Name of the file or folder that they were read from, where one is known.
    """

    name: str
    examples: list[Example] = field(repr=False)
    collate: Collate
    digests: list[str] = field(repr=False)
    groups: list[str] | None = field(default=None, repr=False)
    left_out: LeftOut = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    places: Sequence[Any] | None = field(default=None, repr=False)
    source: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the model sees the examples as they are, stacked or padded, by name or in pairs.

        Else only the user's ``collate`` knows what it makes of them.
        """
        return self.collate is collated or isinstance(self.collate, Padding)

    @property
    def digest(self) -> str:
        """SHA-256 over the examples' digests, in order."""
        return hashlib.sha256("".join(self.digests).encode()).hexdigest()

    def take(self, indices: Sequence[int]) -> Part:
        """The examples with these numbers, in this order."""
        return Part(
            self.name,
            [self.examples[i] for i in indices],
            self.collate,
            [self.digests[i] for i in indices],
            None if self.groups is None else [self.groups[i] for i in indices],
            self.left_out,
            self.columns,
            [self.number(i) for i in indices],
            self.source,
        )

    def number(self, place: int) -> Any:
        """The number in what the user gave, for messages, of an example of this part."""
        return place if self.places is None else self.places[place]

    def without(self, numbers: Mapping[int, str]) -> Part:
        """The part without the examples of these numbers, of each of which the reason is given."""
        kept = self.take([n for n in range(len(self.examples)) if n not in numbers])
        reasons = [*numbers.values()]
        counts = {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}
        return replace(kept, left_out={**self.left_out, **counts})

    def usage(self) -> dict[str, Any]:
        """What of the user's examples is used, and what is left out and why: plain values."""
        known = [count for count in self.left_out.values() if count is not None]
        return {
            "examples": len(self.examples),
            "digest": self.digest,
            "given": len(self.examples) + sum(known),
            "left_out": dict(self.left_out),
            "columns_left_out": [*self.columns],
            "drawn_anew": False,  # of the format: data that draw anew are refused
            "source": self.source,
        }

    def spread(self, count: int) -> Part:
        """So many examples, or all, from all over the part: not of one class or document."""
        return self.take(self.spread_places(count))

    def spread_places(self, count: int) -> list[int]:
        """The numbers of the examples of ``spread``."""
        count = min(count, len(self.examples))
        return [place * len(self.examples) // count for place in range(count)]

    def batches(self, size: int | None = None) -> list[list[Example]]:
        """Consecutive examples in lists of ``size`` (default: by their size).

        They are of the same shape, unless they are padded.
        """
        if isinstance(self.collate, Padding):
            return self.collate.batches(self.examples, size)
        batches: list[list[Example]] = []
        looked_at = shape if self.collate is collated else lambda e: shape(example_input(e))
        for _, group in groupby(self.examples, key=looked_at):
            same = list(group)
            step = size or self.batch_size(same[0])
            batches += [same[start : start + step] for start in range(0, len(same), step)]
        return batches

    def batch_size(self, example: Example) -> int:
        """Examples a batch of such examples, where nobody says so."""
        return default_batch_size(self.collate([example]))


def split(
    data: object,
    seed: int,
    block: int = 1,
    collate: Collate | None = None,
    limits: Limits | None = None,
) -> Data:
    """Split examples into three disjoint parts, deterministically.

    Examples whose inputs are byte for byte equal to an earlier one's are left out first, so that
    none can land in two parts.

    Args:
        data: Sequence, data set, data loader or stream.
        seed: Decides which example goes where.
        block: Consecutive examples that stay together, for windows of one text.
        collate: As for ``Data``; by default the loader's.
        limits: How many examples of each part a run will use: a stream is read so far.

    Raises:
        InputError: Too few different examples for three parts.
    """
    examples = up_to(data, None if limits is None else enough_for(limits))
    collate = collate or examples.collate
    digests = _read(examples, collate)
    first: dict[str, int] = {}
    for number, digest in enumerate(digests):
        first.setdefault(digest, number)
    unique = [*first.values()]
    if not examples.is_kept:
        examples.read_before = digests
    again = len(examples) - len(unique)
    blocks = [unique[start : start + block] for start in range(0, len(unique), block)]
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [index for b in order for index in blocks[b]]
    half = round(SHARES[0] * len(blocks))
    more = half + round(SHARES[1] * len(blocks))
    ends = [sum(len(blocks[b]) for b in order[:end]) for end in (half, more)]
    parts = [shuffled[: ends[0]], shuffled[ends[0] : ends[1]], shuffled[ends[1] :]]
    if min(len(part) for part in parts) < FEWEST:
        raise InputError(
            f"the data has {len(unique)} different examples in {len(blocks)} blocks: too few for "
            f"calibration, selection and held-out parts of {FEWEST} or more each. Give more data."
        )
    calibration, selection, held_out = (examples.take(part) for part in parts)
    return Data(
        calibration,
        selection,
        held_out,
        collate=collate,
        split_here=True,
        left_out={**examples.left_out, **({SAME: again} if again else {})},
    )


def enough_for(limits: Limits) -> int:
    """So many examples of one data set that each part of its split has its limit."""
    return max(math.ceil(limit / share) for limit, share in zip(limits, SHARES, strict=True)) + 1


def _read(examples: GivenExamples, collate: Collate | None) -> list[str]:
    """The digest of each example's input."""

    def read(index: int) -> Example:
        if collate is not None:
            return examples[index]
        return plain_example(examples[index], f"example {index} of the data")[0]

    return [example_digest(read(index)) for index in range(len(examples))]


def select_part(data: Data, name: str, limit: int | None, seed: int) -> Part:
    """The examples of one part that a run uses: all, or ``limit`` of them drawn by ``seed``."""
    examples = up_to(getattr(data, name), limit)
    chosen, indices = drawn(examples, limit, seed, f" ({LIMIT_NAMES[name]}=)")
    part = as_part(name, chosen, data.collate)
    if name != "held_out" or data.groups is None:
        return part
    return replace(part, groups=[str(data.groups[index]) for index in indices])


def drawn(
    examples: GivenExamples, limit: int | None, seed: int, by: str = ""
) -> tuple[GivenExamples, list[int]]:
    """All examples, or ``limit`` of them drawn by ``seed``, and their numbers.

    Args:
        examples: To draw from.
        limit: How many at most, None for all.
        seed: Decides which.
        by: What says how many are used, for the reason why the others are left out.
    """
    count = len(examples)
    indices = list(range(count))
    left_out = {}
    if limit is not None and limit < count:
        generator = torch.Generator().manual_seed(seed)
        indices = sorted(torch.randperm(count, generator=generator)[:limit].tolist())
        left_out = {f"beyond the {limit} that are used{by}": count - limit}
    return examples.take(indices, {**examples.left_out, **left_out}), indices


def as_part(name: str, examples: object, collate: Collate | None = None) -> Part:
    """Any data as a part: all its examples, with their digests.

    Raises:
        InputError: An example can't be used, or is of another kind than the first.
    """
    given = up_to(GivenExamples(examples) if type(examples) is list else examples, None)
    collate = collate or given.collate
    columns = [*given.columns]

    def named(place: int) -> str:
        return f"example {given.places[place]} of the {name.replace('_', '-')} data"

    def read(place: int) -> Example:
        if collate is not None:
            return given[place]
        example, texts = plain_example(given[place], named(place))
        columns.extend(texts)
        return example

    found = [read(place) for place in range(len(given))]
    refuse_drawn_anew(given, found, read)
    found = _alike(found, named) if collate is None else found
    return Part(
        name,
        found,
        collated if collate is None else _sparing(collate),
        [example_digest(example) for example in found],
        left_out=given.left_out,
        columns=tuple(dict.fromkeys(columns)),
        places=given.places,
        source=None if given.account is None else Path(given.account.source).name,
    )


def _sparing(collate: Collate) -> Collate:
    """The same function on copies of the examples: it may change what it is given.

    ``Padding`` is known to change nothing.
    """
    if isinstance(collate, Padding):
        return collate

    def spared(examples: list[Example]) -> Batch:
        loose = (Mapping, list)
        try:
            return collate([copy.copy(e) if isinstance(e, loose) else e for e in examples])
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"the collate function can't make a batch of {describe(examples[0])}: "
                f"{type(error).__name__}: {error}. It is given a list of the data set's examples."
            ) from error

    return spared


def refuse_unlike(parts: Sequence[Part]) -> None:
    """Refuse parts whose examples are of different kinds: labels in one and none in another.

    Raises:
        InputError: Names two parts and what their examples are.
    """
    plain = [part for part in parts if part.is_plain]
    for part in plain[1:]:
        ours, theirs = plain[0].examples[0], part.examples[0]
        if _kind(_as_floats(ours)) != _kind(_as_floats(theirs)):
            raise InputError(
                f"the examples of the {plain[0].name.replace('_', '-')} part are "
                f"{describe(ours)}, those of the {part.name.replace('_', '-')} part "
                f"{describe(theirs)}; expected the same columns (or items) in all parts."
            )


def _alike(examples: list[Example], named: Callable[[int], str]) -> list[Example]:
    """The examples, where all have the same columns or items, of the same kinds.

    A whole number becomes a float where other examples have one.

    Raises:
        InputError: Names the first that differs.
    """
    kinds = [_kind(example) for example in examples]
    if all(kind == kinds[0] for kind in kinds):
        return examples
    floats = [_as_floats(example) for example in examples]
    for place, example in enumerate(floats):
        if _kind(example) != _kind(floats[0]):
            raise InputError(
                f"{named(place)} is {describe(examples[place])}, and {named(0)} is "
                f"{describe(examples[0])}; expected the same columns (or items) in every example, "
                "of the same kinds: labels in all of them or in none."
            )
    return floats


def _kind(example: Example) -> object:
    """Columns of a mapping, items of a tuple; of tensors whether they hold whole numbers."""
    if isinstance(example, Mapping):
        return {key: _kind(item) for key, item in example.items()}
    if isinstance(example, tuple):
        return tuple(map(_kind, example))
    return "floats" if example.is_floating_point() else "whole numbers"


def _as_floats(example: Example) -> Example:
    """Single numbers in an example as floats."""
    if isinstance(example, Mapping):
        return {key: _as_floats(item) for key, item in example.items()}
    if isinstance(example, tuple):
        return tuple(map(_as_floats, example))
    whole = example.dim() == 0 and not example.is_floating_point()
    return example.float() if whole else example


def refuse_overlap(parts: Sequence[Part]) -> None:
    """Refuse examples that stand in two parts.

    Raises:
        InputError: Names the parts and the first examples that they share.
    """
    for at, first in enumerate(parts):
        where = {digest: index for index, digest in enumerate(first.digests)}
        for second in parts[at + 1 :]:
            shared = [
                (first.number(where[d]), second.number(i))
                for i, d in enumerate(second.digests)
                if d in where
            ]
            if shared:
                pairs = ", ".join(f"{a} = {b}" for a, b in shared[:5])
                more = f" and {len(shared) - 5} more" if len(shared) > 5 else ""
                raise InputError(
                    f"the {first.name.replace('_', '-')} and {second.name.replace('_', '-')} "
                    f"parts share {len(shared)} examples (numbers in each, from 0: {pairs}{more}). "
                    "They must be disjoint: remove the shared examples from one of them."
                )
