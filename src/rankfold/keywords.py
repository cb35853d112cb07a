"""The keywords that ``lossless``, ``compact`` and ``prepare`` share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import nn

from rankfold.errors import check_flag, of_another_kind, path_of
from rankfold.machine.device import device_of
from rankfold.machine.offload import Offload, check_offload, memory_of, names_of, with_room
from rankfold.machine.processes import is_first
from rankfold.machine.progress import Progress, TrimmingProgress, shown_progress
from rankfold.machine.timing import Watch
from rankfold.machine.weights import in_files, move_to_files
from rankfold.settings import SettingKeywords, Settings
from rankfold.tasks.evaluation import Metric, check_functions
from rankfold.tasks.supervised import LossFunction


class Options(SettingKeywords, total=False):
    """Keywords that ``lossless``, ``compact`` and ``prepare`` share, beside those of ``Settings``.

    Attributes:
        loss: ``loss(model, batch)`` giving one loss per example, where it isn't recognised.
        metrics: Certified beside the loss; those with a margin must hold too.
        guard: Examples of other kinds than the data, on which the change of the loss is measured
            too, or certified (``guard_margin``). By default text that a language model writes.
        progress: True shows stage and time left, in a notebook as in a terminal; or an object such
            as ``rankfold.TerminalProgress()``. By default nothing is shown.
        offload_folder: Statistics, steps and spectra of all layers lie in files of this folder
            (``rankfold.machine.offload``), not in memory; the model must be on the CPU.
        timing: Whether the run measures its stages, and the speed of original and result (20
            seconds at most). What it measures is in no file that repeats byte for byte.
        memory: How much the run may take, such as ``"8GB"``: where the statistics of all layers
            are too much, they are collected block by block, or in groups of layers, and lie in
            files. By default what the machine has.
        model_offload: The model's weights lie in files, too, of ``offload_folder``: they are moved
            there, with the same values, and stay there. Copies of the model share what they don't
            change, the result too. By itself where ``memory`` has no room for them.
        blocks: Names of the model's blocks, or of the lists that hold them, where they aren't
            found; statistics are then collected block by block in any case.
        statistics: A folder that ``save_statistics`` wrote of the same model and data, in place of
            a pass over the calibration part.
    """

    loss: LossFunction | None
    metrics: Sequence[Metric]
    guard: object
    progress: Progress | bool | None
    offload_folder: str | Path | None
    timing: bool
    memory: str | int | None
    model_offload: bool
    blocks: Sequence[str]
    statistics: str | Path | None


class Asked(NamedTuple):
    """The keywords of a run, read; fields as of ``Options``."""

    settings: Settings
    loss: LossFunction | None
    metrics: tuple[Metric, ...]
    guard: object
    progress: Watch
    offload: Offload
    statistics: Path | None


def read_options(options: Options, model: nn.Module) -> Asked:
    """Settings and what is none of them, of the keywords of a call.

    Args:
        options: As given.
        model: The user's.

    Raises:
        InputError: A setting is out of its range, or this model can't be offloaded.
        TypeError: There is no such keyword.
    """
    settings, device = dict(options), device_of(model)
    known = [*Options.__annotations__]  # those of SettingKeywords among them
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise TypeError(f"there is no keyword {unknown[0]}; expected some of {', '.join(known)}")
    loss, metrics = settings.pop("loss", None), settings.pop("metrics", ())
    guard = settings.pop("guard", None)
    progress, folder = settings.pop("progress", None), settings.pop("offload_folder", None)
    timing = settings.pop("timing", True)
    check_flag("timing", timing)
    weights = settings.pop("model_offload", False)
    check_flag("model_offload", weights)
    memory, blocks = settings.pop("memory", None), settings.pop("blocks", ())
    kept = settings.pop("statistics", None)
    check_functions(loss, metrics)
    if progress is not None and not isinstance(progress, bool) and not hasattr(progress, "track"):
        expected = "True, or an object such as rankfold.TerminalProgress()"
        raise of_another_kind("progress", progress, expected)
    offload = Offload(
        None if folder is None else path_of("offload_folder", folder),
        blocks=names_of(blocks),
        weights=bool(weights) or in_files(model),
    )
    check_offload(offload, device)
    asked = cast("Progress | bool | None", progress) if is_first() else None
    shown = TrimmingProgress(shown_progress(asked))
    offload = with_room(offload, None if memory is None else memory_of(memory), model)
    if offload.weights:
        move_to_files(model, offload)
    return Asked(
        Settings(**cast("Any", settings)),
        cast("LossFunction | None", loss),
        tuple(cast("Sequence[Metric]", metrics)),
        guard,
        Watch(shown, bool(timing)),
        offload,
        None if kept is None else path_of("statistics", kept),
    )
