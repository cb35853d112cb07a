"""How much a model changes when some of its weights do, on a few examples; and a search by it.

The authors measure on calibration examples. A net that has memorised them shows no change there,
and ranks that follow from it can destroy the net: on ResNet-56, KFAC-SVD + LEMS does better by
far with selection examples, which rankfold's own plans see too. ASVD doesn't. Both have a row for
each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from benchmarks.methods.low_rank import Spectra, build, curve
from benchmarks.methods.method import AtSize, Study
from rankfold.data.parts import Batch, Part
from rankfold.model.evaluation_mode import evaluation_mode
from rankfold.model.replace import with_replaced
from rankfold.search.allocate import RankPlan, total_cost
from rankfold.tasks.evaluation import evaluate, on_device
from rankfold.tasks.losses import BatchLoss, divergence

IMAGES = 128
SENTENCES = 32
WINDOWS = 4  # of a language model: hundreds of terms each


def few_examples(study: Study) -> int:
    """How many examples a layer alone is measured on."""
    if study.language:
        return WINDOWS
    return IMAGES if study.vision else SENTENCES


class Sensitivity:
    """Measures changes of weights against the original on one part, evaluated once."""

    def __init__(self, study: Study, part: Part) -> None:
        self.study, self.part = study, part
        collected = study.collected
        self.model, self.task = collected.model, collected.task
        self.batches: list[Batch] = [
            on_device(part.collate(examples), self.model) for examples in part.batches()
        ]
        with evaluation_mode(self.model):
            self.reference = [self._detached(batch) for batch in self.batches]

    @classmethod
    def on(cls, study: Study, part: Literal["calibration", "selection"]) -> Sensitivity:
        """On the first calibration examples, or on selection examples drawn by the seed."""
        found = study.collected.parts[part]
        places = torch.arange(len(found.examples))
        if part == "selection":
            generator = torch.Generator().manual_seed(study.seed)
            places = torch.randperm(len(found.examples), generator=generator)
        return cls(study, found.take(places[: few_examples(study)].tolist()))

    def _detached(self, batch: Batch) -> BatchLoss:
        return self.task.batch_loss(self.model, batch)

    def loss(self, weights: Mapping[str, Tensor]) -> float:
        """The mean loss with these weights ``(out, in)`` in place of the model's."""
        changed = with_replaced(self.model, {}, weights, share=True)
        return evaluate(changed, self.task, self.part, finite=False).mean

    def divergence(self, weights: Mapping[str, Tensor], temperature: float = 1.0) -> float:
        """The mean divergence of the predictions with these weights from the original's.

        Args:
            weights: ``(out, in)`` by layer.
            temperature: Of both predictions. Where the task shows no logits, the change of the
                loss takes the place of the divergence.
        """
        changed = with_replaced(self.model, {}, weights, share=True)
        total = terms = 0.0
        with evaluation_mode(changed):
            for batch, reference in zip(self.batches, self.reference, strict=True):
                found = self.task.batch_loss(changed, batch)
                terms += float(reference.terms.sum())
                if found.logits is None or reference.logits is None:
                    total += float(((found.losses - reference.losses) * reference.terms).sum())
                else:
                    scaled = found.logits / temperature, reference.logits / temperature
                    total += float(divergence(*scaled).sum())
        return total / terms


def threshold_search(
    study: Study, found: Spectra, sensitivity: Sensitivity, ratios: Sequence[float]
) -> AtSize:
    """Ranks by a threshold on the loss of each layer alone at each ratio (ASVD's STRS).

    Every layer is tried alone at every ratio. All pairs of layer and ratio whose loss is at most a
    threshold are allowed, each layer takes its lowest allowed ratio, and the threshold is the
    lowest that reaches the size. Factors are stored as a pair.

    Args:
        study: The model.
        found: Spectrum of each layer.
        sensitivity: Measures the loss.
        ratios: Shares of a layer's weights that its two factors may keep.
    """
    tried: list[tuple[float, str, int]] = []  # loss, layer, place of the rank
    curves = {
        name: curve(study, name, "pair", spectrum.truncation_changes()[1:])
        for name, spectrum in found.items()
    }
    for name, one in study.progress.track(curves.items(), "each layer alone", len(curves)):
        for ratio in ratios:
            place = max(0, int((one.costs <= ratio * one.dense_cost).sum()) - 1)
            if int(one.costs[place]) < one.dense_cost:
                loss = sensitivity.loss({name: found[name].truncated(place + 1)})
                tried.append((loss if loss == loss else float("inf"), name, place))
    tried.sort()

    def plan(budget: float) -> RankPlan:
        chosen = {name: one.choice(len(one.ranks)) for name, one in curves.items()}
        for _, name, place in tried:
            if total_cost(chosen) <= budget:
                return chosen
            here = curves[name].choice(place)
            if here.cost < chosen[name].cost:
                chosen[name] = here
        if total_cost(chosen) > budget:
            raise ValueError(f"the lowest ratio {min(ratios)} of every layer is above the budget")
        return chosen

    return lambda size: build(study, found, plan(size * study.factorizable), "pair")
