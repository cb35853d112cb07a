"""A ``datasets.Dataset`` as data: each record is an example, or left out for a reason.

``datasets`` isn't imported here: who has such an object has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rankfold.data.account import Account
from rankfold.data.example import LABELS
from rankfold.data.labels import class_numbers
from rankfold.errors import InputError, visible

SOURCE = "datasets.Dataset"  # of one that has no name
AT_ONCE = 1000  # records, of which gaps are looked for


def is_hub_data(data: object) -> bool:
    """Whether this is a ``datasets.Dataset``, which knows its length."""
    names = (f"{base.__module__}.{base.__qualname__}" for base in type(data).__mro__)
    return "datasets.arrow_dataset.Dataset" in names


class HubRecords(Sequence[Any]):
    """The records of a ``datasets.Dataset`` that have all that the model is given.

    Args:
        data: Its columns of texts are left out of every example, as they are of any mapping.

    Attributes:
        account: What became of the records.

    Raises:
        InputError: It holds nothing but texts and labels, or no record is whole.
    """

    def __init__(self, data: Any) -> None:
        self._data = data
        used = [name for name in data.column_names if not _is_text(data.features[name])]
        if not any(name not in LABELS for name in used):
            raise InputError(_without_inputs(data))
        lacking = _gaps(data, used)
        left_out: dict[str, list[int | str]] = {}
        for place, column in lacking.items():
            left_out.setdefault(f"without {visible(column)}", []).append(place)
        self._places = [place for place in range(len(data)) if place not in lacking]
        if not self._places:
            reasons = ", ".join(left_out) or "it is empty"
            raise InputError(f"{_name(data)} has no record that can be used: {reasons}.")
        label = next((name for name in LABELS if name in used), None)
        names = None if label is None else getattr(data.features[label], "names", None)
        classes: Sequence[Any] = ()
        if label is not None and names is not None:
            values = data.with_format(None)[label]
            classes = class_numbers(
                f"the column {label!r} of {_name(data)}",
                [values[place] for place in self._places],
                None,
                own_names=names,
            ).counts
        self.account = Account(
            _name(data), "record", len(data), len(self._places), left_out, classes=classes
        )

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: Any) -> Any:
        return self._data[self._places[place]]


def _name(data: Any) -> str:
    name = getattr(data.info, "dataset_name", None) or getattr(data.info, "builder_name", None)
    split = "" if data.split is None else f":{data.split}"
    return f"{name}{split}" if name else SOURCE


def _is_text(feature: Any) -> bool:
    """Whether a column holds texts, or lists of texts."""
    while (inner := getattr(feature, "feature", None)) is not None:
        feature = inner
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _gaps(data: Any, columns: Sequence[str]) -> dict[int, str]:
    """Of each record that holds nothing in one of the columns, which column that is."""
    found: dict[int, str] = {}
    start = 0
    for table in data.with_format("arrow").iter(AT_ONCE):
        for name in columns:
            column = table.column(name)
            if column.null_count:
                empty = [place for place, gap in enumerate(column.is_null().to_pylist()) if gap]
                for place in empty:
                    found.setdefault(start + place, name)
        start += table.num_rows
    return dict(sorted(found.items()))


def _without_inputs(data: Any) -> str:
    columns = ", ".join(visible(name) for name in data.column_names) or "none"
    texts = [name for name in data.column_names if _is_text(data.features[name])]
    advice = ""
    if texts:
        row = f"rows[{texts[0]!r}]"
        advice = (
            f" Tokenize it: data.map(lambda rows: tokenizer({row}, truncation=True), batched=True)."
        )
    return (
        f"{_name(data)} has no input for the model: its columns are {columns}; expected numbers, "
        f"such as the input_ids that a tokenizer gives.{advice}"
    )
