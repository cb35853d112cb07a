"""Three disjoint parts of a user's data: calibration, selection, held-out.

*Calibration* gives the statistics, *selection* chooses the step and the plan, *held-out* is
evaluated once, for the certificate. An example that appears in two parts is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from rankfold.data.account import Account, ReadExamples, refuse_two_meanings
from rankfold.data.padding import Padding
from rankfold.errors import InputError

Example: TypeAlias = Any
Batch: TypeAlias = Any
Examples: TypeAlias = Sequence[Example]
Collate: TypeAlias = Callable[[list[Example]], Batch]

PARTS = ("calibration", "selection", "held_out")
SHARES = (0.5, 0.2, 0.3)
FEWEST = 4  # examples a part needs: two halves of two for calibration, a variance for the others


@dataclass(frozen=True)
class Data:
    """Calibration, selection and held-out examples, each a sequence (or data set, or loader).

    An example is a ``(length,)`` integer tensor or a mapping with ``input_ids`` for language
    models, an ``(input, label)`` pair for classifiers, anything that ``collate`` takes otherwise.

    Attributes:
        calibration: Examples for the statistics.
        selection: Examples for choosing the step and the plan.
        held_out: Examples for the certificate, evaluated once.
        collate: Turns a list of examples into a batch; by default tensors are stacked.
        groups: For each held-out example what it belongs to, such as its document, where examples
            of one group are not independent: the groups are then the certificate's units.
        split_here: The parts were drawn from one data set by ``split``: copies in them are left
            out, not refused.

    Raises:
        InputError: A part is empty or too small, or ``groups`` doesn't fit.
    """

    calibration: Examples
    selection: Examples
    held_out: Examples
    collate: Collate | None = None
    groups: Sequence[object] | None = None
    split_here: bool = False

    def __post_init__(self) -> None:
        """Materialise loaders and iterables, and refuse parts that are too small."""
        for part in PARTS:
            examples, collate = as_examples(getattr(self, part))
            object.__setattr__(self, part, examples)
            if self.collate is None and collate is not None:
                object.__setattr__(self, "collate", collate)
            if len(examples) < FEWEST:
                raise InputError(
                    f"the {part.replace('_', '-')} part has {len(examples)} examples; "
                    f"it needs at least {FEWEST}. Give more data."
                )
        refuse_two_meanings(self.accounts)
        if self.groups is not None and len(self.groups) != len(self.held_out):
            raise InputError(
                f"there are {len(self.groups)} groups for {len(self.held_out)} held-out examples; "
                "expected one an example."
            )

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
    """

    name: str
    examples: list[Example]
    collate: Collate
    digests: list[str] = field(repr=False)
    groups: list[str] | None = field(default=None, repr=False)

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
        )

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
        for _, group in groupby(self.examples, key=_shape):
            same = list(group)
            step = size or default_batch_size(same[0])
            batches += [same[start : start + step] for start in range(0, len(same), step)]
        return batches


def as_examples(data: object) -> tuple[Examples, Collate | None]:
    """A sequence of examples from a sequence, a data set, or a data loader (with its collate).

    Raises:
        InputError: ``data`` is none of them.
    """
    if isinstance(data, DataLoader):
        collate = None if data.collate_fn is default_collate else data.collate_fn
        return as_examples(data.dataset)[0], collate
    if isinstance(data, IterableDataset):
        return list(data), None
    if isinstance(data, Tensor):
        return list(data), None
    if isinstance(data, ReadExamples):
        return data, data.collate
    if isinstance(data, Dataset) and not isinstance(data, Sequence):
        if not hasattr(data, "__len__"):
            raise InputError(f"the data set {type(data).__name__} has no length; give it __len__.")
        return cast("Examples", data), None
    if isinstance(data, Sequence) and not isinstance(data, str):
        return data, None
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, str):
        return cast("Examples", data), None
    if isinstance(data, Iterator):
        return list(data), None
    raise InputError(
        f"data is {type(data).__name__}; expected a data set, a data loader, a sequence of "
        "examples, or rankfold.Data(calibration=, selection=, held_out=)."
    )


def split(data: object, seed: int, block: int = 1, collate: Collate | None = None) -> Data:
    """Split examples into three disjoint parts, deterministically.

    Examples whose inputs are byte for byte equal to an earlier one's are dropped first, so that
    none can land in two parts.

    Args:
        data: Sequence, data set or data loader.
        seed: Decides which example goes where.
        block: Consecutive examples that stay together, for windows of one text.
        collate: As for ``Data``; by default the loader's.

    Raises:
        InputError: Too few different examples for three parts.
    """
    examples, own_collate = as_examples(data)
    seen: set[str] = set()
    unique: list[int] = []
    for index in range(len(examples)):
        digest = example_digest(examples[index])
        if digest not in seen:
            seen.add(digest)
            unique.append(index)
    blocks = [unique[start : start + block] for start in range(0, len(unique), block)]
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [index for b in order for index in blocks[b]]
    first = round(SHARES[0] * len(blocks))
    second = first + round(SHARES[1] * len(blocks))
    ends = [sum(len(blocks[b]) for b in order[:end]) for end in (first, second)]
    parts = [shuffled[: ends[0]], shuffled[ends[0] : ends[1]], shuffled[ends[1] :]]
    if min(len(part) for part in parts) < FEWEST:
        raise InputError(
            f"the data has {len(unique)} different examples in {len(blocks)} blocks: too few for "
            f"calibration, selection and held-out parts of {FEWEST} or more each. Give more data."
        )
    first_part, second_part, third_part = (_Subset(examples, part) for part in parts)
    return Data(
        first_part, second_part, third_part, collate=collate or own_collate, split_here=True
    )


class _Subset(Sequence[Example]):
    """Examples by index, read when they are used."""

    def __init__(self, examples: Examples, indices: list[int]) -> None:
        self.examples, self.indices = examples, indices

    @property
    def account(self) -> Account | None:
        """What became of the source of all of them."""
        return getattr(self.examples, "account", None)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: Any) -> Any:
        if isinstance(item, slice):
            return [self.examples[index] for index in self.indices[item]]
        return self.examples[self.indices[item]]


def select_part(data: Data, name: str, limit: int | None, seed: int) -> Part:
    """The examples of one part that a run uses: all, or ``limit`` of them drawn by ``seed``."""
    examples: Examples = getattr(data, name)
    count = len(examples)
    indices = list(range(count))
    if limit is not None and limit < count:
        generator = torch.Generator().manual_seed(seed)
        indices = sorted(torch.randperm(count, generator=generator)[:limit].tolist())
    part = as_part(name, [examples[index] for index in indices], data.collate)
    if name != "held_out" or data.groups is None:
        return part
    return replace(part, groups=[str(data.groups[index]) for index in indices])


def as_part(name: str, examples: list[Example], collate: Collate | None = None) -> Part:
    """Examples with their digests."""
    digests = [example_digest(example) for example in examples]
    return Part(name, examples, collate or default_collate_examples, digests)


def refuse_overlap(parts: Sequence[Part]) -> None:
    """Refuse examples that stand in two parts.

    Raises:
        InputError: Names the parts and the first examples that they share.
    """
    for at, first in enumerate(parts):
        where = {digest: index for index, digest in enumerate(first.digests)}
        for second in parts[at + 1 :]:
            shared = [(where[d], i) for i, d in enumerate(second.digests) if d in where]
            if shared:
                pairs = ", ".join(f"{a} = {b}" for a, b in shared[:5])
                more = f" and {len(shared) - 5} more" if len(shared) > 5 else ""
                raise InputError(
                    f"the {first.name.replace('_', '-')} and {second.name.replace('_', '-')} "
                    f"parts share {len(shared)} examples (numbers in each, from 0: {pairs}{more}). "
                    "They must be disjoint: remove the shared examples from one of them."
                )


def default_collate_examples(examples: list[Example]) -> Batch:
    """Stack tensors, also inside pairs and mappings; numbers become tensors."""
    first = examples[0]
    if isinstance(first, Mapping):
        return {key: default_collate_examples([e[key] for e in examples]) for key in first}
    if isinstance(first, tuple | list) and not all(isinstance(v, int) for v in first):
        columns = zip(*examples, strict=True)
        return tuple(default_collate_examples(list(column)) for column in columns)
    return torch.stack([torch.as_tensor(e) for e in examples])


def example_input(example: Example) -> object:
    """What the model is given: the first of a pair, the mapping without its labels."""
    if isinstance(example, Mapping):
        return {key: example[key] for key in sorted(example) if key not in ("labels", "label")}
    if isinstance(example, tuple | list) and len(example) == 2 and torch.is_tensor(example[0]):
        return example[0]
    return example


def example_digest(example: Example) -> str:
    """SHA-256 of an example's input: its tensors' types, shapes and bytes."""
    digest = hashlib.sha256()
    _feed(digest, example_input(example))
    return digest.hexdigest()


def content_digest(example: Example) -> str:
    """SHA-256 of a whole example, its labels included."""
    digest = hashlib.sha256()
    _feed(digest, example)
    return digest.hexdigest()


def _feed(digest: Any, value: object) -> None:
    if isinstance(value, Mapping):
        for key in value:
            digest.update(str(key).encode() + b"\0")
            _feed(digest, value[key])
    elif isinstance(value, tuple | list) and not all(isinstance(v, int) for v in value):
        for item in value:
            _feed(digest, item)
    elif isinstance(value, str | bytes):
        digest.update(value.encode() if isinstance(value, str) else value)
    else:
        tensor = torch.as_tensor(cast("Any", value)).detach().cpu().contiguous()
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())


def _shape(example: Example) -> object:
    value = example_input(example)
    if isinstance(value, Mapping):
        return tuple((key, _shape(item)) for key, item in value.items())
    if torch.is_tensor(value):
        return tuple(value.shape)
    return len(value) if isinstance(value, Sequence) else None


def describe(value: object) -> str:
    """Types and shapes of a batch or an example, for messages."""
    if torch.is_tensor(value):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {describe(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(describe(item) for item in value[:4]) + ")"
    return type(value).__name__


def default_batch_size(example: Example) -> int:
    """Examples a batch: about 512 tokens, or a million input values, at most 256 examples.

    More tokens at once take no less time on a CPU, and their logits, several copies of them, more
    memory than all else: 0.1 GB a copy for 512 tokens and 50,000 words.
    """
    value = example_input(example)
    if isinstance(value, Mapping):
        value = next(iter(value.values()), None)
    tensor = torch.as_tensor(cast("Any", value)) if not torch.is_tensor(value) else value
    budget = (1 << 20) if tensor.is_floating_point() else (1 << 9)
    return max(1, min(256, budget // max(1, tensor.numel())))
