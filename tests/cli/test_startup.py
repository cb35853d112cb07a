"""What is imported before it is needed: nothing heavy, for version, help and completion."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import typer
from typer.main import get_command

import rankfold
from rankfold.cli.app import all_commands, app
from rankfold.cli.lazy import COMMANDS
from rankfold.export.export import TARGETS
from rankfold.export.names import DTYPES, SUMMARIES

HEAVY = ("torch", "numpy", "scipy", "transformers", "safetensors.torch", "jinja2", "msgspec")

RUN = """
import contextlib, io, json, sys
said = sys.argv.pop(1)
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    exec(said)
print(json.dumps(sorted(sys.modules)))
"""
# Each in a process of its own, where nothing has been imported before.
LIGHT = {
    "import rankfold": "import rankfold",
    "all helps": "from rankfold.cli.app import all_commands, typer\n"
    "for made in all_commands().values(): made.get_help(typer.Context(made))",
    "--version": "from rankfold.cli import main; sys.argv = ['rankfold', '--version']; main()",
    "--help": "from rankfold.cli import main; sys.argv = ['rankfold', '--help']; main()",
    "python -m rankfold --version": "import runpy; sys.argv = ['rankfold', '--version']; "
    "runpy.run_module('rankfold', run_name='__main__')",
    "clean": "from rankfold.cli import main; sys.argv = ['rankfold', 'clean']; main()",
}


@pytest.mark.parametrize("name", LIGHT)
def test_nothing_heavy_is_imported(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", RUN, LIGHT[name]]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=tmp_path, check=True)
    assert not {*json.loads(done.stdout)} & {*HEAVY}
    if name == "--help":
        assert "rankfold.settings" in json.loads(done.stdout)  # else it tests nothing
        assert "rankfold.cli.lossless" not in json.loads(done.stdout)


def test_each_command_is_listed_as_its_docstring_says() -> None:
    made = all_commands()
    assert [*made] == [*COMMANDS]
    for name, said in COMMANDS.items():
        assert made[name].name == name
        assert made[name].help.splitlines()[0] == said


def test_each_command_in_the_folder_is_in_the_table() -> None:
    folder = Path(rankfold.__file__).parent / "cli"
    texts = [file.read_text(encoding="utf-8") for file in folder.glob("*.py")]
    found = [re.findall(r"^@command.*\ndef (\w+)", text, re.MULTILINE) for text in texts]
    assert sorted(name.replace("_", "-") for names in found for name in names) == sorted(COMMANDS)


def test_a_command_is_looked_for_by_its_name_alone() -> None:
    group = get_command(app)
    assert group.get_command(typer.Context(group), "nothing") is None  # type: ignore[attr-defined]


def test_what_the_help_says_of_targets_is_what_there_is() -> None:
    assert {name: target.summary for name, target in TARGETS.items()} == SUMMARIES
    torch = import_module("torch")
    assert all(getattr(torch, dtype).is_floating_point for dtype in DTYPES)


def public_imports() -> dict[str, str]:
    """Public names and their modules, as ``rankfold/__init__.py`` imports them for types."""
    tree = ast.parse(inspect.getsource(rankfold))
    (typed,) = (node for node in tree.body if isinstance(node, ast.If))
    return {
        alias.name: str(node.module)
        for node in typed.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_public_names_are_what_the_types_say() -> None:
    found = public_imports()
    assert sorted(found) == rankfold.__all__
    for name, module in found.items():
        assert getattr(rankfold, name) is getattr(import_module(module), name)
    assert {*rankfold.__all__, "__version__"} <= {*dir(rankfold)}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        rankfold.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_functions_named_like_packages_stay_functions() -> None:
    said = "import rankfold.export.names, rankfold.verify.files, rankfold; from types import *; "
    said += "assert {type(rankfold.export), type(rankfold.verify)} == {FunctionType}"
    subprocess.run([sys.executable, "-c", said], check=True)
