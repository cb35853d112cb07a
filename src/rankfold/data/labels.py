"""Which class a label is: one rule for every source.

A label is a name of the model's classes where all labels of the source are; else, where none is,
the number of a class. Where some are names and others not, nothing says which is meant.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rankfold.data.account import ClassCount
from rankfold.errors import InputError

NAMED = 5  # labels that a message names
NUMBER = re.compile(r"(0|[1-9][0-9]*)(\.0+)?")  # as written, 3, or by a table of floats, 3.0


class Classes(NamedTuple):
    """The class of each value, and what the report says of them."""

    numbers: list[int]
    counts: list[ClassCount]
    notes: list[str]


def class_numbers(
    where: str,
    values: Sequence[Any],
    label_ids: Mapping[str, int] | None,
    *,
    own_names: Sequence[str] | None = None,
    advice: str = "",
) -> Classes:
    """The class of each label.

    Args:
        where: The source and its column, for messages.
        values: The labels: texts, or whole numbers.
        label_ids: The model's number of each of its classes' names, or None.
        own_names: What the numbers from 0 stand for in the source, where it says so: then these
            names are its labels, and a number is none.
        advice: What else to do about labels that are none.

    Raises:
        InputError: A label is neither, or some are names and others not.
    """
    texts = [_text(value) for value in values]
    known = dict(label_ids or {})
    meant = _by_own_name(texts, own_names)
    counts = Counter(texts)
    found = {text: class_named(meant.get(text, text), known) for text in counts}
    lost = [text for text, number in found.items() if number is None]
    named = [text for text, number in found.items() if number is not None]
    if not named:
        found = {text: _number(text) for text in counts}
        lost = [text for text, number in found.items() if number is None]
        if not lost:
            _check_range(where, values, texts, found, known)
    if lost:
        raise InputError(_not_understood(where, lost, named, known, advice))
    numbers = {text: number for text, number in found.items() if number is not None}
    names = {number: name for name, number in known.items()}
    told = [
        ClassCount(_shown(text, own_names), number, names.get(number), counts[text])
        for text, number in sorted(numbers.items(), key=lambda item: (item[1], item[0]))
    ]
    return Classes([numbers[text] for text in texts], told, absent(numbers.values(), known))


def absent(numbers: Iterable[int], known: Mapping[str, int]) -> list[str]:
    """A note of the model's classes that none of the examples is of, or none.

    Args:
        numbers: Classes of examples.
        known: The model's number of each of its classes' names.
    """
    names = {number: name for name, number in known.items()}
    lacking = sorted(names.keys() - {*numbers})
    if not lacking:
        return []
    listed = ", ".join(f"{n} {names[n]!r}" for n in lacking[:NAMED])
    more = f" and {len(lacking) - NAMED} more" if len(lacking) > NAMED else ""
    return [f"no example of the model's class {listed}{more}"]


def class_named(name: str, known: Mapping[str, int]) -> int | None:
    """The class of this name; upper and lower case count only where they tell names apart."""
    number = _number(name)
    for writing in (name, name if number is None else str(number)):
        if writing in known:
            return known[writing]
    same = {number for label, number in known.items() if folded(label) == folded(name)}
    return same.pop() if len(same) == 1 else None


def folded(name: str) -> str:
    """What is the same in two writings of a name: not upper and lower case, nor the normal form."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _text(value: Any) -> str:
    """A label as it is written; scalars of NumPy and torch are plain ones."""
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    return value if isinstance(value, str) else repr(value)


def _shown(text: str, own_names: Sequence[str] | None) -> str:
    number = _number(text)
    if own_names is None or number is None or number >= len(own_names):
        return text
    return f"{text} ({own_names[number]})"


def _number(text: str) -> int | None:
    found = NUMBER.fullmatch(text)
    return None if found is None else int(found[1])


def _by_own_name(texts: Sequence[str], own_names: Sequence[str] | None) -> dict[str, str]:
    """What each number of the source stands for, where the source says so."""
    if own_names is None:
        return {}
    numbers = {text: _number(text) for text in set(texts)}
    return {t: own_names[n] for t, n in numbers.items() if n is not None and n < len(own_names)}


def _check_range(
    where: str,
    values: Sequence[Any],
    texts: Sequence[str],
    found: Mapping[str, int | None],
    known: Mapping[str, int],
) -> None:
    outside = {t for t, n in found.items() if known and n is not None and n >= len(known)}
    if outside:
        place = next(i for i, text in enumerate(texts) if text in outside)
        raise InputError(
            f"{where} holds the label {values[place]!r}; the model has the {len(known)} classes 0 "
            f"to {len(known) - 1}, {_listed(known)}. Expected numbers from 0, or these names."
        )


def _not_understood(
    where: str,
    lost: Sequence[str],
    named: Sequence[str],
    known: Mapping[str, int],
    advice: str,
) -> str:
    if named:
        return (
            f"{where} holds the labels {_quoted(lost)}, which are no names of the model's classes, "
            f"beside {_quoted(named)}, which are. Expected all of them names "
            f"({_listed(known)}), or all of them numbers. {advice}".strip()
        )
    expected = _listed(known) if known else "whole numbers from 0"
    return f"{where} holds the labels {_quoted(lost)}; expected {expected}. {advice}".strip()


def _quoted(labels: Sequence[str]) -> str:
    return ", ".join(map(repr, sorted(labels)[:NAMED])) + ", ..." * (len(labels) > NAMED)


def _listed(known: Mapping[str, int]) -> str:
    return ", ".join(list(known)[:10]) + ", ..." * (len(known) > 10)
