"""The error for input that rankfold can't work with, and optional imports."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType


class InputError(ValueError):
    """Something that the user gave can't be used.

    The message names the input, says what was expected, and what to do.
    """


class ArtifactError(InputError):
    """A saved model can't be opened: it is damaged, of a newer version, or of another model.

    The message names the file or the field.
    """


@contextmanager
def opening_an_artifact() -> Iterator[None]:
    """Whatever is wrong with the input in here is wrong with an artifact; also a decorator."""
    try:
        yield
    except ArtifactError:
        raise
    except InputError as error:
        raise ArtifactError(str(error)) from error


MOST_LISTED = 20


def listed(problems: Sequence[str]) -> str:
    """Problems a line each, for the indented part of a message; of many, the first ones."""
    shown = "\n  ".join(problems[:MOST_LISTED])
    more = len(problems) - MOST_LISTED
    return f"{shown}\n  and {more} more" if more > 0 else shown


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: Its import name.
        extra: The extra of rankfold that installs it.

    Raises:
        InputError: It isn't installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise InputError(
            f"this needs {module}, which isn't installed: pip install 'rankfold[{extra}]'"
        ) from error
