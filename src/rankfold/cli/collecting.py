"""What ``statistics`` and ``merge-statistics`` do."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import cast

from rankfold.cli.app import DONE, mention, say
from rankfold.cli.inputs import unchanged
from rankfold.cli.named_paths import named_paths
from rankfold.cli.open import open_model
from rankfold.cli.opened_data import opened_data
from rankfold.cli.statistics import Collecting
from rankfold.collect import merge_statistics as merged_statistics
from rankfold.collect import save_statistics
from rankfold.errors import visible
from rankfold.files.folder import owned_output
from rankfold.keywords import Options
from rankfold.machine.device import check_device
from rankfold.machine.offload import advice
from rankfold.machine.progress import TerminalProgress
from rankfold.machine.weights import in_files
from rankfold.model.sizes import model_parameters
from rankfold.statistics.kept import KeptStatistics, check_new


def collect(model: str, out: Path, options: Collecting) -> int:
    """Open model and data, and collect; the exit code."""
    parts, room, settings = options.parts, options.room, options.settings
    parts.check()
    reads = named_paths(model, room.weights, *vars(parts).values())
    check_new(out, reads)
    with owned_output(out), redirect_stdout(sys.stderr):
        mention(f"opening {visible(model)}")
        given = unchanged(models=[model], weights=room.weights, data=vars(parts).values())
        device = check_device(options.reading.device)
        opened = open_model(model, room.weights, offload=room.of_weights(model, device.type))
        opened.model.to(device)
        if (hint := advice(model_parameters(opened.model), room.room(opened.model))) is not None:
            mention(hint)
        data, _ = opened_data(opened, parts, settings, options.reading)
        given.check_read(whole=in_files(opened.model))
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


def merge(folders: Sequence[Path], out: Path) -> int:
    """Merge folders into one; the exit code."""
    check_new(out, folders)
    with owned_output(out):
        kept = merged_statistics(folders, out)
    _tell_of(kept, out)
    return DONE


def _tell_of(kept: KeptStatistics, out: Path) -> None:
    say(f"statistics of {len(kept.layers)} layers from {len(kept.examples)} examples")
    say(f"saved: {visible(out)}")
