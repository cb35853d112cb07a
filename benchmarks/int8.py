"""Does int8 come on top of low rank: dense, int8, factorized, and both, in one run.

    python -m benchmarks.int8 run smollm2 resnet20 --sizes 0.9 0.8
    python -m benchmarks.int8 table

Weights are rounded to int8 with one float32 scale for each row (output), nothing else is: Linear
layers and their factors by torchao's weight-only int8; torchao has none for convs, so theirs are
stored the same way and multiplied by their scales when used. Embeddings, and output layers tied to
them, stay float32. Bytes are those of all stored tensors. The split is the one of
``benchmarks.field_models``; the change of the loss is paired, from the dense model's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.command_line import commands, parsed
from benchmarks.documents import markdown, spread
from benchmarks.field_models import FIELD_MODELS, TASKS
from benchmarks.methods.int8 import row_scales
from benchmarks.rows import append_row, read_rows
from rankfold import Settings, prepare
from rankfold.certificate.change import paired_change
from rankfold.forms.blocks.modules import ColumnBlocksLinear, RowBlocksLinear
from rankfold.forms.conv.modules import SpatialConv2d, TuckerConv2d
from rankfold.forms.low_rank.modules import LowRankConv2d, LowRankLinear
from rankfold.search.study import open_inputs
from rankfold.tasks.evaluation import Evaluation, evaluate

RESULTS = Path(__file__).parent / "out" / "int8.jsonl"


@dataclass(frozen=True)
class Row:
    """One variant of a model on the held-out part."""

    model: str
    seed: int
    variant: str
    size: float | None
    bytes: int
    loss: float
    change: float
    standard_error: float
    accuracy: float | None


class Int8Rows(nn.Module):
    """A parametrization: int8 values and a float scale for each row, multiplied when used."""

    def forward(self, values: Tensor, scales: Tensor) -> Tensor:
        """Values ``(rows, ...)`` times scales ``(rows, 1, ...)``."""
        return values.to(scales.dtype) * scales

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """As ``methods.int8`` rounds."""
        return row_scales(weight)


def quantize_rows(model: nn.Module) -> None:
    """Store the weights of all convs of ``model`` itself, factorized or not, in int8."""
    kinds = (nn.Conv2d, LowRankConv2d, SpatialConv2d, TuckerConv2d)
    for conv in [module for module in model.modules() if isinstance(module, kinds)]:
        for name, parameter in list(conv.named_parameters(recurse=False)):
            parameter.requires_grad_(False)
            if parameter.dim() > 1:
                parametrize.register_parametrization(conv, name, Int8Rows())


def quantize_linear(model: nn.Module) -> None:
    """Store the weights of Linear layers of ``model`` itself, factorized or not, in int8."""
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_

    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    kinds = (nn.Linear, LowRankLinear, RowBlocksLinear, ColumnBlocksLinear)
    names = [
        f"{layer}.{name}"
        for layer, module in model.named_modules()
        if isinstance(module, kinds)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 2 and id(parameter) not in embeddings
    ]
    config = Int8WeightOnlyConfig(set_inductor_config=False)
    quantize_(model, FqnToConfig(dict.fromkeys(names, config)), filter_fn=None)


def in_int8(model: nn.Module) -> nn.Module:
    """A copy with int8 weights."""
    twin = copy.deepcopy(model)
    quantize_linear(twin)
    quantize_rows(twin)
    return twin


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and persistent buffers, shared ones once."""
    found = {id(t): t for t in model.state_dict(keep_vars=True).values()}
    return sum(_bytes(tensor) for tensor in found.values())


def _bytes(tensor: Any) -> int:
    if type(tensor) not in (Tensor, nn.Parameter):  # one of torchao's, made of several
        inner, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in inner)
    return int(tensor.numel() * tensor.element_size())


def measure(name: str, seed: int, sizes: Iterable[float], file: Path, device: str = "cpu") -> None:
    """Append the rows of a model: dense and int8, then both again for each size."""
    make, calibration = FIELD_MODELS[name]
    model, data = make(seed, calibration)
    model.to(device)
    settings = Settings(seed=seed, task=TASKS.get(name))
    prepared = prepare(model, data, seed=seed, task=settings.task)
    inputs = open_inputs(model, data, settings)

    def on_held_out(found: nn.Module, shown: str) -> Evaluation:
        return evaluate(found, inputs.task, inputs.held_out, stage=shown)

    original = on_held_out(model, "original on held-out data")

    def tell(variant: str, size: float | None, found: nn.Module) -> None:
        evaluation = on_held_out(found, variant)
        change = paired_change(original, evaluation)
        row = Row(
            name, seed, variant, size, stored_bytes(found), evaluation.mean,
            change.mean, change.standard_error, evaluation.accuracy,
        )  # fmt: skip
        append_row(file, row)
        print(row, flush=True)

    tell("dense", None, model)
    tell("int8", None, in_int8(model))
    for size in sizes:
        factorized = prepared.lossless(size).model
        tell("factorized", size, factorized)
        tell("factorized + int8", size, in_int8(factorized))


def print_table(rows: Sequence[Row]) -> None:
    """One table a model and seed, as Markdown."""
    for name, seed in dict.fromkeys((row.model, row.seed) for row in rows):
        mine = [row for row in rows if (row.model, row.seed) == (name, seed)]
        dense = next(row for row in mine if row.variant == "dense")
        print(f"\n{name}, seed {seed}\n")
        columns = ["variant", "size", "bytes", "of dense", "loss", "change ± standard error"]
        lines = [
            [
                row.variant,
                "" if row.size is None else f"{row.size:g}",
                f"{row.bytes:,}",
                f"{row.bytes / dense.bytes:.3f}",
                f"{row.loss:.4f}",
                spread([row.change], [row.standard_error]),
                "" if row.accuracy is None else f"{row.accuracy:.4f}",
            ]
            for row in mine
        ]
        print(markdown([*columns, "accuracy"], lines), end="")


def main() -> None:
    parser, run = commands(__doc__, RESULTS, "table")
    run.add_argument("models", nargs="+", choices=[*FIELD_MODELS])
    run.add_argument("--sizes", nargs="+", type=float, default=[0.9, 0.8])
    run.add_argument("--seed", type=int, default=0)
    options = parsed(parser)
    if options.command == "run":
        for name in options.models:
            measure(name, options.seed, options.sizes, options.results, options.device)
    print_table(read_rows(options.results, Row))


if __name__ == "__main__":
    main()
