"""Each factorized layer as two stock layers, one after the other."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from rankfold.errors import InputError, visible
from rankfold.export.names import SUMMARIES
from rankfold.export.targets import (
    OpenedArtifact,
    Written,
    factorized_modules,
    place_of_shared_factor,
)
from rankfold.files.tensors import METADATA
from rankfold.integrations import transformers as hf
from rankfold.model.replace import put_modules
from rankfold.model.sizes import stored_tensors

PAIRS_FILE = "pairs.safetensors"  # not the usual name: from_pretrained can't open it

_OPTIONS = {
    nn.Embedding: ("num_embeddings", "embedding_dim", "padding_idx"),
    nn.Linear: ("in_features", "out_features"),
    nn.Conv2d: (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation",
        "groups", "padding_mode",
    ),
}  # fmt: skip


def to_pairs(model: nn.Module) -> nn.Module:
    """Make every factorized layer of ``model`` itself a sequence of stock layers."""
    factorized = factorized_modules(model)
    stock = {name: module.to_stock() for name, module in factorized.items()}
    # Uses of one embedding matrix go on sharing its large factor.
    first: dict[int, nn.Parameter] = {}
    for name, module in factorized.items():
        if (place := place_of_shared_factor(module)) is not None:
            large = stock[name][place]
            large.weight = first.setdefault(id(module.weight), large.weight)
    put_modules(model, stock)
    return model


class Pairs:
    """The export target ``pairs``."""

    name = "pairs"
    summary = SUMMARIES["pairs"]
    options = ()
    files = "*.safetensors"

    def write(self, opened: OpenedArtifact, draft: Path) -> Written:
        """Write the tensors, the list of stock layers and the lines that open them."""
        model = opened.model
        changed = [*factorized_modules(model), *opened.unpacked]
        to_pairs(model)
        _refuse_own_modules(model, opened.unpacked, opened.folder)
        made = {id(model.get_submodule(name)) for name in changed}
        layers = {
            name: [_described(part) for part in _parts(module)]
            for name, module in model.named_modules(remove_duplicate=False)
            if id(module) in made
        }
        tensors, shared = stored_tensors(model)
        stored = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(stored, draft / PAIRS_FILE, metadata=METADATA)
        kind = visible(opened.manifest["model"]["class"]).rpartition(".")[2]
        opening = _OPEN_TRANSFORMERS if opened.of_transformers else _OPEN_OWN
        text = _README + opening.format(kind=kind) + "```\n"
        (draft / "README.md").write_text(text, encoding="utf-8")
        if opened.of_transformers:
            hf.write_configuration_alone(model, draft, opened.folder, hf.IN_PAIRS)
        return Written(model, told={"layers": layers, "shared": shared})


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
                f"by rankfold's {type(module).__name__}, which is no sequence. "
                'Use to="dense".'
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
