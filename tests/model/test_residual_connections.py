"""What a layer's output is added to, found in one pass, and what a fit makes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import transformers
from torch import Tensor, nn

from rankfold.data.parts import as_part
from rankfold.machine.progress import SilentProgress
from rankfold.model.evaluation_mode import evaluation_mode
from rankfold.model.replace import with_replaced
from rankfold.model.residual_connections import Place, Residual, residual_connections, watch
from rankfold.search import refit
from rankfold.search.refit import fitted_again
from rankfold.tasks.supervised import CausalLM
from tests.search.test_refit import errors_of, factorized, fit
from tests.small_models import tiny_llama, token_windows
from tests.test_families import FAMILIES

WIDTH = 6


class Block(nn.Module):
    """A residual branch, and one of several ways to add it."""

    def __init__(self, add: Callable[[Block, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.first = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 9)
        self.last, self.batch_norm = nn.Linear(9, WIDTH), nn.BatchNorm1d(WIDTH)
        self.gamma = nn.Parameter(torch.linspace(-2.5, 3, WIDTH))
        self.identity = nn.Identity()
        self.add = add

    def forward(self, inputs: Tensor) -> Tensor:
        branch: Tensor = self.last(torch.tanh(self.first(self.norm(inputs))))
        return self.add(self, inputs, branch)


class Net(nn.Module):
    def __init__(self, add: Callable[[Block, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.block, self.head = nn.Linear(4, WIDTH), Block(add), nn.Linear(WIDTH, 3)
        with torch.no_grad():
            self.block.batch_norm.running_mean.copy_(torch.randn(WIDTH))
            self.block.batch_norm.running_var.copy_(torch.rand(WIDTH) + 0.5)
        self.double().eval()

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.head(self.block(self.stem(inputs)))
        return result


LAYERS = ("stem", "block.first", "block.last", "head")


def found(model: nn.Module, rows: int = 20, axis: int = -1) -> dict[str, Residual]:
    torch.manual_seed(1)
    inputs = torch.randn(rows, 4).double()
    layers = dict.fromkeys(LAYERS, axis)
    names = [name for name, _ in model.named_modules()]
    with evaluation_mode(model):
        return residual_connections(model, layers, names, lambda: model(inputs))


ADDITIONS: list[tuple[str, Callable[[Block, Tensor, Tensor], Tensor]]] = [
    ("plain", lambda _, x, y: x + y),
    ("other way round", lambda _, x, y: y + x),
    ("function", lambda _, x, y: torch.add(y, x)),
    ("in place", lambda _, x, y: y.add_(x)),
    ("in place, statement", lambda _, x, y: x.__iadd__(y)),
    ("dropout", lambda b, x, y: x + nn.functional.dropout(y, 0.5, training=b.training)),
    ("relu after it", lambda _, x, y: torch.relu(x + y)),
]


@pytest.mark.parametrize(("name", "add"), ADDITIONS, ids=[name for name, _ in ADDITIONS])
def test_the_stream_that_an_output_is_added_to_is_found(
    name: str, add: Callable[[Block, Tensor, Tensor], Tensor]
) -> None:
    connections = found(Net(add))
    assert list(connections) == ["block.last"]
    assert connections["block.last"].streams in ((Place("stem", None),), (Place("block", 0),))
    assert torch.allclose(connections["block.last"].scale, torch.ones(WIDTH).double())


def test_what_stands_between_output_and_sum_is_measured() -> None:
    net = Net(lambda b, x, y: x + b.gamma * b.batch_norm(y))
    norm = net.block.batch_norm
    scale = net.block.gamma * norm.weight / (norm.running_var + norm.eps).sqrt()  # type: ignore[operator]
    connections = found(net)
    assert torch.allclose(connections["block.last"].scale, scale.double())


def test_a_channel_that_is_left_out_of_the_sum_has_no_scale() -> None:
    net = Net(lambda b, x, y: x + b.gamma * y)
    with torch.no_grad():
        net.block.gamma[2] = 0
    residual = found(net)["block.last"]
    assert residual.scale[2] == 0
    wanted, stream = torch.randn(5, WIDTH), torch.randn(5, WIDTH)
    change = residual.as_output(wanted, stream)
    assert not change[:, 2].any()
    others = [0, 1, 3, 4, 5]
    back = change[:, others] * residual.scale[others].float()
    assert torch.allclose(back, (wanted - stream)[:, others], atol=1e-6)


def _twice_as_much_later(block: Block, inputs: Tensor, branch: Tensor) -> Tensor:
    inputs.mul_(2)  # the stream is not what it was when it was seen
    return inputs + branch


NOT_FOUND: list[tuple[str, Callable[[Block, Tensor, Tensor], Tensor]]] = [
    ("no sum", lambda _, x, y: y),
    ("a product", lambda _, x, y: x * y),
    ("not linear", lambda _, x, y: x + torch.relu(y)),
    ("mixed", lambda _, x, y: x + y.flip(-1)),
    ("known later", lambda b, x, y: b.identity(x.sin()) + y),
    ("never seen", lambda _, x, y: x.sin() + y),
    ("changed before", _twice_as_much_later),
]


@pytest.mark.parametrize(("name", "add"), NOT_FOUND, ids=[name for name, _ in NOT_FOUND])
def test_what_is_no_residual_connection_is_not_taken_for_one(
    name: str, add: Callable[[Block, Tensor, Tensor], Tensor]
) -> None:
    assert not found(Net(add))


def test_too_few_rows_tell_nothing() -> None:
    assert not found(Net(lambda _, x, y: x + y), rows=3)


def test_a_stream_that_is_only_seen_at_a_module_called_twice_is_not_used() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.last = nn.Tanh(), nn.Linear(4, 4)

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.act(inputs)
            result: Tensor = self.act(hidden.sin() * 2) + hidden + 0
            return hidden + self.last(result.cos())

    model = Shared().double()
    with evaluation_mode(model):
        inputs = torch.randn(20, 4).double()
        connections = residual_connections(model, {"last": -1}, ["act"], lambda: model(inputs))
    assert not connections


def test_branches_side_by_side_are_added_to_all_that_is_known_before() -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.other = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, inputs: Tensor) -> Tensor:
            stream = self.stem(inputs)
            return self.other(stream.sin()) + self.one(stream) + stream + 0 * inputs

    torch.manual_seed(6)
    model = Parallel().double().eval()
    inputs = torch.randn(20, 4).double()
    layers = dict.fromkeys(("one", "other"), -1)
    names = [name for name, _ in model.named_modules()]
    with evaluation_mode(model):
        connections = residual_connections(model, layers, names, lambda: model(inputs))
    stem, first = Place("stem", None), Place("other", None)
    assert connections["other"].streams == (stem,)  # it is called before the other branch
    assert connections["one"].streams == (first, stem)

    twin = factorized(model, rank=2, names=["one", "other"])
    names = ["other", "one"]
    with_fit = with_replaced(twin, fit(model, twin, names, list(inputs)).modules)
    assert errors_of(model, with_fit, inputs) < errors_of(model, twin, inputs)


def test_channels_of_a_conv_stand_before_its_positions() -> None:
    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 3, 1)
            self.norm = nn.BatchNorm2d(3)
            nn.init.uniform_(self.norm.weight, 0.5, 2)

        def forward(self, images: Tensor) -> Tensor:
            return images + self.norm(self.last(torch.relu(self.first(images))))

    torch.manual_seed(3)
    model = Conv().eval()
    images = torch.randn(2, 3, 6, 6)
    with evaluation_mode(model):
        connections = residual_connections(
            model, {"last": -3}, ["", "first"], lambda: model(images)
        )
    assert connections["last"].streams == (Place("", 0),)
    scale = model.norm.weight / (1 + model.norm.eps) ** 0.5
    assert torch.allclose(connections["last"].scale.float(), scale, atol=1e-5)


def test_a_linear_whose_channels_are_moved_to_where_a_conv_has_them() -> None:
    class ConvNeXtBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
            self.last, self.gamma = nn.Linear(6, 6), nn.Parameter(torch.linspace(0.5, 2, 6))

        def forward(self, images: Tensor) -> Tensor:
            moved = self.depthwise(images).permute(0, 2, 3, 1)
            return images + (self.gamma * self.last(moved)).permute(0, 3, 1, 2)

    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), ConvNeXtBlock()).double().eval()
    images = torch.randn(9, 3, 6, 6).double()  # positions as many as channels
    block = model[1]
    names = [name for name, _ in model.named_modules()]
    with evaluation_mode(model):
        residual = residual_connections(model, {"1.last": -1}, names, lambda: model(images))[
            "1.last"
        ]
    assert residual.axis == -3
    assert residual.streams in ((Place("0", None),), (Place("1", 0),))
    assert torch.allclose(residual.scale, block.gamma)

    def stream_error(twin: nn.Module) -> float:
        return errors_of(model, twin, images)

    twin = factorized(model, rank=3, names=["1.last"])
    with torch.no_grad():
        twin[0].weight.mul_(0.9)  # an error in the stream that the block may make up for
    with_fit = with_replaced(twin, fit(model, twin, ["1.last"], list(images)).modules)
    assert stream_error(with_fit) < 0.9 * stream_error(twin)


@pytest.mark.parametrize(
    ("family", "ends"),
    [
        ("llama", {"self_attn.o_proj", "mlp.down_proj"}),
        ("bert", {"attention.output.dense", "output.dense"}),
        ("phi", {"self_attn.dense", "mlp.fc2"}),  # side by side
        ("gpt-neox", {"attention.dense", "mlp.dense_4h_to_h"}),
        ("t5", {"SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo"}),
        ("vit", {"o_proj", "mlp.fc2"}),
        ("convnext", {"pwconv2"}),
        ("resnet", {"shortcut.convolution"}),  # called after the branch, whose output it meets
    ],
)
def test_ends_of_residual_branches_are_found_in_released_architectures(
    family: str, ends: set[str]
) -> None:
    made = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, made.model)(getattr(transformers, made.config)(**made.options))
    layers = {
        name: -3 if isinstance(module, nn.Conv2d) else -1
        for name, module in model.eval().named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }
    example = made.data()[0]
    batch = {"input_ids": example} if torch.is_tensor(example) else example
    batch = {key: value[None] for key, value in batch.items()}
    names = [name for name, _ in model.named_modules()]
    with evaluation_mode(model):
        connections = residual_connections(model, layers, names, lambda: model(**batch))
    assert connections
    assert {end for end in ends for name in connections if name.endswith(end)} == ends
    assert all(name.endswith(tuple(ends)) for name in connections)


def test_watching_and_looking_leave_no_hooks_behind() -> None:
    net = Net(lambda _, x, y: x + y)
    seen: list[Place] = []
    places = [Place("block", 0), Place("stem", None), Place("block", "gone")]
    with watch(net, places, lambda place, tensor: seen.append(place)):
        net(torch.randn(2, 4).double())
    assert set(seen) == set(places[:2])
    found(net)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def fitted(names: Sequence[str]) -> tuple[nn.Module, nn.Module, Tensor]:
    """A net and its twin with these layers fitted again, and the inputs they were fitted to."""
    net = Net(lambda b, x, y: x + b.gamma * y)
    torch.manual_seed(4)
    inputs = torch.randn(60, 4).double()
    twin = factorized(net, rank=2, names=["stem", "block.last"])
    return net, with_replaced(twin, fit(net, twin, names, list(inputs)).modules), inputs


def test_a_layer_is_fitted_to_what_puts_the_stream_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refit, "SHARE", 1.0)
    monkeypatch.setattr(refit, "lasting", lambda *args, **kwargs: 1.0)
    net, twin, inputs = fitted(["block.last"])
    with torch.no_grad():
        stream = twin.stem(inputs)  # type: ignore[operator]
        block = twin.block
        hidden = torch.tanh(block.first(block.norm(stream)))  # type: ignore[operator, union-attr]
        wanted = net.block(net.stem(inputs)) - stream  # type: ignore[operator]
        features = torch.cat([hidden @ block.last.right.T, torch.ones(60, 1).double()], 1)  # type: ignore[union-attr]
        # The block's last rows are pivots times coefficients: any combination can be reached.
        best = features @ torch.linalg.lstsq(features, wanted).solution
        assert torch.allclose(block(stream) - stream, best, atol=2e-2)  # type: ignore[operator]


class Deep(nn.Module):
    """Residual blocks one after the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.stem = nn.Linear(4, WIDTH)
        self.blocks = nn.Sequential(*(Block(lambda _, x, y: x + y) for _ in range(6)))
        self.double().eval()

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.blocks(self.stem(inputs))
        return result


def test_streams_come_nearer_than_by_each_output_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Deep()
    names = [f"blocks.{place}.{layer}" for place in range(6) for layer in ("first", "last")]
    twin = factorized(net, rank=4, names=names)
    fitting, others = torch.randn(2, 400, 4).double()

    def error() -> float:
        with_fit = with_replaced(twin, fit(net, twin, names, list(fitting)).modules)
        return errors_of(net, with_fit, others)

    with_streams = error()
    monkeypatch.setattr(refit, "residual_connections", lambda *args: {})
    alone = error()
    assert with_streams < 0.9 * alone < 0.9 * errors_of(net, twin, others)


def test_streams_of_another_shape_than_the_outputs_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def elsewhere(*args: object) -> dict[str, Residual]:
        return {"block.last": Residual((Place("stem", 0),), -1, torch.ones(WIDTH))}

    monkeypatch.setattr(refit, "residual_connections", lambda *args: {})
    plain = fitted(["block.last"])[1].state_dict()
    monkeypatch.setattr(refit, "residual_connections", elsewhere)
    again = fitted(["block.last"])[1].state_dict()
    assert all(torch.equal(plain[key], again[key]) for key in plain)


def test_a_language_model_s_streams_come_nearer_on_other_text() -> None:
    model = tiny_llama()
    blocks = [f"model.layers.{place}." for place in (0, 1)]
    ends = [block + end for block in blocks for end in ("self_attn.o_proj", "mlp.down_proj")]
    names = [block + "mlp.up_proj" for block in blocks] + ends
    twin = factorized(model, rank=12, names=names)
    part = as_part("calibration", token_windows(60, 1))
    fitted = fitted_again(
        model, twin, names, CausalLM(), part, batch_size=None, progress=SilentProgress()
    )
    assert sorted(fitted.residual) == sorted(ends)
    others = torch.stack(token_windows(20, 3))

    def stream_error(other: nn.Module) -> float:
        with torch.no_grad():
            difference = other.model(others)[0] - model.model(others)[0]  # type: ignore[operator, union-attr]
        return float(difference.square().mean())

    with_fit = with_replaced(twin, fitted.modules)
    assert stream_error(with_fit) < 0.95 * stream_error(twin)
