"""Conv forms: a conv as two along one axis each, or as a Tucker-2 of three."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from rankfold.forms.conv.curve import conv_curve
from rankfold.forms.conv.fit import SpatialFactors, TuckerFactors, conv_factors
from rankfold.forms.conv.modules import (
    CONV_FORMS,
    ConvForm,
    SpatialConv2d,
    TuckerConv2d,
    conv_factor_flops,
    conv_factor_parameters,
    empty_conv,
)
from rankfold.forms.curve import Choice, Curve
from rankfold.forms.problem import Calls, LayerProblem, Size
from rankfold.forms.storage import STORAGES, Storage
from rankfold.model.layer_matrix import MatrixLayer, weight_matrix
from rankfold.statistics.grams import damped_grams


@dataclass(frozen=True)
class FactorsOfConv:
    """The factors of a conv in one of the forms.

    Attributes:
        factors: Spatial or Tucker-2.
    """

    factors: SpatialFactors | TuckerFactors

    def dense(self, layer: MatrixLayer) -> Tensor:
        """The matrix that they make, ``(out, in * kh * kw)``, rounded as the module's factors."""
        return weight_matrix(self.module(layer).to_dense())

    def module(self, layer: MatrixLayer) -> SpatialConv2d | TuckerConv2d:
        """The module that takes the layer's place."""
        return self.factors.module(cast("nn.Conv2d", layer))


class ConvForms:
    """Vertical, horizontal and Tucker-2 convs."""

    names: tuple[str, ...] = CONV_FORMS
    storages: tuple[Storage, ...] = STORAGES
    setting: str | None = "conv_forms"

    def fits(self, layer: nn.Module) -> bool:
        """A conv with more than one tap."""
        return isinstance(layer, nn.Conv2d) and layer.weight[0, 0].numel() > 1

    def curve(self, problem: LayerProblem) -> tuple[Curve, None]:
        """All choices of the three that no other one beats."""
        curve = conv_curve(
            cast("nn.Conv2d", problem.layer),
            problem.weight,
            problem.with_gradients,
            problem.spectrum,
            problem.damping,
            problem.storage,
            problem.cost,
            problem.calls,
        )
        return curve, None

    def kept(self, state: None, keep: Callable[[Tensor], Tensor]) -> None:
        """Nothing: factors are found from the weight and the Grams."""

    def factors(
        self, problem: LayerProblem, choice: Choice, state: Any, keep: Callable[[Tensor], Tensor]
    ) -> FactorsOfConv:
        """The best factors found of the choice's form and ranks."""
        found = conv_factors(
            problem.weight.view_as(problem.layer.weight),
            *damped_grams(problem.with_gradients, problem.damping),
            cast("ConvForm", choice.form),
            choice.ranks,
            pivot=problem.storage == "pivoted",
        )
        return FactorsOfConv(found)

    def size(
        self, layer: MatrixLayer, name: str, ranks: Sequence[int], storage: Storage, calls: Calls
    ) -> Size:
        """Parameters of the factors, and FLOPs of the convs that run."""
        conv, form, pivoted = cast("nn.Conv2d", layer), cast("ConvForm", name), storage == "pivoted"
        shape = tuple(layer.weight.shape)
        of_each = (
            conv_factor_flops(conv, form, tuple(ranks), *size, pivoted)
            for size in calls.image_sizes
        )
        parameters = conv_factor_parameters(shape, form, tuple(ranks), pivoted)
        return Size(parameters, sum(of_each))

    def empty(
        self, layer: MatrixLayer, name: str, ranks: Sequence[int], pivoted: bool
    ) -> SpatialConv2d | TuckerConv2d:
        """A module of the right shapes, in the layer's dtype and device.

        Raises:
            ValueError: The layer has no such ranks, or is no conv.
        """
        several = name == "tucker"
        if not isinstance(layer, nn.Conv2d) or len(ranks) != (2 if several else 1):
            raise ValueError(f"form {name} with ranks {tuple(ranks)} does not suit a {type(layer)}")
        return empty_conv(layer, cast("ConvForm", name), tuple(ranks), pivoted)


CONV = ConvForms()
