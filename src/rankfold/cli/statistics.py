"""``rankfold statistics``: collect once; ``rankfold merge-statistics``: what machines collected."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from rankfold.cli.app import command
from rankfold.cli.options import ModelArgument, Parts, Reading
from rankfold.cli.room import Room
from rankfold.settings import Settings

OutFolder = Annotated[
    Path, typer.Option(help="Folder for the statistics, new or empty. Needed.", metavar="FOLDER")
]


@dataclass(frozen=True)
class Collecting:
    """Everything that a pass over the calibration part takes."""

    parts: Parts
    room: Room
    settings: Settings
    reading: Reading


@command(needs="rankfold.cli.collecting")
def statistics(model: ModelArgument, *, out: OutFolder, options: Collecting) -> int:
    """Collect statistics once, for runs of lossless and compact with --statistics.

    Settings are as for these runs: one with others is refused.
    """
    from rankfold.cli.collecting import collect

    return collect(model, out, options)


@command(needs="rankfold.cli.collecting")
def merge_statistics(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER...", help="Statistics of parts of the data, two or more."),
    ],
    *,
    out: OutFolder,
) -> int:
    """Merge statistics of one model that machines have collected on parts of the data."""
    from rankfold.cli.collecting import merge

    return merge(folders, out)
