"""Statistics of the smaller side of a layer decide what those of both sides decide."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rankfold.data.parts import as_part
from rankfold.maths.linalg import Damping
from rankfold.maths.shrinkage import damping_behind, held_out_damping
from rankfold.maths.spectrum import smaller_side_spectrum, whitened_spectrum
from rankfold.model.layer_matrix import input_rows, input_squares, matrix_shape, weight_matrix
from rankfold.objective import OBJECTIVES
from rankfold.search.gradient_step import step_directions
from rankfold.search.layer_curves import layer_spectrum, truncation_changes
from rankfold.statistics.recorder import LARGEST_GRAM, collect_statistics, whole_grams
from rankfold.tasks.supervised import Regression
from tests.cases import SEEDS, SIDES, each_layer, gram, ignore_even_same, normal

close = torch.testing.assert_close
DAMPINGS = [Damping(0.0, 0.0), Damping(0.1, 0.3)]
JOINT = OBJECTIVES["joint"]


class OneLayer(nn.Module):
    """Outputs of one layer, in one vector for each example."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x).flatten(1)


def collected(model, part, task, **settings_):
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    return layers, collect_statistics(model, task, part, layers, curvature="empirical", **settings_)


def of_one_layer(case, seed=0):
    """Both kinds of statistics of a layer in float64, by a loss with curvature of its own."""
    layer = case.layer(seed)
    batched = (1, 3, 9, 11) if isinstance(layer, nn.Conv2d) else (layer.in_features,)
    inputs = [normal(seed + 10 + i, *batched[-3:]) for i in range(24)]
    model = OneLayer(layer)
    with torch.no_grad():
        outputs = [model(x[None])[0] for x in inputs]
    targets = [y + normal(seed + 50 + i, *y.shape) for i, y in enumerate(outputs)]
    part = as_part("calibration", list(zip(inputs, targets, strict=True)))
    _, whole = collected(model, part, Regression())
    _, small = collected(model, part, Regression(), smaller_side=True)
    return layer, whole["layer"], small["layer"]


@ignore_even_same
@each_layer()
@pytest.mark.parametrize("damping", DAMPINGS, ids=["undamped", "damped"])
def test_the_smaller_side_decides_weights_and_predictions_of_every_rank(case, damping):
    layer, whole, small = of_one_layer(case)
    out, in_ = matrix_shape(layer)
    weight = weight_matrix(layer)
    assert whole.product is None
    assert (small.product is None) == (out == in_)
    # What halves show of the longer side is judged otherwise.
    whole, small = (copy.copy(one) for one in (whole, small))
    for one in (whole, small):
        object.__setattr__(one, "lacking", Damping(0.0, 0.0))
    full = layer_spectrum(JOINT, weight, whole, damping)
    found = layer_spectrum(JOINT, weight, small, damping)
    scale = float(full.singular_values[0])
    close(found.singular_values, full.singular_values, rtol=1e-10, atol=1e-6 * scale)
    seen = int((full.singular_values > 1e-5 * scale).sum())
    for rank in range(1, seen + 1):
        close(found.truncated(rank), full.truncated(rank), rtol=0, atol=1e-8)
    expected, _ = truncation_changes(JOINT, layer, full, whole, damping)
    changes, _ = truncation_changes(JOINT, layer, found, small, damping)
    total = float(full.truncation_changes()[0])
    close(changes, expected, rtol=1e-10, atol=1e-10 * total)


@given(SEEDS, SIDES, SIDES, st.sampled_from([0.0, 0.5]))
@settings(max_examples=40, deadline=None)
def test_the_spectrum_of_the_smaller_side_is_that_of_both(seed, out, in_, damping):
    w, a, b = normal(seed, out, in_), gram(seed + 1, in_), gram(seed + 2, out)
    a, b = a + damping * torch.eye(in_).double(), b + damping * torch.eye(out).double()
    known, product = (b, w @ a @ w.T) if out <= in_ else (a, w.T @ b @ w)
    full, found = whitened_spectrum(w, a, b), smaller_side_spectrum(w, known, product)
    scale = float(full.singular_values[0])
    close(found.singular_values, full.singular_values, rtol=1e-10, atol=1e-10 * scale)
    for rank in range(1, min(out, in_) + 1):
        close(found.truncated(rank), full.truncated(rank), rtol=1e-7, atol=1e-7)


@ignore_even_same
@each_layer()
def test_squares_of_inputs_are_the_diagonal_of_their_gram(case):
    layer, values = case.layer(), case.values()
    rows = torch.cat(list(input_rows(layer, values)))
    close(input_squares(layer, values), rows.square().sum(0), rtol=1e-12, atol=1e-12)


@ignore_even_same
@each_layer()
def test_the_longer_side_is_known_by_its_diagonal_alone(case):
    layer, whole, small = of_one_layer(case)
    out, in_ = matrix_shape(layer)
    for one, other in (
        (small.input_gram, whole.input_gram),
        (small.output_gram, whole.output_gram),
    ):
        close(one, other if one.dim() == 2 else other.diagonal())
    assert small.input_gram.dim() == (1 if out < in_ else 2)
    assert small.output_gram.dim() == (1 if in_ < out else 2)
    close(small.gradients, whole.gradients)


class OnePlaceCounts(nn.Module):
    """A layer on sequences, of which the first place decides nearly all."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        weights = x.new_ones(x.shape[1])
        weights[0] = 1000
        return self.layer(x).mul(weights[:, None]).tanh().sum(1)


@pytest.mark.parametrize(("in_", "out"), [(5, 9), (9, 5)])
def test_dominant_rows_count_as_with_both_sides(in_, out):
    model = OnePlaceCounts(nn.Linear(in_, out)).double()
    with torch.no_grad():
        model.layer.weight.copy_(normal(0, out, in_) * 1e-3)
        model.layer.bias.zero_()
    examples = [(normal(i + 1, 20, in_), normal(i + 100, out)) for i in range(16)]
    part = as_part("calibration", examples)
    (_, whole), (_, small) = (
        collected(model, part, Regression(), smaller_side=smaller) for smaller in (False, True)
    )
    both = []
    for one in (whole["layer"], small["layer"]):
        assert one.dominant is not None
        object.__setattr__(one, "lacking", Damping(0.0, 0.0))
        both.append(layer_spectrum(JOINT, weight_matrix(model.layer), one, Damping(0.1, 0.1)))
    assert small["layer"].product is not None
    scale = float(both[0].singular_values[0])
    close(both[1].singular_values, both[0].singular_values, rtol=1e-9, atol=1e-9 * scale)
    close(both[1].truncated(3), both[0].truncated(3))


def test_a_gram_is_damped_by_what_its_examples_lack_as_seen_behind_the_weight():
    generator = torch.Generator().manual_seed(0)

    def rows(count):  # half of the directions are hardly used
        drawn = torch.randn(count, 40, generator=generator, dtype=torch.float64)
        return drawn * torch.where(torch.arange(40) < 20, 1.0, 0.1)

    first, second, many = rows(30), rows(30), rows(4000)
    w = torch.randn(12, 40, generator=generator, dtype=torch.float64)

    def found(early, later, w):
        products = (w @ x.T @ x @ w.T for x in (early, later))
        return damping_behind(*products, w @ w.T, float(early.square().sum(0).mean()))

    assert found(many, second, w) < found(first, second, w)
    square = torch.randn(40, 40, generator=generator, dtype=torch.float64)
    # Behind an invertible weight nothing is lost.
    assert found(first, second, square) == pytest.approx(
        held_out_damping(first.T @ first, second.T @ second), rel=1e-6
    )
    zeros = torch.zeros(12, 12).double()
    assert damping_behind(zeros, zeros, w @ w.T, 0.0) == 0.0


def test_which_grams_are_whole():
    conv, linear = nn.Conv2d(4, 6, 5), nn.Linear(5, 30)
    assert whole_grams(conv, False, 100**2) == whole_grams(linear, False, 30**2) == "both"
    assert whole_grams(conv, True, 100**2) == whole_grams(conv, False, 100**2 - 1) == "output"
    assert whole_grams(linear, True, 30**2) == whole_grams(linear, False, 30**2 - 1) == "input"
    assert whole_grams(nn.Linear(5, 5), True, 1) == "both"  # there is no smaller side


def test_no_gram_is_larger_than_the_model_allows():
    model = OneLayer(nn.Conv2d(32, 8, 12)).eval()
    inputs = [torch.randn(32, 12, 14) for _ in range(4)]
    part = as_part("calibration", [(x, torch.randn(24)) for x in inputs])
    layers, found = collected(model, part, Regression())
    parameters = sum(p.numel() for p in model.parameters())
    sides = matrix_shape(layers["layer"])
    assert max(sides) ** 2 > LARGEST_GRAM * parameters
    statistics = found["layer"]
    assert statistics.product.shape == (8, 8)
    assert statistics.input_gram.shape == (sides[1],)


@ignore_even_same
@each_layer()
def test_the_step_goes_down_with_the_diagonal_of_the_longer_side(case):
    layer, _, small = of_one_layer(case)
    found = step_directions({"layer": layer}, {"layer": small}, Damping(0.1, 0.1), _Silent())
    direction = found.by_layer["layer"]
    assert direction.shape == matrix_shape(layer)
    assert bool(torch.isfinite(direction).all())
    assert float((direction * small.gradient).sum()) >= 0


@ignore_even_same
@each_layer()
@pytest.mark.parametrize("name", ["activation", "fwsvd"])
def test_other_objectives_decide_the_same_where_a_gram_was_too_long(case, name):
    layer, whole, small = of_one_layer(case)
    weight = weight_matrix(layer)
    both = [layer_spectrum(OBJECTIVES[name], weight, one, DAMPINGS[1]) for one in (whole, small)]
    scale = float(both[0].singular_values[0])
    values = (one.singular_values for one in both)
    close(*values, rtol=1e-8, atol=1e-8 * scale)
    close(both[1].truncated(2), both[0].truncated(2), rtol=0, atol=1e-8)


class _Silent:
    def track(self, items, stage, total):
        return iter(items)
