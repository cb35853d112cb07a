"""The house: which room may know what, and how long a thing may be before it is two things.

Room for room, ``[tool.importlinter]`` in pyproject.toml says which imports are allowed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
MODULES = {
    ".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(SOURCE.glob("rankfold/**/*.py"))
}
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in MODULES.items()}

LONGEST_FILE, LONGEST_CLASS, LONGEST_FUNCTION = 500, 250, 60  # lines, docstrings included


def imported(name: str, nodes: list[ast.stmt]) -> Iterator[str]:
    """What these statements of a module import, a module or a name in one; not for types alone."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{name}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from imported(name, node.orelse)
        elif isinstance(node, ast.If | ast.Try | ast.With):
            inner = [child for child in ast.walk(node) if isinstance(child, ast.stmt)]
            yield from imported(name, [n for n in inner if not isinstance(n, ast.If | ast.Try)])


def lengths() -> Iterator[tuple[str, int, int]]:
    """Name, lines and most lines of every file, class and function."""
    for name, tree in TREES.items():
        yield name, len(MODULES[name].read_text(encoding="utf-8").splitlines()), LONGEST_FILE
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                assert node.end_lineno is not None
                most = LONGEST_CLASS if isinstance(node, ast.ClassDef) else LONGEST_FUNCTION
                yield f"{name}.{node.name}", node.end_lineno - node.lineno + 1, most


def test_nothing_is_longer_than_it_may_be() -> None:
    assert not {name: lines for name, lines, most in lengths() if lines > most}
    # The pipeline is to be read in one look.
    assert len(MODULES["rankfold.compress"].read_text(encoding="utf-8").splitlines()) <= 128


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_is_in_it(name: str) -> None:
    assert ast.get_docstring(TREES[name])


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("rankfold.maths")])
def test_maths_knows_tensors_alone(name: str) -> None:
    statements = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.stmt)]
    for found in imported(name, statements):
        assert f"{found}.".startswith("rankfold.maths.") or not found.startswith("rankfold"), found
        assert not f"{found}.".startswith("torch.nn."), found
    used = {ast.unparse(node) for node in ast.walk(TREES[name]) if isinstance(node, ast.Attribute)}
    assert "torch.nn" not in used


@pytest.mark.parametrize("name", MODULES)
def test_what_is_private_stays_in_its_module(name: str) -> None:
    for found in imported(name, TREES[name].body):
        last = found.rpartition(".")[2]
        assert not (found.startswith("rankfold") and last.startswith("_")), found


def test_no_module_imports_one_that_imports_it() -> None:
    graph = {
        name: {
            module
            for found in imported(name, tree.body)
            for module in (found, found.rpartition(".")[0])
            if module in MODULES and module != name
        }
        for name, tree in TREES.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))
