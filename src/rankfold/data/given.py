"""What Python gives as data, as a sequence of examples: exactly those that it yields.

A loader's samplers, batch samplers, workers and generators decide which examples it yields; a
stream is read no further than it is needed.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set, Sized
from itertools import islice
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    default_collate,
    default_convert,
)

from rankfold.data.account import Account, ReadExamples
from rankfold.data.arrays import ArrayPairs, is_arrays
from rankfold.data.example import content_digest, describe
from rankfold.data.hub_records import HubRecords, is_hub_data
from rankfold.errors import InputError

# How many examples are left out, by the reason; None where nobody knows how many there are.
LeftOut: TypeAlias = Mapping[str, int | None]
ONCE = "drawn again by the loader's sampler: each example is used once"
NOT_DRAWN = "read from the source, and not drawn by the loader"
EXPECTED = (
    "expected a data set, a data loader, a sequence of examples, arrays (X, y), or "
    "rankfold.Data(calibration=, selection=, held_out=)"
)
READ_TWICE = 16  # examples of a part, from all over it
_END = object()


def drawn_anew(what: str) -> InputError:
    """The error for examples that are others each time that they are read."""
    return InputError(
        f"{what} gives other examples each time that it is read: it draws at random, as "
        "augmentation does, or is written meanwhile. Nobody could verify a verdict on them, and no "
        "copies would be seen. "
        "Give data without augmentation, as for an evaluation; or draw once, and give the list: "
        "[data[i] for i in range(len(data))]."
    )


def _digest_of(item: Any) -> str | None:
    """Of an example as it is; None of one that holds other things than tensors and numbers."""
    try:
        return content_digest(item)
    except InputError:
        return None


class GivenExamples(Sequence[Any]):
    """Examples of a user's, read when they are used.

    Args:
        items: Anything with ``len`` and examples at numbers, or at what ``places`` holds.
        places: Which of them, in their order; all if None.
        collate: What the user makes a batch with, None for the stacking of tensors.
        left_out: Of what the user gave.
        columns: Names of columns that are left out of every example.
        account: What became of the source that the items were read from, where one is known. It
            ends where ``left_out`` begins: of its examples these are used here, or left out.
    """

    def __init__(
        self,
        items: Any,
        places: Sequence[Any] | None = None,
        *,
        collate: Callable[[list[Any]], Any] | None = None,
        left_out: LeftOut | None = None,
        columns: Sequence[str] = (),
        account: Account | None = None,
    ) -> None:
        self.items, self.collate, self.columns = items, collate, tuple(columns)
        self.account = account
        self.places = range(len(items)) if places is None else places
        self.left_out: LeftOut = dict(left_out or {})
        self.read_before: list[str] | None = None  # digests of what was read at each place

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, item: Any) -> Any:
        if isinstance(item, slice):
            return [self._at(place) for place in self.places[item]]
        return self._at(self.places[item])

    def _at(self, place: Any) -> Any:
        try:
            return self.items[place]
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"reading example {place} of the data ({type(self.items).__name__}) failed: "
                f"{type(error).__name__}: {error}; {EXPECTED}, whose examples stand at the "
                "numbers from 0."
            ) from error

    @property
    def is_kept(self) -> bool:
        """Whether the examples lie in memory, so that reading them again gives the same."""
        return isinstance(self.items, list | tuple | torch.Tensor | np.ndarray)

    def take(self, numbers: Sequence[int], left_out: LeftOut | None = None) -> GivenExamples:
        """Those with these numbers; ``left_out`` says why the others are left out."""
        places = [self.places[number] for number in numbers]
        kept = {"collate": self.collate, "columns": self.columns, "account": self.account}
        taken = GivenExamples(self.items, places, left_out=left_out, **cast("Any", kept))
        if self.read_before is not None:
            taken.read_before = [self.read_before[number] for number in numbers]
        return taken


class Stream(Sequence[Any]):
    """Examples that come one after the other, perhaps without end; what was read is kept.

    Args:
        items: Gives them.
        collate: As for ``GivenExamples``.
    """

    def __init__(
        self, items: Iterable[Any], collate: Callable[[list[Any]], Any] | None = None
    ) -> None:
        self.collate = collate
        self._items = items
        self._left: Iterator[Any] | None = None  # opened when it is needed: it may start workers
        self._read: list[Any] = []
        self._bytes = 0
        self._looked_at = False

    def first(self, count: int) -> GivenExamples:
        """The first ``count`` examples, or all; it says so where there are more."""
        more = self._reaches(count + 1)
        if not more and not self._looked_at:
            self._looked_at = True
            self._refuse_random()
        left_out = {f"not read: the stream goes on after {count} examples": None} if more else {}
        return GivenExamples(self._read[:count], collate=self.collate, left_out=left_out)

    def _refuse_random(self) -> None:
        """Refuse what gives other examples, not only in another order, where it is read again."""
        again = iter(self._items)
        if again is self._left:  # a generator: it can be read once, and is drawn by that
            return
        known = {digest for item in self._read if (digest := _digest_of(item)) is not None}
        digests = map(_digest_of, islice(again, READ_TWICE))
        if any(digest is not None and digest not in known for digest in digests):
            raise drawn_anew(f"the data ({type(self._items).__name__})")

    def _reaches(self, count: int) -> bool:
        """Whether there are so many; they are read."""
        try:
            self._left = iter(self._items) if self._left is None else self._left
            while len(self._read) < count:
                item = next(self._left, _END)
                if item is _END:
                    return False
                self._read.append(item)
                self._bytes += _bytes_of(item)
                if self._bytes > _most_bytes():
                    raise InputError(
                        f"the data ({type(self._items).__name__}) takes half of this machine's "
                        f"memory after {len(self._read)} examples, and goes on. Say how many are "
                        "needed: limit=, selection_limit= and held_out_limit=."
                    )
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"reading example {len(self._read)} of the data ({type(self._items).__name__}) "
                f"failed: {type(error).__name__}: {error}"
            ) from error
        return True

    def __len__(self) -> int:
        while self._reaches(len(self._read) + 1):
            pass
        return len(self._read)

    def __getitem__(self, item: Any) -> Any:
        if isinstance(item, int) and item >= 0:
            self._reaches(item + 1)
        else:
            len(self)
        return self._read[item]


def as_examples(data: object) -> GivenExamples | Stream:
    """The examples of a sequence, a data set, a loader, a stream, or of columns by name.

    Raises:
        InputError: ``data`` is none of them.
    """
    if isinstance(data, GivenExamples | Stream):
        return data
    if isinstance(data, ReadExamples):
        return GivenExamples(data, collate=data.collate, account=data.account)
    if isinstance(data, DataLoader):
        return _of_loader(data)
    if isinstance(data, IterableDataset):
        return Stream(data)
    if isinstance(data, Mapping):
        return GivenExamples(_Columns(data))
    if isinstance(data, torch.Tensor | np.ndarray) and data.ndim == 0:
        raise InputError(f"data is a single number; {EXPECTED}.")
    if is_arrays(data):
        data = ArrayPairs(*data)
    if is_hub_data(data):
        data = HubRecords(data)
    if isinstance(data, list) and len(data) == 2 and all(map(_is_array, data)):
        raise InputError(
            f"data is a list of {len(data)} arrays ({describe(data[0])}, {describe(data[1])}); "
            "expected examples. Give inputs and labels as a tuple, (X, y)."
        )
    if isinstance(data, str | bytes | Set) or not _is_iterable(data):
        raise InputError(f"data is {type(data).__name__}; {EXPECTED}.")
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return GivenExamples(data, account=_account_of(data))
    if isinstance(data, Dataset):
        raise InputError(f"the data set {type(data).__name__} has no length; give it __len__.")
    return Stream(cast("Iterable[Any]", data))


def _account_of(data: object) -> Account | None:
    """What a data set says of the source that it reads."""
    account = getattr(data, "account", None)
    return account if isinstance(account, Account) else None


def up_to(data: object, limit: int | None) -> GivenExamples:
    """The examples of any data; of a stream the first ``limit`` ones."""
    found = as_examples(data)
    if isinstance(found, GivenExamples):
        return found
    return found.first(len(found) if limit is None else limit)


@functools.cache
def _most_bytes() -> float:
    """Half of this machine's memory; no bound where it isn't told."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
    except (AttributeError, ValueError, OSError):
        return math.inf


def _bytes_of(value: Any) -> int:
    """Of the tensors and arrays in an example."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return int(value.nbytes)
    if isinstance(value, Mapping | tuple | list):
        return sum(map(_bytes_of, value.values() if isinstance(value, Mapping) else value))
    return 0


def _is_data_set(values: object) -> bool:
    """Whether these are examples, not the entries of one column."""
    first = values[0] if isinstance(values, list | tuple) and len(values) > 0 else None
    return (
        isinstance(values, Dataset | DataLoader | Mapping)
        or hasattr(values, "column_names")
        or isinstance(first, Mapping)
        or (isinstance(first, tuple) and any(map(_is_array, first)))
    )


def _is_array(value: object) -> bool:
    return isinstance(value, torch.Tensor | np.ndarray) and value.ndim > 0


def _is_iterable(data: object) -> bool:
    return hasattr(data, "__iter__") or hasattr(data, "__getitem__")


class _Columns(Sequence[Any]):
    """Examples by columns: a mapping, such as what a tokenizer gives for several texts."""

    def __init__(self, columns: Mapping[Any, Any]) -> None:
        self.columns = dict(columns)
        for name, values in self.columns.items():
            if _is_data_set(values):
                raise InputError(
                    f"data is a mapping of several data sets ({', '.join(map(str, columns))}); "
                    "give one of them, or three as rankfold.Data(calibration=, selection=, "
                    "held_out=)."
                )
            if not isinstance(values, Sized) or isinstance(values, str | bytes):
                raise InputError(
                    f"data is a mapping whose {name!r} is {describe(values)}; expected columns: "
                    "a list, array or tensor with an entry for each example."
                )
        if not self.columns:
            raise InputError(f"data is an empty mapping; {EXPECTED}.")
        lengths = {str(name): len(values) for name, values in self.columns.items()}
        if len({*lengths.values()}) != 1:
            listed = ", ".join(f"{name}: {length}" for name, length in lengths.items())
            raise InputError(
                f"data is a mapping of columns of unequal lengths ({listed}); expected "
                "an entry for each example in every column."
            )

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, place: Any) -> Any:
        return {name: values[place] for name, values in self.columns.items()}


def _of_loader(loader: DataLoader[Any]) -> GivenExamples | Stream:
    """What a loader yields, one example after the other, before it makes batches of them.

    Where it makes no batches itself, its batches are taken apart.
    """
    stacks = loader.collate_fn is default_collate or loader.collate_fn is default_convert
    read: object = loader.dataset
    own = read.collate if isinstance(read, ReadExamples) else None
    collate = own if stacks else loader.collate_fn
    kind = type(loader)
    custom = (
        kind.__iter__ is not DataLoader.__iter__
        or kind._get_iterator is not DataLoader._get_iterator
    )
    if custom or loader.batch_sampler is None:
        return Stream(_Parts(loader))
    in_workers = loader.num_workers > 0 and loader.worker_init_fn is not None
    if isinstance(loader.dataset, IterableDataset) or in_workers:
        return Stream(_Samples(loader), collate)
    try:
        count = len(loader)
    except (TypeError, NotImplementedError):  # a sampler without a length, perhaps without an end
        return Stream(_Samples(loader), collate)
    draws = [place for batch in islice(_drawn(loader), count) for place in batch]
    once = _each_once(draws)
    account = _account_of(read)
    counts = {
        ONCE: len(draws) - len(once),
        NOT_DRAWN: 0 if account is None else account.used - len(once),
    }
    left_out = {reason: count for reason, count in counts.items() if count}
    return GivenExamples(loader.dataset, once, collate=collate, left_out=left_out, account=account)


def _each_once(draws: list[Any]) -> list[Any]:
    """Numbers in their order; other names of examples as they come; lists of them all."""
    try:
        return sorted({operator.index(place) for place in draws})
    except TypeError:
        pass
    try:
        return [*dict.fromkeys(draws)]
    except TypeError:
        return draws


def _unbatched(examples: Any) -> Any:
    return examples


def _without_collate(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The same loader, that yields the lists of examples which batches would be made of."""
    other = copy.copy(loader)
    other.collate_fn, other.pin_memory = _unbatched, False
    other.__dict__["_iterator"] = None  # of workers that stay: they collate
    return other


def _drawn(loader: DataLoader[Any]) -> Iterator[list[Any]]:
    """The numbers of the examples of each batch, by the loader's samplers and generators."""
    other = _without_collate(loader)
    other.__dict__["dataset"] = _Numbers()
    other.num_workers, other.timeout, other.prefetch_factor = 0, 0, None
    return iter(other)


class _Numbers(Dataset[Any]):
    """Gives for a number the number."""

    def __getitem__(self, place: Any) -> Any:
        return place


@dataclasses.dataclass(frozen=True)
class _Samples:
    """The examples that a loader makes batches of, by its workers."""

    loader: DataLoader[Any]

    def __iter__(self) -> Iterator[Any]:
        for examples in _without_collate(self.loader):
            yield from map(_copied, examples) if self.loader.num_workers else examples


@dataclasses.dataclass(frozen=True)
class _Parts:
    """The examples of the batches that a loader yields."""

    loader: DataLoader[Any]

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            yield from map(_copied, _taken_apart(batch))


def _copied(value: Any) -> Any:
    """With memory of its own: what workers share is limited by the number of open files."""
    if torch.is_tensor(value):
        return value.clone()
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map(_copied, value)) if type(value) in (tuple, list) else value
    return value


def _taken_apart(batch: Any) -> list[Any]:
    """The examples of a batch: what stands at each place of the first axis.

    Raises:
        InputError: It has none that all in it share, or it may be one example as well.
    """
    lengths = {*_lengths(batch)}
    if len(lengths) != 1 or None in lengths or not _has_examples(batch):
        raise InputError(
            f"the loader yields {describe(batch)}, which isn't a batch whose tensors have an "
            "example at each place of their first axis, inputs of two axes or more. Give the "
            "loader a batch_size (batch_size=None means that the data set gives ready batches), "
            "or the data set itself."
        )
    (count,) = lengths
    return [_example_at(batch, place) for place in range(cast("int", count))]


def _lengths(batch: Any) -> Iterator[int | None]:
    if isinstance(batch, Mapping):
        for item in batch.values():
            yield from _lengths(item)
    elif isinstance(batch, tuple | list) and any(map(_is_part, batch)):
        for item in batch:
            yield from _lengths(item)
    elif isinstance(batch, list | tuple):
        yield len(batch)
    else:
        yield len(batch) if _is_array(batch) else None


def _is_part(value: Any) -> bool:
    return _is_array(value) or isinstance(value, Mapping)


def _has_examples(batch: Any) -> bool:
    """Whether the first tensor in it has an axis beside that of the examples."""
    if isinstance(batch, Mapping):
        return any(map(_has_examples, batch.values()))
    if isinstance(batch, tuple | list):
        return any(map(_is_part, batch)) and _has_examples(batch[0])
    return _is_array(batch) and batch.ndim > 1


def _example_at(batch: Any, place: int) -> Any:
    if isinstance(batch, Mapping):
        return {key: _example_at(item, place) for key, item in batch.items()}
    if isinstance(batch, tuple | list) and any(map(_is_part, batch)):
        return tuple(_example_at(item, place) for item in batch)
    return batch[place]
