"""ONNX programs called like modules: the same losses as of the module they are made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rankfold.data.parts import as_part
from rankfold.errors import InputError
from rankfold.others.onnx_program import OnnxProgram
from rankfold.tasks.evaluation import evaluate
from rankfold.tasks.supervised import CausalLM, Classification
from tests.small_models import VOCABULARY, token_windows

onnx = pytest.importorskip("onnx", reason="pip install onnx")
pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
torch.manual_seed(0)
TABLE = torch.randn(VOCABULARY, VOCABULARY)
MATRIX = torch.randn(5, 3)


def program(
    file: Path, nodes: Sequence[object], inputs: dict[str, int], weights: dict[str, Tensor]
) -> Path:
    helper = onnx.helper
    graph = helper.make_graph(
        nodes, "graph",
        [helper.make_tensor_value_info(name, kind, None) for name, kind in inputs.items()],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [onnx.numpy_helper.from_array(w.numpy(), name) for name, w in weights.items()],
    )  # fmt: skip
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), file)
    return file


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logits of the next token by the last one alone; it asks for a mask that it doesn't use."""
    node = onnx.helper.make_node
    nodes = [
        node("Gather", ["table", "input_ids"], ["found"]),
        node("Cast", ["attention_mask"], ["mask"], to=FLOAT),
        node("ReduceSum", ["mask"], ["sum"], keepdims=0),
        node("Sub", ["sum", "sum"], ["zero"]),
        node("Add", ["found", "zero"], ["y"]),
    ]
    inputs = {"input_ids": INT64, "attention_mask": INT64}
    file = tmp_path_factory.mktemp("table") / "table.onnx"
    return program(file, nodes, inputs, {"table": TABLE})


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])]
    file = tmp_path_factory.mktemp("matrix") / "matrix.onnx"
    return program(file, nodes, {"x": FLOAT}, {"w": MATRIX})


class Table(nn.Module):
    def forward(self, input_ids: Tensor) -> Tensor:
        return TABLE[input_ids]


def test_language_model(table: Path) -> None:
    part = as_part("held_out", token_windows(6))
    found, wanted = (evaluate(m, CausalLM(), part) for m in (OnnxProgram(table), Table()))
    assert torch.allclose(found.losses, wanted.losses, atol=1e-6)
    mappings = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in part.examples]
    named = evaluate(OnnxProgram(table), CausalLM(), as_part("held_out", mappings))
    assert torch.allclose(named.losses, wanted.losses, atol=1e-6)


def test_classifier(matrix: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    examples = [(torch.randn(5, generator=generator), number % 3) for number in range(12)]
    part = as_part("held_out", examples)
    dense = nn.Linear(5, 3, bias=False)
    dense.weight.data = MATRIX.T.clone()
    found, wanted = (evaluate(m, Classification(), part) for m in (OnnxProgram(matrix), dense))
    assert torch.allclose(found.losses, wanted.losses, atol=1e-6)
    assert found.correct is not None and wanted.correct is not None
    assert torch.equal(found.correct, wanted.correct)


def test_digest_is_of_the_file_and_its_weights(matrix: Path) -> None:
    before = OnnxProgram(matrix).digest()
    assert OnnxProgram(matrix).digest() == before
    beside = matrix.with_name("matrix.onnx.data")
    beside.write_bytes(b"weights")
    assert OnnxProgram(matrix).digest() != before
    beside.unlink()


def test_other_inputs_are_named(table: Path, matrix: Path) -> None:
    with pytest.raises(InputError, match="takes x; the data give words"):
        OnnxProgram(matrix)(words=torch.ones(2, 3))
    with pytest.raises(InputError, match="takes input_ids, attention_mask; the data give"):
        OnnxProgram(table)(pixels=torch.ones(2, 3))
    with pytest.raises(InputError, match=r"of the type tensor\(int64\); the data give float32"):
        OnnxProgram(table)(torch.ones(2, 3))
    with pytest.raises(InputError, match=r"can't run .* on the data"):
        OnnxProgram(matrix)(torch.ones(2, 4))


def test_masks_that_the_program_lacks_are_not_dropped(tmp_path: Path) -> None:
    nodes = [onnx.helper.make_node("Gather", ["table", "input_ids"], ["y"])]
    file = program(tmp_path / "plain.onnx", nodes, {"input_ids": INT64}, {"table": TABLE})
    ids = torch.ones(1, 3, dtype=torch.int64)
    made = OnnxProgram(file)
    made(input_ids=ids, attention_mask=torch.ones_like(ids))
    with pytest.raises(
        InputError, match="takes input_ids; the data give attention_mask, input_ids"
    ):
        made(input_ids=ids, attention_mask=torch.tensor([[1, 1, 0]]))


def test_what_is_no_program(tmp_path: Path, matrix: Path) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(matrix.read_bytes()[:20])
    with pytest.raises(InputError, match="onnxruntime can't open"):
        OnnxProgram(bad)
    with pytest.raises(InputError, match="no such ONNX file"):
        OnnxProgram(tmp_path / "none.onnx")
