from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import rankfold
from rankfold.certificate.certify import certify, examples_seen
from rankfold.certificate.change import paired_change, weighted_mean
from rankfold.certificate.statement import (
    TESTS,
    Statement,
    TestName,
    fewest_units,
    half_width,
    state,
)
from rankfold.errors import InputError
from rankfold.tasks.evaluation import Evaluation


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
    changes = torch.tensor(differences, dtype=torch.float64)
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


# The statement, and the tests that need one


def differences_certificate(
    values: list[float], statement: Statement, **more: Any
) -> rankfold.Certificate:
    return certify(
        evaluation([1.0] * len(values)),
        evaluation([1.0 + v for v in values]),
        statement,
        unit="nats",
        data_digest="",
        **more,
    )


def stated(margin: float = 0.05, **more: Any) -> Statement:
    return Statement(margin=margin, lowest=-0.5, highest=0.5, range_from="stated", **more)


def gaussian(n: int, mean: float = 0.0, deviation: float = 0.03, seed: int = 0) -> list[float]:
    """Of exactly this mean and deviation."""
    values = torch.randn(n, generator=torch.Generator().manual_seed(seed)).double()
    return (mean + deviation * (values - values.mean()) / values.std()).tolist()


def from_selection(
    n: int, held_out: int, test: str = "bounded", seed: int = 9, **more: Any
) -> Statement:
    values = torch.tensor(gaussian(n, seed=seed)).double()
    selection = weighted_mean(values, torch.ones_like(values))
    chosen = {"margin": 0.01, "confidence": 0.95, "largest_change": None, "metric_margins": {}}
    return state(selection, values, held_out, test=test, **{**chosen, **more})


@pytest.mark.parametrize(("held_out", "selection"), [(16, 8), (16, 32), (64, 32), (128, 32)])
def test_on_well_behaved_data_the_default_is_within_1_3_of_t(held_out: int, selection: int) -> None:
    ratios = []
    for seed in range(20):
        values = gaussian(held_out, seed=seed)
        found = differences_certificate(
            values, from_selection(selection, held_out, seed=100 + seed)
        )
        ratios.append((found.upper_bound - found.change) / (found.t_upper_bound - found.change))
    assert 1.0 < sum(ratios) / len(ratios) < 1.3


def test_the_planned_half_width_is_about_the_one_found() -> None:
    seeds = range(30)
    for test in TESTS:
        for n in (32, 200):
            statement = from_selection(400, n, test)
            found = [differences_certificate(gaussian(n, seed=seed), statement) for seed in seeds]
            width = sum(c.upper_bound - c.change for c in found) / len(seeds)
            assert half_width(0.03, n, 0.95, test) == pytest.approx(width, rel=0.25)


def test_the_range_counts_changes_up_to_the_margin_and_all_that_was_seen() -> None:
    values = torch.tensor([-0.5, -0.5, -0.4, -0.5]).double()
    selection = weighted_mean(values, torch.ones(4).double())
    found = state(
        selection,
        values,
        16,
        margin=0.01,
        confidence=0.95,
        test="bounded",
        largest_change=None,
        metric_margins={},
    )
    assert found.highest == 0.01 and found.lowest is not None and found.lowest < -0.5
    assert from_selection(8, 16, largest_change=2.0).highest == 2.0
    assert from_selection(8, 16, "t").highest is None


def test_what_lies_above_the_range_is_counted_and_told() -> None:
    found = differences_certificate([0.0] * 30 + [3.0], stated())
    assert (found.above, found.units) == (1, 31)
    assert found.share_above == pytest.approx(stats.beta.ppf(0.95, 2, 30))
    assert found.upper_bound > differences_certificate([0.0] * 30 + [0.5], stated()).upper_bound


def test_groups_are_the_units() -> None:
    values = [v for v in gaussian(20) for _ in range(10)]  # ten equal windows a document
    groups = [str(i // 10) for i in range(200)]
    alone = differences_certificate(values, stated())
    together = differences_certificate(values, stated(), groups=groups)
    assert together.units == 20 and together.examples == 200
    assert together.change == pytest.approx(alone.change)
    assert together.standard_error > 2.5 * alone.standard_error
    assert together.upper_bound == pytest.approx(
        differences_certificate(values[::10], stated()).upper_bound
    )
    with pytest.raises(InputError, match="1 independent group"):
        differences_certificate(values, stated(), groups=["a"] * 200)
    with pytest.raises(InputError, match="3 groups for 200"):
        differences_certificate(values, stated(), groups=["a", "b", "c"])
    with pytest.raises(InputError, match="come in groups"):
        differences_certificate(values, stated(test="betting"), groups=groups)


def test_not_shown_says_how_many_examples_would_do_and_they_do() -> None:
    statement = from_selection(400, 64)
    found = differences_certificate(gaussian(64, mean=0.006), statement)
    assert found.verdict == "not shown"
    assert found.needed is not None and 64 < found.needed < 2000
    more = differences_certificate(
        gaussian(found.needed, mean=0.006), from_selection(400, found.needed)
    )
    assert more.holds
    hopeless = differences_certificate(gaussian(64, mean=0.012), statement)
    assert (hopeless.verdict, hopeless.needed) == ("not shown", None)
    assert differences_certificate(gaussian(64, mean=-0.1), statement).needed is None


def test_too_few_for_anything_is_clopper_and_pearsons_number() -> None:
    assert fewest_units(0.01, 1.0, 0.95) == 299
    n = fewest_units(0.05, 0.5, 0.95)
    assert n == 29
    for count, holds in ((n, True), (n - 1, False)):
        assert differences_certificate([0.0] * count, stated()).holds is holds
    assert fewest_units(0.0, 1.0, 0.95) is None
    assert fewest_units(2.0, 1.0, 0.95) == 1


@pytest.mark.parametrize("name", [n for n in TESTS if n != "t"])
def test_a_range_must_be_stated(name: TestName) -> None:
    with pytest.raises(InputError, match="needs a finite range"):
        Statement(test=name)
    with pytest.raises(InputError, match="needs a finite range"):
        Statement(test=name, lowest=-1.0, highest=math.inf)


def test_betting_stops_once_it_is_shown_and_its_bound_agrees() -> None:
    values = torch.tensor(gaussian(400, mean=-0.01)).double()
    statement = stated(test="betting", deviation=0.03)
    seen = examples_seen(values, torch.ones(400).double(), statement)
    assert seen is not None and seen < 200
    for count, holds in ((seen, True), (seen - 1, False)):
        assert differences_certificate(values[:count].tolist(), statement).holds is holds
    worse = torch.tensor(gaussian(400, mean=0.2)).double()
    assert examples_seen(worse, torch.ones(400).double(), statement) is None


# Metrics


def with_metric(before: list[float], after: list[float], margin: float | None = None) -> Any:
    margins = {} if margin is None else {"f1": margin}
    return differences_certificate(
        [0.0] * len(before),
        stated(metric_margins=margins),
        metrics={"f1": (torch.tensor(before).double(), torch.tensor(after).double())},
    )


def test_a_metric_is_reported_and_with_a_margin_it_must_hold() -> None:
    before, after = [0.9] * 40, [0.6] * 40
    (metric,) = with_metric(before, after).metrics
    assert metric.lost == pytest.approx(0.3) and metric.verdict is None
    assert with_metric(before, after).verdict == "lossless"
    assert with_metric(before, after, margin=0.1).verdict == "worse"
    assert with_metric(before, after, margin=0.5).holds
    unsure = with_metric([0.9, 0.1] * 20, [0.1, 0.9] * 20, margin=0.1)
    assert unsure.verdict == "not shown" and unsure.needed > 40


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ([0.5, 1.2, 0.5, 0.5], r"f1 is 1.2\d* for example 1 of the factorized model"),
        ([0.5, 0.5, -0.1, 0.5], r"f1 is -0.1\d* for example 2"),
        ([0.5, 0.5, 0.5, math.nan], "f1 is nan for example 3"),
        ([0.5] * 3, r"gave \(3,\) values for 4 examples"),
    ],
)
def test_metrics_outside_their_range_are_refused(after: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        with_metric([0.5] * 4, after)


def test_accuracy_has_mcnemars_p_value() -> None:
    ones = torch.ones(50, dtype=torch.float64)
    right, wrong = ones.clone(), ones.clone()
    right[:3] = 0
    wrong[2:12] = 0
    found = certify(
        Evaluation(ones, ones, right),
        Evaluation(ones, ones, wrong),
        stated(),
        unit="nats",
        data_digest="",
    )
    (accuracy,) = found.metrics
    assert accuracy.lost == pytest.approx(7 / 50)
    expected = stats.binomtest(9, 11, 0.5, alternative="greater").pvalue
    assert accuracy.p_value == pytest.approx(expected)
    assert accuracy.lower_bound > 0  # both tests agree that accuracy is lost


def test_a_margin_for_a_metric_that_there_is_not_is_refused() -> None:
    with pytest.raises(InputError, match="a margin is stated for accuracy"):
        differences_certificate([0.0] * 40, stated(metric_margins={"accuracy": 0.01}))


def test_unequal_numbers_of_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="4 and 3 of them"):
        certify(evaluation([1] * 4), evaluation([1] * 3), stated(), unit="", data_digest="")
