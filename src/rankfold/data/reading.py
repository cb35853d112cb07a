"""The records of one source on their way to examples: what is used, what is left out and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rankfold.data.account import Account, spread_of
from rankfold.data.input_settings import InputSettings
from rankfold.data.labels import Classes, class_numbers
from rankfold.data.sources import Record, class_names, column, numbers
from rankfold.data.tokens import Tokens
from rankfold.errors import InputError


class Reading:
    """Records, of which some are left out with a reason; no other one disappears.

    Args:
        file: They come from.
        records: All of them, with the same columns.
        columns: Names of the columns ``text``, ``label``, ``target``, ``tokens``, ``tags``; None
            for these names.
        label_ids: The model's number of each label, or None.
        unit: What a record is called.
        inputs: What changes the model's inputs, as far as it is decided before.

    Raises:
        InputError: A column is asked for in place of one that ``inputs`` names and is there.
    """

    def __init__(
        self,
        file: Path,
        records: Sequence[Record],
        columns: Mapping[str, str | None],
        label_ids: Mapping[str, int] | None,
        unit: str = "record",
        inputs: InputSettings | None = None,
    ) -> None:
        recorded = inputs or InputSettings()
        self.file, self.records, self.label_ids, self.unit = file, records, label_ids, unit
        self.columns = {**recorded.columns, **{k: n for k, n in columns.items() if n is not None}}
        for kind, name in recorded.columns.items():
            self._refuse_other(kind, name)
        self.inputs = InputSettings()
        self.left_out: dict[str, list[int]] = {}
        self._used: set[str] = set()
        self._kinds: dict[str, str] = {}
        self._classes: Classes | None = None

    @property
    def places(self) -> list[int]:
        """Numbers of the records that are not left out."""
        gone = {place for places in self.left_out.values() for place in places}
        return [place for place in range(len(self.records)) if place not in gone]

    def name(self, kind: str) -> str:
        """What the column of this kind is called."""
        return self.columns.get(kind) or kind

    def _refuse_other(self, kind: str, recorded: str) -> None:
        name = self.name(kind)
        if name != recorded and recorded in self.records[0]:
            raise InputError(
                f"{kind}_column= is {name}, and the model was made with the column {recorded!r}, "
                f"which {self.file} has, too. Leave {kind}_column= out. To compute it otherwise on "
                "purpose, open the model in Python: rankfold.load(folder)."
            )

    def __contains__(self, kind: str) -> bool:
        """Whether there is a column of this kind."""
        return self.name(kind) in self.records[0]

    def values(self, kind: str) -> list[Any]:
        """A column, of all records.

        Raises:
            InputError: There is none; those that there are, are listed.
        """
        name = self.name(kind)
        found = column(self.file, self.records, name, f"{kind}_column=")
        self._used.add(name)
        self._kinds[kind] = name
        return found

    def present(self, kind: str) -> list[Any]:
        """The same; records without a value are left out."""
        found = self.values(kind)
        self.leave_out(f"without {kind}", [i for i in self.places if _missing(found[i])])
        return found

    def texts(self, kind: str) -> list[str]:
        """A column of texts; records without one are left out.

        Raises:
            InputError: A value is none.
        """
        found = self.present(kind)
        for place in self.places:
            value = found[place]
            if not isinstance(value, str):
                raise InputError(
                    f"the column {self.name(kind)!r} of {self.file} holds {str(value)[:60]!r} in "
                    f"record {place}, a {type(value).__name__}; expected texts."
                )
            if not value.isascii() and not _writable(value):
                raise InputError(
                    f"the column {self.name(kind)!r} of {self.file} holds {value[:60]!r} in record "
                    f"{place}: half of a character (a lone surrogate). Write the text again."
                )
        return found

    def classes(self, kind: str, values: Sequence[Any], advice: str) -> list[int]:
        """The class of each of some labels of a column.

        Raises:
            InputError: One is none.
        """
        name = self.name(kind)
        self._used.add(name)
        self._classes = class_numbers(
            f"the column {name!r} of {self.file}",
            values,
            self.label_ids,
            own_names=class_names(self.file, name),
            advice=advice,
        )
        return self._classes.numbers

    def numbers(self, names: Sequence[str]) -> list[list[float]]:
        """Columns of numbers, of the records that are not left out.

        Raises:
            InputError: A value is none.
        """
        self._used.update(names)
        places = self.places
        return [
            numbers(self.file, name, [self.records[p][name] for p in places], places)
            for name in names
        ]

    def leave_out(self, reason: str, places: Sequence[int]) -> None:
        """Leave out records.

        Raises:
            InputError: None is left.
        """
        if places:
            self.left_out.setdefault(reason, []).extend(places)
        if not self.places:
            reasons = "; ".join(f"{len(p)} {reason}" for reason, p in self.left_out.items())
            every = f"{len(self.records)} {self.unit}s of {self.file}"
            raise InputError(f"none of the {every} can be used: {reasons}.")

    def what(self, place: int) -> str:
        """A record, for messages."""
        return f"{self.unit} {place} of {self.file}"

    def account(
        self, lengths: Sequence[int] = (), tokens: Tokens | None = None, notes: Sequence[str] = ()
    ) -> Account:
        """What became of the records.

        Args:
            lengths: Tokens of each example.
            tokens: What made them, and knows what it cut.
            notes: What else is to be told.
        """
        decided = self.inputs if tokens is None else self.inputs.with_others(tokens.settings)
        if self.unit == "record":
            decided = replace(decided, columns=self._kinds)
        unused = [name for name in self.records[0] if name not in self._used]
        told = [f"columns that are not used: {', '.join(map(repr, unused))}"] if unused else []
        classes = self._classes
        return Account(
            source=str(self.file),
            unit=self.unit,
            given=len(self.records),
            used=len(self.places),
            left_out=self.left_out,
            lengths=spread_of(lengths),
            cut=0 if tokens is None else tokens.cut,
            most=None if tokens is None else tokens.length,
            classes=() if classes is None else classes.counts,
            notes=[
                *getattr(self.records, "notes", ()),
                *(() if classes is None else classes.notes),
                *notes,
                *told,
            ],
            inputs=decided,
        )


def _missing(value: Any) -> bool:
    """No value, as null, an empty cell and NaN are in a table."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def _writable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
