"""Statistics that a folder keeps, as those of a study: written once, read by other runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankfold.data.parts import Part
from rankfold.errors import InputError, visible
from rankfold.files.digests import model_digest
from rankfold.machine.offload import Offload
from rankfold.search.subject import Subject
from rankfold.settings import Settings
from rankfold.statistics.embeddings import EmbeddingRecorder
from rankfold.statistics.kept import KeptStatistics, read_kept
from rankfold.statistics.labels import Curvature
from rankfold.statistics.layer_statistics import LayerStatistics
from rankfold.tasks.losses import Task


def kept_of(
    subject: Subject,
    task: Task,
    calibration: Part,
    settings: Settings,
    *,
    curvature: Curvature | None = None,
    calibration_loss: float = 0.0,
    layers: Mapping[str, LayerStatistics] | None = None,
    uses: EmbeddingRecorder | None = None,
) -> KeptStatistics:
    """Statistics with all that they are of."""
    asked: dict[str, Any] = {
        "task": task.name,
        "layers": sorted(subject.layers),
        "embeddings": sorted(subject.embeddings),
    }
    for name in (
        *("objective", "curvature", "gradient_step", "shrinkage", "smaller_side"),
        *("seed", "self_share"),
    ):
        asked[name] = getattr(settings, name)
    return KeptStatistics(
        model_digest(subject.unpacked.given),
        list(calibration.digests),
        asked,
        curvature,
        calibration_loss,
        1.0 if uses is None else uses.terms,
        dict(layers or {}),
        {} if uses is None else uses.tensors(),
    )


def read_for(
    folder: Path,
    subject: Subject,
    task: Task,
    calibration: Part,
    settings: Settings,
    offload: Offload,
) -> tuple[KeptStatistics, dict[str, LayerStatistics], EmbeddingRecorder]:
    """The statistics in a folder, which are of this model and data.

    Raises:
        InputError: They are of others, or damaged.
    """
    kept = read_kept(folder)
    kept.check_of(folder, kept_of(subject, task, calibration, settings))
    kept.check_examples(folder, calibration.digests)
    recorder = EmbeddingRecorder(subject.embeddings)
    try:
        recorder.fill(kept.uses, kept.terms)
    except KeyError as error:
        raise InputError(
            f"{visible(folder)} is damaged: {visible(error.args[0])} is missing, or of another "
            "shape. Collect the statistics again."
        ) from error
    return kept, kept.checked(folder, subject.layers, offload), recorder
