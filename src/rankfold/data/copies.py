"""Examples of two parts that are the same, or nearly: found by content, refused or shown.

Refused: an input that is byte for byte in both parts, an image that is another one mirrored or
turned by quarters, and a window of tokens of which much stands in the other part, at any offset.
Padding is no text, and what many examples share (a template, a system prompt) is no copy.
From parts that rankfold has split itself they are left out, and counted. Shown, since real data
sets hold such pairs: images that look alike at a size of 8 x 8.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from rankfold.data.example import Example, example_digest, example_input
from rankfold.data.parts import FEWEST, SAME, Part, refuse_overlap
from rankfold.errors import InputError

SHINGLE = 16  # consecutive tokens that are looked up in the other part, at most a quarter window
SHORTEST = 8  # below which runs repeat by chance and only equal windows are refused
COPIED = 0.5  # share of a window's shingles in the other part from which it is refused
SHARED = 0.15  # share of all windows that hold a run from which it is a template's, no copy's
OF_TEXT = ("input_ids", "token_type_ids", "position_ids", "decoder_input_ids")  # and masks
FEWEST_SHARED = 5  # windows that hold it, at least
ELSEWHERE = "the same input as an example of the calibration, selection or held-out part"
TURNED = "an image of an earlier part, mirrored or turned by quarters"
QUOTED = f"text of which {COPIED:.0%} or more stands in an earlier part"
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
                numbers = [(first.number(a), second.number(b)) for a, b in pairs[:NAMED]]
                listed = ", ".join(f"{a} = {b}" for a, b in numbers) + more
                raise InputError(
                    f"{_named(first)} and {_named(second)} share {len(pairs)} images, mirrored or "
                    f"turned by quarters (numbers in each, from 0: {listed}). An augmented copy of "
                    "a held-out image is no new image: remove it from one of the parts."
                )
            copied = copied_windows(first, second)
            if copied:
                more = f" and {len(copied) - NAMED} more" if len(copied) > NAMED else ""
                numbered = [(second.number(n), share) for n, share in copied[:NAMED]]
                listed = ", ".join(f"{n} ({share:.0%})" for n, share in numbered) + more
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
        copies = _copies(part, kept)
        left = part.without(copies)
        if len(left.examples) < FEWEST:
            raise InputError(
                f"the data repeats itself: of the {len(part.examples)} examples of {_named(part)} "
                f"{len(copies)} are copies of examples of another part. Give more data."
            )
        kept.append(left)
    return kept


def without_copies_of(part: Part, others: Sequence[Part]) -> Part:
    """The part without examples that stand in others, or in itself before, whole or as copies."""
    seen = {digest: ELSEWHERE for other in others for digest in other.digests}
    copies: dict[int, str] = {}
    for number, digest in enumerate(part.digests):
        if digest in seen:
            copies[number] = seen[digest]
        seen.setdefault(digest, SAME)
    return part.without({**_copies(part, others), **copies})


def _copies(part: Part, others: Sequence[Part]) -> dict[int, str]:
    """Numbers of the examples of a part that are copies of one of another's, and how so."""
    copies: dict[int, str] = {}
    for other in others:
        copies |= {number: QUOTED for number, _ in copied_windows(other, part)}
        copies |= {number: TURNED for _, number in turned_images(other, part)}
    return copies


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

    Runs that many windows share are not counted, unless a window has no others: a template has
    something of its own in each example, a text that is repeated often has not. Windows too short
    for runs are copies where all their tokens are the same.

    Returns:
        Their numbers and the shares of their runs of tokens that stand there.
    """
    ours, theirs = (_windows(part) for part in (first, second))
    whole = {window.tobytes() for window in ours.values()}
    copied = {number: 1.0 for number, window in theirs.items() if window.tobytes() in whole}
    long = [len(w) for w in (*ours.values(), *theirs.values()) if len(w) >= 4 * SHORTEST]
    if not long:
        return sorted(copied.items())
    length = min(SHINGLE, min(long) // 4)
    runs_of = partial(_runs, length=length)
    ours_runs, theirs_runs = map(runs_of, (ours, theirs))
    known = np.unique(_joined(ours_runs.values()))
    shared = _shared([*ours_runs.values(), *theirs_runs.values()])
    every = _joined(theirs_runs.values())
    of_template, there = _among(every, shared), _among(every, known)
    end = 0
    for number, runs in theirs_runs.items():
        start, end = end, end + len(runs)
        own = _own(of_template[start:end], length)
        share = float(there[start:end][own].mean())
        if share >= COPIED:
            copied.setdefault(number, share)
    return sorted(copied.items())


def _windows(part: Part) -> dict[int, NDArray[np.int64]]:
    """Tokens of each example that is text alone, without padding, by the example's number."""
    windows = {}
    for number, example in enumerate(part.examples):
        value = _seen(part, example)
        mask = value.get("attention_mask") if isinstance(value, Mapping) else None
        if isinstance(value, Mapping):
            if not all(name in OF_TEXT or str(name).endswith("mask") for name in value):
                return {}  # the same question of two images is no copy
            value = value.get("input_ids")
        tokens, shown = _tokens(value), _tokens(mask)
        if tokens is None:
            return {}
        if shown is not None and shown.shape == tokens.shape:
            tokens = tokens[shown != 0]
        if len(tokens):
            windows[number] = tokens
    return windows


def _seen(part: Part, example: Example) -> object:
    """What the model sees of an example: of one that ``collate`` understands, what that makes."""
    if part.is_plain:
        return example_input(example)
    made = example_input(part.collate([example]))
    if not isinstance(made, Mapping):
        return made
    return {k: v[0] if torch.is_tensor(v) and v.dim() > 0 else v for k, v in made.items()}


def _tokens(value: object) -> NDArray[np.int64] | None:
    """Whole numbers in one row, or in a batch of one, or None."""
    if torch.is_tensor(value):
        value = value.detach().cpu().numpy() if not value.is_floating_point() else None
    plain = isinstance(value, list | tuple) and all(isinstance(item, int) for item in value)
    if not plain and not isinstance(value, np.ndarray):
        return None
    found = np.asarray(value)
    found = found[0] if found.ndim == 2 and len(found) == 1 else found
    return found.astype(np.int64) if found.ndim == 1 and found.dtype.kind in "iub" else None


def _runs(windows: Mapping[int, NDArray[np.int64]], length: int) -> dict[int, NDArray[np.uint64]]:
    """Hashes of the runs of each window that is long enough for runs to be no chance."""
    long = {number: one for number, one in windows.items() if len(one) >= 4 * SHORTEST}
    if not long:
        return {}
    hashes = _shingles(np.concatenate([*long.values()]), length)  # of runs across windows, too
    starts = np.cumsum([0, *map(len, long.values())])
    return {
        number: hashes[start : start + len(window) - length + 1]
        for (number, window), start in zip(long.items(), starts[:-1], strict=True)
    }


def _among(runs: NDArray[np.uint64], known: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which runs are among those known, which are sorted."""
    places = np.searchsorted(known, runs)
    found = places < len(known)
    found[found] = known[places[found]] == runs[found]
    return found


def _own(shared: NDArray[np.bool_], length: int) -> NDArray[np.bool_]:
    """Which runs of a window say something of it, where it is known which are a template's.

    All, where every token stands in one of the template's; else those without such a token, or,
    where there are none, those that are not wholly the template's.
    """
    if not shared.any():
        return np.ones_like(shared)
    of_template = np.convolve(shared, np.ones(length, dtype=np.int64)) > 0  # each token
    if of_template.all():
        return np.ones_like(shared)
    windows = np.lib.stride_tricks.sliding_window_view(of_template, length)
    alone: NDArray[np.bool_] = ~np.any(windows, axis=1)
    return alone if alone.any() else ~shared


def _joined(runs: Iterable[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    return np.concatenate([np.empty(0, dtype=np.uint64), *runs])


def _shared(windows: Sequence[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """Runs that stand in so many windows that they are of a template."""
    found, counts = np.unique(_joined(map(np.unique, windows)), return_counts=True)
    return found[counts >= max(FEWEST_SHARED, SHARED * len(windows))]


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
