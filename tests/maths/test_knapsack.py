from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from rankfold.maths.knapsack import Solution, solve, undominated

property_test = settings(max_examples=200, deadline=None)

WHOLE = st.integers(-20, 40)
# Sums of numbers near 1 can't tell a weight of 1e-251 from 0, so no plan could either.
ANY = st.floats(-10, 10).map(lambda number: round(number, 6))


@st.composite
def random_groups(draw, weight=WHOLE, value=WHOLE):
    """Up to 5 groups of up to 4 choices, in any order, with ties."""
    groups = []
    for _ in range(draw(st.integers(1, 5))):
        choices = draw(st.lists(st.tuples(weight, value), min_size=1, max_size=4))
        groups.append(tuple(np.array(column) for column in zip(*choices, strict=True)))
    return groups


def totals(groups, picks):
    return tuple(
        sum(group[side][pick] for group, pick in zip(groups, picks, strict=True)) for side in (0, 1)
    )


def lowest(groups, limit):
    """Lowest value within the limit of all plans, and the lightest plan's weight."""
    plans = [totals(groups, picks) for picks in product(*(range(len(w)) for w, _ in groups))]
    return min((value for weight, value in plans if weight <= limit), default=None)


def limits(groups, data):
    lightest = sum(weights.min() for weights, _ in groups)
    heaviest = sum(weights.max() for weights, _ in groups)
    return lightest + data.draw(st.floats(0, 1.1)) * (heaviest - lightest)


def large_groups(seed, count=40, size=30, whole=True):
    """Curves with falling values and noise, too many plans to list."""
    random = np.random.default_rng(seed)
    groups = []
    for _ in range(count):
        weights = np.sort(random.choice(10_000, size, replace=False)) + 1
        values = np.sort(random.gamma(0.5, 1, size))[::-1] + 0.05 * random.normal(size=size)
        groups.append((weights, np.round(1000 * values).astype(int) if whole else values))
    return groups


def milp_lowest(groups, limit):
    """The same by another solver."""
    weights, values = (np.concatenate([group[side] for group in groups]) for side in (0, 1))
    owners = np.repeat(np.arange(len(groups)), [len(group[0]) for group in groups])
    one_each = (owners == np.arange(len(groups))[:, None]).astype(float)
    result = milp(
        values,
        integrality=np.ones(len(values)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(weights[None], ub=limit)],
        options={"mip_rel_gap": 0, "node_limit": 100_000},
    )
    assert result.status == 0
    picked = result.x > 0.5
    assert weights[picked].sum() <= limit
    return values[picked].sum()


@property_test
@given(st.lists(st.tuples(WHOLE, WHOLE), min_size=1, max_size=12))
def test_undominated_by_definition(choices):
    weights, values = (np.array(column) for column in zip(*choices, strict=True))
    kept = undominated(weights, values).tolist()
    better = [
        [
            (w <= weight and v <= value and (w, v) != (weight, value))
            or ((w, v) == (weight, value) and other < here)
            for other, (w, v) in enumerate(choices)
        ]
        for here, (weight, value) in enumerate(choices)
    ]
    assert sorted(kept) == [here for here, found in enumerate(better) if not any(found)]
    assert weights[kept].tolist() == sorted(weights[kept])


@property_test
@given(random_groups(), st.data())
def test_whole_numbers_give_the_optimum_with_its_proof(groups, data):
    limit = limits(groups, data)
    solution = solve(groups, limit, 1000)
    weight, value = totals(groups, solution.picks)
    assert weight <= limit
    assert solution.optimal
    assert value == solution.bound == lowest(groups, limit)


@property_test
@given(random_groups(ANY, ANY), st.data())
def test_floats_give_the_optimum_up_to_rounding(groups, data):
    limit = limits(groups, data)
    solution = solve(groups, limit, 1000)
    weight, value = totals(groups, solution.picks)
    assert weight <= limit + 1e-9
    assert solution.optimal
    assert value <= lowest(groups, limit) + 1e-9  # what rounds up to the limit may be better still
    assert solution.bound >= lowest(groups, limit + 1e-9) - 1e-9


@property_test
@given(random_groups(), st.integers(0, 3), st.data())
def test_a_search_cut_short_keeps_its_bound(groups, states, data):
    limit = limits(groups, data)
    solution = solve(groups, limit, states)
    weight, value = totals(groups, solution.picks)
    optimum = lowest(groups, limit)
    assert weight <= limit
    assert solution.bound <= optimum <= value
    if solution.optimal:
        assert value == optimum == solution.bound


@property_test
@given(random_groups(), st.integers(0, 3), st.data())
def test_nothing_that_still_fits_would_improve_the_plan(groups, states, data):
    limit = limits(groups, data)
    picks = solve(groups, limit, states).picks
    left = limit - totals(groups, picks)[0]
    for (weights, values), pick in zip(groups, picks, strict=True):
        fits = weights - weights[pick] <= left
        assert not (fits & (values < values[pick])).any()


@property_test
@given(random_groups())
def test_an_infinite_limit_takes_the_lowest_values(groups):
    solution = solve(groups, np.inf, 0)
    assert solution.optimal
    assert totals(groups, solution.picks)[1] == sum(values.min() for _, values in groups)


@property_test
@given(random_groups())
def test_a_limit_that_no_plan_keeps_gives_the_lightest_plan(groups):
    solution = solve(groups, -1e6, 1000)
    lightest = sum(weights.min() for weights, _ in groups)
    assert totals(groups, solution.picks) == (lightest, lowest(groups, lightest))
    assert solution.optimal


def test_no_groups():
    assert solve([], 3.0, 10) == Solution([], 0.0, optimal=True)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_optimum_of_many_groups_is_that_of_an_integer_program(seed, share):
    groups = large_groups(seed)
    limit = int(share * sum(weights.max() for weights, _ in groups))
    solution = solve(groups, limit, 10_000)
    assert solution.optimal
    assert totals(groups, solution.picks)[0] <= limit
    assert totals(groups, solution.picks)[1] == milp_lowest(groups, limit)


@pytest.mark.parametrize("states", [0, 1, 30, 1000])
def test_the_bound_of_a_search_cut_short_holds_for_many_groups(states):
    groups = large_groups(2, whole=False)
    limit = 100_000
    full, short = solve(groups, limit, 10_000), solve(groups, limit, states)
    assert full.optimal
    assert short.bound <= full.bound + 1e-9
    assert totals(groups, short.picks)[1] >= full.bound - 1e-9
    assert solve(groups, limit, 0).bound <= short.bound + 1e-9


def test_the_same_input_gives_the_same_plan():
    groups = large_groups(3, whole=False)
    assert solve(groups, 90_000, 30) == solve(groups, 90_000, 30)


def test_steps_of_the_weights_and_values_count():
    """Whole multiples of 60 are solved as if counted in sixties."""
    groups = [(60 * weights, 60 * values) for weights, values in large_groups(4, count=3)]
    coarse = solve(groups, 60 * 12_345 + 59, 1000)
    fine = solve([(w // 60, v // 60) for w, v in groups], 12_345, 1000)
    assert coarse.picks == fine.picks
    assert coarse.bound == 60 * fine.bound
