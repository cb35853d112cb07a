"""Below the command line messages name Python's arguments; the command line adds its options."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "rankfold"
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
# A whole command, as a model card quotes it, is no argument.
COMMAND = re.compile(r"`rankfold \w+[^`]*`")


def texts(source: str) -> Iterator[str]:
    """Strings, the parts of one joined, and comments."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            parts = (one.value if isinstance(one, ast.Constant) else "{}" for one in node.values)
            yield "".join(str(part) for part in parts)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


def options_in(source: str) -> list[str]:
    return [found for text in texts(source) for found in OPTION.findall(COMMAND.sub("", text))]


BELOW = [file for file in sorted(SOURCE.rglob("*.py")) if "cli" not in file.parts]


@pytest.mark.parametrize("file", BELOW, ids=lambda file: str(file.relative_to(SOURCE)))
def test_no_option_stands_below_the_command_line(file: Path) -> None:
    assert not options_in(file.read_text())


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('raise E("use --test bounded")', ["--test"]),
        ('raise E(f"{n} is too large; use " "--batch-size")', ["--batch-size"]),
        ("x = 1  # set by --limit", ["--limit"]),
        ('"`rankfold export " "FOLDER --to dense` writes"', []),
        ('"a -- b, x--y, ---"', []),
    ],
)
def test_what_counts_as_an_option(source: str, found: list[str]) -> None:
    assert sorted(set(options_in(source))) == found
