"""One example: the tensors that it stands for, what of it the model sees, and how it is compared.

Where no ``collate`` is given, an example may be what torch's ``default_collate`` takes: tensors,
NumPy arrays, numbers, lists of numbers, and mappings, tuples and lists of these. Images of Pillow
are taken as torchvision's ``ToTensor`` takes them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from numbers import Number
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from rankfold.errors import InputError

Example: TypeAlias = Any

LABELS = ("labels", "label")  # columns that hold what the model should say
IMAGE_MODES = ("L", "RGB")  # of Pillow: those whose values mean the same in every image
TAKEN = (
    "expected tensors, NumPy arrays, numbers or lists of numbers, alone, in (input, label) pairs "
    "or in mappings"
)


def plain_example(example: object, what: str) -> tuple[Example, tuple[str, ...]]:
    """The tensors that an example stands for, and the columns of texts that are left out.

    A batch axis of the example's own (``return_tensors="pt"``) is taken away.

    Args:
        example: As the user gave it.
        what: What messages call it.

    Raises:
        InputError: Something in it is none of what is taken.
    """
    texts: list[str] = []
    found = _plain(example, what, texts)
    if torch.is_tensor(found) and found.dim() == 2 and len(found) == 1 and _whole(found):
        found = found[0]
    return found, tuple(texts)


def _plain(value: object, what: str, texts: list[str]) -> Example:
    if isinstance(value, np.ndarray) and value.dtype == object and value.ndim == 1:
        value = tuple(value)  # a row of an array of pairs
    if isinstance(value, Mapping):
        return _plain_mapping(value, what, texts)
    if isinstance(value, tuple | list) and not _all_numbers(value):
        if len(value) == 0:
            return plain_value(value, what)  # refused there
        if isinstance(value, list) and all(isinstance(item, list) for item in value):
            raise InputError(
                f"{what} is a list of {len(value)} lists, which may be one input or an input and "
                "its label; expected a tuple (input, label), or one tensor."
            )
        return tuple(
            _plain_item(item, f"{what}, item {place}", texts) for place, item in enumerate(value)
        )
    return plain_value(value, what)


def _plain_item(value: object, what: str, texts: list[str]) -> Example:
    """What stands in a pair or a mapping: values, or a mapping, a pair or several arrays again."""
    arrays = isinstance(value, list | tuple) and any(map(_is_array, value))
    if isinstance(value, Mapping) or arrays:
        return _plain(value, what, texts)
    return plain_value(value, what)


def _is_array(value: object) -> bool:
    return isinstance(value, Tensor | np.ndarray) and value.ndim > 0


def _plain_mapping(value: Mapping[Any, Any], what: str, texts: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, item in value.items():
        named = f"{what}, column {key!r}"
        if not _is_text(item):
            found[key] = _plain_item(item, named, texts)
        elif key in LABELS:
            raise InputError(
                f"{named} is the text {str(item)[:40]!r}; expected a number, its class from 0, or "
                "the values that the model should give."
            )
        else:
            texts.append(str(key))
    if not any(key not in LABELS for key in found):
        raise InputError(
            f"{what} has no input for the model: its columns are {', '.join(map(str, value))}"
            + (", of which texts are left out" if texts else "")
            + "; expected tensors or numbers, such as the input_ids that a tokenizer gives."
        )
    return _without_batch_axis(found)


def _without_batch_axis(found: dict[str, Any]) -> dict[str, Any]:
    """Token ids ``(1, length)`` are one example's: so is all that stands beside them."""
    ids = found.get("input_ids")
    if not torch.is_tensor(ids) or ids.dim() != 2 or len(ids) != 1:
        return found
    return {
        key: item[0]
        if torch.is_tensor(item) and item.dim() > (key not in LABELS) and len(item) == 1
        else item
        for key, item in found.items()
    }


def plain_value(value: object, what: str) -> Tensor:
    """A tensor, array, number, image or rectangular list of these as a tensor.

    Raises:
        InputError: It is none of them.
    """
    if torch.is_tensor(value):
        if value.layout != torch.strided or value.is_meta:
            kind = "a meta" if value.is_meta else "a sparse or nested"
            raise InputError(f"{what} is {kind} tensor; expected one that holds all its values.")
        return value.detach() if value.requires_grad else value
    try:
        if isinstance(value, np.ndarray | np.generic):
            return torch.from_numpy(_native(np.asarray(value)))
        if isinstance(value, Number):
            return torch.tensor(value)
        if isinstance(value, list | tuple) and len(value) > 0:
            return _plain_list(value, what)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{what} can't be made a tensor: {error}; {TAKEN}.") from error
    if type(value).__module__.startswith("PIL."):
        return _plain_image(value, what)
    found = "an empty list" if isinstance(value, list | tuple) else type(value).__name__
    advice = " Tokenize it." if _is_text(value) else ""
    raise InputError(
        f"{what} is {found}; {TAKEN}.{advice} For anything else give a function that makes a "
        "batch of examples (rankfold.Data(..., collate=), or the loader's collate_fn)."
    )


def _native(value: np.ndarray) -> np.ndarray:
    """A copy that torch can own, in this machine's order of bytes."""
    return np.array(value, dtype=value.dtype.newbyteorder("="), order="C")


def _plain_list(value: Sequence[Any], what: str) -> Tensor:
    if _all_numbers(value):
        arrays = any(isinstance(item, np.generic) for item in value)
        return torch.from_numpy(np.array(value)) if arrays else torch.tensor(value)
    rows = [plain_value(item, f"{what}, item {place}") for place, item in enumerate(value)]
    if len({row.shape for row in rows}) > 1:
        shapes = ", ".join(str(tuple(row.shape)) for row in rows[:3])
        raise InputError(
            f"{what} is a list of rows of unequal lengths ({shapes}); expected equal ones. Pad "
            "them, with a mask beside them, or give one example a row."
        )
    return torch.stack(rows)


def _plain_image(image: Any, what: str) -> Tensor:
    """``(channels, height, width)`` from 0 to 1."""
    if image.mode not in IMAGE_MODES:
        raise InputError(
            f"{what} is an image of mode {image.mode}; expected {' or '.join(IMAGE_MODES)}. "
            'Convert it (image.convert("RGB")), or give tensors, as the model was trained on.'
        )
    pixels = np.array(image, dtype=np.float32) / 255
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())


def _all_numbers(value: Sequence[Any]) -> bool:
    """Whether these are the values of one tensor.

    Two numbers in a tuple are a pair, as they are for ``default_collate``; more whole ones are
    token ids.
    """
    if isinstance(value, tuple) and (
        len(value) == 2 or not all(isinstance(item, int) for item in value)
    ):
        return False
    return len(value) > 0 and all(isinstance(item, Number | np.generic) for item in value)


def _is_text(value: object) -> bool:
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "US" or (value.dtype == object and _is_text(value.tolist()))
    if isinstance(value, list | tuple):
        return len(value) > 0 and all(_is_text(item) for item in value)
    return isinstance(value, str | bytes)


def _whole(value: Tensor) -> bool:
    return not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool


def example_input(example: Example) -> object:
    """What the model is given: the first of a pair or alone, the mapping without its labels."""
    if isinstance(example, Mapping):
        return {key: example[key] for key in sorted(example) if key not in LABELS}
    if isinstance(example, tuple | list) and len(example) in (1, 2) and not _all_numbers(example):
        return example_input(example[0]) if isinstance(example[0], Mapping) else example[0]
    return example


def example_digest(example: Example) -> str:
    """SHA-256 of an example's input: its tensors' types, shapes and bytes."""
    return _digest(example_input(example))


def content_digest(example: Example) -> str:
    """SHA-256 of a whole example, its labels included."""
    return _digest(example)


def _digest(value: object) -> str:
    digest = hashlib.sha256()
    _feed(digest, value)
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
    elif value is None:
        digest.update(b"None")
    else:
        whole = isinstance(value, tuple | list)
        tensor = torch.as_tensor(value) if whole else _compared(value)
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())


def _compared(value: object) -> Tensor:
    """Of an example that only the user's ``collate`` understands, what it is known by."""
    if type(value).__module__.startswith("PIL."):
        return torch.from_numpy(np.array(cast("Any", value).convert("RGBA")))
    return plain_value(value, "an example")


def shape(value: object) -> object:
    """Equal for examples that can stand in one batch."""
    if isinstance(value, Mapping):
        return tuple((key, shape(item)) for key, item in value.items())
    if torch.is_tensor(value) or isinstance(value, np.ndarray):
        return tuple(value.shape)
    if isinstance(value, tuple):
        return tuple(shape(item) for item in value)
    return len(value) if isinstance(value, list) else None


def describe(value: object) -> str:
    """Types and shapes of a batch or an example, for messages."""
    if torch.is_tensor(value):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"array of {value.dtype} {value.shape}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {describe(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(describe(item) for item in value[:4]) + ")"
    return type(value).__name__


def collated(examples: Sequence[Example]) -> Any:
    """A batch of plain examples: tensors are stacked, also inside pairs and mappings."""
    first = examples[0]
    if isinstance(first, Mapping):
        return {key: collated([example[key] for example in examples]) for key in first}
    if isinstance(first, tuple):
        return tuple(collated(list(column)) for column in zip(*examples, strict=True))
    return torch.stack([torch.as_tensor(example) for example in examples])


def default_batch_size(example: Example) -> int:
    """Examples a batch: about 512 tokens, or a million input values, at most 256 examples.

    More tokens at once take no less time on a CPU, and their logits, several copies of them, more
    memory than all else: 0.1 GB a copy for 512 tokens and 50,000 words.

    Args:
        example: A plain one, or a batch that ``collate`` made of one.
    """
    value = example_input(example)
    while isinstance(value, Mapping | tuple | list) and len(value) > 0:
        value = next(iter(value.values() if isinstance(value, Mapping) else value))
    if not torch.is_tensor(value):
        return 1
    budget = (1 << 20) if value.is_floating_point() else (1 << 9)
    return max(1, min(256, budget // max(1, value.numel())))
