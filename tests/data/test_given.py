"""What a loader yields is what counts, and a stream is read no further than it is needed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)
from torch.utils.data.distributed import DistributedSampler

from rankfold.data.given import ONCE, GivenExamples, Stream, as_examples, up_to
from rankfold.data.parts import PARTS, SAME, Data, as_part, select_part, split
from rankfold.errors import InputError

COUNT = 60
INPUTS = torch.arange(COUNT * 3.0).view(COUNT, 3)
LABELS = torch.arange(COUNT) % 4
EVERYTHING = TensorDataset(INPUTS, LABELS)


def number(example: Any) -> int:
    """Which of ``EVERYTHING`` an example is."""
    inputs = example["x"] if isinstance(example, dict) else example[0]
    return int(inputs[0]) // 3


def read(data: object) -> list[int]:
    return [number(example) for example in up_to(data, None)]


def yielded(loader: Any) -> list[int]:
    """What the loader itself yields, in batches of pairs."""
    return [int(row[0]) // 3 for inputs, _ in loader for row in inputs]


class Sharded(IterableDataset):
    """Each worker gives its share."""

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for place in range(first, COUNT, step):
            yield INPUTS[place], int(LABELS[place])


class Batches(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        for start in range(0, COUNT, 16):
            yield INPUTS[start : start + 16], LABELS[start : start + 16]


class Named(Dataset):
    """A whole batch for a list of numbers."""

    def __getitem__(self, places: list[int]) -> dict[str, Tensor]:
        return {"x": INPUTS[places], "labels": LABELS[places]}


class Halved(DataLoader):
    """A loader of its own way: every other batch."""

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(super().__iter__(), 0, None, 2)


class Opened(Dataset):
    """As data in a file that each worker opens for itself."""

    values: Tensor | None = None

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, place: int) -> Any:
        assert self.values is not None
        return self.values[place], int(LABELS[place])


def open_it(_: int) -> None:
    worker = get_worker_info()
    assert worker is not None
    worker.dataset.values = INPUTS


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


LOADERS = {
    "plain": lambda: DataLoader(EVERYTHING, batch_size=16),
    "shuffled": lambda: DataLoader(EVERYTHING, batch_size=16, shuffle=True),
    "last batch dropped": lambda: DataLoader(EVERYTHING, batch_size=16, drop_last=True),
    "generator": lambda: DataLoader(
        EVERYTHING, batch_size=16, shuffle=True, drop_last=True, generator=seeded()
    ),
    "some drawn": lambda: DataLoader(
        EVERYTHING,
        batch_size=8,
        sampler=RandomSampler(EVERYTHING, num_samples=20),
        generator=seeded(),
    ),
    "a subset's sampler": lambda: DataLoader(
        EVERYTHING, batch_size=16, sampler=SubsetRandomSampler(range(5, 30))
    ),
    "a list as sampler": lambda: DataLoader(EVERYTHING, batch_size=16, sampler=[3, 1, 4]),
    "batch sampler": lambda: DataLoader(
        EVERYTHING, batch_sampler=BatchSampler(SequentialSampler(range(25)), 8, True)
    ),
    "batches as lists": lambda: DataLoader(EVERYTHING, batch_sampler=[[1, 2], [9], [40, 3]]),
    "one of three processes": lambda: DataLoader(
        EVERYTHING, batch_size=4, sampler=DistributedSampler(EVERYTHING, 3, 1, shuffle=False)
    ),
    "ready batches": lambda: DataLoader(Batches(), batch_size=None),
    "whole batches fetched": lambda: DataLoader(
        Named(), batch_size=None, sampler=BatchSampler(SequentialSampler(range(21)), 8, False)
    ),
    "own iteration": lambda: Halved(EVERYTHING, batch_size=8),
    "a stream": lambda: DataLoader(Sharded(), batch_size=7),
    "a stream, last batch dropped": lambda: DataLoader(Sharded(), batch_size=7, drop_last=True),
    "a subset": lambda: DataLoader(Subset(EVERYTHING, range(9, 20)), batch_size=4),
}


@pytest.mark.parametrize("name", LOADERS)
def test_the_examples_are_those_that_the_loader_yields(name: str) -> None:
    torch.manual_seed(3)
    found = read(LOADERS[name]())
    torch.manual_seed(3)
    loader = LOADERS[name]()
    wanted = (
        [int(row[0]) // 3 for batch in loader for row in batch["x"]]
        if name == "whole batches fetched"
        else yielded(loader)
    )
    assert sorted(found) == sorted(wanted) and len(found) > 0


@settings(max_examples=40, deadline=None)
@given(
    draws=st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=80),
    size=st.integers(1, 9),
    drop=st.booleans(),
)
def test_what_any_sampler_draws_is_used_once_and_the_rest_counted(
    draws: list[int], size: int, drop: bool
) -> None:
    loader = DataLoader(EVERYTHING, batch_size=size, sampler=draws, drop_last=drop)
    wanted = yielded(loader)
    found = as_examples(loader)
    assert isinstance(found, GivenExamples)
    assert [number(found[i]) for i in range(len(found))] == sorted(set(wanted))
    assert len(found) + sum(c for c in found.left_out.values() if c) == len(wanted)
    assert ([*found.left_out] == [ONCE]) == (len(set(wanted)) < len(wanted))


def test_workers_share_a_stream_and_open_what_they_need() -> None:
    assert sorted(read(DataLoader(Sharded(), batch_size=4, num_workers=2))) == [*range(COUNT)]
    opened = DataLoader(Opened(), batch_size=8, num_workers=1, worker_init_fn=open_it)
    assert sorted(read(opened)) == [*range(COUNT)]


@pytest.mark.parametrize("kind", [np.int64, torch.tensor, np.uint8], ids=lambda kind: kind.__name__)
def test_numbers_of_any_kind_are_drawn_once(kind: Any) -> None:
    draws = [kind(place) for place in (5, 2, 5, 9, 2)]
    found = as_examples(DataLoader(EVERYTHING, batch_size=2, sampler=draws))
    assert read(found) == [2, 5, 9] and found.left_out == {ONCE: 2}  # type: ignore[union-attr]


def test_examples_by_name_are_drawn_once() -> None:
    class Named(dict):  # type: ignore[type-arg]
        pass

    data: Any = Named(a=EVERYTHING[4], b=EVERYTHING[7])
    found = as_examples(DataLoader(data, batch_size=2, sampler=["b", "a", "b"]))
    assert read(found) == [7, 4] and found.left_out == {ONCE: 1}  # type: ignore[union-attr]


def test_rare_classes_drawn_by_weight_stay_out_where_their_weight_is_zero() -> None:
    loader = DataLoader(
        EVERYTHING, batch_size=8, sampler=WeightedRandomSampler((LABELS != 0).float(), 200)
    )
    data = split(loader, 0)
    for name in PARTS:
        assert {int(label) for _, label in getattr(data, name)} <= {1, 2, 3}
    used = sum(len(getattr(data, name)) for name in PARTS)
    assert used + data.left_out[ONCE] == 200  # type: ignore[operator]


def test_each_parts_loader_keeps_its_own_collate() -> None:
    def plus(amount: int) -> Any:
        return lambda rows: torch.stack([x for x, _ in rows]) + amount

    loaders = [DataLoader(EVERYTHING, batch_size=4, collate_fn=plus(i)) for i in range(3)]
    data = Data(*loaders)
    for place, name in enumerate(PARTS):
        part = select_part(data, name, None, 0)
        assert torch.equal(part.collate(part.examples[:2]), INPUTS[:2] + place)


@pytest.mark.parametrize(
    "batch",
    [
        (torch.zeros(3, 8, 8), 1),  # an example
        (torch.zeros(4, 2), torch.zeros(3)),  # of two lengths
        {"input_ids": torch.zeros(9).long(), "attention_mask": torch.ones(9)},  # either
        (torch.zeros(5), torch.zeros(5)),
        torch.tensor(3.0),
        "text",
        [],
    ],
    ids=str,
)
def test_what_is_no_batch_is_refused_where_the_loader_makes_none(batch: Any) -> None:
    loader: DataLoader[Any] = DataLoader([batch] * 8, batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"the loader yields .* batch_size"):
        read(loader)


def endless() -> Iterator[tuple[Tensor, int]]:
    for place in itertools.count():
        yield torch.full((3,), 3.0 * place), place % 4


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return endless()


class Iterable:
    """As datasets' own streams: no class of torch's."""

    def __iter__(self) -> Iterator[Any]:
        return endless()


class Forever(torch.utils.data.Sampler):
    def __init__(self) -> None:
        pass

    def __iter__(self) -> Iterator[int]:
        return itertools.cycle(range(COUNT))


STREAMS = {
    "stream": Endless,
    "generator": endless,
    "iterable": Iterable,
    "loader": lambda: DataLoader(Endless(), batch_size=4),
    "loader of batches": lambda: DataLoader(
        [(INPUTS, LABELS)] * 8, batch_size=None, sampler=itertools.cycle([0])
    ),
    "a sampler without end": lambda: DataLoader(EVERYTHING, batch_size=4, sampler=Forever()),
    "cycle": lambda: itertools.cycle([(x, y) for x, y in EVERYTHING]),
}


@pytest.mark.parametrize("name", STREAMS)
def test_endless_streams_stop_at_the_limits_and_say_so(name: str) -> None:
    limits = (10, 6, 12)
    data = split(STREAMS[name](), 0, limits=limits)
    for part, limit in zip(PARTS, limits, strict=True):
        assert len(select_part(data, part, limit, 0).examples) <= limit
    reasons = [*data.left_out]
    assert data.left_out["not read: the stream goes on after 41 examples"] is None, reasons


@pytest.mark.parametrize("name", STREAMS)
def test_three_endless_streams_are_read_as_far_as_each_limit(name: str) -> None:
    data = Data(STREAMS[name](), STREAMS[name](), STREAMS[name]())  # type: ignore[arg-type]
    part = select_part(data, "selection", 9, 0)
    assert [number(example) for example in part.examples] == [*range(9)]
    assert part.usage()["left_out"] == {"not read: the stream goes on after 9 examples": None}
    again = select_part(data, "selection", 12, 0)
    assert [number(example) for example in again.examples] == [*range(12)]


def test_a_stream_that_ends_is_used_whole() -> None:
    data = split(itertools.islice(endless(), 40), 0, limits=(100, 100, 100))
    assert data.left_out == {} and sum(len(getattr(data, name)) for name in PARTS) == 40
    assert len(Stream(range(5))) == 5 and Stream(range(5))[-1] == 4


@settings(max_examples=30, deadline=None)
@given(
    different=st.integers(20, 60),
    again=st.integers(0, 30),
    limit=st.integers(4, 40),
    seed=st.integers(0, 99),
)
def test_given_are_those_used_and_those_left_out(
    different: int, again: int, limit: int, seed: int
) -> None:
    examples = [(INPUTS[place % different], place) for place in range(different + again)]
    data = split(examples, seed)
    parts = [select_part(data, name, limit, seed).usage() for name in PARTS]
    assert data.left_out == ({SAME: again} if again else {})
    for part in parts:
        assert part["given"] == part["examples"] + sum(part["left_out"].values())
    assert sum(part["given"] for part in parts) + again == len(examples)


def test_columns_by_name_are_examples() -> None:
    for columns in (
        {"x": INPUTS, "labels": LABELS},
        {"x": INPUTS.numpy(), "labels": LABELS.tolist()},
        {"x": INPUTS.tolist(), "labels": LABELS.numpy()},
    ):
        part = as_part("calibration", columns)
        assert len(part.examples) == COUNT
        assert torch.equal(part.examples[5]["x"], INPUTS[5])
        assert int(part.examples[5]["labels"]) == int(LABELS[5])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"x": INPUTS, "labels": LABELS[:5]}, "columns of unequal lengths .x: 60, labels: 5"),
        ({"x": INPUTS, "labels": 3}, "whose 'labels' is int; expected columns"),
        ({}, "data is an empty mapping"),
        ({"train": EVERYTHING, "test": EVERYTHING}, "several data sets .train, test"),
        (
            {name: [*zip(INPUTS, LABELS, strict=True)] for name in PARTS},
            r"several data sets .*rankfold.Data\(calibration=",
        ),
        ([INPUTS, LABELS], r"as a tuple, \(X, y\)"),
        ([INPUTS.numpy(), LABELS.numpy()], r"as a tuple, \(X, y\)"),
        (torch.tensor(3.0), "a single number"),
        (np.array(3.0), "a single number"),
        ({1, 2}, "data is set; expected a data set"),
        (len, "data is builtin_function_or_method"),
        (b"bytes", "data is bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_holds_no_examples_is_refused_by_name(data: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        as_examples(data)


class Broken(Dataset):
    def __len__(self) -> int:
        return 9

    def __getitem__(self, place: int) -> Any:
        return {"a": 1}[place]  # type: ignore[index]


def test_what_a_users_data_raises_is_told_with_the_example() -> None:
    with pytest.raises(InputError, match=r"reading example 0 of the data \(Broken\).*KeyError: 0"):
        as_part("calibration", Broken())

    def fails() -> Iterator[Any]:
        yield torch.zeros(2)
        raise TypeError("nothing more")

    with pytest.raises(InputError, match=r"reading example 1 of .*TypeError: nothing more"):
        as_part("calibration", fails())


def test_a_stream_stops_before_it_fills_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankfold.data.given._most_bytes", lambda: 3 * 4 * 100)
    with pytest.raises(InputError, match=r"after 101 examples, .* limit=, selection_limit="):
        split(endless(), 0, limits=(2048, 2048, 10000))
    assert len(split(endless(), 0, limits=(10, 10, 10)).held_out) >= 10
