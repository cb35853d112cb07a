"""The app: how a function becomes a command, and how a command ends.

Results go to stdout, everything else to stderr, also what a user's own model prints. Exit codes:
0 done, 2 bad input or too little memory, 3 no model that satisfies what was asked, 4 a certificate
that does not agree, 5 a certificate of two given models that does not hold, 6 an exception of the
user's own code, 7 done, and stdout could not be written, 128 and the signal's number where one
ended it: 130 after Ctrl-C.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Collection
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
import typer
from typer.main import get_command

from rankfold.cli.options import gathered, in_panels, spread
from rankfold.cli.raised import BAD_INPUT, ending
from rankfold.cli.streams import unbreakable_streams
from rankfold.errors import note, visible
from rankfold.files.folder import written
from rankfold.machine.device import OUT_OF_MEMORY
from rankfold.machine.interruption import INTERRUPTED, exit_code, raising

DONE, NOT_FOUND, DIFFERS, DOES_NOT_HOLD, NOT_PRINTED = 0, 3, 4, 5, 7

app = typer.Typer(
    name="rankfold",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make a trained network smaller by low-rank factorization, without fine-tuning, and "
    "certify on held-out data that it is not worse.",
)

# Arguments of Python that the command line has under another name.
OTHER_NAMES = {
    "inputs": "--inputs or --input-shape",
    "model": "--model file.py:function",
    "original": "--model, and --weights where it needs it",
}
_VALUE = r"""(?:"(?P<quoted>[^"]*)"|(?P<bare>\w+(?:[./:-]+\w+)*))"""
_ARGUMENT = re.compile(rf"(?<![\w.])(?P<name>[a-z]\w*)=(?:{_VALUE}|(?![\w\"'(\[{{=]))")

_given: list[str] = []  # what the user has given to the command that runs
_SUBJECT = re.compile(r"(?P<name>[a-z]\w*)(?= (?:is|goes with|has no part) )")


def command(function: Callable[..., int]) -> Callable[..., None]:
    """Register a command.

    A parameter annotated with a dataclass of options is spread into the options that the
    dataclass lists. Bad input and interruptions end in one message and an exit code.
    """
    hints = get_type_hints(function, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    flat: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name in groups:
            flat += spread(hints[name])
        else:
            flat.append(parameter.replace(annotation=hints[name]))

    @functools.wraps(function)
    def run(**values: Any) -> None:
        note(*(one for value in values.values() for one in _items(value)))
        _given[:] = [text for value in values.values() for text in _texts(value)]
        before = len(written())

        def done() -> int:
            for name in groups:
                values[name] = gathered(hints[name], values)
            return function(**values)

        with unbreakable_streams() as streams:
            code = _ended(done, before)
            code = streams.code(code, NOT_PRINTED, _standing(before))
        raise typer.Exit(code)

    ordered = in_panels(flat)
    run.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in ordered}
    app.command()(run)
    return run


def _ended(done: Callable[[], int], before: int) -> int:
    """The exit code of a command, however it ends; what it has to say of that is said.

    Args:
        done: The command.
        before: How many outputs were written before it began.
    """
    try:
        with raising():
            return done()
    except torch.cuda.OutOfMemoryError:
        tell(f"error: {OUT_OF_MEMORY}")
    except Exception as error:
        if (found := ending(error)) is None:
            raise
        code, message, own = found
        say(f"error: {as_options(message)}" + (f"\n{own}" if own else ""), err=True)
        return code
    except SystemExit as error:
        tell(
            "error: the model's or the data's own code ended the program (SystemExit: "
            f"{error.code}); expected code that gives a model or data. Take its call of exit() out."
        )
    except KeyboardInterrupt as error:
        standing = _standing(before)
        tell(f"interrupted; {standing}" if standing else INTERRUPTED)
        return exit_code(error)
    return BAD_INPUT


def _standing(before: int) -> str:
    """Which outputs a command has written wholly, whatever became of it then."""
    named = ", ".join(visible(folder) for folder in written()[before:])
    return f"the result is whole, in {named}" if named else ""


def tell(message: str) -> None:
    """Say something on stderr, arguments of Python written as options."""
    say(as_options(message), err=True)


def say(message: str, *, err: bool = False) -> None:
    """Print a message, by default on stdout; what a terminal would interpret is written out."""
    typer.echo(visible(message, lines=True), file=sys.stderr if err else sys.stdout)


def as_options(text: str, names: Collection[str] = ()) -> str:
    """Arguments as Python writes them, ``batch_size=4``, as options: ``--batch-size 4``.

    So is the name that a message begins with, ``batch_size is 0``: it is what the user gave. Names
    that no command has an option for stay as they are, and so do what the user has given and
    ``names`` of layers: a path may hold ``seed=3``.
    """
    known = (*_given, *(name for name in names if "=" in name))
    if given := sorted((g for g in known if g in text), key=len, reverse=True):
        parts = re.split(f"({'|'.join(map(re.escape, given))})", text)
        return "".join(part if part in given else _as_options(part) for part in parts)
    return _as_options(text)


def _as_options(text: str) -> str:

    def option(found: re.Match[str]) -> str:
        name, value = found["name"], found["quoted"] or found["bare"]
        if value is None and name in OTHER_NAMES:
            return OTHER_NAMES[name]
        if name not in _option_names():
            return found[0]
        words = name.replace("_", "-")
        if value in ("True", "False"):
            return "--" + "no-" * (value == "False") + words
        return f"--{words}" if value is None else f"--{words} {value}"

    begun = _SUBJECT.match(text)
    if begun is not None and begun["name"] in _option_names():
        text = f"--{begun['name'].replace('_', '-')}{text[begun.end('name') :]}"
    return _ARGUMENT.sub(option, text)


def _texts(value: object) -> list[str]:
    """The texts and paths of an argument that hold what looks like an argument of Python."""
    return [text for text in _items(value) if "=" in text]


def _items(value: object) -> list[str]:
    """The texts and paths of an argument."""
    items = value if isinstance(value, list | tuple) else [value]
    return [str(item) for item in items if isinstance(item, str | Path)]


@functools.cache
def _option_names() -> frozenset[str]:
    """As Python writes them, of all commands."""
    commands: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    parameters = [one for made in commands.values() for one in made.params]
    return frozenset(str(one.name) for one in parameters if one.param_type_name == "option")
