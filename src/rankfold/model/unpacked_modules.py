"""Modules that compute what a packed one does, with a Linear or Conv2d for each of its matrices.

Statistics, factors and files know ``nn.Linear`` and ``nn.Conv2d`` alone. What holds its matrices in
another way is written as a composition of them: the same function, the same parameters, differing
by rounding only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from rankfold.model import stock_layers
from rankfold.model.stock_layers import StockLayer, conv2d, empty, filled

_Transposed: TypeAlias = nn.ConvTranspose1d | nn.ConvTranspose2d
Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """``stock_layers.linear``, trainable where the given ones are."""
    return _as_trainable(stock_layers.linear(weight, bias), weight, bias)


def _as_trainable(layer: StockLayer, weight: Tensor, bias: Tensor | None) -> StockLayer:
    """The layer, its parameters requiring gradients where these do."""
    layer.weight.requires_grad_(weight.requires_grad)
    if bias is not None and layer.bias is not None:
        layer.bias.requires_grad_(bias.requires_grad)
    return layer


def _keep_geometry(module: nn.Module, conv: Convolution) -> None:
    """What a model may ask a conv for, such as its stride, to foresee lengths."""
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"):
        setattr(module, name, getattr(conv, name))
    module.padding_mode = conv.padding_mode  # type: ignore[assignment]
    module.groups = conv.groups  # type: ignore[assignment]
    module.train(conv.training)


class UnpackedGroups(nn.Module):
    """A conv with groups as one conv a group: a block-diagonal matrix as its blocks.

    Args:
        conv: A conv of any kind with ``groups > 1``.
    """

    def __init__(self, conv: Convolution) -> None:
        super().__init__()
        groups = conv.groups
        transposed = isinstance(conv, _Transposed)
        weights = conv.weight.chunk(groups)  # a transposed conv's weight is (in, out / groups, ..)
        biases = [None] * groups if conv.bias is None else conv.bias.chunk(groups)
        options: dict[str, Any] = {
            "stride": conv.stride,
            "padding": conv.padding,
            "dilation": conv.dilation,
            "padding_mode": conv.padding_mode,
        }
        if transposed:
            options["output_padding"] = conv.output_padding
        self.channels = conv.in_channels // groups
        kind = next(k for k in type(conv).__mro__ if k.__module__ == nn.Conv2d.__module__)
        parts = []
        for weight, bias in zip(weights, biases, strict=True):
            out = conv.out_channels // groups
            part = empty(
                kind, weight, self.channels, out, conv.kernel_size,
                bias=bias is not None, **options,
            )  # fmt: skip
            parts.append(_as_trainable(filled(part, weight, bias), weight, bias))
        self.groups_of = nn.ModuleList(parts)
        self.spatial = conv.weight.dim() - 2
        _keep_geometry(self, conv)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``(n, in, ...)`` or ``(in, ...)`` to the conv's output."""
        axis = -1 - self.spatial
        blocks = input.split(self.channels, dim=axis)
        parts = zip(self.groups_of, blocks, strict=True)
        return torch.cat([part(block, *args, **kwargs) for part, block in parts], dim=axis)


class UnpackedConv1d(nn.Module):
    """A Conv1d, or ConvTranspose1d, as a two-dimensional conv on an image of one row.

    Args:
        conv: The conv, with groups or without.
    """

    def __init__(self, conv: nn.Conv1d | nn.ConvTranspose1d) -> None:
        super().__init__()
        padding = conv.padding
        options: dict[str, Any] = {
            "stride": (1, *conv.stride),
            "padding": padding if isinstance(padding, str) else (0, *padding),
            "dilation": (1, *conv.dilation),
            "padding_mode": conv.padding_mode,
            "groups": conv.groups,
        }
        kind: type[nn.Module] = nn.Conv2d
        if isinstance(conv, nn.ConvTranspose1d):
            kind = nn.ConvTranspose2d
            options["output_padding"] = (0, *conv.output_padding)
        kernel = (1, *conv.kernel_size)
        inner = empty(
            kind, conv.weight, conv.in_channels, conv.out_channels, kernel,
            bias=conv.bias is not None, **options,
        )  # fmt: skip
        filled(inner, conv.weight.unsqueeze(-2), conv.bias)
        self.image_conv = _as_trainable(inner, conv.weight, conv.bias)
        _keep_geometry(self, conv)

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Map ``(n, in, length)`` or ``(in, length)`` to the conv's output."""
        sizes = () if output_size is None else ((1, output_size[-1]),)
        images: Tensor = self.image_conv(input.unsqueeze(-2), *sizes)
        return images.squeeze(-2)


class UnpackedConvTranspose2d(nn.Module):
    """A ConvTranspose2d as a 1x1 conv to ``out * kh * kw`` columns, which are then added up.

    Its matrix is ``(out * kh * kw, in)``: what each input position adds to each output near it.

    Args:
        conv: A conv with ``groups == 1``.
    """

    bias: nn.Parameter | None
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    output_padding: tuple[int, int]

    def __init__(self, conv: nn.ConvTranspose2d) -> None:
        super().__init__()
        matrix = conv.weight.flatten(1).T
        self.columns = _as_trainable(conv2d(matrix[:, :, None, None], None), matrix, None)
        bias = conv.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        if self.bias is not None and bias is not None:
            self.bias.requires_grad_(bias.requires_grad)
        self.output_padding = cast("tuple[int, int]", conv.output_padding)
        _keep_geometry(self, conv)

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Map ``(n, in, h, w)`` or ``(in, h, w)`` to the conv's output."""
        columns: Tensor = self.columns(input)
        full = tuple(
            (size - 1) * stride + dilation * (taps - 1) + 1
            for size, stride, dilation, taps in zip(
                input.shape[-2:], self.stride, self.dilation, self.kernel_size, strict=True
            )
        )
        summed = functional.fold(
            columns.flatten(-2), full, self.kernel_size, self.dilation, 0, self.stride
        )
        wanted = tuple(output_size)[-2:] if output_size is not None else tuple(
            size - 2 * margin + extra
            for size, margin, extra in zip(full, self.padding, self.output_padding, strict=True)
        )  # fmt: skip
        # Negative margins cut off; output_padding may reach beyond what any input adds to.
        margins: list[int] = []
        for axis in (1, 0):
            start = self.padding[axis]
            margins += [-start, wanted[axis] - (full[axis] - start)]
        outputs = functional.pad(summed, margins)
        return outputs if self.bias is None else outputs + self.bias[:, None, None]


class _Joined(Tensor):
    """A copy of several tensors as one; being of a class of its own, no fast path takes it."""


class UnpackedAttention(nn.Module):
    """``nn.MultiheadAttention`` with a Linear for each projection.

    ``nn.TransformerEncoderLayer`` and ``nn.TransformerEncoder`` read the packed weights themselves
    and go past this module's ``forward``, but not where a tensor is of a class of its own.

    Args:
        attention: The module.
    """

    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None
    _qkv_same_embed_dim = False

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.packed = attention._qkv_same_embed_dim
        if attention._qkv_same_embed_dim:
            weights = attention.in_proj_weight.chunk(3)
        else:
            weights = (
                attention.q_proj_weight,
                attention.k_proj_weight,
                attention.v_proj_weight,
            )
        packed = cast("Tensor | None", attention.in_proj_bias)
        biases = (None, None, None) if packed is None else packed.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = (
            linear(weight, bias) for weight, bias in zip(weights, biases, strict=True)
        )
        self.out_proj = linear(attention.out_proj.weight, attention.out_proj.bias)
        for name in ("bias_k", "bias_v"):
            given = getattr(attention, name)
            setattr(self, name, None if given is None else nn.Parameter(given.detach().clone()))
        self.embed_dim = attention.embed_dim
        self.num_heads = attention.num_heads
        self.head_dim = attention.head_dim
        self.dropout = attention.dropout
        self.add_zero_attn = attention.add_zero_attn
        self.batch_first = attention.batch_first
        self.train(attention.training)

    @property
    def in_proj_weight(self) -> Tensor | None:
        """The three matrices of one input size as one, for who reads them."""
        return self._joined("weight") if self.packed else None

    @property
    def in_proj_bias(self) -> Tensor | None:
        """The three biases as one."""
        bias = cast("Tensor | None", self.q_proj.bias)
        return None if bias is None else self._joined("bias")

    def _joined(self, name: str) -> Tensor:
        parts = [getattr(part, name) for part in (self.q_proj, self.k_proj, self.v_proj)]
        joined = torch.cat(parts)
        return joined if torch.compiler.is_compiling() else joined.as_subclass(_Joined)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """What ``nn.MultiheadAttention.forward`` returns; ``is_causal`` is a hint beside a mask."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint beside attn_mask, which is missing")
        batched = query.dim() == 3
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if not batched:
            q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        examples, length, _ = q.shape
        added = 0
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(examples, -1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(examples, -1, -1)], 1)
            added += 1
        if self.add_zero_attn:
            k, v = functional.pad(k, (0, 0, 0, 1)), functional.pad(v, (0, 0, 0, 1))
            added += 1
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        mask = _attention_mask(attn_mask, key_padding_mask, self.num_heads, added, q.dtype)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q / math.sqrt(self.head_dim)) @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = functional.dropout(weights, dropout) if dropout else weights
            mixed = weights @ v
        else:
            # As in torch: the hint is taken for the mask where nothing else hides a key.
            causal = is_causal and key_padding_mask is None
            mask = None if causal else mask
            mixed = functional.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        outputs: Tensor = self.out_proj(mixed.transpose(1, 2).reshape(examples, length, -1))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return outputs.squeeze(0), None if weights is None else weights.squeeze(0)
        return outputs if self.batch_first else outputs.transpose(0, 1), weights


def _attention_mask(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    heads: int,
    added: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """Both masks as one that is added to the scores, ``(n, heads, q, k)`` or broadcast to it.

    Args:
        attn_mask: ``(q, k)`` or ``(n * heads, q, k)``, or None; bool (True hides) or added.
        key_padding_mask: ``(n, k)`` or None; likewise.
        heads: Heads.
        added: Keys behind the given ones that no mask hides.
        dtype: Of the result.
    """
    masks = []
    if attn_mask is not None:
        mask = _as_added(attn_mask, dtype)
        masks.append(mask if mask.dim() == 2 else mask.unflatten(0, (-1, heads)))
    if key_padding_mask is not None:
        masks.append(_as_added(key_padding_mask, dtype)[:, None, None, :])
    if not masks:
        return None
    total = masks[0] if len(masks) == 1 else masks[0] + masks[1]
    return functional.pad(total, (0, added))


def _as_added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


class UnpackedExperts(nn.Module):
    """Experts whose weights are packed in 3-D parameters, with a Linear for each expert's matrix.

    Args:
        first: The first Linear of each expert.
        second: The second of each.
        between: What comes between the two: gate or activation, ``(rows, out of first)`` to
            ``(rows, in of second)``.
        after: What comes after the second.
    """

    def __init__(
        self,
        first: Sequence[nn.Linear],
        second: Sequence[nn.Linear],
        between: nn.Module,
        after: nn.Module,
    ) -> None:
        super().__init__()
        self.first = nn.ModuleList(first)
        self.second = nn.ModuleList(second)
        self.between = between
        self.after = after

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of the experts that each token is sent to.

        Args:
            hidden_states: ``(tokens, features)``.
            top_k_index: ``(tokens, k)`` experts; one outside the experts at hand adds nothing.
            top_k_weights: ``(tokens, k)``.
        """
        outputs = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if not 0 <= expert < len(self.first):
                continue
            tokens, places = torch.where(top_k_index == expert)
            inner = self.between(self.first[expert](hidden_states[tokens]))
            found = self.after(self.second[expert](inner))
            weighted = found * top_k_weights[tokens, places, None]
            outputs.index_add_(0, tokens, weighted.to(outputs.dtype))
        return outputs


class EveryExpert(nn.Module):
    """The same as ``UnpackedExperts``, with every expert computed for every token.

    Which experts a token needs is known only with its values; a program that is traced once can't
    depend on them.

    Args:
        experts: Taken apart, not copied.
    """

    def __init__(self, experts: UnpackedExperts) -> None:
        super().__init__()
        self.first, self.second = experts.first, experts.second
        self.between, self.after = experts.between, experts.after

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of the experts; arguments as those of ``UnpackedExperts``."""
        outputs = torch.zeros_like(hidden_states)
        for expert, (first, second) in enumerate(zip(self.first, self.second, strict=True)):
            found = self.after(second(self.between(first(hidden_states))))
            share = (top_k_weights * (top_k_index == expert)).sum(-1, keepdim=True)
            outputs = outputs + (found * share).to(outputs.dtype)
        return outputs


class UnpackedRule(nn.Module):
    """A layer whose own ``forward`` prepares its input for one Linear or conv, kept apart from it.

    Such as a conv that pads by a rule of its own. The layer's ``forward`` runs as it is; its one
    call of torch's function with its weight goes to ``matrix``.

    Args:
        rule: The layer; its weight and bias are taken out of it.
        matrix: A plain layer with them.
        call: What the layer gives torch's function beside input, weight and bias.
    """

    def __init__(self, rule: nn.Module, matrix: nn.Module, call: tuple[Any, ...]) -> None:
        super().__init__()
        _take_out(rule, "weight")
        rule._parameters["bias"] = None
        self.rule = rule
        self.matrix = matrix
        self.call = call

    def __getattr__(self, name: str) -> Any:
        """What else a model asks the layer for, such as its geometry, the rule knows."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "rule":
                raise
            return getattr(self.rule, name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the layer computes.

        Raises:
            RuntimeError: It calls torch's function otherwise than when it was looked at.
        """
        with RedirectedCall(cast("Tensor", self.rule.weight).shape, self._compute):
            outputs: Tensor = self.rule(*args, **kwargs)
        return outputs

    def _compute(
        self, inputs: Tensor, _weight: Tensor, _bias: Tensor | None, call: tuple[Any, ...]
    ) -> Tensor:
        if call != self.call:
            raise RuntimeError(
                f"{type(self.rule).__name__} computed with {self.call} before and now with {call}"
            )
        outputs: Tensor = self.matrix(inputs)
        return outputs


def without_parameters_of_weight(rule: nn.Module) -> None:
    """Take out all that a layer computes its weight from: every parameter but the bias.

    Its weight then costs neither memory nor time. Where a parameter is used otherwise too, the
    layer can't run any more.
    """
    for name in [name for name in rule._parameters if name not in ("weight", "bias")]:
        _take_out(rule, name)


def _take_out(rule: nn.Module, name: str) -> None:
    """Leave of a parameter its shape, which a rule may ask for; it can't be computed with."""
    parameter = rule._parameters.pop(name)
    setattr(rule, name, None if parameter is None else torch.empty_like(parameter, device="meta"))


class RedirectedCall(TorchFunctionMode):
    """Calls of torch's linear and conv2d with a weight of one shape go to a function instead.

    Args:
        shape: Of the weight.
        compute: Takes the input, the weight, the bias and the other arguments.
    """

    def __init__(
        self,
        shape: torch.Size,
        compute: Callable[[Tensor, Tensor, Tensor | None, tuple[Any, ...]], Tensor],
    ) -> None:
        super().__init__()
        self.shape = shape
        self.compute = compute

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Redirect, or run as asked."""
        given = dict(kwargs or {})
        if func in (functional.linear, functional.conv2d) and len(args) > 1 and not given:
            inputs, weight, bias, *call = (*args, None)[: max(3, len(args))]
            if weight.shape == self.shape:
                plain = tuple(tuple(v) if isinstance(v, list) else v for v in call)
                return self.compute(inputs, weight, bias, plain)
        return func(*args, **given)
