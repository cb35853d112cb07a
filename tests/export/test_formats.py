"""Everything that opens what rankfold writes is run here; docs/formats.md holds what was seen."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, pipeline

import rankfold
from rankfold.export.export import TARGETS
from rankfold.export.names import PROGRAMS
from rankfold.export.torch_export import largest_difference
from rankfold.export.traced import write_program
from tests.export.test_export import CNN, HIDDEN, outputs, snippet
from tests.new_process import in_a_new_process
from tests.small_models import SmallCNN, image_data, images, seeded, token_data
from tests.tiny_language_model import VOCABULARY, tiny_tokenizer

SIZE, BLOCKS = 0.7, 1
EQUAL = 1e-5  # of the largest output; below it lies what another order of sums changes
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "formats.md"
BEGIN, END = "<!-- written by tests/export/test_formats.py -->\n", "<!-- end -->\n"

# Run where rankfold can't be imported. The README of the pairs opens them as `model`.
LANGUAGE_MODEL_ALONE = """
import onnxruntime
from transformers import AutoModelForCausalLM
named = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
session = onnxruntime.InferenceSession("onnx/model.onnx", providers=["CPUExecutionProvider"])
with torch.no_grad():
    save_file({
        "pairs": model(inputs).logits,
        "dense": AutoModelForCausalLM.from_pretrained("dense")(inputs).logits,
        "onnx": torch.tensor(session.run(None, {k: v.numpy() for k, v in named.items()})[0]),
        "pt2": torch.export.load("pt2/model.pt2").module()(**named)["logits"],
    }, "found.safetensors")
"""
OWN_CLASS_ALONE = """
import onnxruntime
dense = SmallCNN()
dense.load_state_dict(load_file("dense/model.safetensors"))
session = onnxruntime.InferenceSession("onnx/model.onnx", providers=["CPUExecutionProvider"])
with torch.no_grad():
    save_file({
        "pairs": model(inputs),
        "dense": dense.eval()(inputs),
        "onnx": torch.tensor(session.run(None, {"images": inputs.numpy()})[0]),
        "pt2": torch.export.load("pt2/model.pt2").module()(inputs),
    }, "found.safetensors")
"""
OPENED_BY = {
    "pairs": "the lines of its README",
    "dense": "`from_pretrained`, or `load_state_dict` of your own class",
    "onnx": "`onnxruntime.InferenceSession`",
    "pt2": "`torch.export.load`",
}


def language_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=BLOCKS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.1, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    return seeded(5, lambda: LlamaForCausalLM(config)).eval()


def own_class() -> SmallCNN:
    return seeded(6, lambda: SmallCNN(64)).eval()


@dataclass(frozen=True)
class Written:
    """A model, factorized, in every form that rankfold writes.

    Attributes:
        folder: Holds ``artifact`` and a folder of each target's name; ``original.onnx`` and
            ``original.pt2`` are programs of the model before.
        model: Factorized.
        inputs: A batch.
        alone: What each form computed of it where rankfold can't be imported.
    """

    folder: Path
    model: nn.Module
    inputs: Tensor
    alone: dict[str, Tensor]

    def share(self, to: str) -> float:
        """Bytes of a form, as a share of the original's in the same."""
        original = self.folder / (f"original.{to}" if to in PROGRAMS else "dense/model.safetensors")
        files = (self.folder / to).glob(TARGETS[to].files if to in TARGETS else "model.safetensors")
        return sum(file.stat().st_size for file in files) / original.stat().st_size


def write(folder: Path, original: nn.Module, data: Any, inputs: Tensor, code: str) -> Written:
    own = isinstance(original, SmallCNN)
    result = rankfold.lossless(original, data, size=SIZE, objective="activation")
    result.save(folder / "artifact", tokenizer=None if own else tiny_tokenizer())
    shape = (3, 8, 8) if own else None
    for to in TARGETS:
        given = shape if to in PROGRAMS else None
        model = own_class() if own else None
        rankfold.export(folder / "artifact", folder / to, to=to, model=model, inputs=given)
    for to in PROGRAMS:  # last: it changes how the model computes
        write_program(original, folder / f"original.{to}", to, shape)
    save_file({"inputs": inputs}, folder / "inputs.safetensors")
    pairs = snippet(folder / "pairs").replace('folder = "."', 'folder = "pairs"')
    in_a_new_process(HIDDEN + CNN.replace("width=8", "width=64") + pairs + code, cwd=folder)
    return Written(folder, result.model, inputs, load_file(folder / "found.safetensors"))


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write(
        tmp_path_factory.mktemp("language"), language_model(), token_data(16),
        torch.arange(24).view(2, 12), LANGUAGE_MODEL_ALONE,
    )  # fmt: skip


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write(
        tmp_path_factory.mktemp("own"), own_class(), image_data(40), images(3, seed=31).tensors[0],
        OWN_CLASS_ALONE,
    )  # fmt: skip


ROWS: dict[str, dict[str, str]] = {}  # cells of the table, by model and what opened it


def seen(written: Written, model: str, opened: str, to: str, found: Tensor, exact: bool) -> None:
    """Check an output, and note the row."""
    difference = largest_difference([found], [outputs(written.model, written.inputs)])
    assert difference == 0 if exact else difference < EQUAL, (opened, difference)
    output = "bit for bit" if exact else f"below {EQUAL:g}"
    share = written.share(to)
    if to not in ("dense", "pairs"):  # pairs write out the identity rows of a pivoted factor
        assert SIZE - 0.02 < share < SIZE + 0.06
    ROWS.setdefault(opened, {})[model] = f"{output} | {share:.2f}"


@pytest.mark.parametrize("model", ["language", "own"])
def test_without_rankfold(model: str, request: pytest.FixtureRequest) -> None:
    written = request.getfixturevalue(model)
    for to, found in written.alone.items():
        seen(written, model, f"`--to {to}` | {OPENED_BY[to]} | no", to, found, exact=False)


@pytest.mark.parametrize("model", ["language", "own"])
@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
def test_with_rankfold(model: str, request: pytest.FixtureRequest) -> None:
    written = request.getfixturevalue(model)
    empty = None if model == "language" else own_class()
    loaded = rankfold.load(written.folder / "artifact", model=empty)
    row = "artifact | `rankfold.load` | yes"
    seen(written, model, row, "artifact", outputs(loaded, written.inputs), exact=True)
    torch.compiler.reset()
    found = outputs(torch.compile(loaded, backend="aot_eager", fullgraph=True), written.inputs)
    row = "artifact | `torch.compile` of that | yes"
    seen(written, model, row, "artifact", found, exact=False)


def test_with_transformers(language: Written) -> None:
    artifact = language.folder / "artifact"
    opened = LlamaForCausalLM.from_pretrained(artifact)
    row = "artifact | `from_pretrained` | yes"
    seen(language, "language", row, "artifact", outputs(opened, language.inputs), exact=True)
    write = pipeline("text-generation", model=str(artifact))
    made = write("the", max_new_tokens=12, do_sample=False)[0]["generated_text"]
    tokenizer = tiny_tokenizer()
    ids = tokenizer("the", return_tensors="pt")["input_ids"]
    expected = language.model.generate(ids, max_new_tokens=12, do_sample=False)[0]
    assert made == tokenizer.decode(expected, skip_special_tokens=True)
    row = "artifact | `pipeline` | yes"
    seen(language, "language", row, "artifact", outputs(write.model, language.inputs), exact=True)


def table() -> str:
    lines = [
        "| form | opened by | needs rankfold | language model: output | bytes | own class: output "
        "| bytes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(ROWS, key=lambda row: (row.startswith("`"), row)):
        cells = [ROWS[row].get(model, "– | –") for model in ("language", "own")]
        lines.append(f"| {row} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"


def test_the_table_is_what_was_seen() -> None:
    if len(ROWS) != 4 + len(OPENED_BY) or "own" not in ROWS["artifact | `rankfold.load` | yes"]:
        pytest.skip("not everything ran before this")
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    written, _, after = rest.partition(END)
    if os.environ.get("RANKFOLD_WRITE_FORMATS"):
        DOCUMENT.write_text(before + BEGIN + table() + END + after, encoding="utf-8")
        written = table()
    assert written == table()


def test_the_dense_form_has_the_names_that_llama_cpp_knows(language: Written) -> None:
    """Its converter maps names by this table of the package ``gguf``."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, BLOCKS)

    def unknown(file: Path) -> list[str]:
        suffixes = (".weight", ".bias")
        return [name for name in load_file(file) if names.get_name(name, suffixes) is None]

    assert unknown(language.folder / "dense" / "model.safetensors") == []
    assert unknown(language.folder / "pairs" / "pairs.safetensors")
    assert unknown(language.folder / "artifact" / "model.safetensors")
