"""What every method of the field is given, and what it gives back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn

from benchmarks.observed import Observed
from rankfold.data.parts import Part
from rankfold.files.tensors import model_sizes
from rankfold.machine.progress import Progress
from rankfold.model.layer_matrix import MatrixLayer, weight_matrix

Kind: TypeAlias = Literal["peer", "ours", "outside"]
Result = TypeVar("Result")


@dataclass
class Study:
    """A model, its data, and the statistics that one pass over the calibration part gave.

    Attributes:
        collected: Model, parts, Grams of inputs and output gradients, mean gradients.
        seed: Draws whatever a method draws.
        progress: Shows the stages.
        collect_without_step: Gives ``without_step``; None where ``collected`` is the same.
        passes: What ``once`` keeps, with the seconds that each took.
        saved_seconds: What was saved by keeping it.
    """

    collected: Observed
    seed: int
    progress: Progress
    collect_without_step: Callable[[], Observed] | None = None
    passes: dict[object, tuple[Any, float]] = field(default_factory=dict)
    saved_seconds: float = 0.0

    def once(self, key: object, gather: Callable[[], Result]) -> Result:
        """What ``gather`` gives, gathered once for all methods that ask by the same key."""
        if key in self.passes:
            kept, seconds = self.passes[key]
            self.saved_seconds += seconds
            return cast("Result", kept)
        start = time.perf_counter()
        found = gather()
        self.passes[key] = found, time.perf_counter() - start
        return found

    @cached_property
    def without_step(self) -> Observed:
        """The statistics that rankfold takes where no step is wanted (docs/theory.md, 3)."""
        if self.collect_without_step is None:
            return self.collected
        collected = self.collect_without_step()
        collected.original |= self.collected.original
        return collected

    @cached_property
    def layers(self) -> dict[str, MatrixLayer]:
        """The layers that are factorized, in the order of their calls."""
        layers = self.collected.layers
        return {name: layers[name] for name in self.collected.seen.rows if name in layers}

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Their weights as matrices ``(out, in)``."""
        return {name: weight_matrix(layer) for name, layer in self.layers.items()}

    @property
    def factorizable(self) -> int:
        """Number of weights in these layers: the whole of which a size is a share."""
        return sum(weight.numel() for weight in self.weights.values())

    @property
    def vision(self) -> bool:
        """Whether the authors' settings for vision models hold here."""
        return any(isinstance(layer, nn.Conv2d) for layer in self.layers.values())

    @property
    def language(self) -> bool:
        """Whether it is a causal language model."""
        return self.collected.task.name == "causal-lm"

    def input_gram(self, name: str) -> Tensor:
        """A of a layer, ``(in, in)`` float64, mean over rows."""
        return self.collected.statistics[name].input_gram.to(torch.float64)

    def calibration(self, count: int) -> Part:
        """The first calibration examples."""
        part = self.collected.parts["calibration"]
        return part.take(range(min(count, len(part.examples))))

    @cached_property
    def blocks(self) -> list[list[str]]:
        """The layers grouped by the innermost numbered module around them, in call order."""
        found: dict[str, list[str]] = {}
        for name in self.layers:
            parts = name.split(".")
            numbered = [place for place, part in enumerate(parts[:-1]) if part.isdigit()]
            block = ".".join(parts[: numbered[-1] + 1]) if numbered else name
            found.setdefault(block, []).append(name)
        return list(found.values())


@dataclass(frozen=True)
class Compressed:
    """A model that a method made.

    Attributes:
        model: Computes what the stored model computes.
        parameters: Values stored for the whole model, the zeros of a pruned one left out.
        bytes: Of the whole model's file.
    """

    model: nn.Module
    parameters: int
    bytes: int

    @classmethod
    def of(cls, model: nn.Module) -> Compressed:
        """A model that is stored as it is."""
        sizes = model_sizes(model)
        return cls(model, sizes["parameters"], sizes["bytes"])


# Makes a model that keeps this share of the factorizable weights.
AtSize: TypeAlias = Callable[[float], Compressed]


@dataclass(frozen=True)
class Method:
    """A way to make a model smaller.

    Attributes:
        label: How tables and figures call it.
        source: Where it was published.
        prepare: What it does once for all sizes; gives what makes the model of a size.
        kind: ``peer``, ``ours``, or ``outside`` low rank.
        sized: Whether there is a size to choose.
        needs_labels: Whether it uses the gradient of the loss at the labels, which is 0 where the
            loss is agreement with the original.
        models: ``vision`` for a method that is defined for convs only.
    """

    label: str
    source: str
    prepare: Callable[[Study], AtSize]
    kind: Kind = "peer"
    sized: bool = True
    needs_labels: bool = False
    models: Literal["all", "vision"] = "all"

    def fits(self, study: Study) -> bool:
        """Whether it can be run on a model."""
        if self.needs_labels and study.collected.task.agreement:
            return False
        return self.models == "all" or study.vision


Registry: TypeAlias = Mapping[str, Method]
