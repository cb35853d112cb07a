"""Collect statistics for a folder, with no search after it."""

from __future__ import annotations

from pathlib import Path

from rankfold.machine.offload import Offload
from rankfold.machine.progress import Progress
from rankfold.objective import OBJECTIVES
from rankfold.search.kept_statistics import kept_of
from rankfold.search.study import (
    Inputs,
    check_agreement,
    check_needed,
    collected,
    labels_for,
    require_layers,
    written_text,
)
from rankfold.settings import Settings
from rankfold.statistics.kept import KeptStatistics, check_new


def collect_into(
    folder: Path,
    inputs: Inputs,
    settings: Settings,
    *,
    progress: Progress | None = None,
    offload: Offload | None = None,
) -> KeptStatistics:
    """Pass over the calibration part once, and keep what it showed in a folder.

    Raises:
        InputError: Names the input, what was expected, and what to do.
    """
    subject, task, parts = inputs.subject, inputs.task, dict(inputs.parts)
    objective = OBJECTIVES[settings.objective]
    check_needed(objective, settings, folder)
    check_new(folder)
    parts |= written_text(subject.model, task, parts["calibration"], settings, progress)
    check_agreement(task, objective, settings)
    require_layers(subject)
    labels = labels_for(subject.model, task, parts["calibration"], objective, settings)
    found, recorder, _ = collected(
        subject, task, parts, labels, settings, offload or Offload(), progress
    )
    kept = kept_of(
        subject,
        task,
        parts["calibration"],
        settings,
        curvature=labels.curvature,
        calibration_loss=labels.calibration_loss or 0.0,
        layers=found,
        uses=recorder,
    )
    kept.save(folder)
    return kept
