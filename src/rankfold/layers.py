"""Which layers of a model can be factorized, and the reason for each that can't."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeAlias

import torch
from torch import nn

from rankfold.errors import InputError
from rankfold.layer_matrix import MatrixLayer, matrix_shape

# A Gram of a side of this many features takes 2 GiB in float64.
LARGEST_SIDE = 16384
# A conv with more groups stays as it is: that many small convs take longer than they save.
MOST_GROUPS = 128
SUPPORTED = (
    "Linear, Conv1d, Conv2d, ConvTranspose1d, ConvTranspose2d, MultiheadAttention and "
    "transformers' Conv1D and packed experts can"
)

_CONVS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)
_Conv: TypeAlias = nn.Conv1d | nn.Conv2d | nn.ConvTranspose1d | nn.ConvTranspose2d


@dataclass(frozen=True)
class Skipped:
    """A layer that stays as it is.

    Attributes:
        name: Its name in the model.
        kind: Its class.
        parameters: Parameters it holds itself.
        reason: Why it isn't factorized.
    """

    name: str
    kind: str
    parameters: int
    reason: str


def find_layers(
    model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[dict[str, MatrixLayer], list[Skipped]]:
    """Every layer with parameters of its own: to factorize, or skipped with a reason.

    Args:
        model: The model, unpacked (see ``rankfold.unpack``).
        include: Glob patterns of names; when given, only matching layers are factorized. A pattern
            that matches the name of a module holds for what is inside it.
        exclude: Glob patterns of names left as they are, likewise.

    Raises:
        InputError: No layer is left to factorize, a pattern matches nothing, or a weight is not
            finite.
    """
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)].append(name)
    layers: dict[str, MatrixLayer] = {}
    skipped: list[Skipped] = []
    for name, module in model.named_modules():
        own = [p for p in module._parameters.values() if p is not None]
        if not own:
            continue
        reason = _reason(name, module, owners, include, exclude)
        if reason is None:
            layers[name] = module
        else:
            count = sum(parameter.numel() for parameter in own)
            skipped.append(Skipped(name, type(module).__name__, count, reason))
    _check_patterns([*layers, *(s.name for s in skipped)], [*include, *exclude])
    if not layers:
        listed = "".join(f"\n  {s.name} ({s.kind}): {s.reason}" for s in skipped[:20])
        raise InputError(
            f"the model {type(model).__name__} has no layer to factorize; expected at least one "
            f"matrix of rank 2 or more in a layer of a kind that can be factorized "
            f"({SUPPORTED}).{listed}"
        )
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise InputError(
                f"the weight {name} holds NaN or infinite values; expected finite ones. "
                "Check the file that it was loaded from."
            )
    return layers, skipped


def _reason(
    name: str,
    module: nn.Module,
    owners: Mapping[int, Sequence[str]],
    include: Sequence[str],
    exclude: Sequence[str],
) -> str | None:
    if all(p is None or p.dim() < 2 for p in module._parameters.values()):
        return "it holds no matrix"
    if isinstance(module, _CONVS) and (reason := groups_reason(module)) is not None:
        return reason
    plain = plain_kind(module) in (nn.Linear, nn.Conv2d)
    if not (plain and isinstance(module, nn.Linear | nn.Conv2d)):
        if name == "":
            return "the model is this one layer: wrap it in a module so that it can be replaced"
        return f"layers of kind {type(module).__name__} can't be factorized yet ({SUPPORTED})"
    if include and not any(_matches(name, pattern) for pattern in include):
        return "not included"
    if any(_matches(name, pattern) for pattern in exclude):
        return "excluded"
    if "weight" not in module._parameters:
        return "its weight is computed from other parameters"
    if name == "":
        return "the model is this one layer: wrap it in a module so that it can be replaced"
    others = [other for other in owners[id(module.weight)] if other != name]
    if others:
        return f"its weight is shared with {', '.join(others)}: tied weights stay as they are"
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return f"its {module.groups} groups stand in one weight (rankfold.unpack parts them)"
    if not module.weight.is_floating_point():
        return f"its weight is {module.weight.dtype}"
    out, in_ = matrix_shape(module)
    if min(out, in_) < 2:
        return "its matrix has rank 1 already"
    if max(out, in_) > LARGEST_SIDE:
        return f"a side of {max(out, in_)} features is above the limit of {LARGEST_SIDE}"
    return None


def plain_kind(module: nn.Module) -> type[nn.Module] | None:
    """Linear or the kind of conv that a module is, or None.

    A subclass that computes what its parent does is one too, whatever it is called.
    """
    for kind in (nn.Linear, *_CONVS):
        same = all(
            getattr(type(module), name, None) is getattr(kind, name, None)
            for name in ("forward", "_conv_forward")
        )
        if isinstance(module, kind) and same:
            return kind
    return None


def groups_reason(conv: _Conv) -> str | None:
    """Why a conv with groups stays as it is; None for one that can be unpacked, or has one group.

    A depthwise conv has nothing to factorize: each group is a single filter.
    """
    if conv.groups == 1:
        return None
    out, in_ = conv.out_channels // conv.groups, conv.in_channels // conv.groups
    taps = conv.weight[0, 0].numel()
    transposed = isinstance(conv, nn.ConvTranspose1d | nn.ConvTranspose2d)
    sides = (out * taps, in_) if transposed else (out, in_ * taps)
    if min(sides) < 2:
        return f"each of its {conv.groups} groups is a matrix of rank 1 already"
    if conv.groups > MOST_GROUPS:
        return (
            f"its {conv.groups} groups are more than the {MOST_GROUPS} up to which one "
            "factorization a group saves more than it costs"
        )
    return None


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern matches a name, or that of a module around it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def _check_patterns(names: Sequence[str], patterns: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            raise InputError(
                f"the pattern {pattern!r} matches no layer; names look like {', '.join(names[:5])}."
            )
