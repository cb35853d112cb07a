"""The field's methods against their papers' formulas, on one layer in float64, and end to end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import field
from benchmarks.documents import filled
from benchmarks.field import Row, Runner, layer_shares, without_attention
from benchmarks.field_report import (
    certified_table,
    draw,
    draw_ranks,
    forward_table,
    losses_table,
    quality_table,
    shares_table,
    smallest_table,
)
from benchmarks.methods import METHODS
from benchmarks.methods.fisher import Fisher, positive_definite
from benchmarks.methods.gradients import (
    Gradients,
    clip_norms,
    clipped_output_grams,
    mean_gradients,
    weight_gradients,
)
from benchmarks.methods.int8 import round_rows, rounded
from benchmarks.methods.kfac_svd import break_even_rank, scaled_energies
from benchmarks.methods.low_rank import build, energy_curves, within_ratios
from benchmarks.methods.method import Method, Study
from benchmarks.methods.plain_svd import mean_absolute_inputs, row_weights
from benchmarks.methods.pruning import largest
from benchmarks.methods.sensitivity import Sensitivity
from benchmarks.methods.svd_llm import (
    fitted_left,
    kept_shares,
    output_spectrum,
    relative_energies,
    whitened,
)
from benchmarks.methods.zero_sum import projection, score_changes, zero_sum_ranks
from benchmarks.observed import observe
from benchmarks.results_report import results_table
from benchmarks.rows import read_rows
from benchmarks.speed import SpeedRow, forward_bytes, interleaved, measure_speed
from rankfold.data.parts import Data
from rankfold.errors import InputError
from rankfold.files.tensors import model_sizes
from rankfold.forms.curve import Curve
from rankfold.forms.factors import truncate
from rankfold.machine.progress import SilentProgress
from rankfold.maths.spectrum import whitened_spectrum
from rankfold.search.allocate import best_within_cost, total_cost, uniform_within_cost
from rankfold.settings import Settings
from rankfold.statistics.labels import noise_directions
from rankfold.statistics.passes import halves


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize(("out", "in_"), [(5, 8), (8, 5)])
def test_svd_llm_loses_what_the_best_rank_k_outputs_lose(out: int, in_: int) -> None:
    weight, inputs = random(out, in_), random(in_, 40, seed=1)
    spectrum = whitened_spectrum(weight, inputs @ inputs.T)
    outputs = torch.linalg.svdvals(weight @ inputs)
    for rank in range(1, 5):
        lost = ((weight - spectrum.truncated(rank)) @ inputs).square().sum()
        torch.testing.assert_close(lost, outputs[rank:].square().sum())


@pytest.mark.parametrize(("out", "in_"), [(5, 8), (8, 5)])
def test_swift_svd_finds_the_same_product(out: int, in_: int) -> None:
    weight, inputs = random(out, in_), random(in_, 40, seed=1)
    gram = inputs @ inputs.T
    whitened_one, swift = whitened_spectrum(weight, gram), output_spectrum(weight, gram)
    for rank in range(1, 6):
        torch.testing.assert_close(swift.truncated(rank), whitened_one.truncated(rank))
    torch.testing.assert_close(swift.singular_values, whitened_one.singular_values)


def test_updated_left_factor_is_the_least_squares_solution() -> None:
    weight, inputs, right = random(5, 8), random(8, 40, seed=1), random(3, 8, seed=2)
    left = fitted_left(weight, right, inputs @ inputs.T)
    expected = torch.linalg.lstsq((right @ inputs).T, (weight @ inputs).T).solution.T
    torch.testing.assert_close(left, expected)


def test_update_on_the_same_inputs_changes_nothing() -> None:
    weight, inputs = random(5, 8), random(8, 40, seed=1)
    spectrum = whitened_spectrum(weight, inputs @ inputs.T)
    left = fitted_left(weight, spectrum.right[:3], inputs @ inputs.T)
    torch.testing.assert_close(left @ spectrum.right[:3], spectrum.truncated(3))


def test_pifa_stores_the_same_product_in_fewer_parameters() -> None:
    weight, inputs = random(7, 9), random(9, 40, seed=1)
    spectrum = whitened_spectrum(weight, inputs @ inputs.T)
    for rank in range(1, 7):
        factors = truncate(spectrum, rank, "pivoted")
        torch.testing.assert_close(factors.product(), spectrum.truncated(rank))
        assert factors.left.numel() + factors.right.numel() == rank * (7 + 9 - rank)


def test_kronecker_factors_are_the_top_singular_pair_of_the_permuted_fisher() -> None:
    samples = random(30, 3, 4)
    u, v = Fisher(samples).kronecker()
    permuted = torch.einsum("kij,klm->iljm", samples, samples).reshape(9, 16) / len(samples)
    left, values, right = torch.linalg.svd(permuted)
    rank_one = values[0] * torch.outer(left[:, 0], right[0])
    torch.testing.assert_close(
        torch.outer(u.flatten(), v.flatten()), rank_one, rtol=1e-4, atol=1e-4
    )
    assert torch.linalg.eigvalsh(u).min() > 0
    assert torch.linalg.eigvalsh(v).min() > 0


def test_singular_fisher_factor_is_shrunk_until_it_is_positive_definite() -> None:
    factor = torch.diag(torch.tensor([2.0, 0.0], dtype=torch.float64))
    expected = torch.diag(torch.tensor([1.9, 0.1], dtype=torch.float64))
    torch.testing.assert_close(positive_definite(factor), expected)
    with pytest.raises(ValueError, match="not finite, or 0"):
        positive_definite(torch.zeros(2, 2, dtype=torch.float64))


def test_fwsvd_weights_rows_by_their_summed_fisher() -> None:
    samples = random(30, 3, 4)
    expected = torch.stack(
        [torch.stack([g[i].square().sum() for g in samples]).mean() for i in range(3)]
    )
    torch.testing.assert_close(row_weights(Fisher(samples)), torch.diag(expected))


def test_norms_are_clipped_to_the_mean_of_their_example() -> None:
    gradients = torch.zeros(1, 4, 2)
    gradients[0, :, 0] = torch.tensor([1000.0, 1.0, 0.0, 2.0])
    norms = clip_norms(gradients)[0].norm(dim=1)
    mean = 1003 / 3  # of the three that are not 0
    torch.testing.assert_close(norms, torch.tensor([1000.0, 0.1 * mean, 0.0, 0.1 * mean]))
    torch.testing.assert_close(
        clip_norms(gradients, highest=2.0)[0, 0].norm(), torch.tensor(2 * mean)
    )


def test_lems_energies_are_scaled_to_the_reference_rank() -> None:
    spectrum = whitened_spectrum(random(6, 8))
    energies = scaled_energies(spectrum, 2)
    cut = spectrum.singular_values.square()
    for rank in range(1, 7):
        torch.testing.assert_close(energies[rank - 1], cut[rank:].sum() / cut[2:].sum())
    assert break_even_rank(6, 8) == 3


def test_integer_program_of_lems_agrees_with_a_public_solver() -> None:
    generator = np.random.default_rng(0)
    costs = [np.sort(generator.integers(1, 90, 6)) for _ in range(5)]
    changes = [np.sort(generator.random(6))[::-1].copy() for _ in range(5)]
    curves = {
        str(place): Curve(torch.arange(1, 7), torch.from_numpy(c), torch.from_numpy(e), 100)
        for place, (c, e) in enumerate(zip(costs, changes, strict=True))
    }
    ours = best_within_cost(curves, 230)
    weights = np.concatenate([np.append(c, 100) for c in costs])
    harm = np.concatenate([np.append(e, 0.0) for e in changes])
    once = np.kron(np.eye(5), np.ones(7))
    found = optimize.milp(
        harm,
        constraints=[
            optimize.LinearConstraint(weights[None], ub=230),
            optimize.LinearConstraint(once, 1, 1),
        ],
        integrality=np.ones(35),
        bounds=optimize.Bounds(0, 1),
    )
    assert ours.change == pytest.approx(found.fun)


def test_score_is_the_first_order_change_of_leaving_a_component_out() -> None:
    weight, gradient, inputs = random(5, 8), random(5, 8, seed=1), random(8, 40, seed=2)
    spectrum = whitened_spectrum(weight, inputs @ inputs.T)
    changes = score_changes(spectrum, gradient)
    for i in range(5):
        without = weight - torch.outer(spectrum.left[:, i], spectrum.right[i])
        torch.testing.assert_close(changes[i], (gradient * (without - weight)).sum())


def test_zero_sum_keeps_the_running_sum_near_zero() -> None:
    changes = {str(place): 0.01 * random(20, seed=place) for place in range(6)}
    shapes = dict.fromkeys(changes, (20, 30))
    budget = 0.5 * 6 * 600
    pruned = zero_sum_ranks(changes, shapes, budget)
    most = max(float(c.abs().max()) for c in changes.values())
    assert max(map(abs, pruned.sums)) <= 2 * most
    kept = {name: 600 if rank is None else 50 * rank for name, rank in pruned.ranks.items()}
    assert sum(kept.values()) <= budget
    assert any(rank is not None for rank in pruned.ranks.values())
    assert all(rank is None or rank <= break_even_rank(20, 30) for rank in pruned.ranks.values())
    with pytest.raises(ValueError, match="rank 1 everywhere"):
        zero_sum_ranks(changes, shapes, 100)


def test_correction_leaves_nothing_along_the_gradient() -> None:
    lost, gradient = random(5, 8), random(5, 8, seed=1)
    rest = lost - projection(lost, gradient)
    assert float((rest * gradient).sum()) == pytest.approx(0, abs=1e-12)


def test_v2_removes_the_target_share_and_more_where_less_is_lost() -> None:
    kept = kept_shares({"a": 10.0, "b": 100.0, "c": 1000.0}, 0.7)
    assert sum(kept.values()) / 3 == pytest.approx(0.7)
    assert kept["a"] < kept["b"] < kept["c"]
    assert (1 - kept["a"]) / (1 - kept["c"]) == pytest.approx(3)  # log 1000 / log 10
    assert kept_shares({"a": 0.5, "b": 100.0}, 0.7) == {"a": 0.7, "b": 0.7}


def test_balf_energies_are_shares() -> None:
    spectrum = whitened_spectrum(random(6, 8))
    energies = relative_energies(spectrum)
    total = spectrum.singular_values.square().sum()
    torch.testing.assert_close(energies[2], spectrum.singular_values[3:].square().sum() / total)
    assert float(energies[-1]) == 0


def test_rounding_to_int8_has_255_levels_a_row() -> None:
    weight = random(3, 50).float()
    found = round_rows(weight)
    steps = weight.abs().amax(1, keepdim=True) / 127
    assert bool(((found - weight).abs() <= 0.5001 * steps).all())
    levels = found / steps
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)


def test_largest_scores_of_each_row_are_kept() -> None:
    mask = largest(torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 5.0, 6.0, 7.0]]), 0.5)
    assert mask.tolist() == [[True, False, True, False], [False, False, True, True]]


class Net(nn.Module):
    """A conv, numbered blocks and a head: what the methods have to deal with."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 12, 1))
        self.head = nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x).relu()).relu()
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def small_net(seed: int, count: int) -> tuple[nn.Module, Data]:
    torch.manual_seed(seed)
    images, labels = torch.randn(count + 60, 1, 6, 6), torch.randint(0, 6, (count + 60,))
    pairs = list(zip(images, labels, strict=True))
    return Net().eval(), Data(pairs[60:], pairs[:30], pairs[30:60])


@pytest.fixture(scope="module")
def study() -> Study:
    model, data = small_net(0, 96)
    return Study(observe(model, data, Settings()), 0, SilentProgress())


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_makes_a_model_of_the_size(name: str, study: Study) -> None:
    method: Method = METHODS[name]
    before = {key: value.clone() for key, value in study.collected.model.state_dict().items()}
    assert method.fits(study)
    made = method.prepare(study)(0.6)
    sizes = model_sizes(study.collected.model)
    outside = sizes["parameters"] - study.factorizable
    if method.sized:
        assert made.parameters - outside <= 0.6 * study.factorizable
    if method.kind != "outside" and name not in ("joint-int8", "joint-pair-int8"):
        assert made.bytes == model_sizes(made.model)["bytes"]
    assert torch.isfinite(made.model(torch.randn(2, 1, 6, 6))).all()
    for key, value in study.collected.model.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(parameter.grad is None for parameter in study.collected.model.parameters())


def test_rankfold_without_a_step_has_its_own_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(field.FIELD_MODELS, "small", (small_net, 96))
    study, _ = field.open_study("small", 0, SilentProgress())
    without = study.without_step
    assert (study.collected.curvature, without.curvature) == ("empirical", "sampled")
    assert all(statistics.gradients is None for statistics in without.statistics.values())
    assert without.parts["held_out"].digest == study.collected.parts["held_out"].digest
    without.statistics.clear()
    METHODS["joint-pair"].prepare(study)(0.6)
    with pytest.raises(ValueError, match="needs statistics"):
        METHODS["kronecker-pair"].prepare(study)


def test_a_pass_that_two_methods_need_is_made_once_and_counted_for_both(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[Study] = []

    def clipped(study: Study, source: Gradients) -> dict[str, Tensor]:
        passes.append(study)
        return clipped_output_grams(study, source)

    monkeypatch.setattr("benchmarks.methods.kfac_svd.clipped_output_grams", clipped)
    fresh = replace(study, passes={})
    first, again = (METHODS["kfac-svd"].prepare(fresh)(0.6) for _ in range(2))
    assert len(passes) == 1
    assert fresh.saved_seconds > 0
    for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_blocks_are_the_numbered_modules(study: Study) -> None:
    assert study.blocks == [["stem"], ["blocks.0"], ["blocks.1"], ["head"]]


def test_mean_absolute_inputs_are_those_of_the_layer(study: Study) -> None:
    part = study.collected.parts["calibration"]
    images = torch.stack([image for image, _ in part.examples])
    patches = nn.functional.unfold(images, 3, padding=1).transpose(1, 2).flatten(0, 1)
    expected = patches.abs().double().mean(0)
    torch.testing.assert_close(mean_absolute_inputs(study)["stem"], expected)


def test_clipped_grams_without_clipping_are_rankfolds_own(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.methods.gradients.clip_norms", lambda gradients: gradients)
    found = clipped_output_grams(study, Gradients.of(study))
    terms = len(study.collected.parts["calibration"].examples)
    assert study.collected.curvature == "empirical"
    for name, statistics in study.collected.statistics.items():
        torch.testing.assert_close(
            found[name] / terms, statistics.output_gram.double(), rtol=1e-4, atol=1e-7
        )


def test_clipped_grams_have_as_many_directions_of_noise_as_rankfolds_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("benchmarks.methods.gradients.clip_norms", lambda gradients: gradients)
    model, data = small_net(0, 40)
    calibration, selection, held_out = (
        [image for image, _ in part] for part in (data.calibration, data.selection, data.held_out)
    )
    images = Data(calibration, selection, held_out)
    study = Study(observe(model, images, Settings(task="teacher")), 0, SilentProgress())
    assert noise_directions(len(calibration)) > 1
    # Both draw for one example after the other, but see the examples in another order.
    found = clipped_output_grams(study, Gradients.of(study))
    study.collected.parts["calibration"] = study.collected.parts["calibration"].take(
        [place for half in halves("teacher", len(calibration)) for place in half]
    )
    in_order = clipped_output_grams(study, Gradients.of(study))
    for name, statistics in study.collected.statistics.items():
        own = statistics.output_gram.double()
        torch.testing.assert_close(in_order[name] / len(calibration), own, rtol=1e-4, atol=1e-8)
        assert not torch.allclose(found[name] / len(calibration), own, rtol=1e-3)


def test_gradient_samples_are_the_mean_gradients_of_groups_of_examples(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.methods.gradients.FEWEST_SAMPLES", 16)
    collected = study.collected
    part = collected.parts["calibration"]
    samples = dict(weight_gradients(study))
    assert list(samples) == list(study.weights)
    count = len(samples["head"])
    group = len(part.examples) // count
    assert group > 1
    third = part.take(range(2 * group, 3 * group))
    expected = mean_gradients(collected.model, collected.task, third, list(samples))
    for name, found in samples.items():
        torch.testing.assert_close(found[2].double(), expected[name], rtol=1e-4, atol=1e-7)
        assert found.shape == (count, *study.weights[name].shape)


def test_ratios_of_one_are_the_uniform_plan(study: Study) -> None:
    curves = energy_curves(study, whitened(study), "pair")
    budget = 0.6 * study.factorizable
    same = within_ratios(curves, dict.fromkeys(curves, 1.0), budget)
    uniform = uniform_within_cost(curves, budget)
    assert {name: choice.rank for name, choice in same.items()} == {
        name: choice.rank for name, choice in uniform.items()
    }
    uneven = within_ratios(curves, dict.fromkeys(curves, 0.2) | {"head": 1.0}, budget)
    assert uneven["head"].rank is None
    assert total_cost(uneven) <= budget


def test_sensitivity_of_the_original_is_nothing(study: Study) -> None:
    sensitivity = Sensitivity.on(study, "selection")
    assert sensitivity.divergence({"head": study.weights["head"]}) == pytest.approx(0, abs=1e-7)
    halved = {"head": 0.5 * study.weights["head"]}
    assert sensitivity.divergence(halved) > 0
    assert sensitivity.loss(halved) != sensitivity.loss({})


def test_bytes_of_int8_and_of_pruned_models(study: Study) -> None:
    model = study.collected.model
    sizes = model_sizes(model)
    rows = sum(len(weight) for weight in study.weights.values())
    made = rounded(model, list(study.layers))
    assert sizes["bytes"] - made.bytes == 3 * study.factorizable - 4 * rows
    pruned = METHODS["magnitude"].prepare(study)(0.6)
    share = 1 - (sizes["bytes"] - pruned.bytes) / (4 * study.factorizable)
    assert share == pytest.approx(0.6, abs=0.01)
    zeros = sum(int((pruned.model.get_submodule(name).weight == 0).sum()) for name in study.layers)
    assert zeros == sizes["parameters"] - pruned.parameters


def test_low_rank_model_computes_the_product(study: Study) -> None:
    found = whitened(study)
    curves = energy_curves(study, found, "pivoted")
    plan = uniform_within_cost(curves, 0.6 * study.factorizable)
    made = build(study, found, plan, "pivoted")
    head = made.model.get_submodule("head")
    expected = found["head"].truncated(plan["head"].rank or 0).float()
    torch.testing.assert_close(head.dense_matrix(), expected, rtol=1e-4, atol=1e-5)


def test_shares_of_the_layers_add_up_to_the_plan(study: Study) -> None:
    curves = energy_curves(study, whitened(study), "pivoted")
    plan = uniform_within_cost(curves, 0.6 * study.factorizable)
    made = build(study, whitened(study), plan, "pivoted")
    shares = layer_shares(study, made.model)
    kept = sum(share * study.weights[name].numel() for name, share in shares.items())
    assert kept == pytest.approx(total_cost(plan))
    assert set(layer_shares(study, study.collected.model).values()) == {1.0}


def test_flops_of_attention_are_left_out() -> None:
    q, weight = torch.empty(1, 2, 8, 4, device="meta"), torch.empty(4, 4, device="meta")
    with FlopCounterMode(display=False) as counter:  # as a GPU has it
        y = torch.ops.aten._scaled_dot_product_efficient_attention(q, q, q, None, False)[0]
        y.reshape(-1, 4) @ weight
    assert without_attention(counter) == 2 * 16 * 4 * 4 < counter.get_total_flops()


def test_results_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(field.FIELD_MODELS, "small", (small_net, 96))
    file = tmp_path / "field.jsonl"
    Runner(file).run("small", 0, ["svd", "int8", "wanda"], [0.6, 0.5])
    before = file.read_text()
    rows = read_rows(file, Row)
    assert [(row.method, row.size) for row in rows] == [
        ("svd", 0.6), ("svd", 0.5), ("int8", None), ("wanda", 0.6), ("wanda", 0.5),
    ]  # fmt: skip
    for row in rows:
        assert row.change is not None and row.accuracy is not None and row.flops is not None
    assert rows[0].flops is not None and rows[0].flops < 1 == rows[3].flops
    assert [bool(row.layers) for row in rows] == [True, True, False, False, False]
    Runner(file).run("small", 0, ["svd", "int8", "wanda"], [0.6, 0.5])
    assert file.read_text() == before
    Runner(file).run("small", 0, ["svd"], [0.0001])
    last = read_rows(file, Row)[-1]
    assert last.change is None and "budget" in last.note


def made_row(method: str, size: float | None, change: float, error: float = 0.01) -> Row:
    return Row(
        model="net", seed=0, method=method, size=size, calibration=10, kept=size, parameters=size,
        bytes=size, flops=size, dense_loss=1.0, change=change, standard_error=error, seconds=1.0,
        statistics_seconds=2.0, unit="nats",
    )  # fmt: skip


ROWS = [
    made_row("svd-llm", 0.9, 0.010),
    made_row("svd-llm", 0.5, 0.300),
    made_row("joint-pivoted", 0.9, 0.012),
    made_row("joint-pivoted", 0.5, 0.100),
    made_row("wanda", 0.9, 0.001),
    made_row("wanda", 0.5, 0.200),
    made_row("int8", None, 0.0005),
]


def test_tables_say_where_others_are_better() -> None:
    lines = losses_table(ROWS).splitlines()[2:]
    assert lines[0].endswith("| +0.0020 | SVD-LLM, int8 weights, Wanda pruning |")
    assert lines[1].endswith("| -0.2000 | int8 weights |")
    table = quality_table(ROWS)
    assert "**+0.0100 ± 0.0100**" in table and "**+0.1000 ± 0.0100**" in table
    assert "| SVD-LLM | 0.9 |" in smallest_table(ROWS)


def test_shares_of_what_peers_lose_are_of_common_seeds() -> None:
    # At .9 SVD-LLM's change is as large as its error.
    assert shares_table(ROWS).splitlines()[2:] == [
        "| net | 0.9 | no loss shown |  | no loss shown |  |  |  |",
        "| net | 0.5 | **0.33** |  | 0.33 |  |  |  |",
    ]
    rows = [
        made_row("joint-pivoted", 0.5, -0.01),
        made_row("kronecker-pivoted", 0.5, 0.06),
        replace(made_row("svd-llm", 0.5, 0.9), seed=1),  # ours has no such seed
        made_row("svd-llm", 0.5, 0.3),
        made_row("asvd", 0.5, 0.1),
    ]
    (line,) = shares_table(rows).splitlines()[2:]
    assert line == "| net | 0.5 | -0.03 | -0.10 | -0.10 | 0.20 | **0.60** | **0.60** |"


def test_people_see_ours_against_the_best_peer_and_what_has_no_size() -> None:
    rows = [replace(row, model="resnet20") for row in ROWS]
    first, second = results_table(rows).replace("\u00a0", " ").splitlines()[2:]
    assert first == (
        "| ResNet-20 | 0.90 | +0.012 ± 0.010 | – | +0.010 ± 0.010, SVD-LLM | +0.001 ± 0.010 |"
    )
    assert second.startswith("| ResNet-20 | 0.50 | +0.100 ± 0.010 | – | +0.300 ± 0.010, SVD-LLM |")


def test_the_smallest_certified_size_has_only_certified_ones_above() -> None:
    def row(method: str, size: float, verdict: str, change: float = 0.0) -> Row:
        return replace(made_row(method, size, change), verdict=verdict)

    rows = [
        row("joint-pivoted", 0.9, "lossless"),
        row("joint-pivoted", 0.7, "better"),
        row("joint-pivoted", 0.5, "not shown"),
        row("svd-llm", 0.9, "not shown"),
        row("svd-llm", 0.7, "lossless"),
        row("wanda", 0.9, "lossless"),
        row("wanda", 0.7, "", change=0.2),
    ]
    table = certified_table(rows)
    assert "| rankfold joint, pivoted | 0.7 |" in table
    assert "| SVD-LLM | none |" in table
    assert "| Wanda pruning | 0.9 |" in table
    assert certified_table([*rows, row("balf", 0.9, "")]).splitlines()[0] == "| method |"
    second = replace(row("joint-pivoted", 0.7, "not shown"), seed=1)
    assert "| rankfold joint, pivoted | 0.9 |" in certified_table([*rows, second])


def test_only_what_is_marked_is_written() -> None:
    text = "before\n<!-- begin: one -->\nold\n<!-- end -->\nafter\n"
    once = filled(text, {"one": "| new |\n"})
    assert once == "before\n<!-- begin: one -->\n| new |\n<!-- end -->\nafter\n"
    assert filled(once, {"one": "| new |\n"}) == once
    with pytest.raises(ValueError, match="names no table"):
        filled(text, {"two": ""})


def test_a_figure_a_model(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (file,) = draw(ROWS, tmp_path)
    again = file.read_bytes()
    draw(ROWS, tmp_path)
    assert file.name == "field_net.svg" and file.read_bytes() == again


def test_a_map_of_what_each_layer_keeps(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert draw_ranks(ROWS, tmp_path) == []
    rows = [
        replace(made_row(method, size, 0.0), layers={"a": size, "b": 1.0})
        for method in ("svd-llm", "joint-pivoted")
        for size in (0.9, 0.7, 0.5)
    ]
    (file,) = draw_ranks([*ROWS, *rows], tmp_path)
    first = file.read_bytes()
    assert file.name == "field_ranks_net.svg"
    draw_ranks([row for row in rows if row.size != 0.9], tmp_path)
    assert file.read_bytes() != first


def test_the_peak_of_a_forward_pass_counts_weights_and_what_lives_at_once() -> None:
    model = nn.Sequential(nn.Linear(10, 100, bias=False), nn.ReLU(), nn.Linear(100, 1, bias=False))
    peak = forward_bytes(model, torch.zeros(8, 10))
    assert peak.weights == 4 * (10 * 100 + 100)
    assert peak.total == peak.weights + 4 * 8 * (100 + 100)  # both sides of the ReLU


def test_what_was_not_measured_is_no_row_of_the_forward_table() -> None:
    row = SpeedRow("net", 0, "svd-llm", 0.5, 8, 0.9, 0.8, 1.0, 1.0, 1.0, 1)
    assert "SVD-LLM" not in forward_table([row])
    measured = replace(row, memory=0.7, weights=0.5)
    assert "| net | 0.5 | SVD-LLM | 0.50 | 0.70 |" in forward_table([measured])


def test_speed_is_not_measured_of_batches_that_there_are_no_examples_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--calibration 16 is too few: batches of 32"):
        measure_speed(tmp_path / "field.jsonl", "smollm2", 0, ["svd"], [0.8], calibration=16)


def test_models_are_timed_in_turn() -> None:
    order: list[str] = []

    class Noted(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: Tensor) -> Tensor:
            order.append(self.name)
            return x

    times = interleaved([Noted("a"), Noted("b")], torch.zeros(2, 3), rounds=2)
    assert order == ["a", "b"] * 3
    assert [len(one) for one in times] == [2, 2]
