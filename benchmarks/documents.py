"""Documents whose tables are written from results.

A document is prose with markers, ``<!-- begin: quality resnet20 -->`` to ``<!-- end -->``; what
stands between two markers is written anew, all else is left as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

DOCS = Path(__file__).parents[1] / "docs"
MARKED = re.compile(r"(<!-- begin: ([^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def write_tables(document: Path, tables: Mapping[str, str]) -> None:
    """Write every marked table of a document anew.

    Raises:
        ValueError: A marker names no table.
    """
    document.write_text(filled(document.read_text(encoding="utf-8"), tables), encoding="utf-8")


def filled(text: str, tables: Mapping[str, str]) -> str:
    """The text with each marked place holding its table.

    Raises:
        ValueError: A marker names no table.
    """

    def table(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name not in tables:
            raise ValueError(
                f"the marker {name!r} names no table; there are {', '.join(sorted(tables))}"
            )
        return f"{begin}{tables[name]}{end}"

    return MARKED.sub(table, text)


def markdown(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table of these columns."""
    text = "| " + " | ".join(columns) + " |\n" + "| --- " * len(columns) + "|\n"
    return text + "".join("| " + " | ".join(line) + " |\n" for line in lines)


def spread(changes: Sequence[float], errors: Sequence[float], digits: int = 4) -> str:
    """Mean over the seeds ± their mean standard error, and how far the seeds lie apart.

    Test examples of seeds overlap, so the error of the mean isn't smaller by a root.
    """
    text = f"{mean(changes):+.{digits}f} ± {mean(errors):.{digits}f}"
    return text + (f", seeds ± {stdev(changes):.{digits}f}" if len(changes) > 1 else "")


def seconds(spent: Iterable[tuple[str, float]], digits: int = 0) -> str:
    """Mean seconds by device, in one cell: a CPU's and a GPU's have nothing in common.

    Args:
        spent: Device and seconds of every run.
        digits: After the point.
    """
    by_device: dict[str, list[float]] = {}
    for device, took in spent:
        by_device.setdefault(device, []).append(took)
    return "; ".join(
        f"{mean(took):.{digits}f}" + ("" if device == "cpu" else f" ({device})")
        for device, took in sorted(by_device.items())
    )
