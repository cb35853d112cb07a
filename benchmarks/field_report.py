"""docs/notebook/field.md and figures, from the lines that the benchmark wrote alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import figures
from benchmarks.choices import QUESTIONS
from benchmarks.documents import DOCS, markdown, seconds, spread
from benchmarks.field import Row
from benchmarks.figures import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY
from benchmarks.memory import DENSE, MemoryRow
from benchmarks.methods import METHODS
from benchmarks.speed import SpeedRow
from rankfold.certificate.statement import DEFAULT_MARGIN

DOCUMENTS = [DOCS / "notebook" / "field.md"]

OURS = "joint-pivoted"  # what a user gets who chooses nothing
WITHOUT_STEP = "kronecker-pivoted"
ONE_SIDED = 1.645  # quantile of the normal distribution at 95 %
MARGIN = 0.05
IN_INT8 = ("joint-int8", "joint-pair-int8")
# The aim that the field was measured for: the most that ours should lose of what a peer does.
AIMS = {"svd-llm": 0.25, "asvd": 0.25}
AIM_OF_BEST = 0.5
MOST_NAMES = 60  # of layers that fit below a figure
# The figures' methods: colour, marker, line.
STYLES = {
    "joint-pivoted": (BLACK, "o", "-"),
    "control": (BLACK, "+", ""),  # what of joint's gain the dense model has, too
    "kronecker-pivoted": (BLACK, ".", ":"),
    "kronecker-pair": (BLACK, "s", "--"),
    "svd": (GREY, "x", ":"),
    "asvd": (ORANGE, "v", ":"),
    "svd-llm": (SKY, "^", "-"),
    "pifa": (SKY, "D", "--"),
    "balf": (BLUE, "P", "-"),
    "gfwsvd-search": (GREEN, "<", "--"),
    "kfac-svd-lems": (RED, "X", "-"),
    "zero-sum": (PURPLE, "*", "-"),
    "first-order": (GREY, "d", "--"),
    "wanda": (GREEN, "1", "-"),
    "int8": (ORANGE, "h", ""),
    "joint-int8": (BLUE, "p", "--"),
}


def all_tables(
    rows: Sequence[Row], speed: Sequence[SpeedRow], memory: Sequence[MemoryRow]
) -> dict[str, str]:
    """Every table, by the name of its place in the documents."""
    tables = {f"quality {name}": quality_table(mine) for name, mine in _by_model(rows)}
    tables |= {f"weights {name}": weights_table(mine) for name, mine in _by_model(rows)}
    tables |= {"smallest": smallest_table(rows), "losses": losses_table(rows)}
    tables |= {"shares": shares_table(rows)}
    tables |= {"certified": certified_table(rows)}
    tables |= {"speed": speed_table(speed), "memory": memory_table(memory)}
    return tables | {"forward": forward_table(speed)}


def _by_model(rows: Sequence[Row]) -> Iterable[tuple[str, list[Row]]]:
    for name in dict.fromkeys(row.model for row in rows):
        yield name, [row for row in rows if row.model == name]


def _sizes(rows: Sequence[Row]) -> list[float]:
    return sorted({row.size for row in rows if row.size is not None}, reverse=True)


def _methods(rows: Sequence[Row]) -> list[str]:
    present = {row.method for row in rows}
    kinds = ("peer", "ours", "outside")
    return [m for kind in kinds for m in METHODS if METHODS[m].kind == kind and m in present]


def _at(rows: Sequence[Row], method: str, size: float | None) -> list[Row]:
    found = [row for row in rows if (row.method, row.size) == (method, size)]
    return found or [row for row in rows if row.method == method and row.size is None]


def _changes(rows: Sequence[Row]) -> list[float]:
    return [row.change for row in rows if row.change is not None]


def quality_table(rows: Sequence[Row]) -> str:
    """Change of the loss and accuracy of every method and size, means over the seeds."""
    sizes = _sizes(rows)
    seeds = sorted({row.seed for row in rows})
    measured = [row for row in rows if row.dense_loss is not None]
    first = measured[0]
    text = f"Dense: loss {first.dense_loss:.4f} ({first.unit})"
    if first.dense_accuracy is not None:
        text += f", accuracy {first.dense_accuracy:.4f}"
    text += f". {first.calibration} calibration examples, seeds {', '.join(map(str, seeds))}.\n\n"
    best = {size: _lowest(rows, size, ("peer", "ours")) for size in sizes}
    lines = []
    for method in _methods(rows):
        cells = [METHODS[method].label]
        for size in sizes:
            cell = _cell(_at(rows, method, size))
            cells.append(f"**{cell}**" if best[size] == method else cell)
        lines.append(cells)
    text += markdown(["method", *(f"{size:g}" for size in sizes)], lines)
    other = [row for row in rows if row.other_change is not None]
    if other:
        text += "\nOn text of another kind:\n\n"
        text += markdown(
            ["method", *(f"{size:g}" for size in sizes)],
            (
                [METHODS[m].label, *(_other_cell(_at(other, m, size)) for size in sizes)]
                for m in _methods(other)
            ),
        )
    asked = [row for row in rows if row.choices is not None]
    if asked:
        dense = f"{asked[0].dense_choices:.2f}"
        text += f"\nShare of {QUESTIONS} questions answered correctly (dense {dense}):\n\n"
        text += markdown(
            ["method", *(f"{size:g}" for size in sizes)],
            (
                [METHODS[m].label, *(_choices_cell(_at(asked, m, size)) for size in sizes)]
                for m in _methods(asked)
            ),
        )
    return text


def _lowest(rows: Sequence[Row], size: float, kinds: Sequence[str]) -> str | None:
    """The sized method of these kinds whose mean change is lowest, int8 left out."""
    means = {
        method: mean(_changes(found))
        for method in _methods(rows)
        if METHODS[method].kind in kinds and METHODS[method].sized and method not in IN_INT8
        for found in [_at(rows, method, size)]
        if _complete(found)
    }
    return min(means, key=lambda method: means[method]) if means else None


def _complete(rows: Sequence[Row]) -> bool:
    return bool(rows) and all(row.change is not None for row in rows)


def _cell(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    if any(row.note for row in rows):
        return "size not reached"
    if not _complete(rows):
        return "not finite"
    text = spread(_changes(rows), [row.standard_error or 0.0 for row in rows])
    accuracies = [row.accuracy for row in rows if row.accuracy is not None]
    return text + (f"; {mean(accuracies):.3f}" if accuracies else "")


def _other_cell(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    changes = mean(row.other_change or 0.0 for row in rows)
    return f"{changes:+.4f} ± {mean(row.other_standard_error or 0.0 for row in rows):.4f}"


def _choices_cell(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    error = mean(row.choices_standard_error or 0.0 for row in rows)
    return (
        f"{mean(row.choices or 0.0 for row in rows):.2f}, "
        f"{mean(row.choices_change or 0.0 for row in rows):+.2f} ± {error:.2f}"
    )


def weights_table(rows: Sequence[Row]) -> str:
    """Shares of parameters, bytes and FLOPs of the whole model, and the seconds it took."""
    sizes = _sizes(rows)
    columns = ["method"]
    for what in ("parameters", "bytes", "FLOPs"):
        columns += [f"{what}, {size:g}" for size in sizes]
    lines = []
    for method in _methods(rows):
        cells = [METHODS[method].label]
        for what in ("parameters", "bytes", "flops"):
            for size in sizes:
                found = [getattr(row, what) for row in _at(rows, method, size) if not row.note]
                cells.append(f"{mean(found):.3f}" if found else "")
        spent = [
            (r.device, r.seconds) for r in rows if r.method == method and r.seconds is not None
        ]
        cells.append(seconds(spent, digits=1))
        lines.append(cells)
    shared = seconds((row.device, row.statistics_seconds or 0.0) for row in rows)
    text = markdown([*columns, "seconds"], lines)
    return text + f"\nThe statistics that the methods share took {shared} s more.\n"


def smallest_table(rows: Sequence[Row]) -> str:
    """The smallest measured size of each method that is shown to lose no more than ``MARGIN``."""
    return _smallest(rows, lambda row: _upper(row) <= MARGIN)


def certified_table(rows: Sequence[Row]) -> str:
    """The smallest measured size that rankfold's certificate calls lossless or better.

    Models with rows from before certificates were recorded are left out.
    """
    known = [row for _, mine in _by_model(rows) if all(map(_tested, mine)) for row in mine]
    return _smallest(known, lambda row: row.verdict in ("better", "lossless"))


def _smallest(rows: Sequence[Row], passes: Callable[[Row], bool]) -> str:
    """For each method and model the smallest size that passes in every seed.

    All larger sizes that were measured pass too.
    """
    models = list(_by_model(rows))
    lines = []
    for method in (m for m in _methods(rows) if METHODS[m].sized):
        cells = [METHODS[method].label]
        for _, mine in models:
            shown = []
            own = [row for row in mine if row.method == method]
            for size in _sizes(own):
                found = _at(own, method, size)
                if not _complete(found) or not all(map(passes, found)):
                    break
                shown.append(size)
            cells.append(f"{shown[-1]:g}" if shown else ("none" if own else ""))
        lines.append(cells)
    return markdown(["method", *(name for name, _ in models)], lines)


def _tested(row: Row) -> bool:
    """Whether it is known what the certificate says: a change above the margin needs none."""
    return bool(row.verdict) or row.change is None or row.change > DEFAULT_MARGIN


def _upper(row: Row) -> float:
    return (row.change or 0.0) + ONE_SIDED * (row.standard_error or 0.0)


def losses_table(rows: Sequence[Row]) -> str:
    """For each model and size: ours, the best peer, and all whose mean change is below ours."""
    lines = []
    for name, mine in _by_model(rows):
        for size in _sizes(mine):
            ours = _at(mine, OURS, size)
            peer = _lowest(mine, size, ("peer",))
            if not _complete(ours) or peer is None:
                continue
            own, theirs = mean(_changes(ours)), mean(_changes(_at(mine, peer, size)))
            below = [
                METHODS[method].label
                for method in _methods(mine)
                if METHODS[method].kind != "ours"
                for found in [_at(mine, method, size)]
                if _complete(found) and mean(_changes(found)) < own
            ]
            lines.append(
                [
                    name,
                    f"{size:g}",
                    _cell(ours),
                    f"{METHODS[peer].label}: {_cell(_at(mine, peer, size))}",
                    f"{own - theirs:+.4f}",
                    ", ".join(below) or "none",
                ]
            )
    columns = ["model", "size", METHODS[OURS].label, "best low-rank peer", "ours less best peer"]
    return markdown([*columns, "lower than ours"], lines)


def shares_table(rows: Sequence[Row]) -> str:
    """For each model and size, which share of a peer's change of the loss ours is.

    Over the seeds that both have. Where a peer's change is within its own error it shows no loss to
    be a share of. What is above the aim is bold.
    """
    methods = (OURS, WITHOUT_STEP)
    lines = []
    for name, mine in _by_model(rows):
        for size in _sizes(mine):
            if not any(_complete(_at(mine, method, size)) for method in methods):
                continue
            aims = [*AIMS.items(), (_lowest(mine, size, ("peer",)), AIM_OF_BEST)]
            shares = [_share(mine, size, method, *aim) for method in methods for aim in aims]
            lines.append([name, f"{size:g}", *shares])
    columns = ["model", "size"]
    for method in methods:
        peers = [*(METHODS[peer].label for peer in AIMS), "the best peer"]
        first, *others = (f"of {peer}" for peer in peers)
        columns += [f"{METHODS[method].label}, {first}", *others]
    return markdown(columns, lines)


def _share(rows: Sequence[Row], size: float, method: str, peer: str | None, most: float) -> str:
    if peer is None:
        return ""
    ours, theirs = ({r.seed: r for r in _at(rows, one, size)} for one in (method, peer))
    seeds = ours.keys() & theirs.keys()
    own, other = ([found[seed] for seed in sorted(seeds)] for found in (ours, theirs))
    if not (_complete(own) and _complete(other)):
        return ""
    lost = mean(_changes(other))
    if lost <= mean(row.standard_error or 0.0 for row in other):
        return "no loss shown"
    share = mean(_changes(own)) / lost
    return f"**{share:.2f}**" if share > most else f"{share:.2f}"


def speed_table(rows: Sequence[SpeedRow]) -> str:
    """Time over the dense model's, median and quartiles, at each batch size."""
    batches = sorted({row.batch for row in rows})
    lines = []
    for what in dict.fromkeys(row.what for row in rows):
        name, size, method, place = what
        found = {row.batch: row for row in rows if row.what == what}
        cells = [name, place, "" if size is None else f"{size:g}", METHODS[method].label]
        for batch in batches:
            row = found.get(batch)
            cells.append(
                "" if row is None else f"{row.ratio:.2f} ({row.low:.2f} to {row.high:.2f})"
            )
        lines.append(cells)
    columns = ["model", "on", "size", "method", *(f"batch {batch}" for batch in batches)]
    return markdown(columns, lines)


def forward_table(rows: Sequence[SpeedRow]) -> str:
    """Peak of weights and activations in a forward pass over the dense model's, where measured."""
    known = [row for row in rows if row.memory is not None]
    batches = sorted({row.batch for row in known})
    lines = []
    for what in dict.fromkeys(row.what for row in known):
        name, size, method, _ = what
        found = {row.batch: row for row in known if row.what == what}
        weights = mean(row.weights or 0.0 for row in found.values())
        cells = [name, "" if size is None else f"{size:g}", METHODS[method].label, f"{weights:.2f}"]
        cells += [f"{found[batch].memory:.2f}" if batch in found else "" for batch in batches]
        lines.append(cells)
    columns = ["model", "size", "method", "weights alone"]
    return markdown([*columns, *(f"batch {batch}" for batch in batches)], lines)


def memory_table(rows: Sequence[MemoryRow]) -> str:
    """Peak memory of a process that makes each model."""
    columns = ["model", "size", "method", "resident, MB", "anonymous, MB", "bytes a parameter"]
    return markdown(
        columns,
        (
            [
                row.model,
                "" if row.size is None else f"{row.size:g}",
                row.label,
                f"{row.megabytes:.0f}",
                "" if row.anonymous is None else f"{row.anonymous:.0f}",
                _beyond_dense(row, rows),
            ]
            for row in rows
        ),
    )


def _beyond_dense(row: MemoryRow, rows: Sequence[MemoryRow]) -> str:
    """Anonymous bytes beyond those of evaluating the dense model, for each of its parameters."""
    dense = [r for r in rows if (r.model, r.method) == (row.model, DENSE)]
    if row.method == DENSE or not dense or dense[0].anonymous is None or row.anonymous is None:
        return ""
    assert row.parameters is not None
    return f"{1e6 * (row.anonymous - dense[0].anonymous) / row.parameters:.1f}"


def draw_ranks(rows: Sequence[Row], folder: Path) -> list[Path]:
    """One figure a model: what each method keeps of each layer, at a size in the middle."""
    files = []
    for name, mine in _by_model(rows):
        known = [row for row in mine if row.layers]
        sizes = _sizes(known)
        if not sizes:
            continue
        size = sizes[len(sizes) // 2]
        here = {row.method: row for row in reversed(known) if row.size == size}
        maps = [here[method] for method in METHODS if method in here]
        layers = list(maps[0].layers)
        layout = (max(7.0, min(14.0, 3 + 0.12 * len(layers))), 2 + 0.28 * len(maps))
        file = folder / f"field_ranks_{name}.svg"
        with figures.saved(file, figsize=layout) as (figure, panel):
            drawn = panel.imshow(
                [[row.layers[layer] for layer in layers] for row in maps],
                aspect="auto",
                cmap="cividis",  # made for the colour-blind
                vmin=0,
                vmax=1,
                interpolation="nearest",  # "none" leaves it to the reader, who may blur the cells
            )
            panel.set_yticks(range(len(maps)), [METHODS[row.method].label for row in maps])
            if len(layers) <= MOST_NAMES:
                panel.set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
            panel.set_xlabel("layers in the order of their calls")
            panel.set_title(f"{name}: what is kept of each layer at {size:g} of all of them")
            figure.colorbar(drawn, label="share of the layer's weights")
        files.append(file)
    return files


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """One figure a model: change of the loss against the bytes of the whole model."""
    files = []
    for name, mine in _by_model(rows):
        file = folder / f"field_{name}.svg"
        with figures.saved(file, figsize=(8, 4.6)) as (_, panel):
            _pareto(panel, mine)
            unit = next(row.unit for row in mine)
            panel.set_title(f"{name}: what is lost at which size (error bars: ± 1 standard error)")
            panel.set_ylabel(f"change of the mean held-out loss\n({unit})")
            panel.set_xlabel("bytes of the whole model, as a share of the dense model's")
        files.append(file)
    return files


def _pareto(panel: Any, rows: Sequence[Row]) -> None:
    largest = 0.0
    for method, (colour, marker, line) in STYLES.items():
        groups = [
            found
            for size in [*_sizes(rows), None]
            for found in [[r for r in rows if (r.method, r.size) == (method, size)]]
            if _complete(found)
        ]
        if not groups:
            continue
        changes = [mean(_changes(found)) for found in groups]
        largest = max(largest, *map(abs, changes))
        panel.errorbar(
            [mean(row.bytes or 0.0 for row in found) for found in groups],
            changes,
            yerr=[mean(row.standard_error or 0.0 for row in found) for found in groups],
            color=colour,
            marker=marker,
            linestyle=line,
            label=METHODS[method].label,
            capsize=2,
            markersize=7 if method == OURS else 5.5,
            linewidth=2 if method == OURS else 1.1,
            zorder=3 if method == OURS else 2,
        )
    if largest > 0.3:
        # Logarithmic beyond 0.1: what destroys a model would hide all else.
        panel.set_yscale("symlog", linthresh=0.1)
    panel.axhline(0, color="grey", linewidth=0.8)
    panel.grid(alpha=0.3)
    panel.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8, frameon=False)
