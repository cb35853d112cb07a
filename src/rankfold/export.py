"""Factorized models for tools that know nothing of rankfold.

``dense`` is the original architecture under its original names, factors multiplied out: as large as
the original, opened as the original is. ``pairs`` keeps the saving: each factorized layer becomes
two (or three) stock ``nn.Linear`` or ``nn.Conv2d`` in an ``nn.Sequential``. ``onnx`` and ``pt2``
are traced programs that keep the factors; each is run again from its file, and refused where its
outputs differ from the model's.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rankfold.artifact import (
    METADATA,
    WEIGHTS_FILE,
    check_output,
    folder_in_one_step,
    library_versions,
    load,
    load_tensors,
    read_manifest,
    skeleton,
)
from rankfold.embedding_modules import LowRankEmbedding, LowRankHead
from rankfold.errors import InputError
from rankfold.integrations import transformers as hf
from rankfold.integrations.example_inputs import Given
from rankfold.output_factors import Factorized
from rankfold.programs import PROGRAMS, Program, write_program
from rankfold.replace import put_modules
from rankfold.sizes import model_parameters, stored_tensors
from rankfold.unpack import unpack_named, unwrapped

Target: TypeAlias = Literal["dense", "pairs", "onnx", "pt2"]
TARGETS: tuple[Target, ...] = get_args(Target)
FILES: dict[Target, str] = {
    "dense": "*.safetensors",
    "pairs": "*.safetensors",
    "onnx": "model.onnx*",  # a large model's weights are in model.onnx.data
    "pt2": "model.pt2",
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
EXPORT_FILE = "export.json"  # says what the folder is, and that it may be overwritten
PAIRS_FILE = "pairs.safetensors"  # not the usual name: from_pretrained can't open it
PARTS = "parametrizations."  # torch's, before the names of what a weight is computed from
_FACTORIZED = (*get_args(Factorized), LowRankEmbedding, LowRankHead)
_OPTIONS = {
    nn.Embedding: ("num_embeddings", "embedding_dim", "padding_idx"),
    nn.Linear: ("in_features", "out_features"),
    nn.Conv2d: (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation",
        "groups", "padding_mode",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        folder: Where.
        to: The form.
        parameters: Of the exported model, tied ones once.
        bytes: Of the files that hold its weights.
        factorized_parameters: Of the artifact.
        factorized_bytes: Of its safetensors file.
        difference: Of ``onnx`` and ``pt2``: the largest difference of an output from the model's,
            as a share of the largest output, over inputs of other sizes than those traced with.
            None where nothing could run the file.
        dynamic: Of ``onnx`` and ``pt2``: the axes of any length.
    """

    folder: Path
    to: Target
    parameters: int
    bytes: int
    factorized_parameters: int
    factorized_bytes: int
    difference: float | None = None
    dynamic: tuple[str, ...] = ()


def export(
    folder: str | Path,
    out: str | Path,
    *,
    to: Target,
    model: nn.Module | None = None,
    overwrite: bool = False,
    inputs: Given | None = None,
    dtype: str | None = None,
) -> Exported:
    """Write an artifact in a form that needs no rankfold to be opened.

    Args:
        folder: The artifact.
        out: Where to; appears complete or not at all.
        to: ``dense``, ``pairs``, ``onnx`` or ``pt2`` (a program of ``torch.export``).
        model: For a model of the user's own class, an instance of it; it stays as it is.
        overwrite: Replace an earlier export that stands there.
        inputs: Of ``onnx`` and ``pt2``, where the configuration doesn't tell what the model is
            called with: a batch, a tensor or a mapping of the parameters of ``forward``; or the
            shape of one input without the batch, ``(3, 224, 224)``, or ``(length,)`` of tokens.
        dtype: Of ``onnx`` and ``pt2``: ``float32``, ``float16`` or ``bfloat16``; None for the
            artifact's own.

    Raises:
        InputError: Not an artifact, or not of this model; a layer has no such form; the model
            can't be traced, or its program computes something else; ``out`` can't be written.
    """
    _check_options(to, inputs, dtype)
    source, target = Path(folder), Path(out)
    check_output(target, overwrite, EXPORT_FILE)
    manifest = read_manifest(source)
    transformers = manifest["model"]["kind"] == "transformers"
    if model is not None:
        model = unwrapped(model)
    factorized = load(source, model=copy.deepcopy(model))
    if dtype is not None:
        factorized = factorized.to(DTYPES[dtype])
    parameters = model_parameters(factorized)
    program: Program | None = None
    unpacked: list[str] = manifest["unpacked"]
    about = {
        "made_by": "rankfold",
        "versions": library_versions(),
        "to": to,
        "class": manifest["model"]["class"],
    }
    with folder_in_one_step(target) as draft:
        if to == "pairs":
            plain = _write_pairs(draft, factorized, unpacked, about, source, transformers)
        elif to == "onnx" or to == "pt2":
            plain = factorized
            if transformers:
                hf.write_configuration_alone(plain, draft, source, hf.IN_A_PROGRAM)
            program = write_program(plain, draft / f"model.{to}", to, inputs)
            _write_json(draft / EXPORT_FILE, {**about, **program.described()})
        else:
            empty = skeleton(source, manifest) if model is None else copy.deepcopy(model)
            plain = _write_dense(draft, to_dense(factorized), empty, unpacked, source)
            _write_json(draft / EXPORT_FILE, about)
        if transformers:
            hf.copy_processing_files(source, draft)
    return Exported(
        target,
        to,
        model_parameters(plain),
        sum(file.stat().st_size for file in target.glob(FILES[to])),
        parameters,
        (source / WEIGHTS_FILE).stat().st_size,
        program.difference if program else None,
        program.any_length if program else (),
    )


def _check_options(to: str, inputs: Given | None, dtype: str | None) -> None:
    if to not in TARGETS:
        raise InputError(f"to is {to!r}; expected {', '.join(TARGETS[:-1])} or {TARGETS[-1]}.")
    if to not in PROGRAMS and (inputs is not None or dtype is not None):
        option = "dtype" if inputs is None else "inputs"
        raise InputError(f"{option} goes with {' and '.join(PROGRAMS)}; {to} keeps what is stored.")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; expected {', '.join(DTYPES)}.")


def to_dense(model: nn.Module) -> nn.Module:
    """Multiply the factors out in every factorized layer of ``model`` itself.

    The products are computed in float64 and rounded once to the layer's dtype.
    """
    dense = {
        name: copy.deepcopy(module).double().to_dense().to(next(module.parameters()).dtype)
        for name, module in _factorized(model).items()
    }
    put_modules(model, dense)
    return model


def to_pairs(model: nn.Module) -> nn.Module:
    """Make every factorized layer of ``model`` itself a sequence of stock layers."""
    factorized = _factorized(model)
    stock = {name: module.to_stock() for name, module in factorized.items()}
    # Uses of one embedding matrix go on sharing its large factor.
    first: dict[int, nn.Parameter] = {}
    for name, module in factorized.items():
        if isinstance(module, LowRankEmbedding | LowRankHead):
            large = stock[name][0 if isinstance(module, LowRankEmbedding) else 1]
            large.weight = first.setdefault(id(module.weight), large.weight)
    put_modules(model, stock)
    return model


def _factorized(model: nn.Module) -> dict[str, Any]:
    found = {name: m for name, m in model.named_modules() if isinstance(m, _FACTORIZED)}
    # The matrix of a conv in blocks is a part of it.
    return {name: m for name, m in found.items() if name.rpartition(".")[0] not in found}


# Dense


def _write_dense(
    draft: Path, dense: nn.Module, original: nn.Module, unpacked: list[str], source: Path
) -> nn.Module:
    tensors = packed(dense.state_dict(), original, unpacked, str(source))
    load_tensors(original, tensors, {}, str(source))
    if hf.is_transformers_model(original):
        hf.write_plain_folder(original, draft, source)
        return original
    # Every name, shared tensors twice: load_state_dict asks for all of them.
    complete = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    save_file(complete, draft / WEIGHTS_FILE, metadata=METADATA)
    return original


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
    places: dict[str, tuple[int, torch.Size]] = {}  # of each tensor: its first number, its shape
    count = 1
    with torch.no_grad():
        for name, tensor in numbered.state_dict(keep_vars=True).items():
            if _inside(name, outer) and tensor.is_floating_point():
                places[name] = (count, tensor.shape)
                numbers = torch.arange(count, count + tensor.numel(), dtype=torch.float64)
                tensor.data = numbers.view(tensor.shape)
                count += tensor.numel()
    unpack_named(numbered, names, where)
    values = torch.full((count,), torch.nan, dtype=torch.float64)
    wrong: set[str] = set()
    for name, numbers in numbered.state_dict().items():
        if not _inside(name, outer) or name not in tensors:
            continue
        if not numbers.is_floating_point():
            moved[name] = tensors[name]
            continue
        index = numbers.flatten().to(torch.int64)
        if not torch.equal(index.double(), numbers.flatten()) or not _within(index, count):
            wrong |= {module for module in outer if _inside(name, [module])}
            continue
        values[index] = tensors[name].flatten().double()
    for name, (first, shape) in places.items():
        found = values[first : first + shape.numel()]
        if bool(found.isnan().any()):
            wrong |= {module for module in outer if _inside(name, [module])}
        dtype = next(t.dtype for n, t in tensors.items() if _inside(n, outer))
        moved[name] = found.view(shape).to(dtype)
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


def _within(index: Tensor, count: int) -> bool:
    return index.numel() == 0 or (int(index.min()) >= 1 and int(index.max()) < count)


def _inside(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


# Pairs


def _write_pairs(
    draft: Path,
    model: nn.Module,
    unpacked: list[str],
    about: dict[str, Any],
    source: Path,
    transformers: bool,
) -> nn.Module:
    changed = [*_factorized(model), *unpacked]
    to_pairs(model)
    _refuse_own_modules(model, unpacked, source)
    made = {id(model.get_submodule(name)) for name in changed}
    layers = {
        name: [_described(part) for part in _parts(module)]
        for name, module in model.named_modules(remove_duplicate=False)
        if id(module) in made
    }
    tensors, shared = stored_tensors(model)
    stored = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(stored, draft / PAIRS_FILE, metadata=METADATA)
    _write_json(draft / EXPORT_FILE, {**about, "layers": layers, "shared": shared})
    kind = str(about["class"]).rpartition(".")[2]
    opening = _OPEN_TRANSFORMERS if transformers else _OPEN_OWN
    text = _README + opening.format(kind=kind) + "```\n"
    (draft / "README.md").write_text(text, encoding="utf-8")
    if transformers:
        hf.write_configuration_alone(model, draft, source, hf.IN_PAIRS)
    return model


def _parts(module: nn.Module) -> Iterable[nn.Module]:
    return module if isinstance(module, nn.Sequential) else [module]


def _described(layer: nn.Module) -> dict[str, Any]:
    kind = next(kind for kind in _OPTIONS if isinstance(layer, kind))
    options = {name: getattr(layer, name) for name in _OPTIONS[kind]}
    if kind is not nn.Embedding:
        options["bias"] = layer.bias is not None
    return {"kind": kind.__name__, **options}


def _refuse_own_modules(model: nn.Module, unpacked: Iterable[str], source: Path) -> None:
    for name in unpacked:
        module = model.get_submodule(name)
        if any(type(part) not in _OPTIONS for part in _parts(module)):
            raise InputError(
                f"{source} can't be exported as pairs: its module {name} is made of several layers "
                f"by rankfold's {type(module).__name__}, which is no sequence. Use --to dense."
            )


_README = """\
# A factorized model of stock layers

Written by `rankfold export --to pairs`. Each factorized layer is an `nn.Sequential` of two or three
stock layers; `export.json` lists them. This opens it, without rankfold:

```python
import json
from pathlib import Path

from safetensors.torch import load_file
from torch import nn


def open_pairs(folder, model):
    told = json.loads((Path(folder) / "export.json").read_text(encoding="utf-8"))
    for name, parts in told["layers"].items():
        layers = [getattr(nn, part.pop("kind"))(**part) for part in parts]
        owner, _, leaf = name.rpartition(".")
        layer = nn.Sequential(*layers) if len(layers) > 1 else layers[0]
        setattr(model.get_submodule(owner), leaf, layer)
    tensors = load_file(Path(folder) / "pairs.safetensors")
    tensors |= {other: tensors[name] for other, name in told["shared"].items()}
    model.load_state_dict(tensors, assign=True)
    for other, name in told["shared"].items():
        owner, _, leaf = other.rpartition(".")
        source, _, tensor = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, getattr(model.get_submodule(source), tensor))
    return model.eval()


"""
_OPEN_TRANSFORMERS = """\
from transformers import AutoConfig, {kind}

folder = "."
model = open_pairs(folder, {kind}(AutoConfig.from_pretrained(folder)))
"""
_OPEN_OWN = """\
folder = "."
model = open_pairs(folder, {kind}())  # your own class
"""


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
