"""Copies between parts, in the disguises that hide them from a byte-for-byte comparison."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankfold.data.copies import (
    QUOTED,
    TURNED,
    copied_windows,
    look_alikes,
    refuse_copies,
    without_copies,
)
from rankfold.data.parts import Part, as_part
from rankfold.errors import InputError


def text(count: int, length: int, seed: int, vocabulary: int = 300) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (count * length,), generator=generator)


def windows(tokens: Tensor, length: int, name: str) -> Part:
    return as_part(name, list(tokens[: len(tokens) // length * length].split(length)))


def pictures(count: int, seed: int) -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(3, 16, 16, generator=generator), 0) for _ in range(count)]


@pytest.mark.parametrize("length", [32, 64, 512])
@pytest.mark.parametrize("offset", [1, 16, 37])
def test_text_pasted_at_any_offset_is_found(offset: int, length: int) -> None:
    calibration, held_out = text(10, length, seed=0), text(10, length, seed=1)
    held_out[length * 3 : length * 5] = calibration[offset : offset + 2 * length]
    with pytest.raises(InputError, match=r"2 windows of the held-out part .* 3 \(\d+%\), 4 \(\d"):
        refuse_copies(
            [windows(calibration, length, "calibration"), windows(held_out, length, "held_out")]
        )


def test_nearly_identical_windows_are_found() -> None:
    calibration = text(4, 128, seed=0)
    changed = calibration.clone()
    changed[torch.arange(5, len(changed), 60)] += 1  # every 60th token is another one
    with pytest.raises(InputError, match=r"4 windows of the held-out part"):
        refuse_copies([windows(calibration, 128, "calibration"), windows(changed, 128, "held_out")])


def test_a_quotation_is_no_copy() -> None:
    calibration, held_out = text(10, 64, seed=0), text(10, 64, seed=1)
    held_out[70:100] = calibration[200:230]  # 15 of 49 runs of the window
    refuse_copies([windows(calibration, 64, "calibration"), windows(held_out, 64, "held_out")])


def test_windows_in_mappings_are_compared_too() -> None:
    tokens = text(6, 32, seed=0)
    parts = [
        as_part("selection", [{"input_ids": w} for w in tokens.split(32)]),
        as_part("held_out", [{"input_ids": w} for w in tokens[16:].split(32)]),
    ]
    with pytest.raises(InputError, match="selection part"):
        refuse_copies(parts)


def test_very_short_windows_may_repeat() -> None:
    first, second = text(40, 4, 0, vocabulary=3), text(40, 4, 1, vocabulary=3)
    first_part, second_part = windows(first, 4, "calibration"), windows(second, 4, "held_out")
    fresh = [
        e
        for e, d in zip(second_part.examples, second_part.digests, strict=True)
        if d not in first_part.digests
    ]
    refuse_copies([first_part, as_part("held_out", fresh or [torch.tensor([9, 9, 9, 9])])])


@pytest.mark.parametrize(
    "augment",
    [
        lambda i: i.flip(-1),
        lambda i: i.flip(-2),
        lambda i: torch.rot90(i, 1, (1, 2)),
        lambda i: i.transpose(1, 2),
    ],
)
def test_augmented_copies_of_a_held_out_image_are_found(augment) -> None:
    held_out = pictures(6, seed=0)
    calibration = [*pictures(6, seed=1), (augment(held_out[4][0]).contiguous(), held_out[4][1])]
    with pytest.raises(InputError, match=r"share 1 images, mirrored or turned .*6 = 4"):
        refuse_copies([as_part("calibration", calibration), as_part("held_out", held_out)])


def test_images_that_are_no_square_are_turned_by_halves() -> None:
    image = torch.randn(1, 8, 12)
    parts = [as_part("calibration", [(image, 0)]), as_part("held_out", [(image.flip(-2), 0)])]
    with pytest.raises(InputError, match="share 1 images"):
        refuse_copies(parts)


def test_shifted_and_noisy_copies_are_shown() -> None:
    smooth = torch.nn.functional.interpolate(torch.randn(8, 3, 4, 4), size=32, mode="bilinear")
    held_out = [(image, 0) for image in smooth[:4]]
    shifted = smooth[2].roll(1, dims=-1) + 0.02 * torch.randn(3, 32, 32)
    calibration = [(image, 0) for image in (*smooth[4:], shifted)]
    parts = [as_part("calibration", calibration)]
    (pair,) = look_alikes(parts, as_part("held_out", held_out))
    assert (pair.part, pair.example, pair.held_out) == ("calibration", 4, 2)


def test_different_images_and_other_examples_do_not_look_alike() -> None:
    held_out = as_part("held_out", pictures(200, seed=0))
    assert look_alikes([as_part("calibration", pictures(200, seed=1))], held_out) == []
    words = windows(text(4, 16, 0), 16, "held_out")
    assert look_alikes([words], words) == []
    flat = as_part("held_out", [(torch.zeros(1, 8, 8), 0)])
    assert look_alikes([flat], flat) == []


def test_copies_in_one_data_set_are_left_out() -> None:
    calibration, held_out = text(10, 64, seed=0), text(10, 64, seed=1)
    held_out[64 * 3 : 64 * 5] = calibration[17 : 17 + 128]
    parts = [windows(calibration, 64, "calibration"), windows(held_out, 64, "held_out")]
    kept = without_copies(parts)
    assert [len(part.examples) for part in kept] == [10, 8]
    refuse_copies(kept)
    assert torch.equal(kept[1].examples[3], parts[1].examples[5])
    with pytest.raises(InputError, match=r"repeats itself: of the 10 .* 10 are copies"):
        without_copies([parts[0], windows(calibration.roll(5), 64, "held_out")])


def padded(
    rows: list[Tensor], name: str, *, to: int, left: bool = False, mask: bool = True
) -> Part:
    """Texts as a tokenizer pads them: 0 is the padding."""
    examples = []
    for tokens in rows:
        shown = torch.ones_like(tokens)
        sides = (to - len(tokens), 0) if left else (0, to - len(tokens))
        ids, hidden = (torch.nn.functional.pad(row, sides) for row in (tokens, shown))
        examples.append({"input_ids": ids} | ({"attention_mask": hidden} if mask else {}))
    return as_part(name, examples)


def texts(count: int, seed: int, shortest: int = 5, longest: int = 80) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(1, 300, (length,), generator=generator) for length in lengths]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    widths=st.tuples(st.integers(80, 200), st.integers(80, 200)),
    left=st.booleans(),
    mask=st.booleans(),
)
def test_padding_is_no_copied_text(seed: int, widths: tuple, left: bool, mask: bool) -> None:
    first = padded(texts(20, seed), "calibration", to=widths[0], left=left, mask=mask)
    second = padded(texts(12, seed + 1), "held_out", to=widths[1], left=left, mask=mask)
    assert copied_windows(first, second) == []
    assert [len(part.examples) for part in without_copies([first, second])] == [20, 12]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), widths=st.tuples(st.integers(80, 200), st.integers(80, 200)))
def test_the_same_text_is_found_whatever_its_padding(seed: int, widths: tuple) -> None:
    ours, theirs = texts(20, seed), texts(12, seed + 1)
    theirs[3], theirs[7] = ours[5], ours[11]
    first = padded(ours, "calibration", to=widths[0])
    second = padded(theirs, "held_out", to=widths[1], left=True)
    assert [number for number, _ in copied_windows(first, second)] == [3, 7]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    length=st.integers(20, 400),
    templates=st.integers(1, 5),
    copied=st.booleans(),
    begins=st.booleans(),
)
def test_what_examples_share_is_no_copy_and_what_is_their_own_is(
    seed: int, length: int, templates: int, copied: bool, begins: bool
) -> None:
    shared = [text(1, length, seed + 7 + kind) for kind in range(templates)]
    ours, theirs = texts(40, seed, 20, 40), texts(20, seed + 1, 20, 40)
    if copied:
        theirs[4] = ours[9]

    def framed(contents: list[Tensor], name: str) -> Part:
        frames = [shared[place % templates] for place in range(len(contents))]
        pairs = zip(frames, contents, strict=True)
        rows = [torch.cat([f, c] if begins else [c, f]) for f, c in pairs]
        return as_part(name, [{"input_ids": row} for row in rows])

    found = copied_windows(framed(ours, "calibration"), framed(theirs, "held_out"))
    assert [number for number, _ in found] == ([4] if copied else [])


def test_a_text_that_is_repeated_often_is_no_template() -> None:
    tokens = text(3, 64, 0).repeat(12)
    parts = [
        windows(tokens[:1024], 64, "calibration"),
        windows(tokens[1024 + 23 : 2048], 64, "held_out"),
    ]
    with pytest.raises(InputError, match="windows of the held-out part stand for 50% or more"):
        refuse_copies(parts)


def test_one_question_of_several_images_is_no_copy() -> None:
    question = text(1, 48, 0)

    def asked(seed: int) -> list[dict[str, Tensor]]:
        return [{"input_ids": question, "pixel_values": image} for image, _ in pictures(6, seed)]

    first, second = as_part("calibration", asked(0)), as_part("held_out", asked(1))
    assert copied_windows(first, second) == []


def test_text_that_only_the_users_collate_understands_is_compared_as_the_model_sees_it() -> None:
    def collate(texts: list[str]) -> dict[str, Tensor]:
        rows = [torch.tensor([ord(letter) for letter in one]) for one in texts]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}

    long = "a text of some length that stands in both of the parts, but for its end: "
    first = as_part("calibration", ["something else", long + "one", "another"], collate)
    second = as_part("held_out", ["of its own", "of no other", long + "two"], collate)
    assert [number for number, _ in copied_windows(first, second)] == [2]


def test_examples_of_three_things_are_no_text() -> None:
    rows = [(torch.tensor(place), torch.randn(4), 1) for place in range(6)]
    assert copied_windows(as_part("calibration", rows[:3]), as_part("held_out", rows[3:])) == []


def test_an_empty_text_hides_no_copy() -> None:
    ours = texts(5, 0, 40, 50)
    first, second = (padded(rows, "held_out", to=60) for rows in (ours, [ours[2], ours[3]]))
    empty = {"input_ids": torch.zeros(60).long(), "attention_mask": torch.zeros(60).long()}
    with_empty = as_part("calibration", [empty, *first.examples])
    assert [number for number, _ in copied_windows(with_empty, second)] == [0, 1]


def test_what_is_left_out_is_counted_by_its_reason() -> None:
    calibration, held_out = text(10, 64, seed=0), text(10, 64, seed=1)
    held_out[64 * 3 : 64 * 5] = calibration[17 : 17 + 128]
    kept = without_copies(
        [windows(calibration, 64, "calibration"), windows(held_out, 64, "held_out")]
    )
    assert kept[0].left_out == {} and kept[1].left_out == {QUOTED: 2}
    assert kept[1].usage()["given"] == 10
    images = pictures(6, 0)
    turned = [*pictures(5, 1), (images[2][0].flip(-1), 0)]
    kept = without_copies([as_part("calibration", images), as_part("held_out", turned)])
    assert kept[1].left_out == {TURNED: 1}
