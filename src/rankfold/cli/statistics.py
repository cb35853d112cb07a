"""``rankfold statistics``: collect once; ``rankfold merge-statistics``: what machines collected."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast

import typer

from rankfold.cli.app import DONE, command, say, tell
from rankfold.cli.inputs import unchanged
from rankfold.cli.named_paths import named_paths
from rankfold.cli.open import open_model
from rankfold.cli.opened_data import opened_data
from rankfold.cli.options import ModelArgument, Parts, Reading, Room
from rankfold.collect import merge_statistics as merged_statistics
from rankfold.collect import save_statistics
from rankfold.errors import visible
from rankfold.files.folder import owned_output
from rankfold.keywords import Options
from rankfold.machine.device import check_device
from rankfold.machine.offload import advice
from rankfold.machine.progress import TerminalProgress
from rankfold.model.sizes import model_parameters
from rankfold.settings import Settings
from rankfold.statistics.kept import KeptStatistics, check_new

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


@command
def statistics(model: ModelArgument, *, out: OutFolder, options: Collecting) -> int:
    """Collect statistics once, for runs of lossless and compact with --statistics.

    Settings are as for these runs, --limit and --seed too; a run with others is refused.
    """
    parts, room, settings = options.parts, options.room, options.settings
    parts.check()
    reads = named_paths(model, room.weights, *vars(parts).values())
    check_new(out, reads)
    with owned_output(out), redirect_stdout(sys.stderr):
        tell(f"opening {visible(model)}")
        given = unchanged(models=[model], weights=room.weights, data=vars(parts).values())
        device = check_device(options.reading.device)
        opened = open_model(model, room.weights)
        opened.model.to(device)
        if (hint := advice(model_parameters(opened.model), room.room(opened.model))) is not None:
            tell(hint)
        data, _ = opened_data(opened, parts, settings, options.reading)
        given.check_read()
        kept = save_statistics(
            opened.model,
            data,
            out,
            **cast(
                "Options",
                {"progress": TerminalProgress(), **room.of_large_tensors(), **vars(settings)},
            ),
        )
    _tell_of(kept, out)
    return DONE


@command
def merge_statistics(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER...", help="Statistics of parts of the data, two or more."),
    ],
    *,
    out: OutFolder,
) -> int:
    """Merge statistics of one model that machines have collected on parts of the data."""
    check_new(out, folders)
    with owned_output(out):
        kept = merged_statistics(folders, out)
    _tell_of(kept, out)
    return DONE


def _tell_of(kept: KeptStatistics, out: Path) -> None:
    say(f"statistics of {len(kept.layers)} layers from {len(kept.examples)} examples")
    say(f"saved: {visible(out)}")
