import pytest
import torch
from hypothesis import given, settings

from rankfold.forms.curve import Curve
from rankfold.forms.low_rank.form import rank_costs, rank_curve
from rankfold.forms.storage import STORAGES, factor_parameters
from rankfold.maths.linalg import Damping
from rankfold.maths.spectrum import whitened_spectrum
from rankfold.model.layer_matrix import matrix_shape, weight_matrix
from rankfold.objective import OBJECTIVES
from rankfold.search.allocate import (
    best_within_cost,
    cheapest_within_change,
    first_order_within_cost,
    plan_for_budget,
    plan_for_change,
    total_cost,
    uniform_within_cost,
)
from rankfold.search.layer_curves import (
    first_order_changes,
    layer_spectrum,
    truncation_changes,
)
from rankfold.statistics.layer_statistics import LayerStatistics
from tests.cases import CONV_CASES, LINEAR_CASES, SEEDS, SIDES, gram, normal

property_test = settings(max_examples=25, deadline=None)
close = torch.testing.assert_close

# needs_data, needs_backward, predicts_loss
NEEDS = {
    "svd": (False, False, False),
    "fwsvd": (True, True, False),
    "activation": (True, False, False),
    "kronecker": (True, True, True),
    "joint": (True, True, True),
    "first-order": (True, True, True),
}

# The A and B that each objective whitens with, None for the identity.
WHITENS_WITH = {
    "svd": lambda a, b: (None, None),
    "fwsvd": lambda a, b: (None, torch.diag(b.diagonal())),
    "activation": lambda a, b: (a, None),
    "kronecker": lambda a, b: (a, b),
    "joint": lambda a, b: (a, b),
    "first-order": lambda a, b: (None, None),
}


DAMPING = Damping(0.1, 0.1)


def curve_of(name, layer, spectrum, statistics, storage, price):
    changes = truncation_changes(OBJECTIVES[name], layer, spectrum, statistics, DAMPING)
    return rank_curve(layer, *changes, storage, price)


def random_statistics(seed, out, in_, backward=True):
    gradients = (normal(seed, out, in_), normal(seed + 1, out, in_))
    return LayerStatistics(
        input_gram=gram(seed + 2, in_),
        output_gram=gram(seed + 3, out) if backward else None,
        gradients=gradients if backward else None,
        shares_input_with=None,
    )


def dense_root(g, damping):
    """Root of g + damping x mean eigenvalue."""
    values, vectors = torch.linalg.eigh(g)
    return (vectors * (values + damping * values.mean()).sqrt()) @ vectors.T


def weighted_svd(w, a, b, damping):
    """Singular values of T = B^1/2 W A^1/2, and the rank-k weights for k = 1..r."""
    root_a = torch.eye(w.shape[1]).double() if a is None else dense_root(a, damping)
    root_b = torch.eye(w.shape[0]).double() if b is None else dense_root(b, damping)
    u, s, vt = torch.linalg.svd(root_b @ w @ root_a, full_matrices=False)
    ranks = range(1, len(s) + 1)
    back_b, back_a = root_b.inverse(), root_a.inverse()
    return s, [back_b @ (u[:, :k] * s[:k]) @ vt[:k] @ back_a for k in ranks]


def test_the_tables_name_every_objective():
    assert OBJECTIVES.keys() == NEEDS.keys() == WHITENS_WITH.keys()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_each_objective_needs(name):
    objective = OBJECTIVES[name]
    found = (objective.needs_data, objective.needs_backward, objective.predicts_loss)
    assert found == NEEDS[name]
    assert objective.step == (name == "joint")


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5)])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_each_objective_is_a_weighted_truncated_svd(name, shape, damping):
    out, in_ = shape
    w, statistics = normal(10, out, in_), random_statistics(20, out, in_)
    grams = WHITENS_WITH[name](statistics.input_gram, statistics.output_gram)
    sigma, truncated = weighted_svd(w, *grams, damping)
    spectrum = layer_spectrum(OBJECTIVES[name], w, statistics, Damping(damping, damping))
    close(spectrum.singular_values, sigma)
    for k, expected in enumerate(truncated, start=1):
        close(spectrum.left[:, :k] @ spectrum.right[:k], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if not NEEDS[name][0]])
def test_objectives_without_data_need_no_statistics(name):
    w = normal(0, 4, 6)
    found = layer_spectrum(OBJECTIVES[name], w, None, DAMPING).singular_values
    close(found, torch.linalg.svdvals(w))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_only_objectives_that_whiten_the_output_need_its_gram(name):
    w, statistics = normal(0, 4, 6), random_statistics(1, 4, 6, backward=False)
    if OBJECTIVES[name].output_gram == "none":
        layer_spectrum(OBJECTIVES[name], w, statistics, DAMPING)
    else:
        with pytest.raises(ValueError, match="needs statistics with gradients"):
            layer_spectrum(OBJECTIVES[name], w, statistics, DAMPING)


@property_test
@given(SEEDS, SIDES, SIDES)
def test_first_order_changes_of_every_rank(seed, out, in_):
    w, g = normal(seed, out, in_), normal(seed + 1, out, in_)
    changes, errors = first_order_changes(w, whitened_spectrum(w), g)
    _, truncated = weighted_svd(w, None, None, 0)
    deltas = [w_k - w for w_k in truncated]
    close(changes, torch.stack([(g * delta).sum() for delta in deltas]), rtol=1e-6, atol=1e-6)
    close(errors, torch.stack([d.norm() / w.norm() for d in deltas]), rtol=1e-6, atol=1e-6)


def test_first_order_changes_of_a_layer_of_zeros():
    w = torch.zeros(3, 5)
    changes, errors = first_order_changes(w, whitened_spectrum(w), normal(0, 3, 5))
    assert changes.tolist() == errors.tolist() == [0, 0, 0]


@pytest.mark.parametrize("case", [*LINEAR_CASES[:2], *CONV_CASES[:1]], ids=lambda case: case.name)
@pytest.mark.parametrize("form", STORAGES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_layer_curve_has_each_ranks_cost_and_change(case, form, name):
    layer = case.layer()
    out, in_ = matrix_shape(layer)
    w, statistics = weight_matrix(layer), random_statistics(30, out, in_)
    spectrum = layer_spectrum(OBJECTIVES[name], w, statistics, DAMPING)
    curve = curve_of(name, layer, spectrum, statistics, form, 7)
    ranks = range(1, min(out, in_) + 1)
    assert curve.ranks.tolist() == list(ranks)
    assert curve.costs.tolist() == [7 * factor_parameters(out, in_, k, form) for k in ranks]
    assert curve.costs.tolist() == rank_costs(layer, form, 7).tolist()
    assert curve.dense_cost == 7 * layer.weight.numel()
    sigma, truncated = weighted_svd(
        w, *WHITENS_WITH[name](statistics.input_gram, statistics.output_gram), 0.1
    )
    if name == "first-order":
        expected = [float(((w_k - w) * statistics.gradient).sum()) for w_k in truncated]
        assert curve.errors[0] == pytest.approx(float((truncated[0] - w).norm() / w.norm()))
    elif OBJECTIVES[name].allocation == "multiplier":  # under the Grams without damping
        a, b = statistics.input_gram, statistics.output_gram
        expected = [float(((b @ (w_k - w) @ a) * (w_k - w)).sum()) / 2 for w_k in truncated]
        assert curve.errors is None
    else:
        expected = [float(sigma[k:].square().sum()) / 2 for k in ranks]
        assert curve.errors is None
    assert curve.changes.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_first_order_curve_needs_a_gradient():
    layer = LINEAR_CASES[0].layer()
    spectrum = whitened_spectrum(weight_matrix(layer))
    with pytest.raises(ValueError, match="needs statistics with gradients"):
        truncation_changes(OBJECTIVES["first-order"], layer, spectrum, None, DAMPING)


def curves_of(name, seed=0):
    curves = {}
    for place, case in enumerate([LINEAR_CASES[0], CONV_CASES[0], CONV_CASES[3]]):
        layer = case.layer(seed + place)
        statistics = random_statistics(seed + 100 * place, *matrix_shape(layer))
        spectrum = layer_spectrum(OBJECTIVES[name], weight_matrix(layer), statistics, DAMPING)
        curves[case.name] = curve_of(name, layer, spectrum, statistics, "pivoted", 1)
    return curves


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_objective_spends_a_budget_by_its_rule(name):
    curves = curves_of(name)
    budget = 0.8 * sum(curve.dense_cost for curve in curves.values())
    rules = {
        "uniform": lambda: uniform_within_cost(curves, budget),
        "multiplier": lambda: best_within_cost(curves, budget).plan,
        "first-order": lambda: first_order_within_cost(curves, budget, smallest=False),
    }
    plan = plan_for_budget(OBJECTIVES[name], curves, budget)
    assert total_cost(plan) <= budget
    assert plan == rules[OBJECTIVES[name].allocation]()


@pytest.mark.parametrize("smallest", [False, True])
def test_a_budget_goes_to_the_asked_first_order_rule(smallest):
    curve = Curve(
        ranks=torch.tensor([1, 2]),
        costs=torch.tensor([3, 6]),
        changes=torch.tensor([-1.0, -2.0]),
        dense_cost=10,
        errors=torch.tensor([0.5, 0.5]),
    )
    plan = plan_for_budget(OBJECTIVES["first-order"], {"a": curve}, 9, smallest)
    assert plan["a"].rank == (1 if smallest else 2)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("tolerance", [0.0, 3.0, 30.0])
def test_only_objectives_in_units_of_the_loss_plan_for_a_change(name, tolerance):
    curves = curves_of(name)
    plan = plan_for_change(OBJECTIVES[name], curves, tolerance)
    if name in ("kronecker", "joint"):
        assert plan == cheapest_within_change(curves, tolerance).plan
        assert sum(choice.change for choice in plan.values()) <= tolerance + 1e-9
    else:
        assert plan is None
