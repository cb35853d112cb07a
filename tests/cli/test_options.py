"""The options as the command line shows and reads them, made from ``Settings``."""

from __future__ import annotations

import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from rankfold.cli import app
from rankfold.cli.app import all_commands, as_options
from rankfold.cli.lazy import COMMANDS
from rankfold.cli.options import OF_ALL, PANELS, Reading
from rankfold.cli.setting_options import SET, chosen_settings, help_text, setting_parameters
from rankfold.errors import InputError
from rankfold.settings import RESEARCH, Option, Settings, setting_options

PAGE = Path(__file__).parents[2] / "docs" / "options.md"
COMPRESSING = ("lossless", "compact")


def parameters(command: str) -> dict[str, Any]:
    """Options of a command by Python's name."""
    made = all_commands()[command]
    return {one.name: one for one in made.params if one.param_type_name == "option"}


def written(one: Any) -> str:
    return ", ".join(f"`{name}`" for name in (*one.opts, *one.secondary_opts))


def shown_help(command: str, width: int, option: str = "--help") -> str:
    environment = {"COLUMNS": str(width), "NO_COLOR": "1"}
    done = CliRunner().invoke(app, [command, option], env=environment)
    assert done.exit_code == 0
    return done.stdout


LINES = 40  # of a screen


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_fits_a_screen_and_help_all_has_the_rest(command: str) -> None:
    short, whole = shown_help(command, 100), shown_help(command, 100, "--help-all")
    assert len(short.splitlines()) <= LINES
    assert "--quiet" in whole and "--quiet" not in short
    for name, one in parameters(command).items():
        option = f"{max(one.opts, key=len)} "
        assert (option in short) == (one.rich_help_panel is None), name
        assert (option in whole) == (not one.hidden), name
    assert short == shown_help(command, 100)  # what is left out is hidden meanwhile alone


@pytest.mark.parametrize("command", COMMANDS)
def test_data_and_out_come_first(command: str) -> None:
    names = [name for name, one in parameters(command).items() if not one.rich_help_panel]
    first = [name for name in ("data", "out") if name in names]
    assert names[: len(first)] == first


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_says_what_it_does(command: str) -> None:
    for name, one in parameters(command).items():
        if name == "help":
            continue
        assert one.help[0].isupper() or one.help.startswith(("bounded", "lossless")), name
        assert one.help.rstrip()[-1] == ".", name
        assert len(one.help.split()) >= 3, name
        assert not re.search(r"[Ll]ikewise|Of that|[Aa]s for --", f"{one.help} {one.show_default}")


WORDS = {  # what a shell completes, beside the choices of settings
    ("lossless", "size_of"): ["model", "factorizable"],
    ("lossless", "require"): ["lossless"],
    ("export", "to"): ["dense", "pairs", "onnx", "pt2"],
    ("export", "dtype"): ["float32", "float16", "bfloat16"],
}
WORDS |= {
    (command, name): [*one.choices]
    for command in COMPRESSING
    for name, one in setting_options().items()
    if one.choices
}


@pytest.mark.parametrize(("command", "name"), WORDS)
def test_choices_complete(command: str, name: str) -> None:
    words, one = WORDS[command, name], parameters(command)[name]
    context = typer.Context(all_commands()[command])

    def completed(begun: str) -> list[str]:
        return [item.value for item in one.shell_complete(context, begun)]

    assert completed("") == words
    assert completed(words[-1][:3]) == [word for word in words if word.startswith(words[-1][:3])]
    assert completed("?") == []


@pytest.mark.parametrize("command", COMPRESSING)
def test_few_options_are_everyday_ones(command: str) -> None:
    shown = shown_help(command, 100)
    everyday = shown.partition("─ Options ─")[2].partition("╰")[0]
    names = re.findall(r"^│[* ]+--([\w-]+)", everyday, re.MULTILINE)
    assert 8 <= len(names) <= 12, names
    assert {"data", "out", "task", "limit", "include", "exclude", "device"} < {*names}
    assert ("size" if command == "lossless" else "margin") in names


@pytest.mark.parametrize("command", COMPRESSING)
@pytest.mark.parametrize("width", [80, 120])
def test_help_is_whole_at_every_width(command: str, width: int) -> None:
    shown = shown_help(command, width, "--help-all")
    assert "…" not in shown
    assert "ikewise" not in shown
    assert max(map(len, shown.splitlines())) <= width
    titles = re.findall(r"─ ([A-Z][\w ]+?) ─", shown)
    assert titles == ["Arguments", *PANELS[:-1]]


@pytest.mark.parametrize("command", COMPRESSING)
def test_every_setting_is_an_option_with_its_help_and_default(command: str) -> None:
    found = parameters(command)
    for name, setting in setting_options().items():
        one = found[name]
        assert one.opts == [f"--{name.replace('_', '-')}"]
        assert one.help.startswith(setting.help)
        assert one.hidden == (setting.panel == RESEARCH)
        assert all(word in one.help for word in setting.choices)
    research = [one.name for one in setting_options().values() if one.panel == RESEARCH]
    assert ", ".join(research) in found[SET].help


def chosen(**given: Any) -> Settings:
    values = {one.name: one.default for one in setting_parameters()} | given
    return chosen_settings(values)


def test_without_options_the_settings_are_the_defaults() -> None:
    assert chosen() == Settings()


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("damping=auto", "damping", "auto"),
        ("damping=.2", "damping", 0.2),
        ("output_damping=3", "output_damping", 3.0),
        ("output_damping=none", "output_damping", None),
        ("shrinkage=false", "shrinkage", False),
        ("refit=True", "refit", True),
        ("step_groups=4", "step_groups", 4),
        ("curvature=sampled", "curvature", "sampled"),
        ("step_estimator=raw", "step_estimator", "raw"),
        ("include=a.*,b", "include", ("a.*", "b")),
        ("limit=9", "limit", 9),
        ("limit=none", "limit", None),
        ("task=none", "task", None),
    ],
)
def test_set_reads_a_value_by_the_type_of_the_field(text: str, name: str, value: object) -> None:
    given = {"limit": 5, "output_damping": 1.0, "task": "teacher"} if value is None else {}
    found = getattr(chosen(set=[text], **given), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("curvatur=auto", r"no setting 'curvatur'.*task, effort, objective.*batch_size"),
        ("curvature", r"'curvature' has no =.*name=value"),
        ("curvature=all", r"curvature is 'all'; expected one of auto, empirical, sampled"),
        ("step_groups=1.5", r"step_groups is '1.5'; expected a whole number\."),
        ("shrinkage=maybe", r"shrinkage is 'maybe'; expected true or false\."),
        ("output_damping=auto", r"output_damping is 'auto'; expected a number or none\."),
        ("damping=x", r"damping is 'x'; expected a number or auto\."),
        ("rounds=0", r"rounds is 0; expected 1 or more"),
    ],
)
def test_set_refuses_what_is_no_setting(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        chosen(set=[text])


@pytest.mark.parametrize(
    ("python", "options"),
    [
        ("or overwrite=True.", "or --overwrite."),
        ("leave embeddings=True away", "leave --embeddings away"),
        ("with refit=False, say", "with --no-refit, say"),
        ("smaller batches (batch_size=), or", "smaller batches (--batch-size), or"),
        ("allow more by length=.", "allow more by --length."),
        ('use test="bounded".', "use --test bounded."),
        ('device="cuda:1" is', "--device cuda:1 is"),
        ("limit=4.", "--limit 4."),
        ("mean= and std= need images", "--mean and --std need images"),
        ('to="onnx" or to="pt2"', "--to onnx or --to pt2"),
        ("an instance of it by model=.", "an instance of it by --model file.py:function."),
        ("give the original: original=", "give the original: --model, and --weights where it"),
        ("Give inputs=, which", "Give --inputs or --input-shape, which"),
        # What no command has as an option, and what is no argument, stays.
        ("load(folder, as_saved=False)", "load(folder, as_saved=False)"),
        ("timm:resnet18,num_classes=10", "timm:resnet18,num_classes=10"),
        ("x.size=3 and size=(2, 3), limit==4", "x.size=3 and size=(2, 3), limit==4"),
        ("the size is 0.0", "the size is 0.0"),
    ],
)
def test_arguments_of_python_are_written_as_options(python: str, options: str) -> None:
    assert as_options(python).startswith(options)


def values_of(one: Option) -> str:
    names = {bool: "true, false", int: "whole number", float: "number", str: "text"}
    words = [f"`{word}`" for word in one.choices]
    plain = [names[kind] for kind in one.alternatives if kind in names]
    return ", ".join([*words, *plain]) or "patterns"


def default_of(one: Option) -> str:
    if one.unset is not None:
        return f"{one.unset} (`None`)"
    return "all" * (one.name == "include") or "none" * (one.default == ()) or f"`{one.default}`"


def options_page() -> str:
    """The table of all options: of the settings by panel, then of each command."""
    lines = [
        "# Options",
        "",
        "Settings decide a result. Python takes them as keywords of `lossless`, `compact` and "
        "`prepare`, the command line as options of `lossless` and `compact`. `--set name=value` "
        "takes each by its Python name. `RANKFOLD_WRITE_OPTIONS=1 python -m pytest "
        "tests/cli/test_options.py` writes this page.",
    ]
    found = parameters("lossless")
    for panel in PANELS:
        own = [one for one in setting_options().values() if one.panel == panel]
        if own:
            title = "Everyday" if panel == PANELS[0] else panel
            lines += ["", f"## {title}", ""]
            if panel == RESEARCH:
                lines += ["For ablations; `--help` does not show them.", ""]
            lines += [
                "| Python | command line | values | default | meaning |",
                "| --- | --- | --- | --- | --- |",
            ]
            lines += [
                f"| `{one.name}` | {written(found[one.name])} | {values_of(one)} | "
                f"{default_of(one)} | {one.help} |"
                for one in own
            ]
    shared = parameters("lossless").keys() & parameters("compact").keys()
    reading = {field.name for field in fields(Reading)}
    groups = [("`lossless` and `compact`, beside the settings", "lossless", shared)]
    groups += [(f"`{name}` alone", name, parameters(name).keys() - shared) for name in COMPRESSING]
    others = [name for name in COMMANDS if name not in COMPRESSING]
    of_all = {*OF_ALL, "help"} - {"config"}
    groups += [(f"`{name}`", name, parameters(name).keys() - reading - of_all) for name in others]
    groups = [group for group in groups if group[2]]
    for title, command, names in groups:
        lines += ["", f"## {title}", ""]
        if command in ("evaluate", "verify"):
            said = ", ".join(
                f"`{parameters(command)[one.name].opts[0]}`" for one in fields(Reading)
            )
            lines += [f"Beside these, as above: {said}.", ""]
        lines += ["| option | meaning |", "| --- | --- |"]
        lines += [
            f"| {written(one)} | {one.help} |"
            for name, one in parameters(command).items()
            if name in names and not (name in setting_options() and command in COMPRESSING)
        ]
    return "\n".join(lines) + "\n"


def test_the_page_of_options_is_what_the_fields_say() -> None:
    if os.environ.get("RANKFOLD_WRITE_OPTIONS"):
        PAGE.write_text(options_page())
    assert PAGE.read_text() == options_page()


def test_words_are_listed_only_where_the_help_does_not_name_them() -> None:
    objective, form = (help_text(setting_options()[name]) for name in ("objective", "form"))
    assert objective.endswith("One of svd, fwsvd, activation, kronecker, joint or first-order.")
    assert "One of" not in form
