import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rankfold.certificate.quantiles import beta_quantile, chance_of_heads, student_quantile

PROBABILITIES = st.floats(0.5, 0.999)


@given(PROBABILITIES, st.integers(1, 10**6))
def test_student_quantiles_are_those_of_scipy(probability, freedom):
    assert student_quantile(probability, freedom) == float(stats.t.ppf(probability, freedom))


@given(PROBABILITIES, st.integers(1, 10**4), st.integers(1, 10**4))
def test_beta_quantiles_are_those_of_scipy(probability, first, second):
    expected = float(stats.beta.ppf(probability, first, second))
    assert beta_quantile(probability, first, second) == pytest.approx(expected, rel=1e-12)


@given(st.integers(0, 5000), st.integers(0, 5000))
def test_chances_of_heads_are_those_of_scipy(first, second):
    least, throws = min(first, second), max(first, second)
    expected = float(stats.binom.sf(least - 1, throws, 0.5))
    assert chance_of_heads(least, throws) == pytest.approx(expected, rel=1e-9)
