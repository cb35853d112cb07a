"""What was decided when data was made the inputs of a model, to be recorded and done again."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeAlias

from rankfold.errors import InputError, visible

# Who prepares images and sounds: rankfold by mean, std and size, or the processor of the model's
# folder, whose files say how.
Preparer: TypeAlias = Literal["rankfold", "processor"]
_DIGEST = re.compile(r"[0-9a-f]{64}")
# What a user asks for by name, in Python and on the command line; all else is found.
ASKED = ("mean", "std", "image_size", "length")


def repr_of_changes(value: Any) -> str:
    """``repr`` of a dataclass that names the fields which aren't as by default."""
    default = type(value)()
    changed = {f.name: getattr(value, f.name) for f in fields(value) if f.repr}
    shown = (f"{k}={v!r}" for k, v in changed.items() if v != getattr(default, k))
    return f"{type(value).__name__}({', '.join(shown)})"


@dataclass(frozen=True)
class InputSettings:
    """What changes the inputs of a model, or what is computed from its output.

    What is None was not decided: no image was read, say, or Python gave the inputs ready.

    Attributes:
        prepared_by: Who prepares images and sounds.
        mean: Subtracted from images, per channel or one for all; 0 where nothing is.
        std: What images are divided by, likewise; 1 where they are not.
        image_size: Side to which images are resized and cut, pixels.
        shape: Of one image as the model gets it, ``(channels, height, width)``.
        sample_rate: Of sounds, samples a second.
        length: Most tokens of an example.
        columns: Names of the columns that were read, by what they hold (``text``, ``label``).
        features: Names of the columns of numbers that are the input, in its order.
        template: SHA-256 of the chat template that wrote conversations.
        prompt: Written before each text.
        lower_case: Whether texts were made lower case.
        seed: Decides which words masked-lm hides.
        pooling: How an embedding is made of hidden states, one step after the other.
    """

    prepared_by: Preparer | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    image_size: int | None = None
    shape: tuple[int, ...] | None = None
    sample_rate: int | None = None
    length: int | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    features: tuple[str, ...] | None = None
    template: str | None = None
    prompt: str | None = None
    lower_case: bool | None = None
    seed: int | None = None
    pooling: tuple[str, ...] | None = None

    __repr__ = repr_of_changes

    @classmethod
    def of_images(
        cls,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        size: int | None = None,
        shape: Sequence[int] | None = None,
    ) -> InputSettings:
        """Of images that rankfold prepares; mean and std are None where nothing is done."""
        return cls(
            "rankfold",
            (0.0,) if mean is None else tuple(map(float, mean)),
            (1.0,) if std is None else tuple(map(float, std)),
            size,
            None if shape is None else tuple(shape),
        )

    @classmethod
    def of_processor(
        cls,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        size: int | None,
    ) -> InputSettings:
        """Of images that a processor prepares, but for what is given."""
        values = cls.of_images(mean, std, size)
        return replace(
            values,
            prepared_by="processor",
            mean=None if mean is None else values.mean,
            std=None if std is None else values.std,
        )

    def decided(self) -> dict[str, Any]:
        """What was decided, by name."""
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: value for name, value in found.items() if value not in (None, {})}

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        plain = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in self.decided().items()
        }
        return plain | ({"columns": dict(self.columns)} if self.columns else {})

    @classmethod
    def from_dict(cls, plain: object) -> InputSettings:
        """Back from JSON.

        Raises:
            InputError: Says which field is not what it should be.
        """
        if not isinstance(plain, dict):
            raise InputError("expected an object of settings by name")
        for name, value in plain.items():
            if name not in _KINDS:
                raise InputError(f"there is no setting {name!r}; a newer rankfold may know it")
            what, is_one = _KINDS[name]
            if not is_one(value):
                raise InputError(f"{name} is {str(value)[:60]!r}; expected {what}")
        values: dict[str, Any] = {
            n: tuple(v) if isinstance(v, list) else v for n, v in plain.items()
        }
        return cls(**values)

    def differences(self, other: InputSettings) -> list[str]:
        """Names of what both decided, and not alike; columns belong to one source each."""
        mine, theirs = self.decided(), other.decided()
        return [
            name
            for name in mine
            if name in theirs and name != "columns" and not _alike(mine[name], theirs[name])
        ]

    def with_others(self, other: InputSettings) -> InputSettings:
        """The same, and what only the other has decided."""
        more = {name: v for name, v in other.decided().items() if name not in self.decided()}
        return replace(self, **{**more, "columns": {**other.columns, **self.columns}})


def joined(sources: Iterable[tuple[str, InputSettings]]) -> InputSettings:
    """What sources of one run decided, together.

    Args:
        sources: Each with the name of the source.

    Raises:
        InputError: Two decided otherwise; it names both.
    """
    together, first = InputSettings(), ""
    for source, settings in sources:
        for name in together.differences(settings):
            raise InputError(
                f"{name} is {shown(together, name)} in {visible(first)} and "
                f"{shown(settings, name)} in {visible(source)}; expected the same in all parts, as "
                "the model was trained with. Convert one of them or leave it out."
            )
        together, first = together.with_others(settings), first or source
    return together


def refuse_other(recorded: InputSettings, found: InputSettings, folder: object) -> None:
    """Refuse what contradicts what an artifact records.

    Args:
        recorded: What its data was made with.
        found: What was asked for, or found in other data.
        folder: The artifact, for messages.

    Raises:
        InputError: Says what is recorded and what was found.
    """
    pixels = [
        name
        for name in ("mean", "std", "image_size")
        if getattr(found, name) is not None and getattr(recorded, name) is None
    ]
    if recorded.prepared_by == "processor" and found.prepared_by is None and pixels:
        raise InputError(
            f"{pixels[0]}= is {shown(found, pixels[0])}, and images of the model in "
            f"{visible(folder)} are prepared as its processor's files say (rankfold.json, "
            f"input_settings). Leave {pixels[0]}= out."
        )
    for name in recorded.differences(found):
        asked = name in ASKED
        advice = (
            f"Leave {name}= out: what is recorded is used then"
            if asked
            else "Give data of this kind, and the folder's files as they were saved"
        )
        raise InputError(
            f"{name}{'=' * asked} is {shown(found, name)}, and the model in {visible(folder)} was "
            f"made with {shown(recorded, name)} (rankfold.json, input_settings). {advice}. To "
            "compute it otherwise on purpose, open it in Python: rankfold.load(folder)."
        )


def settings_line(settings: InputSettings) -> str:
    """All that was decided, for a person."""
    return ", ".join(f"{name} {shown(settings, name)}" for name in settings.decided())


def shown(settings: InputSettings, name: str) -> str:
    """A setting in a message."""
    value = getattr(settings, name)
    if name == "shape":
        return "x".join(map(str, value))
    if name == "columns":
        return visible(", ".join(f"{kind} {column!r}" for kind, column in value.items()))
    if isinstance(value, tuple):
        return visible(",".join(one if isinstance(one, str) else f"{one:g}" for one in value))
    return visible(repr(value) if isinstance(value, str) and name == "prompt" else value)


def _alike(one: Any, other: Any) -> bool:
    """Whether two values are the same; one value for all channels is that of each."""
    numbers = isinstance(one, tuple) and all(isinstance(v, float | int) for v in (*one, *other))
    if numbers and len(one) != len(other):
        return 1 in (len(one), len(other)) and len({*one, *other}) == 1
    return bool(one == other)


def _is_whole(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_values(value: object, above: float = -math.inf) -> bool:
    """Whether a value is a list of finite numbers above another."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
        and all(math.isfinite(v) and v > above for v in value)
    )


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _are_columns(value: object) -> bool:
    return isinstance(value, dict) and _are_texts([*value.values()])


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "prepared_by": ("rankfold or processor", lambda v: v in ("rankfold", "processor")),
    "mean": ("a list of finite numbers", _is_values),
    "std": ("a list of finite numbers above 0", lambda v: _is_values(v, 0)),
    "image_size": ("a whole number, 1 or more", _is_whole),
    "shape": (
        "a list of whole numbers, 1 or more",
        lambda v: isinstance(v, list) and len(v) > 0 and all(map(_is_whole, v)),
    ),
    "sample_rate": ("a whole number, 1 or more", _is_whole),
    "length": ("a whole number, 1 or more", _is_whole),
    "columns": ("an object of names", _are_columns),
    "features": ("a list of texts", _are_texts),
    "template": (
        "a SHA-256 in hexadecimal digits",
        lambda v: isinstance(v, str) and _DIGEST.fullmatch(v) is not None,
    ),
    "prompt": ("a text", lambda v: isinstance(v, str)),
    "lower_case": ("true or false", lambda v: isinstance(v, bool)),
    "seed": ("a whole number", lambda v: _is_whole(v, -(2**63))),
    "pooling": ("a list of texts", _are_texts),
}
