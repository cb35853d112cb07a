"""Folders of sentence-transformers: what stands beside the transformer, and belongs to the model.

``modules.json`` lists a transformer and what makes its hidden states an embedding. Only JSON and
safetensors are read; sentence-transformers isn't needed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rankfold.data.tokens import Wording
from rankfold.errors import InputError, visible
from rankfold.files.json_file import read_bytes, read_json
from rankfold.files.own_files import check_own_files, is_artifact
from rankfold.files.tensors import read_tensors
from rankfold.tasks.pooling import ACTIVATIONS, MODES, DenseStep, Normalized, Pooling, Step

MODULES_FILE = "modules.json"
SETTINGS_FILE = "config_sentence_transformers.json"
DENSE_FILE = "model.safetensors"
# What the file of max_seq_length and do_lower_case is called, by the age of the folder.
_TEXT_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_OWN = "sentence_transformers."  # before the names of its own classes
_KNOWN = ("Transformer", "Pooling", "Dense", "Normalize", "Dropout")
_SAFE_NAME = re.compile(r"[\w-][\w.-]{0,100}")
_COPIED = (".json", ".safetensors")
INSTEAD = (
    "Give the model as file.py:function whose output has sentence_embedding, or, for the "
    "transformer alone, a copy of the folder without modules.json"
)


@dataclass(frozen=True)
class SentenceFolder:
    """A folder of sentence-transformers.

    Attributes:
        root: Where ``modules.json`` lies.
        transformer: Where the transformer lies: there, or in the folder that it names.
        modules: Its entries, the transformer first.
    """

    root: Path
    transformer: Path
    modules: tuple[Mapping[str, Any], ...]

    def pooling(self) -> Pooling:
        """How it makes an embedding of hidden states.

        Raises:
            InputError: Says which file says what rankfold can't do.
        """
        modes: tuple[str, ...] | None = None
        steps: list[Step] = []
        for module in self.modules[1:]:
            kind, folder = _kind(module), self.root / module["path"]
            if kind == "Pooling":
                if modes is not None or steps:
                    raise InputError(
                        f"{self.root / MODULES_FILE} names a Pooling behind other modules; "
                        f"expected one, behind the Transformer. {INSTEAD}."
                    )
                modes = self._modes(folder / "config.json")
            elif kind == "Dense":
                steps.append(_dense(folder))
            elif kind == "Normalize":
                steps.append(Normalized())
        if modes is None:
            raise InputError(
                f"{self.root / MODULES_FILE} names no Pooling behind the Transformer, so it makes "
                f"no embedding of a text. {INSTEAD}."
            )
        return Pooling(modes, steps)

    def _modes(self, file: Path) -> tuple[str, ...]:
        said = _object(file)
        named = said.get("pooling_mode")
        if named is not None:
            wanted = {*(named.split("+") if isinstance(named, str) else map(str, named))}
        else:
            keys = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}
            keys |= {"weightedmean": "weightedmean_tokens"}
            # As its class has it: the mean, where nothing is said.
            wanted = {
                mode
                for mode in MODES
                if said.get(f"pooling_mode_{keys.get(mode, mode)}", mode == "mean") is True
            }
        if not wanted or wanted - MODES.keys():
            raise InputError(
                f"{file} names the pooling {', '.join(sorted(wanted)) or 'none'}; expected some of "
                f"{', '.join(MODES)}. {INSTEAD}."
            )
        if said.get("include_prompt", True) is not True and self.wording().prompt:
            raise InputError(
                f"{file} leaves the prompt {self.wording().prompt!r} out of the pooling "
                f"(include_prompt), which rankfold can't do. {INSTEAD}."
            )
        return tuple(mode for mode in MODES if mode in wanted)

    def wording(self) -> Wording:
        """What it does to a text before it is tokenized.

        Raises:
            InputError: Its files don't say it as they should.
        """
        file = self.root / SETTINGS_FILE
        said = _object(file) if file.is_file() else {}
        prompts, name = said.get("prompts") or {}, said.get("default_prompt_name")
        prompt = prompts.get(name) if isinstance(prompts, dict) and name is not None else ""
        if not isinstance(prompt, str):
            raise InputError(f"{file} has no prompt {name!r}; expected default_prompt_name in it.")
        return Wording(prompt, self._text_settings().get("do_lower_case") is True)

    def length(self) -> int | None:
        """Most tokens of a text, where it says so."""
        found = self._text_settings().get("max_seq_length")
        if found is None or (isinstance(found, int) and found > 1):
            return found
        raise InputError(f"{self.root} has max_seq_length {found!r}; expected a whole number.")

    def _text_settings(self) -> dict[str, Any]:
        files = (self.transformer / name for name in _TEXT_FILES)
        return next((_object(file) for file in files if file.is_file()), {})

    def copy_to(self, target: Path) -> None:
        """Copy what belongs to it beside the transformer's own files.

        Raises:
            InputError: A file can't be read.
        """
        first = {**self.modules[0], "path": ""}
        listed = json.dumps([first, *self.modules[1:]], indent=2, ensure_ascii=False)
        (target / MODULES_FILE).write_text(listed + "\n", encoding="utf-8")
        files = [*self._files()]
        check_own_files(self.root, [file for file, _ in files])
        for file, name in files:
            copied = target / name
            copied.parent.mkdir(exist_ok=True)
            if file.suffix == ".json":
                copied.write_bytes(read_bytes(file))
            else:
                shutil.copyfile(file, copied)

    def _files(self) -> Iterator[tuple[Path, Path]]:
        """The files, and what they are called in a copy."""
        found = [self.root / SETTINGS_FILE, *(self.transformer / name for name in _TEXT_FILES)]
        yield from ((file, Path(file.name)) for file in found if file.is_file())
        for module in self.modules[1:]:
            folder = self.root / module["path"]
            for file in sorted(folder.iterdir()) if folder.is_dir() else ():
                if file.is_file() and file.suffix in _COPIED:
                    yield file, Path(folder.name) / file.name


def sentence_folder(folder: Path) -> SentenceFolder | None:
    """What sentence-transformers keeps with a transformers folder; None where it keeps nothing.

    The transformer may lie in the folder of ``modules.json`` or in one that this names; of an
    artifact, nothing around it is looked at.

    Raises:
        InputError: ``modules.json`` names what rankfold doesn't know, or a path out of the folder.
    """
    if (folder / MODULES_FILE).is_file():
        modules = _modules(folder / MODULES_FILE)
        if modules[0]["path"] == "":
            return SentenceFolder(folder, folder, modules)
    parent = folder.absolute().parent
    if not is_artifact(folder) and _names_first(parent / MODULES_FILE, folder.name):
        return SentenceFolder(parent, folder, _modules(parent / MODULES_FILE))
    return None


def _names_first(file: Path, name: str) -> bool:
    """Whether a file, which may be of anything else, lists a module in the folder of this name."""
    try:
        listed = read_json(file)
    except InputError:
        return False
    first = listed[0] if isinstance(listed, list) and listed else None
    return isinstance(first, dict) and first.get("path") == name


def _modules(file: Path) -> tuple[Mapping[str, Any], ...]:
    listed = read_json(file)
    fine = isinstance(listed, list) and all(
        isinstance(one, dict) and all(isinstance(one.get(k), str) for k in ("path", "type"))
        for one in listed
    )
    if not fine or not listed:
        raise InputError(f"{file} is no list of modules with a path and a type each.")
    for place, module in enumerate(listed):
        kind, path = _kind(module), module["path"]
        if kind not in _KNOWN or (kind == "Transformer") != (place == 0):
            raise InputError(
                f"{file} names {visible(module['type'])} as module {place}; expected a Transformer "
                f"and behind it some of {', '.join(_KNOWN[1:])}, of sentence-transformers itself. "
                f"{INSTEAD}."
            )
        if not (_SAFE_NAME.fullmatch(path) or (path == "" and place == 0)):
            raise InputError(
                f"{file} names the path {visible(repr(path))}; expected the name of a folder in it."
            )
    return tuple(listed)


def _kind(module: Mapping[str, Any]) -> str:
    """The class of sentence-transformers that a module is of, or another class's whole name."""
    name = str(module["type"])
    return name.rpartition(".")[2] if name.startswith(_OWN) else name


def _dense(folder: Path) -> DenseStep:
    said = _object(folder / "config.json")
    for key in ("module_input_name", "module_output_name"):
        if said.get(key) not in (None, "sentence_embedding"):
            raise InputError(
                f"{folder / 'config.json'} has {key} {said[key]!r}; expected sentence_embedding. "
                f"{INSTEAD}."
            )
    activation = str(said.get("activation_function", "torch.nn.modules.activation.Tanh"))
    kind = activation.rpartition(".")[2]
    if not activation.startswith("torch.nn.") or kind not in ACTIVATIONS:
        raise InputError(
            f"{folder / 'config.json'} names the activation {visible(activation)}; expected one of "
            f"{', '.join(ACTIVATIONS)} of torch.nn. {INSTEAD}."
        )
    if not (folder / DENSE_FILE).is_file():
        raise InputError(
            f"{folder} has no {DENSE_FILE}; rankfold reads no pickles (.bin). Save the model again "
            "with sentence-transformers, safe_serialization=True."
        )
    tensors = read_tensors(folder / DENSE_FILE)
    weight, bias = tensors.pop("linear.weight", None), tensors.pop("linear.bias", None)
    if tensors or not _fits(weight, bias):
        raise InputError(
            f"{folder / DENSE_FILE} holds other tensors than linear.weight (out, in) and "
            f"linear.bias (out), those of a Dense. {INSTEAD}."
        )
    assert weight is not None
    return DenseStep(weight, bias, kind)


def _fits(weight: Tensor | None, bias: Tensor | None) -> bool:
    if weight is None or weight.dim() != 2:
        return False
    return bias is None or bias.shape == weight.shape[:1]


def _object(file: Path) -> dict[str, Any]:
    said = read_json(file)
    if not isinstance(said, dict):
        raise InputError(f"{file} holds a {type(said).__name__}; expected a JSON object.")
    return said
