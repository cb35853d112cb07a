import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import default_collate

import rankfold
from rankfold import Data, InputError
from rankfold.data.parts import Part, as_part
from rankfold.maths.linalg import UNDAMPED
from rankfold.maths.shrinkage import held_out_damping
from rankfold.model.layer_matrix import MatrixLayer
from rankfold.statistics.labels import (
    MEMORISED_SHARE,
    calibration_loss,
    choose_curvature,
    noise_directions,
    sampled_losses,
)
from rankfold.statistics.layer_statistics import LayerStatistics
from rankfold.statistics.passes import halves
from rankfold.statistics.recorder import collect_statistics
from rankfold.statistics.trace import trace
from rankfold.tasks.agreement import Teacher
from rankfold.tasks.losses import TEXT
from rankfold.tasks.supervised import CausalLM, Classification, Regression, UserLoss
from tests.cases import normal
from tests.small_models import (
    CLASSES,
    flags,
    images,
    mlp,
    pair_part,
    same_state,
    seeded,
    state,
    tiny_llama,
    token_windows,
    trained_cnn,
)


def layers_of(model: nn.Module) -> dict[str, MatrixLayer]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def double(part: Part) -> Part:
    examples = [(x.double(), label) for x, label in part.examples]
    return as_part(part.name, examples)


def seen_in_turn(examples: list[Any]) -> Part:
    """A part whose examples a pass sees in this order: those of the first half come first."""
    middle = len(examples) // 2
    first, second = halves(EXACT.name, len(examples))
    order: list[Any] = [None] * len(examples)
    for places, some in ((first, examples[:middle]), (second, examples[middle:])):
        for place, example in zip(places, some, strict=True):
            order[place] = example
    return as_part("calibration", order)


def image_part(count: int, seed: int = 0) -> Part:
    return double(as_part("calibration", list(images(count, seed))))


def collect(
    model: nn.Module, part: Part, curvature: str | None = "empirical", **settings: object
) -> dict[str, LayerStatistics]:
    layers = settings.pop("layers", None) or layers_of(model)
    task = settings.pop("task", None) or Classification()
    return collect_statistics(model, task, part, layers, curvature=curvature, **settings)


def float64_cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


EXACT = UserLoss(float64_cross_entropy)


class ByHand:
    """A, B and gradients of one layer from one example at a time, through torch.autograd.

    The layer's call is replaced by one that adds a zero ``shift`` of the output's shape: the
    gradient of the shift is g, and the input is seen as it comes.
    """

    def __init__(self, model: nn.Module, name: str, part: Part, rows: Callable[..., Tensor]):
        layer = model.get_submodule(name)
        out, width = len(layer.weight), layer.weight[0].numel()
        self.a, self.b = torch.zeros(width, width).double(), torch.zeros(out, out).double()
        self.halves = [torch.zeros(out, width).double() for _ in range(2)]
        count, positions, middle = len(part.examples), 0, len(part.examples) // 2
        for index, (values, label) in enumerate(part.examples):
            seen: dict[str, Tensor] = {}

            def shifted(_: object, args: tuple[Tensor], output: Tensor, seen=seen) -> Tensor:
                seen["x"] = args[0].detach()
                seen["shift"] = torch.zeros_like(output).requires_grad_()
                return output + seen["shift"]

            handle = layer.register_forward_hook(shifted)
            loss = functional.cross_entropy(model(values[None]), torch.as_tensor(label)[None])
            handle.remove()
            shift, gradient = torch.autograd.grad(loss, [seen["shift"], layer.weight])
            for x, g in zip(*rows(layer, seen["x"], shift), strict=True):
                self.a += torch.outer(x, x)
                self.b += torch.outer(g, g)
                positions += 1
            self.halves[index % 2 == 0] += gradient.flatten(1)
        self.a /= positions
        self.b /= count
        self.halves = [self.halves[0] / middle, self.halves[1] / (count - middle)]


def linear_rows(_: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])


def conv_rows(layer: nn.Conv2d, x: Tensor, g: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Patches by indexing, position by position; zero padding only."""
    (ph, pw), (sh, sw), (dh, dw) = layer.padding, layer.stride, layer.dilation
    kh, kw = layer.kernel_size
    padded = functional.pad(x[0], (pw, pw, ph, ph))
    patches, gradients = [], []
    for i in range(g.shape[2]):
        for j in range(g.shape[3]):
            top, left = i * sh, j * sw
            patch = padded[
                :, top : top + (kh - 1) * dh + 1 : dh, left : left + (kw - 1) * dw + 1 : dw
            ]
            patches.append(patch.flatten())
            gradients.append(g[0, :, i, j])
    return patches, gradients


def check(found: LayerStatistics, expected: ByHand) -> None:
    torch.testing.assert_close(found.input_gram, expected.a, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.output_gram, expected.b, rtol=1e-10, atol=1e-12)
    for half, wanted in zip(found.gradients, expected.halves, strict=True):
        torch.testing.assert_close(half, wanted, rtol=1e-10, atol=1e-12)
    mean = (expected.halves[0] + expected.halves[1]) / 2
    torch.testing.assert_close(found.gradient, mean, rtol=1e-10, atol=1e-12)


def test_statistics_of_linears_are_those_of_single_examples() -> None:
    model, part = mlp().double(), double(pair_part(11))
    found = collect(model, part, task=EXACT)
    for name in layers_of(model):
        check(found[name], ByHand(model, name, part, linear_rows))


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (2, 3), "stride": (2, 1), "padding": (0, 2)},
        {"kernel_size": 2, "stride": 3, "padding": 1, "dilation": 2},
    ],
    ids=str,
)
def test_statistics_of_convs_are_those_of_single_patches(options: dict[str, object]) -> None:
    conv = nn.Conv2d(3, 4, **options)
    head = nn.Sequential(nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, CLASSES))
    model, part = nn.Sequential(conv, *head).double(), image_part(5)
    check(collect(model, part, task=EXACT)["0"], ByHand(model, "0", part, conv_rows))


def test_the_quadratic_form_of_a_conv_counts_its_positions_in_b() -> None:
    """A conv of image size has one position: A and B are those of a Linear."""
    conv = nn.Conv2d(3, 4, 8).double()
    linear = nn.Linear(192, 4).double()
    linear.weight.data = conv.weight.data.flatten(1)
    linear.bias.data = conv.bias.data
    tail = nn.Linear(4, CLASSES).double()
    part = image_part(6)
    as_conv = collect(nn.Sequential(conv, nn.Flatten(), tail), part)["0"]
    as_linear = collect(nn.Sequential(nn.Flatten(), linear, tail), part)["1"]
    torch.testing.assert_close(as_conv.input_gram, as_linear.input_gram)
    torch.testing.assert_close(as_conv.output_gram, as_linear.output_gram)
    torch.testing.assert_close(as_conv.gradient, as_linear.gradient)


def test_statistics_of_a_language_model_count_tokens() -> None:
    model = tiny_llama().double()
    part = as_part("calibration", token_windows(6))
    name = "model.layers.0.mlp.up_proj"
    layer = model.get_submodule(name)
    found = collect_statistics(model, CausalLM(), part, {name: layer}, curvature="empirical")[name]
    tokens = torch.stack(part.examples)
    seen: dict[str, Tensor] = {}
    handle = layer.register_forward_hook(lambda _, args, output: seen.update(x=args[0], y=output))
    logits = model(tokens).logits.float()
    handle.remove()
    loss = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
    )
    g, gradient = torch.autograd.grad(loss, [seen["y"], layer.weight])
    x = seen["x"].detach().flatten(0, 1)
    terms = 6 * 11
    torch.testing.assert_close(found.input_gram, x.T @ x / (6 * 12))
    torch.testing.assert_close(found.output_gram, g.flatten(0, 1).T @ g.flatten(0, 1) / terms)
    torch.testing.assert_close(found.gradient, gradient / terms)


@pytest.mark.parametrize("curvature", ["empirical", "sampled", None])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_batch_size_does_not_matter(curvature: str | None, batch_size: int) -> None:
    model, part = trained_cnn().double(), image_part(13)
    one = collect(model, part, curvature, batch_size=5, seed=4)
    other = collect(model, part, curvature, batch_size=batch_size, seed=4)
    for name, stats in one.items():
        torch.testing.assert_close(stats.input_gram, other[name].input_gram)
        if curvature:
            torch.testing.assert_close(stats.output_gram, other[name].output_gram)
            torch.testing.assert_close(stats.gradients, other[name].gradients)


def test_without_curvature_there_is_no_backward_pass() -> None:
    found = collect(mlp(), pair_part(8), curvature=None)
    assert all(s.output_gram is None and s.gradients is None for s in found.values())
    with pytest.raises(ValueError, match="without gradients"):
        _ = found["first"].gradient


@pytest.mark.parametrize("curvature", ["empirical", "sampled"])
def test_without_gradients_the_grams_are_the_same(curvature: str) -> None:
    model, part = trained_cnn().double(), image_part(13)
    whole = collect(model, part, curvature, seed=4)
    found = collect(model, part, curvature, seed=4, gradients=False)
    assert list(found) == list(whole)
    for name, stats in found.items():
        assert stats.gradients is None
        torch.testing.assert_close(stats.input_gram, whole[name].input_gram)
        torch.testing.assert_close(stats.output_gram, whole[name].output_gram)


@pytest.mark.parametrize("gradients", [True, False])
def test_layers_behind_a_cut_graph_get_gradients_too(gradients: bool) -> None:
    class Cut(nn.Module):
        """Only ``last`` depends on what ``first`` gives; ``beside`` reads it cut off."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.beside = nn.Linear(6, 6), nn.Linear(6, CLASSES)
            self.last = nn.Linear(6, CLASSES)

        def forward(self, values: Tensor) -> Tensor:
            hidden = self.first(values)
            return self.last(hidden) + self.beside(hidden.detach())

    model, part = Cut().double(), double(pair_part(8))
    found = collect(model, part, gradients=gradients)
    assert all(stats.output_gram.diagonal().min() > 0 for stats in found.values())
    torch.testing.assert_close(found["last"].output_gram, found["beside"].output_gram)


def test_half_precision_models_get_grams_in_float32() -> None:
    model, part = mlp(), pair_part(8)
    exact, half = collect(model, part), collect(model.bfloat16(), part)
    for name, stats in half.items():
        assert stats.input_gram.dtype == stats.output_gram.dtype == torch.float32
        assert stats.gradient.dtype == torch.float32
        torch.testing.assert_close(
            stats.input_gram, exact[name].input_gram, rtol=0.05, atol=0.02, check_dtype=False
        )


# Sampled labels


def test_the_sampled_curvature_depends_on_the_seed_alone() -> None:
    model, part = mlp().double(), double(pair_part(30))
    grams = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(grams))
        grams.append(collect(model, part, "sampled", seed=seed)["last"].output_gram)
    assert torch.equal(grams[0], grams[1])
    assert not torch.allclose(grams[0], grams[2])


def test_the_sampled_curvature_draws_from_the_smoothed_predictions() -> None:
    """For the last layer g = softmax - onehot(drawn): its mean Gram is known."""
    model, part = mlp().double(), double(pair_part(4000))
    found = collect(model, part, "sampled")["last"]
    with torch.no_grad():
        p = model(torch.stack([x for x, _ in part.examples])).softmax(-1)
    drawn = 0.9 * p + 0.1 / CLASSES
    expected = torch.zeros(CLASSES, CLASSES).double()
    for c in range(CLASSES):
        g = p - functional.one_hot(torch.tensor(c), CLASSES)
        expected += (drawn[:, c, None] * g).T @ g / len(p)
    torch.testing.assert_close(found.output_gram, expected, rtol=0.15, atol=0.01)


def test_gradients_are_those_of_the_labels_also_when_curvature_is_sampled() -> None:
    model, part = mlp().double(), double(pair_part(10))
    empirical, sampled = collect(model, part), collect(model, part, "sampled")
    for name in empirical:
        torch.testing.assert_close(empirical[name].gradients, sampled[name].gradients)
        assert not torch.allclose(empirical[name].output_gram, sampled[name].output_gram)


def test_the_sampled_curvature_needs_logits() -> None:
    task = UserLoss(lambda model, batch: model(batch[0]).square().sum(1))
    model = mlp()
    with pytest.raises(InputError, match="needs logits"):
        collect_statistics(model, task, pair_part(8), layers_of(model), curvature="sampled")


# Shared inputs


class Branches(nn.Module):
    """``q`` and ``k`` see the same tensor; ``v`` sees it too unless an example says otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, CLASSES) for _ in range(3))

    def forward(self, values: Tensor) -> Tensor:
        hidden = values if bool((values[:, 0] > 50).all()) else 2 * values
        first = values.tanh()
        other = first if bool((values[:, 0] < 50).all()) else hidden
        return self.q(first) + self.k(first) + self.v(other)


def plain_gram(inputs: Tensor) -> Tensor:
    return inputs.T @ inputs / len(inputs)


def test_layers_with_one_input_share_one_gram() -> None:
    model = seeded(0, Branches).double()
    part = double(pair_part(9))
    found = collect(model, part)
    assert found["q"].shares_input_with is None
    assert found["k"].shares_input_with == found["v"].shares_input_with == "q"
    assert found["k"].input_gram is found["v"].input_gram is found["q"].input_gram
    expected = plain_gram(torch.stack([x for x, _ in part.examples]).tanh())
    torch.testing.assert_close(found["k"].input_gram, expected)


@pytest.mark.parametrize("order", ["same first", "different first"])
def test_layers_whose_inputs_part_later_stop_sharing(order: str) -> None:
    model = seeded(0, Branches).double()
    same = double(pair_part(6, seed=1)).examples
    different = [(x + torch.eye(6)[0] * 100, y) for x, y in double(pair_part(6, seed=2)).examples]
    examples = [*same, *different] if order == "same first" else [*different, *same]
    found = collect(model, seen_in_turn(examples), batch_size=2)
    assert found["k"].shares_input_with == "q"
    assert found["v"].shares_input_with is None
    x_same, x_different = (torch.stack([x for x, _ in part]) for part in (same, different))
    first = torch.cat([x_same, x_different]).tanh()
    other = torch.cat([x_same.tanh(), x_different])
    torch.testing.assert_close(found["q"].input_gram, plain_gram(first))
    torch.testing.assert_close(found["v"].input_gram, plain_gram(other))


@given(count=st.integers(1, 50), task=st.sampled_from([*TEXT, "classification", "teacher"]))
def test_halves_are_disjoint_and_all_there_is(count: int, task: str) -> None:
    first, second = halves(task, count)
    assert sorted([*first, *second]) == [*range(count)]
    assert len(second) - len(first) in (0, 1)


def test_each_half_of_a_sorted_set_has_every_class_and_each_half_of_a_text_its_own_documents() -> (
    None
):
    classes = [place // 10 for place in range(100)]
    assert all({classes[place] for place in half} == {*range(10)} for half in halves("", 100))
    first, second = halves("causal-lm", 100)
    assert max(first) < min(second)


def halves_apart(model: nn.Module, part: Part) -> list[dict[str, LayerStatistics]]:
    """Statistics of both halves, each from a pass of its own, with labels of the data."""
    places = halves(EXACT.name, len(part.examples))
    return [collect(model, part.take(half), task=EXACT) for half in places]


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_grams_lack_what_the_second_half_shows_of_the_first(batch_size: int) -> None:
    model, part = trained_cnn().double(), image_part(30)
    found = collect(model, part, task=EXACT, batch_size=batch_size)
    first, second = halves_apart(model, part)
    for name, layer in found.items():
        a, b = (
            held_out_damping(getattr(first[name], gram), getattr(second[name], gram))
            for gram in ("input_gram", "output_gram")
        )
        assert layer.lacking == pytest.approx((a, b))
    assert max(layer.lacking.input for layer in found.values()) > 0


def test_layers_with_one_input_share_what_it_lacks_until_they_part() -> None:
    model = seeded(0, Branches).double()
    same = double(pair_part(8, seed=1)).examples
    different = [(x + torch.eye(6)[0] * 100, y) for x, y in double(pair_part(4, seed=2)).examples]
    part = seen_in_turn([*same, *different])
    found = collect(model, part, task=EXACT, batch_size=2)
    first, second = halves_apart(model, part)
    assert found["v"].shares_input_with is None
    for name in ("q", "k", "v"):
        expected = held_out_damping(first[name].input_gram, second[name].input_gram)
        assert found[name].lacking.input == pytest.approx(expected)
    assert found["v"].lacking.input != found["q"].lacking.input


def test_grams_lack_what_the_users_own_examples_lack() -> None:
    model, part = seeded(0, Branches).double(), double(pair_part(12))
    prior = as_part("own text", double(pair_part(30, seed=7)).examples)
    alone = collect(model, part, task=EXACT)
    both = collect(model, part, task=EXACT, prior=prior)
    assert [layer.lacking for layer in both.values()] == [layer.lacking for layer in alone.values()]


@pytest.mark.parametrize("count", [1, 2])
def test_one_example_has_no_halves_to_compare(count: int) -> None:
    found = collect(mlp().double(), double(pair_part(count)), task=EXACT)
    assert all((layer.lacking == UNDAMPED) == (count == 1) for layer in found.values())


def test_without_curvature_only_inputs_lack_anything() -> None:
    found = collect(mlp().double(), double(pair_part(8)), curvature=None)
    assert all(layer.lacking.output == 0 for layer in found.values())
    assert any(layer.lacking.input > 0 for layer in found.values())


def test_a_tensor_changed_in_place_between_two_layers_is_not_shared() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, CLASSES), nn.Linear(6, CLASSES)

        def forward(self, values: Tensor) -> Tensor:
            values = values.clone()
            with torch.no_grad():
                first = self.one(values)
                values.mul_(3)
            return first + self.two(values)

    found = collect(InPlace().double(), double(pair_part(8)), curvature=None)
    assert found["two"].shares_input_with is None
    torch.testing.assert_close(found["two"].input_gram, 9 * found["one"].input_gram)


def test_convs_that_unfold_one_input_differently_do_not_share() -> None:
    class Convs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.near = nn.Conv2d(3, CLASSES, 3, padding=1)
            self.twin = nn.Conv2d(3, CLASSES, 3, padding=1)
            self.far = nn.Conv2d(3, CLASSES, 3, padding=2, dilation=2)

        def forward(self, pixels: Tensor) -> Tensor:
            return (self.near(pixels) + self.twin(pixels) + self.far(pixels)).mean((2, 3))

    model, part = Convs().double(), image_part(4)
    found = collect(model, part, task=EXACT)
    assert found["twin"].shares_input_with == "near"
    assert found["far"].shares_input_with is None
    check(found["far"], ByHand(model, "far", part, conv_rows))


def test_a_layer_used_twice_sums_over_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.again, self.last = nn.Linear(6, 6), nn.Linear(6, CLASSES)

        def forward(self, values: Tensor) -> Tensor:
            return self.last(self.again(self.again(values).tanh()).tanh())

    model, part = Twice().double(), double(pair_part(7))
    found = collect(model, part)["again"]
    x = torch.stack([x for x, _ in part.examples])
    y = torch.tensor([y for _, y in part.examples])
    middle = model.again(x).tanh()
    torch.testing.assert_close(found.input_gram, plain_gram(torch.cat([x, middle]).detach()))
    # The same network of two layers with equal weights: its gradients add.
    copy = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), model.last)
    copy = copy.double()
    for at in (0, 2):
        copy[at].load_state_dict(model.again.state_dict())
    apart = collect(copy, part, layers={"0": copy[0], "2": copy[2]})
    torch.testing.assert_close(found.output_gram, apart["0"].output_gram + apart["2"].output_gram)
    torch.testing.assert_close(found.gradient, apart["0"].gradient + apart["2"].gradient)
    assert torch.isfinite(functional.cross_entropy(copy(x), y))


def test_a_layer_called_for_some_batches_only_counts_those() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.rare = nn.Linear(6, CLASSES), nn.Linear(6, CLASSES)

        def forward(self, values: Tensor) -> Tensor:
            outputs = self.always(values)
            return outputs + self.rare(values) if bool((values[:, 0] > 50).all()) else outputs

    model = Gated().double()
    shifted = [(x + 100 * torch.eye(6)[0], y) for x, y in double(pair_part(4)).examples]
    part = seen_in_turn([*double(pair_part(4, seed=9)).examples, *shifted])
    found = collect(model, part, batch_size=2)
    x = torch.stack([x for x, _ in shifted])
    torch.testing.assert_close(found["rare"].input_gram, plain_gram(x))
    torch.testing.assert_close(found["rare"].gradients[0], torch.zeros(CLASSES, 6).double())
    assert found["rare"].shares_input_with is None
    assert found["rare"].lacking == UNDAMPED  # only one half reached it
    assert found["always"].lacking.input > 0


def test_a_layer_that_gets_no_gradient_is_silent() -> None:
    model = mlp()
    nn.init.zeros_(model.last.weight)
    found = collect(model, pair_part(8))
    assert found["second"].is_silent
    assert not found["last"].is_silent


# The model comes back as it was


def with_flags(model: nn.Module) -> nn.Module:
    """Training with an eval BatchNorm, one frozen weight, one gradient and one hook there."""
    model.train()
    model.features[1].eval()
    model.features[3].weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    model.head.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("curvature", ["empirical", "sampled", None])
def test_the_model_comes_back_as_it_was(
    error: type[BaseException] | None, curvature: str | None
) -> None:
    model = with_flags(trained_cnn())
    calls = Counter[str]()

    def fail_later(*_: object) -> None:
        calls["pass"] += 1
        if error is not None and calls["pass"] == 3:
            raise error("in a forward pass")

    model.features[5].register_forward_hook(fail_later)
    part = as_part("calibration", list(images(10, 0)))
    before, before_flags = state(model), flags(model)
    grad = model.head.weight.grad.clone()
    if error is None:
        collect(model, part, curvature, batch_size=2)
    else:
        told = InputError if issubclass(error, Exception) else error
        with pytest.raises(told, match="in a forward pass"):
            collect(model, part, curvature, batch_size=2)
    assert flags(model) == before_flags
    assert same_state(model, before)
    assert torch.equal(model.head.weight.grad, grad)
    assert torch.is_grad_enabled()


def test_statistics_are_those_of_eval_mode() -> None:
    part = as_part("calibration", list(images(10, 0)))
    training, evaluating = trained_cnn().train(), trained_cnn().eval()
    one, other = collect(training, part), collect(evaluating, part)
    for name in one:
        assert torch.equal(one[name].output_gram, other[name].output_gram)


def test_frozen_weights_still_get_gradients() -> None:
    frozen = mlp().requires_grad_(False)
    one, other = collect(frozen, pair_part(8)), collect(mlp(), pair_part(8))
    assert torch.equal(one["first"].gradient, other["first"].gradient)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_a_loss_that_is_not_finite_is_refused() -> None:
    model = mlp()
    examples = [*pair_part(7).examples, (torch.full((6,), math.nan), 0)]
    with pytest.raises(InputError, match="NaN or infinite"):
        collect(model, as_part("calibration", examples))


def test_gradients_that_are_not_finite_are_refused_with_their_layer() -> None:
    """The root of 0 is finite, and its slope is not."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    task = UserLoss(lambda model, batch: (0 * model(batch[0])).sum(1).sqrt())
    with pytest.raises(InputError, match=r"output gradients of the layer 0\b.*float32"):
        collect_statistics(
            model, task, pair_part(8), dict(model.named_children()), curvature="empirical"
        )


def test_inputs_that_hardly_differ_and_are_0_for_the_most_part() -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(960, 8), nn.ReLU(), nn.Linear(8, 2))
    rows = torch.rand(960, generator=generator) + 1e-6 * torch.randn(80, 960, generator=generator)
    rows[:, torch.randperm(960, generator=generator)[:605]] = 0
    result = rankfold.lossless(model, [(row, i % 2) for i, row in enumerate(rows)], size=0.5)
    assert result.ratio <= 0.5


# What a forward pass shows


def test_trace_counts_rows_and_flops_of_one_example() -> None:
    found = trace(trained_cnn(), Classification(), as_part("calibration", list(images(4, 0))))
    assert found.rows == {
        "features.0": 64,
        "features.3": 16,
        "features.5": 16,
        "head": 1,
    }
    assert found.flops["features.0"] == 2 * 64 * 8 * 27
    assert found.flops["head"] == 2 * 64 * CLASSES


def test_trace_restores_flags_also_when_the_model_fails() -> None:
    model = with_flags(trained_cnn())
    before = flags(model)
    bad = as_part("calibration", [(torch.zeros(5, 8, 8), 0)])
    with pytest.raises(InputError, match="can't run on the data"):
        trace(model, Classification(), bad)
    assert flags(model) == before


def test_calibration_loss_is_the_mean_loss_and_counts_logits() -> None:
    model, part = mlp(), pair_part(40)
    values, labels = default_collate(part.examples)
    found, classes = calibration_loss(model, Classification(), part)
    assert found == pytest.approx(functional.cross_entropy(model(values), labels).item())
    assert classes == CLASSES
    custom = UserLoss(lambda m, batch: m(batch[0]).square().sum(1))
    assert calibration_loss(model, custom, part)[1] is None


def test_calibration_loss_is_of_all_classes_where_examples_are_listed_by_class() -> None:
    values = torch.randn(3000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    examples = [(value, place * 3 // 3000) for place, value in enumerate(values)]
    part = as_part("calibration", examples)
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 3))
    nn.init.zeros_(model[1].weight)
    model[1].bias.data = torch.tensor([9.0, 0.0, 0.0])  # knows the first class only
    found, _ = calibration_loss(model, Classification(), part)
    assert found == pytest.approx(6, rel=0.01)


def test_calibration_loss_refuses_nan() -> None:
    model = mlp()
    nn.init.constant_(model.last.bias, math.nan)
    with pytest.raises(InputError, match="nan"):
        calibration_loss(model, Classification(), pair_part(8))


@pytest.mark.parametrize(
    ("loss", "classes", "labels", "expected"),
    [
        (1.0, 10, True, "empirical"),
        (MEMORISED_SHARE * math.log(10), 10, True, "empirical"),
        (MEMORISED_SHARE * math.log(10) - 1e-6, 10, True, "sampled"),
        (0.0, 2, True, "sampled"),
        (1.0, 10, False, "sampled"),
        (0.0, None, True, "empirical"),
        (0.0, None, False, "empirical"),
    ],
)
def test_choose_curvature(loss: float, classes: int | None, labels: bool, expected: str) -> None:
    assert choose_curvature(loss, classes, labels) == expected


def test_layers_keep_the_order_and_names_asked_for() -> None:
    model = mlp()
    asked: Mapping[str, MatrixLayer] = {"last": model.last, "first": model.first}
    assert set(collect(model, pair_part(8), layers=asked)) == {"first", "last"}


def test_curvature_of_a_squared_error_is_that_of_the_model_not_of_its_residuals() -> None:
    """B of a linear model under a mean squared error is 2 / d I exactly, whatever the labels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4)).double()
    examples = [(x, y) for x, y in zip(normal(1, 9000, 3), 50 * normal(2, 9000, 4), strict=True)]
    part = as_part("calibration", examples)
    loss, classes = calibration_loss(model, Regression(), part)
    assert choose_curvature(loss, classes, labels=True) == "sampled"
    layers = {"0": model[0]}
    found = collect_statistics(model, Regression(), part, layers, curvature="sampled")["0"]
    expected = torch.eye(4, dtype=torch.float64) * 2 / 4
    torch.testing.assert_close(found.output_gram, expected, atol=0.03, rtol=0)


class Features(nn.Module):
    """Sixty features of six inputs, compared with the original's: a squared distance."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 12), nn.Linear(12, 60)

    def forward(self, values: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(values)))


def unlabelled(count: int) -> Part:
    return as_part("calibration", [values for values, _ in pair_part(count).examples])


def test_the_curvature_of_a_squared_distance_nears_its_own_with_more_directions() -> None:
    model = seeded(1, Features).double()
    part = as_part("calibration", [values.double() for values in unlabelled(40).examples])
    inputs = torch.stack([*part.examples])
    weight = model.get_submodule("outer").weight.detach()
    with torch.no_grad():
        norms = model(inputs).square().sum(1)
        slopes = 1 - torch.tanh(model.get_submodule("inner")(inputs)).square()
        back = (
            slopes[:, None, :] * (2 * weight.T @ weight / norms[:, None, None]) * slopes[:, :, None]
        )
    exact = back.mean(0)  # of 1/2 |f - f0|^2 / |f0|^2 times 2, at the inner layer's outputs

    def error(directions: int) -> float:
        generator = torch.Generator().manual_seed(0)
        found = torch.zeros_like(exact)
        task = Teacher([model], part.collate(part.examples[:1]))
        hidden: list[Tensor] = []
        hook = model.get_submodule("inner").register_forward_hook(
            lambda _layer, _inputs, output: hidden.append(output)
        )
        result = task.batch_loss(model, part.collate(part.examples))
        hook.remove()
        for loss in sampled_losses(result, generator, directions):
            (gradient,) = torch.autograd.grad(loss, hidden, retain_graph=True)
            found += gradient.T @ gradient / len(inputs)
        return float((found - exact).norm() / exact.norm())

    assert error(4000) < 0.02
    assert error(16) < error(1)


@pytest.mark.parametrize("count", [40, 700, 2048])
def test_the_fewer_examples_the_more_directions_of_noise(count: int) -> None:
    """What a pass finds is what so many directions have of each example."""
    model = seeded(1, Features)
    part = unlabelled(count)
    task = Teacher([model], part.collate(part.examples[:1]))
    layers = layers_of(model)
    found = collect_statistics(model, task, part, layers, curvature="sampled", batch_size=64)
    places = [place for half in halves(task.name, count) for place in half]
    batch = part.collate([part.examples[place] for place in places])
    generator = torch.Generator().manual_seed(0)
    gram = torch.zeros(12, 12)
    outputs: list[Tensor] = []
    layers["inner"].register_forward_hook(lambda _layer, _inputs, out: outputs.append(out))
    expected = {40: 4, 700: 2, 2048: 1}[count]
    assert noise_directions(count) == expected
    for loss in sampled_losses(task.batch_loss(model, batch), generator, expected):
        (gradient,) = torch.autograd.grad(loss, outputs[:1], retain_graph=True)
        gram += gradient.T @ gradient / count
    torch.testing.assert_close(found["inner"].output_gram, gram, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_noise_does_not_depend_on_the_batch(batch_size: int) -> None:
    model, part = seeded(1, Features), unlabelled(21)
    task = Teacher([model], part.collate(part.examples[:1]))
    one, other = (
        collect_statistics(
            model, task, part, layers_of(model), curvature="sampled", batch_size=size
        )
        for size in (5, batch_size)
    )
    for name, stats in one.items():
        torch.testing.assert_close(stats.output_gram, other[name].output_gram)


def test_a_teacher_has_a_curvature_though_its_gradient_is_zero() -> None:
    model = mlp()
    part = pair_part(200)
    task = Teacher([model], part.collate(part.examples[:1]))
    loss, classes = calibration_loss(model, task, part)
    assert loss == 0 and choose_curvature(loss, classes, labels=True) == "sampled"
    layers = {"last": model.last}
    found = collect_statistics(model, task, part, layers, curvature="sampled")["last"]
    assert float(found.gradient.norm()) < 1e-6
    values = torch.stack([x for x, _ in part.examples])
    with torch.no_grad():
        p = model(values).softmax(-1)
    hessian = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(0)
    torch.testing.assert_close(found.output_gram.float(), hessian, atol=0.04, rtol=0)


# Calls by keyword


class ByName(nn.Module):
    """Calls every kind of layer with its input given by name, as torch's layers allow."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.conv = nn.Conv2d(1, 8, 3, padding=1, groups=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.inner = nn.Linear(8, 48)
        self.outer = nn.Linear(48, 20)
        self.by_name = True

    def forward(self, tokens: Tensor) -> Tensor:
        def call(layer: nn.Module, values: Tensor, **kwargs: Any) -> Tensor:
            found = layer(input=values, **kwargs) if self.by_name else layer(values, **kwargs)
            return cast("Tensor", found)

        hidden = call(self.words, tokens).view(len(tokens), 1, -1, 16)
        hidden = call(self.grouped, call(self.conv, hidden).relu()).relu()
        side = [2 * size for size in hidden.shape[-2:]]
        hidden = call(self.up, hidden, output_size=side).relu().mean((2, 3))
        return call(self.outer, call(self.inner, hidden).relu())


def test_layers_that_are_called_by_keyword_are_seen_and_replaced() -> None:
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(20, (90, 4), generator=generator)
    pairs = [(row, int(row.sum() % 20)) for row in tokens]
    data = Data(pairs[:40], pairs[40:60], pairs[60:])
    models = [seeded(5, ByName) for _ in range(2)]
    models[1].by_name = False
    by_name, by_place = (
        rankfold.lossless(model, data, size=0.6, embeddings=True, task="classification")
        for model in models
    )
    assert same_state(by_name.model, state(by_place.model))
    assert len(by_name.report["layers"]) >= 5
    assert any(entry["rank"] is not None for entry in by_name.report["layers"])
    torch.testing.assert_close(by_name.model(tokens), by_place.model(tokens))
