"""The gradient term on a small model that has something left to learn."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rankfold.data.parts import Part, as_part
from rankfold.machine.progress import SilentProgress
from rankfold.maths.linalg import Damping
from rankfold.search.gradient_step import (
    fit_step,
    moved_weight,
    neighbours,
    search_step,
    step_directions,
)
from rankfold.statistics.recorder import collect_statistics
from rankfold.tasks.evaluation import evaluate
from rankfold.tasks.supervised import Classification
from tests.small_models import mlp, same_state, seeded, state

TEACHER = seeded(8, lambda: nn.Linear(6, 5))


def taught(count: int, seed: int, name: str) -> Part:
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        y = (3 * TEACHER(x)).argmax(1)
    return as_part(name, list(zip(x, y.tolist(), strict=True)))


def search(calibration: Part, selection: Part, groups: int = 1, compared_on: float = 1.0):
    model = mlp()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    task = Classification()
    found = collect_statistics(model, task, calibration, layers, curvature="empirical")
    directions = step_directions(layers, found, Damping(0.1, 0.1), SilentProgress())
    original = evaluate(model, task, selection)
    before = state(model)
    step = search_step(
        model,
        task,
        selection,
        original,
        layers,
        directions,
        batch_size=None,
        progress=SilentProgress(),
        groups=groups,
        compared_on=compared_on,
    )
    assert same_state(model, before)
    return model, layers, original, step


@pytest.mark.parametrize("share", [1.0, 0.7, 0.1])
def test_the_step_lowers_the_loss_as_it_says(share: float) -> None:
    """Of all examples, whatever part of them the lengths are compared on."""
    selection = taught(200, 2, "selection")
    calibration = taught(300, 1, "calibration")
    model, layers, original, step = search(calibration, selection, compared_on=share)
    assert step.eta > 0
    assert step.directions.signal > 0
    assert min(step.trials, key=lambda trial: trial[1])[0] == step.eta
    assert step.gain < -0.02
    with torch.no_grad():
        for name, layer in layers.items():
            layer.weight.copy_(step.moved(name, layer))
    measured = evaluate(model, Classification(), selection).mean - original.mean
    assert measured == pytest.approx(step.gain, abs=1e-5)


def test_groups_go_their_own_way_where_it_is_better() -> None:
    selection = taught(200, 2, "selection")
    calibration = taught(300, 1, "calibration")
    together = search(calibration, selection)[3]
    model, layers, original, step = search(calibration, selection, groups=2)
    assert (step.eta, step.trials) == (together.eta, together.trials)
    assert set(step.scales.values()) <= {2.0, 0.5} and step.scales
    assert step.gain == min(change for _, _, change in step.group_trials) < together.gain
    with torch.no_grad():
        for name, layer in layers.items():
            layer.weight.copy_(step.moved(name, layer))
    measured = evaluate(model, Classification(), selection).mean - original.mean
    assert measured == pytest.approx(step.gain, abs=1e-5)


def test_groups_are_runs_of_nearly_the_same_length() -> None:
    assert neighbours(list("abcdefg"), 3) == [["a", "b"], ["c", "d"], ["e", "f", "g"]]
    assert neighbours(["a", "b"], 5) == [["a"], ["b"]]


def test_labels_without_meaning_give_no_step() -> None:
    noise = torch.Generator().manual_seed(5)
    parts = [
        as_part(
            name,
            [
                (torch.randn(6, generator=noise), int(torch.randint(5, (1,), generator=noise)))
                for _ in range(60)
            ],
        )
        for name in ("calibration", "selection")
    ]
    step = search(parts[0], parts[1])[3]
    assert step.eta == 0
    assert not step.directions.by_layer
    assert step.gain == 0


def test_a_step_of_length_zero_is_the_weight_itself() -> None:
    layer = nn.Linear(3, 4)
    assert torch.equal(moved_weight(layer, torch.ones(4, 3), 0.0), layer.weight)
    moved = moved_weight(layer, torch.ones(4, 3, dtype=torch.float64), 0.5)
    torch.testing.assert_close(moved, layer.weight.detach() - 0.5)


def test_the_fit_finds_a_parabola_whatever_decades_the_lengths_span() -> None:
    trials = [(eta, -3 * eta + 0.5 * 4 * eta**2) for eta in (1e-3, 1e-2, 0.5)]
    fit = fit_step(trials)
    assert fit is not None
    assert (fit.slope, fit.curvature) == (pytest.approx(3), pytest.approx(4))
    assert fit.best == pytest.approx(0.75)
    assert fit.change(fit.best) == pytest.approx(-9 / 8)


def test_no_fit_where_the_loss_only_rises_or_one_length_is_known() -> None:
    assert fit_step([(0.1, 0.5), (0.2, 1.5)]) is None
    assert fit_step([(0.1, -0.5)]) is None
    assert fit_step([(0.1, -0.5), (0.2, float("inf"))]) is None


def test_the_fit_predicts_the_gain_of_the_chosen_step() -> None:
    step = search(taught(300, 1, "calibration"), taught(200, 2, "selection"))[3]
    assert step.fit is not None
    assert step.fit.change(step.eta) == pytest.approx(step.gain, rel=0.3)
