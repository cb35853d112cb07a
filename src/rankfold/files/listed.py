"""Which files of an output folder are rankfold's own: those that the folder itself lists.

Nothing else is ever deleted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rankfold.errors import InputError
from rankfold.files.json_file import read_json

# Of an artifact, of an export, of a certificate of two given models; each lists the files.
MARKS = ("rankfold.json", "export.json", "certificate.json")

SIGNATURE_FILE, PAGE_FILE = "certificate.sig.json", "report.html"
# What is written into a folder once it is whole, so that its list can't have it.
_LATER = (SIGNATURE_FILE,)

# What rankfold wrote before its folders listed their files.
_BEFORE = (
    *MARKS, PAGE_FILE,
    "*.safetensors", "model.safetensors.index.json", "model.onnx", "model.onnx.data",
    "model.pt2", "certificate.json", "certificate.txt", "README.md", "config.json",
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.*", "merges.txt", "spiece.model", "sentencepiece*.model", "normalizer.json",
    "chat_template.*", "additional_chat_templates/*.jinja", "*processor_config.json",
    "spm*.model", "*.spm", "vocab-*.json", "bpe.codes", "tekken.json", "entity_vocab.json",
    "*.tiktoken", "modules.json", "sentence_*_config.json", "config_sentence_transformers.json",
    "[0-9]_*/*.json", "[0-9]_*/*.safetensors", "[0-9]_*/*.txt", *_LATER,
)  # fmt: skip


def file_names(folder: Path, *more: str) -> list[str]:
    """Names of all files in a folder, as its list of files says them; ``more`` are still to come.

    Links are files here, whatever they lead to.
    """
    return sorted({*more, *(name for name, kind in _entries(folder) if kind == "file")})


def unlisted(folder: Path) -> list[str]:
    """Names of what is in a folder and not in its list; of an empty inner folder, its own."""
    own = _listed(folder)
    entries = list(_entries(folder))
    files = [name for name, kind in entries if kind == "file"]
    foreign = [name for name in files if not _is_one_of(name, own)]
    empty = [
        f"{name}/"
        for name, kind in entries
        if kind == "folder" and not any(file.startswith(f"{name}/") for file in files)
    ]
    return sorted([*foreign, *(name for name in empty if not _holds_one(name, empty))])


def remove_listed(folder: Path) -> list[str]:
    """Delete what a folder lists, and the folder where nothing else is in it; gives what is left.

    Raises:
        OSError: Something can't be deleted.
    """
    left = unlisted(folder)
    own = [name for name in file_names(folder) if name not in left]
    for name in sorted(own, key=lambda name: name in MARKS):  # these say what may go: they go last
        (folder / name).unlink()
    inner = sorted((name for name, kind in _entries(folder) if kind == "folder"), reverse=True)
    for place in (*(folder / name for name in inner), folder):
        if f"{place.relative_to(folder).as_posix()}/" not in left:
            with suppress(OSError):  # it holds what is left
                place.rmdir()
    return left


def _listed(folder: Path) -> tuple[str, ...]:
    """Names, or patterns of names where the folder has no list."""
    for mark in MARKS:
        if (folder / mark).is_file():
            with suppress(InputError):  # damaged
                told: Any = read_json(folder / mark)
                names = told.get("files") if isinstance(told, dict) else None
                if isinstance(names, list) and all(isinstance(name, str) for name in names):
                    return (mark, *names, *_LATER)
    return _BEFORE


def _is_one_of(name: str, own: tuple[str, ...]) -> bool:
    if own is not _BEFORE:
        return name in own
    depth = name.count("/")
    return any(depth == one.count("/") and fnmatchcase(name, one) for one in own)


def _holds_one(name: str, names: list[str]) -> bool:
    """Whether an empty folder holds another: the innermost is named."""
    return any(other != name and other.startswith(name) for other in names)


def _entries(folder: Path) -> Iterator[tuple[str, str]]:
    for here, folders, names in os.walk(folder):
        links = [name for name in folders if Path(here, name).is_symlink()]
        for kind, found in (("file", [*names, *links]), ("folder", [*{*folders} - {*links}])):
            for name in found:
                yield Path(here, name).relative_to(folder).as_posix(), kind
