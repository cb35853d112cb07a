"""From the user's model to one whose matrices all stand in a Linear or Conv2d of their own.

Wrappers around the whole are taken off; layers that pack several matrices, or store one in another
way, are replaced by a composition of plain ones that computes the same (``unpacked_modules``).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from rankfold.errors import InputError
from rankfold.model.computed_weights import baked, shallow_copy, weight_hooks
from rankfold.model.copied import copied
from rankfold.model.find_layers import groups_reason, plain_kind
from rankfold.model.of_user import bare_copy, carry_over, hooked, own_behaviour
from rankfold.model.replace import put_modules
from rankfold.model.stock_layers import empty
from rankfold.model.transformers_layers import unpack_transformers_layer
from rankfold.model.unpacked_modules import (
    RedirectedCall,
    UnpackedAttention,
    UnpackedConv1d,
    UnpackedConvTranspose2d,
    UnpackedGroups,
    UnpackedRule,
    without_parameters_of_weight,
)
from rankfold.model.unsuitable import refuse_unsuitable

# Operators of torch that an affine map of the last dimension is made of.
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
_SUMS = {"add", "add_"}
_VIEWS = {
    "t", "transpose", "permute", "view", "_unsafe_view", "expand", "unsqueeze", "squeeze", "detach",
    "alias",
}  # fmt: skip

LayerT = TypeVar("LayerT", bound=nn.Module)

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


@dataclass(frozen=True)
class Unpacked:
    """A model ready to be looked at layer by layer.

    Attributes:
        given: The user's model without the wrappers around it.
        model: The same function from plain layers: ``given`` itself where nothing had to change,
            else a copy that shares with it the parameters that are the same.
        names: Modules of ``given`` that were replaced, by name, outer ones first.
    """

    given: nn.Module
    model: nn.Module
    names: list[str]


def unpack(model: nn.Module) -> Unpacked:
    """Unwrap and unpack a model; the user's own stays as it is.

    Raises:
        InputError: It has adapters, quantized or sharded weights; the layer is named.
    """
    given = unwrapped(model)
    refuse_unsuitable(given)
    if any(t.is_inference() for t in (*given.parameters(), *given.buffers())):
        # Tensors made in inference mode can't take part in autograd; clones made here can.
        given = copy.deepcopy(given, _clones(given))
    compiled = any(module._compiled_call_impl is not None for module in given.modules())
    twin = given
    names: list[str] = []
    while replaced := dict(_unpackable(twin)):
        memo: dict[int, Any] = {id(parameter): parameter for parameter in twin.parameters()}
        olds = {name: twin.get_submodule(name) for name in replaced}
        memo |= {id(olds[name]): module for name, module in replaced.items()}
        twin = copied(twin, memo)
        for name, module in replaced.items():
            carry_over(name, olds[name], module, partial(copy.deepcopy, memo=memo))
        names += replaced
    if twin is given:
        of_given = copied(given, {id(parameter): parameter for parameter in given.parameters()})
        twin = of_given if compiled else given  # a copy drops what was compiled in place
    return Unpacked(given, twin, names)


def unpack_named(model: nn.Module, names: Iterable[str], where: str) -> dict[str, nn.Module]:
    """Unpack modules of ``model`` itself, in the order given.

    Returns:
        The modules that stood there, by name, for ``put_back``.

    Raises:
        InputError: One of them is missing or can't be unpacked, so the model is another one.
    """
    before: dict[str, nn.Module] = {}
    for name in names:
        try:
            module = model.get_submodule(name)
        except AttributeError:
            module = None
        plain = None if module is None else _plain(module)
        if plain is None:
            kind = "no such module" if module is None else f"a {type(module).__name__}"
            put_back(model, before)
            raise InputError(
                f"{where} was made from another model: its module {name} is {kind} in the given "
                "model, which can't be unpacked."
            )
        before.setdefault(name, put_modules(model, {name: plain})[name])
    return before


def put_back(model: nn.Module, before: Mapping[str, nn.Module]) -> None:
    """Undo ``unpack_named``, given what it returned."""
    for name in reversed(list(before)):
        put_modules(model, {name: before[name]})


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile`` and data-parallel wrappers."""
    while True:
        inner = getattr(model, "module", None) if isinstance(model, _WRAPPERS) else _compiled(model)
        if inner is None:
            return model
        model = inner


def _compiled(module: nn.Module) -> nn.Module | None:
    """What ``torch.compile`` wrapped, or None."""
    return module._modules.get("_orig_mod")


def _clones(model: nn.Module) -> dict[int, Any]:
    """Plain copies of all parameters and buffers, as a memo for ``deepcopy``."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(
            parameter.detach().clone(), requires_grad=parameter.requires_grad
        )
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().clone()
    return memo


def _unpackable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Outermost modules below the root that can be unpacked, with what takes their place."""
    done: list[str] = []
    for name, module in model.named_modules():
        if name == "" or any(name.startswith(outer) for outer in done):
            continue
        plain = _plain(module)
        if plain is not None:
            done.append(f"{name}.")
            yield name, plain


LayerRule: TypeAlias = Callable[[nn.Module], nn.Module | None]
_RULES: list[LayerRule] = []


def register_layer_type(rule: LayerRule) -> LayerRule:
    """Let a further type of layer be factorized: one that holds its matrix in a way of its own.

    Args:
        rule: Gives a module that computes the same from Linear and Conv2d layers, with the same
            training flag and parameters that can be trained as before; None for any module that is
            not of the type. It is asked again when a saved model is opened.

    Returns:
        The rule, so that this may stand as a decorator.
    """
    _RULES.append(rule)
    return rule


def unregister_layer_type(rule: LayerRule) -> None:
    """Take a rule back, for tests."""
    _RULES.remove(rule)


def _plain(module: nn.Module) -> nn.Module | None:
    """What computes the same from plainer layers, or None where nothing does or needs to."""
    inner = unwrapped(module)
    if inner is not module:
        return shallow_copy(inner, type(inner)) if hooked(module) else inner
    for rule in _RULES:
        if (plain := rule(module)) is not None:
            return plain
    kind = plain_kind(module)
    if own_behaviour(module, of_class=kind is not None) is not None:
        return None
    if parametrize.is_parametrized(module) or weight_hooks(module):
        return baked(module)
    if type(module) is nn.MultiheadAttention:
        return UnpackedAttention(module)
    if kind is not None and kind is not nn.Linear:
        conv = cast("nn.Conv2d", module)
        if groups_reason(conv) is not None:
            return None
        if kind in (nn.Conv1d, nn.ConvTranspose1d):
            return UnpackedConv1d(cast("nn.Conv1d", module))
        if conv.groups > 1:
            return UnpackedGroups(conv)
        if kind is nn.ConvTranspose2d:
            return UnpackedConvTranspose2d(cast("nn.ConvTranspose2d", module))
    if kind is None and isinstance(module, nn.Linear | nn.Conv2d):
        return _of_subclass(module)
    return unpack_transformers_layer(module)


def _of_subclass(module: nn.Linear | nn.Conv2d) -> nn.Module | None:
    """What computes the same as a subclass with a ``forward`` of its own; a copy is run to see."""
    if isinstance(module, nn.Conv2d) and groups_reason(module) is not None:
        return None
    probe = _probe(module)
    if probe is None:
        return None
    with torch.random.fork_rng(devices=[]):  # dropout in a probe draws from torch's own numbers
        call = _steady_call(probe)
        if call is not None and call.weight is probe.weight:
            return _rule_and_matrix(module, call, module.weight)
        if call is not None:
            return _with_computed_weight(module, probe, call)
        if isinstance(module, nn.Linear) and _in_other_words(cast("nn.Linear", probe)):
            return _plain_linear(module)
    return None


class _Call(NamedTuple):
    """How a layer calls torch's function, and what of it is the call's alone."""

    weight: Tensor
    bias: Tensor | None
    rest: tuple[Any, ...]
    whole: bool  # what goes in is the layer's own input, and what comes out is its output


def _one_call(probe: nn.Linear | nn.Conv2d, seed: int | None = None) -> _Call | None:
    """The one call of torch's function with a weight of the layer's shape.

    None where a layer does anything else, or can't be run on zeros (or random numbers).
    """
    calls: list[_Call] = []
    results: list[tuple[Tensor, Tensor]] = []

    def compute(
        inputs: Tensor, weight: Tensor, bias: Tensor | None, call: tuple[Any, ...]
    ) -> Tensor:
        kind = functional.conv2d if isinstance(probe, nn.Conv2d) else functional.linear
        outputs: Tensor = kind(inputs, weight, bias, *call)
        calls.append(_Call(weight, bias, call, False))
        results.append((inputs, outputs))
        return outputs

    given = _inputs_of(probe, seed)
    with RedirectedCall(probe.weight.shape, compute), torch.no_grad():
        try:
            outputs = probe(given)
        except Exception:
            return None
    if len(calls) != 1 or not torch.is_tensor(outputs):
        return None
    ((inputs, made),) = results
    return calls[0]._replace(whole=inputs is given and outputs is made)


def _inputs_of(layer: nn.Linear | nn.Conv2d, seed: int | None) -> Tensor:
    """Something that a layer can be run on: zeros, or random numbers."""
    shape: tuple[int, ...] = (2, layer.weight.shape[1])
    if isinstance(layer, nn.Conv2d):
        reach = max(d * k for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
        shape = (1, layer.in_channels, 2 * reach + 5, 2 * reach + 5)
    zeros = layer.weight.new_zeros(shape)
    if seed is None:
        return zeros
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(shape, device="cpu").normal_(generator=generator).to(zeros)


def _steady_call(probe: nn.Linear | nn.Conv2d) -> _Call | None:
    """The layer's one call, if it has its own bias and the same weight for any input.

    Also in training: what drops weights then is no plain layer.
    """
    first = _one_call(probe)
    if first is None or first.bias is not probe.bias:
        return None
    whole = first.whole
    for training in (False, True):
        other = _one_call(probe.train(training), seed=1)
        if other is None or not torch.equal(other.weight, first.weight):
            return None
        whole = whole and other.whole
    return first._replace(whole=whole)


def _with_computed_weight(
    module: nn.Linear | nn.Conv2d, probe: nn.Linear | nn.Conv2d, seen: _Call
) -> nn.Module | None:
    """A subclass that standardises its weight, or computes it otherwise, at each call.

    With the weight that it computes in a plain layer. None where what is left of the subclass can't
    run without its parameters. ``seen`` is the probe's call.
    """
    own = _one_call(bare_copy(module).eval())
    if own is None:
        return None
    trainable = module.weight.requires_grad
    weight = nn.Parameter(own.weight.detach().clone(), requires_grad=trainable)
    if seen.whole:
        return _matrix(module, seen, weight)
    tried = _rule_and_matrix(probe.eval(), seen, nn.Parameter(seen.weight), computed=True)
    inputs = _inputs_of(probe, 1)
    try:
        with torch.no_grad():
            same = torch.equal(tried(inputs), probe(inputs))
    except Exception:
        return None
    return _rule_and_matrix(module, seen, weight, computed=True) if same else None


def _rule_and_matrix(
    module: nn.Linear | nn.Conv2d, call: _Call, weight: Tensor, *, computed: bool = False
) -> UnpackedRule:
    """A subclass' rule, and a plain layer with the weight that it gives torch's function."""
    matrix = _matrix(module, call, weight)
    rule = bare_copy(module, {id(p): p for p in module.parameters()})
    if computed:
        without_parameters_of_weight(rule)
    return UnpackedRule(rule, matrix, call.rest)


def _matrix(module: nn.Linear | nn.Conv2d, call: _Call, weight: Tensor) -> nn.Linear | nn.Conv2d:
    """The plain layer that does what a subclass asks torch's function for."""
    if isinstance(module, nn.Linear):
        plain: nn.Linear | nn.Conv2d = _plain_linear(module)
    else:
        defaults: tuple[Any, ...] = (1, 0, 1, 1)
        stride, padding, dilation, groups = call.rest + defaults[len(call.rest) :]
        conv: nn.Conv2d = empty(
            nn.Conv2d,
            weight,
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias=module.bias is not None,
        )
        plain = _holding_parameters_of(module, conv)
    plain._parameters["weight"] = cast("nn.Parameter", weight)
    return plain


def _in_other_words(probe: nn.Linear) -> bool:
    """Whether a probe of a Linear's subclass computes what a stock one does, written otherwise.

    Such as ``inputs @ self.weight.T + self.bias`` (Falcon): run on random numbers it does no more
    than one product and one sum, and gives a stock Linear's values, also in training.
    """
    generator = torch.Generator().manual_seed(0)
    for training, shape in ((False, (3,)), (False, (2, 3)), (True, (3,))):
        probe.train(training)
        numbers = torch.empty(*shape, probe.in_features, device="cpu")
        inputs = numbers.normal_(generator=generator).to(probe.weight)
        with torch.no_grad():
            expected = functional.linear(inputs, probe.weight, probe.bias)
            try:
                with _Operators() as operators:
                    outputs = probe(inputs)
            except Exception:
                return False
        if not operators.one_product or not torch.is_tensor(outputs):
            return False
        if outputs.shape != expected.shape or outputs.dtype != expected.dtype:
            return False
        rounding = float(expected.abs().max()) * math.sqrt(torch.finfo(expected.dtype).eps)
        if not torch.allclose(outputs, expected, rtol=0, atol=rounding):
            return False
    return True


def _probe(module: LayerT) -> LayerT | None:
    """A copy of a layer to run: in evaluation mode, on the CPU, its parameters random numbers.

    So a model that is opened before its weights are read (on the device meta) is looked at as one
    with weights is. None where the layer has no weight of its own.
    """
    weight = module._parameters.get("weight")
    if weight is None or not weight.is_floating_point():
        return None
    generator = torch.Generator().manual_seed(0)
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        numbers = torch.empty(parameter.shape, device="cpu").normal_(generator=generator)
        memo[id(parameter)] = nn.Parameter(numbers.to(parameter.dtype))
    for buffer in module.buffers():
        known = torch.zeros_like(buffer, device="cpu") if buffer.is_meta else buffer.cpu()
        memo[id(buffer)] = known.clone()
    return bare_copy(module, memo).eval()


def _plain_linear(module: nn.Linear) -> nn.Linear:
    out, in_ = module.weight.shape
    bias = module.bias is not None
    plain: nn.Linear = empty(nn.Linear, module.weight, in_, out, bias=bias)
    return _holding_parameters_of(module, plain)


def _holding_parameters_of(module: nn.Module, plain: LayerT) -> LayerT:
    for name in ("weight", "bias"):
        plain._parameters[name] = module._parameters.get(name)
    return plain.train(module.training)


class _Operators(TorchDispatchMode):
    """Sees whether what runs is one matrix product, at most one sum, and views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Note the operator's name and run it."""
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    @property
    def one_product(self) -> bool:
        """Whether nothing was seen that a stock Linear would not do."""
        products = [name for name in self.names if name in _PRODUCTS]
        sums = [name for name in self.names if name in _SUMS]
        rest = {*self.names} - _PRODUCTS - _SUMS - _VIEWS
        return len(products) == 1 and len(sums) <= 1 and not rest
