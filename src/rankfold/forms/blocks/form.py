"""Blocks: the longer side of a matrix cut in two, each half with a rank of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor, nn

from rankfold.forms.blocks.curve import block_curve
from rankfold.forms.blocks.fit import BlockFactors, Cut, block_factors, block_form
from rankfold.forms.blocks.modules import (
    BLOCK_FORMS,
    BlockForm,
    BlocksConv2d,
    ColumnBlocksLinear,
    RowBlocksLinear,
    block_parameters,
    empty_blocks,
)
from rankfold.forms.curve import Choice, Curve
from rankfold.forms.problem import Calls, LayerProblem, Size
from rankfold.forms.storage import Storage
from rankfold.model.layer_matrix import MatrixLayer, matrix_shape
from rankfold.statistics.grams import damped_grams


@dataclass(frozen=True)
class HalvesOfLayer:
    """Both halves of a layer's matrix at their ranks.

    Attributes:
        halves: The factors, as they are kept.
    """

    halves: BlockFactors

    def dense(self, layer: MatrixLayer) -> Tensor:
        """The matrix that they make."""
        return self.halves.weight().to(layer.weight.device, layer.weight.dtype)

    def module(self, layer: MatrixLayer) -> RowBlocksLinear | ColumnBlocksLinear | BlocksConv2d:
        """The module that takes the layer's place."""
        return self.halves.module(layer)


class Blocks:
    """Two blocks of rows, or of columns; always pivoted."""

    names: tuple[str, ...] = BLOCK_FORMS
    storages: tuple[Storage, ...] = ("pivoted",)
    setting: str | None = "block_forms"

    def fits(self, layer: nn.Module) -> bool:
        """A Linear, or 1x1 conv, whose halves are still longer than wide."""
        return block_form(layer) is not None

    def curve(self, problem: LayerProblem) -> tuple[Curve, Cut]:
        """Pairs of ranks worth having, and how the layer is cut."""
        form = cast("BlockForm", block_form(problem.layer))
        earlier = cast("Cut | None", problem.earlier)
        return block_curve(
            problem.weight,
            problem.with_gradients,
            form,
            problem.damping,
            None if earlier is None else earlier.order,
            problem.price,
        )

    def kept(self, state: Cut, keep: Callable[[Tensor], Tensor]) -> Cut:
        """The cut with its directions as all layers' factors are kept."""
        return replace(state, directions=keep(state.directions))

    def factors(
        self, problem: LayerProblem, choice: Choice, state: Cut, keep: Callable[[Tensor], Tensor]
    ) -> HalvesOfLayer:
        """Both halves at the choice's ranks, each making up for the other's error."""
        grams = damped_grams(problem.with_gradients, problem.damping)
        return HalvesOfLayer(block_factors(problem.weight, *grams, state, choice.ranks).kept(keep))

    def size(
        self, layer: MatrixLayer, name: str, ranks: Sequence[int], storage: Storage, calls: Calls
    ) -> Size:
        """Parameters and FLOPs of both halves."""
        kept = block_parameters(*matrix_shape(layer), cast("BlockForm", name), ranks)
        return Size(kept, 2 * calls.rows * kept)

    def empty(
        self, layer: MatrixLayer, name: str, ranks: Sequence[int], pivoted: bool
    ) -> RowBlocksLinear | ColumnBlocksLinear | BlocksConv2d:
        """A module of the right shapes, in the layer's dtype and device.

        Raises:
            ValueError: The layer has no such ranks, or no blocks.
        """
        if len(ranks) != 2:
            raise ValueError(f"form {name} has two ranks, not {tuple(ranks)}")
        return empty_blocks(layer, cast("BlockForm", name), ranks)


BLOCKS = Blocks()
