"""What a form is asked: to write one layer's matrix, under its curvature, at a cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

from rankfold.forms.storage import Storage
from rankfold.maths.linalg import Damping
from rankfold.maths.spectrum import Spectrum
from rankfold.model.layer_matrix import MatrixLayer
from rankfold.objective import Cost
from rankfold.statistics.layer_statistics import LayerStatistics


class Calls(NamedTuple):
    """How one example uses a layer.

    Attributes:
        rows: Outputs of one feature or channel, over all calls.
        image_sizes: Height and width of the input of every call of a conv.
    """

    rows: int
    image_sizes: tuple[tuple[int, int], ...] = ()


class Size(NamedTuple):
    """What a layer takes in a form, bias not counted.

    Attributes:
        parameters: Numbers that are stored.
        flops: Floating-point operations of one example, 2 a multiply-add.
    """

    parameters: int
    flops: int


@dataclass(frozen=True)
class LayerProblem:
    """One layer's matrix to be written in a form.

    Attributes:
        layer: The layer, of Linear or Conv2d.
        moved: Gives the weight, moved by the step.
        spectrum: Of the weight, under the damped Grams.
        changes: ``(r,)`` predicted change of the loss of the truncations to ranks 1..r.
        errors: ``(r,)`` their relative Frobenius errors, for the first-order rule; else None.
        statistics: Of the layer; None for an objective that needs none.
        damping: Of both Grams.
        storage: How products of two factors are stored.
        cost: What a curve counts.
        calls: Of one example.
        earlier: What the form itself kept of this layer in the round before, None where it did not.
    """

    layer: MatrixLayer
    moved: Callable[[], Tensor]
    spectrum: Spectrum
    changes: Tensor
    errors: Tensor | None
    statistics: LayerStatistics | None
    damping: Damping
    storage: Storage
    cost: Cost
    calls: Calls
    earlier: Any = None

    @cached_property
    def weight(self) -> Tensor:
        """The weight, ``(out, in)`` or ``(out, in * kh * kw)``, moved by the step."""
        return self.moved()

    @property
    def with_gradients(self) -> LayerStatistics:
        """The statistics, for forms that predict the loss.

        Raises:
            ValueError: There are none.
        """
        if self.statistics is None:
            raise ValueError("a form that predicts the loss needs statistics with gradients")
        return self.statistics

    @property
    def price(self) -> int:
        """Cost of a parameter that is multiplied once a row."""
        return 1 if self.cost == "parameters" else 2 * self.calls.rows
