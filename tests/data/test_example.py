"""What torch's ``default_collate`` takes is taken as the same tensors would be, or refused."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import default_collate

from rankfold.data.example import example_digest, plain_example
from rankfold.data.parts import PARTS, as_part, refuse_overlap, split
from rankfold.errors import InputError

Image = pytest.importorskip("PIL.Image")
Pair = namedtuple("Pair", ["x", "y"])

COUNT = 12
INPUTS = torch.randn(COUNT, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(COUNT) % 3
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, 6, 4, 3), dtype=np.uint8)
IDS = torch.randint(0, 90, (COUNT, 9), generator=torch.Generator().manual_seed(1))


def plain(example: object) -> Any:
    return plain_example(example, "an example")[0]


# Ways to write the pair of an input and its label that are no tensors.
WAYS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "arrays": lambda x, y: (x.numpy(), y.numpy()),
    "array, number": lambda x, y: (x.numpy(), int(y)),
    "array, NumPy's number": lambda x, y: (x.numpy(), np.int64(y)),
    "tensor, small number of NumPy's": lambda x, y: (x, np.int64(y)),
    "list, number": lambda x, y: (x.tolist(), int(y)),
    "a list of both": lambda x, y: [x, y],
    "named": lambda x, y: Pair(x, int(y)),
    "list of NumPy's numbers": lambda x, y: (list(x.numpy()), int(y)),
    "reversed view": lambda x, y: (x.flip(0).numpy()[::-1], int(y)),
    "other order of bytes": lambda x, y: (x.numpy().astype(">f4"), int(y)),
    "needs a gradient": lambda x, y: (x.clone().requires_grad_(), y),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_pair_is_what_its_tensors_are(way: str) -> None:
    truth = as_part("held_out", list(zip(INPUTS, LABELS, strict=True)))
    part = as_part("held_out", [WAYS[way](x, y) for x, y in zip(INPUTS, LABELS, strict=True)])
    assert part.digests == truth.digests and part.digest == truth.digest
    for found, wanted in zip(part.collate(part.examples), (INPUTS, LABELS), strict=True):
        assert torch.equal(found, wanted) and found.dtype == wanted.dtype


@pytest.mark.parametrize("way", WAYS)
def test_the_same_input_in_two_parts_is_found_however_it_is_written(way: str) -> None:
    first = as_part("calibration", list(zip(INPUTS, LABELS, strict=True)))
    second = as_part("held_out", [WAYS[way](INPUTS[3], (LABELS[3] + 1) % 3)])
    with pytest.raises(InputError, match=r"share 1 examples .*3 = 0"):
        refuse_overlap([first, second])


MAPPINGS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "lists": lambda row: {key: value.tolist() for key, value in row.items()},
    "arrays": lambda row: {key: value.numpy() for key, value in row.items()},
    "a batch axis": lambda row: {k: v[None] if v.dim() else v for k, v in row.items()},
    "a batch axis, of the label too": lambda row: {k: v[None] for k, v in row.items()},
    "ordered": OrderedDict,
    "a user's": UserDict,
    "with texts": lambda row: {"text": "some words", **row, "words": ["some", "words"]},
    "with bytes": lambda row: {**row, "raw": b"some words"},
    "with an array of texts": lambda row: {**row, "names": np.array(["some", "words"])},
}


@pytest.mark.parametrize("way", MAPPINGS)
def test_a_mapping_is_what_its_tensors_are(way: str) -> None:
    rows = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": label}
        for ids, label in zip(IDS, LABELS, strict=True)
    ]
    truth = as_part("held_out", rows)
    part = as_part("held_out", [MAPPINGS[way](row) for row in rows])
    assert part.digests == truth.digests
    for key, wanted in truth.collate(truth.examples).items():
        assert torch.equal(part.collate(part.examples)[key], wanted), key
    texts = {"with texts": ("text", "words"), "with bytes": ("raw",)}
    assert part.columns == (("names",) if way == "with an array of texts" else texts.get(way, ()))


def test_columns_of_texts_are_left_out_by_name() -> None:
    _, texts = plain_example({"text": "a", "x": [1.0], "id": np.str_("b")}, "example")
    assert texts == ("text", "id")
    assert as_part("calibration", [{"x": [1.0], "t": "a"}] * 3).usage()["columns_left_out"] == ["t"]


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_images_are_taken_as_to_tensor_takes_them(mode: str) -> None:
    images = [Image.fromarray(one).convert(mode) for one in PIXELS]
    part = as_part("calibration", list(zip(images, LABELS, strict=True)))
    batch, _ = part.collate(part.examples)
    wanted = np.stack([np.array(image) for image in images]).reshape(COUNT, 6, 4, -1)
    assert torch.equal(batch, torch.from_numpy(wanted).permute(0, 3, 1, 2).float() / 255)


@pytest.mark.parametrize("mode", ["P", "RGBA", "CMYK", "I;16", "F", "1", "LA"])
def test_images_whose_values_mean_something_else_are_refused(mode: str) -> None:
    image = Image.new(mode, (4, 4))
    with pytest.raises(InputError, match=f"of mode {mode}; expected L or RGB"):
        plain((image, 1))


numbers = st.one_of(
    st.integers(-(2**40), 2**40),
    st.floats(-1e6, 1e6, width=32),
    st.booleans(),
    st.integers(-100, 100).map(np.int16),
    st.floats(-1e3, 1e3, width=32).map(np.float32),
)
arrays = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(
    lambda sides: np.arange(np.prod(sides), dtype=np.float32).reshape(sides)
)
values = st.one_of(numbers, arrays, arrays.map(torch.from_numpy))
several = st.lists(arrays, min_size=1, max_size=3)
examples = st.one_of(
    values,
    st.tuples(values, values),
    st.tuples(several, numbers),
    st.tuples(st.tuples(arrays, arrays), values),
    st.dictionaries(st.sampled_from(["a", "b", "c"]), several, min_size=1),
    st.dictionaries(st.sampled_from(["a", "b", "c"]), values, min_size=1),
    st.tuples(st.dictionaries(st.sampled_from(["a", "b"]), values, min_size=1), numbers),
)


def flat(batch: Any) -> list[Tensor]:
    if isinstance(batch, dict):
        return [tensor for key in sorted(batch) for tensor in flat(batch[key])]
    return [t for v in batch for t in flat(v)] if isinstance(batch, tuple | list) else [batch]


@settings(max_examples=150, deadline=None)
@given(example=examples, count=st.integers(1, 3))
def test_batches_are_those_of_default_collate(example: Any, count: int) -> None:
    part = as_part("calibration", [example] * count)
    found, wanted = flat(part.collate(part.examples)), flat(default_collate([example] * count))
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        # A number of Python's is float64 there.
        assert torch.equal(one, other.to(one.dtype)) and one.shape == other.shape
        assert one.is_floating_point() == other.is_floating_point()


@settings(max_examples=100, deadline=None)
@given(example=examples)
def test_what_is_plain_stays_as_it_is(example: Any) -> None:
    once = plain(example)
    assert [*map(str, flat(plain(once)))] == [*map(str, flat(once))]
    assert example_digest(plain(once)) == example_digest(once)


REFUSED: dict[str, tuple[Any, str]] = {
    "none": (None, "example 0 of the calibration data is NoneType; expected tensors"),
    "none as label": ((torch.zeros(3), None), "item 1 is NoneType"),
    "none in a column": ({"x": None, "labels": 1}, "column 'x' is NoneType"),
    "text": ("some words", r"is str; .* Tokenize it"),
    "text and label": (("some words", 1), r"item 0 is str; .* Tokenize it"),
    "label as text": ({"x": [1.0], "label": "good"}, "column 'label' is the text 'good'"),
    "label of a pair as text": ((torch.zeros(3), "good"), "item 1 is str"),
    "texts alone": ({"text": "some words", "title": "a"}, "has no input for the model"),
    "label alone": ({"labels": 1}, "has no input for the model"),
    "empty mapping": ({}, "has no input for the model"),
    "empty list": ([], "is an empty list"),
    "empty tuple": ((), "is an empty list"),
    "empty column": ({"input_ids": [], "labels": 1}, "column 'input_ids' is an empty list"),
    "ragged": ({"x": [[1.0, 2.0], [3.0]]}, "rows of unequal lengths"),
    "rows or a pair": ([[1.0, 2.0], [3.0, 4.0]], "one input or an input and its label"),
    "a date": ({"day": date(2020, 1, 1)}, "column 'day' is date"),
    "dates": ({"day": np.datetime64("2020-01-01")}, "column 'day' can't be made a tensor"),
    "objects": ({"x": np.array([{}, []], dtype=object)}, "can't be made a tensor"),
    "decimal": ({"x": Decimal("1.5")}, "column 'x'"),
    "fraction": ({"x": Fraction(1, 3)}, "column 'x'"),
    "too large": ({"x": [2**70]}, "can't be made a tensor"),
    "structured": (np.zeros(2, dtype=[("a", "f4"), ("b", "i4")])[0], "can't be made a tensor"),
    "texts among numbers": ({"x": [1.0, "two"]}, "item 1 is str"),
    "sparse": ((torch.eye(3).to_sparse(), 1), "a sparse or nested tensor"),
    "meta": ((torch.zeros(3, device="meta"), 1), "a meta tensor"),
    "a set": (({1, 2}, 1), "item 0 is set"),
    "a function": ((len, 1), "item 0 is builtin_function_or_method"),
    "a layer": ((torch.nn.Linear(2, 2), 1), "item 0 is Linear"),
    "a file in memory": ({"image": {"bytes": b"123", "path": None}}, "column 'image'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_everything_else_is_refused_by_name(name: str) -> None:
    example, said = REFUSED[name]
    with pytest.raises(InputError, match=said):
        as_part("calibration", [example])


UNLIKE: dict[str, tuple[Any, Any]] = {
    "without a label": ({"x": [1.0], "labels": 1}, {"x": [1.0]}),
    "with a label": ({"x": [1.0]}, {"x": [1.0], "labels": 1}),
    "a pair among inputs": (torch.zeros(3), (torch.zeros(3), 1)),
    "a triple among pairs": ((torch.zeros(3), 1), (torch.zeros(3), 1, 2)),
    "another column": ({"x": [1.0]}, {"y": [1.0]}),
    "values among ids": (torch.zeros(3).long(), torch.zeros(3)),
    "text in one only": ({"x": [1.0], "t": 1}, {"x": [1.0], "t": "one"}),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_examples_of_another_kind_are_refused_by_number(name: str) -> None:
    first, other = UNLIKE[name]
    with pytest.raises(
        InputError, match=r"example 2 of the held-out data is .*, and example 0 .*labels"
    ):
        as_part("held_out", [first, first, other])


def test_whole_numbers_beside_others_are_those_too() -> None:
    part = as_part("calibration", [(INPUTS[0], 1), (INPUTS[1], 2.5)])
    assert part.collate(part.examples)[1].tolist() == [1.0, 2.5]


def test_rows_of_an_array_of_pairs_are_pairs() -> None:
    pairs = np.empty((COUNT, 2), dtype=object)
    for place in range(COUNT):
        pairs[place] = [INPUTS[place].numpy(), int(LABELS[place])]
    truth = as_part("held_out", list(zip(INPUTS, LABELS, strict=True)))
    assert as_part("held_out", pairs).digests == truth.digests


def test_an_input_alone_in_a_tuple_is_the_input() -> None:
    (first, *_), (other, *_) = ([(INPUTS[0],)], [(INPUTS[0], 1)])
    assert example_digest(first) == example_digest(other) == example_digest(INPUTS[0])


def test_a_collate_function_may_change_what_it_is_given() -> None:
    def takes_away(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {"labels": torch.tensor([row.pop("label") for row in rows])} | {
            "x": torch.tensor([row.pop("x") for row in rows])
        }

    part = as_part("calibration", [{"x": [1.0, 2.0], "label": 3}] * 4, takes_away)
    for _ in range(2):
        assert part.collate(part.examples)["labels"].tolist() == [3] * 4


def test_a_collate_function_that_fails_is_named_with_what_it_got() -> None:
    part = as_part("calibration", [{"x": [1.0]}], lambda rows: rows[0]["y"])
    with pytest.raises(InputError, match=r"collate function can't make a batch of .*KeyError: 'y'"):
        part.batches()


def test_texts_for_a_collate_function_are_compared_by_their_letters() -> None:
    def collate(rows: list[dict[str, Any]]) -> Tensor:
        return torch.tensor([[len(row["text"])] for row in rows])

    first = as_part("calibration", [{"text": t, "label": 1} for t in "abc"], collate)
    second = as_part("held_out", [{"text": t, "label": 2} for t in "xbz"], collate)
    with pytest.raises(InputError, match=r"share 1 examples .*1 = 1"):
        refuse_overlap([first, second])
    assert [len(batch) for batch in first.batches(2)] == [2, 1]


class _Each(torch.utils.data.Dataset):
    """Examples that a function makes of their number."""

    def __init__(self, make: Any) -> None:
        self.make = make

    def __len__(self) -> int:
        return 40

    def __getitem__(self, place: int) -> Any:
        return self.make(place)


class _Streamed(torch.utils.data.IterableDataset):
    def __init__(self, make: Any) -> None:
        self.make = make

    def __iter__(self) -> Any:
        return map(self.make, range(40))


MEMORY = torch.zeros(5)
DRAWS: dict[str, Any] = {
    "inputs": lambda place: (torch.randn(5) + place, place % 3),
    "labels": lambda place: (torch.ones(5) * place, int(torch.randint(1000, ()))),
    "now and then": lambda place: (torch.full((5,), place) + (torch.rand(()) < 0.3), place % 3),
    "numpy's": lambda place: {"x": np.random.rand(5) + place, "labels": place % 3},
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("how", ["part", "split", "loader", "stream"])
def test_data_that_draw_their_examples_anew_are_refused(name: str, how: str) -> None:
    data: Any = _Each(DRAWS[name])
    if how == "loader":
        data = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
    if how == "stream":
        data = _Streamed(DRAWS[name])
    with pytest.raises(InputError, match="gives other examples each time that it is read"):
        if how == "part":
            as_part("calibration", data)
        else:
            found = split(data, 0)
            for part in PARTS:
                as_part(part, getattr(found, part))


def test_data_that_give_the_same_or_can_be_read_once_are_taken() -> None:
    def same(place: int) -> Any:
        return torch.full((5,), float(place)), place % 3

    shuffled = torch.utils.data.DataLoader(_Streamed(same), batch_size=4)
    assert len(as_part("calibration", shuffled).examples) == 40
    for data in (_Each(same), _Streamed(same), map(DRAWS["inputs"], range(40))):
        found = split(data, 0)
        assert sum(len(as_part(part, getattr(found, part)).examples) for part in PARTS) == 40
    drawn = [DRAWS["inputs"](place) for place in range(40)]
    assert as_part("calibration", drawn).usage()["drawn_anew"] is False


def test_examples_in_one_and_the_same_memory_are_refused() -> None:
    def shared(place: int) -> Any:
        return MEMORY.fill_(place), place % 3

    with pytest.raises(InputError, match="writes every example into the memory"):
        as_part("calibration", _Each(shared))
    with pytest.raises(InputError, match="writes every example into the memory"):
        as_part("held_out", split(_Each(shared), 0).held_out)


def test_an_example_is_named_by_its_number_in_the_users_data() -> None:
    rows: list[Any] = [(INPUTS[place % COUNT] + place, 1) for place in range(60)]
    held_out: Any = split(rows, 0).held_out
    number = held_out.places[2]
    rows[number] = (INPUTS[0], 1, 2)
    with pytest.raises(InputError, match=f"example {number} of the held-out data"):
        as_part("held_out", held_out)
