"""A study of the product's, with the held-out part that a benchmark itself evaluates.

The product keeps that part sealed. A benchmark compares models that no certificate is made for, so
it holds the part beside the study.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from rankfold.data.parts import Part
from rankfold.machine.progress import Progress, SilentProgress
from rankfold.model.layer_matrix import MatrixLayer
from rankfold.model.unpack import Unpacked
from rankfold.search.study import Labels, Statistics, Study, open_inputs, study_of
from rankfold.settings import Settings
from rankfold.statistics.labels import Curvature
from rankfold.statistics.layer_statistics import LayerStatistics
from rankfold.statistics.trace import Trace
from rankfold.tasks.evaluation import Evaluation, evaluate
from rankfold.tasks.losses import Task


@dataclass
class Observed:
    """A study, all parts of the data, and the original's losses on them.

    Attributes:
        study: The product's.
        parts: Its own, and ``held_out``.
        original: Losses of the original by part, where they are known already.
    """

    study: Study
    parts: dict[str, Part]
    original: dict[str, Evaluation] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        """The user's model, unpacked."""
        return self.study.subject.model

    @property
    def unpacked(self) -> Unpacked:
        """The user's own model, and what was replaced in it."""
        return self.study.subject.unpacked

    @property
    def layers(self) -> Mapping[str, MatrixLayer]:
        """Layers to factorize."""
        return self.study.subject.layers

    @property
    def seen(self) -> Trace:
        """Calls and FLOPs of one example."""
        return self.study.subject.seen

    @property
    def task(self) -> Task:
        """Gives the loss."""
        return self.study.task

    @property
    def statistics(self) -> dict[str, LayerStatistics]:
        """By layer."""
        return self.study.statistics.layers

    @property
    def curvature(self) -> Curvature | None:
        """Where B came from."""
        return self.study.labels.curvature

    @property
    def calibration_loss(self) -> float | None:
        """Mean loss of some calibration examples."""
        return self.study.labels.calibration_loss

    def with_statistics(self, labels: Labels, statistics: Statistics) -> Observed:
        """The same with what another pass showed."""
        return replace(self, study=replace(self.study, labels=labels, statistics=statistics))

    def losses(
        self,
        model: nn.Module,
        part: str,
        shown: str,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> Evaluation:
        """Losses of a model on a part."""
        return evaluate(
            model,
            self.task,
            self.parts[part],
            batch_size=batch_size,
            progress=progress or SilentProgress(),
            stage=shown,
        )

    def original_losses(
        self, part: str, batch_size: int | None = None, progress: Progress | None = None
    ) -> Evaluation:
        """Losses of the user's model on a part, evaluated once."""
        if part not in self.original:
            shown = f"original on {part.replace('_', '-')} data"
            given = self.unpacked.given
            self.original[part] = self.losses(given, part, shown, batch_size, progress)
        return self.original[part]


def observe(
    model: nn.Module, data: object, settings: Settings, *, progress: Progress | None = None
) -> Observed:
    """Open a model and its data, and pass over the calibration part once."""
    inputs = open_inputs(model, data, settings)
    study = study_of(inputs, settings, progress=progress)
    return Observed(study, {**study.parts, "held_out": inputs.held_out})
