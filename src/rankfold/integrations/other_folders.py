"""Folders that are near to one of a transformers model: what was met, and what to give instead."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rankfold.errors import InputError, listed, require, visible
from rankfold.files.json_file import read_json
from rankfold.files.own_files import is_plain_name
from rankfold.integrations.allowed import check_configuration

SHARDS = "model.safetensors.index.json"


def refuse_other_folders(folder: Path) -> None:
    """Refuse what is no folder of one model, or asks for code, downloads or files elsewhere.

    Raises:
        InputError: It is an adapter, a hub's cache, a checkpoint of training or the like, or a
            model of code in the folder; or its configuration asks for what isn't allowed.
    """
    if (folder / "adapter_config.json").is_file():
        raise InputError(_adapter(folder))
    if not (folder / "config.json").is_file():
        inner = [*_inner_folders(folder)]
        # sentence-transformers and diffusers keep other things in folders with a config.json, too.
        inner = [one for one in inner if _is_of_transformers(one)] or inner
        if not inner:
            raise InputError(f"{visible(folder)} is no transformers folder: it has no config.json.")
        what = "one of these" if len(inner) > 1 else "this"
        raise InputError(
            f"{visible(folder)} is no transformers folder: it has no config.json, but folders in "
            f"it have. Give {what}:\n  {listed([visible(one) for one in inner])}"
        )
    written = read_json(folder / "config.json", constants=True)
    if isinstance(written, dict) and _needs_code(written):
        raise InputError(_remote_code(folder, written))
    check_configuration(folder)
    if missing := _missing_shards(folder):
        raise InputError(
            f"{visible(folder)} lacks files of weights that {SHARDS} names: "
            f"{', '.join(map(visible, missing))}. Download or copy the folder again."
        )


def _missing_shards(folder: Path) -> list[str]:
    """Files that an index of weights names and the folder lacks."""
    named = {name for file in folder.glob("*.safetensors.index.json") for name in _shards(file)}
    return [name for name in sorted(named) if not (folder / name).is_file()]


def _shards(index_file: Path) -> set[str]:
    """The files that an index of weights names."""
    index = read_json(index_file)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict):
        raise InputError(
            f"{visible(index_file)} is no index of weights; expected an object with a "
            "weight_map. Download or copy the folder again."
        )
    named = {*map(str, places.values())}
    if elsewhere := [repr(name) for name in sorted(named) if not is_plain_name(name)]:
        raise InputError(
            f"{visible(index_file)} names files that don't lie beside it:\n  "
            f"{listed([*map(visible, elsewhere)])}\n"
            "Nothing outside of a folder is read. Put the files into it, and their names into the "
            "index."
        )
    return named


def _adapter(folder: Path) -> str:
    said = read_json(folder / "adapter_config.json", constants=True)
    base = said.get("base_model_name_or_path") if isinstance(said, dict) else None
    return (
        f"{visible(folder)} holds an adapter (adapter_config.json) for {visible(base)}; expected a "
        "whole model. Merge the two with peft: "
        "AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().save_pretrained(new), "
        "or the class of its task."
    )


def _inner_folders(folder: Path) -> Iterator[Path]:
    """Folders of models in a hub's cache, in the output of a training, or in a library's folder."""
    # A hub's cache has models--OWNER--NAME/snapshots/COMMIT, sentence-transformers 0_Transformer,
    # diffusers text_encoder, a training checkpoint-500.
    for pattern in ("*", "snapshots/*", "models--*/snapshots/*"):
        found = sorted(folder.glob(f"{pattern}/config.json"))
        yield from (file.parent for file in found if file.is_file())


def _is_of_transformers(folder: Path) -> bool:
    try:
        said = read_json(folder / "config.json", constants=True)
    except InputError:
        return False
    return isinstance(said, dict) and "model_type" in said


def _needs_code(written: dict[str, Any]) -> bool:
    """Whether a configuration names code of its own for what transformers doesn't have."""
    if not isinstance(written.get("auto_map"), dict):
        return False
    transformers: Any = require("transformers", "transformers")
    names = written.get("architectures") or [""]
    known = written.get("model_type") in transformers.CONFIG_MAPPING
    return not (known and hasattr(transformers, str(names[0])))


def _remote_code(folder: Path, written: dict[str, Any]) -> str:
    files = sorted({str(value).split(".")[0] + ".py" for value in written["auto_map"].values()})
    return (
        f"the model in {visible(folder)} is made by code of its own "
        f"({', '.join(map(visible, files))}), and rankfold runs no code from a folder. If you "
        "trust it, open the model yourself, with trust_remote_code=True, in a function that "
        "returns it, and give file.py:function; or give the model to rankfold.lossless in Python."
    )
