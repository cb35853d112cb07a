import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import rankfold
from rankfold import Data, InputError
from rankfold.compress import Preparation
from rankfold.effort import EFFORTS
from rankfold.forms.blocks.modules import BLOCK_FORMS
from rankfold.forms.conv import form as conv_form
from rankfold.forms.conv.fit import conv_factors
from rankfold.forms.conv.modules import CONV_FORMS
from rankfold.forms.storage import STORAGES, Storage
from rankfold.integrations.transformers import own_text
from rankfold.model.sizes import model_parameters
from rankfold.objective import OBJECTIVES
from rankfold.report.report import layer_entry
from rankfold.search import interactions, study
from rankfold.search import round as round_module
from rankfold.search.build import build, control, layer_module, layer_weight, look_at
from rankfold.search.damping import DAMPINGS
from rankfold.search.interactions import measured_shares
from rankfold.search.plans import of_size, within_margin
from rankfold.search.round import with_storage
from rankfold.search.rounds import next_round
from rankfold.search.trial import measure
from rankfold.settings import Settings
from tests.cases import leave_identity_out
from tests.rounds import first_round
from tests.small_models import (
    VOCABULARY,
    SmallCNN,
    SmallMLP,
    flags,
    image_data,
    images,
    mlp,
    pairs,
    same_state,
    seeded,
    state,
    tiny_llama,
    token_data,
    token_windows,
    trained_cnn,
)


def pair_data(count: int = 20) -> Data:
    return Data(*(pairs(count, seed) for seed in (1, 2, 3)))


def ranks(result: rankfold.Result) -> dict[str, int | None]:
    return {entry["name"]: entry["rank"] for entry in result.report["layers"]}


def multiply_adds(model: nn.Module, images: torch.Tensor) -> int:
    """FLOPs of the convs and Linears of a model, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return counter.get_total_flops()


# lossless


@pytest.mark.parametrize("form", STORAGES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_lossless_keeps_at_most_the_size_and_reports_it_truly(
    objective: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_identity_out(monkeypatch)  # so FLOPs are counted
    model = trained_cnn()
    before, before_flags = state(model), flags(model)
    result = rankfold.lossless(model, image_data(40), size=0.6, objective=objective, form=form)
    report = result.report
    assert 0.4 < result.ratio <= 0.6
    assert result.ratio == model_parameters(result.model) / model_parameters(model)
    assert report["original"]["parameters"] == model_parameters(model)
    assert report["factorized"]["parameters"] == model_parameters(result.model)
    forms = {e["form"] for e in report["layers"] if e["rank"] is not None}
    assert forms <= {form, *CONV_FORMS, *BLOCK_FORMS}
    assert form == "pivoted" or not forms & {*BLOCK_FORMS}
    assert all(e["pivoted"] == (form == "pivoted") for e in report["layers"] if e["form"])
    assert report["factorized"]["flops"] == multiply_adds(result.model, torch.zeros(1, 3, 8, 8))
    assert report["original"]["flops"] == multiply_adds(model, torch.zeros(1, 3, 8, 8))
    file = result.save(tmp_path / "a") / "model.safetensors"
    assert report["factorized"]["bytes"] == file.stat().st_size
    assert same_state(model, before)
    assert flags(model) == before_flags


def test_the_report_of_a_layer_is_its_module(tmp_path: Path) -> None:
    result = rankfold.lossless(trained_cnn(), image_data(40), size=0.5)
    for entry in result.report["layers"]:
        module = result.model.get_submodule(entry["name"])
        if entry["rank"] is None:
            weights = module.weight.numel()
        else:
            weights = sum(p.numel() for n, p in module.named_parameters() if n != "bias")
            ranks = (entry["rank"], *([entry["second_rank"]] if entry["second_rank"] else []))
            assert ranks == getattr(module, "ranks", (getattr(module, "rank", None),))
        assert entry["factorized_parameters"] == weights
        assert entry["parameters"] == math.prod(entry["shape"])


def test_the_reported_losses_are_those_of_the_held_out_part() -> None:
    model, data = trained_cnn(), image_data(40)
    result = rankfold.lossless(model, data, size=0.6)
    values, labels = data.held_out.tensors
    with torch.no_grad():
        original = nn.functional.cross_entropy(model(values), labels).item()
        factorized = nn.functional.cross_entropy(result.model(values), labels).item()
        hits = (result.model(values).argmax(1) == labels).double().mean().item()
    assert result.report["loss"]["original"] == pytest.approx(original, abs=1e-6)
    assert result.report["loss"]["factorized"] == pytest.approx(factorized, abs=1e-6)
    assert result.certificate.change == pytest.approx(factorized - original, abs=1e-6)
    assert result.report["accuracy"]["factorized"] == pytest.approx(hits)


def test_the_objectives_that_use_data_do_less_harm_than_plain_svd() -> None:
    changes = {
        objective: rankfold.lossless(
            trained_cnn(), image_data(200), size=0.4, objective=objective
        ).certificate.change
        for objective in ("svd", "joint")
    }
    assert changes["joint"] < changes["svd"]


def test_size_1_keeps_every_layer_dense() -> None:
    model = trained_cnn()
    result = rankfold.lossless(model, image_data(40), size=1.0, objective="kronecker")
    assert result.ratio == 1
    assert not result.found
    assert set(ranks(result).values()) == {None}
    assert same_state(result.model, state(model))
    assert result.certificate.change == 0
    assert result.certificate.verdict == "lossless"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_size_1_works_for_every_objective(objective: str) -> None:
    assert (
        rankfold.lossless(trained_cnn(), image_data(40), size=1.0, objective=objective).ratio <= 1
    )


def test_size_of_the_factorizable_layers() -> None:
    result = rankfold.lossless(
        trained_cnn(), image_data(40), size=0.5, size_of="factorizable", exclude=["head"]
    )
    before, after = result.report["original"], result.report["factorized"]
    share = after["factorizable_parameters"] / before["factorizable_parameters"]
    assert 0.4 < share <= 0.5
    assert result.ratio > share
    dropped = before["factorizable_parameters"] - after["factorizable_parameters"]
    assert before["parameters"] - after["parameters"] == dropped


def test_cost_flops_bounds_the_flops() -> None:
    result = rankfold.lossless(trained_cnn(), image_data(40), size=0.6, cost="flops")
    share = result.report["factorized"]["flops"] / result.report["original"]["flops"]
    assert 0.4 < share <= 0.6
    by_parameters = rankfold.lossless(trained_cnn(), image_data(40), size=0.6)
    assert ranks(result) != ranks(by_parameters)


def test_a_language_model_is_factorized_but_for_its_tied_weights() -> None:
    model = tiny_llama()
    before = state(model)
    result = rankfold.lossless(model, token_data(), size=0.8)
    assert result.certificate.unit == "nats per token"
    skipped = {entry["name"]: entry["reason"] for entry in result.report["not_factorized"]}
    assert skipped["lm_head"] == (
        "its weight is shared with model.embed_tokens: tied weights stay as they are"
    )
    assert result.model.lm_head.weight is result.model.model.embed_tokens.weight
    assert result.ratio <= 0.8
    assert same_state(model, before)


def test_a_model_in_training_mode_comes_back_in_it() -> None:
    model = trained_cnn().train()
    model.features[1].eval()
    before, before_flags = state(model), flags(model)
    result = rankfold.lossless(model, image_data(40), size=0.7)
    assert flags(model) == before_flags
    assert same_state(model, before)
    assert result.model.training


def test_a_layer_that_is_never_called_is_listed_and_kept() -> None:
    model = mlp()
    model.spare = nn.Linear(6, 6)
    result = rankfold.lossless(model, pair_data(), size=0.9)
    reasons = {entry["name"]: entry["reason"] for entry in result.report["not_factorized"]}
    assert reasons == {"spare": "not called in a forward pass on the calibration data"}
    assert isinstance(result.model.spare, nn.Linear)


def test_a_layer_that_sees_only_zeros_is_listed_and_kept() -> None:
    model = mlp()
    nn.init.zeros_(model.first.weight)
    nn.init.zeros_(model.first.bias)
    result = rankfold.lossless(model, pair_data(), size=0.9)
    reasons = {entry["name"]: entry["reason"] for entry in result.report["not_factorized"]}
    assert "no input or no gradient" in reasons["second"]


# Rounds, step, own text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "empirical"),
        ({"gradient_step": False}, "sampled"),
        ({"objective": "kronecker"}, "sampled"),
        ({"objective": "fwsvd"}, "empirical"),  # as published
        ({"objective": "activation"}, None),
        ({"curvature": "sampled"}, "sampled"),
    ],
)
def test_where_the_curvature_comes_from(options: dict[str, Any], expected: str | None) -> None:
    prepared = first_round(seeded(3, SmallMLP), pair_data(60), **options)
    assert prepared.study.labels.curvature == expected


def test_rounds_end_at_the_size_and_say_what_each_one_did() -> None:
    model, data = trained_cnn(), image_data(200)
    before = state(model)
    result = rankfold.lossless(model, data, size=0.5, rounds=3)
    assert 0.4 < result.ratio <= 0.5
    past = result.report["rounds"]
    tried = result.report["selection"]
    # One plan a round, the best of them made again with measured interactions, and fitted again.
    assert len(tried) == 3 + EFFORTS["standard"].corrections + 1
    assert all(entry["ratio"] <= 0.5 for entry in tried)
    assert result.report["factorized"]["parameters"] == model_parameters(result.model)
    assert all(0.5 < entry["ratio"] < 1 for entry in past)
    assert same_state(model, before)
    # The best on selection data of all that were tried at this size is the one that is returned.
    direct = rankfold.lossless(model, data, size=0.5).report["selection"][0]["change"]
    assert tried[0]["change"] == pytest.approx(direct)


def test_a_layer_that_a_later_round_no_longer_reaches_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, calls = study.collect_statistics, 0

    def forgetful(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        statistics = found(*args, **kwargs)
        return statistics if calls == 1 else {n: s for n, s in statistics.items() if n != "head"}

    monkeypatch.setattr(study, "collect_statistics", forgetful)
    with pytest.raises(InputError, match=r"round 1 no longer calls head \(1 such"):
        rankfold.lossless(trained_cnn(), image_data(200), size=0.5, rounds=2)


def test_a_later_round_starts_from_the_model_of_the_one_before() -> None:
    prepared = first_round(trained_cnn(), image_data(200), rounds=2)
    budget = 0.5 * prepared.factorizable
    following = next_round(prepared, budget, rounds_left=2)
    spent = sum(choice.cost for choice in following.start.values())
    assert budget < spent < prepared.factorizable
    assert following.offset == pytest.approx(following.earlier[0].change.mean, abs=1e-6)
    # The weights that the round before cut to rank k cost nothing at rank k.
    for name, choice in following.start.items():
        if choice.rank is not None and choice.form is None and not following.step.eta:
            assert float(following.ranked[name].changes[choice.rank - 1]) == 0


def test_the_control_of_two_rounds_moves_by_both_steps() -> None:
    data = image_data(200)
    prepared = first_round(trained_cnn(), data, rounds=2)
    if prepared.step is None or prepared.step.eta == 0:
        pytest.skip("no step helps this net")
    following = next_round(prepared, 0.5 * prepared.factorizable, rounds_left=2)
    first, both = control(prepared), control(following)
    assert first is not None and both is not None
    name = next(iter(prepared.study.subject.layers))
    layer = first.get_submodule(name)
    expected = layer.weight.detach().flatten(1)
    if following.step is not None:
        expected = following.step.moved(name, layer)
    torch.testing.assert_close(both.get_submodule(name).weight.detach().flatten(1), expected)


def test_compact_with_rounds_is_never_larger() -> None:
    model, data = trained_cnn(), image_data(200)
    one = rankfold.compact(model, data, margin=0.1)
    two = rankfold.compact(model, data, margin=0.1, rounds=2)
    assert two.ratio <= one.ratio


def test_without_the_step_joint_is_kronecker() -> None:
    model, data = trained_cnn(), image_data(100)
    plain = rankfold.lossless(model, data, size=0.6, gradient_step=False)
    kronecker = rankfold.lossless(model, data, size=0.6, objective="kronecker")
    assert plain.report["step"] is None
    assert same_state(plain.model, state(kronecker.model))


def test_damping_auto_takes_the_best_pair_of_those_tried() -> None:
    model, data = trained_cnn(), image_data(200)
    report = rankfold.lossless(model, data, size=0.5, damping="auto").report
    trials = report["damping"]["trials"]
    assert len(trials) == len({(t["input"], t["output"]) for t in trials}) == len(DAMPINGS)
    best = min(trials, key=lambda trial: trial["change"])
    chosen = {"input": report["damping"]["input"], "output": report["damping"]["output"]}
    assert chosen == {"input": best["input"], "output": best["output"]}
    again = rankfold.lossless(
        model, data, size=0.5, damping=best["input"], output_damping=best["output"]
    )
    assert again.report["loss"] == report["loss"]
    assert again.report["damping"]["trials"] == []


def test_damping_auto_of_an_objective_without_grams_tries_nothing() -> None:
    report = rankfold.lossless(
        trained_cnn(), image_data(40), size=0.5, objective="svd", damping="auto"
    ).report
    assert report["damping"] == {"input": 0.1, "output": 0.1, "trials": []}


def test_an_output_damping_beside_auto_is_refused() -> None:
    with pytest.raises(InputError, match="leave output_damping out"):
        Settings(damping="auto", output_damping=0.3)


@pytest.mark.parametrize(
    ("calibration", "selection", "name", "count"),
    [(40, 10, "selection", 10), (40, 30, "selection", 10), (40, 9, "calibration", 10)],
)
def test_shares_are_measured_on_examples_that_the_grams_have_not_seen(
    calibration: int,
    selection: int,
    name: str,
    count: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[str, int]] = []

    def watched(before: nn.Module, after: nn.Module, task: Any, part: Any, *rest: Any, **more: Any):
        seen.append((part.name, len(part.examples)))
        return measured_shares(before, after, task, part, *rest, **more)

    monkeypatch.setattr(interactions, "measured_shares", watched)
    data = Data(*(images(n, seed) for seed, n in enumerate((calibration, selection, 20))))
    rankfold.lossless(trained_cnn(), data, size=0.6)
    assert set(seen) == {(name, count)}


def test_the_report_states_what_the_grams_of_each_layer_lack() -> None:
    found, without = (
        rankfold.lossless(trained_cnn(), image_data(40), size=0.8, shrinkage=shrinkage).report
        for shrinkage in (True, False)
    )
    assert max(entry["grams_lack"]["input"] for entry in found["layers"]) > 0
    assert all(entry["grams_lack"] == {"input": 0, "output": 0} for entry in without["layers"])


def test_the_report_states_the_harmless_range_of_each_layer() -> None:
    prepared = rankfold.prepare(trained_cnn(), image_data(100))
    result = prepared.lossless(0.6)
    for entry in result.report["layers"]:
        found = entry["harmless_range"]
        assert found["radius"] >= 0
        assert 0 <= found["lossless_rank"] <= entry["full_rank"]
    without = first_round(trained_cnn(), image_data(100), objective="kronecker")
    with pytest.raises(ValueError, match="gradient step"):
        without.harmless_range(next(iter(without.study.subject.layers)))


def test_text_that_the_model_writes_is_added_to_the_calibration_text() -> None:
    model = tiny_llama()
    before, random = state(model), torch.random.get_rng_state()
    result = rankfold.lossless(model, token_data(), size=0.8, self_share=0.5)
    counts = {name: entry["examples"] for name, entry in result.report["data"].items()}
    assert (counts["calibration"], counts["own_text"]) == (12, 12)
    assert same_state(model, before)
    assert torch.equal(torch.random.get_rng_state(), random)
    again = rankfold.lossless(model, token_data(), size=0.8, self_share=0.5)
    assert same_state(again.model, state(result.model))


def test_a_text_that_ends_is_followed_by_the_next_one() -> None:
    model = tiny_llama()
    # Texts of three tokens on the mean: what generate() fills them up with would be all there is.
    model.generation_config.eos_token_id = list(range(1, VOCABULARY, 3))
    windows = own_text(model, 6, 40, seed=0)
    assert [len(window) for window in windows] == [40] * 6
    assert sum(int((window == 0).sum()) for window in windows) < 40
    assert len({int(window[0]) for window in windows}) > 2
    assert all(map(torch.equal, windows, own_text(model, 6, 40, seed=0)))


def test_own_text_of_a_model_that_writes_none_is_refused() -> None:
    with pytest.raises(InputError, match="self_share"):
        rankfold.lossless(trained_cnn(), image_data(40), size=0.8, self_share=0.5)


# Seeds


@pytest.mark.processors
def test_the_same_seed_gives_the_same_ranks_and_the_same_bytes(tmp_path: Path) -> None:
    folders = []
    for name in "ab":
        torch.manual_seed(hash(name))  # torch's own random state plays no part
        result = rankfold.lossless(
            trained_cnn(), images(300, seed=40), size=0.6, seed=3, curvature="sampled"
        )
        folders.append(result.save(tmp_path / name))
    for file in ("model.safetensors", "rankfold.json"):
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()


def test_another_seed_splits_otherwise() -> None:
    digests = {
        rankfold.lossless(
            trained_cnn(), images(60, seed=40), size=0.6, seed=seed
        ).certificate.data_digest
        for seed in (0, 1)
    }
    assert len(digests) == 2


# compact


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_compact_stays_within_the_margin_and_is_smaller(objective: str) -> None:
    model = trained_cnn()
    before = state(model)
    result = rankfold.compact(model, image_data(200), margin=0.2, objective=objective)
    assert result.found
    assert result.certificate.upper_bound <= 0.2
    assert model_parameters(result.model) < model_parameters(model)
    assert same_state(model, before)


def test_a_larger_margin_gives_a_smaller_model() -> None:
    prepared = rankfold.prepare(trained_cnn(), image_data(200))
    assert prepared.compact(margin=0.3).ratio < prepared.compact(margin=0.03).ratio


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_margin_that_every_model_meets_gives_a_result(objective: str) -> None:
    result = rankfold.compact(trained_cnn(), image_data(120), margin=1.0, objective=objective)
    assert result.found
    assert result.ratio < 0.6


def worse_when_changed(harm: float) -> Any:
    """A loss that adds ``harm`` for any model that computes something else than ``mlp()``."""
    original = mlp()

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        values, labels = batch
        outputs = model(values)
        losses = nn.functional.cross_entropy(outputs, labels, reduction="none")
        return losses if torch.equal(outputs, original(values)) else losses + harm

    return loss


def test_a_margin_that_no_model_meets_gives_no_certificate() -> None:
    result = rankfold.compact(
        mlp(), pair_data(), margin=0.01, loss=worse_when_changed(5.0), objective="svd"
    )
    assert result.certificate.verdict == "worse"
    assert not result.certificate.holds
    assert not result.found


def test_a_search_among_models_whose_loss_is_not_finite_ends() -> None:
    loss = worse_when_changed(math.inf)
    with pytest.raises(InputError, match="the loss of held-out example 0 is inf"):
        rankfold.compact(mlp(), pair_data(), margin=0.1, loss=loss, objective="svd")


def test_a_plan_whose_loss_is_not_finite_is_measured_once() -> None:
    prepared = first_round(mlp(), pair_data(), loss=worse_when_changed(math.inf))
    assert len(of_size(prepared, 0.8 * prepared.factorizable)) == 1


def test_a_search_measures_no_plan_again_whose_loss_is_not_finite() -> None:
    prepared = first_round(mlp(), pair_data(), loss=worse_when_changed(math.inf))
    plans = [candidate.plan for candidate in within_margin(prepared, 0.1)]
    assert len(plans) > 1
    assert all(plan not in plans[:place] for place, plan in enumerate(plans))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", [trained_cnn, tiny_llama])
def test_what_is_measured_computes_what_is_built(model: Any, dtype: torch.dtype) -> None:
    """Also what the forms of convs, blocks and embeddings compute."""
    language = model is tiny_llama
    data = token_data()
    if not language:
        data = Data(*([(x.to(dtype), y) for x, y in images(40, seed)] for seed in (11, 12, 13)))
    prepared = first_round(model().to(dtype), data, embeddings=language)
    plan = prepared.plan(0.6 * prepared.factorizable)
    inputs = torch.stack(token_windows(2)) if language else images(4, 0).tensors[0].to(dtype)
    with torch.no_grad():
        looked, built = (m(inputs) for m in (look_at(prepared, plan), build(prepared, plan)))
    if language:
        looked, built = looked.logits, built.logits
    if dtype == torch.bfloat16:
        assert torch.equal(looked, built)
    else:
        torch.testing.assert_close(looked, built, rtol=1e-4, atol=1e-4)
    assert language or {choice.form for choice in plan.values()} - {None, "pivoted"}


def test_one_preparation_serves_both_algorithms_and_several_sizes() -> None:
    prepared = rankfold.prepare(trained_cnn(), image_data(40))
    assert prepared.lossless(0.8).ratio > prepared.lossless(0.4).ratio
    again = rankfold.lossless(trained_cnn(), image_data(40), size=0.4)
    assert ranks(prepared.lossless(0.4)) == ranks(again)
    assert same_state(prepared.lossless(0.4).model, state(again.model))


def test_in_form_equals_a_preparation_in_that_form() -> None:
    pair = rankfold.prepare(trained_cnn(), image_data(40), form="pair")
    pivoted = rankfold.prepare(trained_cnn(), image_data(40), form="pivoted")
    other = Preparation(with_storage(pair._round, "pivoted"), pair._held_out, pair._run)
    assert ranks(other.lossless(0.5)) == ranks(pivoted.lossless(0.5))
    budget = 0.5 * pair._round.factorizable
    assert pair._round.plan(budget) != pivoted._round.plan(budget)


# Errors


@pytest.mark.parametrize("size", [0, -0.5, 1.5, math.nan, math.inf])
def test_a_size_outside_0_to_1_is_refused(size: float) -> None:
    with pytest.raises(InputError, match=f"the size is {size}"):
        rankfold.lossless(mlp(), pair_data(), size=size)


@pytest.mark.parametrize("margin", [-0.01, math.nan, math.inf])
def test_a_margin_below_0_is_refused(margin: float) -> None:
    with pytest.raises(InputError, match="the margin is"):
        rankfold.compact(mlp(), pair_data(), margin=margin)
    with pytest.raises(InputError, match="the margin is"):
        rankfold.lossless(mlp(), pair_data(), size=0.9, margin=margin)


def test_a_size_that_no_plan_reaches_is_refused_with_the_least_one() -> None:
    with pytest.raises(InputError, match="too small: even at rank 1 everywhere 0"):
        rankfold.lossless(trained_cnn(), image_data(40), size=0.02)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("objective", "magic"),
        ("form", "cp"),
        ("cost", "bytes"),
        ("curvature", "exact"),
        ("damping", -1.0),
        ("damping", math.nan),
        ("damping", "some"),
        ("output_damping", -1.0),
        ("output_damping", math.inf),
        ("confidence", 0.5),
        ("confidence", 1.0),
        ("limit", 3),
        ("selection_limit", 0),
        ("held_out_limit", -1),
        ("batch_size", 0),
        ("rounds", 0),
        ("step_groups", 0),
        ("self_share", 0.95),
        ("step_estimator", "exact"),
        ("test", "z"),
        ("largest_change", 0.0),
        ("largest_change", math.inf),
    ],
)
def test_settings_outside_their_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{name} is '?{value}"):
        Settings(**{name: value})


def test_size_of_an_unknown_thing_is_refused() -> None:
    with pytest.raises(InputError, match="size_of is 'bytes'; expected one of model, factor"):
        rankfold.lossless(mlp(), pair_data(), size=0.9, size_of="bytes")


def test_nan_weights_are_refused_by_name() -> None:
    model = mlp()
    with torch.no_grad():
        model.second.weight[1, 2] = math.nan
    with pytest.raises(InputError, match=r"second.weight holds NaN"):
        rankfold.lossless(model, pair_data(), size=0.9)


def test_a_model_without_a_layer_to_factorize_is_refused() -> None:
    with pytest.raises(InputError, match="no layer to factorize"):
        rankfold.lossless(nn.Sequential(nn.ReLU()), pair_data(), size=0.9)


def test_a_model_none_of_whose_layers_is_called_is_refused() -> None:
    class Idle(SmallMLP):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return values[:, :5]

    said = r"none of the 3 weighted .*: not called in a forward pass on the calibration data \(3\)"
    with pytest.raises(InputError, match=said):
        rankfold.lossless(Idle(), pair_data(), size=0.9)


def test_parts_that_overlap_are_refused() -> None:
    data = Data(pairs(10, 1), [*pairs(10, 2), pairs(10, 1)[4]], pairs(10, 3))
    with pytest.raises(InputError, match=r"calibration and selection parts share 1 .* 4 = 10"):
        rankfold.lossless(mlp(), data, size=0.9)


def test_an_unknown_setting_is_an_error_of_the_call() -> None:
    with pytest.raises(TypeError, match="rank"):
        rankfold.lossless(mlp(), pair_data(), size=0.9, rank=3)


def test_labels_of_another_model_are_refused() -> None:
    data = Data(*([(x, 7) for x, _ in pairs(10, seed)] for seed in (1, 2, 3)))
    with pytest.raises(InputError, match="label 7 is outside the model's 5 logits"):
        rankfold.lossless(mlp(), data, size=0.9)


def test_limits_choose_that_many_examples_of_each_part() -> None:
    result = rankfold.lossless(
        mlp(), pair_data(), size=0.9, limit=5, selection_limit=6, held_out_limit=7
    )
    counts = [part["examples"] for part in result.report["data"].values()]
    assert counts == [5, 6, 7]
    assert result.certificate.examples == 7


def test_an_interrupt_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained_cnn().train()
    before, before_flags = state(model), flags(model)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(round_module, "layer_spectrum", interrupt)
    with pytest.raises(KeyboardInterrupt):
        rankfold.lossless(model, image_data(40), size=0.7)
    assert same_state(model, before)
    assert flags(model) == before_flags


def test_examples_that_are_too_few_to_split_are_refused() -> None:
    with pytest.raises(InputError, match="too few"):
        rankfold.lossless(tiny_llama(), token_windows(9), size=0.9)


def test_a_model_with_an_unused_width_works_in_float64() -> None:
    model = SmallCNN(width=4).double().eval()
    result = rankfold.lossless(model, image_data(20), size=0.8)
    assert {p.dtype for p in result.model.parameters()} == {torch.float64}


def test_agreement_has_no_gradient_to_learn_from() -> None:
    inputs = [x for x, _ in pairs(80)]
    for settings in ({"curvature": "empirical"}, {"objective": "first-order"}):
        with pytest.raises(InputError, match="gradient, which is 0 for the task teacher"):
            rankfold.lossless(mlp(), inputs, size=0.9, task="teacher", **settings)
    for task in ("teacher", "embedding"):
        result = rankfold.lossless(mlp(), inputs, size=0.9, task=task)
        report = result.report
        assert report["agreement"] and report["step"] is None and report["curvature"] == "sampled"
        assert report["loss"]["original"] == 0 < report["loss"]["factorized"]
        assert report["loss"]["control"] is None
        assert result.certificate.unit == report["loss"]["unit"]
        assert "from the original" in result.certificate.unit


def test_agreement_is_verified_against_the_original(tmp_path: Path) -> None:
    inputs = [x for x, _ in pairs(80)]
    result = rankfold.lossless(mlp(), inputs, size=0.9, task="teacher")
    result.save(tmp_path / "out")
    model = rankfold.load(tmp_path / "out", SmallMLP())
    found = rankfold.verify(tmp_path / "out", model, inputs, original=mlp())
    assert found.holds and {check.outcome for check in found.checks} <= {"agrees", "not checked"}
    with pytest.raises(InputError, match="it is given as the original"):
        rankfold.verify(tmp_path / "out", model, inputs)


def test_the_quadratic_model_predicts_the_distance_from_the_original() -> None:
    """With no labels the loss has no gradient: the prediction is all that there is."""
    inputs = [x for x, _ in pairs(600)]
    prepared = first_round(mlp(), inputs, task="teacher", damping=0.001)
    candidate = measure(prepared, prepared.plan(0.85 * prepared.factorizable))
    assert candidate.predicted is not None and candidate.predicted > 0
    assert 0.7 < candidate.change.mean / candidate.predicted < 1.4


# Certificate: metrics, groups, openings


def confidence_metric(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The probability of the label."""
    values, labels = batch
    return model(values).softmax(-1).gather(1, labels[:, None])[:, 0]


def test_a_users_metric_is_certified_beside_the_loss_and_verified(tmp_path: Path) -> None:
    data = image_data(200)
    metric = rankfold.Metric("chance of the label", confidence_metric, margin=0.2)
    result = rankfold.lossless(trained_cnn(), data, size=0.8, margin=0.5, metrics=[metric])
    accuracy, own = result.certificate.metrics
    assert (accuracy.name, accuracy.margin) == ("accuracy", None)
    values, labels = data.held_out.tensors
    with torch.no_grad():
        before, after = (
            float(confidence_metric(m, (values, labels)).mean())
            for m in (trained_cnn(), result.model)
        )
    assert own.lost == pytest.approx(before - after, abs=1e-6)
    assert own.verdict == "lossless" and result.certificate.holds
    result.save(tmp_path / "out")
    model = rankfold.load(tmp_path / "out", SmallCNN())
    found = rankfold.verify(
        tmp_path / "out", model, data.held_out, original=trained_cnn(), metrics=[metric]
    )
    assert found.holds and {check.outcome for check in found.checks} <= {"agrees", "not checked"}
    without = rankfold.verify(tmp_path / "out", model, data.held_out)
    assert "not checked" in {c.outcome for c in without.checks if "chance" in c.what}
    strict = rankfold.Metric("chance of the label", confidence_metric, margin=0.0)
    strictly = rankfold.lossless(trained_cnn(), data, size=0.8, margin=0.5, metrics=[strict])
    assert strictly.certificate.verdict == "not shown"


def test_bad_metrics_are_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def worked(*_: object, **__: object) -> None:
        raise AssertionError("statistics were collected")

    monkeypatch.setattr(study, "collect_statistics", worked)

    def run(function: Any, name: str = "m", margin: float | None = 0.5, count: int = 40) -> None:
        metric = rankfold.Metric(name, function, margin)
        rankfold.lossless(mlp(), pair_data(count), size=0.9, metrics=[metric])

    with pytest.raises(InputError, match=r"the metric m is 3.0 for example 0 of the original"):
        run(lambda model, batch: torch.full((len(batch[1]),), 3.0))
    with pytest.raises(InputError, match=r"the metric m is nan for example 0"):
        run(lambda model, batch: torch.full((len(batch[1]),), math.nan))
    with pytest.raises(InputError, match=r"the metric m returned \(\); expected a 1-D tensor"):
        run(lambda model, batch: torch.tensor(0.5))
    with pytest.raises(InputError, match="expected different names, none of them accuracy"):
        run(confidence_metric, name="accuracy")
    with pytest.raises(InputError, match=r"the margin of m is 1.5"):
        run(confidence_metric, margin=1.5)
    with pytest.raises(InputError, match=r"20 independent examples: too few .* needs 59 examples"):
        run(confidence_metric, margin=0.05, count=20)


def test_an_accuracy_margin_needs_a_task_with_accuracy() -> None:
    def own(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    with pytest.raises(InputError, match="the task custom has no accuracy"):
        rankfold.lossless(mlp(), pair_data(40), size=0.9, loss=own, accuracy_margin=0.5)


def test_groups_are_the_units_of_the_certificate(tmp_path: Path) -> None:
    parts = (images(60, 11), images(60, 12), images(60, 13))
    groups = [f"document {i // 6}" for i in range(60)]
    result = rankfold.lossless(trained_cnn(), Data(*parts, groups=groups), size=0.8)
    assert (result.certificate.units, result.certificate.examples) == (10, 60)
    result.save(tmp_path / "out")
    model = rankfold.load(tmp_path / "out", SmallCNN())
    assert rankfold.verify(tmp_path / "out", model, parts[2], original=trained_cnn()).holds
    some = rankfold.lossless(
        trained_cnn(), Data(*parts, groups=groups), size=0.8, held_out_limit=30
    )
    assert some.certificate.examples == 30 and some.certificate.units <= 10
    with pytest.raises(InputError, match="come in groups; use the test bounded"):
        rankfold.lossless(trained_cnn(), Data(*parts, groups=groups), size=0.8, test="betting")
    with pytest.raises(InputError, match="form one group; a bound needs 2"):
        rankfold.lossless(trained_cnn(), Data(*parts, groups=["a"] * 60), size=0.8)
    with pytest.raises(InputError, match="59 groups for 60 held-out examples"):
        Data(*parts, groups=groups[1:])


def test_a_second_model_on_the_same_held_out_part_is_recorded() -> None:
    prepared = rankfold.prepare(trained_cnn(), image_data(40))
    first = prepared.lossless(0.8).document["data"]["history"]
    again = prepared.lossless(0.8).document["data"]["history"]
    second = prepared.lossless(0.5).document["data"]["history"]
    assert (first["others"], again["others"], second["others"]) == (0, 0, 1)
    assert second["shared"] == 40


def test_near_copies_of_held_out_images_are_listed() -> None:
    data = image_data(40)
    smooth = torch.nn.functional.interpolate(torch.randn(1, 3, 2, 2), size=8, mode="bilinear")[0]
    held_out = [*data.held_out, (smooth, torch.tensor(1))]
    calibration = [*data.calibration, (smooth + 0.01, torch.tensor(1))]
    result = rankfold.lossless(trained_cnn(), Data(calibration, data.selection, held_out), size=0.8)
    (pair,) = result.document["data"]["look_alikes"]
    assert pair == {"part": "calibration", "example": 40, "held_out": 40}


@pytest.mark.parametrize("form", ["pivoted", "pair"])
def test_no_form_of_a_conv_takes_longer_than_the_dense_one(form: Storage) -> None:
    prepared = first_round(trained_cnn(), image_data(120), form=form)
    spatial = 0
    for name, curve in prepared.curves.items():
        for choice in curve.choices():
            if choice.form not in CONV_FORMS:
                continue
            spatial += 1
            listed = layer_entry(prepared, name, choice)
            assert listed["factorized_flops"] <= listed["flops"]
    assert spatial


# Block forms


class LongMLP(nn.Module):
    """A Linear of many outputs, one of many inputs, and three logits."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(6, 48)
        self.narrow = nn.Linear(48, 6)
        self.head = nn.Linear(6, 10)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.narrow(torch.tanh(self.wide(values)))))


def long_mlp() -> LongMLP:
    return seeded(5, LongMLP)


def test_long_linears_become_blocks_and_survive_saving(tmp_path: Path) -> None:
    model, data = long_mlp(), pair_data(60)
    before = state(model)
    used = set()
    for size in (0.95, 0.8, 0.6):
        result = rankfold.lossless(model, data, size=size)
        assert result.ratio <= size
        folder = result.save(tmp_path / str(size))
        loaded = rankfold.load(folder, LongMLP())
        values = torch.randn(5, 6)
        assert torch.equal(loaded(values), result.model(values))
        for entry in result.report["layers"]:
            if entry["form"] not in BLOCK_FORMS:
                continue
            used.add((entry["name"], entry["form"]))
            module = loaded.get_submodule(entry["name"])
            assert module.ranks == (entry["rank"], entry["second_rank"])
            count = sum(p.numel() for n, p in module.named_parameters() if n != "bias")
            assert entry["factorized_parameters"] == count
            assert entry["factorized_flops"] == 2 * count
    assert used == {("wide", "row-blocks"), ("narrow", "column-blocks")}
    assert same_state(model, before)


class PointwiseNet(nn.Module):
    """A conv, then a 1x1 conv that widens and one that narrows again, as in mobile nets."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.wide = nn.Conv2d(6, 48, 1)
        self.narrow = nn.Conv2d(48, 6, 1, stride=2, bias=False)
        self.head = nn.Linear(6, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.narrow(torch.tanh(self.wide(torch.tanh(self.stem(images))))))
        return self.head(hidden.view(len(hidden), 6, -1).mean(2))


def test_long_pointwise_convs_become_blocks_and_survive_saving(tmp_path: Path) -> None:
    model, data = seeded(7, PointwiseNet), image_data(60)
    used = set()
    for size in (0.8, 0.6):
        result = rankfold.lossless(model, data, size=size)
        assert result.ratio <= size
        folder = result.save(tmp_path / str(size))
        loaded = rankfold.load(folder, PointwiseNet())
        pictures = torch.stack([image for image, _ in images(3, 4)])
        assert torch.equal(loaded(pictures), result.model(pictures))
        rankfold.export(folder, tmp_path / f"{size}-pairs", to="pairs", model=PointwiseNet())
        dense = rankfold.export(folder, tmp_path / f"{size}-d", to="dense", model=PointwiseNet())
        again = PointwiseNet()
        again.load_state_dict(load_file(dense.folder / "model.safetensors"))
        torch.testing.assert_close(again(pictures), loaded(pictures))
        for entry in result.report["layers"]:
            if entry["form"] in BLOCK_FORMS:
                used.add((entry["name"], entry["form"]))
                module = loaded.get_submodule(entry["name"])
                count = sum(p.numel() for p in module.parameters())
                if module.bias is not None:
                    count -= module.bias.numel()
                assert entry["factorized_parameters"] == count
    assert used == {("wide", "row-blocks"), ("narrow", "column-blocks")}


def test_block_forms_can_be_left_out_and_pairs_have_none() -> None:
    model, data = long_mlp(), pair_data(60)
    for options in ({"block_forms": False}, {"form": "pair"}, {"objective": "activation"}):
        result = rankfold.lossless(model, data, size=0.8, **options)
        assert not {entry["form"] for entry in result.report["layers"]} & {*BLOCK_FORMS}


def test_blocks_come_back_when_pairs_are_pivoted_again() -> None:
    prepared = first_round(long_mlp(), pair_data(60))
    again = with_storage(with_storage(prepared, "pair"), "pivoted")
    assert not {c.form for c in with_storage(prepared, "pair").curves["wide"].choices()} & {
        *BLOCK_FORMS
    }
    assert again.curves["wide"].choices() == prepared.curves["wide"].choices()


def test_a_choice_in_blocks_has_the_weight_of_its_module() -> None:
    prepared = first_round(long_mlp(), pair_data(60))
    for name in ("wide", "narrow"):
        blocks = [c for c in prepared.curves[name].choices() if c.form in BLOCK_FORMS]
        for choice in blocks:
            module = layer_module(prepared, name, choice)
            torch.testing.assert_close(layer_weight(prepared, name, choice), module.dense_matrix())
            assert choice.cost == sum(
                p.numel() for n, p in module.named_parameters() if n != "bias"
            )
        assert blocks


def test_factors_of_a_choice_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan is measured, corrected on and built: each time its conv would be factorized anew."""
    found: list[tuple[str, bool]] = []

    def counted(*arguments: Any, pivot: bool) -> object:
        found.append((arguments[3], pivot))
        return conv_factors(*arguments, pivot=pivot)

    monkeypatch.setattr(conv_form, "conv_factors", counted)
    prepared = first_round(trained_cnn(), image_data())
    name = "features.3"
    choice, other = [c for c in prepared.curves[name].choices() if c.form == "tucker"][:2]
    weight = layer_weight(prepared, name, choice)
    module = layer_module(prepared, name, choice)
    assert torch.equal(weight, layer_weight(prepared, name, choice))
    torch.testing.assert_close(module.to_dense().weight.flatten(1), weight)
    assert found == [("tucker", True)]
    assert not torch.equal(weight, layer_weight(prepared, name, other))
    layer_module(with_storage(prepared, "pair"), name, other)
    assert found == [("tucker", True)] * 2 + [("tucker", False)]


def test_a_later_round_cuts_layers_where_the_first_one_did() -> None:
    options = {"rounds": 2, "gradient_step": False, "curvature": "empirical"}
    prepared = first_round(long_mlp(), pair_data(60), **options)
    following = next_round(prepared, 0.5 * prepared.factorizable, rounds_left=2)
    cut = [name for name, choice in following.start.items() if choice.form in BLOCK_FORMS]
    assert cut
    for name in cut:
        (offer,), (before,) = following.offers[name], prepared.offers[name]
        assert torch.equal(offer.state.order, before.state.order)
        # What the round before cut to these ranks costs nothing at them.
        choice = following.start[name]
        whole = offer.curve
        same = (whole.costs == choice.cost).nonzero().flatten()
        assert any(float(whole.changes[place]) == 0 for place in same) or (
            float(whole.changes[whole.costs <= choice.cost].min()) == 0
        )
