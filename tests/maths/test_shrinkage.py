"""Damping judged by held-out examples, against Grams whose truth is known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfold.maths import shrinkage
from rankfold.maths.shrinkage import LEAST, MOST, held_out_damping, quadrature

SIDE = 48


def sample(spectrum: torch.Tensor, rows: int, seed: int) -> torch.Tensor:
    """The Gram of Gaussian rows whose second moment is diagonal."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, len(spectrum), generator=generator, dtype=torch.float64)
    x = x * spectrum.sqrt()
    return x.T @ x / rows


def decaying(slope: float) -> torch.Tensor:
    return torch.arange(1, SIDE + 1, dtype=torch.float64) ** -slope


def low_energies(gram: torch.Tensor, truth: torch.Tensor, share: float) -> tuple[float, float]:
    """What the damped Gram and the truth say of the lower half of the Gram's eigenvectors."""
    eigenvalues, vectors = torch.linalg.eigh(gram)
    low = vectors[:, : SIDE // 2]
    damped = eigenvalues[: SIDE // 2] + share * eigenvalues.mean()
    return float(damped.sum()), float(((low.T * truth) @ low).trace())


@given(slope=st.floats(0, 1), rows=st.integers(12, 400), seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_the_damped_gram_has_the_true_energy_along_its_small_eigenvalues(
    slope: float, rows: int, seed: int
) -> None:
    truth = decaying(slope)
    gram = sample(truth, rows, seed)
    share = held_out_damping(gram, sample(truth, 4000, seed + 1))
    said, true = low_energies(gram, truth, share)
    assert 0.5 < said / true < 2
    undamped, _ = low_energies(gram, truth, 0.0)
    if rows < SIDE // 2:
        assert undamped < 1e-9 * true


def test_fewer_examples_lack_more() -> None:
    truth = decaying(1.0)
    found = [
        held_out_damping(sample(truth, rows, 1), sample(truth, rows, 2))
        for rows in (16, 64, 256, 4096)
    ]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.1 > 0.02 > found[-1]


def test_a_gram_of_its_own_examples_needs_none() -> None:
    gram = sample(decaying(1.0), 200, 3)
    assert held_out_damping(gram, gram) == 0
    assert held_out_damping(gram, 7.0 * gram) == 0


@given(scale=st.floats(1e-6, 1e6), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_the_share_does_not_depend_on_the_unit_of_either(scale: float, seed: int) -> None:
    gram, other = sample(decaying(0.5), 30, seed), sample(decaying(0.5), 30, seed + 1)
    share = held_out_damping(gram, other)
    assert held_out_damping(scale * gram, other) == pytest.approx(share)
    assert held_out_damping(gram, scale * other) == pytest.approx(share)


def test_equal_eigenvalues_of_one_example_are_found_equal() -> None:
    """Nothing is known but the mean eigenvalue: it is the most that may be added."""
    share = held_out_damping(sample(torch.ones(SIDE), 1, 1), sample(torch.ones(SIDE), 5000, 2))
    assert 0.7 < share < 1.4


@pytest.mark.parametrize("empty", ["gram", "other", "both"])
def test_what_was_never_reached_needs_none(empty: str) -> None:
    gram, zero = sample(decaying(1.0), 50, 1), torch.zeros(SIDE, SIDE)
    first = zero if empty in ("gram", "both") else gram
    assert held_out_damping(first, zero.double() if empty != "gram" else gram) == 0


def test_float32_grams_give_what_float64_ones_do() -> None:
    gram, other = sample(decaying(1.0), 100, 1), sample(decaying(1.0), 100, 2)
    found = held_out_damping(gram.float(), other.float())
    assert found == pytest.approx(held_out_damping(gram, other))
    assert LEAST < found < MOST


@given(slope=st.floats(0, 2), rows=st.integers(5, 400), seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_the_quadrature_of_a_whole_space_is_exact_but_for_its_probes(
    slope: float, rows: int, seed: int
) -> None:
    gram, other = sample(decaying(slope), rows, seed), sample(decaying(slope), 500, seed + 1)
    shift = 0.1 * float(gram.trace()) / SIDE
    nodes, counts, energies = quadrature(gram, other, probes=400)
    eigenvalues, vectors = torch.linalg.eigh(gram)
    for f in (torch.log, torch.reciprocal):
        matrix = (vectors * f(eigenvalues.clamp(min=0) + shift)) @ vectors.T
        for weights, truth in ((counts, matrix), (energies, matrix @ other)):
            deviation = float(truth.norm()) * (2 / 400) ** 0.5  # at most, of the mean over signs
            found = float((weights * f(nodes.clamp(min=0) + shift)).sum())
            assert found == pytest.approx(float(truth.trace()), abs=5 * deviation)
    assert float(counts.sum()) == pytest.approx(SIDE)


def test_a_space_that_ends_early_adds_nothing() -> None:
    gram = torch.eye(SIDE) * 3
    nodes, counts, energies = quadrature(gram, 2 * torch.eye(SIDE))
    assert bool(torch.isfinite(nodes).all())
    there = counts > 1e-6
    torch.testing.assert_close(nodes[there], torch.full_like(nodes[there], 3))
    assert float(counts.sum()) == pytest.approx(SIDE)
    assert float(energies.sum()) == pytest.approx(2 * SIDE)
    assert bool(torch.isfinite(torch.stack(quadrature(torch.zeros(5, 5), torch.eye(5)))).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [100, 1600])
def test_large_grams_get_the_damping_that_they_would_get_decomposed(
    rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    spectrum = torch.arange(1, 401, dtype=torch.float64) ** -1.0
    gram, other = sample(spectrum, rows, 1).to(dtype), sample(spectrum, rows, 2).to(dtype)
    exact = held_out_damping(gram, other)
    monkeypatch.setattr(shrinkage, "LARGEST_DECOMPOSED", 300)
    assert exact / 1.8 < held_out_damping(gram, other) < exact * 1.8
    assert held_out_damping(gram, other) == held_out_damping(gram, other)
