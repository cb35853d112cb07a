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
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias, get_type_hints, overload

import typer
from typer.main import get_command

from rankfold.cli.config import remember
from rankfold.cli.lazy import LazyGroup
from rankfold.cli.logs import loud_stderr, told
from rankfold.cli.options import OF_ALL, gathered, in_panels, of_all_commands, spread
from rankfold.cli.printed import error_json, print_json
from rankfold.cli.raised import BAD_INPUT, ending
from rankfold.cli.short_help import ShortHelp
from rankfold.cli.streams import unbreakable_streams
from rankfold.errors import InputError, note, visible
from rankfold.files.folder import written
from rankfold.machine.interruption import INTERRUPTED, exit_code, raising
from rankfold.machine.memory import memory_ran_out

DONE, NOT_FOUND, DIFFERS, DOES_NOT_HOLD, NOT_PRINTED = 0, 3, 4, 5, 7

app = typer.Typer(
    name="rankfold",
    cls=LazyGroup,
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

Function: TypeAlias = Callable[..., int]
Command: TypeAlias = Callable[..., None]

_given: list[str] = []  # what the user has given to the command that runs
_SUBJECT = re.compile(r"(?P<name>[a-z]\w*)(?= (?:is|goes with|has no part) )")


@overload
def command(function: Function, *, needs: str = "", repeats: bool = False) -> Command: ...


@overload
def command(*, needs: str = "", repeats: bool = False) -> Callable[[Function], Command]: ...


def command(
    function: Function | None = None, *, needs: str = "", repeats: bool = False
) -> Command | Callable[[Function], Command]:
    """Register a command.

    A parameter annotated with a dataclass of options is spread into the options that the
    dataclass lists. Bad input and interruptions end in one message and an exit code.

    Args:
        function: The command; its name is the command's.
        needs: A module that is imported before it runs. The help is shown without it, and while it
            is imported a signal ends the command at once.
        repeats: Whether it takes its options from a file, too: ``--config``. It then writes
            ``run_files()`` beside its result.
    """
    if function is None:
        return functools.partial(_registered, needs=needs, repeats=repeats)
    return _registered(function, needs=needs, repeats=repeats)


def _registered(function: Function, *, needs: str, repeats: bool) -> Command:
    hints = get_type_hints(function, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    flat: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name in groups:
            flat += spread(hints[name])
        else:
            flat.append(parameter.replace(annotation=hints[name]))
    flat += of_all_commands(repeats)

    @functools.wraps(function)
    def run(**values: Any) -> None:
        note(*(one for value in values.values() for one in _items(value)))
        _given[:] = [text for value in values.values() for text in _texts(value)]
        before = len(written())
        of_all = {name: values.pop(name) for name in OF_ALL if name in values}
        levels = {name: of_all[name] for name in ("quiet", "verbose")}
        as_json = bool(values.get("json"))

        def done() -> int:
            if all(levels.values()):
                raise InputError("--quiet and --verbose contradict each other; give one of them.")
            with told(function.__name__, values, **levels):
                if repeats:
                    remember(function.__name__, values)
                own = dict(values)
                for name in groups:
                    own[name] = gathered(hints[name], own)
                return function(**own)

        with unbreakable_streams() as streams:
            code = _ended(done, before, needs=needs, as_json=as_json)
            code = streams.code(code, NOT_PRINTED, _standing(before))
        raise typer.Exit(code)

    ordered = in_panels(flat)
    run.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in ordered}
    app.command(cls=ShortHelp)(run)
    return run


def _ended(done: Callable[[], int], before: int, *, as_json: bool, needs: str = "") -> int:
    """The exit code of a command, however it ends; what it has to say of that is said.

    Args:
        done: The command.
        before: How many outputs were written before it began.
        as_json: Whether stdout holds one JSON object, also of an error.
        needs: A module that is imported first; a signal is no exception meanwhile.
    """
    own = ""
    try:
        if needs:
            import_module(needs)
        with raising():
            return done()
    except Exception as error:
        if (found := ending(error)) is None:
            raise
        code, message, own = found
        message = as_options(message)
        say(f"error: {message}" + (f"\n{own}" if own else ""), err=True)
    except SystemExit as error:
        code = BAD_INPUT
        message = (
            "the model's or the data's own code ended the program (SystemExit: "
            f"{error.code}); expected code that gives a model or data. Take its call of exit() out."
        )
        tell(f"error: {message}")
    except KeyboardInterrupt as error:
        standing = _standing(before)
        code, message = exit_code(error), f"interrupted; {standing}" if standing else INTERRUPTED
        tell(message)
    if as_json:
        print_json(error_json(code, message, own))
    return code


def _standing(before: int) -> str:
    """Which outputs a command has written wholly, whatever became of it then."""
    named = ", ".join(visible(folder) for folder in written()[before:])
    return f"the result is whole, in {named}" if named else ""


def tell(message: str) -> None:
    """Say something on stderr, arguments of Python written as options."""
    say(as_options(message), err=True)


def say(message: str, *, err: bool = False) -> None:
    """Print a message, by default on stdout; what a terminal would interpret is written out."""
    typer.echo(visible(message, lines=True), file=loud_stderr() if err else sys.stdout)


def warn(trouble: str | None) -> None:
    """Say a warning on stderr, if there is one."""
    if trouble is not None:
        tell(f"warning: {trouble}")


def mention(message: str) -> None:
    """Say on stderr what is no warning: ``--quiet`` leaves it out."""
    if loud_stderr() is sys.stderr:
        tell(message)


def as_options(text: str, names: Collection[str] = ()) -> str:
    """``options_for``; the text itself where memory is too small to find out what options are."""
    try:
        return options_for(text, names)
    except (ImportError, MemoryError, OSError) as error:
        if not memory_ran_out(error):
            raise
        return text


def options_for(text: str, names: Collection[str] = ()) -> str:
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


def all_commands() -> dict[str, Any]:
    """All commands by name, imported."""
    group: Any = get_command(app)
    context = typer.Context(group)
    return {name: group.get_command(context, name) for name in group.list_commands(context)}


@functools.cache
def _option_names() -> frozenset[str]:
    """As Python writes them, of all commands."""
    parameters = [one for made in all_commands().values() for one in made.params]
    return frozenset(str(one.name) for one in parameters if one.param_type_name == "option")
