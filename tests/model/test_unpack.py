"""Packed layers as plain ones: the same function, the same gradients, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

import rankfold
from rankfold.data.parts import as_part
from rankfold.errors import InputError
from rankfold.model.find_layers import find_layers
from rankfold.model.unpack import unpack
from rankfold.statistics.recorder import collect_statistics
from rankfold.tasks.supervised import Classification, UserLoss
from tests.cases import filled, normal
from tests.small_models import flags, same_state, state

CONVS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "groups": (nn.Conv2d(6, 9, 3, groups=3, padding=1, stride=2), (2, 6, 7, 8)),
    "groups-reflect": (
        nn.Conv2d(4, 4, (3, 2), groups=2, padding=1, padding_mode="reflect", bias=False),
        (4, 7, 8),
    ),
    "1d": (nn.Conv1d(4, 5, 3, stride=2, padding=2, dilation=2), (2, 4, 17)),
    "1d-same-circular": (
        nn.Conv1d(4, 5, 3, padding="same", padding_mode="circular", bias=False),
        (4, 9),
    ),
    "1d-groups": (nn.Conv1d(4, 6, 3, groups=2, padding=1, padding_mode="replicate"), (2, 4, 9)),
    "transposed": (nn.ConvTranspose2d(4, 3, (3, 2), stride=(2, 3), padding=(1, 0)), (2, 4, 5, 6)),
    "transposed-unbatched": (nn.ConvTranspose2d(4, 3, 3, bias=False), (4, 5, 6)),
    "transposed-output-padding": (
        nn.ConvTranspose2d(4, 3, 2, stride=3, padding=1, output_padding=(2, 1), dilation=2),
        (2, 4, 4, 3),
    ),
    "transposed-dilated": (
        nn.ConvTranspose2d(2, 3, 3, stride=1, dilation=3, output_padding=2),
        (2, 2, 4, 3),
    ),
    "transposed-groups": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 5, 6)),
    "transposed-1d": (
        nn.ConvTranspose1d(4, 3, 4, stride=2, padding=1, output_padding=1),
        (2, 4, 9),
    ),
    "transposed-1d-groups": (nn.ConvTranspose1d(4, 4, 3, groups=2), (4, 9)),
    "gpt2": (Conv1D(7, 4), (2, 3, 4)),
}


def _in_a_model(layer: nn.Module, seed: int = 0) -> nn.Sequential:
    return nn.Sequential(filled(copy.deepcopy(layer).double(), seed))


@pytest.mark.parametrize("name", CONVS)
def test_convs_are_the_same_function_with_the_same_parameters(name: str) -> None:
    layer, shape = CONVS[name]
    model = _in_a_model(layer)
    before = state(model)
    unpacked = unpack(model)
    assert unpacked.names and unpacked.given is model
    assert same_state(model, before)
    inputs = normal(1, *shape).requires_grad_()
    twin_inputs = inputs.detach().clone().requires_grad_()
    expected, found = model(inputs), unpacked.model(twin_inputs)
    torch.testing.assert_close(found, expected)
    weights = normal(2, *expected.shape)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    torch.testing.assert_close(twin_inputs.grad, inputs.grad)
    count = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in unpacked.model.parameters()) == count
    layers, skipped = find_layers(unpacked.model)
    assert layers and all(type(layer) in (nn.Linear, nn.Conv2d) for layer in layers.values())
    assert all(entry.reason == "it holds no matrix" for entry in skipped)


def test_a_transposed_conv_takes_the_size_that_is_asked_for() -> None:
    for layer, shape, sizes in (
        (nn.ConvTranspose2d(2, 2, 3, stride=2), (1, 2, 4, 4), ([10, 9], [1, 2, 9, 10])),
        (nn.ConvTranspose1d(2, 2, 3, stride=2), (1, 2, 4), ([10], [1, 2, 9])),
        (nn.ConvTranspose2d(2, 2, 3, stride=2, groups=1), (1, 2, 4, 4), ([9, 9],)),
    ):
        model, inputs = _in_a_model(layer), normal(1, *shape)
        twin = unpack(model).model
        for size in sizes:
            torch.testing.assert_close(twin[0](inputs, size), model[0](inputs, size))


def test_statistics_of_a_transposed_conv_are_the_explicit_sums() -> None:
    conv = nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1)
    model = nn.Sequential(filled(conv.double(), 4), nn.Flatten(), nn.Linear(2 * 7 * 5, 4).double())
    images, labels = normal(5, 6, 3, 4, 3), torch.tensor([0, 1, 2, 3, 0, 1])
    part = as_part("calibration", list(zip(images, labels.tolist(), strict=True)))
    twin = unpack(model).model
    layers, _ = find_layers(twin)
    name = next(n for n in layers if n.startswith("0."))
    found = collect_statistics(twin, Classification(), part, layers, curvature="empirical")[name]

    a = torch.zeros(3, 3, dtype=torch.float64)
    b = torch.zeros(18, 18, dtype=torch.float64)
    gradient = torch.zeros(18, 3, dtype=torch.float64)
    for image, label in zip(images, labels, strict=True):
        output = conv(image[None])
        output.retain_grad()
        functional.cross_entropy(model[2](output.flatten(1)), label[None]).backward()
        # What each input position adds to: the patches of the output's gradient.
        g = functional.unfold(output.grad, 3, padding=1, stride=2)[0]  # (18, positions)
        x = image.flatten(1)  # (3, positions)
        a += x @ x.T / x.shape[1] / 6
        b += g @ g.T / 6
        gradient += g @ x.T / 6
    torch.testing.assert_close(found.input_gram, a)
    torch.testing.assert_close(found.output_gram, b)
    torch.testing.assert_close(found.gradient, gradient)
    torch.testing.assert_close(conv.weight.grad.flatten(1).T / 6, gradient)


def test_statistics_of_a_grouped_conv_are_those_of_each_block() -> None:
    conv = nn.Conv2d(4, 6, 3, groups=2, padding=1)
    model = nn.Sequential(filled(conv.double(), 4), nn.Flatten(), nn.Linear(72, 4).double())
    images = normal(5, 6, 4, 4, 3)
    part = as_part("calibration", [(image, 1) for image in images])
    twin = unpack(model).model
    layers, _ = find_layers(twin)
    found = collect_statistics(twin, Classification(), part, layers, curvature="empirical")
    output = conv(images)
    output.retain_grad()
    labels = torch.ones(6, dtype=torch.int64)
    functional.cross_entropy(model[2](output.flatten(1)), labels, reduction="sum").backward()
    for group in range(2):
        (name,) = (n for n in layers if n.startswith("0.") and n.endswith(str(group)))
        x = functional.unfold(images[:, 2 * group : 2 * group + 2], 3, padding=1)
        x = x.transpose(1, 2).flatten(0, 1)
        g = output.grad[:, 3 * group : 3 * group + 3].transpose(0, 1).flatten(1).T
        torch.testing.assert_close(found[name].input_gram, x.T @ x / len(x))
        torch.testing.assert_close(found[name].output_gram, g.T @ g / 6)
        torch.testing.assert_close(found[name].gradient, g.T @ x / 6)


ATTENTION: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch-first": {"batch_first": True},
    "no-bias": {"bias": False},
    "other-sizes": {"kdim": 3, "vdim": 7},
    "bias-kv-and-zero": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
}


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("masks", ["none", "bool", "float", "per-head", "causal"])
@pytest.mark.parametrize("weights", ["none", "mean", "each"])
def test_attention_is_that_of_torch(name: str, masks: str, weights: str) -> None:
    options = ATTENTION[name]
    attention = nn.MultiheadAttention(8, 2, **options, dtype=torch.float64)
    holder = nn.Sequential(filled(attention, 1)).eval()
    twin = unpack(holder).model[0]
    n, queries, keys = 3, 4, 5
    first = bool(options.get("batch_first"))
    query, key, value = (
        normal(seed, *((n, length) if first else (length, n)), width)
        for seed, length, width in (
            (2, queries, 8),
            (3, keys, options.get("kdim", 8)),
            (4, keys, options.get("vdim", 8)),
        )
    )
    hidden = torch.ones(queries, keys, dtype=torch.bool).triu(1)
    padding = torch.arange(keys).expand(n, keys) >= torch.tensor([[5], [4], [2]])
    arguments: dict[str, Any] = {
        "none": {},
        "bool": {"attn_mask": hidden, "key_padding_mask": padding},
        "float": {"attn_mask": normal(5, queries, keys)},
        "per-head": {"attn_mask": normal(6, n * 2, queries, keys)},
        "causal": {"attn_mask": hidden, "is_causal": True},
    }[masks]
    arguments |= {"need_weights": weights != "none", "average_attn_weights": weights == "mean"}
    expected = attention(query, key, value, **arguments)
    found = twin(query, key, value, **arguments)
    torch.testing.assert_close(found[0], expected[0])
    if weights == "none":
        assert found[1] is None
    else:
        torch.testing.assert_close(found[1], expected[1])


def test_attention_without_a_batch_axis() -> None:
    attention = filled(nn.MultiheadAttention(8, 2, dtype=torch.float64), 1).eval()
    twin = unpack(nn.Sequential(attention)).model[0]
    x, y = normal(2, 4, 8), normal(3, 5, 8)
    padding = torch.tensor([False, False, True, False, True])
    expected = attention(x, y, y, key_padding_mask=padding)
    found = twin(x, y, y, key_padding_mask=padding)
    torch.testing.assert_close(found, expected)


class _Encoder(nn.Module):
    """torch's own transformer layers, whose fast path reads packed weights directly."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.decoder = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        memory = self.encoder(x)
        return self.head(self.decoder(x, memory).mean(1))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_torch_transformer_is_compressed_in_all_its_projections(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = _Encoder().eval()
    data = [
        (x, int(y)) for x, y in zip(torch.randn(90, 5, 8), torch.randint(4, (90,)), strict=True)
    ]
    before, flagged = state(model), flags(model)
    result = rankfold.lossless(model, data, size=0.7)
    assert same_state(model, before) and flags(model) == flagged
    names = {entry["name"] for entry in result.report["layers"]}
    projections = {f"encoder.layers.1.self_attn.{p}_proj" for p in ("q", "k", "v", "out")}
    assert projections | {"encoder.layers.0.linear1", "decoder.multihead_attn.v_proj"} <= names
    assert {e["reason"] for e in result.report["not_factorized"]} == {"it holds no matrix"}
    x = torch.randn(3, 5, 8)
    again = rankfold.load(result.save(tmp_path / "out"), model=_Encoder())
    with torch.no_grad():
        assert torch.equal(again(x), result.model(x))
        dense = [m for m in result.model.modules() if hasattr(m, "to_dense")]
        called = []
        for module in dense:
            module.register_forward_hook(lambda m, *_: called.append(m))
        result.model(x)
    assert len(dense) > 3 and set(called) == set(dense)  # no fast path went around them


class _Experts(nn.Module):
    """One class of a user's own: experts as Linear layers, the last of which no token reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for index, chosen in enumerate((x[:, 0] > 0, x[:, 0] <= 0, x[:, 0] > 1e6)):
            if chosen.any():
                out = out.index_put((chosen.nonzero()[:, 0],), self.experts[index](x[chosen]))
        return self.head(out.tanh())


def test_an_expert_without_tokens_stays_dense_and_is_listed() -> None:
    data = [(x, i % 4) for i, x in enumerate(torch.randn(80, 6))]
    result = rankfold.lossless(_Experts(), data, size=0.8)
    reasons = {e["name"]: e["reason"] for e in result.report["not_factorized"]}
    assert reasons == {"experts.2": "not called in a forward pass on the calibration data"}
    # The first example reaches one of the two others only: both are factorizable all the same.
    assert {"experts.0", "experts.1"} < {e["name"] for e in result.report["layers"]}


def _mixtral(implementation: str) -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2,
        initializer_range=0.3, experts_implementation=implementation,
    )  # fmt: skip
    torch.manual_seed(1)
    return MixtralForCausalLM(config).eval()


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_packed_experts_are_one_linear_each(implementation: str) -> None:
    model = _mixtral(implementation)
    unpacked = unpack(model)
    assert unpacked.names == ["model.layers.0.mlp.experts"]
    ids = torch.randint(40, (2, 11))
    with torch.no_grad():
        torch.testing.assert_close(unpacked.model(ids).logits, model(ids).logits)
    layers, _ = find_layers(unpacked.model)
    assert sum("experts.first" in name for name in layers) == 4
    assert sum("experts.second" in name for name in layers) == 4
    count = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in unpacked.model.parameters()) == count


def test_computed_weights_become_plain_ones() -> None:
    with pytest.warns(FutureWarning):
        older = weight_norm(nn.Linear(4, 5))
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
        nn.Flatten(),
        parametrizations.orthogonal(nn.Linear(4, 4)),
        older,
        spectral_norm(nn.Linear(5, 6)),
    ).eval()
    model(torch.randn(1, 3, 3, 3))  # the older ones keep a weight that can't be deep-copied
    unpacked = unpack(model)
    assert unpacked.names == ["0", "2", "3", "4"]
    images = torch.randn(3, 3, 3, 3)
    torch.testing.assert_close(unpacked.model(images), model(images))
    layers, skipped = find_layers(unpacked.model)
    assert set(layers) == {"0", "2", "3", "4"} and not skipped
    assert {name for name, _ in unpacked.model.named_parameters()} == {
        f"{place}.{leaf}" for place in (0, 2, 3, 4) for leaf in ("weight", "bias")
    }
    assert {"0.parametrizations.weight.original0", "3.weight_g", "4.weight_orig"} < set(
        dict(model.named_parameters())
    )


def test_a_weight_normed_model_is_saved_and_opened_with_its_own_class(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(2)
        return nn.Sequential(
            nn.Conv1d(2, 6, 3, padding=1), nn.ReLU(),
            parametrizations.weight_norm(nn.Conv1d(6, 6, 3, groups=2)), nn.Flatten(),
            nn.Linear(36, 4),
        )  # fmt: skip

    data = [(x, i % 4) for i, x in enumerate(torch.randn(80, 2, 8))]
    result = rankfold.lossless(make(), data, size=0.6)
    x = torch.randn(3, 2, 8)
    again = rankfold.load(result.save(tmp_path / "out"), model=make())
    assert torch.equal(again(x), result.model(x))
    counted = sum(p.numel() for p in result.model.parameters())
    assert result.report["factorized"]["parameters"] == counted
    assert (
        result.report["factorized"]["bytes"] == (tmp_path / "out/model.safetensors").stat().st_size
    )
    other = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(InputError, match="its module 0 is a Linear in the given model"):
        rankfold.load(tmp_path / "out", model=other)
    broken = make()
    broken[4] = nn.Linear(36, 5)
    kept = [type(module) for module in broken.modules()]
    with pytest.raises(InputError, match="don't fit the model"):
        rankfold.load(tmp_path / "out", model=broken)
    assert [type(module) for module in broken.modules()] == kept


def test_depthwise_and_many_groups_are_listed() -> None:
    model = nn.Sequential(
        nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 260, 1), nn.Conv2d(260, 520, 3, groups=130),
        nn.Conv3d(2, 2, 3), nn.Conv1d(8, 8, 3, groups=8), nn.LayerNorm(4), nn.Linear(3, 3),
    )  # fmt: skip
    unpacked = unpack(model)
    assert unpacked.names == [] and unpacked.model is model
    _, skipped = find_layers(unpacked.model)
    reasons = {entry.name: entry.reason for entry in skipped}
    assert reasons["0"] == reasons["4"] == "each of its 8 groups is a matrix of rank 1 already"
    assert reasons["2"].startswith("its 130 groups are more than the 128")
    assert "Conv3d can't be factorized yet (Linear, Conv1d, Conv2d" in reasons["3"]
    assert reasons["5"] == "it holds no matrix"


def test_a_module_called_twice_in_one_pass_sums_its_calls() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(4, 4).double()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.same = linear, linear

        def forward(self, x: Tensor) -> Tensor:
            return self.same(self.linear(x).tanh())

    model, x = Twice(), normal(1, 6, 4)
    loss = UserLoss(lambda m, batch: m(batch).square().sum(-1))
    layers, _ = find_layers(model)
    assert set(layers) == {"linear"}
    part = as_part("calibration", list(x))
    found = collect_statistics(model, loss, part, layers, curvature="empirical")["linear"]
    middle = linear(x).tanh().detach()
    rows = torch.cat([x, middle])
    torch.testing.assert_close(found.input_gram, rows.T @ rows / 12)
    hidden = linear(x)
    hidden.retain_grad()
    last = linear(hidden.tanh())
    last.retain_grad()
    last.square().sum().backward()
    g = torch.cat([hidden.grad, last.grad])
    torch.testing.assert_close(found.output_gram, g.T @ g / 6)
    torch.testing.assert_close(found.gradient, linear.weight.grad / 6)


def test_wrappers_are_taken_off(tmp_path: Path) -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(5)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))

    data = [(x, i % 4) for i, x in enumerate(torch.randn(60, 6))]
    expected = rankfold.lossless(make(), data, size=0.8)
    inner = make()
    inner[0] = torch.compile(inner[0], backend="eager")
    in_place = make()
    in_place.compile(backend="eager")
    x = torch.randn(3, 6)
    for wrapped in (
        torch.compile(make(), backend="eager"),
        nn.DataParallel(make()),
        torch.compile(nn.DataParallel(make()), backend="eager"),
        inner,
        in_place,
    ):
        result = rankfold.lossless(wrapped, data, size=0.8)
        assert torch.equal(result.model(x), expected.model(x))
        assert list(result.model.state_dict()) == list(expected.model.state_dict())
    out = expected.save(tmp_path / "out")
    again = rankfold.load(out, model=nn.DataParallel(make()))
    assert torch.equal(again(x), expected.model(x))


def test_a_model_made_in_inference_mode_is_compressed() -> None:
    torch.manual_seed(5)
    with torch.inference_mode():
        model = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4)
        ).requires_grad_(False)  # fmt: skip
    data = [(x, i % 4) for i, x in enumerate(torch.randn(60, 6))]
    result = rankfold.lossless(model.eval(), data, size=0.8)
    assert not any(p.is_inference() for p in result.model.parameters())
    assert all(p.is_inference() for p in model.parameters())
    assert result.ratio < 0.81


class _Adapter(nn.Module):
    """What peft's LoRA layers look like from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(4, 4)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 4)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def _with_int8_weight() -> nn.Module:
    layer = nn.Linear(4, 4)
    weight = torch.ones(4, 4, dtype=torch.int8)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _with_packed_buffer() -> nn.Module:
    layer = nn.Module()
    layer.register_buffer("qweight", torch.ones(4, 4, dtype=torch.int32))
    return layer


class _Strange(Tensor):
    """A tensor subclass, as quantizers and sharding use for their weights."""


def _with_strange_weight() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.ones(4, 4).as_subclass(_Strange))
    return layer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_Adapter, r"layer 1 \(_Adapter\) has an adapter(.|\n)*merge_and_unload"),
        (_with_int8_weight, r"layer 1 \(Linear\) is quantized: its weight is torch.int8"),
        (_with_packed_buffer, "quantized: its qweight is torch.int32"),
        (_with_strange_weight, "its weight is a .*_Strange, no plain tensor"),
        (lambda: nn.Linear(4, 4).to(torch.float8_e4m3fn), "its weight is torch.float8_e4m3fn"),
    ],
)
def test_adapters_and_quantized_layers_are_refused_by_name(make: Any, message: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), make())
    with pytest.raises(InputError, match=message):
        rankfold.lossless(model, [(x, 1) for x in torch.randn(60, 4)], size=0.9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_statistics_are_near_those_of_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, groups=1), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2), nn.Flatten(),
        nn.Linear(4 * 49, 5),
    )  # fmt: skip
    examples = [(x, i % 5) for i, x in enumerate(torch.randn(40, 3, 8, 8))]
    part = as_part("calibration", examples)
    found = []
    for precise in (True, False):
        twin = unpack(copy.deepcopy(model).to(dtype).to(torch.float32 if precise else dtype)).model
        layers, _ = find_layers(twin)
        found.append(
            collect_statistics(twin, Classification(), part, layers, curvature="empirical")
        )
    for name, exact in found[0].items():
        half = found[1][name]
        for first, second in (
            (half.input_gram, exact.input_gram),
            (half.output_gram, exact.output_gram),
            (half.gradient, exact.gradient),
        ):
            assert float((first - second).norm() / second.norm()) < 0.05


def test_a_mixture_of_precisions_keeps_each(tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.first = nn.Linear(6, 12)
            self.middle = nn.Linear(12, 12).to(torch.bfloat16)
            self.last = nn.Linear(12, 4).to(torch.float16)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.middle(self.first(x).tanh().to(torch.bfloat16)).tanh()
            return self.last(hidden.to(torch.float16))

    data = [(x, i % 4) for i, x in enumerate(torch.randn(80, 6))]
    result = rankfold.lossless(Mixed(), data, size=0.6)
    assert {str(p.dtype) for p in result.model.middle.parameters()} == {"torch.bfloat16"}
    assert {str(p.dtype) for p in result.model.last.parameters()} == {"torch.float16"}
    again = rankfold.load(result.save(tmp_path / "out"), model=Mixed())
    x = torch.randn(3, 6)
    assert torch.equal(again(x), result.model(x))
    assert {n: t.dtype for n, t in again.state_dict().items()} == {
        n: t.dtype for n, t in result.model.state_dict().items()
    }


class _SamePadding(nn.Conv2d):
    """A conv that pads to its own rule, as the EfficientNets of TensorFlow's origin do."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.weight.size()[-2:]
        x = functional.pad(x, (0, width - 1, height - 1, 0))
        return functional.conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class _Cast(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x.to(self.weight.dtype), self.weight, self.bias).tanh()


class _OfInput(nn.Linear):
    """Its weight is another at each call: no plain layer computes the same."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight * x.mean(), self.bias)


class _Same(nn.Linear):
    pass


def test_layers_with_a_rule_of_their_own(tmp_path: Path) -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(3)
        return nn.Sequential(
            _SamePadding(3, 8, 3, stride=2), _SamePadding(8, 8, 3, groups=2, bias=False),
            _SamePadding(8, 8, 3, groups=8), nn.Flatten(), _Cast(8 * 9, 12),
            _OfInput(12, 12), _Same(12, 4),
        )  # fmt: skip

    model, images = make(), torch.randn(4, 3, 6, 6)
    unpacked = unpack(model)
    torch.testing.assert_close(unpacked.model(images), model(images))
    layers, skipped = find_layers(unpacked.model)
    assert {"0.matrix", "1.matrix.groups_of.0", "1.matrix.groups_of.1", "4.matrix", "6"} == set(
        layers
    )
    reasons = {entry.name: entry.reason for entry in skipped}
    assert reasons["2"] == "each of its 8 groups is a matrix of rank 1 already"
    assert "kind _OfInput can't be factorized yet" in reasons["5"]
    data = [(x, i % 4) for i, x in enumerate(torch.randn(80, 3, 6, 6))]
    before = state(model)
    result = rankfold.lossless(model, data, size=0.7)
    assert same_state(model, before)
    again = rankfold.load(result.save(tmp_path / "out"), model=make())
    assert torch.equal(again(images), result.model(images))
    assert {e["name"] for e in result.report["layers"]} == set(layers)


class _Standardised(nn.Conv2d):
    """A conv of BiT or NFNet: every filter of mean 0 and variance ``gain^2``, at each call."""

    def __init__(self, *args: Any, pads: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.pads = pads
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, self.out_channels))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.pad(x, (1, 1, 1, 1)) if self.pads else x
        weight = functional.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, self.gain, training=True
        ).view_as(self.weight)
        return functional.conv2d(
            x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class _GainTwice(_Standardised):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain[:, None, None]


class _DropsInputs(_Standardised):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(functional.dropout(x, 0.5, self.training))


class _DropsWeights(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        weight = functional.dropout(self.weight, 0.5, self.training)
        return functional.linear(x, weight, self.bias)


def test_layers_that_compute_their_weight_at_each_call(tmp_path: Path) -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(4)
        return nn.Sequential(
            _Standardised(3, 8, 3, stride=2, pads=True), nn.ReLU(), _Standardised(8, 12, 3),
            _Standardised(12, 8, 1, groups=2, bias=False), _GainTwice(8, 8, 1), nn.Flatten(),
            _DropsWeights(8 * 4, 12), nn.Linear(12, 4),
        ).eval()  # fmt: skip

    model, images = make(), torch.randn(4, 3, 8, 8)
    model[2].weight.requires_grad_(False)
    before, numbers = state(model), torch.get_rng_state()
    unpacked = unpack(model).model
    # The same sums, in the order of other kernels: with AVX2 alone and two threads they differ.
    expected = model(images).detach()
    largest = float(expected.abs().max())
    torch.testing.assert_close(unpacked(images).detach(), expected, rtol=0, atol=1e-6 * largest)
    assert same_state(model, before)
    assert torch.equal(torch.get_rng_state(), numbers)
    dropping = unpack(nn.Sequential(_DropsInputs(8, 8, 3))).model.train()
    with torch.no_grad():
        assert not torch.equal(dropping(torch.ones(2, 8, 5, 5)), dropping(torch.ones(2, 8, 5, 5)))
    assert type(dropping[0]) is not nn.Conv2d
    # Nothing of what the weights are computed from is left beside them.
    assert [name for name, _ in unpacked.named_parameters() if "gain" in name] == ["4.gain"]
    assert type(unpacked[2]) is nn.Conv2d and not unpacked[2].weight.requires_grad
    layers, skipped = find_layers(unpacked)
    assert set(layers) == {"0.matrix", "2", "3.groups_of.0", "3.groups_of.1", "7"}
    # One that uses its gain for its output too, and one that is trained with another weight.
    assert {entry.name for entry in skipped} == {"4", "6"}
    data = [(x, i % 4) for i, x in enumerate(torch.randn(80, 3, 8, 8))]
    result = rankfold.lossless(model, data, size=0.7)
    folder = result.save(tmp_path / "out")
    assert torch.equal(rankfold.load(folder, model=make())(images), result.model(images))
    with pytest.raises(InputError, match="computed from others there"):
        rankfold.export(folder, tmp_path / "dense", to="dense", model=make())
    rankfold.export(folder, tmp_path / "pt2", to="pt2", model=make(), inputs=images)


class _Product(nn.Linear):
    """Falcon's: a stock Linear in other words."""

    def forward(self, x: Tensor) -> Tensor:
        product = x @ self.weight.T
        return product if self.bias is None else product + self.bias


class _Einsum(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", x, self.weight) + self.bias


class _Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight + self.weight).T + self.bias


class _BiasTwice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias + self.bias)


class _Gated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.T).relu() + self.bias


class _OfMatrices(nn.Linear):
    """What it does with one row is not what it does with several."""

    def forward(self, x: Tensor) -> Tensor:
        product = x @ self.weight.T + self.bias
        return product if x.dim() == 2 else product.flip(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_linear_in_other_words_is_a_linear(dtype: torch.dtype) -> None:
    for layer in (_Product(6, 4), _Product(6, 4, bias=False), _Einsum(6, 4)):
        model = nn.Sequential(nn.Linear(5, 6), layer.eval()).to(dtype)
        model[1].weight.requires_grad_(False)
        unpacked = unpack(model)
        plain = unpacked.model[1]
        assert unpacked.names == ["1"]
        assert type(plain) is nn.Linear
        assert plain.weight is layer.weight
        assert plain.bias is layer.bias
        assert not plain.training
        assert type(model[1]) is type(layer)
        for shape in ((5,), (3, 5), (2, 3, 5), (2, 2, 3, 5)):
            inputs = torch.randn(shape, dtype=dtype)
            found, expected = unpacked.model(inputs), model(inputs)
            torch.testing.assert_close(found, expected, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_a_linear_that_computes_something_else_is_left_dense() -> None:
    for layer in (_Doubled(6, 4), _BiasTwice(6, 4), _Gated(6, 4), _OfMatrices(6, 4)):
        model = nn.Sequential(nn.Linear(5, 6), layer)
        unpacked = unpack(model)
        assert unpacked.names == []
        _, skipped = find_layers(unpacked.model)
        (entry,) = skipped
        assert f"kind {type(layer).__name__} can't be factorized yet" in entry.reason


def test_a_linear_in_other_words_is_saved_loaded_and_exported(tmp_path: Path) -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(3)
        return nn.Sequential(_Product(12, 16), nn.ReLU(), _Product(16, 4, bias=False))

    model = make()
    data = [(torch.randn(12), i % 4) for i in range(80)]
    before = state(model)
    result = rankfold.lossless(model, data, size=0.7)
    assert same_state(model, before)
    result.save(tmp_path / "out")
    inputs = torch.randn(3, 12)
    again = rankfold.load(tmp_path / "out", model=make())
    assert torch.equal(again(inputs), result.model(inputs))
    rankfold.export(tmp_path / "out", tmp_path / "dense", to="dense", model=make())
    dense = make()
    dense.load_state_dict(load_file(tmp_path / "dense" / "model.safetensors"))
    torch.testing.assert_close(dense(inputs), result.model(inputs), rtol=1e-4, atol=1e-5)


def test_a_model_that_was_unpacked_is_verified_against_the_users_own(tmp_path: Path) -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv1d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))
    data = [(x, i % 4) for i, x in enumerate(torch.randn(80, 2, 8))]
    result = rankfold.lossless(model, data, size=0.7)
    result.save(tmp_path / "out")
    opened = rankfold.load(tmp_path / "out", model=copy.deepcopy(model))
    found = rankfold.verify(tmp_path / "out", opened, data, original=model)
    assert found.holds and {check.outcome for check in found.checks} <= {"agrees", "not checked"}
