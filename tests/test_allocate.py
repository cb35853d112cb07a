from fractions import Fraction
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfold.allocate import (
    Choice,
    Curve,
    best_within_cost,
    cheapest_within_change,
    first_order_within_cost,
    lower_hull,
    smallest_cost,
    total_change,
    total_cost,
    uniform_within_cost,
)

property_test = settings(max_examples=100, deadline=None)


def curve(costs, changes, dense_cost, errors=None):
    return Curve(
        ranks=torch.arange(1, len(costs) + 1),
        costs=torch.tensor(costs, dtype=torch.int64),
        changes=torch.tensor(changes, dtype=torch.float64),
        dense_cost=dense_cost,
        errors=None if errors is None else torch.tensor(errors, dtype=torch.float64),
    )


@st.composite
def random_curve(draw):
    """Up to 4 ranks; whole changes, of any sign and order, so that sums are exact."""
    costs = sorted(draw(st.sets(st.integers(1, 30), min_size=1, max_size=4)))
    n = len(costs)
    changes = draw(st.lists(st.integers(-20, 100), min_size=n, max_size=n))
    errors = sorted(draw(st.lists(st.integers(0, 210), min_size=n, max_size=n)), reverse=True)
    return curve(costs, changes, draw(st.integers(1, 35)), [error / 200 for error in errors])


CURVES = st.lists(random_curve(), min_size=1, max_size=3).map(
    lambda found: {f"layer{i}": one for i, one in enumerate(found)}
)


def every_plan(curves):
    plans = product(*(one.choices() for one in curves.values()))
    return [dict(zip(curves, plan, strict=True)) for plan in plans]


def multiplier_plans(curves):
    """What minimises change + multiplier x cost, for multipliers between and beyond all slopes."""
    options = [one.choices() for one in curves.values()]
    slopes = {
        Fraction(x.change - y.change) / (y.cost - x.cost)
        for choices in options
        for x, y in product(choices, choices)
        if x.cost != y.cost
    }
    edges = [Fraction(0), *sorted(slope for slope in slopes if slope > 0)]
    edges.append(edges[-1] + 1)
    between = [(low + high) / 2 for low, high in pairwise(edges)]
    return [
        {
            name: min(one.choices(), key=lambda c: Fraction(c.change) + multiplier * c.cost)
            for name, one in curves.items()
        }
        for multiplier in [*between, edges[-1] + 1]
    ]


def is_plan(plan, curves):
    return plan.keys() == curves.keys() and all(
        choice in curves[name].choices() for name, choice in plan.items()
    )


def budgets(curves, data):
    """A budget that at least the cheapest plan keeps."""
    cheapest = smallest_cost(curves)
    dense = sum(one.dense_cost for one in curves.values())
    return data.draw(st.integers(cheapest, max(cheapest, dense) + 3))


def test_choices_leave_out_ranks_that_save_nothing():
    choices = curve([3, 6, 7], [5, 2, 1], dense_cost=6).choices()
    assert choices == [Choice(1, 3, 5.0), Choice(None, 6, 0.0)]


def test_lower_hull_by_hand():
    points = [(1, 10.0), (2, 9.0), (3, 4.0), (4, 5.0), (5, 1.5), (6, 1.0), (9, 0.0), (9, 3.0)]
    hull = lower_hull([Choice(None, *point) for point in points])
    # (2, 9) is above a chord, (4, 5) above its cheaper neighbour
    assert [(c.cost, c.change) for c in hull] == [(1, 10), (3, 4), (5, 1.5), (6, 1), (9, 0)]


@property_test
@given(random_curve())
def test_lower_hull_is_what_some_multiplier_selects(one):
    hull = lower_hull(one.choices())
    selected = {(p["only"].cost, p["only"].change) for p in multiplier_plans({"only": one})}
    assert {(choice.cost, choice.change) for choice in hull} == selected
    assert [c.cost for c in hull] == sorted(c.cost for c in hull)


@property_test
@given(CURVES, st.data())
def test_best_within_cost_keeps_the_budget_and_beats_every_multiplier(curves, data):
    budget = budgets(curves, data)
    plan = best_within_cost(curves, budget)
    assert is_plan(plan, curves)
    assert total_cost(plan) <= budget
    rivals = [p for p in multiplier_plans(curves) if total_cost(p) <= budget]
    assert all(total_change(plan) <= total_change(rival) for rival in rivals)


@property_test
@given(CURVES)
def test_best_within_cost_is_optimal_at_the_cost_of_a_multiplier_plan(curves):
    for breakpoint_ in multiplier_plans(curves):
        budget = total_cost(breakpoint_)
        optimum = min(total_change(p) for p in every_plan(curves) if total_cost(p) <= budget)
        assert total_change(best_within_cost(curves, budget)) == optimum


@property_test
@given(CURVES, st.data())
def test_best_within_cost_leaves_no_choice_that_still_fits_and_improves(curves, data):
    budget = budgets(curves, data)
    plan = best_within_cost(curves, budget)
    left = budget - total_cost(plan)
    missed = [
        (name, choice)
        for name, one in curves.items()
        for choice in one.choices()
        if choice.change < plan[name].change and choice.cost - plan[name].cost <= left
    ]
    assert not missed


@property_test
@given(CURVES)
def test_with_no_limit_each_layer_gets_its_lowest_change(curves):
    lowest = sum(min(c.change for c in one.choices()) for one in curves.values())
    assert total_change(best_within_cost(curves, float("inf"))) == lowest
    assert total_change(cheapest_within_change(curves, -1e9)) == lowest


def test_a_leftover_goes_to_a_choice_off_the_hull():
    one = curve([2, 5], [10, 9], dense_cost=10)  # the hull is rank 1 and dense
    assert best_within_cost({"a": one}, 9)["a"].rank == 2


def test_a_leftover_that_misses_the_best_choice_goes_to_a_second_choice():
    curves = {"a": curve([1, 4], [100, 90], 30), "b": curve([1, 3, 6], [100, 99, 91], 30)}
    plan = best_within_cost(curves, 7)  # 3 of the 5 left go to a; b's rank 2 fits in the other 2
    assert (plan["a"].rank, plan["b"].rank) == (2, 2)


def test_a_leftover_is_spent_once():
    curves = {name: curve([2, 5], [10, 9], 10) for name in "ab"}
    plan = best_within_cost(curves, 2 + 2 + 5)  # an upgrade costs 3
    assert sorted(choice.rank for choice in plan.values()) == [1, 2]


def test_a_layer_whose_next_bargain_does_not_fit_does_not_stop_the_others():
    curves = {
        "first": curve([1], [100], 10),  # dense for 9: the best bargain, too dear
        "second": curve([1], [10], 3),  # dense for 2: the next two
        "third": curve([1], [10], 3),
        "last": curve([1], [11], 6),  # dense for 5: the best single one that fits
    }
    plan = best_within_cost(curves, 4 + 5)
    assert [choice.rank for choice in plan.values()] == [1, None, None, 1]


@property_test
@given(CURVES, st.integers(-60, 250))
def test_cheapest_within_change_keeps_the_tolerance_and_beats_every_multiplier(curves, tolerance):
    plan = cheapest_within_change(curves, tolerance)
    assert is_plan(plan, curves)
    lowest = min(total_change(p) for p in every_plan(curves))
    assert total_change(plan) <= max(tolerance, lowest)
    rivals = [p for p in multiplier_plans(curves) if total_change(p) <= tolerance]
    assert all(total_cost(plan) <= total_cost(rival) for rival in rivals)


@property_test
@given(CURVES)
def test_cheapest_within_change_is_optimal_at_the_change_of_a_multiplier_plan(curves):
    for breakpoint_ in multiplier_plans(curves):
        tolerance = total_change(breakpoint_)
        optimum = min(total_cost(p) for p in every_plan(curves) if total_change(p) <= tolerance)
        assert total_cost(cheapest_within_change(curves, tolerance)) == optimum


@property_test
@given(CURVES, st.data())
def test_uniform_within_cost_is_the_plan_of_the_largest_ratio(curves, data):
    budget = budgets(curves, data)

    def at(ratio):
        return {
            name: max(
                (c for c in one.choices() if c.cost <= ratio * one.dense_cost),
                key=lambda c: c.cost,
                default=min(one.choices(), key=lambda c: c.cost),
            )
            for name, one in curves.items()
        }

    ratios = {Fraction(c.cost, one.dense_cost) for one in curves.values() for c in one.choices()}
    fitting = [at(r) for r in [Fraction(0), *sorted(ratios)] if total_cost(at(r)) <= budget]
    assert uniform_within_cost(curves, budget) == fitting[-1]


@property_test
@given(CURVES, st.booleans(), st.data())
def test_first_order_within_cost_is_the_rule_at_the_smallest_fitting_bound(curves, smallest, data):
    budget = budgets(curves, data)

    def greedy(one, eps):
        rows = zip(one.choices()[:-1], one.errors.tolist(), strict=False)
        within = [choice for choice, error in rows if error <= eps]
        if smallest:
            within = sorted((c for c in within if c.change <= 0), key=lambda c: c.rank)
        else:
            within = sorted(within, key=lambda c: c.change)
        return within[0] if within else one.choices()[-1]

    plans = [{n: greedy(one, k / 200) for n, one in curves.items()} for k in range(1, 201)]
    fitting = [plan for plan in plans if total_cost(plan) <= budget]
    if fitting:
        assert first_order_within_cost(curves, budget, smallest) == fitting[0]
    else:
        with pytest.raises(ValueError, match="no error bound"):
            first_order_within_cost(curves, budget, smallest)


def test_the_edges_of_the_first_order_rule():
    at_one = {"a": curve([3], [0], 6, [1.0])}  # |W_k - W| = |W| is within eps = 1
    assert first_order_within_cost(at_one, 3, smallest=True)["a"].rank == 1  # 0 isn't positive
    at_start = {"a": curve([2, 4], [-5, -1], 10, [0.01, 0.005])}
    assert first_order_within_cost(at_start, 5, smallest=False)["a"].rank == 2  # eps is .005


def test_the_two_first_order_rules_differ():
    one = curve([2, 4, 6, 8], [3, -1, -5, -2], 10, [0.4, 0.3, 0.2, 0.1])
    assert first_order_within_cost({"a": one}, 7, smallest=False)["a"].rank == 3
    assert first_order_within_cost({"a": one}, 7, smallest=True)["a"].rank == 3  # eps is .2
    assert first_order_within_cost({"a": one}, 5, smallest=True)["a"].rank == 2
    with pytest.raises(ValueError, match="no error bound"):
        first_order_within_cost({"a": one}, 5, smallest=False)  # it never prefers rank 2


@pytest.mark.parametrize("rule", [best_within_cost, uniform_within_cost])
def test_a_budget_below_the_cheapest_plan_is_refused(rule):
    curves = {"a": curve([3, 4], [2, 1], 6), "b": curve([9], [2], 5)}
    assert smallest_cost(curves) == 3 + 5
    assert total_cost(rule(curves, 8)) == 8
    with pytest.raises(ValueError, match="the cheapest plan costs 8, the budget is 7"):
        rule(curves, 7)


def test_the_first_order_rule_needs_errors():
    with pytest.raises(ValueError, match="needs curves with errors"):
        first_order_within_cost({"a": curve([3], [2], 6)}, 100, smallest=False)
