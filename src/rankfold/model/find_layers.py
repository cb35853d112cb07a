"""Which layers of a model can be factorized, and the reason for each that can't."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeAlias, cast

import torch
from torch import nn

from rankfold.errors import InputError, visible
from rankfold.model.layer_matrix import MatrixLayer, matrix_shape
from rankfold.model.of_user import own_behaviour

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


@dataclass(frozen=True)
class EmbeddingMatrix:
    """A matrix ``(words, dim)`` whose rows are looked up, or score words at the output, or both.

    Attributes:
        lookups: The modules that look rows up, by name.
        heads: The modules whose outputs are the products with all rows, by name.
    """

    lookups: dict[str, nn.Embedding]
    heads: dict[str, nn.Linear]

    @property
    def uses(self) -> dict[str, nn.Embedding | nn.Linear]:
        """All modules that hold the matrix."""
        return {**self.lookups, **self.heads}

    @property
    def weight(self) -> nn.Parameter:
        """The matrix, one for all uses."""
        return cast("nn.Parameter", next(iter(self.uses.values())).weight)

    def of(self, model: nn.Module) -> EmbeddingMatrix:
        """The same uses in a copy of the model."""
        return EmbeddingMatrix(
            {name: cast("nn.Embedding", model.get_submodule(name)) for name in self.lookups},
            {name: cast("nn.Linear", model.get_submodule(name)) for name in self.heads},
        )


def find_embeddings(
    model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[dict[str, EmbeddingMatrix], dict[str, str]]:
    """Matrices that are looked up, and those of Linears that score many words.

    A Linear counts when its matrix is looked up elsewhere, too, or has more rows than a Gram can
    have (``LARGEST_SIDE``); any other one is an ordinary layer.

    Args:
        model: The model, unpacked.
        include: Glob patterns; when given, a matrix counts if one of its uses matches.
        exclude: Glob patterns; a matrix stays as it is if one of its uses matches.

    Returns:
        ``(matrices by the name of their first use, {use: why its matrix stays as it is})``.
    """
    holders: dict[int, dict[str, nn.Module]] = defaultdict(dict)
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 2:
            holders[id(weight)][name] = module
    found: dict[str, EmbeddingMatrix] = {}
    reasons: dict[str, str] = {}
    for uses in holders.values():
        lookups = {n: m for n, m in uses.items() if isinstance(m, nn.Embedding)}
        first = cast("nn.Linear", next(iter(uses.values())))
        alone = len(uses) == 1 and plain_kind(first) is nn.Linear
        if not lookups and not (alone and max(matrix_shape(first)) > LARGEST_SIDE):
            continue
        heads = {n: m for n, m in uses.items() if plain_kind(m) is nn.Linear}
        matrix = EmbeddingMatrix(lookups, cast("dict[str, nn.Linear]", heads))
        reason = _embedding_reason(model, uses, matrix, include, exclude)
        if reason is None:
            found[next(iter(uses))] = matrix
        else:
            reasons |= dict.fromkeys(uses, reason)
    return found, reasons


def _embedding_reason(
    model: nn.Module,
    uses: Mapping[str, nn.Module],
    matrix: EmbeddingMatrix,
    include: Sequence[str],
    exclude: Sequence[str],
) -> str | None:
    """Why a matrix with these uses stays as it is, or None."""
    if include and not any(_matches(name, pattern) for name in uses for pattern in include):
        return "not included"
    if any(_matches(name, pattern) for name in uses for pattern in exclude):
        return "excluded"
    if "" in uses:
        return "the model is this one layer: wrap it in a module so that it can be replaced"
    for name, module in uses.items():
        if isinstance(module, nn.Embedding) and not _looks_up(module):
            return f"{name} ({type(module).__name__}) looks its rows up by a rule of its own"
        if name not in matrix.uses:
            return f"{name} ({type(module).__name__}) uses its matrix in another way"
        if (behaviour := own_behaviour(module)) is not None:
            return f"of {name}: {behaviour}"
    if any(lookup.max_norm is not None for lookup in matrix.lookups.values()):
        return "it rescales its rows when they are looked up (max_norm)"
    elsewhere = sum(
        parameter is matrix.weight
        for module in model.modules()
        for parameter in module._parameters.values()
    )
    if elsewhere != len(uses):
        return "its matrix is also a parameter of another name"
    if not matrix.weight.is_floating_point():
        return f"its weight is {matrix.weight.dtype}"
    if min(matrix.weight.shape) < 2:
        return "its matrix has rank 1 already"
    if matrix.weight.shape[1] > LARGEST_SIDE:
        return f"rows of {matrix.weight.shape[1]} values are above the limit of {LARGEST_SIDE}"
    return None


def find_layers(
    model: nn.Module,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    embeddings: Mapping[str, str | None] | None = None,
) -> tuple[dict[str, MatrixLayer], list[Skipped]]:
    """Every layer with parameters of its own: to factorize, or skipped with a reason.

    Args:
        model: The model, unpacked (see ``rankfold.model.unpack``).
        include: Glob patterns of names; when given, only matching layers are factorized. A pattern
            that matches the name of a module holds for what is inside it.
        exclude: Glob patterns of names left as they are, likewise.
        embeddings: Modules that ``find_embeddings`` has decided about: None for those that are
            factorized there, otherwise the reason.

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
    decided = embeddings or {}
    for name, module in model.named_modules():
        own = [p for p in module._parameters.values() if p is not None]
        if not own or (name in decided and decided[name] is None):
            continue
        reason = decided.get(name) or _reason(name, module, owners, include, exclude)
        if reason is None:
            layers[name] = module
        else:
            count = sum(parameter.numel() for parameter in own)
            skipped.append(Skipped(name, type(module).__name__, count, reason))
    known = [*layers, *(s.name for s in skipped), *decided]
    _check_patterns(known, [*include, *exclude])
    if not layers and None not in decided.values():
        listed = "".join(f"\n  {visible(s.name)} ({s.kind}): {s.reason}" for s in skipped[:20])
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
    matrices = [p for p in module._parameters.values() if p is not None and p.dim() > 1]
    if not matrices:
        return "it holds no matrix"
    if all(p.numel() == 0 for p in matrices):
        return "its matrix is empty"
    if isinstance(module, _CONVS) and (reason := groups_reason(module)) is not None:
        return reason
    if _looks_up(module):
        return "embeddings are left out: embeddings=True includes them"
    plain = plain_kind(module) in (nn.Linear, nn.Conv2d)
    if not (plain and isinstance(module, nn.Linear | nn.Conv2d)):
        stock = type(module).__module__.startswith("torch.")
        if name == "" and not stock and any(True for _ in module.children()):
            return "parameters of the model itself, outside its layers, stay as they are"
        if name == "":
            return "the model is this one layer: wrap it in a module so that it can be replaced"
        return f"layers of kind {type(module).__name__} can't be factorized yet ({SUPPORTED})"
    if include and not any(_matches(name, pattern) for pattern in include):
        return "not included"
    if any(_matches(name, pattern) for pattern in exclude):
        return "excluded"
    if (behaviour := own_behaviour(module)) is not None:
        return behaviour
    if "weight" not in module._parameters:
        return "its weight is computed from other parameters"
    if name == "":
        return "the model is this one layer: wrap it in a module so that it can be replaced"
    others = [other for other in owners[id(module.weight)] if other != name]
    if others:
        return f"its weight is shared with {', '.join(others)}: tied weights stay as they are"
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return f"its {module.groups} groups stand in one weight (rankfold.model.unpack parts them)"
    if not module.weight.is_floating_point():
        return f"its weight is {module.weight.dtype}"
    out, in_ = matrix_shape(module)
    if min(out, in_) < 2:
        return "its matrix has rank 1 already"
    # The Gram of a conv's patches isn't needed (``recorder.whole_grams``).
    longest = out if isinstance(module, nn.Conv2d) else max(out, in_)
    if longest > LARGEST_SIDE:
        return f"a side of {longest} features is above the limit of {LARGEST_SIDE}"
    return None


def _looks_up(module: nn.Module) -> bool:
    """Whether a module is an Embedding that does nothing but look rows up."""
    return isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward


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
    """Whether a pattern matches a name, or that of a module around it; a name matches itself."""
    parts = name.split(".")
    names = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return any(pattern in (one, visible(one)) or fnmatchcase(one, pattern) for one in names)


def _check_patterns(names: Sequence[str], patterns: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            raise InputError(
                f"the pattern {pattern!r} matches no layer; names look like "
                f"{', '.join(map(visible, names[:5]))}."
            )
