"""Records of named columns: ``.jsonl`` (a JSON object a line), ``.csv``, ``.tsv``, and Arrow's."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any, TypeAlias

from rankfold.data.sources.arrow import SUFFIXES as ARROW_SUFFIXES
from rankfold.data.sources.arrow import read_arrow
from rankfold.errors import InputError, note

Record: TypeAlias = dict[str, Any]
SUFFIXES = (".jsonl", ".csv", ".tsv", *ARROW_SUFFIXES)
QUOTE = '"'


class Records(list[Record]):
    """Records, each with the same columns.

    Attributes:
        notes: What was decided while they were read, a sentence each.
    """

    def __init__(self, records: Iterable[Record], notes: Sequence[str] = ()) -> None:
        super().__init__(records)
        self.notes = notes


def read_records(file: Path) -> Records:
    """All records of a file or of a ``save_to_disk`` folder, each with the same columns.

    A ``.csv`` or ``.tsv`` names its columns in the first line; its values are texts. A quoted
    value may run over lines. In a ``.tsv`` whose quotes don't pair up they are part of the texts.

    Raises:
        InputError: Unreadable, not UTF-8, empty, or a line that is no record; the line is named.
    """
    if file.is_dir() or file.suffix.lower() in ARROW_SUFFIXES:
        records = Records(read_arrow(file))
    else:
        records = _written(file)
    if not records:
        raise InputError(f"the data {file} holds no record.")
    return records


def _written(file: Path) -> Records:
    try:
        text = file.read_bytes().decode("utf-8-sig")  # as it is: no newline is translated
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the data {file} can't be read as UTF-8: {error}.") from error
    suffix = file.suffix.lower()
    return _json_lines(file, text) if suffix == ".jsonl" else _table(file, text, suffix)


def _json_lines(file: Path, text: str) -> Records:
    records: list[Record] = []
    # JSON Lines end in \n alone: other separators, such as U+2028, may stand in a text.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise InputError(f"line {number} of {file} is not valid JSON: {error}.") from error
        if not isinstance(record, dict):
            raise InputError(
                f"line {number} of {file} is a {type(record).__name__}; expected a JSON object "
                'such as {"text": "..."}.'
            )
        if records and record.keys() != records[0].keys():
            note(*record, *records[0])
            raise InputError(
                f"line {number} of {file} has the columns {', '.join(record)}; the first line has "
                f"{', '.join(records[0])}. Expected the same in every line."
            )
        records.append(record)
    return Records(records)


def _object(pairs: list[tuple[str, Any]]) -> Record:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(n for n, _ in pairs).items() if count > 1)
        raise ValueError(f"the name {twice!r} stands twice in one object")
    return found


def _table(file: Path, text: str, suffix: str) -> Records:
    rows, notes = _tabbed(file, text) if suffix == ".tsv" else (_rows(file, text, ","), [])
    blank = sum(not row for _, row in rows)
    rows = [(line, row) for line, row in rows if row]
    if not rows:
        return Records([])
    header = rows[0][1]
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice:
        raise InputError(
            f"{file} has {header.count(twice[0])} columns called {twice[0]!r}; expected names that "
            "differ. Rename one of them."
        )
    for number, (line, row) in enumerate(rows[1:], start=2):
        if len(row) != len(header):
            raise InputError(
                f"row {number} of {file} has {len(row)} values for {len(header)} columns "
                f"({', '.join(header)}). It ends in line {line}."
            )
    if blank:
        notes = [*notes, f"{blank} blank lines are no records"]
    return Records((dict(zip(header, row, strict=True)) for _, row in rows[1:]), notes)


def _rows(file: Path, text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """The rows and the line in which each ends; a quoted value may run over lines.

    Raises:
        InputError: The quotes are not those of a table.
    """
    reader = csv.reader(StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        with _long_fields():
            return [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise InputError(
            f"line {reader.line_num} of {file} can't be read as a table: {error}. Expected values "
            'with quotes around them where they hold commas, quotes or newlines, and "" for a '
            "quote in them."
        ) from error


@contextmanager
def _long_fields() -> Iterator[None]:
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _tabbed(file: Path, text: str) -> tuple[list[tuple[int, list[str]]], list[str]]:
    """The rows of a ``.tsv``, with quotes around values, or with quotes that are part of them.

    Both are written. Quotes are around values where every value that begins with one ends with
    one, or where only so each row has a value for each column.
    """
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    literal = [(n, line.split("\t") if line else []) for n, line in enumerate(lines, start=1)]
    while literal and not literal[-1][1]:
        literal.pop()
    opened = [value for _, row in literal for value in row if value.startswith(QUOTE)]
    if not opened:
        return literal, []
    try:
        quoted = _rows(file, text, "\t")
    except InputError:
        if not _rectangular(literal):
            raise
        return literal, ["quotes are part of the values: they don't pair up"]
    if all(map(_enclosed, opened)) or not _rectangular(literal):
        return quoted, ["quotes around values are no part of them"]
    return literal, ["quotes are part of the values: some begin with one and don't end with one"]


def _rectangular(rows: Sequence[tuple[int, list[str]]]) -> bool:
    return len({len(row) for _, row in rows if row}) == 1


def _enclosed(value: str) -> bool:
    inside = value[1:-1].replace(QUOTE * 2, "")
    return len(value) > 1 and value.endswith(QUOTE) and QUOTE not in inside


def column(file: Path, records: Sequence[Record], name: str, option: str) -> list[Any]:
    """The values of one column.

    Raises:
        InputError: There is no such column; those that there are, are listed.
    """
    if name not in records[0]:
        raise InputError(
            f"{file} has no column {name!r}; it has {', '.join(map(repr, records[0]))}. "
            f"Name one of them with {option}."
        )
    return [record[name] for record in records]


def numbers(
    file: Path, name: str, values: Sequence[Any], places: Sequence[int] | None = None
) -> list[float]:
    """A column's values as numbers.

    Args:
        file: For messages.
        name: Of the column.
        values: Some of its values.
        places: The records that they are of; None for all.

    Raises:
        InputError: One is none, or not finite; its record is named.
    """
    found: list[float] = []
    for place, value in zip(places or range(len(values)), values, strict=True):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise InputError(
                f"the column {name!r} of {file} holds {value!r} in record {place}; expected "
                "numbers."
            )
        found.append(number)
    return found
