"""Traced programs: what they compute, what is stored in them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

import rankfold
from rankfold import InputError
from rankfold.export import traced as programs
from rankfold.export.example_inputs import example_inputs
from rankfold.export.torch_export import largest_difference, trace
from rankfold.export.traced import write_program
from rankfold.model.unpack import unpack
from rankfold.model.unpacked_modules import EveryExpert, UnpackedExperts
from tests.every_form import CHANNELS, FEATURES, IMAGE, EveryForm, stored_bytes
from tests.export.test_export import outputs
from tests.small_models import VOCABULARY, SmallCNN, image_data, seeded, tiny_llama, trained_cnn

DENSE = {(CHANNELS, CHANNELS, 3, 3), (FEATURES, CHANNELS), (CHANNELS, FEATURES), (FEATURES,) * 2}


def initializers(file: Path) -> dict[str, Any]:
    tensors = onnx.load(str(file)).graph.initializer
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in tensors}


def test_onnx_keeps_the_factors_of_every_form(tmp_path: Path) -> None:
    model = EveryForm().eval()
    file = tmp_path / "model.onnx"
    done = write_program(model, file, "onnx", IMAGE)
    assert done.difference is not None and done.difference < 1e-5
    assert done.any_length == ("batch",) and done.outputs == ("output",)
    stored = initializers(file)
    weights = model.state_dict()
    for name, tensor in weights.items():
        assert torch.equal(torch.from_numpy(stored[name].copy()), tensor), name
    # The rest: axes and shapes that operations are given.
    assert sum(array.nbytes for name, array in stored.items() if name not in weights) < 600
    assert file.stat().st_size < stored_bytes(model) + 30_000

    # onnxruntime prepares models by computing what depends on weights alone.
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "prepared.onnx")
    onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    prepared = initializers(tmp_path / "prepared.onnx")
    assert not [
        name for name, array in prepared.items() if {array.shape, array.shape[::-1]} & DENSE
    ]
    assert sum(array.nbytes for array in prepared.values()) < 1.1 * stored_bytes(model)


def test_pt2_computes_the_same(tmp_path: Path) -> None:
    model = EveryForm().eval()
    file = tmp_path / "model.pt2"
    assert write_program(model, file, "pt2", torch.randn(4, *IMAGE)).difference < 1e-5
    program = torch.export.load(file)
    images = torch.randn(5, *IMAGE)
    torch.testing.assert_close(program.module()(images), model(images))
    assert sum(t.nbytes for t in program.state_dict.values()) == stored_bytes(model)
    assert str(Path(__file__).parent).encode() not in file.read_bytes()


def test_experts_are_computed_for_every_token(tmp_path: Path) -> None:
    config = Qwen2MoeConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=12, shared_expert_intermediate_size=12, initializer_range=0.2,
    )  # fmt: skip
    model = unpack(seeded(3, lambda: Qwen2MoeForCausalLM(config)).eval()).model
    experts = next(m for m in model.modules() if isinstance(m, UnpackedExperts))
    values, weights = torch.randn(7, 16), torch.rand(7, 2)
    index = torch.randint(5, (7, 2))  # expert 4 is at hand elsewhere
    torch.testing.assert_close(
        EveryExpert(experts)(values, index, weights), experts(values, index, weights)
    )
    done = write_program(model, tmp_path / "model.pt2", "pt2", None)
    assert done.any_length == ("batch", "sequence")
    assert done.difference < 1e-5


def test_half_precision(tmp_path: Path) -> None:
    done = write_program(tiny_llama(torch.float16), tmp_path / "model.onnx", "onnx", None)
    assert 0 < done.difference < 2e-2
    assert initializers(tmp_path / "model.onnx")["lm_head.weight"].dtype == "float16"
    with pytest.raises(InputError, match=r'bfloat16.*dtype="float32"'):
        write_program(tiny_llama(torch.bfloat16), tmp_path / "other.onnx", "onnx", None)


class Loop(nn.Module):
    """Its code runs once for every token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4)
        self.step = nn.Linear(4, 4)

    def forward(self, ids: Tensor, start: Tensor) -> tuple[Tensor, None, Tensor]:
        state = start
        for token in self.embedding(ids).unbind(1):
            state = torch.tanh(self.step(state) + token)
        return state, None, state.sum()[None]


def test_a_length_that_the_code_fixes_is_told(tmp_path: Path) -> None:
    batch = {"ids": torch.randint(VOCABULARY, (2, 5)), "start": torch.randn(2, 4)}
    done = write_program(seeded(1, Loop), tmp_path / "model.pt2", "pt2", batch)
    assert done.any_length == ("batch",)
    assert done.described()["inputs"]["ids"] == {"dtype": "int64", "shape": ("batch", 5)}
    assert done.outputs == ("output_0", "output_1")


class Fixed(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.view(2, -1)


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        (SmallCNN(), None, "nothing is known of the inputs of SmallCNN.*inputs="),
        (SmallCNN(), (3, 0, 8), "the input shape is .*positive"),
        (SmallCNN(), (4, 8, 8), r"SmallCNN can't run on the inputs .*float32 \(1, 4, 8, 8\)"),
        (SmallCNN(), {"images": 3}, "the input images is int"),
        (tiny_llama(), (3, 8, 8), "LlamaForCausalLM is 3x8x8; expected the number of tokens"),
    ],
)
def test_what_is_refused(model: nn.Module, given: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        write_program(model.eval(), tmp_path / "model.pt2", "pt2", given)
    assert not list(tmp_path.iterdir())


def test_a_batch_that_the_code_fixes_is_refused() -> None:
    inputs = example_inputs(Fixed(), (6,))
    with pytest.raises(
        InputError, match=r"Fixed can't be traced for a batch of any size: .*dynamic"
    ):
        trace(Fixed(), inputs)


def test_a_program_that_computes_something_else_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = rankfold.lossless(trained_cnn(), image_data(40), size=0.5)
    result.save(tmp_path / "a")
    run = programs.run_pt2

    def slightly_wrong(*args: Any) -> list[list[Tensor]]:
        return [[output + 0.01 * output.abs().max() for output in found] for found in run(*args)]

    monkeypatch.setattr(programs, "run_pt2", slightly_wrong)
    options: dict[str, Any] = {"to": "pt2", "model": SmallCNN(), "inputs": (3, 8, 8)}
    with pytest.raises(InputError, match=r"doesn't compute what the model does: .* 0\.01 of"):
        rankfold.export(tmp_path / "a", tmp_path / "b", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    monkeypatch.undo()
    done = rankfold.export(tmp_path / "a", tmp_path / "b", **options, dtype="bfloat16")
    told = json.loads((done.folder / "export.json").read_text())
    assert told["inputs"] == {"images": {"dtype": "bfloat16", "shape": ["batch", 3, 8, 8]}}


def test_large_weights_lie_beside_the_onnx_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = rankfold.lossless(trained_cnn(), image_data(40), size=0.5)
    result.save(tmp_path / "a")
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 1000)
    monkeypatch.setattr(programs, "has_onnxruntime", lambda: False)
    done = rankfold.export(
        tmp_path / "a", tmp_path / "b", to="onnx", model=SmallCNN(), inputs=(3, 8, 8)
    )
    assert done.difference is None
    weights = (done.folder / "model.onnx.data").stat().st_size
    assert weights > 0.8 * 4 * done.parameters  # small ones stay in the graph
    assert done.bytes == weights + (done.folder / "model.onnx").stat().st_size
    session = onnxruntime.InferenceSession(str(done.folder / "model.onnx"))
    images = torch.randn(5, 3, 8, 8)
    found = session.run(None, {"images": images.numpy()})[0]
    assert largest_difference([torch.from_numpy(found)], [outputs(result.model, images)]) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "dense", "inputs": (3, 8, 8)}, "inputs goes with onnx and pt2"),
        ({"to": "pairs", "dtype": "float16"}, "dtype goes with onnx and pt2"),
        ({"to": "pt2", "dtype": "int8"}, "dtype is 'int8'; expected float32"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        rankfold.export(tmp_path, tmp_path / "out", **options)


def test_differences_are_shares_of_the_largest_value() -> None:
    one, other = torch.tensor([1.0, -4.0]), torch.tensor([1.0, -4.4])
    assert largest_difference([one, one], [one, other]) == pytest.approx(0.4 / 4.4)
    assert largest_difference([one], [one]) == 0
    assert largest_difference([one * torch.nan], [one]) != largest_difference([one], [one])
    assert largest_difference([one], [torch.zeros(2)]) == 4
