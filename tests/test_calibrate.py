"""Statistics against explicit sums over examples and positions, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rankfold.calibrate import (
    LayerStatistics,
    calibration_loss,
    choose_curvature,
    collect_statistics,
    trace,
)
from rankfold.data import Part, as_part
from rankfold.errors import InputError
from rankfold.layer_matrix import MatrixLayer, input_rows
from rankfold.tasks import CausalLM, Classification
from tests.small_models import (
    SmallCNN,
    flags,
    images,
    mlp,
    pair_part,
    same_state,
    state,
    tiny_llama,
    token_windows,
)

CONVS = [
    nn.Conv2d(3, 4, 3),
    nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0)),
    nn.Conv2d(3, 4, 2, dilation=2, padding="same", bias=False),
    nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
]


class ConvNet(nn.Module):
    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x)).mean((2, 3)))


class Shared(nn.Module):
    """Two layers read the same input; for even sums the second reads another one."""

    def __init__(self, parts: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(6, 5)
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        other = x * 2 if self.parts and float(x.sum()) > 0 else x
        return self.first(x) + torch.tanh(self.second(other))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


def layers_of(model: nn.Module) -> dict[str, MatrixLayer]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def statistics(model: nn.Module, part: Part, **options: object) -> dict[str, LayerStatistics]:
    settings = {"curvature": "empirical", **options}
    return collect_statistics(model, Classification(), part, layers_of(model), **settings)


def explicit(model: nn.Module, part: Part, name: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A, B and each half's G of one layer, example by example."""
    layer = model.get_submodule(name)
    calls: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        output.retain_grad()
        calls.append((args[0], output))

    a, b, rows = 0, 0, 0
    halves = [torch.zeros_like(layer.weight).flatten(1) for _ in range(2)]
    middle = len(part.examples) // 2
    handle = layer.register_forward_hook(keep)
    for index, (x, y) in enumerate(part.examples):
        calls.clear()
        model.zero_grad()
        loss = functional.cross_entropy(model(x[None]), torch.tensor([int(y)]))
        loss.backward()
        for inputs, output in calls:
            x_rows = torch.cat(list(input_rows(layer, inputs)))
            g_rows = output.grad
            g_rows = g_rows.movedim(1, -1) if g_rows.dim() == 4 else g_rows
            g_rows = g_rows.reshape(-1, layer.weight.shape[0])
            a, b, rows = a + x_rows.T @ x_rows, b + g_rows.T @ g_rows, rows + len(x_rows)
        halves[index >= middle] += layer.weight.grad.flatten(1)
    handle.remove()
    model.zero_grad()
    counts = (middle, len(part.examples) - middle)
    return a / rows, b / len(part.examples), [g / n for g, n in zip(halves, counts, strict=True)]


def assert_matches(model: nn.Module, part: Part, found: dict[str, LayerStatistics]) -> None:
    for name in found:
        a, b, halves = explicit(model, part, name)
        torch.testing.assert_close(found[name].input_gram, a)
        torch.testing.assert_close(found[name].output_gram, b)
        for half, expected in zip(found[name].gradients, halves, strict=True):
            torch.testing.assert_close(half, expected)


def double(part: Part) -> Part:
    return as_part(part.name, [(x.double(), y) for x, y in part.examples])


@pytest.mark.parametrize("conv", CONVS, ids=str)
@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_conv_statistics(conv: nn.Conv2d, batch_size: int) -> None:
    model = ConvNet(conv).double().eval()
    part = double(as_part("calibration", list(images(9, seed=1))))
    assert_matches(model, part, statistics(model, part, batch_size=batch_size))


@pytest.mark.parametrize("make", [mlp, Twice, lambda: Shared(False), lambda: Shared(True)])
def test_linear_statistics(make: Callable[[], nn.Module]) -> None:
    model, part = make().double().eval(), double(pair_part(11))
    for batch_size in (1, 3):
        found = statistics(model, part, batch_size=batch_size)
        if not (isinstance(model, Shared) and model.parts and batch_size == 3):
            assert_matches(model, part, found)


def test_shared_inputs_are_accumulated_once_and_parted_when_they_differ() -> None:
    part = double(pair_part(12))
    together = statistics(Shared(False).double(), part, batch_size=1)
    assert together["second"].shares_input_with == "first"
    assert together["second"].input_gram is together["first"].input_gram
    apart = statistics(Shared(True).double(), part, batch_size=1)
    assert apart["second"].shares_input_with is None
    x = torch.stack([x for x, _ in part.examples])
    torch.testing.assert_close(apart["first"].input_gram, x.T @ x / 12)
    doubled = torch.where(x.sum(1, keepdim=True) > 0, 2 * x, x)
    torch.testing.assert_close(apart["second"].input_gram, doubled.T @ doubled / 12)


def test_llama_shares_the_inputs_of_q_k_v_and_of_gate_up() -> None:
    model = tiny_llama()
    part = as_part("calibration", token_windows(4))
    layers = {n: m for n, m in layers_of(model).items() if n != "lm_head"}
    found = collect_statistics(model, CausalLM(), part, layers, curvature="empirical")
    leaders = {n.rpartition(".")[2]: s.shares_input_with for n, s in found.items()}
    assert leaders["q_proj"] is leaders["gate_proj"] is leaders["o_proj"] is None
    assert leaders["k_proj"].endswith("q_proj") and leaders["v_proj"].endswith("q_proj")
    assert leaders["up_proj"].endswith("gate_proj")


def test_sampled_curvature_is_seeded_and_in_the_mean_the_fisher() -> None:
    model, part = mlp().double(), double(pair_part(40))
    first, again, other = (
        statistics(model, part, curvature="sampled", seed=seed)["last"] for seed in (0, 0, 1)
    )
    assert torch.equal(first.output_gram, again.output_gram)
    assert not torch.equal(first.output_gram, other.output_gram)
    torch.testing.assert_close(first.gradient, statistics(model, part)["last"].gradient)
    many = [
        statistics(model, part, curvature="sampled", seed=seed)["last"].output_gram
        for seed in range(150)
    ]
    x = torch.stack([x for x, _ in part.examples])
    p = model(x).softmax(-1)
    q = 0.9 * p + 0.1 / p.shape[-1]
    onehot = torch.eye(p.shape[-1], dtype=p.dtype)
    g = p[:, None, :] - onehot  # (examples, drawn label, logits)
    fisher = torch.einsum("nk,nki,nkj->ij", q, g, g) / len(x)
    error = (torch.stack(many).mean(0) - fisher).norm() / fisher.norm()
    assert error < 0.05


class Interrupted(SmallCNN):
    """Fails, or is interrupted, in its second call."""

    def __init__(self, error: type[BaseException] | None) -> None:
        super().__init__()
        self.error, self.calls = error, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 2 and self.error:
            raise self.error
        return super().forward(x)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_model_comes_back_as_it_was(error: type[BaseException] | None) -> None:
    model = Interrupted(error).train()
    model.features[1].eval()
    model.head.weight.requires_grad_(False)
    model.features[0].register_forward_hook(lambda *_: None)
    before, were = state(model), flags(model)
    part = as_part("calibration", list(images(9, seed=1)))
    if error is None:
        statistics(model, part, batch_size=3)
    else:
        with pytest.raises(error):
            statistics(model, part, batch_size=3)
    assert same_state(model, before)
    assert flags(model) == were
    assert torch.is_grad_enabled()


def test_input_statistics_alone_need_no_backward_pass() -> None:
    found = statistics(mlp(), pair_part(8), curvature=None)
    assert found["first"].output_gram is None
    with pytest.raises(ValueError, match="without gradients"):
        _ = found["first"].gradient


def test_curvature_is_chosen_by_the_calibration_loss() -> None:
    assert choose_curvature(2.0, 10) == "empirical"
    assert choose_curvature(0.01, 10) == "sampled"
    assert choose_curvature(0.01, None) == "empirical"
    loss, classes = calibration_loss(mlp(), Classification(), pair_part(8))
    assert classes == 5
    assert 0.5 < loss < 4


def test_a_loss_that_is_not_finite_is_refused() -> None:
    part = as_part("calibration", [(torch.full((6,), torch.nan), 1)] * 4)
    with pytest.raises(InputError, match="NaN or infinite"):
        statistics(mlp(), part)
    with pytest.raises(InputError, match="finite loss"):
        calibration_loss(mlp(), Classification(), part)


def test_trace_counts_rows_and_flops() -> None:
    model = SmallCNN(width=8).eval()
    seen = trace(model, Classification(), as_part("calibration", list(images(4, seed=1))))
    assert seen.rows["features.0"] == 64
    assert seen.rows["features.3"] == 16
    assert seen.flops["features.0"] == 2 * 64 * 8 * 27
    assert seen.flops["head"] == 2 * 64 * 5
    with pytest.raises(InputError, match=r"can't run on the data.*\(1, 6\)"):
        trace(model, Classification(), pair_part(4))
