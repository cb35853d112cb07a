"""Products written into one buffer give what the plain way gives, only where nobody looks."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from rankfold.forms import pivoted_product
from rankfold.forms.blocks.modules import RowBlocksLinear
from rankfold.forms.low_rank.modules import LowRankLinear
from tests.cases import normal


@pytest.fixture(autouse=True)
def _few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pivoted_product, "MANY", 0)


SHAPES = [(6,), (1, 6), (0, 6), (3, 6), (2, 3, 6), (2, 0, 6)]


def modules(dtype: torch.dtype, bias: bool) -> list[nn.Module]:
    """One of each module whose outputs are put in order, at a low, a high and the full rank."""
    added = normal(1, 9).to(dtype) if bias else None
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))

    def values(seed: int, *shape: int) -> Tensor:
        return normal(seed, *shape).to(dtype)

    low = [LowRankLinear(values(4, 9 - k, k), values(5, k, 6), added, order) for k in (1, 4, 6)]
    blocks = RowBlocksLinear(values(6, 5, 6), values(7, 2, 3), values(8, 2, 2), order, added)
    return [*low, blocks]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_buffer_gives_what_autograd_can_follow(
    shape: tuple[int, ...], dtype: torch.dtype, bias: bool
) -> None:
    for module in modules(dtype, bias):
        given = normal(9, *shape).to(dtype)
        followed = module(given)  # parameters require gradients
        assert followed.requires_grad
        with torch.no_grad():
            torch.testing.assert_close(module(given), followed.detach())
            strided = given.unsqueeze(-1).expand(*shape, 2)[..., 1]
            torch.testing.assert_close(module(strided), followed.detach())
        with torch.inference_mode():
            torch.testing.assert_close(module(given), followed.detach())


def in_forward_ad(module: nn.Module, given: Tensor) -> Tensor:
    with forward_ad.dual_level():
        found: Tensor = forward_ad.unpack_dual(module(forward_ad.make_dual(given, given))).primal
        return found


FOLLOWED: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "vmap": lambda module, given: torch.func.vmap(module)(given),
    "jvp": lambda module, given: torch.func.jvp(module, (given,), (given,))[0],
    "forward_ad": in_forward_ad,
    "jit.trace": lambda module, given: torch.jit.trace(module, given)(given),
    "export": lambda module, given: torch.export.export(module, (given,)).module()(given),
}


@pytest.mark.filterwarnings("ignore")  # torch's own, of what it calls old
@pytest.mark.parametrize("how", FOLLOWED)
def test_what_follows_the_products_still_can(how: str) -> None:
    for module in modules(torch.float64, bias=True):
        given = normal(9, 3, 6)
        with torch.no_grad():
            torch.testing.assert_close(FOLLOWED[how](module, given), module(given))


def test_autocast_and_another_device_take_the_plain_way() -> None:
    module = modules(torch.float32, bias=False)[0]
    given = normal(9, 3, 6).float()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert module(given).dtype == torch.bfloat16
        assert copy.deepcopy(module).to("meta")(given.to("meta")).shape == (3, 9)


def test_a_gradient_for_the_input_alone_is_followed() -> None:
    module = modules(torch.float64, bias=True)[0].requires_grad_(False)
    given = normal(9, 3, 6).requires_grad_()
    module(given).sum().backward()  # type: ignore[no-untyped-call,unused-ignore]
    assert given.grad is not None
    with torch.no_grad():
        assert pivoted_product.writes_into_a_buffer(9, given, *module.parameters())


def test_few_outputs_take_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    module = modules(torch.float64, bias=True)[0]
    monkeypatch.setattr(pivoted_product, "MANY", 27)
    with torch.no_grad():
        for rows in (0, 1, 2, 3, 4):
            written = pivoted_product.writes_into_a_buffer(
                9, normal(9, rows, 6), *module.parameters()
            )
            assert written == (9 * rows >= 27)


def test_a_wrong_input_is_refused_as_by_a_linear_layer() -> None:
    module = modules(torch.float64, bias=False)[0]
    with torch.no_grad():
        for wrong in (normal(1, 2, 5), normal(1, 2, 6).float()):
            with pytest.raises(RuntimeError):
                module(wrong)
