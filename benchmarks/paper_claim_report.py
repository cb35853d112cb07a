"""The tables of docs/notebook/paper_claim.md and its figure, from the lines of results alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import figures
from benchmarks.documents import DOCS, markdown, spread
from benchmarks.figures import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY
from benchmarks.paper_claim_runs import CONFIDENCE, Measured, Row

DOCUMENT = DOCS / "notebook" / "paper_claim.md"
CLAIMED_SIZE = 0.3
COLOURS = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BLACK, GREY)
NEAR = 0.06  # nats and points within which the upper panels look


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """For each setting and test set loss, accuracy, prediction and the claimed size, by marker."""
    pairs = dict.fromkeys((row.setting, row.test) for row in rows)
    return {
        f"claim {setting} {test}": _tables_of(
            [row for row in rows if (row.setting, row.test) == (setting, test)]
        )
        for setting, test in pairs
    }


def _tables_of(mine: Sequence[Row]) -> str:
    smaller = [row for row in mine if row.size is not None]
    dense = _measured([row for row in mine if row.model == "dense"])
    loss, accuracy = mean(m.loss for m in dense), mean(m.accuracy for m in dense)
    first = mine[0]
    seeds = ", ".join(map(str, sorted({row.seed for row in mine})))
    parts = [
        f"{first.images} images, seeds {seeds}; curvature {first.curvature}; calibration loss "
        f"{first.calibration_loss or 0:.4f}; dense: loss {loss:.4f}, accuracy {accuracy:.4f}.\n",
        "Change of the mean loss, nats ± paired standard error:\n\n" + _curve(smaller, _loss_cell),
        *_unsized(mine),
        "Change of the accuracy, points ± paired standard error:\n\n"
        + _curve(smaller, _accuracy_cell),
        "Predicted change of the loss, and measured / predicted:\n\n"
        + _curve([row for row in smaller if row.predicted is not None], _prediction_cell),
        _claim(smaller),
    ]
    return "\n".join(parts)


def _unsized(mine: Sequence[Row]) -> list[str]:
    """Lines of what has no size: control, temperature, and where a rule ends."""
    lines = []
    for name in ("control", "temperature"):
        there = [row for row in mine if row.model == name]
        if not there:
            lines.append(f"{name}: none; no step was shown to help on selection images.\n")
            continue
        lines.append(
            f"{name}: loss {_loss_cell(there)}, accuracy {_accuracy_cell(there)} points"
            + _range(", at temperature", [row.temperature for row in there])
            + _range(", eta", [row.eta for row in there])
            + f"; 95 % sure below {max(m.upper for m in _measured(there)):+.4f}.\n"
        )
    for name in dict.fromkeys(r.model for r in mine if r.model.endswith("its smallest")):
        there = [row for row in mine if row.model == name]
        lines.append(
            f"{name}: loss {_loss_cell(there)}, accuracy {_accuracy_cell(there)} points"
            + _range(", keeps", [row.kept for row in there])
            + ".\n"
        )
    return lines


def _curve(rows: Sequence[Row], cell: Callable[[Sequence[Row]], str]) -> str:
    """Models down, sizes across; a cell is of all seeds."""
    sizes = sorted({row.size for row in rows if row.size is not None}, reverse=True)
    lines = [
        [model, *(cell([r for r in rows if (r.model, r.size) == (model, size)]) for size in sizes)]
        for model in dict.fromkeys(row.model for row in rows)
    ]
    return markdown(["model", *(f"{size:g}" for size in sizes)], lines)


def _claim(rows: Sequence[Row]) -> str:
    """What is shown at the claimed size, by the worst bound of all seeds.

    The last column is a fixed-sequence test: sizes are tried from the largest to the smallest and
    the first that is not shown to be better ends it, so that trying many costs no confidence.
    """
    columns = ["model", "loss change", "at least", "at most", "accuracy, points", "at least"]
    columns += ["at most", "gained / lost images", "loss better down to"]
    columns += ["accuracy better down to"]
    lines = []
    for model in dict.fromkeys(row.model for row in rows):
        mine = [row for row in rows if row.model == model]
        there = [row for row in mine if row.size == CLAIMED_SIZE]
        ends = [
            _down_to(mine, lambda m: m.upper < 0),
            _down_to(mine, lambda m: m.accuracy_lower > 0),
        ]
        measured = _measured(there)
        if not measured:
            lines.append(
                [model, "no plan of this size" if there else "not measured", *[""] * 6, *ends]
            )
            continue
        lines.append(
            [
                model,
                _loss_cell(there),
                f"{min(m.lower for m in measured):+.4f}",
                f"{max(m.upper for m in measured):+.4f}",
                _accuracy_cell(there),
                f"{100 * min(m.accuracy_lower for m in measured):+.2f}",
                f"{100 * max(m.accuracy_upper for m in measured):+.2f}",
                f"{mean(m.gained for m in measured):.0f} / {mean(m.lost for m in measured):.0f}",
                *ends,
            ]
        )
    bounds = f"bounds one-sided {CONFIDENCE:.0%}, the widest of all seeds"
    return f"At size {CLAIMED_SIZE:g}, {bounds}:\n\n{markdown(columns, lines)}"


def _down_to(rows: Sequence[Row], shown: Callable[[Measured], bool]) -> str:
    """The smallest size down to which every size is shown to be better, in every seed."""
    reached = "nowhere"
    # At 1.0 a plan without a step is the dense net itself, which can't be better than itself.
    for size in sorted({row.size for row in rows if row.size and row.size < 1}, reverse=True):
        here = [row.measured for row in rows if row.size == size]
        if not all(m is not None and shown(m) for m in here):
            break
        reached = f"{size:g}"
    return reached


def _measured(rows: Sequence[Row]) -> list[Measured]:
    return [row.measured for row in rows if row.measured is not None]


def _loss_cell(rows: Sequence[Row]) -> str:
    measured = _measured(rows)
    if not measured:
        return ""
    return spread([m.change for m in measured], [m.standard_error for m in measured])


def _accuracy_cell(rows: Sequence[Row]) -> str:
    measured = _measured(rows)
    if not measured:
        return ""
    return spread(
        [100 * m.accuracy_change for m in measured],
        [100 * m.accuracy_standard_error for m in measured],
        2,
    )


def _prediction_cell(rows: Sequence[Row]) -> str:
    pairs = [
        (r.predicted, r.measured.change) for r in rows if r.measured and r.predicted is not None
    ]
    if not pairs:
        return ""
    predicted, measured = (mean(values) for values in zip(*pairs, strict=True))
    return f"{predicted:+.4f}" + (f", x {measured / predicted:.2f}" if predicted else "")


def _range(name: str, values: Sequence[float | None]) -> str:
    present = [value for value in values if value is not None]
    if not present:
        return ""
    low, high = min(present), max(present)
    return f"{name} {low:.3g}" + ("" if low == high else f" to {high:.3g}")


def draw(rows: Sequence[Row], folder: Path) -> Path:
    """Loss and accuracy against the size on the kept images, near the dense net and as a whole."""
    file = folder / "paper_claim.svg"
    mine = [row for row in rows if (row.setting, row.test) == ("kept", "kept")]
    models = list(dict.fromkeys(row.model for row in mine if row.size is not None))
    layout = {"nrows": 2, "ncols": 2, "sharex": True, "figsize": (11, 7.5)}
    with figures.saved(file, **layout) as (figure, panels):
        for place, model in enumerate(models):
            there = [row for row in mine if row.model == model]
            sizes = sorted({r.size for r in there if r.size is not None and r.measured})
            found = [_measured([r for r in there if r.size == size]) for size in sizes]
            style = {"color": COLOURS[place % len(COLOURS)], "label": model, "capsize": 2, "ms": 4}
            style["fmt"] = "-o" if place < len(COLOURS) else "--s"
            for panel in panels[:, 0]:
                _errorbar(panel, sizes, found, lambda m: (m.change, m.standard_error), style)
            for panel in panels[:, 1]:
                _errorbar(
                    panel,
                    sizes,
                    found,
                    lambda m: (100 * m.accuracy_change, 100 * m.accuracy_standard_error),
                    style,
                )
        for name, dashes in (("control", "--"), ("temperature", ":")):
            level = _measured([row for row in mine if row.model == name])
            if level:
                for panel in panels[:, 0]:
                    panel.axhline(
                        mean(m.change for m in level), color="grey", linestyle=dashes, label=name
                    )
        for panel in panels.flat:
            panel.axhline(0, color="black", linewidth=0.8)
            panel.axvline(CLAIMED_SIZE, color="grey", linewidth=0.5)
            panel.grid(alpha=0.3)
        panels[0, 0].set_ylim(-NEAR / 3, NEAR)
        panels[0, 1].set_ylim(-100 * NEAR / 3, 100 * NEAR / 6)
        panels[0, 0].set_title("change of the loss (nats), near the dense net")
        panels[0, 1].set_title("change of the accuracy (points), near the dense net")
        panels[1, 0].set_title("the same, all of it")
        panels[1, 1].set_title("the same, all of it")
        for panel in panels[1]:
            panel.set_xlabel("kept of the whole model's parameters")
        handles = panels[1, 0].get_legend_handles_labels()
        panels[1, 1].legend(*handles, frameon=False, fontsize=7.5, loc="lower right")
        figure.suptitle(
            "ResNeXt, 5,000 kept images, mean over the seeds (bars: ± 1 standard error)"
        )
    return file


def _errorbar(
    panel: Any,
    sizes: Sequence[float],
    found: Sequence[Sequence[Measured]],
    values: Callable[[Measured], tuple[float, float]],
    style: dict[str, Any],
) -> None:
    pairs = [[values(m) for m in of_size] for of_size in found]
    panel.errorbar(
        sizes,
        [mean(value for value, _ in of_size) for of_size in pairs],
        yerr=[mean(error for _, error in of_size) for of_size in pairs],
        **style,
    )
