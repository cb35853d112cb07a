"""``(X, y)`` as data: each row is an example or left out and counted, whatever made the arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rankfold
from rankfold.data.arrays import NO_LABEL
from rankfold.data.given import GivenExamples, as_examples
from rankfold.errors import InputError
from tests.small_models import CLASSES, mlp

COUNT = 60
RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((COUNT, 6))
Y = RANDOM.integers(0, CLASSES, COUNT)
GAPS = Y == 0


def read(data: object) -> GivenExamples:
    found = as_examples(data)
    assert isinstance(found, GivenExamples)
    return found


GIVEN: dict[str, tuple[Any, Any]] = {
    "NumPy": (X, Y),
    "tensors": (torch.tensor(X, dtype=torch.float32), torch.tensor(Y)),
    "tensor and array": (torch.tensor(X, dtype=torch.float32), Y),
    "array and list": (X, Y.tolist()),
    "in no order of memory": (np.asfortranarray(X)[::-1][::-1], Y[::-1][::-1]),
    "of another machine": (X.astype(">f8"), Y.astype(">i4")),
    "small numbers": (X.astype(np.float32), Y.astype(np.uint8)),
}


@pytest.mark.parametrize("name", GIVEN)
def test_each_row_is_an_example(name: str) -> None:
    found = read(GIVEN[name])
    assert len(found) == COUNT and found.account is not None
    assert (found.account.given, found.account.used) == (COUNT, COUNT)
    for place, (inputs, label) in enumerate(found):
        assert inputs.dtype == torch.float32
        assert torch.equal(inputs, torch.tensor(X[place], dtype=torch.float32))
        assert int(label) == Y[place] and not label.is_floating_point()


def test_a_run_takes_them_as_it_takes_a_data_set() -> None:
    pairs = torch.utils.data.TensorDataset(torch.tensor(X, dtype=torch.float32), torch.tensor(Y))
    one, two = (
        rankfold.lossless(mlp(), data, size=0.9, effort="fast", margin=1.0)
        for data in ((X, Y), pairs)
    )
    assert one.report["certificate"] == two.report["certificate"]
    (source,) = one.report["sources"]
    assert source["source"] == "(X, y)" and source["given"] == COUNT
    assert "X is float64" in source["notes"][0]


@given(gaps=st.lists(st.booleans(), min_size=COUNT, max_size=COUNT).filter(lambda g: not all(g)))
@settings(max_examples=25, deadline=None)
def test_rows_are_used_or_left_out_for_a_reason(gaps: list[bool]) -> None:
    labels = np.array([None if gap else int(y) for y, gap in zip(Y, gaps, strict=True)], object)
    found = read((X, labels))
    account = found.account
    assert account is not None
    left_out = account.left_out.get(NO_LABEL, ())
    assert account.given == COUNT == account.used + len(left_out)
    assert list(left_out) == [place for place, gap in enumerate(gaps) if gap]
    kept = [place for place, gap in enumerate(gaps) if not gap]
    assert [int(label) for _, label in found] == Y[kept].tolist()


def test_values_with_nan_are_left_out() -> None:
    values = X[:, :2].copy()
    values[3, 1] = np.nan
    found = read((X, values))
    assert len(found) == COUNT - 1 and found.account is not None
    assert found.account.left_out == {NO_LABEL: [3]}
    assert all(torch.isfinite(label).all() and label.shape == (2,) for _, label in found)


def test_of_pandas() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(X, columns=[f"c{n}" for n in range(6)])
    found = read((frame, pandas.Series(Y, dtype="Int64").where(~GAPS)))
    assert found.account is not None
    assert len(found) == COUNT - GAPS.sum() == found.account.used
    assert found.account.inputs.features == tuple(frame.columns)
    assert [int(label) for _, label in found] == Y[~GAPS].tolist()
    with pytest.raises(InputError, match="classes, or values"):
        read((frame, pandas.Series(Y).where(~GAPS)))
    with pytest.raises(InputError, match="columns kind hold no numbers"):
        read((frame.assign(kind="x"), Y))
    with pytest.raises(InputError, match="texts"):
        read((frame, pandas.Series(["a", "b"] * 30, dtype="category")))


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "lengths": (lambda: (X, Y[:-1]), "60 rows in X and 59 in y"),
    "texts as labels": (lambda: (X, np.array(["a", "b"] * 30)), "holds texts.*numbers of classes"),
    "texts as inputs": (lambda: (np.array([["a"]] * COUNT), Y), "X in.*expected numbers"),
    "NaN in X": (lambda: (np.where(X > 2, np.nan, X), Y), "row 13 of X.*missing"),
    "too large": (lambda: (X * 1e300, Y), "too large for torch.float32"),
    "X of one axis": (lambda: (X[:, 0], Y), r"X\[:, None\]"),
    "y of two axes": (lambda: (X, Y[:, None]), r"give y\[:, 0\]"),
    "no label": (lambda: (X, np.array([None] * COUNT)), "holds nothing"),
    "whole numbers and gaps": (lambda: (X, np.where(GAPS, np.nan, Y)), "classes, or values"),
    "a list": (lambda: [X, Y], r"as a tuple, \(X, y\)"),
    "objects": (lambda: (X, np.array([{}] * COUNT, object)), "holds dict"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name: str) -> None:
    make, message = WRONG[name]
    with pytest.raises(InputError, match=message):
        as_examples(make())


def test_of_scipy() -> None:
    sparse = pytest.importorskip("scipy.sparse")
    with pytest.raises(InputError, match=r"Give X.toarray\(\)"):
        as_examples((sparse.csr_matrix(X), Y))
