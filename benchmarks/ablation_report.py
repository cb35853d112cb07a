"""The tables of docs/notebook/ablation.md and its figures, from its lines and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import figures
from benchmarks.ablation_runs import OWN_TEXT, VARIANTS, Row
from benchmarks.documents import DOCS, markdown, seconds, spread
from benchmarks.figures import BLUE, GREEN, PURPLE, RED
from rankfold.certificate.statement import DEFAULT_MARGIN

DOCUMENT = DOCS / "notebook" / "ablation.md"
BEYOND = 0.4  # nats: larger changes are written at the figure's edge
# By whether a step is taken: the variants whose calibration has more and more own text.
OWN_TEXT_CURVES = {
    True: ("twice the calibration data", "twice the calibration data, half own text"),
    False: (
        "twice the calibration data, no step",
        *(f"twice the calibration data, {share} own text, no step" for share in OWN_TEXT),
    ),
}


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """For each model the tables of its sizes, by the name of their place in the document."""
    models = dict.fromkeys(row.model for row in rows)
    return {f"ablation {name}": _model([r for r in rows if r.model == name]) for name in models}


def _model(rows: Sequence[Row]) -> str:
    """A table a size: means over the seeds, and their spread."""
    first = rows[0]
    labelled = first.dense_accuracy is not None
    text = f"Dense: test loss {first.dense_loss:.4f}"
    text += f", accuracy {first.dense_accuracy:.4f}.\n" if labelled else ".\n"
    for size in _sizes(rows):
        here = [row for row in rows if row.size == size]
        language = any(row.other_change is not None for row in here)
        columns = ["variant", "seeds", "change of the loss", "predicted", "control"]
        columns += ["other text", "control there"] if language else ["accuracy"] * labelled
        columns += ["parameters", "bytes", "seconds"]
        lines = [
            _line(variant, found, language)
            for variant in VARIANTS
            if (found := [row for row in here if row.variant == variant])
        ]
        text += f"\n{size:g} of the factorizable weights:\n\n{markdown(columns, lines)}"
    smallest = [row for row in rows if row.size is None]
    return text + (_smallest(smallest) if smallest else "")


def _smallest(rows: Sequence[Row]) -> str:
    """A line for each model that ``compact`` found."""
    columns = ["variant", "seed", "of the factorizable weights", "parameters"]
    columns += ["change of the loss", "control", "verdict"]
    lines = [
        [
            row.variant,
            str(row.seed),
            f"{row.share:.3f}",
            f"{row.kept:.4f}",
            spread([row.change], [row.standard_error]),
            _mean([row.control]),
            row.verdict,
        ]
        for row in sorted(rows, key=lambda r: ([*VARIANTS].index(r.variant), r.seed))
    ]
    margin = f"margin {DEFAULT_MARGIN:g}"
    return f"\nThe smallest that `compact` finds, {margin}:\n\n{markdown(columns, lines)}"


def _sizes(rows: Sequence[Row]) -> list[float]:
    """The sizes asked for, the largest first."""
    return sorted({row.size for row in rows if row.size is not None}, reverse=True)


def _line(variant: str, rows: list[Row], language: bool) -> list[str]:
    cells = [
        variant,
        str(len(rows)),
        spread([r.change for r in rows], [r.standard_error for r in rows]),
        _mean([r.predicted for r in rows]),
        _mean([r.control for r in rows]),
    ]
    if language:
        errors = [r.other_standard_error or 0.0 for r in rows]
        cells.append(spread([r.other_change or 0.0 for r in rows], errors))
        cells.append(_mean([r.other_control for r in rows]))
    elif accuracies := [r.accuracy for r in rows if r.accuracy is not None]:
        cells.append(f"{mean(accuracies):.3f}")
    cells += [f"{mean(r.kept for r in rows):.4f}", f"{mean(r.bytes_kept for r in rows):.4f}"]
    return [*cells, seconds((r.device, r.seconds) for r in rows)]


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{mean(known):+.4f}" if known else ""


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """One figure a model: change of the loss of every variant, a panel a size."""
    files = []
    for name in dict.fromkeys(row.model for row in rows):
        mine = [row for row in rows if row.model == name]
        sizes = _sizes(mine)
        variants = [v for v in reversed(VARIANTS) if any(row.variant == v for row in mine)]
        file = folder / f"ablation_{name}.svg"
        with figures.saved(
            file,
            ncols=len(sizes),
            sharey=True,
            squeeze=False,
            figsize=(3 + 3 * len(sizes), 1 + len(variants) / 3),
        ) as (figure, panels):
            for panel, size in zip(panels[0], sizes, strict=True):
                _panel(panel, [row for row in mine if row.size == size], variants, size)
            figure.suptitle(f"{name}: change of the mean test loss (nats), every seed a point")
        files.append(file)
    return files


def draw_predictions(rows: Sequence[Row], folder: Path) -> Path:
    """Predicted against measured change of every row that has a prediction, a panel a model.

    But for the first-order form, whose predictions are nats away, so that nothing else would be
    seen; the tables have them.
    """
    rows = [row for row in rows if VARIANTS[row.variant].settings.get("objective") != "first-order"]
    names = list(dict.fromkeys(row.model for row in rows))
    file = folder / "ablation_predicted.svg"
    layout = {"ncols": len(names), "squeeze": False, "figsize": (1 + 4.5 * len(names), 4.6)}
    with figures.saved(file, **layout) as (figure, panels):
        for panel, name in zip(panels[0], names, strict=True):
            mine = [row for row in rows if row.model == name and row.predicted is not None]
            for stepped, colour, marker in ((False, BLUE, "s"), (True, RED, "o")):
                found = [row for row in mine if bool(row.eta) == stepped]
                if found:
                    panel.errorbar(
                        [row.predicted for row in found],
                        [row.change for row in found],
                        yerr=[row.standard_error for row in found],
                        fmt=marker,
                        color=colour,
                        capsize=2,
                        ms=5,
                        label="with the step" if stepped else "without a step",
                    )
            panel.axline((0, 0), slope=1, color="grey", linewidth=0.8)
            panel.set_title(name)
            panel.set_xlabel("predicted change of the loss (nats)")
            panel.set_ylabel("measured (error bars: ± 1 standard error)")
            panel.grid(alpha=0.3)
            panel.legend(frameon=False)
        figure.suptitle("On the line a prediction is right; below it the model is better than that")
    return file


def draw_own_text(rows: Sequence[Row], folder: Path) -> Path | None:
    """What text of the model's own costs on the calibration's kind and gains on another.

    A curve a size, with the step and without, of the first draw of the calibration data.

    Returns:
        None where no curve has two points.
    """
    tested = [row for row in rows if row.other_change is not None and row.seed == 0]
    sizes = _sizes(tested)
    curves: list[tuple[float, bool, list[Row]]] = []
    for size in sizes:
        for stepped, variants in OWN_TEXT_CURVES.items():
            found = [
                row for v in variants for row in tested if row.variant == v and row.size == size
            ]
            if len({row.variant for row in found}) > 1:
                curves.append((size, stepped, found))
    if not curves:
        return None
    file = folder / "ablation_own_text.svg"
    colours = dict(zip(sizes, (BLUE, RED, GREEN, PURPLE), strict=False))
    with figures.saved(file, figsize=(6, 4.6)) as (figure, panel):
        for size, stepped, found in curves:
            panel.errorbar(
                [row.change for row in found],
                [row.other_change for row in found],
                xerr=[row.standard_error for row in found],
                yerr=[row.other_standard_error for row in found],
                fmt="-o" if stepped else "--s",
                color=colours.get(size, "black"),
                capsize=2,
                ms=5,
                label=f"{size:g}, {'with the step' if stepped else 'without a step'}",
            )
            for row in found:
                share = VARIANTS[row.variant].statistics.get("self_share", 0.0)
                panel.annotate(
                    f"{share:g}",
                    (row.change, row.other_change),
                    xytext=(5, 5),
                    textcoords="offset points",
                )
        panel.axvline(0, color="grey", linewidth=0.8)
        panel.axhline(0, color="grey", linewidth=0.8)
        panel.set_xlabel("change on text of the calibration's kind (nats)")
        panel.set_ylabel("change on text of another kind (nats)")
        panel.legend(frameon=False)
        figure.suptitle("Beside each point: the share of calibration text that the model wrote")
    return file


def _panel(panel: Any, rows: list[Row], variants: list[str], size: float) -> None:
    for place, variant in enumerate(variants):
        mine = [row for row in rows if row.variant == variant]
        if mine and (change := mean(row.change for row in mine)) > BEYOND:
            # What destroys a model would hide all else.
            text = f"{change:+.2f} \u2192"
            panel.annotate(
                text, (0.98, place), xycoords=("axes fraction", "data"), ha="right", va="center"
            )
            continue
        for row in mine:
            panel.errorbar(
                row.change, place, xerr=row.standard_error, fmt="o", color="C0", capsize=2, ms=4
            )
            if row.control is not None:
                panel.plot(row.control, place, "x", color="C1")
    panel.locator_params(axis="x", nbins=4)
    panel.axvline(0, color="grey", linewidth=0.8)
    panel.set_yticks(range(len(variants)), variants)
    panel.set_ylim(-0.7, len(variants) - 0.3)
    panel.set_title(f"{size:g} kept (x: control)")
    panel.grid(axis="x", alpha=0.3)
