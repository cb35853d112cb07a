"""Values of JSON against a description of them: a class of ``msgspec`` with typed fields."""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec

from rankfold.errors import InputError, visible

Number = Annotated[float, msgspec.Meta(ge=-1.7e308, le=1.7e308)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Whole = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Rank = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
# Words of rankfold's own, without what a terminal interprets.
Word = Annotated[str, msgspec.Meta(pattern="^[^\x00-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]*$")]
Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
ShortDigest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]

_PLACE = re.compile(r" - at `\$\.?(?P<place>.*)`$", re.DOTALL)
_LISTED = re.compile(r"[A-Za-z_]\w*|\[\d+\]|\[\.\.\.\]")


class Fields(msgspec.Struct, kw_only=True):
    """An object whose fields are described; others may stand beside them."""


def check(value: object, kind: Any, where: object) -> None:
    """Refuse a value that is not as described.

    Args:
        value: Of a file.
        kind: A class of ``Fields``, or another type.
        where: The file, for the message.

    Raises:
        InputError: Names the field, what was expected and what was found.
    """
    try:
        msgspec.convert(value, kind)
    except (msgspec.ValidationError, UnicodeError, RecursionError) as error:
        raise InputError(
            f"{visible(where)} is damaged: {_told(value, str(error))}. Copy or save the folder "
            "again."
        ) from error


def known_fields(kind: type[Fields]) -> frozenset[str]:
    """The names of the fields that a class describes."""
    return frozenset(field.name for field in msgspec.structs.fields(kind))


def _told(value: object, message: str) -> str:
    """The message of msgspec, the field first, with the value that stands there."""
    place = _PLACE.search(message)
    if place is None:
        return visible(message)
    name, said = place["place"], message[: place.start()]
    said = said[:1].lower() + said[1:]
    steps = _LISTED.findall(name)
    if "got" not in said and "[...]" not in steps:
        said += f", got {_shown(_at(value, steps))}"
    return visible(f"{name}: {said}")


def _at(value: Any, steps: list[str]) -> object:
    for step in steps:
        value = value[int(step[1:-1])] if step.startswith("[") else value.get(step)
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
