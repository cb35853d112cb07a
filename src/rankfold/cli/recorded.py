"""Options for data in place of what isn't given: as the artifact records that its own was read."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from rankfold.artifact.manifest import read_manifest
from rankfold.artifact.recorded import check_read_alike, recorded_inputs
from rankfold.cli.data_options import DataOptions
from rankfold.cli.told import check_classes
from rankfold.data.input_settings import InputSettings, refuse_other, settings_line
from rankfold.errors import InputError, visible
from rankfold.tasks.losses import TASKS

AGREEMENT = ("teacher", "embedding")  # tasks that compare with the original


def as_recorded(folder: Path, options: DataOptions, *, original: bool = False) -> DataOptions:
    """Options with what an artifact records where they say nothing.

    Args:
        folder: The artifact.
        options: As given.
        original: Whether the original is at hand, which tasks of agreement compare with.

    Raises:
        InputError: An option contradicts what is recorded.
    """
    recorded = recorded_inputs(folder)
    asked = InputSettings(
        mean=None if options.mean is None else tuple(options.mean),
        std=None if options.std is None else tuple(options.std),
        image_size=options.image_size,
        length=options.length,
    )
    refuse_other(recorded, asked, folder)
    if recorded.decided():
        line = f"data is read as the model's own was: {settings_line(recorded)}"
        print(visible(line), file=sys.stderr)
    found = recorded.with_others(asked)
    return replace(
        options,
        mean=found.mean,
        std=found.std,
        image_size=found.image_size or _side(recorded),
        length=found.length,
        seed=options.seed if recorded.seed is None else recorded.seed,
        task=_task(folder, options.task, original),
        recorded=recorded,
        asked=options.given(),
    )


def check_read(folder: Path, examples: object) -> None:
    """Refuse examples that were read otherwise than an artifact's own, or with other classes.

    Raises:
        InputError: Says what differs.
    """
    check_classes(folder, examples)
    check_read_alike(folder, examples)


def _side(recorded: InputSettings) -> int | None:
    """The side of images of an array, for those of a folder."""
    if recorded.prepared_by != "rankfold" or recorded.shape is None:
        return None
    *_, height, width = recorded.shape
    return height if height == width else None


def _task(folder: Path, asked: str | None, original: bool) -> str | None:
    """The task that was asked for, or recorded where it can be computed here."""
    recorded = read_manifest(folder).get("task")
    if recorded not in TASKS or (recorded in AGREEMENT and not original):
        return asked  # a loss of the user's own, or an artifact of an earlier version
    if asked not in (None, recorded):
        raise InputError(
            f"task= is {asked}, and the model in {visible(folder)} was made for {recorded} "
            "(rankfold.json, task). Leave task= out: what is recorded is used then. To compute it "
            "otherwise on purpose, open it in Python: rankfold.load(folder)."
        )
    return str(recorded)
