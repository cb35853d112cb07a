"""The error for input that rankfold can't work with, and optional imports."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

MODEL = "an instance of an nn.Module, with its weights"


class InputError(ValueError):
    """Something that the user gave can't be used.

    The message names the input, says what was expected, and what to do. Names in it are shown as
    ``visible`` shows them.
    """

    def __init__(self, message: object) -> None:
        super().__init__(visible(message, lines=True))


class ArtifactError(InputError):
    """A saved model can't be opened: it is damaged, of a newer version, or of another model.

    The message names the file or the field.
    """


def check_kind(name: str, given: object, kinds: type | tuple[type, ...], expected: str) -> None:
    """Refuse an argument that is of another kind; True and False are no numbers.

    Args:
        name: Of the argument.
        given: Its value.
        kinds: What it may be.
        expected: The same in words.

    Raises:
        InputError: As said.
    """
    if not isinstance(given, kinds) or isinstance(given, bool):
        raise of_another_kind(name, given, expected)


def check_flag(name: str, given: object) -> bool:
    """The flag; refused is what is neither True nor False: ``"no"`` would count as True.

    Raises:
        InputError: As said.
    """
    if not isinstance(given, bool):
        raise of_another_kind(name, given, "True or False")
    return given


def path_of(name: str, given: object) -> Path:
    """The path of a folder that a text or a path says.

    Raises:
        InputError: It is neither.
    """
    if not isinstance(given, str | Path):
        raise of_another_kind(name, given, "the path of a folder, a text or a pathlib.Path")
    return Path(given)


def of_another_kind(name: str, given: object, expected: str) -> InputError:
    """The error for an argument, by its value where that is short."""
    if given is None or isinstance(given, bool | int | float | str):
        shown = repr(given)
    else:
        shown = f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__
    return InputError(f"{name} is {shown}; expected {expected}.")


@contextmanager
def opening_an_artifact() -> Iterator[None]:
    """Whatever is wrong with the input in here is wrong with an artifact; also a decorator."""
    try:
        yield
    except ArtifactError:
        raise
    except InputError as error:
        raise ArtifactError(str(error)) from error


# What a terminal or a page interprets in place of showing it: control characters, marks that turn
# the direction of writing, separators of lines, characters without ink or width, tags, and bytes of
# file names that are no text.
UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    "\u2028-\u202e\u2060-\u206f\u3164\ud800-\udfff\ufeff\uffa0\ufff9-\ufffb"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


MOST_NOTED, LONGEST_NOTED = 10_000, 1000
_noted: dict[str, None] = {}  # names with line feeds, the first ones


def note(*names: object) -> None:
    """Remember names that a user or a file gave: line feeds in them are none of a message."""
    for name in names:
        text = str(name)
        if "\n" in text and len(text) <= LONGEST_NOTED and text.strip():
            _noted[text] = None
            if len(_noted) > MOST_NOTED:
                del _noted[next(iter(_noted))]


def visible(text: object, *, lines: bool = False) -> str:
    r"""A text as it is, with what would not be shown as Python writes it: ``\n``, ``\u202e``.

    Args:
        text: A name of a layer, a file or a label, or a message with such names.
        lines: Whether line feeds stay: those of a message are its own, but for those of names that
            are noted.
    """
    text = str(text)
    if not lines:
        return UNSEEN.sub(_escaped, text)
    if "\n" in text:
        for name in [name for name in _noted if name in text]:
            text = text.replace(name, UNSEEN.sub(_escaped, name))
    return "\n".join(UNSEEN.sub(_escaped, line) for line in text.split("\n"))


def _escaped(found: re.Match[str]) -> str:
    return ascii(found[0])[1:-1]


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
