"""Each factorized layer multiplied out to a dense one."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rankfold.artifact.load import load_tensors
from rankfold.artifact.manifest import WEIGHTS_FILE
from rankfold.errors import InputError
from rankfold.export.names import SUMMARIES
from rankfold.export.targets import OpenedArtifact, Written, factorized_modules
from rankfold.files.tensors import METADATA
from rankfold.integrations import transformers as hf
from rankfold.model.replace import put_modules
from rankfold.model.unpack import unpack_named

PARTS = "parametrizations."  # torch's, before the names of what a weight is computed from


def to_dense(model: nn.Module) -> nn.Module:
    """Multiply the factors out in every factorized layer of ``model`` itself.

    The products are computed in float64 and rounded once to the layer's dtype.
    """
    dense = {
        name: copy.deepcopy(module).double().to_dense().to(next(module.parameters()).dtype)
        for name, module in factorized_modules(model).items()
    }
    put_modules(model, dense)
    return model


class Dense:
    """The export target ``dense``."""

    name = "dense"
    summary = SUMMARIES["dense"]
    options = ()
    files = "*.safetensors"

    def write(self, opened: OpenedArtifact, draft: Path) -> Written:
        """Write the weights under the original's names; see ``Target``."""
        original, source = opened.like_the_original(), opened.folder
        dense = to_dense(opened.model).state_dict()
        tensors = packed(dense, original, opened.unpacked, str(source))
        load_tensors(original, tensors, {}, str(source))
        if opened.of_transformers:
            hf.write_plain_folder(original, draft, source)
            return Written(original)
        # Every name, shared tensors twice: load_state_dict asks for all of them.
        complete = {name: tensor.clone() for name, tensor in original.state_dict().items()}
        save_file(complete, draft / WEIGHTS_FILE, metadata=METADATA)
        return Written(original)


def packed(
    tensors: Mapping[str, Tensor], original: nn.Module, unpacked: Iterable[str], where: str
) -> dict[str, Tensor]:
    """Tensors of an unpacked model as those of the model that it was made from.

    Unpacking only moves numbers. So a copy of the original, filled with 1, 2, 3.. and unpacked,
    tells where each number went, whatever the kind of module. Computed weights (weight norm and
    other parametrizations) are given to the parametrization's own inverse, where it has one.

    Args:
        tensors: Of the unpacked model, under all its names.
        original: Gives names and shapes; stays as it is.
        unpacked: Names of the modules that were unpacked, outer ones first.
        where: Where the tensors come from, for messages.

    Raises:
        InputError: A module computes its weight from others, which can't be told from the weight.
    """
    names = list(unpacked)
    outer = [n for n in names if not any(n.startswith(f"{other}.") for other in names)]
    moved = {name: t for name, t in tensors.items() if not _inside(name, outer)}
    if not names:
        return moved
    numbered = copy.deepcopy(original)
    computed = [n for n in dict.fromkeys(names) if _is_computed(original, n)]
    for name in computed:  # from here on it holds the weight that it computes
        names.remove(name)
        unpack_named(numbered, [name], where)
    places = _numbered(numbered, outer)
    unpack_named(numbered, names, where)
    inner = {name: t for name, t in tensors.items() if _inside(name, outer)}
    found, unknown = _put_in_places(inner, numbered.state_dict(), places)
    moved |= found
    wrong = {module for module in outer for name in unknown if _inside(name, [module])}
    for name in computed:
        parts = _parts_of_weights(original.get_submodule(name), f"{name}.", moved)
        if parts is None:
            wrong.add(name)
        else:
            moved |= parts
    if wrong:
        named = ", ".join(sorted(wrong)[:5])
        raise InputError(
            f"{where} can't be exported in the names of the original: the weight of {named} "
            "is computed from others there, in a way that can't be undone. Open it with "
            "rankfold.load."
        )
    return moved


@dataclass(frozen=True)
class _Places:
    """Where each tensor's numbers stand in one row of all of them, counted from 1.

    Attributes:
        first: Of each tensor its first place, and its shape.
        end: One more than the last place.
    """

    first: Mapping[str, tuple[int, torch.Size]]
    end: int


def _numbered(model: nn.Module, modules: Sequence[str]) -> _Places:
    """Write 1, 2, 3.. into all floating tensors inside these modules."""
    first: dict[str, tuple[int, torch.Size]] = {}
    place = 1
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if _inside(name, modules) and tensor.is_floating_point():
                first[name] = (place, tensor.shape)
                numbers = torch.arange(place, place + tensor.numel(), dtype=torch.float64)
                tensor.data = numbers.view(tensor.shape)
                place += tensor.numel()
    return _Places(first, place)


def _put_in_places(
    tensors: Mapping[str, Tensor], numbered: Mapping[str, Tensor], places: _Places
) -> tuple[dict[str, Tensor], list[str]]:
    """The original's tensors, and names of tensors whose numbers aren't those of a place.

    Args:
        tensors: Of the unpacked modules.
        numbered: Of the same modules, made of a model that holds its places.
        places: The original's.
    """
    moved: dict[str, Tensor] = {}
    unknown: list[str] = []
    values = torch.full((places.end,), torch.nan, dtype=torch.float64)
    for name, numbers in numbered.items():
        if name not in tensors:
            continue
        if not numbers.is_floating_point():
            moved[name] = tensors[name]
            continue
        index = numbers.flatten().to(torch.int64)
        if torch.equal(index.double(), numbers.flatten()) and _within(index, places.end):
            values[index] = tensors[name].flatten().double()
        else:
            unknown.append(name)
    for name, (first, shape) in places.first.items():
        found = values[first : first + shape.numel()]
        if bool(found.isnan().any()):
            unknown.append(name)
        moved[name] = found.view(shape).to(next(iter(tensors.values())).dtype)
    return moved, unknown


def _is_computed(model: nn.Module, name: str) -> bool:
    """Whether the model has a module of this name whose weight a parametrization computes."""
    try:
        return parametrize.is_parametrized(model.get_submodule(name))
    except AttributeError:  # inside a module that was unpacked
        return False


def _parts_of_weights(
    module: nn.Module, prefix: str, moved: dict[str, Tensor]
) -> dict[str, Tensor] | None:
    """What the parametrizations of a module compute its weights from; None where none gives them.

    Args:
        module: It stays as it is.
        prefix: Of its names in ``moved``.
        moved: All tensors; the weights are taken out.
    """
    twin = copy.deepcopy(module).eval()
    found = True
    for name in cast("nn.ModuleDict", twin.parametrizations):
        wanted = moved.pop(f"{prefix}{name}")
        try:
            with torch.no_grad():
                setattr(twin, name, wanted.to(getattr(twin, name)))
                given = getattr(twin, name).to(wanted)
        except (NotImplementedError, RuntimeError, ValueError):  # no inverse, or not of this weight
            return None
        rounding = 16 * torch.finfo(wanted.dtype).eps * float(wanted.abs().max())
        found = found and torch.allclose(given, wanted, rtol=0, atol=rounding)
    if not found:
        return None
    return {f"{prefix}{n}": t for n, t in twin.state_dict().items() if n.startswith(PARTS)}


def _within(index: Tensor, end: int) -> bool:
    return index.numel() == 0 or (int(index.min()) >= 1 and int(index.max()) < end)


def _inside(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)
