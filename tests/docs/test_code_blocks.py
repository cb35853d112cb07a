"""Every block of README, tutorial, how-to and reference pages is run, or at least understood.

A block without a comment before it is run, in a folder of its page, one after the other.
``<!-- file: NAME -->`` writes it to a file. ``<!-- not run: WHY -->`` has its commands parsed by
the real options, its Python compiled and its names looked up. ``<!-- long: WHAT -->`` is run by
``make docs-run``, and parsed here.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from click import Context
from typer.testing import CliRunner

from rankfold.cli import app
from tests.docs.blocks import FILE, GIVEN, LONG, NOT_RUN, PAGES, ROOT, RUN, Block, blocks, commands

GROUP: Any = typer.main.get_command(app)
CONTEXT = Context(GROUP)
COMMANDS = {name: GROUP.get_command(CONTEXT, name) for name in GROUP.list_commands(CONTEXT)}
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
EXTRAS = set(
    re.findall(
        r"^([a-z]+) = \[",
        (ROOT / "pyproject.toml").read_text().split(".optional-dependencies]")[1].split("\n[")[0],
        re.MULTILINE,
    )
)
if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OF_ALL = {"--help", "--version", "--install-completion", "--show-completion"}
OF_OTHERS = {"--local-dir", "--model-impl", "--dtype"}  # of hf download and vllm serve
OWN_MODULES = ("net", "mydata", "train")


def identify(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_blocks_are_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in OWN_MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    found = blocks(page)
    if any(block.mark == RUN and block.language in ("sh", "python") for block in found):
        GIVEN.get(page.name, lambda _: None)(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    said = ""
    for block in found:
        place = f"{identify(page)}:{block.line}"
        if block.mark == FILE:
            Path(block.words).write_text(block.text, encoding="utf-8")
            if block.language == "json":
                assert [json.loads(line) for line in block.text.splitlines()]
        elif block.mark == RUN and block.language == "python":
            torch.manual_seed(0)
            exec(compile("\n" * block.line + block.text, place, "exec"), names)
        elif block.mark == RUN and block.language == "sh":
            said = "".join(run(line, place) for line in commands(block))
        elif block.mark == RUN and block.language == "toml":
            written = tomllib.loads(block.text)
            words = [f"--{name}" for name in written if name not in ("command", "model")]
            assert {*words} <= {n for one in COMMANDS[written["command"]].params for n in one.opts}
        elif block.mark == RUN:
            assert block.language == "text", f"{place}: nothing is known of such a block"
            check_output(block, said, place)
        else:
            check(block, place)
    for name in OWN_MODULES:
        sys.modules.pop(name, None)


def run(line: str, place: str) -> str:
    """What a command of a page prints."""
    program, *words = shlex.split(line)
    if program == "rankfold":
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, f"{place}: {line}\n{done.output}{done.stderr}"
        return done.stdout
    assert program == "python" and len(words) == 1, f"{place}: only `python FILE` is run: {line}"
    runpy.run_path(words[0], run_name="__main__")
    return ""


def check_output(block: Block, said: str, place: str) -> None:
    """The rows of tables that a page shows are those that the command printed.

    Numbers differ between processors in their last digits; README shows the demo's.
    """
    shown = re.findall(r"^│ (\S.*?)  *│", block.text, re.MULTILINE)
    assert shown, f"{place}: an output without a table"
    source = said or (ROOT / "src/rankfold/cli/demo.py").read_text(encoding="utf-8") + (
        ROOT / "src/rankfold/cli/tables.py"
    ).read_text(encoding="utf-8")
    for row in shown:
        begins = row if said else row.split(",")[0].split(" 0.")[0]
        assert begins in source, f"{place}: no row {row!r} is printed"


def check(block: Block, place: str) -> None:
    """A block that is not run: its commands and names are those that there are."""
    assert block.words.strip(), place
    if block.language == "python":
        check_python(block.text, place)
        return
    assert block.language == "sh", place
    for line in commands(block):
        check_command(line, place)


def check_command(line: str, place: str) -> None:
    """Parse a command by the real options, or find the target, extra or module that it names."""
    program, *words = shlex.split(line)
    if program == "rankfold":
        parse(words, f"{place}: {line}")
    elif program == "make":
        assert set(words) <= TARGETS, f"{place}: {line}"
    elif program == "pip":
        assert words[0] == "install", f"{place}: {line}"
        named = re.findall(r"\[([\w,]+)\]", line)
        assert {extra for one in named for extra in one.split(",")} <= EXTRAS, f"{place}: {line}"
    elif program == "python" and words[0] == "-m":
        assert importlib.util.find_spec(words[1]) is not None, f"{place}: {line}"
    else:
        known = (
            "python3 -m venv .venv",
            ". .venv/bin/activate",
            "vllm serve smaller --dtype bfloat16",
        )
        assert line in known, f"{place}: nothing is known of {line}"


def parse(words: list[str], place: str) -> None:
    if words == ["--version"]:
        return
    assert words[0] in COMMANDS, place
    if "--config" in words:  # the file, which has the other options, is the reader's
        known = {name for one in COMMANDS[words[0]].params for name in one.opts}
        assert {word for word in words if word.startswith("--")} <= known, place
        return
    try:
        COMMANDS[words[0]].make_context(words[0], list(words[1:]))
    except typer.Exit:
        assert "--help" in words, place
    except Exception as error:
        raise AssertionError(f"{place}: {error}") from error


def check_python(text: str, place: str) -> None:
    """It compiles, no name is undefined, and what it imports is there, where it is installed."""
    tree = ast.parse(text, place)
    ruff = [str(Path(sys.executable).parent / "ruff"), "check", "--isolated", "--select", "F82,F7"]
    done = subprocess.run([*ruff, "-"], input=text, text=True, capture_output=True)
    assert done.returncode == 0, f"{place}: {done.stdout}{done.stderr}"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None
            if importlib.util.find_spec(node.module.partition(".")[0]) is not None:
                module = importlib.import_module(node.module)
                assert all(hasattr(module, one.name) for one in node.names), (
                    f"{place}: {node.module}"
                )
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "rankfold":
            assert hasattr(importlib.import_module("rankfold"), node.attr), f"{place}: {node.attr}"


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_options_and_commands_in_words_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    options = {
        name
        for command in COMMANDS.values()
        for one in command.params
        for name in (*one.opts, *one.secondary_opts)
    }
    spoken = re.findall(
        r"`([^`\n]+(?:\n[^`\n]+)?)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    )
    for words in (one for one in spoken if not one.startswith("python -m benchmarks")):
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", words):
            assert option in options | OF_OTHERS | OF_ALL, f"{page.name}: {words}"
        if named := re.match(r"rankfold\s+([a-z]+)", words):
            assert named[1] in COMMANDS, f"{page.name}: {words}"


@pytest.mark.skipif("RANKFOLD_DOCS_LONG" not in os.environ, reason="minutes: make docs-run")
def test_long_blocks_are_run() -> None:
    variables = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    long = [block for page in PAGES for block in blocks(page) if block.mark == LONG]
    assert long
    for block in long:
        subprocess.run(["bash", "-euc", block.text], cwd=ROOT, env=variables, check=True)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("rankfold lossless MODEL --data DATA --sise 0.9 --out DIR", "No such option"),
        ("rankfold losless MODEL --data DATA", "losless"),
        ("rankfold export DIR --out DIR2", "Missing parameter: to"),
        ("pip install '.[transformer]'", "transformer"),
        ("make demmo", "demmo"),
        ("curl -O https://example.org", "nothing is known"),
    ],
)
def test_a_wrong_command_is_found(line: str, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        check_command(line, "here")


@pytest.mark.parametrize(
    "text",
    [
        "import rankfold\nrankfold.lossles(1)\n",
        "print(undefined)\n",
        "from rankfold import nothing\n",
    ],
)
def test_wrong_python_is_found(text: str) -> None:
    with pytest.raises(AssertionError):
        check_python(text, "here")


def test_marks_are_spelled_right() -> None:
    for page in PAGES:
        found = blocks(page)
        text = page.read_text(encoding="utf-8")
        assert len(found) * 2 == len(re.findall(r"^```", text, re.MULTILINE)), page
        marks = re.findall(r"^<!-- (?!begin|end|written)(.*?) -->", text, re.MULTILINE)
        kinds = [block for block in found if block.mark in (FILE, NOT_RUN, LONG)]
        assert len(marks) == len(kinds), f"{page}: {marks}"
