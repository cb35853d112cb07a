"""Plain text: its lines, and the windows of tokens that a language model reads it in."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from rankfold.errors import InputError


def read_text(file: Path) -> str:
    """The content of a UTF-8 text file.

    Raises:
        InputError: Missing, unreadable, not UTF-8, or empty.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"the text {file} is not UTF-8 (byte {error.start}); expected plain UTF-8 text. "
            f"Convert it, for example with iconv -f latin1 -t utf-8 {file}."
        ) from error
    except OSError as error:
        raise InputError(f"the text {file} can't be read: {error.strerror or error}.") from error
    if not text.strip():
        raise InputError(f"the text {file} is empty; expected UTF-8 text.")
    return text


def text_lines(text: str) -> list[str]:
    """The lines of a text as ``read_text`` gives it; other separators than newlines are text."""
    return text.removesuffix("\n").split("\n")


def token_windows(ids: Tensor, length: int) -> list[Tensor]:
    """Consecutive windows of tokens that do not overlap; an incomplete last one is dropped.

    Args:
        ids: ``(tokens,)``.
        length: Tokens a window.

    Returns:
        ``(length,)`` int64 tensors.
    """
    whole = len(ids) // length * length
    return [window.clone() for window in ids[:whole].split(length)] if whole else []
