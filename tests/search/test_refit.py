"""Output factors fitted again to what other layers have changed, and passes that run in step."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import rankfold
from rankfold.data.parts import as_part
from rankfold.forms.factors import truncate
from rankfold.forms.low_rank.fit import low_rank_module
from rankfold.machine.progress import SilentProgress
from rankfold.maths.spectrum import whitened_spectrum
from rankfold.model.replace import with_replaced
from rankfold.search import plans, refit
from rankfold.search.plans import within_margin
from rankfold.search.refit import Moments, best_change, fitted_again, lasting, refitted
from rankfold.search.side_by_side import Pairs, run_in_step
from rankfold.search.trial import Trial
from rankfold.tasks.supervised import UserLoss
from tests.rounds import first_round
from tests.small_models import same_state, state
from tests.test_compress import image_data, long_mlp, pair_data, trained_cnn

NAMES = ["0", "2", "4"]


def net(seed: int = 0, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.Linear(6, 12, bias), nn.Tanh(), nn.Linear(12, 10, bias), nn.Tanh()
    return nn.Sequential(*layers, nn.Linear(10, 4, bias)).double()


def factorized(model: nn.Module, rank: int = 3, names: Sequence[str] = NAMES) -> nn.Module:
    modules = {}
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        spectrum = whitened_spectrum(layer.weight.detach(), None, None)
        modules[name] = low_rank_module(layer, truncate(spectrum, rank, "pivoted"))
    return with_replaced(model, modules)


def batches(count: int = 3) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(8, 6).double() for _ in range(count)]


def in_step(first: nn.Module, second: nn.Module, visit: Callable[..., object]) -> None:
    run_in_step(
        first,
        second,
        batches(),
        lambda m, x: m(x),
        NAMES,
        {},
        visit,
        SilentProgress(),
        "layers",  # type: ignore[arg-type]
    )


def test_all_passes_meet_at_each_layer_and_compute_what_they_compute_alone() -> None:
    first, second = net(), factorized(net())
    seen: dict[str, Pairs] = {}

    def visit(name: str, pairs: Pairs, streams: Pairs) -> None:
        seen[name] = [(a.clone(), b.clone()) for a, b in pairs]

    in_step(first, second, visit)
    assert list(seen) == NAMES
    for place, name in enumerate(NAMES):
        upto = 2 * place + 1
        for inputs, (a, b) in zip(batches(), seen[name], strict=True):
            assert torch.equal(a, first[:upto](inputs))
            assert torch.equal(b, second[:upto](inputs))  # type: ignore[index]


def test_the_second_model_goes_on_with_what_it_is_given() -> None:
    first, second = net(), factorized(net())
    seen: dict[str, Pairs] = {}

    def visit(name: str, pairs: Pairs, streams: Pairs) -> list[Tensor]:
        seen[name] = pairs
        return [a for a, _ in pairs]

    in_step(first, second, visit)
    for (a, b), (inputs, _) in zip(seen["2"], seen["0"], strict=True):
        assert torch.equal(a, first[2](torch.tanh(inputs)))
        assert torch.equal(b, second[2](torch.tanh(inputs)))  # type: ignore[index]


def test_an_error_leaves_neither_hooks_nor_flags_behind() -> None:
    first, second = net().train(), factorized(net())

    def visit(name: str, pairs: Pairs, streams: Pairs) -> None:
        if name == "2":
            raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        in_step(first, second, visit)
    for model in (first, second):
        assert all(not m._forward_hooks for m in model.modules())
        assert all(p.requires_grad for p in model.parameters())
    assert all(m.training for m in first.modules())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_of_the_model_comes_through(error: type[BaseException]) -> None:
    class Broken(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            raise error("in the middle")

    first, second = net().train(), factorized(net())
    first[3] = Broken()
    with pytest.raises(error, match="in the middle"):
        in_step(first, second, lambda name, pairs, streams: None)
    assert all(not m._forward_hooks for m in first.modules())
    assert all(m.training for m in first.modules())


def test_passes_that_call_layers_in_another_order_are_not_visited_there() -> None:
    class Either(nn.Module):
        """Experts: the sign of the first input says which layer is called."""

        def __init__(self) -> None:
            super().__init__()
            self.base = net()

        def forward(self, inputs: Tensor) -> Tensor:
            order = (0, 2, 4) if float(inputs[0, 0]) > 0 else (0, 4)
            hidden = self.base[order[0]](inputs)
            for place in order[1:]:
                hidden = hidden[:, : self.base[place].in_features]
                hidden = self.base[place](hidden)
            return hidden

    data = [torch.ones(4, 6).double(), -torch.ones(4, 6).double()]
    seen: list[str] = []

    def visit(name: str, pairs: Pairs, streams: Pairs) -> None:
        seen.append(name)

    names = [f"base.{name}" for name in NAMES]
    run_in_step(
        Either(), Either(), data, lambda m, x: m(x), names, {}, visit, SilentProgress(), "layers"
    )
    assert seen == ["base.0", "base.4"]


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 7), st.booleans())
def test_the_best_change_is_the_ridge_solution(seed: int, k: int, out: int, centred: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(30, k, generator=generator, dtype=torch.float64) + 0.5
    errors = torch.randn(30, out, generator=generator, dtype=torch.float64)
    moments = Moments.of(features[:13], errors[:13]) + Moments.of(features[13:], errors[13:])
    change = best_change(moments, centred, damping=0.05)
    if centred:
        features, errors = features - features.mean(0), errors - errors.mean(0)
    added = 0.05 * features.square().mean(0).mean() * 30
    rows = torch.cat([features, added.sqrt() * torch.eye(k, dtype=torch.float64)])
    targets = torch.cat([errors, torch.zeros(k, out, dtype=torch.float64)])
    assert torch.allclose(change.T, torch.linalg.lstsq(rows, targets).solution, atol=1e-9)
    explained = 1 - (errors - features @ change.T).square().sum() / errors.square().sum()
    adjusted = 1 - (1 - explained) * 29 / (29 - k)
    expected = max(0.0, float(adjusted / explained))
    assert lasting(moments, change, centred) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
def test_features_that_say_nothing_change_nothing(value: float) -> None:
    moments = Moments.of(torch.full((5, 2), value), torch.ones(5, 3))
    change = best_change(moments, centred=True)
    assert not change.any()
    assert lasting(moments, change, centred=True) == 0


@pytest.mark.parametrize("rows", [3, 4, 5])
def test_as_few_rows_as_features_say_nothing(rows: int) -> None:
    torch.manual_seed(0)
    moments = Moments.of(torch.randn(rows, 4).double(), torch.randn(rows, 3).double())
    assert lasting(moments, best_change(moments, centred=False), centred=False) == 0


@pytest.mark.parametrize(("truth", "most"), [(0.0, 0.25), (1.0, 1.0)])
def test_what_lasts_is_what_helps_other_rows(truth: float, most: float) -> None:
    """Errors of noise, or of a true change and noise: the adjusted change is better than whole."""
    torch.manual_seed(1)
    features, noise = torch.randn(2, 60, 20).double(), torch.randn(2, 60, 5).double()
    errors = truth * 0.3 * features[..., :5] + noise
    moments = Moments.of(features[0], errors[0])
    change = best_change(moments, centred=False)
    share = lasting(moments, change, centred=False)
    assert share < most

    def left(part: float) -> float:
        return float((errors[1] - part * features[1] @ change.T).square().sum())

    assert left(share) < left(1.0)


def fit(
    original: nn.Module, twin: nn.Module, names: Sequence[str], examples: Sequence[object]
) -> refit.Fitted:
    task = UserLoss(lambda model, batch: model(batch).flatten(1).square().mean(-1))
    part = as_part("calibration", list(examples))
    return fitted_again(original, twin, names, task, part, batch_size=7, progress=SilentProgress())


@torch.no_grad()
def errors_of(original: nn.Module, twin: nn.Module, inputs: Tensor) -> float:
    return float((original(inputs) - twin(inputs)).square().mean())


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole solution is taken."""
    monkeypatch.setattr(refit, "SHARE", 1.0)
    monkeypatch.setattr(refit, "lasting", lambda *args, **kwargs: 1.0)


@pytest.mark.usefixtures("whole")
def test_a_whole_fit_is_the_least_squares_solution() -> None:
    torch.manual_seed(2)
    inputs = torch.randn(40, 6).double()
    model = nn.Sequential(nn.Linear(6, 12)).double()
    twin = factorized(model, names=["0"])
    fitted = fit(model, twin, ["0"], list(inputs))
    assert fitted.examples == 40
    changed = with_replaced(twin, fitted.modules)
    old = twin[0].right.detach()  # type: ignore[index, union-attr]
    features = torch.cat([inputs @ old.T, torch.ones(40, 1).double()], dim=1)
    best = features @ torch.linalg.lstsq(features, model(inputs).detach()).solution
    # Up to the damping of a thousandth.
    assert torch.allclose(changed(inputs), best, atol=1e-3)
    assert errors_of(model, changed, inputs) < errors_of(model, twin, inputs)


@pytest.mark.parametrize("bias", [True, False])
def test_later_layers_are_fitted_to_what_earlier_ones_give_by_then(bias: bool) -> None:
    torch.manual_seed(3)
    inputs = torch.randn(200, 6).double()
    model = net(bias=bias)
    twin = factorized(model)
    before, original = state(twin), state(model)
    fitted = fit(model, twin, NAMES, list(inputs))
    assert list(fitted.modules) == NAMES
    assert same_state(twin, before)
    assert same_state(model, original)
    assert all(m.training and m.right.requires_grad for m in fitted.modules.values())
    changed = with_replaced(twin, fitted.modules)
    assert errors_of(model, changed, inputs) < 0.9 * errors_of(model, twin, inputs)
    # The last one's fit stands on the two before it.
    half = with_replaced(twin, {name: fitted.modules[name] for name in NAMES[:2]})
    again = fit(model, half, NAMES[2:], list(inputs))
    assert torch.allclose(
        again.modules["4"].dense_matrix(), fitted.modules["4"].dense_matrix(), atol=1e-9
    )


def test_fitted_layers_have_no_hooks_of_the_pass() -> None:
    class Stream(nn.Module):
        """The first layer's output is what the last one's is added to: both are looked at."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 6).double(), nn.Linear(6, 6).double()

        def forward(self, inputs: Tensor) -> Tensor:
            stream: Tensor = self.first(inputs)
            return stream + self.last(torch.tanh(stream))

    torch.manual_seed(6)
    model = Stream()
    twin = factorized(model, names=["first", "last"])
    fitted = fit(model, twin, ["first", "last"], list(torch.randn(30, 6).double()))
    assert fitted.residual == ["last"]
    for module in fitted.modules.values():
        assert not module._forward_hooks and not module._forward_pre_hooks
    torch.save(fitted.modules, io.BytesIO())


def test_layers_that_cannot_be_fitted_are_left_as_they_are() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.often, self.once, self.other = (nn.Linear(6, 6).double() for _ in range(3))
            self.kept_bias = self.other.bias

        def forward(self, inputs: Tensor) -> Tensor:
            result: Tensor = self.other(self.once(self.often(self.often(inputs))))
            return result

    torch.manual_seed(4)
    model = Twice()
    twin = factorized(model, names=["often", "once", "other"])
    fitted = fit(model, twin, ["often", "once", "other"], list(torch.randn(20, 6).double()))
    assert list(fitted.modules) == ["once"]


def test_padding_does_not_count() -> None:
    torch.manual_seed(5)

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, values: Tensor, attention_mask: Tensor) -> Tensor:
            result: Tensor = self.inner(values)
            return result

    model = Tokens()
    twin = factorized(model, names=["inner.0"])
    values = torch.randn(20, 5, 6).double()
    mask = torch.ones(20, 5, dtype=torch.long)
    mask[:, 3:] = 0
    task = UserLoss(lambda m, b: m(**b).square().mean((1, 2)))

    def found(padding: float) -> Tensor:
        filled = torch.where(mask[..., None] == 0, padding, values)
        examples = [{"values": v, "attention_mask": m} for v, m in zip(filled, mask, strict=True)]
        fitted = fitted_again(
            model, twin, ["inner.0"], task, as_part("calibration", examples),
            batch_size=None, progress=SilentProgress(),
        )  # fmt: skip
        return fitted.modules["inner.0"].dense_matrix()

    assert torch.equal(found(0.0), found(100.0))


def test_as_many_examples_are_used_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = list(torch.randn(40, 6).double())
    model = net()
    largest = 12 * 8  # bytes of the largest output of an example
    monkeypatch.setattr(refit, "MEMORY", 2 * refit.HELD * largest * 10)
    assert fit(model, factorized(model), NAMES, inputs).examples == 10


def test_lossless_reports_the_refit_and_it_survives_saving(tmp_path: Path) -> None:
    model, data = long_mlp(), pair_data(60)
    result = rankfold.lossless(model, data, size=0.6)
    plain = rankfold.lossless(model, data, size=0.6, refit=False)
    assert plain.report["refit"] is None
    entries = result.report["selection"]
    assert [e["refit"] for e in entries] == [False] * (len(entries) - 1) + [True]
    assert [e for e in entries if not e["refit"]] == plain.report["selection"]
    found = result.report["refit"]
    assert found["gain"] == pytest.approx(
        entries[-1]["change"] - min(e["change"] for e in entries[:-1])
    )
    assert found["gain"] < 0
    assert found["residual"] == []
    assert found["examples"] == 60
    assert result.ratio == plain.ratio
    loaded = rankfold.load(result.save(tmp_path / "small"), long_mlp())
    values = torch.randn(5, 6)
    assert torch.equal(loaded(values), result.model(values))


def test_a_refit_that_selection_data_do_not_prefer_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(refit, "SHARE", -3.0)
    model, data = long_mlp(), pair_data(60)
    result = rankfold.lossless(model, data, size=0.6)
    plain = rankfold.lossless(model, data, size=0.6, refit=False)
    assert result.report["refit"] is None
    assert result.report["selection"][-1]["refit"]
    assert same_state(result.model, state(plain.model))


def test_the_same_seed_gives_the_same_refit() -> None:
    results = [rankfold.lossless(long_mlp(), pair_data(60), size=0.6) for _ in range(2)]
    assert same_state(results[0].model, state(results[1].model))


def test_compact_goes_on_to_smaller_plans_while_they_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = first_round(trained_cnn(), image_data(200))

    def far_better(trial: Trial) -> Trial:
        found = refitted(trial)
        change = replace(found.change, mean=found.change.mean - 0.02)
        return replace(found, change=change)

    monkeypatch.setattr(plans, "refitted", far_better)
    tried = within_margin(prepared, 0.05)
    fitted = [c for c in tried if c.refit is not None]
    first = [c for c in tried if c.refit is None]
    assert len(fitted) > 1
    assert all(b.size < a.size for a, b in itertools.pairwise(fitted))
    assert fitted[0].plan in [c.plan for c in first]


def test_objectives_of_other_authors_are_not_fitted_again() -> None:
    result = rankfold.lossless(long_mlp(), pair_data(60), size=0.6, objective="activation")
    assert result.report["refit"] is None
    assert not any(entry["refit"] for entry in result.report["selection"])
    assert result.report["settings"]["refit"] is True
