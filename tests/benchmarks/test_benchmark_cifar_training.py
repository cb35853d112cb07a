"""The nets that the benchmarks train, and the splits that the claim is examined on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.cifar10 import normalised
from benchmarks.cifar_training import (
    MEAN,
    MODELS,
    NETS,
    STD,
    augmented_batches,
    load_trained,
    rate_at,
    start_training,
)
from benchmarks.paper_claim_report import draw, tables
from benchmarks.paper_claim_runs import (
    CALIBRATION,
    SELECTION,
    TEST,
    Measured,
    Row,
    compare,
    split_kept,
)
from benchmarks.resnext import ResNeXt as ResNeXtNet
from benchmarks.resnext import Stage, resnext
from rankfold.tasks.evaluation import Evaluation
from rankfold.tasks.losses import logits_of


def test_shapes_of_a_tiny_net() -> None:
    net = ResNeXtNet(8, (Stage(1, 16, 8), Stage(2, 32, 16))).eval()
    with torch.no_grad():
        features = net.stages(torch.zeros(2, 8, 16, 16))
        assert features.shape == (2, 32, 8, 8)
        assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_pointwise_convolutions_hold_the_parameters() -> None:
    net = resnext()
    total = sum(p.numel() for p in net.parameters())
    pointwise = sum(
        module.weight.numel()
        for module in net.modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
    )
    assert pointwise / total > 0.85
    assert 2 * total < 8e6  # bytes, as float16


@pytest.mark.parametrize("name", NETS)
def test_trained_nets_are_kept_in_few_bytes(name: str) -> None:
    net, _, _ = load_trained(name)
    assert not net.training
    with torch.no_grad():
        logits = logits_of(net(torch.zeros(2, 3, 32, 32)))
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()
    assert (MODELS / f"{name}_seed0.log").exists()
    assert sum(file.stat().st_size for file in MODELS.iterdir()) < 8e6


@pytest.mark.parametrize("name", NETS)
def test_training_starts_as_the_recipe_says(name: str) -> None:
    recipe = NETS[name].recipe._replace(peak_rate=0.5, weight_decay=0.25)
    net, optimizer = start_training(NETS[name], recipe)
    again, _ = start_training(NETS[name], recipe)
    for one, other in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)  # the seed decides
    assert type(optimizer).__name__.lower() == recipe.optimizer
    decayed, others = optimizer.param_groups
    assert decayed["weight_decay"] == 0.25 and others["weight_decay"] == 0
    assert all(p.dim() > 1 for p in decayed["params"])
    assert all(p.dim() <= 1 for p in others["params"])


def test_rate_rises_then_falls_to_zero_in_each_cycle() -> None:
    recipe = NETS["resnext"].recipe._replace(cycles=(10, 5))
    first = [rate_at(recipe, step / 10) for step in range(100)]
    second = [rate_at(recipe, 10 + step / 10) for step in range(51)]
    for rates in (first, second):
        peak = rates.index(max(rates))
        assert max(rates) == pytest.approx(recipe.peak_rate)
        assert rates[: peak + 1] == sorted(rates[: peak + 1])
        assert rates[peak:] == sorted(rates[peak:], reverse=True)
        assert rates[-1] == pytest.approx(0, abs=1e-4)


def test_batches_are_crops_of_the_images_flipped_or_not() -> None:
    images = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8)
    padded = nn.functional.pad(images, (4, 4, 4, 4))
    batches = list(augmented_batches(padded, torch.arange(12), 5, torch.Generator().manual_seed(0)))
    assert [len(labels) for _, labels in batches] == [5, 5]  # what fills no batch is left out
    seen = torch.cat([labels for _, labels in batches]).tolist()
    assert len(set(seen)) == 10
    for crops, labels in batches:
        for crop, label in zip(crops, labels.tolist(), strict=True):
            windows = padded[label].unfold(1, 32, 1).unfold(2, 32, 1)  # (3, 9, 9, 32, 32)
            places = normalised(windows.permute(1, 2, 0, 3, 4).reshape(-1, 3, 32, 32), MEAN, STD)
            either = torch.cat([places, places.flip(-1)])
            assert (either == crop).flatten(1).all(1).any()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_parts_are_disjoint_and_use_every_kept_image(seed: int) -> None:
    parts = split_kept(10_000, seed)
    assert [len(part) for part in parts] == [CALIBRATION, SELECTION, TEST]
    assert sorted(torch.cat(parts).tolist()) == list(range(10_000))


def test_seeds_split_differently() -> None:
    assert not torch.equal(split_kept(10_000, 0)[0], split_kept(10_000, 1)[0])


def test_paired_changes_of_some_images() -> None:
    dense = _evaluation([1.0, 2.0, 3.0, 9.0], [1, 0, 1, 1])
    changed = _evaluation([0.5, 1.5, 2.2, 9.0], [1, 1, 0, 1])
    measured = compare(dense, changed, slice(0, 3))
    assert measured.change == pytest.approx(-0.6)
    assert measured.standard_error == pytest.approx(0.1)
    assert measured.lower < measured.change < measured.upper < 0
    assert (measured.gained, measured.lost, measured.accuracy_change) == (1, 1, 0)


def test_tables_of_a_curve_with_a_size_that_has_no_plan(
    tmp_path: Path,
) -> None:
    better = Measured(0.3, -0.1, 0.01, -0.12, -0.08, 0.9, 0.01, 0.002, 0.006, 0.014, 60, 10)
    worse = Measured(0.6, 0.2, 0.01, 0.18, 0.22, 0.8, -0.09, 0.002, -0.094, -0.086, 10, 460)
    rows = [_row("dense", None, Measured(0.4, 0, 0, 0, 0, 0.89, 0, 0, 0, 0, 0, 0))]
    for seed in (0, 1):
        rows += [
            _row("joint, pivoted", 0.5, better, seed),
            _row("joint, pivoted", 0.3, worse, seed),
            _row("first-order, pair", 0.5, better, seed),
            _row("first-order, pair", 0.3, None, seed),
            _row("svd, pivoted", 0.5, better, seed),
        ]
    (printed,) = tables(rows).values()
    assert "| joint, pivoted | -0.1000 ± 0.0100, seeds ± 0.0000 | +0.2000" in printed
    assert "| first-order, pair | no plan of this size |" in printed
    assert "| 10 / 460 | 0.5 | 0.5 |" in printed
    assert "| svd, pivoted | not measured |" in printed
    pytest.importorskip("matplotlib")
    drawn = draw(rows, tmp_path).read_bytes()
    assert drawn == draw(rows, tmp_path).read_bytes()
    assert b"</svg>" in drawn


def _evaluation(losses: list[float], correct: list[int]) -> Evaluation:
    return Evaluation(
        torch.tensor(losses, dtype=torch.float64),
        torch.ones(len(losses), dtype=torch.float64),
        torch.tensor(correct, dtype=torch.float64),
    )


def _row(model: str, size: float | None, measured: Measured | None, seed: int = 0) -> Row:
    return Row("kept", seed, model, size, "kept", 5000, size, None, measured, None, None, None)
