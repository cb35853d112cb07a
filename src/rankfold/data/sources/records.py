"""Records of named columns: ``.jsonl`` (a JSON object a line), ``.csv``, ``.tsv``, and Arrow's."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from rankfold.data.sources.arrow import SUFFIXES as ARROW_SUFFIXES
from rankfold.data.sources.arrow import read_arrow
from rankfold.errors import InputError

Record: TypeAlias = dict[str, Any]
SUFFIXES = (".jsonl", ".csv", ".tsv", *ARROW_SUFFIXES)


def read_records(file: Path) -> list[Record]:
    """All records of a file or of a ``save_to_disk`` folder, each with the same columns.

    A ``.csv`` or ``.tsv`` names its columns in the first line; its values are texts.

    Raises:
        InputError: Unreadable, not UTF-8, empty, or a line that is no record; the line is named.
    """
    if file.is_dir() or file.suffix.lower() in ARROW_SUFFIXES:
        records = read_arrow(file)
    else:
        records = _written(file)
    if not records:
        raise InputError(f"the data {file} holds no record.")
    return records


def _written(file: Path) -> list[Record]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the data {file} can't be read as UTF-8: {error}.") from error
    suffix = file.suffix.lower()
    return _json_lines(file, text) if suffix == ".jsonl" else _table(file, text, suffix)


def _json_lines(file: Path, text: str) -> list[Record]:
    records: list[Record] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"line {number} of {file} is not valid JSON: {error}.") from error
        if not isinstance(record, dict):
            raise InputError(
                f"line {number} of {file} is a {type(record).__name__}; expected a JSON object "
                'such as {"text": "..."}.'
            )
        if records and record.keys() != records[0].keys():
            raise InputError(
                f"line {number} of {file} has the columns {', '.join(record)}; the first line has "
                f"{', '.join(records[0])}. Expected the same in every line."
            )
        records.append(record)
    return records


def _table(file: Path, text: str, suffix: str) -> list[Record]:
    rows = list(csv.reader(text.splitlines(), delimiter="\t" if suffix == ".tsv" else ","))
    rows = [row for row in rows if row]
    if not rows:
        return []
    header, body = rows[0], rows[1:]
    for number, row in enumerate(body, start=2):
        if len(row) != len(header):
            raise InputError(
                f"row {number} of {file} has {len(row)} values for {len(header)} columns "
                f"({', '.join(header)})."
            )
    return [dict(zip(header, row, strict=True)) for row in body]


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


def numbers(file: Path, name: str, values: Sequence[Any]) -> list[float]:
    """A column's values as numbers.

    Raises:
        InputError: One is none; its record is named.
    """
    found: list[float] = []
    for place, value in enumerate(values):
        try:
            found.append(float(value))
        except (TypeError, ValueError) as error:
            raise InputError(
                f"the column {name!r} of {file} holds {value!r} in record {place}; expected "
                "numbers."
            ) from error
    return found
