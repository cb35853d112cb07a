"""What ``compare`` prints and writes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from rankfold.artifact.manifest import read_report
from rankfold.certificate.document import JSON_FILE, read_document
from rankfold.cli.app import DONE, as_options, say
from rankfold.cli.printed import print_json
from rankfold.cli.tables import VERDICT_STYLE, Table, plain_console
from rankfold.errors import InputError, visible
from rankfold.files.durable import write_whole
from rankfold.files.listed import MARKS, PAGE_FILE
from rankfold.report.runs import Row, comparison_lines, groups, multiplicity_line, row_of
from rankfold.report.seen import read_seen
from rankfold.report.several import several_page

MODE = 0o644  # of the page


def compared(folders: Sequence[Path], html: Path | None, *, json: bool) -> int:
    """Print the comparison, and write its page; the exit code."""
    places = [place for folder in folders for place in _models(folder)]
    names = _names(places)
    rows = [_row(*pair) for pair in zip(names, places, strict=True)]
    lines = comparison_lines(rows)
    if (line := multiplicity_line(rows)) is not None:
        lines.append(line)
    if html is not None:
        _write(html, rows, lines, dict(zip(names, places, strict=True)))
    if json:
        letters = groups(rows)
        told = [row.as_dict() | {"comparable": a} for row, a in zip(rows, letters, strict=True)]
        print_json({"runs": told, "notes": lines, "html": None if html is None else str(html)})
        return DONE
    print_rows(plain_console(sys.stdout), rows)
    for line in lines:
        say(as_options(line))
    if html is not None:
        say(f"wrote {visible(html)}")
    return DONE


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """A table of at most seven columns; a letter says which losses may be compared."""
    letters = groups(rows)
    several, batches = len({*letters}) > 1, sorted({b for row in rows for b in row.latency})
    table = Table()
    table.add_column("run", overflow="fold")
    table.add_column("held-out" if several else "bytes", justify="left" if several else "right")
    for name in ("parameters", "loss change", "at most"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    if batches:
        table.add_column(f"time at batch {', '.join(map(str, batches))}", justify="right")
    for row, letter in zip(rows, letters, strict=True):
        times = ", ".join(f"{row.latency[b]:.2f}" if b in row.latency else "-" for b in batches)
        table.add_row(
            row.name,
            letter if several else f"{row.bytes:.4f}",
            f"{row.parameters:.4f}",
            f"{row.change:+.4f} ± {row.standard_error:.4f}",
            f"{row.upper_bound:+.4f}",
            Text(row.verdict, VERDICT_STYLE[row.verdict]),
            *([times] if batches else []),
        )
    console.print(table)


def _models(folder: Path) -> list[Path]:
    """The folder itself, or of a sweep those of its sizes, largest first.

    Raises:
        InputError: There is no saved model in it.
    """
    if (folder / MARKS[0]).is_file():
        return [folder]
    inner = [one for one in _inside(folder) if (one / MARKS[0]).is_file()]
    if not inner:
        raise InputError(
            f"{visible(folder)} holds no saved model; expected a folder that lossless, compact or "
            "sweep has written."
        )
    return inner


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir(), key=_largest_first)
    except OSError as error:
        raise InputError(f"{visible(folder)} can't be read: {error.strerror}.") from error


def _largest_first(folder: Path) -> tuple[float, str]:
    try:
        return -float(folder.name), folder.name
    except ValueError:
        return 0.0, folder.name


def _names(places: Sequence[Path]) -> list[str]:
    """A name for each: the last part of its path, or all of it where two have the same.

    Raises:
        InputError: A folder stands there twice.
    """
    real = [place.resolve() for place in places]
    twice = next((p for p, r in zip(places, real, strict=True) if real.count(r) > 1), None)
    if twice is not None:
        raise InputError(f"{visible(twice)} is named twice; name each folder once.")
    last = [place.name or str(place) for place in real]
    if len({*last}) == len(last):
        return last
    return [str(place) for place in places]


def _row(name: str, folder: Path) -> Row:
    document = read_document(folder) if (folder / JSON_FILE).is_file() else None
    seen = read_seen(folder)
    return row_of(name, read_report(folder), document, None if seen is None else seen["latency"])


def _write(file: Path, rows: Sequence[Row], lines: Sequence[str], places: dict[str, Path]) -> None:
    """The page, with links to those of the runs.

    Raises:
        InputError: It can't be written.
    """
    links = {
        row.name: Path(os.path.relpath(places[name] / PAGE_FILE, file.absolute().parent)).as_posix()
        for row, name in zip(rows, places, strict=True)
        if (places[name] / PAGE_FILE).is_file()
    }
    text = several_page(rows, title=f"{len(rows)} runs", lines=lines, links=links)
    try:
        write_whole(file, [text.encode()], MODE)
    except OSError as error:
        message = f"{visible(file)} can't be written: {error}. Choose another file for --html."
        raise InputError(message) from error
