"""Options of the command line that are fields of ``Settings``, made from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import Parameter
from types import NoneType
from typing import Annotated, Any, Literal, get_origin

import typer
from typer.models import OptionInfo

from rankfold.errors import InputError
from rankfold.settings import EVERYDAY, RESEARCH, Option, Settings, setting_options

SET = "set"  # of the option that takes any setting
_TRUTH = {"true": True, "false": False}
_WORDS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number"}


def setting_parameters() -> list[Parameter]:
    """An option for each setting, and ``--set`` for any."""
    known = setting_options().values()
    found = [
        Parameter(
            one.name,
            Parameter.KEYWORD_ONLY,
            default=None if _repeatable(one) else _shown_default(one),
            annotation=Annotated[_typed(one), setting_option(one.name)],
        )
        for one in known
    ]
    research = ", ".join(one.name for one in known if one.panel == RESEARCH)
    any_setting: OptionInfo = typer.Option(
        f"--{SET}",
        metavar="NAME=VALUE",
        help="Any setting by its name in Python; it overrides the setting's option. Repeatable. "
        f"For research: {research}.",
        rich_help_panel="Advanced",
    )
    annotation = Annotated[list[str] | None, any_setting]
    return [*found, Parameter(SET, Parameter.KEYWORD_ONLY, default=None, annotation=annotation)]


def setting_option(name: str) -> OptionInfo:
    """The option of a setting: its help, panel, and what it is where it isn't given."""
    one = setting_options()[name]
    words = name.replace("_", "-")
    switches = (f"--{words}/--no-{words}",) if one.type is bool else ()
    found: OptionInfo = typer.Option(
        *switches,
        help=help_text(one) + " Repeatable." * _repeatable(one),
        rich_help_panel=None if one.panel == EVERYDAY else one.panel,
        show_default=_default_text(one) or not _repeatable(one),
        hidden=one.panel == RESEARCH,
        metavar="PATTERN" if _repeatable(one) else None,
        autocompletion=completing(one.choices) if one.choices else None,
    )
    return found


def completing(words: Iterable[str]) -> Callable[[str], list[str]]:
    """What a shell completes the value of an option to."""
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


def help_text(one: Option) -> str:
    """What a setting means, and the words that it may be."""
    if all(word in one.help for word in one.choices):
        return one.help
    *others, last = one.choices
    return f"{one.help} One of {', '.join(others)} or {last}."


def chosen_settings(values: dict[str, Any]) -> Settings:
    """The settings, of values of their options, which are taken out of ``values``.

    Raises:
        InputError: A value is out of its range, or ``--set`` names no setting.
    """
    chosen = given_settings(values)
    for name in (SET, *chosen):
        del values[name]
    return Settings(**chosen)


def given_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by name, of values of their options; ``--set`` goes before the setting's own option.

    Raises:
        InputError: A value means nothing, or ``--set`` names no setting.
    """
    known = setting_options()
    chosen = {name: values[name] for name in known}
    for name, one in known.items():
        if _repeatable(one):
            chosen[name] = tuple(chosen[name] or ())
        elif isinstance(chosen[name], str):
            chosen[name] = parsed(one, chosen[name])
    for assignment in values[SET] or ():
        name, equals, text = assignment.partition("=")
        if not equals or name not in known:
            what = f"there is no setting {name!r}" if equals else f"{assignment!r} has no ="
            raise InputError(
                f"--{SET}: {what}; expected name=value with one of {', '.join(known)}."
            )
        chosen[name] = parsed(known[name], text)
    return chosen


def parsed(one: Option, text: str) -> Any:
    """The value that a text means, by the field's type.

    Raises:
        InputError: It means none.
    """
    if NoneType in one.alternatives and text == "none":
        return None
    plain = [kind for kind in one.alternatives if kind in _WORDS]
    if text in one.choices or (one.choices and not plain):
        return text  # a word that is none of the choices is refused by Settings
    if _repeatable(one):
        return tuple(text.split(","))
    for kind in plain:
        try:
            return _TRUTH[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            continue
    words = [_WORDS[kind] for kind in plain] + ["none"] * (NoneType in one.alternatives)
    expected = " or ".join([*words, *one.choices])
    raise InputError(f"{one.name} is {text!r}; expected {expected}.")


def _repeatable(one: Option) -> bool:
    return get_origin(one.type) is Sequence


def _typed(one: Option) -> Any:
    """The type that the command line reads: a text where words are allowed, to be parsed."""
    if _repeatable(one):
        return list[str] | None
    if one.choices:
        return str | None if NoneType in one.alternatives else str
    return one.type


def _default_text(one: Option) -> str | None:
    """What the help says of a default that is no plain value."""
    return ("on" if one.default else "off") if one.type is bool else one.unset


def _shown_default(one: Option) -> Any:
    is_text = any(get_origin(kind) is Literal for kind in one.alternatives)
    return str(one.default) if is_text and one.default is not None else one.default
