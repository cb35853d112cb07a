"""Which files of a folder are a tokenizer's, and whether what is installed here reads them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from rankfold.errors import InputError

_PIECES = ("spiece.model", "sentencepiece*.model", "tokenizer.model", "spm*.model", "*.spm")
_FILES = ("tokenizer*", "vocab*", "merges.txt", "bpe.codes", "tekken.json", "*.tiktoken", *_PIECES)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has files of a tokenizer, of any kind that transformers knows."""
    return any(file.is_file() for pattern in _FILES for file in folder.glob(pattern))


def unread_pieces(folder: Path) -> str | None:
    """The SentencePiece model that is a folder's tokenizer and can't be read here, or None.

    transformers reads it by a package of its own, and asks for another one where it is missing.
    """
    if (folder / "tokenizer.json").is_file() or importlib.util.find_spec("sentencepiece"):
        return None
    found = sorted(file.name for pattern in _PIECES for file in folder.glob(pattern))
    return found[0] if found else None


def refuse_unread_pieces(folder: Path) -> None:
    """Refuse a tokenizer that needs a package which isn't installed.

    Raises:
        InputError: Names its file and the package.
    """
    if (pieces := unread_pieces(folder)) is not None:
        raise InputError(
            f"the tokenizer of {folder} is a SentencePiece model ({pieces}), and the package that "
            "reads it isn't installed: pip install sentencepiece."
        )
