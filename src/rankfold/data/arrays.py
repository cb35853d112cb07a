"""Plain arrays of inputs and labels, ``(X, y)``, of NumPy, torch or pandas: a row is an example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from rankfold.data.account import Account
from rankfold.data.example import describe, plain_value
from rankfold.data.input_settings import InputSettings
from rankfold.errors import InputError, visible

NO_LABEL = "without a label (nothing, or NaN, in y)"
SOURCE = "(X, y)"  # what the report calls it
NAMED = 5  # columns that a message names


def is_arrays(data: object) -> TypeGuard[tuple[Any, Any]]:
    """Whether this is a tuple of an array, or a pandas DataFrame, and its labels."""
    if not isinstance(data, tuple) or len(data) != 2:
        return False
    x, y = data
    return _is_array(x) and (_is_array(y) or (isinstance(y, list | tuple) and len(y) == len(x)))


def _is_array(value: object) -> bool:
    """Of NumPy, torch, pandas or scipy, with an axis at least."""
    shape = getattr(value, "shape", None)
    known = hasattr(value, "dtype") or hasattr(value, "dtypes")
    return shape is not None and known and len(shape) > 0


class ArrayPairs(Sequence[Any]):
    """Examples ``(input, label)`` of two arrays.

    Args:
        x: ``(n, ...)`` inputs. A DataFrame has columns of numbers.
        y: ``(n,)`` numbers of classes, ``(n,)`` or ``(n, k)`` values, or ``(n, length)`` labels of
            tokens. A row whose label is missing is left out, and counted.

    Attributes:
        account: What became of the rows.

    Raises:
        InputError: Says which of the two isn't what it should be.
    """

    def __init__(self, x: Any, y: Any) -> None:
        self._x, features, notes = _inputs(x)
        if len(self._x) != len(y):
            raise InputError(
                f"data is (X, y) with {len(self._x)} rows in X and {len(y)} in y; expected a label "
                "for each row of X."
            )
        self._y, missing, more = _labels(y)
        self._rows = [row for row in range(len(self._y)) if not missing[row]]
        left_out = {NO_LABEL: missing.nonzero()[0].tolist()} if missing.any() else {}
        self.account = Account(
            SOURCE,
            "row",
            len(missing),
            len(self._rows),
            left_out,
            notes=[*notes, *more],
            inputs=InputSettings(features=features),
        )
        if not self._rows:
            raise InputError("data is (X, y) without one label in y; expected one for each row.")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: Any) -> Any:
        row = self._rows[place]
        return self._x[row], self._y[row]


def _inputs(x: Any) -> tuple[Tensor, tuple[str, ...] | None, list[str]]:
    """The rows, the names of their columns where they have some, and what was decided."""
    features: tuple[str, ...] | None = None
    if hasattr(x, "columns") and hasattr(x, "to_numpy"):
        x, features = _table(x)
    if not isinstance(x, Tensor | np.ndarray):
        dense = " Give X.toarray()." if hasattr(x, "toarray") else ""
        raise InputError(
            f"X in (X, y) is {type(x).__name__}; expected an array of NumPy, a tensor, or a "
            f"DataFrame of pandas.{dense}"
        )
    if x.ndim < 2:
        raise InputError(
            f"X in (X, y) is {describe(x)}; expected an example in each row, (n, ...). "
            "Where an input is one number, give X[:, None]."
        )
    if isinstance(x, np.ndarray) and x.dtype.kind not in "fiub":
        raise InputError(f"X in (X, y) is {describe(x)}; expected numbers.")
    rows, notes = _as_usual(x, "X")
    if rows.is_floating_point():
        finite = torch.isfinite(rows).flatten(1).all(1)
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            raise InputError(
                f"row {row} of X in (X, y) holds a value that is missing (NaN), infinite or too "
                f"large for {rows.dtype}; expected finite ones. Leave such rows out, or fill them."
            )
    return rows, features, notes


def _table(frame: Any) -> tuple[np.ndarray, tuple[str, ...]]:
    """The numbers of a DataFrame, and its columns' names."""
    numbers = frame.select_dtypes(include=["number", "bool"])
    others = [str(name) for name in frame.columns if name not in set(numbers.columns)]
    if others:
        listed = ", ".join(visible(name) for name in others[:NAMED])
        raise InputError(
            f"X in (X, y) is a DataFrame whose columns {listed} hold no numbers; expected numbers "
            "alone. Leave these columns out, or write them as numbers as the model was trained."
        )
    return frame.to_numpy(dtype=np.float64, na_value=np.nan), tuple(map(str, frame.columns))


def _labels(y: Any) -> tuple[Tensor, np.ndarray, list[str]]:
    """Labels, which of them are missing, where zeros stand, and what was decided."""
    if isinstance(y, Tensor):
        labels = plain_value(y, "y in (X, y)")
        notes: list[str] = []
        missing = np.zeros(len(y), dtype=bool)
    else:
        array = y.to_numpy(dtype=object, na_value=None) if hasattr(y, "to_numpy") else np.asarray(y)
        filled, missing = _without_gaps(array)
        labels, notes = _as_usual(filled, "y")
    if labels.dtype == torch.bool:
        labels = labels.to(torch.int64)
    if labels.is_floating_point():
        nan = torch.isnan(labels).view(len(labels), -1).any(1)
        labels = torch.where(nan.view(-1, *[1] * (labels.dim() - 1)), 0, labels)
        missing = missing | nan.cpu().numpy()
        _refuse_two_meanings(labels, missing)
    elif labels.dim() == 2 and labels.shape[1] == 1:
        raise InputError(f"y in (X, y) is {describe(labels)}; expected (n,): give y[:, 0].")
    return labels, missing, notes


def _refuse_two_meanings(labels: Tensor, missing: np.ndarray) -> None:
    """Refuse whole numbers that only gaps may have made floating point, as in pandas."""
    if missing.any() and labels.dim() == 1 and bool((labels == labels.round()).all()):
        raise InputError(
            "y in (X, y) holds whole numbers in floating point, and gaps (NaN): classes, or "
            'values? Give classes with gaps as pandas\' y.astype("Int64"), or leave these rows out '
            "of X and y."
        )


def _without_gaps(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers, zeros where an array of objects holds nothing, and where that is."""
    if y.dtype.kind in "US" or any(isinstance(value, str | bytes) for value in y.flat):
        text = next(value for value in y.flat if isinstance(value, str | bytes))
        raise InputError(
            f"y in (X, y) holds texts ({visible(repr(str(text))[:40])}); expected numbers of "
            "classes from 0, in the order of the model's outputs."
        )
    if y.dtype != object:
        return y, np.zeros(len(y), dtype=bool)
    nothing = np.array([_is_nothing(value) for value in y.flat], dtype=bool).reshape(y.shape)
    kinds = {type(value.item() if hasattr(value, "item") else value) for value in y[~nothing].flat}
    if not kinds or kinds - {bool, int, float}:
        found = ", ".join(sorted(kind.__name__ for kind in kinds)) or "nothing"
        raise InputError(f"y in (X, y) holds {found}; expected numbers.")
    filled = np.where(nothing, 0, y).astype(np.float64 if float in kinds else np.int64)
    # Of floating point numbers NaN says it: whether they are classes is asked then.
    filled = np.where(nothing, np.nan, filled) if float in kinds else filled
    return filled, np.asarray(nothing.reshape(len(y), -1).any(axis=1))


def _as_usual(values: Tensor | np.ndarray, name: str) -> tuple[Tensor, list[str]]:
    """A tensor; NumPy's floating point numbers, which it makes float64, are torch's usual ones."""
    found = plain_value(values, f"{name} in (X, y)")
    usual = torch.get_default_dtype()
    if isinstance(values, Tensor) or found.dtype != torch.float64 or usual == torch.float64:
        return found, []
    kind = str(usual).removeprefix("torch.")
    return found.to(usual), [f"{name} is float64, and is read as {kind}: give a tensor to keep it"]


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)
