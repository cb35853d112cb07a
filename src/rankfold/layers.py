"""Which layers of a model can be factorized, and the reason for each that can't."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from rankfold.errors import InputError
from rankfold.layer_matrix import MatrixLayer, matrix_shape

# A Gram of a side of this many features takes 2 GiB in float64.
LARGEST_SIDE = 16384


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
    """Every layer with a weight of two or more dimensions: to factorize, or skipped with a reason.

    Args:
        model: The model.
        include: Glob patterns of names; when given, only matching layers are factorized.
        exclude: Glob patterns of names left as they are.

    Raises:
        InputError: No layer is left to factorize, a pattern matches nothing, or a weight is not
            finite.
    """
    owners = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    layers: dict[str, MatrixLayer] = {}
    skipped: list[Skipped] = []
    for name, module in model.named_modules():
        own = [p for p in module._parameters.values() if p is not None]
        if not any(parameter.dim() > 1 for parameter in own):
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
            f"Linear or Conv2d of rank 2 or more.{listed}"
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
    owners: Counter[int],
    include: Sequence[str],
    exclude: Sequence[str],
) -> str | None:
    if type(module) is not nn.Linear and type(module) is not nn.Conv2d:
        return f"a {type(module).__name__} can't be factorized yet (Linear and Conv2d can)"
    if include and not any(fnmatchcase(name, pattern) for pattern in include):
        return "not included"
    if any(fnmatchcase(name, pattern) for pattern in exclude):
        return "excluded"
    if "weight" not in module._parameters:
        return "its weight is computed from other parameters"
    if name == "":
        return "the model is this one layer: wrap it in a module so that it can be replaced"
    if owners[id(module.weight)] > 1:
        return "its weight is shared with another layer"
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return f"a Conv2d with {module.groups} groups can't be factorized yet"
    if not module.weight.is_floating_point():
        return f"its weight is {module.weight.dtype}"
    out, in_ = matrix_shape(module)
    if min(out, in_) < 2:
        return "its matrix has rank 1 already"
    if max(out, in_) > LARGEST_SIDE:
        return f"a side of {max(out, in_)} features is above the limit of {LARGEST_SIDE}"
    return None


def _check_patterns(names: Sequence[str], patterns: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(
                f"the pattern {pattern!r} matches no layer; names look like {', '.join(names[:5])}."
            )
