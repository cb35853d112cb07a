from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from rankfold.data.parts import as_part
from rankfold.maths.dominant_rows import DOMINANT, HEAVY, dominant_rows
from rankfold.maths.linalg import UNDAMPED, Damping
from rankfold.maths.spectrum import quadratic_change, whitened_spectrum
from rankfold.statistics.grams import damped_grams, expected_grams
from rankfold.statistics.layer_statistics import DominantRows, LayerStatistics
from rankfold.statistics.recorder import collect_statistics
from rankfold.tasks.supervised import UserLoss
from tests.cases import SEEDS, gram, normal

close = torch.testing.assert_close


def test_a_row_with_most_of_the_gradient_is_dominant_and_no_other() -> None:
    squares = torch.ones(3, 40)
    squares[1, 7] = 1000.0
    squares[2, 3] = 50.0  # above HEAVY times the mean, not DOMINANT times that of the others
    found = dominant_rows(squares)
    assert found.nonzero().tolist() == [[1, 7]]


def test_several_dominant_rows_do_not_hide_each_other() -> None:
    squares = torch.ones(1, 100)
    squares[0, :4] = 1e6
    assert dominant_rows(squares)[0].nonzero().flatten().tolist() == [0, 1, 2, 3]


def test_rows_without_a_gradient_count_for_nothing() -> None:
    squares = torch.zeros(2, 60)
    squares[:, :30] = 1.0
    squares[0, 5] = 500.0
    alone = squares[:, :30]
    assert torch.equal(dominant_rows(squares)[:, :30], dominant_rows(alone))
    assert not bool(dominant_rows(squares)[:, 30:].any())
    # One row that has all of it is the whole example, not a dominant row of it.
    single = torch.zeros(1, 100)
    single[0, 4] = 3.0
    assert not bool(dominant_rows(single).any())
    assert not bool(dominant_rows(torch.zeros(2, 5)).any())


@given(seed=SEEDS, rows=st.integers(1, int(HEAVY)))
@settings(max_examples=30, deadline=None)
def test_few_rows_have_no_dominant_one(seed: int, rows: int) -> None:
    assert not bool(dominant_rows(normal(seed, 4, rows).exp().pow(20)).any())


@given(seed=SEEDS, scale=st.floats(1e-6, 1e6))
@settings(max_examples=30, deadline=None)
def test_dominance_does_not_depend_on_the_unit_and_leaves_other_examples_alone(
    seed: int, scale: float
) -> None:
    squares = normal(seed, 3, 50).mul(4).exp()
    found = dominant_rows(squares)
    assert torch.equal(dominant_rows(squares * scale), found)
    for one, alone in zip(found, squares, strict=True):
        assert torch.equal(dominant_rows(alone[None])[0], one)
        light = alone[alone <= HEAVY * alone.mean()]
        assert bool((alone[one] > DOMINANT * light.mean()).all())


class Sink(nn.Module):
    """Of every example the first token's output is worth ``weight`` times the others'."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 4).double()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        return torch.cat([self.weight * y[:, :1], y[:, 1:]], 1)


def squared(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return (model(batch[0]) - batch[1]).square().sum((1, 2))


def examples(count: int = 12, tokens: int = 40) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x, y = normal(0, count, tokens, 5), normal(1, count, tokens, 4)
    x[:, 0] = x[0, 0]  # every example begins with the same token
    return [(a, b) for a, b in zip(x, y, strict=True)]


def collected(model: Sink, batch_size: int | None = None) -> LayerStatistics:
    part = as_part("calibration", examples())
    task, layers = UserLoss(squared), {"inner": model.inner}
    return collect_statistics(
        model, task, part, layers, curvature="empirical", batch_size=batch_size
    )["inner"]


def rows_by_hand(model: Sink) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and gradients, ``(examples, tokens, ...)``."""
    x, y = (torch.stack(side) for side in zip(*examples(), strict=True))
    inner = model.inner(x).detach()
    scale = torch.ones(40, 1).double()
    scale[0] = model.weight
    return x, 2 * scale * (scale * inner - y)


def test_dominant_rows_are_counted_apart_and_nothing_is_lost() -> None:
    torch.manual_seed(0)
    model = Sink(30.0)
    found = collected(model)
    x, g = rows_by_hand(model)
    assert found.dominant is not None
    close(found.input_gram, torch.einsum("nti,ntj->ij", x, x) / (12 * 40))
    close(found.output_gram, torch.einsum("nti,ntj->ij", g[:, 1:], g[:, 1:]) / 12)
    close(found.dominant.output_squares, g[:, 0].square().sum(0) / 12)
    weighted = g[:, 0].norm(dim=1, keepdim=True) * x[:, 0]
    close(found.dominant.inputs.T @ found.dominant.inputs, weighted.T @ weighted / 12)
    other = collected(model, batch_size=5)
    assert other.dominant is not None
    rows, others = found.dominant.inputs, other.dominant.inputs
    close(rows.T @ rows, others.T @ others)
    close(found.dominant.output_squares, other.dominant.output_squares)
    close(found.output_gram, other.output_gram)


def test_without_them_statistics_are_what_they_were() -> None:
    torch.manual_seed(0)
    model = Sink(1.0)
    found = collected(model)
    _, g = rows_by_hand(model)
    assert found.dominant is None
    close(found.output_gram, torch.einsum("nti,ntj->ij", g, g) / 12)
    a, b = expected_grams(replace(found, lacking=UNDAMPED))
    close(a, found.input_gram)
    close(b, found.output_gram)


def statistics(dominant: DominantRows | None, lacking: Damping = UNDAMPED) -> LayerStatistics:
    return LayerStatistics(gram(1, 5), gram(2, 4), None, None, dominant, lacking)


def test_what_a_gram_lacks_is_added_and_damps_where_it_is_more_than_the_damping() -> None:
    plain, noisy = statistics(None), statistics(None, Damping(0.3, 0.05))
    for found, expected in (
        (expected_grams(noisy), damped_grams(plain, Damping(0.3, 0.05))),
        (damped_grams(noisy, Damping(0.1, 0.2)), damped_grams(plain, Damping(0.3, 0.2))),
        (damped_grams(noisy, Damping(0.4, 0.01)), damped_grams(plain, Damping(0.4, 0.05))),
    ):
        close(found, expected)


def test_dominant_inputs_weigh_what_their_gradients_are_worth_and_are_not_damped() -> None:
    rows = normal(3, 3, 5)
    plain, dominant = statistics(None), DominantRows(rows, gram(4, 4).diagonal())
    a, b = damped_grams(plain, Damping(0.1, 0.2))
    close(a, gram(1, 5) + 0.1 * gram(1, 5).trace() / 5 * torch.eye(5).double())
    close(b, gram(2, 4) + 0.2 * gram(2, 4).trace() / 4 * torch.eye(4).double())
    with_rows = damped_grams(statistics(dominant), Damping(0.1, 0.2))
    close(with_rows[0], a + rows.T @ rows / gram(2, 4).trace())
    close(with_rows[1], b)


def test_statistics_without_gradients_are_refused() -> None:
    with pytest.raises(ValueError, match="needs statistics with gradients"):
        expected_grams(LayerStatistics(gram(1, 5), None, None, None))


def test_what_the_layer_does_to_a_dominant_input_is_kept() -> None:
    """The exact curvature of all rows, at the rank that both curvatures get."""
    torch.manual_seed(0)
    model = Sink(30.0)
    found = collected(model)
    x, g = rows_by_hand(model)
    weight = model.inner.weight.detach()
    assert found.dominant is not None and found.output_gram is not None

    def truth(a: torch.Tensor, b: torch.Tensor) -> float:
        error = whitened_spectrum(weight, a, b).truncated(3) - weight
        return float((functional.linear(x, error) * g).sum(2).square().sum()) / 2 / 12

    apart = truth(*expected_grams(found))
    of_dominant = g[:, 0].T @ g[:, 0] / 12
    together = truth(found.input_gram, found.output_gram + of_dominant)
    assert apart < 0.5 * together
    a, b = expected_grams(found)
    error = whitened_spectrum(weight, a, b).truncated(3) - weight
    assert 0.5 < quadratic_change(error, a, b) / apart < 2
