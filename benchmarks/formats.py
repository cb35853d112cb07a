"""Every form that rankfold writes, opened by its own tool: the measured tables of docs/formats.md.

    python -m benchmarks.formats run resnet20 smollm2
    python -m benchmarks.formats table

``run`` factorizes a model at 90 %, writes every form of it and of the dense model, and opens both
with each tool, which runs them in turn and appends one JSON line to
``benchmarks/out/formats.jsonl``; what is there already is not run again. Each step is a process of
its own. ``table`` prints the tables from those lines.

How good the factorized model is doesn't matter here: it is made by the objective ``activation``
from few examples.
"""

from __future__ import annotations

import argparse
import functools
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any, TypeAlias, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

import rankfold
from benchmarks import shared_data
from benchmarks.cifar10 import cifar10_test
from benchmarks.cifar_nets import akamaster_resnet20, load_cifar_net
from benchmarks.documents import markdown
from benchmarks.rows import append_row, read_rows
from rankfold.data.parts import Data
from rankfold.export.export import TARGETS
from rankfold.export.names import PROGRAMS
from rankfold.export.torch_export import largest_difference
from rankfold.export.traced import write_program
from rankfold.files.tensors import safetensors_bytes
from rankfold.model.sizes import stored_tensors

OUT = Path(__file__).parent / "out"
RESULTS = OUT / "formats.jsonl"
SIZE = 0.9
BATCHES = (1, 8, 32)
TOKENS = 16  # a sequence, where time is measured
WINDOWS, LENGTH = 4, 256  # of WikiText-2 test, for the loss
WRITTEN_TOKENS = 24
ENOUGH_SECONDS, MOST_REPEATS = 3.0, 100
PROMPT = "The history of the railway begins"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Compute: TypeAlias = Callable[[Tensor], Tensor]  # a batch to logits


@dataclass(frozen=True)
class Row:
    """What one tool computed from one form.

    Attributes:
        model: Name in ``MODELS``.
        opened: Name in ``TOOLS``.
        bytes: Of the file.
        dense_bytes: Of the dense model's, in the same form.
        difference: Of an output from that of the factorized model in memory, at most, as a share
            of the largest.
        loss: Of the factorized model on the test examples, in nats.
        seconds: By batch size, of the processor, for each pass in turn: dense, factorized.
        same_text: Whether greedy text is that of the model in memory; None where none is written.
        saved: By dtype, where ``from_pretrained`` casts and ``save_pretrained`` writes: bytes,
            bytes by account, bytes of the dense model.
        peak: Memory of the process, in bytes.
    """

    model: str
    opened: str
    bytes: int
    dense_bytes: int
    difference: float
    loss: float
    seconds: dict[str, list[tuple[float, float]]]
    same_text: bool | None = None
    saved: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    peak: int = 0

    @property
    def key(self) -> tuple[str, str]:
        return (self.model, self.opened)


# The two models


def factorize_smollm2(folder: Path) -> None:
    from benchmarks.language_models import load_smollm2, wikitext2  # needs transformers

    model, tokenizer = load_smollm2()
    windows = wikitext2("train", tokenizer, length=128, count=12, seed=0)
    calibration, selection, held_out = (list(part) for part in windows.split(4))
    data = Data(calibration, selection, held_out)
    result = _factorized(model, data, folder, tokenizer)
    test = wikitext2("test", tokenizer, length=LENGTH, count=WINDOWS, seed=0)
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    text = cast("Any", result).generate(prompt, max_new_tokens=WRITTEN_TOKENS, do_sample=False)
    with torch.no_grad():
        logits = result(test[:, :TOKENS]).logits
    _write_examples(folder, inputs=test, labels=test, output=logits, prompt=prompt, text=text)


def factorize_resnet20(folder: Path) -> None:
    model, mean, std = load_cifar_net("akamaster_resnet20")
    images, labels = cifar10_test(mean, std)

    def part(start: int, stop: int) -> Any:
        return torch.utils.data.TensorDataset(images[start:stop], labels[start:stop])

    data = Data(calibration=part(0, 200), selection=part(200, 400), held_out=part(400, 600))
    result = _factorized(model, data, folder, None)
    test = images[600:]
    with torch.no_grad():
        output = result(test[:WINDOWS])
    _write_examples(folder, inputs=test, labels=labels[600:], output=output)


MODELS: dict[str, Callable[[Path], None]] = {
    "resnet20": factorize_resnet20,
    "smollm2": factorize_smollm2,
}


def _factorized(model: Any, data: Data, folder: Path, tokenizer: Any) -> nn.Module:
    result = rankfold.lossless(model, data, size=SIZE, objective="activation", interactions=False)
    result.save(folder / "artifact", tokenizer=tokenizer, overwrite=True)
    return result.model


def _write_examples(folder: Path, **tensors: Tensor) -> None:
    save_file(
        {n: t.contiguous().clone() for n, t in tensors.items()}, folder / "examples.safetensors"
    )


def write(name: str, form: str) -> None:
    """The artifact, or an export of it; beside a program lies that of the dense model."""
    folder = OUT / "formats" / name
    if form == "artifact":
        folder.mkdir(parents=True, exist_ok=True)
        MODELS[name](folder)
    else:
        model = akamaster_resnet20() if _own(folder) else None
        given = (3, 32, 32) if _own(folder) and form in PROGRAMS else None
        to: Any = form
        rankfold.export(
            folder / "artifact", folder / form, to=to, model=model, inputs=given, overwrite=True
        )
        if form in PROGRAMS:
            write_program(open_dense(folder), folder / f"dense.{form}", to, given)
    print(f"{name} {form} written, peak memory {peak():,} bytes", flush=True)


# The tools: each opens the factorized and the dense model of a folder


def _torch_model(model: Any) -> Compute:
    def compute(inputs: Tensor) -> Tensor:
        with torch.no_grad():
            output = model(inputs)
        return output if torch.is_tensor(output) else cast("Tensor", output.logits)

    return compute


def open_dense(folder: Path) -> nn.Module:
    if _own(folder):
        model = akamaster_resnet20()
        model.load_state_dict(load_file(folder / "dense" / "model.safetensors"))
        return model.eval()
    from transformers import AutoModelForCausalLM

    return cast("nn.Module", AutoModelForCausalLM.from_pretrained(folder / "dense"))


def open_artifact(folder: Path) -> nn.Module:
    return rankfold.load(folder / "artifact", model=akamaster_resnet20() if _own(folder) else None)


def open_stock(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return cast("nn.Module", AutoModelForCausalLM.from_pretrained(folder / "artifact"))


def open_pairs(folder: Path) -> nn.Module:
    """By the lines of the folder's README."""
    _, code = (folder / "pairs" / "README.md").read_text(encoding="utf-8").split("```python")
    code = code.partition("```")[0].replace('folder = "."', f"folder = {str(folder / 'pairs')!r}")
    names: dict[str, Any] = {"AkamasterResNet": akamaster_resnet20}
    exec(code, names)  # rankfold's own README, of the folder just written
    return cast("nn.Module", names["model"])


def open_onnx(file: Path) -> Compute:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def compute(inputs: Tensor) -> Tensor:
        given = {n: t.numpy() for n, t in zip(names, _with_mask(inputs), strict=True)}
        return torch.from_numpy(session.run(None, given)[0])

    return compute


def open_pt2(file: Path) -> Compute:
    module = torch.export.load(file).module()

    def compute(inputs: Tensor) -> Tensor:
        with torch.no_grad():
            if inputs.is_floating_point():
                return cast("Tensor", module(inputs))
            ids, mask = _with_mask(inputs)
            return cast("Tensor", module(input_ids=ids, attention_mask=mask)["logits"])

    return compute


def _with_mask(inputs: Tensor) -> tuple[Tensor, ...]:
    return (inputs,) if inputs.is_floating_point() else (inputs, torch.ones_like(inputs))


def _own(folder: Path) -> bool:
    return folder.name == "resnet20"


def _both(factorized: Callable[[Path], nn.Module], folder: Path) -> tuple[Compute, Compute]:
    return _torch_model(open_dense(folder)), _torch_model(factorized(folder))


def _compiled(folder: Path) -> tuple[Compute, Compute]:
    models = open_dense(folder), open_artifact(folder)
    dense, factorized = (torch.compile(m, fullgraph=True, dynamic=False) for m in models)
    return _torch_model(dense), _torch_model(factorized)


def _programs(to: str, folder: Path) -> tuple[Compute, Compute]:
    opening = open_onnx if to == "onnx" else open_pt2
    return opening(folder / f"dense.{to}"), opening(folder / to / f"model.{to}")


# Name: what it opens, and how the dense and the factorized model are opened.
TOOLS: dict[str, tuple[str, Callable[[Path], tuple[Compute, Compute]]]] = {
    "rankfold.load": ("artifact", functools.partial(_both, open_artifact)),
    "from_pretrained": ("artifact", functools.partial(_both, open_stock)),
    "torch.compile": ("artifact", _compiled),
    "stock layers": ("pairs", functools.partial(_both, open_pairs)),
    "onnxruntime": ("onnx", functools.partial(_programs, "onnx")),
    "torch.export": ("pt2", functools.partial(_programs, "pt2")),
}
# Compiling 30 blocks for three batch sizes takes longer than all else together.
LEFT_OUT = {("resnet20", "from_pretrained"), ("smollm2", "torch.compile")}


def measure(name: str, tool: str, repeats: int, file: Path) -> None:
    folder = OUT / "formats" / name
    examples = load_file(folder / "examples.safetensors")
    form, opening = TOOLS[tool]
    stock = tool == "from_pretrained"
    # First: these open models of their own, one at a time.
    same_text = writes_the_same(folder, examples) if stock else None
    saved = saved_again(folder) if stock else {}
    dense, factorized = opening(folder)
    inputs = examples["inputs"]
    few = inputs[: len(examples["output"])]
    few = few if few.is_floating_point() else few[:, :TOKENS]
    files = (folder / form).glob(TARGETS[form].files if form in TARGETS else "model.safetensors")
    original = folder / (f"dense.{form}" if form in PROGRAMS else "dense/model.safetensors")
    row = Row(
        model=name,
        opened=tool,
        bytes=sum(f.stat().st_size for f in files),
        dense_bytes=original.stat().st_size,
        difference=largest_difference([factorized(few)], [examples["output"]]),
        loss=loss_of(factorized, inputs, examples["labels"]),
        seconds={str(b): time_in_turn((dense, factorized), inputs, b, repeats) for b in BATCHES},
        same_text=same_text,
        saved=saved,
        peak=peak(),
    )
    append_row(file, row)
    print(f"{name} {tool}: {row}", flush=True)


def loss_of(compute: Compute, inputs: Tensor, labels: Tensor) -> float:
    """Mean cross-entropy in nats; of token ids that of the next one."""
    total, terms = 0.0, 0
    text = inputs.dim() == 2
    size = 1 if text else 100
    for part, wanted in zip(inputs.split(size), labels.split(size), strict=True):
        logits = compute(part).double()
        if text:
            logits, wanted = logits[:, :-1].flatten(0, 1), wanted[:, 1:].flatten()
        total += float(functional.cross_entropy(logits, wanted, reduction="sum"))
        terms += len(wanted)
    return total / terms


def time_in_turn(
    computes: Sequence[Compute], inputs: Tensor, batch: int, repeats: int
) -> list[tuple[float, float]]:
    """Processor seconds of a pass of each, one after the other, so that what else runs slows both.

    At least ``repeats`` times, and more often where a pass is short.
    """
    whole = inputs if inputs.dim() != 2 else inputs.flatten().view(-1, TOKENS)
    part = whole[:batch].contiguous()
    for compute in computes:
        compute(part)  # the first pass allocates
    times: list[tuple[float, float]] = []
    end = time.perf_counter() + ENOUGH_SECONDS
    while len(times) < repeats or (time.perf_counter() < end and len(times) < MOST_REPEATS):
        taken = []
        for compute in computes:
            start = time.process_time()
            compute(part)
            taken.append(time.process_time() - start)
        times.append((taken[0], taken[1]))
    return times


def peak() -> int:
    """Largest memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def writes_the_same(folder: Path, examples: dict[str, Tensor]) -> bool:
    text = cast("Any", open_stock(folder)).generate(
        examples["prompt"], max_new_tokens=WRITTEN_TOKENS, do_sample=False
    )
    return torch.equal(text, examples["text"])


def saved_again(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Bytes of the artifact and of the dense model, opened and saved in each dtype."""
    from transformers import AutoModelForCausalLM

    found = {}
    for dtype in DTYPES:
        sizes = []
        for form in ("artifact", "dense"):
            model: Any = AutoModelForCausalLM.from_pretrained(folder / form, dtype=dtype)
            account = safetensors_bytes(stored_tensors(model)[0], {"format": "pt"})
            model.save_pretrained(folder / "again")
            del model  # before the next is opened
            sizes += [(folder / "again" / "model.safetensors").stat().st_size, account]
        found[str(dtype).removeprefix("torch.")] = (sizes[0], sizes[1], sizes[2])
    return found


def print_table(rows: Sequence[Row]) -> None:
    for name in dict.fromkeys(row.model for row in rows):
        mine = [row for row in rows if row.model == name]
        reference = next(row.loss for row in mine if row.opened == "rankfold.load")
        unit = "perplexity" if name == "smollm2" else "loss, nats"
        print(f"\n{name} at {SIZE}: {unit} {_shown(name, reference)} by rankfold.load\n")
        columns = ["opened by", "form", "bytes", "of dense", "output differs", f"{unit} differs"]
        lines = []
        for row in sorted(mine, key=lambda row: [*TOOLS].index(row.opened)):
            change = math.expm1(row.loss - reference) if name == "smollm2" else row.loss - reference
            cells = [
                row.opened,
                TOOLS[row.opened][0],
                f"{row.bytes:,}",
                f"{row.bytes / row.dense_bytes:.4f}",
                f"{row.difference:.1e}",
                f"{change:+.1e}",
                *(_ratio(row.seconds[str(batch)]) for batch in BATCHES),
            ]
            lines.append(cells)
        print(markdown([*columns, *(f"time at {batch}" for batch in BATCHES)], lines), end="")
        for row in mine:
            if row.same_text is not None:
                print(f"\n{row.opened} in a fresh process: greedy text the same: {row.same_text}")
            for dtype, (size, account, dense) in row.saved.items():
                print(
                    f"{dtype}: {size:,} bytes on disk, {account:,} by account, dense {dense:,}: "
                    f"{size / dense:.4f}"
                )


def _shown(name: str, loss: float) -> str:
    return f"{math.exp(loss):.2f}" if name == "smollm2" else f"{loss:.4f}"


def _ratio(times: Sequence[Sequence[float]]) -> str:
    """Median and quartiles of factorized / dense, and the dense model's median."""
    low, middle, high = quantiles((b / a for a, b in times), n=4, method="inclusive")
    milliseconds = 1000 * median(dense for dense, _ in times)
    return f"{middle:.2f} ({low:.2f} – {high:.2f}) of {milliseconds:,.1f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("models", nargs="+", choices=[*MODELS])
    writing = commands.add_parser("write")
    writing.add_argument("model", choices=[*MODELS])
    writing.add_argument("form", choices=["artifact", *TARGETS])
    one = commands.add_parser("open")
    one.add_argument("model", choices=[*MODELS])
    one.add_argument("tool", choices=[*TOOLS])
    for command in (run, one):
        command.add_argument("--repeats", type=int, default=5)
    for command in (run, one, writing, commands.add_parser("table")):
        command.add_argument("--results", type=Path, default=RESULTS)
        command.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.command == "write":
        write(options.model, options.form)
    elif options.command == "open":
        measure(options.model, options.tool, options.repeats, options.results)
    else:
        if options.command == "run":
            _run(options)
        print_table(read_rows(options.results, Row))


def _run(options: argparse.Namespace) -> None:
    """Each step in a process of its own: fresh, and with only its own two models in memory."""
    shared_data()  # where it is missing, now rather than later
    done = {row.key for row in read_rows(options.results, Row)}
    command = [sys.executable, "-m", "benchmarks.formats"]
    common = ["--results", str(options.results), "--threads", str(options.threads)]
    for name in options.models:
        wanted = [t for t in TOOLS if (name, t) not in done | LEFT_OUT]
        for form in ("artifact", *TARGETS) if wanted else ():
            subprocess.run([*command, "write", name, form, *common], check=True)
        for tool in wanted:
            repeats = ["--repeats", str(options.repeats)]
            subprocess.run([*command, "open", name, tool, *repeats, *common], check=True)


if __name__ == "__main__":
    main()
