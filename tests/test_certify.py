from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rankfold.certify import Statement, certify, paired_change, weighted_mean
from rankfold.errors import InputError
from rankfold.tasks import Evaluation


def evaluation(losses: list[float], terms: list[float] | None = None) -> Evaluation:
    values = torch.tensor(losses, dtype=torch.float64)
    counts = torch.ones_like(values) if terms is None else torch.tensor(terms).double()
    return Evaluation(values, counts, None)


def certificate(differences: list[float], margin: float = 0.1, confidence: float = 0.95):
    return certify(
        evaluation([1.0] * len(differences)),
        evaluation([1.0 + d for d in differences]),
        Statement(margin=margin, confidence=confidence, test="t"),
        unit="nats",
        data_digest="",
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=4, max_size=30), st.floats(0.6, 0.99))
def test_bounds_are_those_of_the_one_sided_t_test(differences: list[float], confidence: float):
    found = certificate(differences, confidence=confidence)
    if found.standard_error < 1e-9:
        return
    changes = torch.tensor(differences).double()
    for bound, side in ((found.upper_bound, "less"), (found.lower_bound, "greater")):
        p = stats.ttest_1samp(changes.numpy(), bound, alternative=side).pvalue
        assert p == pytest.approx(1 - confidence, abs=1e-6)


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([-0.2, -0.3, -0.25, -0.2], "better"),
        ([0.01, 0.02, -0.01, 0.0], "lossless"),
        ([0.3, 0.31, 0.29, 0.3], "worse"),
        ([0.5, -0.5, 0.4, -0.4], "not shown"),
        ([0.0, 0.0, 0.0, 0.0], "lossless"),
    ],
)
def test_verdicts(differences: list[float], verdict: str) -> None:
    found = certificate(differences)
    assert found.verdict == verdict
    assert found.holds == (verdict in ("better", "lossless"))
    assert found.as_dict()["examples"] == 4


def test_examples_count_by_their_terms() -> None:
    values, weights = torch.tensor([1.0, 2.0, 4.0]).double(), torch.tensor([1.0, 1.0, 2.0]).double()
    found = weighted_mean(values, weights)
    assert found.mean == pytest.approx(2.75)
    residuals = [0.25 * -1.75, 0.25 * -0.75, 0.5 * 1.25]
    error = math.sqrt(sum(r * r for r in residuals) * 3 / 2)
    assert found.standard_error == pytest.approx(error)


def test_evaluations_of_different_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="different examples"):
        paired_change(evaluation([1, 2], [3, 4]), evaluation([1, 2], [4, 3]))


@pytest.mark.parametrize("margin", [-0.1, math.nan, math.inf])
def test_bad_margins_are_refused(margin: float) -> None:
    with pytest.raises(InputError, match="margin is"):
        certificate([0.0] * 4, margin=margin)


@pytest.mark.parametrize("confidence", [0.5, 1.0, 0.0])
def test_bad_confidences_are_refused(confidence: float) -> None:
    with pytest.raises(InputError, match="confidence is"):
        certificate([0.0] * 4, confidence=confidence)
