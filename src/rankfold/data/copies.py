"""Examples of two parts that are the same, or nearly: found by content, refused or shown.

Refused: an input that is byte for byte in both parts, an image that is another one mirrored or
turned by quarters, and a window of tokens of which much stands in the other part, at any offset.
From parts that rankfold has split itself they are left out. Shown, since real data sets hold such
pairs: images that look alike at a size of 8 x 8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from rankfold.data.example import Example, example_digest, example_input
from rankfold.data.parts import FEWEST, Part, refuse_overlap
from rankfold.errors import InputError

SHINGLE = 16  # consecutive tokens that are looked up in the other part, at most a quarter window
SHORTEST = 8  # below which runs repeat by chance and only equal windows are refused
COPIED = 0.5  # share of a window's shingles in the other part from which it is refused
ALIKE = 0.95  # correlation of two images at 8 x 8 from which they are shown
THUMBNAIL = 8  # pixels a side
NAMED = 5  # examples that a message names
_BLOCK = 1024  # images compared at once


@dataclass(frozen=True)
class NearPair:
    """Two images of different parts that look alike.

    Attributes:
        part: Part of the one that is not held-out.
        example: Its number there, from 0.
        held_out: Number of the held-out image.
    """

    part: str
    example: int
    held_out: int


def refuse_copies(parts: Sequence[Part]) -> None:
    """Refuse parts that share examples, exactly or by the rules above.

    Raises:
        InputError: Names the parts and the first examples that they share.
    """
    refuse_overlap(parts)
    for at, first in enumerate(parts):
        for second in parts[at + 1 :]:
            pairs = turned_images(first, second)
            if pairs:
                more = f" and {len(pairs) - NAMED} more" if len(pairs) > NAMED else ""
                listed = ", ".join(f"{a} = {b}" for a, b in pairs[:NAMED]) + more
                raise InputError(
                    f"{_named(first)} and {_named(second)} share {len(pairs)} images, mirrored or "
                    f"turned by quarters (numbers in each, from 0: {listed}). An augmented copy of "
                    "a held-out image is no new image: remove it from one of the parts."
                )
            copied = copied_windows(first, second)
            if copied:
                more = f" and {len(copied) - NAMED} more" if len(copied) > NAMED else ""
                listed = ", ".join(f"{n} ({share:.0%})" for n, share in copied[:NAMED]) + more
                raise InputError(
                    f"{len(copied)} windows of {_named(second)} stand for {COPIED:.0%} or more in "
                    f"{_named(first)}, word for word (numbers, from 0, and share: {listed}). "
                    "Remove the copied text from one of the parts."
                )


def without_copies(parts: Sequence[Part]) -> list[Part]:
    """The parts without the examples that are copies of one of an earlier part.

    For parts that rankfold has drawn from one data set itself, which may repeat itself.

    Raises:
        InputError: Too few examples are left in one.
    """
    kept: list[Part] = []
    for part in parts:
        copies = {
            number
            for earlier in kept
            for number in (
                *(n for _, n in turned_images(earlier, part)),
                *(n for n, _ in copied_windows(earlier, part)),
            )
        }
        left = part.take([n for n in range(len(part.examples)) if n not in copies])
        if len(left.examples) < FEWEST:
            raise InputError(
                f"the data repeats itself: of the {len(part.examples)} examples of {_named(part)} "
                f"{len(copies)} are copies of examples of another part. Give more data."
            )
        kept.append(left)
    return kept


def turned_images(first: Part, second: Part) -> list[tuple[int, int]]:
    """Images of the second part that are one of the first, mirrored or turned by quarters.

    Returns:
        Numbers in the first and in the second part.
    """
    turned: dict[str, int] = {}
    for number, example in enumerate(first.examples):
        image = _image(example)
        if image is None:
            return []
        for copy in _turned(image):
            turned.setdefault(example_digest(copy), number)
    pairs = []
    for number, example in enumerate(second.examples):
        image = _image(example)
        if image is None:
            return []
        found = turned.get(example_digest(image))
        if found is not None:
            pairs.append((found, number))
    return pairs


def _turned(image: Tensor) -> list[Tensor]:
    """The seven other positions of an image; quarter turns only where it is square."""
    square = image.shape[-1] == image.shape[-2]
    turns = range(4) if square else (0, 2)
    copies = []
    for turn in turns:
        rotated = torch.rot90(image, turn, (-2, -1))
        copies += [rotated, rotated.flip(-1)]
    return [copy.contiguous() for copy in copies[1:]]


def copied_windows(first: Part, second: Part) -> list[tuple[int, float]]:
    """Windows of the second part of which ``COPIED`` or more stands in the first, at any offset.

    Returns:
        Their numbers and the shares of their runs of tokens that stand there.
    """
    ours, theirs = (_windows(part) for part in (first, second))
    if ours is None or theirs is None:
        return []
    lengths = [n for n in map(len, [*ours, *theirs]) if n >= 4 * SHORTEST]
    if not lengths:
        return []
    length = min(SHINGLE, min(lengths) // 4)
    long = [_shingles(window, length) for window in ours if len(window) >= 4 * SHORTEST]
    known = np.unique(np.concatenate(long)) if long else np.empty(0, dtype=np.uint64)
    copied = []
    for number, window in enumerate(theirs):
        if len(window) < 4 * SHORTEST:
            continue
        share = float(np.isin(_shingles(window, length), known).mean())
        if share >= COPIED:
            copied.append((number, share))
    return copied


def _windows(part: Part) -> list[NDArray[np.int64]] | None:
    windows = []
    for example in part.examples:
        value = example_input(example)
        if isinstance(value, Mapping):
            value = value.get("input_ids")
        if not torch.is_tensor(value) or value.dim() != 1 or value.is_floating_point():
            return None
        windows.append(value.detach().cpu().long().numpy())
    return windows if windows and all(len(window) for window in windows) else None


def _shingles(window: NDArray[np.int64], length: int) -> NDArray[np.uint64]:
    """A 64-bit polynomial hash of every run of ``length`` tokens."""
    tokens = (window.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    runs = np.lib.stride_tricks.sliding_window_view(tokens, length)
    hashes = np.zeros(len(runs), dtype=np.uint64)
    for place in range(length):
        hashes = (hashes ^ runs[:, place]) * np.uint64(0x100000001B3)
        hashes ^= hashes >> np.uint64(29)
    return hashes


def look_alikes(parts: Sequence[Part], held_out: Part) -> list[NearPair]:
    """Images of other parts that a held-out image looks like at 8 x 8, each once.

    Args:
        parts: The other parts.
        held_out: The held-out part.
    """
    tested = _thumbnails(held_out)
    if tested is None:
        return []
    found = []
    for part in parts:
        others = _thumbnails(part)
        if others is None or others.shape[1] != tested.shape[1]:
            continue
        for start in range(0, len(tested), _BLOCK):
            closest = (tested[start : start + _BLOCK] @ others.T).max(1)
            for place in (closest.values >= ALIKE).nonzero()[:, 0].tolist():
                example = int(closest.indices[place])
                found.append(NearPair(part.name, example, start + place))
    return found


def _thumbnails(part: Part) -> Tensor | None:
    """``(n, values)`` of unit length, mean 0; None where the examples are no images of 8 or more.

    Flat images are left at 0: all of them look alike.
    """
    images = [_image(example) for example in part.examples]
    if not images or any(image is None for image in images):
        return None
    if min(min(cast("Tensor", image).shape[-2:]) for image in images) < THUMBNAIL:
        return None
    rows = [
        functional.adaptive_avg_pool2d(cast("Tensor", image).float(), THUMBNAIL).flatten()
        for image in images
    ]
    if len({len(row) for row in rows}) > 1:
        return None
    stacked = torch.stack(rows)
    stacked = stacked - stacked.mean(1, keepdim=True)
    return functional.normalize(stacked, dim=1)


def _image(example: Example) -> Tensor | None:
    value = example_input(example)
    if torch.is_tensor(value) and value.dim() == 3 and value.is_floating_point():
        return value
    return None


def _named(part: Part) -> str:
    return f"the {part.name.replace('_', '-')} part"
