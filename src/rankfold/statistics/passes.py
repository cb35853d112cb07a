"""Which examples pass through a model for its statistics, in which order, and what becomes of them.

All that collects statistics goes by the same order: the halves of the user's examples one after the
other, then those of the prior.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import nn

from rankfold.data.parts import Batch, Part
from rankfold.machine import processes
from rankfold.machine.at_once import is_small, work_on
from rankfold.machine.offload import Offload
from rankfold.machine.progress import Progress
from rankfold.machine.shared_out import shared_out
from rankfold.maths.linalg import Damping
from rankfold.model.layer_matrix import MatrixLayer
from rankfold.statistics.embeddings import EmbeddingRecorder
from rankfold.statistics.hooks import Losses, Recorder
from rankfold.statistics.labels import Curvature, noise_directions
from rankfold.statistics.layer_statistics import LayerStatistics, Whole
from rankfold.statistics.sums import Sums
from rankfold.statistics.together import add_up, leave_to_first
from rankfold.tasks.evaluation import on_device
from rankfold.tasks.losses import TEXT, Task


@dataclass(frozen=True)
class Run:
    """One batch.

    Attributes:
        number: Its place among all.
        part: Where its examples are from.
        examples: They.
        half: Of the user's examples; None for those of the prior.
    """

    number: int
    part: Part
    examples: list[Any]
    half: int | None


@dataclass(frozen=True)
class Passes:
    """What statistics are collected of; the fields are as for ``recorder.collect_statistics``.

    Attributes:
        whole: By layer, which of its Grams are kept whole.
    """

    model: nn.Module
    task: Task
    part: Part
    prior: Part | None
    layers: Mapping[str, MatrixLayer]
    whole: Mapping[str, Whole]
    curvature: Curvature | None
    gradients: bool
    shrinkage: bool
    seed: int
    batch_size: int | None
    offload: Offload

    def runs(self) -> list[Run]:
        """All batches in their order."""
        found: list[Run] = []

        def add(part: Part, half: int | None) -> None:
            for examples in part.batches(self.batch_size):
                found.append(Run(len(found), part, examples, half))

        for half, places in enumerate(halves(self.task.name, len(self.part.examples))):
            add(self.part.take(places), half)
        if self.prior is not None:
            add(self.prior, None)
        return found

    def batch(self, run: Run) -> Batch:
        """What the model is called with."""
        return on_device(run.part.collate(run.examples), self.model)

    def losses(self) -> Losses:
        """Which losses the passes are gone back from, from the first one on."""
        directions = noise_directions(len(self.part.examples))
        return Losses(self.curvature, self.gradients, self.seed, directions)

    def recorder(
        self,
        layers: Mapping[str, MatrixLayer],
        embeddings: EmbeddingRecorder | None = None,
        offload: Offload | None = None,
    ) -> Recorder:
        """Hooks for some of the layers."""
        embeddings = EmbeddingRecorder({}) if embeddings is None else embeddings
        return Recorder(layers, self.losses(), embeddings, offload or self.offload, self.whole)

    def all_at_once(
        self,
        embeddings: EmbeddingRecorder,
        progress: Progress,
        layers: Mapping[str, MatrixLayer] | None = None,
        offload: Offload | None = None,
    ) -> dict[str, LayerStatistics]:
        """Statistics of all layers, or of some, from one pass over the examples.

        Args:
            embeddings: Sees the same passes.
            progress: Shows the batches.
            layers: All by default.
            offload: Where the sums lie, by default where all is kept.
        """
        layers = self.layers if layers is None else layers
        recorder = self.recorder(layers, embeddings, offload)

        def observe(run: Run) -> None:
            recorder.observe(self.model, self.task, self.batch(run), run.half)

        with recorder.attached(self.model):
            self.show(recorder, observe, self.runs(), progress)
        return recorder.statistics()

    def show(
        self,
        recorder: Recorder,
        observe: Callable[[Run], None],
        runs: Sequence[Run],
        progress: Progress,
    ) -> None:
        """Let a recorder see all batches, and compare the halves in between.

        Args:
            recorder: Its hooks are on.
            observe: A pass of one batch.
            runs: From ``runs``.
            progress: Shows the batches.

        Raises:
            InputError: What a layer sees is not finite.
        """
        of_user = [run for run in runs if run.half is not None]
        turns = processes.turns(of_user)
        first = sum(run is not None and run.half == 0 for run in turns)
        for place, run in enumerate(progress.track(turns, "collect statistics", len(turns))):
            if place == first and self.shrinkage:
                recorder.keep_first_half()
            _take_turn(recorder, observe, run)
        if first == len(turns) and self.shrinkage and processes.several():
            recorder.keep_first_half()  # the second half was for others
        add_up(recorder)
        recorder.refuse_infinite()
        if self.shrinkage:
            _compare_halves(recorder.sums, progress)
        if self.prior is not None:
            leave_to_first(recorder)
            written = processes.turns(runs[len(of_user) :])
            for run in progress.track(written, "own text's statistics", len(written)):
                _take_turn(recorder, observe, run)
            add_up(recorder)
            recorder.refuse_infinite()


def _take_turn(recorder: Recorder, observe: Callable[[Run], None], run: Run | None) -> None:
    """A pass of a batch, or of none while other processes have the last ones."""
    if run is None:
        recorder.losses.skip_turn()
    else:
        observe(run)


def _compare_halves(of_layers: Mapping[str, Sums], progress: Progress) -> None:
    """Judge the Grams of the first half by those of the second.

    The damping found is kept as it is, although all examples together lack less than a half of
    them: halved it is worse (docs/theory.md, 1).
    """

    def compare(sums: Sums) -> Damping:
        return sums.what_lacks(of_layers.get(sums.leader or ""))

    # Those that others take an input Gram from come first.
    layers = sorted(of_layers.values(), key=lambda sums: sums.leader is not None)
    alone = sum(sums.leader is None for sums in layers)
    stage = "halves of the data compared"
    done = chain.from_iterable(
        shared_out(
            some,
            compare,
            small=lambda sums: is_small(sums.layer.weight),
            cost=lambda sums: work_on(sums.layer.weight),
            what=stage,
        )
        for some in (layers[:alone], layers[alone:])
    )
    shown = progress.track(done, stage, len(layers))
    for sums, lacking in zip(layers, shown, strict=True):
        sums.lacking, sums.first_half = lacking, None


def halves(task: str, count: int) -> tuple[range, range]:
    """Places of two halves of the examples, the second one no smaller.

    Neighbouring windows of text are of one document, so its halves are the first and the second.
    Images are often listed class by class: there, and in all other data, every other one.
    """
    if task in TEXT:
        return range(count // 2), range(count // 2, count)
    return range(1, count, 2), range(0, count, 2)
