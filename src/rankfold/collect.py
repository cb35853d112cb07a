"""Statistics alone, for runs to come: collected into a folder, and merged from several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn
from typing_extensions import Unpack

from rankfold.errors import InputError, path_of
from rankfold.held_out import enough_held_out
from rankfold.keywords import Options, read_options
from rankfold.machine.weights import as_in_file
from rankfold.model.kept import KeptModel
from rankfold.search.collect import collect_into
from rankfold.search.study import open_inputs
from rankfold.statistics.kept import KeptStatistics, merged, read_kept


def save_statistics(
    model: nn.Module, data: object, folder: str | Path, **options: Unpack[Options]
) -> KeptStatistics:
    """Collect statistics once, for runs with ``statistics=folder``, on this machine or others.

    Those of parts of the data are merged by ``merge_statistics``. Arguments and errors as of
    ``lossless``.
    """
    settings, loss, metrics, _, progress, offload, read = read_options(options, model)
    if read is not None:
        raise InputError("statistics is given, but they are collected here; leave it out.")
    with KeptModel(model, offload.kept, as_in_file).as_it_was():
        data = enough_held_out(data, settings, metrics, None)
        inputs = open_inputs(model, data, settings, loss=loss, metrics=metrics)
        target = path_of("the folder", folder)
        return collect_into(target, inputs, settings, progress=progress, offload=offload)


def merge_statistics(folders: Sequence[str | Path], folder: str | Path) -> KeptStatistics:
    """Merge statistics of parts of the data, which machines of their own may have collected.

    Raises:
        InputError: They are of different models or settings, or have an example in common.
    """
    paths = [path_of("a folder of statistics", one) for one in folders]
    if len(set(paths)) < max(2, len(paths)):
        raise InputError(f"{len(set(paths))} folders are to be merged; expected 2 or more.")
    together = merged({one: read_kept(one) for one in paths})
    together.save(path_of("the folder", folder), paths)
    return together
