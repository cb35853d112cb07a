"""``run.toml``: all options of a run, written into its folder and read again by ``--config``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from rankfold.cli.setting_options import SET, given_settings
from rankfold.errors import InputError, visible
from rankfold.files.json_file import read_bytes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RUN_FILE = "run.toml"
COMMAND = "command"  # the key that says whose options these are

# They say how a command is read and what it prints, and which result may be replaced now.
_NOT_RECORDED = frozenset(
    {"config", "help", "help_all", "quiet", "verbose", "json", "overwrite", SET}
)
_HEAD = """\
# What `rankfold {command}` was called with. `rankfold {command} --config {file}` repeats the run;
# what is given on the command line goes before what stands here. Paths are as they were given:
# those that are relative begin at the folder that the command runs in. --overwrite and --json are
# not recorded.
"""

_run: dict[str, str] = {}  # files to write beside the result of the command that runs


def _read(context: typer.Context, value: Path | None) -> Path | None:
    """What a file says becomes the default of each option."""
    if value is not None and not context.resilient_parsing:
        try:
            context.default_map = read_config(value, str(context.info_name), context.command.params)
        except InputError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
    return value


Config: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        is_eager=True,
        callback=_read,
        metavar="FILE",
        help=f"Take the options of this {RUN_FILE}, which a run writes into its folder; those "
        "given here go before them.",
        show_default="none",
    ),
]


def read_config(file: Path, command: str, parameters: Iterable[Any]) -> dict[str, Any]:
    """The options of a file by their names in Python, as the command line would give them.

    Args:
        file: The file.
        command: The command that reads it.
        parameters: Of that command.

    Raises:
        InputError: It can't be read, is of another command, or has what is no option.
    """
    name = visible(file)
    try:
        found = tomllib.loads(read_bytes(file).decode())
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is no TOML: {error}. Correct it, or run without it.") from None
    of = found.pop(COMMAND, command)
    if of != command:
        raise InputError(
            f"{name} holds the options of {of!r}, and this is {command}; expected those of "
            f"{command}."
        )
    known = {one.name.replace("_", "-"): one for one in parameters}
    for left_out in _NOT_RECORDED:
        known.pop(left_out.replace("_", "-"), None)
    if unknown := [key for key in found if key not in known]:
        raise InputError(
            f"{name}: {command} has no option {', '.join(map(repr, unknown))} that is read from a "
            f"file; expected some of {', '.join(known)}."
        )
    return {
        known[key].name: _as_typed(name, key, value, known[key]) for key, value in found.items()
    }


def _as_typed(file: str, key: str, value: object, parameter: Any) -> Any:
    """A value as it would be typed; what is no value of such an option is refused by it."""
    expected = "a text, a number, true or false"
    if getattr(parameter, "multiple", False):
        if isinstance(value, list) and all(isinstance(one, str) for one in value):
            return value
        expected = "a list of texts"
    elif isinstance(value, bool):
        if getattr(parameter, "is_flag", False):
            return value
        expected = "a text or a number"
    elif getattr(parameter, "is_flag", False):
        expected = "true or false"
    elif isinstance(value, str | int | float):
        return value if isinstance(value, str) else repr(value)
    raise InputError(f"{file}: {key} is {value!r}; expected {expected}.")


def remember(command: str, values: Mapping[str, Any]) -> None:
    """The command that runs has these options, by their names in Python."""
    _run[RUN_FILE] = config_text(command, values)


def run_files() -> dict[str, str]:
    """What the command that runs writes into the folder of its result, by file name."""
    return dict(_run)


def config_text(command: str, values: Mapping[str, Any]) -> str:
    """A file of options that ``read_config`` reads; those that have no value are named.

    Raises:
        InputError: ``--set`` names no setting.
    """
    given = {**values, **given_settings(values)} if SET in values else dict(values)
    lines, unset = [], []
    for name, value in given.items():
        key = name.replace("_", "-")
        if name in _NOT_RECORDED:
            continue
        text = None if value is None or value in ((), []) else _toml(value)
        if text is None:
            unset.append(key)
        else:
            lines.append(f"{key} = {text}")
    head = _HEAD.format(command=command, file=RUN_FILE)
    rest = f"# Without a value: {', '.join(unset)}\n" if unset else ""
    return f"{head}{COMMAND} = {_toml(command)}\n" + "\n".join(lines) + f"\n{rest}"


def _toml(value: object) -> str | None:
    """A value as TOML writes it; None for a path that is no text."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        texts = [_toml(one) for one in value]
        return None if None in texts else f"[{', '.join(map(str, texts))}]"
    text = str(value)
    if any("\ud800" <= one <= "\udfff" for one in text):
        return None
    # JSON's texts are TOML's, but for the control character that JSON lets stand.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
