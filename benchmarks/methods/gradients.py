"""Passes over calibration data that gather gradients beyond rankfold's own statistics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import torch
from torch import Tensor, nn

from benchmarks.methods.method import Study
from rankfold.data.parts import Part
from rankfold.model.evaluation_mode import evaluation_mode
from rankfold.model.layer_matrix import MatrixLayer, output_rows
from rankfold.statistics.labels import noise_directions, sampled_losses
from rankfold.tasks.evaluation import on_device
from rankfold.tasks.losses import BatchLoss, Task

GROUP = 16  # examples whose mean gradient counts as one sample, as in the published code
FEWEST_SAMPLES = 64


@dataclass(frozen=True)
class Gradients:
    """Where gradients come from.

    Attributes:
        sampled: Labels drawn from the model's predictions in place of the data's.
        seed: Draws them.
    """

    sampled: bool
    seed: int

    @classmethod
    def of(cls, study: Study) -> Gradients:
        """The labels that the study's own statistics use."""
        return cls(study.collected.curvature == "sampled", study.seed)

    def passes(
        self,
        model: nn.Module,
        task: Task,
        part: Part,
        weights: Sequence[Tensor],
        batch_size: int | None = None,
        directions: int = 1,
    ) -> Iterator[tuple[tuple[Tensor | None, ...], float]]:
        """Gradients of the summed loss of each batch, and the batch's number of terms.

        Of several directions of noise those of the last one are given; hooks see all.
        """
        generator = torch.Generator().manual_seed(self.seed)
        with evaluation_mode(model, trainable=weights):
            for examples in part.batches(batch_size):
                batch = on_device(part.collate(examples), model)
                result = task.batch_loss(model, batch)
                *others, last = self._losses(result, generator, directions)
                for loss in others:
                    torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True)
                found = torch.autograd.grad(last, weights, allow_unused=True)
                yield found, float(result.terms.sum())

    def _losses(
        self, result: BatchLoss, generator: torch.Generator, directions: int
    ) -> list[Tensor]:
        if self.sampled:
            return sampled_losses(result, generator, directions)
        return [(result.losses * result.terms).sum()]


def mean_gradients(
    model: nn.Module, task: Task, part: Part, names: Sequence[str]
) -> dict[str, Tensor]:
    """Gradient of the mean loss at the labels, ``(out, in)`` by layer, float64."""
    weights = [cast("Tensor", model.get_submodule(name).weight) for name in names]
    sums = [torch.zeros_like(w.flatten(1), dtype=torch.float64) for w in weights]
    total = 0.0
    labels = Gradients(sampled=False, seed=0)
    for found, terms in labels.passes(model, task, part, weights):
        total += terms
        for one, gradient in zip(sums, found, strict=True):
            if gradient is not None:
                one += gradient.flatten(1)
    return {name: one / total for name, one in zip(names, sums, strict=True)}


def weight_gradients(study: Study) -> Iterator[tuple[str, Tensor]]:
    """For each layer, samples of its mean gradient over ``GROUP`` examples, ``(k, out, in)``.

    One pass over the examples. The samples of all layers together may not fit into memory (a
    language model's are 27 GB), so they lie in mapped files until the last layer is taken.
    """
    part = study.collected.parts["calibration"]
    group = min(GROUP, max(1, len(part.examples) // FEWEST_SAMPLES))
    samples = -(-len(part.examples) // group)
    weights = [study.layers[name].weight for name in study.weights]
    with TemporaryDirectory(prefix="rankfold-gradients-") as folder:
        kept = {
            name: _mapped(Path(folder) / str(place), (samples, *weight.shape))
            for place, (name, weight) in enumerate(study.weights.items())
        }
        passes = Gradients.of(study).passes(
            study.collected.model, study.collected.task, part, weights, group
        )
        tracked = study.progress.track(passes, "gradients of weights", samples)
        for sample, (found, terms) in enumerate(tracked):
            for of_layer, gradient in zip(kept.values(), found, strict=True):
                if gradient is not None:
                    of_layer[sample] = gradient.flatten(1).float() / terms
        for name in [*kept]:
            yield name, kept.pop(name).to(study.weights[name].device)


def _mapped(file: Path, shape: tuple[int, ...]) -> Tensor:
    """Zeros of a shape in a file, float32."""
    return torch.from_file(str(file), shared=True, size=prod(shape)).view(shape)


def clipped_output_grams(study: Study, source: Gradients) -> dict[str, Tensor]:
    """B from gradients whose norms are clipped, ``(out, out)`` float64 by layer, up to a scale.

    Within each example, every position's gradient norm is brought into 0.1 to 10 times the mean
    norm; of sequences the first and last eighth are left out before that. Both as in the code of
    KFAC-SVD.
    """
    grams = {
        name: torch.zeros(len(w), len(w), dtype=torch.float64, device=w.device)
        for name, w in study.weights.items()
    }

    def saw_gradient(name: str, layer: MatrixLayer, gradient: Tensor) -> None:
        rows = output_rows(layer, gradient)
        flat = gradient.dim() == 2  # (n, out): the examples are the positions
        by_example = rows.view(1 if flat else len(gradient), -1, rows.shape[-1])
        if study.language and not flat:
            ends = by_example.shape[1] // 8
            by_example = by_example[:, ends : by_example.shape[1] - ends]
        clipped = clip_norms(by_example).flatten(0, 1)
        grams[name] += (clipped.T @ clipped).double()

    def saw_call(name: str, layer: nn.Module, args: object, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(saw_gradient, name, study.layers[name]))

    with ExitStack() as stack:
        for name, layer in study.layers.items():
            stack.callback(layer.register_forward_hook(partial(saw_call, name)).remove)
        weights = [layer.weight for layer in study.layers.values()]
        part = study.collected.parts["calibration"]
        collected = study.collected
        # As many directions as rankfold's own statistics have.
        directions = noise_directions(len(part.examples))
        passes = source.passes(
            collected.model, collected.task, part, weights, directions=directions
        )
        batches = len(part.batches())
        for _ in study.progress.track(passes, "clipped output gradients", batches):
            pass
    return grams


def clip_norms(gradients: Tensor, lowest: float = 0.1, highest: float = 10.0) -> Tensor:
    """Bring norms into ``[lowest, highest]`` times the mean norm of their example.

    Args:
        gradients: ``(n, positions, out)``; positions of norm 0 stay and do not count for the mean.
        lowest: Smaller norms are raised to this.
        highest: Larger ones are lowered to this.
    """
    norms = gradients.norm(dim=2, keepdim=True)
    alive = norms > 1e-10
    count = alive.sum(dim=1, keepdim=True).clamp(min=1)
    mean = (norms * alive).sum(dim=1, keepdim=True) / count
    wanted = norms.clamp(min=lowest * mean, max=highest * mean)
    return gradients * torch.where(alive, wanted / norms.clamp(min=1e-10), 1.0)
