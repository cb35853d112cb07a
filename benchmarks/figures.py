"""Figures as SVG: the same bytes for the same results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "docs" / "figures"
# Okabe and Ito 2008, safe for the colour-blind.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, RED, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#777777"


@contextmanager
def saved(file: Path, **layout: Any) -> Iterator[tuple[Any, Any]]:
    """A figure and its panels, as ``pyplot.subplots`` makes them; written when the block ends."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    file.parent.mkdir(parents=True, exist_ok=True)
    # Without a salt of its own every file would have other identifiers.
    with mpl.rc_context({"svg.hashsalt": "rankfold", "font.size": 9}):
        figure, panels = pyplot.subplots(**layout)
        try:
            yield figure, panels
            figure.tight_layout()
            figure.savefig(file, metadata={"Date": None})
        finally:
            pyplot.close(figure)
