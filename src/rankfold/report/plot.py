"""Figures of results by matplotlib, which is imported when one is drawn."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from rankfold.errors import require, visible
from rankfold.report.figures import BLUE, GREEN, GREY, ORANGE

Report = Mapping[str, Any]

MOST_NAMED = 60  # layers whose names have room beside their bars


def plot_result(report: Report) -> Any:
    """Size against loss of the plans tried, and what is kept of each layer: a ``Figure``."""
    figure = _figure(figsize=(11, 4))
    left, right = figure.subplots(1, 2)
    tried = [t for t in report["selection"] if t["change"] is not None]
    left.errorbar(
        [100 * t["ratio"] for t in tried],
        [t["change"] for t in tried],
        yerr=[2 * (t["standard_error"] or 0.0) for t in tried],
        fmt="o", color=BLUE, label="tried, selection data",
    )  # fmt: skip
    _tested(left, [_point(report)])
    _labelled(left, report["certificate"])
    layers = report["layers"]
    kept = [100 * one["factorized_parameters"] / max(1, one["parameters"]) for one in layers]
    right.bar(range(len(layers)), kept, color=BLUE)
    right.set_ylabel("kept of the layer's weights, %")
    right.set_title("layers, in the order of the model")
    if len(layers) <= MOST_NAMED:
        names = [_plain(visible(one["name"])) for one in layers]
        right.set_xticks(range(len(layers)), names, rotation=90, fontsize=6)
    else:
        right.set_xticks([])
    return figure


def plot_sweep(reports: Sequence[Report]) -> Any:
    """Size against held-out loss of several results: a ``Figure``."""
    figure = _figure(figsize=(6, 4))
    axes = figure.subplots()
    _tested(axes, [_point(report) for report in reports])
    _labelled(axes, reports[0]["certificate"])
    return figure


def _figure(**options: Any) -> Any:
    # Of its own, not of pyplot: a notebook shows it once, and nothing keeps it in memory.
    return _figure_class()(layout="constrained", **options)


@cache
def _figure_class() -> Any:
    """A figure that a notebook shows also where pyplot isn't imported."""
    figures: Any = require("matplotlib.figure", "plot")
    return type("ShownFigure", (figures.Figure,), {"_repr_png_": _png})


def _png(figure: Any) -> bytes:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    return drawn.getvalue()


def _point(report: Report) -> tuple[float, float, float, float]:
    """Size in percent, change, and how far the bounds are below and above it."""
    c = report["certificate"]
    return (
        100 * report["ratio"],
        c["change"],
        c["change"] - c["lower_bound"],
        c["upper_bound"] - c["change"],
    )


def _tested(axes: Any, points: Sequence[tuple[float, float, float, float]]) -> None:
    x, y, below, above = zip(*points, strict=True)
    axes.errorbar(
        x, y, yerr=[below, above], fmt="D", color=ORANGE, capsize=3, label="tested, held-out data"
    )


def _labelled(axes: Any, certificate: Report) -> None:
    axes.axhline(0, color=GREY, linestyle="--", linewidth=1)
    axes.axhline(certificate["margin"], color=GREEN, linestyle="--", linewidth=1, label="margin")
    axes.set_xlabel("parameters kept of the whole model, %")
    axes.set_ylabel(f"change of the loss, {_plain(visible(certificate['unit']))}")
    axes.legend()


def _plain(text: str) -> str:
    """A text that matplotlib shows as it is, and reads no formula in."""
    return text.replace("$", r"\$")
