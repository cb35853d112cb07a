"""Weights in one safetensors file, or in several with an index, as transformers writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from rankfold.errors import InputError, listed, visible
from rankfold.files.json_file import read_json
from rankfold.files.own_files import is_plain_name
from rankfold.files.tensors import METADATA, read_names, read_tensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
USUAL_SIZE = 5_000_000_000  # bytes of a file, as transformers has it


def write_weights(
    folder: Path, tensors: Mapping[str, Tensor], largest: int = USUAL_SIZE
) -> list[Path]:
    """Write tensors into one file, or into several where that would be too large; gives them.

    Args:
        folder: Where to.
        tensors: By name. They are written from where they lie, without a copy of all.
        largest: Bytes of tensors in a file; a tensor alone may be larger.
    """
    shards = _shards(tensors, largest)
    if len(shards) == 1:
        names = [SINGLE]
    else:
        count = len(shards)
        names = [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
        places = {t: name for name, shard in zip(names, shards, strict=True) for t in shard}
        index = {
            "metadata": {"total_size": sum(map(_bytes, tensors.values()))},
            "weight_map": dict(sorted(places.items())),
        }
        text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
        (folder / INDEX).write_text(text, encoding="utf-8")
    for name, shard in zip(names, shards, strict=True):
        stored = {t: tensors[t].cpu().contiguous() for t in shard}
        save_file(stored, folder / name, metadata=METADATA)
    return [folder / name for name in names]


def weight_files(folder: Path) -> list[Path]:
    """The files of weights of a folder; none where it has neither one of them nor an index.

    Raises:
        InputError: The index is damaged, or names files that aren't there.
    """
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return [folder / SINGLE] if (folder / SINGLE).is_file() else []
    names = dict.fromkeys(_places(folder).values())
    lacking = [name for name in names if not (folder / name).is_file()]
    if lacking:
        raise InputError(
            f"{folder} lacks files that {INDEX} names:\n  {listed(lacking)}\n"
            "Download or copy the folder again."
        )
    return [folder / name for name in names]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, from one file or from all that its index names.

    Raises:
        InputError: A file is missing or damaged, or the index doesn't say where tensors are.
    """
    files = weight_files(folder) or [folder / SINGLE]
    if files == [folder / SINGLE]:
        return read_tensors(folder / SINGLE)
    places, names = _places(folder), {file.name: read_names(file) for file in files}
    held = [(tensor, name) for name, tensors in names.items() for tensor in tensors]
    wrong = sorted({*held} ^ {*places.items()})
    if wrong:
        said = [f"{tensor} in {name}" for tensor, name in wrong]
        raise InputError(
            f"{visible(folder / INDEX)} is damaged: what it names and what the files hold differ:\n"
            f"  {listed(said)}\nDownload or copy the folder again."
        )
    return {name: tensor for file in files for name, tensor in read_tensors(file).items()}


def weights_size(folder: Path) -> int:
    """Bytes of all files of weights of a folder."""
    return sum(file.stat().st_size for file in weight_files(folder))


def _shards(tensors: Mapping[str, Tensor], largest: int) -> list[list[str]]:
    """Names of the tensors of each file, in their order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + _bytes(tensor) > largest:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _bytes(tensor)
    return shards


def _places(folder: Path) -> dict[str, str]:
    """For each tensor the name of its file, by the index."""
    index = read_json(folder / INDEX)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places:
        raise InputError(f"{folder / INDEX} has no weight_map; expected one from names to files.")
    odd = [str(name) for name in places.values() if not is_plain_name(name)]
    if odd:
        raise InputError(
            f"{folder / INDEX} names what is no file beside it:\n  {listed(odd)}\n"
            "Download or copy the folder again."
        )
    return places


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
