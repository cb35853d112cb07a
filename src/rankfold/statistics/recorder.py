"""Run calibration data through a model under hooks: the statistics of every layer.

For a loss that is the mean over N terms (tokens, images), and a layer ``y = W x``:

- ``input_gram`` A = mean over rows of ``x x^T``,
- ``output_gram`` B = 1/N sum over rows of ``g g^T``, g the gradient of the summed loss at y,
- ``gradients`` of the mean loss, one of each half of the examples (``halves``),

so that ``1/2 tr(B Delta A Delta^T)`` is the K-FAC model of the mean loss (a conv's positions are
counted once: in B), but for rows that dominate the gradient, which are counted apart
(``dominant_rows``). The hooks are in ``hooks``; what they call is in ``rankfold.maths`` and
``layer_matrix``. Where memory is too small for the sums of all layers, they are collected
block by block (``by_block``), or in several passes.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from rankfold.data.parts import Part
from rankfold.machine.offload import Offload
from rankfold.machine.progress import Progress, SilentProgress
from rankfold.model.find_layers import LARGEST_SIDE
from rankfold.model.layer_matrix import MatrixLayer, matrix_shape
from rankfold.statistics.by_block import in_parts
from rankfold.statistics.embeddings import EmbeddingRecorder
from rankfold.statistics.labels import Curvature
from rankfold.statistics.layer_statistics import LayerStatistics, Whole
from rankfold.statistics.passes import Passes
from rankfold.tasks.losses import Task

# No Gram has more numbers than the model has parameters, so many times.
LARGEST_GRAM = 8


def collect_statistics(
    model: nn.Module,
    task: Task,
    part: Part,
    layers: Mapping[str, MatrixLayer],
    *,
    curvature: Curvature | None,
    gradients: bool = True,
    shrinkage: bool = True,
    smaller_side: bool = False,
    seed: int = 0,
    prior: Part | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
    embeddings: EmbeddingRecorder | None = None,
    offload: Offload | None = None,
    cut_at: list[str] | None = None,
) -> dict[str, LayerStatistics]:
    """One pass over the calibration examples; the model comes back as it was.

    Args:
        model: The model, whose weights are only read.
        task: Gives the loss.
        part: Calibration examples.
        layers: The layers of ``model`` to watch, by name.
        curvature: Where B comes from; None collects A alone, without a backward pass.
        gradients: Whether the mean gradients are collected beside B. Without them the backward
            pass leaves out the weights, which is half of its work.
        shrinkage: Whether the halves' Grams are compared, for which those of one are kept apart
            until the pass is over.
        smaller_side: Keep whole Grams of the smaller side of each layer alone.
        seed: Seeds the sampled labels.
        prior: Examples of what the model meets elsewhere (its own text): they count for A and B
            like the others, and not for the gradients, which are those of the user's task.
        batch_size: Examples a batch; the statistics do not depend on it.
        progress: Shows the batches.
        embeddings: Sees the same passes.
        offload: Where the sums lie, and how much memory they may take.
        cut_at: Gets the names of the blocks that were collected one by one, where they were.

    Raises:
        InputError: The loss, or what a layer sees, is not finite.
    """
    progress = progress or SilentProgress()
    embeddings, offload = embeddings or EmbeddingRecorder({}), offload or Offload()
    largest = LARGEST_GRAM * sum(weight.numel() for weight in model.parameters())
    whole = {name: whole_grams(layer, smaller_side, largest) for name, layer in layers.items()}
    passes = Passes(
        model, task, part, prior, layers, whole, curvature=curvature, gradients=gradients,
        shrinkage=shrinkage, seed=seed, batch_size=batch_size, offload=offload,
    )  # fmt: skip
    if offload.memory is None:
        return passes.all_at_once(embeddings, progress)
    return in_parts(passes, embeddings, progress, [] if cut_at is None else cut_at)


def whole_grams(layer: MatrixLayer, smaller_side: bool, largest: int) -> Whole:
    """Which Grams of a layer are kept whole.

    Args:
        layer: The layer.
        smaller_side: Whether that of the smaller side is enough.
        largest: Numbers that a Gram may have at most.
    """
    out, in_ = matrix_shape(layer)
    too_long = max(out, in_) > LARGEST_SIDE or max(out, in_) ** 2 > largest
    if out == in_ or not (smaller_side or too_long):
        return "both"
    return "output" if out < in_ else "input"
