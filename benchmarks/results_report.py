"""Tables for people, of at most seven columns: those of README.md and docs/results.md.

Every number is of the lines that the benchmark wrote; the whole tables, with all methods, are
those of ``benchmarks.field_report``.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from benchmarks.documents import DOCS, markdown
from benchmarks.field import Row
from benchmarks.methods import METHODS
from benchmarks.speed import SpeedRow

DOCUMENTS = [DOCS.parent / "README.md", DOCS / "results.md"]
NOT_MEASURED = "–"
BETWEEN = "\u00a0±\u00a0"  # a number and its error stay on one line
NAMES = {
    "smollm2": "SmolLM2-135M",
    "minilm": "MiniLM (sentences)",
    "resnet20": "ResNet-20",
    "resnet32": "ResNet-32",
    "resnet44": "ResNet-44",
    "resnet56": "ResNet-56",
    "chenyaofo_resnet20": "ResNet-20, chenyaofo",
    "chenyaofo_resnet56": "ResNet-56, chenyaofo",
    "shufflenetv2": "ShuffleNetV2 x0.5",
    "efficientnet_lite0": "EfficientNet-lite0",
    "resnext": "ResNeXt",
    "vit": "ViT",
}
SIZES = (0.9, 0.8, 0.7, 0.5, 0.3)
# Model, the share kept of the layers that can be factorized, and whether a step is taken there.
CHOICES = (("smollm2", 0.8, True), ("minilm", 0.7, False), ("resnet20", 0.5, False))
# What a user may ship: words, method, and the method whose latency it has.
SHIPPED = (
    ("pair", "joint-pair", "kronecker-pair"),
    ("pivoted, the default", "joint-pivoted", "kronecker-pivoted"),
    ("pivoted, no step", "kronecker-pivoted", "kronecker-pivoted"),
    ("int8", "int8", "int8"),
    ("pair + int8", "joint-pair-int8", ""),
    ("pivoted + int8", "joint-int8", ""),
    ("original, same step", "control", ""),
)


def results_tables(rows: Sequence[Row], speed: Sequence[SpeedRow]) -> dict[str, str]:
    """By the names of their places in the documents."""
    return {"choices": choices_table(rows, speed), "results": results_table(rows)}


def choices_table(rows: Sequence[Row], speed: Sequence[SpeedRow]) -> str:
    """What pair, pivoted, int8 and both give on three models: size, loss, latency.

    Where no step is taken its objective is the one without: rows for both would be the same.
    """
    lines = []
    for name, size, stepped in CHOICES:
        mine = [row for row in rows if row.model == name]
        for words, method, timed in SHIPPED:
            if not stepped and (words.endswith("no step") or method == "control"):
                continue
            found = _of(mine, method, size)
            if not found and not stepped and method == "joint-pair":
                found = _of(mine, "kronecker-pair", size)
            model = f"{NAMES[name]} at {size:.2f}"
            times = [_time(speed, name, size, timed, batch) for batch in (1, 8)]
            lines.append([model, words, _mean(found, "bytes"), _change(found), *times])
    columns = ["model, share kept of its layers", "what you ship", "bytes", "change of the loss"]
    return markdown([*columns, "time, batch 1", "time, batch 8"], lines)


def results_table(rows: Sequence[Row]) -> str:
    """For each model and size: ours with and without the step, the best peer and int8."""
    lines = []
    for name in NAMES:
        mine = [row for row in rows if row.model == name]
        for size in SIZES:
            found = _of(mine, "joint-pivoted", size)
            if not found:
                continue
            peers = {
                method: _of(mine, method, size)
                for method in METHODS
                if METHODS[method].kind == "peer" and METHODS[method].sized
            }
            known = {method: mean(map(_known, peer)) for method, peer in peers.items() if peer}
            best = min(known, key=lambda method: known[method]) if known else None
            peer = f"{_change(peers[best])}, {METHODS[best].label}" if best else NOT_MEASURED
            others = [_change(_of(mine, method, size)) for method in ("kronecker-pivoted", "int8")]
            lines.append([NAMES[name], f"{size:.2f}", _change(found), others[0], peer, others[1]])
    columns = ["model", "size", "rankfold", "no step", "best low-rank peer", "int8"]
    return markdown(columns, lines)


def number(value: float, digits: int = 3) -> str:
    """With its sign, as people write it: +0.007, −0.278."""
    return f"{value:+.{digits}f}".replace("-", "−")


def _of(rows: Sequence[Row], method: str, size: float) -> list[Row]:
    """The rows of a method that has a model there; of one without a size, all."""
    return [
        row
        for row in rows
        if row.method == method and row.size in (size, None) and row.change is not None
    ]


def _known(row: Row) -> float:
    assert row.change is not None
    return row.change


def _change(rows: Sequence[Row]) -> str:
    if not rows:
        return NOT_MEASURED
    error = mean(row.standard_error or 0.0 for row in rows)
    return f"{number(mean(map(_known, rows)))}{BETWEEN}{error:.3f}"


def _mean(rows: Sequence[Row], field: str) -> str:
    found = [getattr(row, field) for row in rows]
    return f"{mean(found):.2f}" if found else NOT_MEASURED


def _time(speed: Sequence[SpeedRow], model: str, size: float, method: str, batch: int) -> str:
    for row in speed:
        known = (row.model, row.method, row.batch) == (model, method, batch)
        if known and row.size in (size, None):
            return f"{row.ratio:.2f}"
    if method == "kronecker-pivoted":  # the same layers, where no step is taken
        return _time(speed, model, size, "joint-pivoted", batch)
    return NOT_MEASURED
