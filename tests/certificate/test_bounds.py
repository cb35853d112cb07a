"""The bounds against exact truths: Clopper-Pearson, Monte Carlo of their definition, coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rankfold.certificate.bounds import (
    BettingTest,
    bounded_bound,
    mcnemar_p_value,
    mean_and_error,
    mean_p_value,
    share_bound,
    t_bound,
)

VALUES = st.lists(st.floats(-2, 2).map(lambda v: round(v, 3)), min_size=2, max_size=30)


def ones(values: np.ndarray) -> np.ndarray:
    return np.ones(values.shape)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.data(), st.sampled_from([0.8, 0.95, 0.99]))
def test_for_zeros_and_ones_the_bound_is_clopper_and_pearsons(
    n: int, data: st.DataObject, confidence: float
) -> None:
    count = data.draw(st.integers(0, n))
    values = np.r_[np.ones(count), np.zeros(n - count)]
    found = bounded_bound(values, ones(values), confidence, top=1.0)
    assert found == pytest.approx(share_bound(count, n, confidence), rel=1e-4)
    if count < n:
        chance = stats.binomtest(count, n, share_bound(count, n, confidence), "less").pvalue
        assert chance == pytest.approx(1 - confidence, rel=1e-6)


@pytest.mark.parametrize("n", [1, 4, 16, 60])
def test_the_bound_is_the_quantile_of_its_definition(n: int) -> None:
    rng = np.random.default_rng(n)
    values = rng.standard_normal(n)
    weights = rng.dirichlet(np.ones(n + 1), 400_000)
    sums = weights @ np.r_[values, 3.0]
    assert bounded_bound(values, ones(values), 0.95, top=3.0) == pytest.approx(
        float(np.quantile(sums, 0.95)), abs=0.01
    )


def test_unequal_weights_against_the_definition() -> None:
    rng = np.random.default_rng(0)
    values, weights = rng.standard_normal(12), rng.uniform(1, 5, 12)
    found = bounded_bound(values, weights, 0.9, top=3.0)
    most = weights.max()
    factors = np.r_[weights * (values - found), most * (3.0 - found)]
    exponentials = rng.exponential(size=(1_000_000, 13))
    assert float((exponentials @ factors > 0).mean()) == pytest.approx(0.1, abs=0.002)


@settings(max_examples=60, deadline=None)
@given(VALUES, st.floats(0, 2), st.integers(0, 29), st.floats(0, 1))
def test_the_bound_rises_with_every_value_the_top_and_the_confidence(
    values: list[float], above: float, place: int, rise: float
) -> None:
    x = np.array(values)
    top = float(x.max()) + above
    bound = bounded_bound(x, ones(x), 0.95, top)
    assert x.mean() - 1e-9 <= bound <= top + 1e-9
    higher = x.copy()
    higher[place % len(x)] += rise
    slack = 1e-6 * (1 + abs(bound))
    assert bounded_bound(higher, ones(x), 0.95, top) >= bound - slack
    assert bounded_bound(x, ones(x), 0.95, top + rise) >= bound - slack
    assert bounded_bound(x, ones(x), 0.99, top) >= bound - slack


@settings(max_examples=30, deadline=None)
@given(VALUES, st.floats(0.1, 10), st.floats(-3, 3))
def test_the_bound_moves_with_the_unit(values: list[float], scale: float, shift: float) -> None:
    x = np.array(values)
    top = float(x.max()) + 1
    bound = bounded_bound(x, ones(x), 0.95, top)
    moved = bounded_bound(scale * x + shift, ones(x), 0.95, scale * top + shift)
    assert moved == pytest.approx(scale * bound + shift, abs=1e-5 * (1 + scale))


def test_values_above_the_top_count_in_full() -> None:
    x = np.array([0.0, 0.0, 0.0, 5.0])
    assert bounded_bound(x, ones(x), 0.95, top=1.0) == bounded_bound(x, ones(x), 0.95, top=5.0)


def test_p_values_of_many_samples_at_once_are_those_of_each() -> None:
    rng = np.random.default_rng(2)
    x = rng.exponential(size=(6, 20)) - 1
    tops, means = x.max(1) + 1, rng.uniform(-0.3, 0.5, 6)
    together = mean_p_value(x, ones(x), means, tops, 1.0)
    each = [
        float(mean_p_value(row, ones(row), m, top, 1.0))
        for row, m, top in zip(x, means, tops, strict=True)
    ]
    assert together == pytest.approx(each)
    assert (together > 0).all() and (together < 1).all()


@pytest.mark.parametrize("share", [0.02, 0.2, 0.5])
def test_the_bound_holds_where_the_t_bound_does_not(share: float) -> None:
    """0 or 1 with a known mean: the error rates follow from the binomial distribution, exactly."""
    n = 30
    counts = np.arange(n + 1)
    x = (np.arange(n) < counts[:, None]) * 1.0  # every sample that there can be, up to its order
    chances = stats.binom.pmf(counts, n, share)
    refuted = mean_p_value(x, ones(x), share, 1.0, 1.0) <= 0.05
    assert chances[refuted].sum() <= 0.05
    if share < 0.1:
        t = np.array([t_bound(row, ones(row), 0.95) for row in x])
        assert chances[t < share].sum() > 0.5


@settings(max_examples=50, deadline=None)
@given(VALUES, st.floats(0.6, 0.99))
def test_t_bound_is_that_of_the_one_sided_t_test(values: list[float], confidence: float) -> None:
    x = np.array(values)
    if x.std() < 1e-6:
        return
    p = stats.ttest_1samp(x, t_bound(x, ones(x), confidence), alternative="less").pvalue
    assert p == pytest.approx(1 - confidence, abs=1e-6)


def test_weighted_mean_of_equal_weights_is_the_plain_one() -> None:
    x = np.array([1.0, 2.0, 4.0, 9.0])
    mean, error = mean_and_error(x, np.full(4, 7.0))
    assert (mean, error) == pytest.approx((4.0, stats.sem(x)))


def test_mcnemar_p_value_is_the_binomial_tests() -> None:
    assert mcnemar_p_value(9, 2) == pytest.approx(
        stats.binomtest(9, 11, 0.5, alternative="greater").pvalue
    )
    assert mcnemar_p_value(0, 0) == 1.0


def betting(values: np.ndarray, means: list[float], top: float) -> BettingTest:
    test = BettingTest(np.array(means), top, 1.0, guess=0.0, spread=1.0)
    test.add(values, ones(values))
    return test


def test_wealth_is_fair_at_the_mean_and_ville_holds() -> None:
    """The chance that wealth against the true mean ever exceeds 20 is at most 5 %."""
    rng = np.random.default_rng(4)
    x = np.minimum(rng.exponential(size=(1500, 60)), 6.0)
    true = 1 - math.exp(-6.0)
    reached = [betting(row, [true], 6.0).wealth[0] >= math.log(20) for row in x]
    assert np.mean(reached) <= 0.06


def test_betting_refutes_what_is_far_above_and_keeps_the_rest() -> None:
    x = np.random.default_rng(5).normal(0, 0.3, 300)
    grid = np.linspace(-0.5, 1.4, 96)
    test = BettingTest(grid, 1.5, 1.0, guess=0.0, spread=0.3)
    test.add(x, ones(x))
    bound = test.bound(0.95)
    assert x.mean() < bound < x.mean() + 0.12
    assert test.units == 300


def test_a_loss_at_the_top_costs_nearly_all_that_was_bet() -> None:
    test = betting(np.array([-1.0] * 5 + [1.0]), [0.5], 1.0)
    before = test._now[0]
    test.add(np.array([1.0]), np.ones(1))
    assert test._now[0] < before and np.isfinite(test._now[0])
    assert test.bound(0.95) == 1.0  # not refuted: the bound is the top
