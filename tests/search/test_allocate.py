from dataclasses import replace
from fractions import Fraction
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfold.forms.curve import Choice, Curve, merged
from rankfold.maths import knapsack
from rankfold.search.allocate import (
    best_within_cost,
    cheapest_within_change,
    first_order_within_cost,
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


def lowest_change(curves, budget):
    return min(total_change(p) for p in every_plan(curves) if total_cost(p) <= budget)


def lowest_cost(curves, tolerance):
    """Of the plans within the tolerance, or of those that come nearest to it."""
    reached = max(tolerance, min(total_change(p) for p in every_plan(curves)))
    return min(total_cost(p) for p in every_plan(curves) if total_change(p) <= reached)


@property_test
@given(CURVES, st.data())
def test_best_within_cost_is_the_best_of_all_plans(curves, data):
    budget = budgets(curves, data)
    found = best_within_cost(curves, budget)
    assert is_plan(found.plan, curves)
    assert (found.cost, found.change) == (total_cost(found.plan), total_change(found.plan))
    assert found.cost <= budget
    assert found.change == found.bound == lowest_change(curves, budget)
    assert found.gap == 0


@property_test
@given(CURVES, st.integers(-60, 250))
def test_cheapest_within_change_is_the_cheapest_of_all_plans(curves, tolerance):
    found = cheapest_within_change(curves, tolerance)
    assert is_plan(found.plan, curves)
    assert (found.cost, found.change) == (total_cost(found.plan), total_change(found.plan))
    assert found.change <= max(tolerance, min(total_change(p) for p in every_plan(curves)))
    assert found.cost == found.bound == lowest_cost(curves, tolerance)
    assert found.gap == 0


@property_test
@given(CURVES, st.integers(0, 2), st.data())
def test_the_gap_of_a_search_cut_short_covers_the_optimum(curves, states, data):
    budget = budgets(curves, data)
    best = best_within_cost(curves, budget, states=states)
    assert best.cost <= budget
    assert best.bound <= lowest_change(curves, budget) <= best.change
    assert best.gap == best.change - best.bound
    tolerance = data.draw(st.integers(-60, 250))
    cheapest = cheapest_within_change(curves, tolerance, states=states)
    assert cheapest.bound <= lowest_cost(curves, tolerance) <= cheapest.cost
    assert cheapest.gap == cheapest.cost - cheapest.bound


@property_test
@given(CURVES)
def test_with_no_limit_each_layer_gets_its_lowest_change(curves):
    lowest = sum(min(c.change for c in one.choices()) for one in curves.values())
    assert best_within_cost(curves, float("inf")).change == lowest
    assert cheapest_within_change(curves, -1e9).change == lowest


def test_the_optimum_needs_no_multiplier():
    """Each plan is one that upgrading the best bargain first, and while it fits, misses."""
    one = curve([2, 5], [10, 9], dense_cost=10)  # the hull is rank 1 and dense
    assert best_within_cost({"a": one}, 9).plan["a"].rank == 2
    curves = {"greedy": curve([1], [100], 10), "a": curve([1], [60], 6), "b": curve([1], [60], 6)}
    ranks = [choice.rank for choice in best_within_cost(curves, 3 + 10).plan.values()]
    assert ranks == [1, None, None]  # 100 for 9 is the best bargain, 120 for 10 the best plan


def test_a_layer_that_gets_better_is_factorized_even_where_nothing_has_to_be():
    """Predicted changes may be negative and noisy."""
    curves = {"a": curve([2, 4, 6], [-1.5, 0.5, -1], 10), "b": curve([3, 5], [0.25, -0.5], 9)}
    found = best_within_cost(curves, 19)
    assert [choice.rank for choice in found.plan.values()] == [1, 2]
    assert found.change == -2
    cheaper = cheapest_within_change(curves, -1)
    assert [choice.rank for choice in cheaper.plan.values()] == [1, 1]


def test_equal_choices_give_the_first_and_the_same_plan_each_time():
    curves = {name: curve([4, 4, 6], [2, 2, 1], 10) for name in "abc"}
    found = best_within_cost(curves, 15)
    assert sorted(choice.rank for choice in found.plan.values()) == [1, 1, 3]
    assert found == best_within_cost(curves, 15)


def falling_curves(layers=60, full=40):
    """Power-law spectra of layers of several shapes, in pivoted form."""
    curves = {}
    for layer in range(layers):
        out, in_ = full * (1 + layer % 3), full * (1 + layer % 2)
        ranks = torch.arange(1, min(out, in_) + 1)
        energies = ranks.double() ** -(1 + layer / layers)
        curves[f"layer{layer}"] = Curve(
            ranks=ranks,
            costs=ranks * (out + in_ - ranks),
            changes=energies.sum() - energies.cumsum(0),
            dense_cost=out * in_,
        )
    return curves


@pytest.mark.parametrize("share", [0.9, 0.7, 0.4])
def test_both_problems_agree_on_a_whole_model(share):
    curves = falling_curves()
    budget = share * sum(one.dense_cost for one in curves.values())
    best = best_within_cost(curves, budget)
    cheapest = cheapest_within_change(curves, best.change * (1 + 1e-9))
    assert best.gap == cheapest.gap == 0
    assert cheapest.cost <= best.cost <= budget
    # No plan of less change fits: what the cheapest saves, the best could not use.
    assert best_within_cost(curves, cheapest.cost).change == pytest.approx(best.change, rel=1e-8)


def test_the_search_for_the_optimum_stays_small(monkeypatch):
    """Of the 10^100 plans that a whole model has, few are looked at."""
    pairs = []

    def counted(*arguments):
        found = knapsack_pairs(*arguments)
        pairs.append(len(found[0]))
        return found

    knapsack_pairs = knapsack._pairs
    monkeypatch.setattr(knapsack, "_pairs", counted)
    curves = falling_curves()
    best_within_cost(curves, 0.7 * sum(one.dense_cost for one in curves.values()))
    assert sum(pairs) < 1_000_000


def in_form(form, costs, changes, dense_cost, second_ranks=None):
    second = None if second_ranks is None else torch.tensor(second_ranks)
    one = curve(costs, changes, dense_cost)
    return replace(one, forms=(form,), second_ranks=second)


def test_choices_name_their_form_and_all_their_ranks():
    pair, two = in_form("pair", [2], [3], 9), in_form("pivoted", [4], [1], 9, second_ranks=[7])
    assert pair.choices() == [Choice(1, 2, 3.0, "pair"), Choice(None, 9, 0.0)]
    assert [choice.ranks for choice in pair.choices()] == [(1,), ()]
    assert two.choices()[0] == Choice(1, 4, 1.0, "pivoted", second_rank=7)
    assert two.choices()[0].ranks == (1, 7)


def test_merged_keeps_what_no_other_choice_beats():
    pair = in_form("pair", [3, 6, 9], [8, 5, 4], 12)
    pivoted = in_form("pivoted", [3, 5, 8, 12], [8, 6, 5, 1], 12)
    assert merged([pair, pivoted]).choices() == [
        Choice(1, 3, 8.0, "pair"),  # as good as the pivoted one, and first
        Choice(2, 5, 6.0, "pivoted"),
        Choice(2, 6, 5.0, "pair"),  # beats (8, 5)
        Choice(3, 9, 4.0, "pair"),
        Choice(None, 12, 0.0),
    ]


def test_merged_keeps_second_ranks_and_merges_again():
    one, two = in_form("pair", [3], [8], 12), in_form("pivoted", [4], [7], 12, second_ranks=[5])
    three = in_form(None, [5], [6], 12)
    once = merged([one, two])
    assert [choice.ranks for choice in once.choices()] == [(1,), (1, 5), ()]
    twice = merged([three, once])
    assert twice.choices() == merged([one, two, three]).choices()
    assert [choice.form for choice in twice.choices()] == ["pair", "pivoted", None, None]


def test_curves_of_different_layers_do_not_merge():
    with pytest.raises(ValueError, match=r"one dense cost, not \[9, 12\]"):
        merged([curve([3], [1], 12), curve([3], [1], 9)])
    with pytest.raises(ValueError, match=r"one dense cost, not \[\]"):
        merged([])


@property_test
@given(st.lists(random_curve(), min_size=2, max_size=3), random_curve(), st.data())
def test_a_merged_curve_allows_the_best_of_its_forms(forms, other, data):
    named = zip(("pair", "pivoted", None), forms, strict=False)
    forms = [replace(one, dense_cost=30, forms=(form,)) for form, one in named]
    curves = {"mixed": merged(forms), "other": other}
    budget = budgets(curves, data)
    found = best_within_cost(curves, budget)
    apart = [
        lowest_change({"mixed": one, "other": other}, budget)
        for one in forms
        if smallest_cost({"mixed": one, "other": other}) <= budget
    ]
    assert found.change == min(apart)


def test_a_curve_of_tensors_that_do_not_match_is_refused():
    with pytest.raises(ValueError, match=r"different lengths: \[1, 2\]"):
        curve([3, 4], [1], 9)
    with pytest.raises(ValueError, match="not all finite"):
        curve([3], [float("nan")], 9)


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


@pytest.mark.parametrize(
    "rule", [lambda *given: best_within_cost(*given).plan, uniform_within_cost]
)
def test_a_budget_below_the_cheapest_plan_is_refused(rule):
    curves = {"a": curve([3, 4], [2, 1], 6), "b": curve([9], [2], 5)}
    assert smallest_cost(curves) == 3 + 5
    assert total_cost(rule(curves, 8)) == 8
    with pytest.raises(ValueError, match="the cheapest plan costs 8, the budget is 7"):
        rule(curves, 7)


def test_the_first_order_rule_needs_errors():
    with pytest.raises(ValueError, match="needs curves with errors"):
        first_order_within_cost({"a": curve([3], [2], 6)}, 100, smallest=False)
