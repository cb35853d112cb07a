"""Shares of a measured change against finite differences of the change itself."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import rankfold
from rankfold.certificate.change import paired_change
from rankfold.effort import EFFORTS
from rankfold.forms.curve import Choice, Curve
from rankfold.search import plans
from rankfold.search.allocate import RankPlan
from rankfold.search.interactions import LARGEST_CORRECTION, corrections, measured_shares
from rankfold.search.interactions import corrected as corrected_by
from rankfold.search.plans import of_size
from rankfold.search.round import Round, with_storage
from rankfold.search.trial import Trial, last_prediction, lowest, measure
from rankfold.tasks.losses import Task
from rankfold.tasks.supervised import Classification, UserLoss
from tests.rounds import first_round
from tests.search.test_gradient_step import taught
from tests.small_models import mlp, same_state, state
from tests.test_compress import image_data, long_mlp, pair_data, ranks, trained_cnn

NAMES = ["first", "second", "last"]


def own_loss(model: nn.Module, batch: object) -> torch.Tensor:
    values, labels = batch  # type: ignore[misc]
    return functional.cross_entropy(model(values), labels, reduction="none")


def perturbed(model: nn.Module, scales: dict[str, float]) -> nn.Module:
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    for name in NAMES:
        weight = twin.get_submodule(name).weight
        noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        with torch.no_grad():
            weight.add_(scales[name] * noise)
    return twin


def divergence(original: nn.Module, changed: nn.Module, values: torch.Tensor) -> float:
    with torch.no_grad():
        return functional.kl_div(
            changed(values).log_softmax(-1),
            original(values).log_softmax(-1),
            log_target=True,
            reduction="batchmean",
        ).item()


def test_a_share_is_half_the_slope_of_the_divergence_along_its_layer() -> None:
    original, part = mlp().double(), taught(60, 1, "calibration")
    values = torch.stack([x for x, _ in part.examples]).double()
    everywhere = dict.fromkeys(NAMES, 0.05)
    changed = perturbed(original, everywhere)
    shares = measured_shares(original, changed, Classification(), part, NAMES, batch_size=7)
    step = 1e-5
    for name in NAMES:
        ends = [
            divergence(
                original, perturbed(original, dict.fromkeys(NAMES, 0.05) | {name: s}), values
            )
            for s in (0.05 * (1 + step), 0.05 * (1 - step))
        ]
        assert shares[name] == pytest.approx((ends[0] - ends[1]) / (4 * step), rel=1e-4)


def test_the_shares_sum_to_the_whole_change_of_all_layers_together() -> None:
    original, part = mlp().double(), taught(60, 1, "calibration")
    values = torch.stack([x for x, _ in part.examples]).double()
    changed = perturbed(original, dict.fromkeys(NAMES, 0.01))
    shares = measured_shares(original, changed, Classification(), part, NAMES)
    assert sum(shares.values()) == pytest.approx(divergence(original, changed, values), rel=0.05)


def test_without_logits_the_shares_are_the_second_order_part_of_the_loss() -> None:
    original, part = mlp().double(), taught(60, 1, "calibration")
    batch = part.collate(part.examples)
    batch = (batch[0].double(), batch[1])

    def loss(scale: float) -> float:
        with torch.no_grad():
            return own_loss(perturbed(original, dict.fromkeys(NAMES, scale)), batch).mean().item()

    shares = measured_shares(
        original, perturbed(original, dict.fromkeys(NAMES, 0.01)), UserLoss(own_loss), part, NAMES
    )
    second_order = (loss(0.01) + loss(-0.01)) / 2 - loss(0)
    assert sum(shares.values()) == pytest.approx(second_order, rel=0.1)


@pytest.mark.parametrize("task", [Classification(), UserLoss(own_loss)])
def test_a_layer_that_did_not_change_has_no_share_and_the_models_stay(task: Task) -> None:
    original, part = mlp(), taught(20, 1, "calibration")
    changed = perturbed(original, {"first": 0.1, "second": 0.0, "last": 0.1})
    before, after = state(original), state(changed)
    shares = measured_shares(original, changed, task, part, NAMES)
    assert shares["second"] == 0
    assert shares["first"] != 0
    assert same_state(original, before)
    assert same_state(changed, after)
    assert all(p.requires_grad and p.grad is None for p in changed.parameters())


finite = st.floats(-1, 10)


@given(st.dictionaries(st.sampled_from("abcdef"), st.tuples(finite, finite), min_size=1))
def test_corrections_are_bounded_and_rise_with_the_share(both: dict[str, tuple[float, float]]):
    predicted = {name: max(0.0, change) for name, (_, change) in both.items()}
    shares = {name: share for name, (share, _) in both.items()}
    found = corrections(shares, predicted, 0.5)
    assert found.keys() == predicted.keys()
    assert all(1 / LARGEST_CORRECTION <= f <= LARGEST_CORRECTION for f in found.values())
    more = corrections({name: share + 1 for name, share in shares.items()}, predicted, 0.5)
    assert all(more[name] >= found[name] for name in found)


def test_corrections_of_exact_predictions_are_1() -> None:
    predicted = {"a": 0.5, "b": 0.1, "c": 0.0}
    assert corrections({**predicted, "c": 0.2}, predicted, 0.5) == {"a": 1, "b": 1, "c": 1}
    assert corrections({"a": 4 * 0.5, "b": 0.1, "c": 0}, predicted, 0.5)["a"] > 1.9


def _same_choice(curve: Curve, choice: Choice) -> Choice:
    """Two forms may have the same ranks: the form is looked at, too."""
    form = choice.ranks, choice.form
    return next(found for found in curve.choices() if (found.ranks, found.form) == form)


def test_a_corrected_plan_is_predicted_at_what_its_model_measured() -> None:
    prepared = first_round(trained_cnn(), image_data(200))
    plan = prepared.plan(0.5 * prepared.factorizable)
    measured = measure(prepared, plan)
    corrected = corrected_by(prepared, measured)
    assert corrected.factors is not None
    assert len({round(factor, 6) for factor in corrected.factors.values()}) > 1
    again = {name: _same_choice(corrected.curves[name], choice) for name, choice in plan.items()}
    harm = measured.change.mean - prepared.gain
    assert harm > 0
    assert sum(c.change for c in again.values()) == pytest.approx(harm, rel=1e-6)


@pytest.mark.parametrize(
    ("build", "data"), [(trained_cnn, image_data(200)), (long_mlp, pair_data(60))]
)
def test_corrections_stay_when_factors_are_stored_in_another_form(build, data) -> None:
    prepared = first_round(build(), data)
    corrected = corrected_by(
        prepared, measure(prepared, prepared.plan(0.5 * prepared.factorizable))
    )
    again = with_storage(with_storage(corrected, "pair"), "pivoted")
    several = [name for name, curve in corrected.curves.items() if len(curve.forms) > 1]
    assert several
    for name, curve in corrected.curves.items():
        assert not torch.equal(curve.changes, prepared.curves[name].changes)
        torch.testing.assert_close(again.curves[name].changes, curve.changes)


def test_a_first_plan_that_is_kept_is_predicted_by_what_was_measured_since() -> None:
    prepared = first_round(trained_cnn(), image_data(200))
    budget = 0.5 * prepared.factorizable
    first = measure(prepared, prepared.plan(budget))
    once = corrected_by(prepared, first)
    second = measure(once, once.plan(budget))
    # The correction by a plan brings it to its measured change; one by another plan, to its curves.
    assert last_prediction(first, [first]) == pytest.approx(first.predicted)
    assert last_prediction(first, [first, second]) == pytest.approx(first.change.mean, rel=1e-6)
    assert last_prediction(second, [first, second]) == pytest.approx(second.predicted)
    twice = corrected_by(once, second)
    third = measure(twice, twice.plan(budget))
    again = {name: _same_choice(twice.curves[name], choice) for name, choice in first.plan.items()}
    expected = twice.gain + sum(c.change for c in again.values())
    assert last_prediction(first, [first, second, third]) == pytest.approx(expected)


def test_a_plan_of_another_round_keeps_its_prediction() -> None:
    prepared = first_round(trained_cnn(), image_data(200))
    first = measure(prepared, prepared.plan(0.5 * prepared.factorizable))
    corrected = corrected_by(prepared, first)
    other = replace(corrected, study=replace(corrected.study))
    later = measure(other, other.plan(0.5 * prepared.factorizable))
    assert last_prediction(first, [first, later]) == pytest.approx(first.predicted)


def test_a_result_reports_the_last_prediction() -> None:
    result = rankfold.lossless(trained_cnn(), image_data(200), size=0.5, size_of="factorizable")
    tried = result.report["selection"]
    chosen = min(tried, key=lambda entry: entry["change"])
    measured = [entry for entry in tried if not entry["refit"]]
    predicted = result.report["loss"]["predicted_change"]
    if min(measured, key=lambda entry: entry["change"]) is measured[-1]:
        assert predicted == pytest.approx(chosen["predicted_change"])
    else:
        assert predicted != chosen["predicted_change"]


def test_corrections_add_up() -> None:
    prepared = first_round(trained_cnn(), image_data(200))
    budget = 0.5 * prepared.factorizable
    once = corrected_by(prepared, measure(prepared, prepared.plan(budget)))
    twice = corrected_by(once, measure(once, once.plan(budget)))
    assert once.factors is not None and twice.factors is not None
    for name, curve in prepared.curves.items():
        # Both have a level of their own beside the layers' factors.
        scale = float(twice.curves[name].changes.sum() / curve.changes.sum()) / twice.factors[name]
        first = next(iter(prepared.curves))
        level = (
            float(twice.curves[first].changes.sum() / prepared.curves[first].changes.sum())
            / twice.factors[first]
        )
        assert scale == pytest.approx(level, rel=1e-6)


@pytest.mark.parametrize(
    ("losses", "measured"),
    [
        ([5.0, 4.0, 3.0, 2.5, 2.5, 1.0], 5),
        ([5.0, 6.0, 7.0, 1.0], 3),
        ([5.0, 6.0, 5.5, 5.6, 1.0], 4),
        ([9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0], 7),
    ],
)
def test_plans_are_corrected_twice_and_on_while_they_get_better(
    losses: list[float], measured: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = first_round(trained_cnn(), image_data(200), refit=False, effort="thorough", rounds=1)
    level = iter(losses)

    def of_that_loss(here: Round, plan: RankPlan) -> Trial:
        found = measure(here, plan)
        noise = torch.linspace(-1e-3, 1e-3, len(found.evaluation.losses), dtype=torch.float64)
        evaluation = replace(found.evaluation, losses=next(level) + noise)
        change = paired_change(here.original, evaluation)
        return replace(found, change=change, evaluation=evaluation)

    monkeypatch.setattr(plans, "measure", of_that_loss)
    tried = of_size(prepared, 0.5 * prepared.factorizable)
    assert len(tried) == measured <= 1 + EFFORTS["thorough"].most_corrections
    assert lowest(tried).evaluation.losses.mean() == pytest.approx(min(losses[:measured]))


def test_lossless_with_interactions_keeps_the_better_plan_on_selection_data() -> None:
    prepared = rankfold.prepare(trained_cnn(), image_data(200), refit=False)
    report = prepared.lossless(0.5).report
    changes = [entry["change"] for entry in report["selection"]]
    assert len(changes) == 1 + EFFORTS["standard"].corrections
    alone = rankfold.prepare(
        trained_cnn(), image_data(200), interactions=False, refit=False
    ).lossless(0.5)
    assert len(alone.report["selection"]) == 1
    assert report["selection"][0] == alone.report["selection"][0]
    assert all(layer["interaction_factor"] is None for layer in alone.report["layers"])
    if min(changes) < changes[0]:
        assert all(layer["interaction_factor"] for layer in report["layers"])
    else:
        assert ranks(alone) == {layer["name"]: layer["rank"] for layer in report["layers"]}
    assert report["allocation"]["gap"] >= 0
