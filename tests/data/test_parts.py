from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from rankfold.data.example import example_digest
from rankfold.data.given import as_examples
from rankfold.data.parts import (
    PARTS,
    Data,
    as_part,
    refuse_overlap,
    refuse_unlike,
    select_part,
    split,
)
from rankfold.errors import InputError


def numbers(data: Data) -> dict[str, list[int]]:
    return {part: [int(example[0]) for example in getattr(data, part)] for part in PARTS}


def windows(count: int) -> list[torch.Tensor]:
    return [torch.tensor([number, 7]) for number in range(count)]


@settings(max_examples=30, deadline=None)
@given(count=st.integers(40, 200), seed=st.integers(0, 1000), block=st.integers(1, 3))
def test_split_is_disjoint_complete_and_seeded(count: int, seed: int, block: int) -> None:
    found = numbers(split(windows(count), seed, block=block))
    together = [number for part in found.values() for number in part]
    assert sorted(together) == list(range(count))
    assert found == numbers(split(windows(count), seed, block=block))
    sizes = [len(part) / count for part in found.values()]
    assert sizes == pytest.approx([0.5, 0.2, 0.3], abs=0.08)


def test_blocks_stay_together() -> None:
    for part in numbers(split(windows(100), seed=1, block=5)).values():
        blocks = [part[start : start + 5] for start in range(0, len(part), 5)]
        assert all(block == list(range(block[0], block[0] + 5)) for block in blocks)


def test_duplicates_are_dropped_so_that_none_lands_in_two_parts() -> None:
    data = split(windows(50) * 3, seed=0)
    assert sum(len(part) for part in numbers(data).values()) == 50
    refuse_overlap([select_part(data, part, None, 0) for part in PARTS])


def test_overlap_is_refused_and_named() -> None:
    first, second = as_part("calibration", windows(9)), as_part("held_out", windows(12)[7:])
    with pytest.raises(InputError, match=r"calibration and held-out .* 2 examples .*7 = 0, 8 = 1"):
        refuse_overlap([first, second])


def test_labels_do_not_hide_an_overlap() -> None:
    image = torch.rand(3, 4, 4)
    assert example_digest((image, 1)) == example_digest((image, torch.tensor(2)))
    assert example_digest((image, 1)) != example_digest((image + 1e-6, 1))
    assert example_digest({"input_ids": [1, 2], "labels": [1]}) == example_digest(
        {"labels": [0], "input_ids": [1, 2]}
    )


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(windows(5))


@pytest.mark.parametrize(
    "data",
    [
        windows(5),
        tuple(windows(5)),
        torch.stack(windows(5)),
        TensorDataset(torch.stack(windows(5))),
        DataLoader(windows(5), batch_size=2),
        Stream(),
        iter(windows(5)),
    ],
    ids=lambda data: type(data).__name__,
)
def test_every_kind_of_data_set_is_taken(data: object) -> None:
    examples = as_examples(data)
    assert len(examples) == 5
    first = examples[0]
    assert torch.equal(first if torch.is_tensor(first) else first[0], torch.tensor([0, 7]))


def test_a_loaders_own_collate_is_kept() -> None:
    def collate(examples: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(examples) + 1

    loader = DataLoader(windows(50), batch_size=2, collate_fn=collate)
    part = select_part(split(loader, 0), "selection", None, 0)
    assert torch.equal(part.collate(windows(1)), torch.tensor([[1, 8]]))


@pytest.mark.parametrize("data", [5, "text", None, {"a": 1}.keys()])
def test_what_is_no_data_is_refused(data: object) -> None:
    with pytest.raises(InputError, match="expected a data set"):
        as_examples(data)


def test_too_few_examples_are_refused() -> None:
    with pytest.raises(InputError, match=r"11 different examples.*too few"):
        split(windows(11), 0)
    with pytest.raises(InputError, match="held-out part has 1 examples"):
        Data(windows(9), windows(9), windows(1))


def test_limit_draws_by_seed() -> None:
    data = Data(windows(50), windows(9), windows(9))
    draws = [select_part(data, "calibration", 10, seed).digest for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert len(select_part(data, "calibration", 10, 0).examples) == 10


def test_spread_examples_come_from_all_over_the_part() -> None:
    part = as_part("calibration", [torch.tensor([place]) for place in range(10)])
    for count, expected in ((1, [0]), (4, [0, 2, 5, 7]), (10, [*range(10)])):
        assert [int(example) for example in part.spread(count).examples] == expected


def test_batches_hold_one_shape_each() -> None:
    examples = [torch.zeros(length, dtype=torch.long) for length in (4, 4, 4, 6, 6, 4)]
    part = as_part("calibration", [e + i for i, e in enumerate(examples)])
    assert [len(batch) for batch in part.batches(2)] == [2, 1, 2, 1]
    assert [len(batch) for batch in part.batches()] == [3, 2, 1]


@pytest.mark.parametrize(
    ("example", "size"),
    [
        (torch.zeros(512, dtype=torch.int64), 1),
        (torch.zeros(2048, dtype=torch.int64), 1),
        (torch.zeros(24, dtype=torch.int64), 21),
        ({"input_ids": torch.zeros(128, dtype=torch.int64)}, 4),
        (torch.zeros(3, 224, 224), 6),
        (torch.zeros(3, 32, 32), 256),
    ],
)
def test_batches_hold_512_tokens_or_a_million_values(example: object, size: int) -> None:
    part = as_part("calibration", [example] * 300)
    assert max(map(len, part.batches())) == size


@pytest.mark.parametrize("limit", [9, 20, None])
def test_messages_name_examples_by_their_numbers_in_what_was_given(limit: int | None) -> None:
    shared = torch.tensor([99, 7])
    given = [*windows(30)[8:], shared]  # 23, the last of which is shared
    data = Data([shared, *windows(8)], given, windows(8))
    chosen = select_part(data, "selection", limit, 3)
    numbers = [chosen.number(place) for place in range(len(chosen.examples))]
    assert [int(given[number][0]) for number in numbers] == [int(e[0]) for e in chosen.examples]
    if 22 in numbers:
        with pytest.raises(InputError, match=r"share 1 examples .*: 0 = 22\)"):
            refuse_overlap([select_part(data, "calibration", None, 0), chosen])
    halves = chosen.take(range(1, len(numbers), 2))
    assert [halves.number(place) for place in range(len(halves.examples))] == numbers[1::2]


@pytest.mark.parametrize(
    "other", [{"x": [1.0]}, {"x": [1], "labels": 1}, {"y": [1.0], "labels": 1}, ([1.0], 1)], ids=str
)
def test_parts_of_different_kinds_are_refused_by_name(other: Any) -> None:
    first, second = [{"x": [1.0], "labels": 1}], [{"x": [2.0], "labels": 1.5}]
    refuse_unlike([as_part("calibration", first), as_part("selection", second)])
    with pytest.raises(
        InputError, match=r"calibration part are \{x: .* held-out part .* all parts"
    ):
        refuse_unlike([as_part("calibration", first), as_part("held_out", [other])])
