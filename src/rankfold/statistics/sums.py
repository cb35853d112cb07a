"""Running sums of one layer while calibration data pass: what its statistics are the means of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rankfold.errors import InputError
from rankfold.machine.offload import Offload
from rankfold.maths.linalg import (
    UNDAMPED,
    Damping,
    add_gram,
    keep_below,
    kept_below,
    mirrored,
    rows_of_same_gram,
)
from rankfold.maths.shrinkage import damping_behind, damping_of_half
from rankfold.model.layer_matrix import (
    MatrixLayer,
    add_input_gram,
    input_squares,
    kept_dtype,
    matrix_shape,
    output_rows,
    weight_matrix,
)
from rankfold.statistics.layer_statistics import DominantRows, Whole


class Half(NamedTuple):
    """Sums of a layer over the first half of the examples.

    Of its Grams the diagonals; the rest is below the diagonals of the running ones
    (``linalg.keep_below``).
    """

    input_diagonal: Tensor
    output_diagonal: Tensor
    product_diagonal: Tensor
    rows: int


@dataclass
class Sums:
    """Running sums of one layer; ``leader`` names the layer whose input Gram it uses, if any.

    The Grams are added up on and above the diagonal (``linalg.add_gram``). Which of them are whole,
    and what the product is, says ``LayerStatistics``.
    """

    layer: MatrixLayer
    whole: Whole
    started: int
    leader: str | None
    input_gram: Tensor
    output_gram: Tensor
    product: Tensor
    gradients: tuple[Tensor, Tensor]
    rows: int = 0
    dominant: DominantRows | None = None
    first_half: Half | None = None
    lacking: Damping = UNDAMPED

    @classmethod
    def empty(
        cls,
        layer: MatrixLayer,
        whole: Whole,
        started: int,
        leader: str | None,
        *,
        backward: bool,
        gradients: bool,
        offload: Offload,
        device: torch.device,
    ) -> Sums:
        """Nothing yet.

        Args:
            layer: The layer.
            whole: Which of its Grams are kept whole.
            started: The number of the pass.
            leader: Whose input Gram it uses.
            backward: Whether gradients at its outputs will come.
            gradients: Whether those of its weight will.
            offload: Where the sums lie.
            device: Of the layer's inputs.
        """
        out, in_ = matrix_shape(layer)
        zeros = partial(offload.zeros, dtype=kept_dtype(layer.weight), device=device)
        side, back, moved = 0 if leader else in_, out if backward else 0, out if gradients else 0
        through = {"both": 0, "output": out, "input": in_ if backward else 0}[whole]
        return cls(
            layer,
            whole,
            started,
            leader,
            input_gram=zeros(side) if whole == "output" else zeros(side, side),
            output_gram=zeros(back) if whole == "input" else zeros(back, back),
            product=zeros(through, through),
            gradients=(zeros(moved, in_), zeros(moved, in_)),
        )

    def add_inputs(self, inputs: Tensor) -> None:
        """Count what the layer was called with."""
        if self.whole == "output":
            self.input_gram += input_squares(self.layer, inputs)
        else:
            add_input_gram(self.input_gram, self.layer, inputs)

    def add_outputs(self, outputs: Tensor) -> None:
        """Count what the layer gave, its bias taken off."""
        self.rows += outputs.numel() // matrix_shape(self.layer)[0]
        if self.whole == "output":
            rows, bias = output_rows(self.layer, outputs), self.layer.bias
            add_gram(self.product, rows if bias is None else rows - bias.detach().to(rows))

    def add_gradients(self, rows: Tensor) -> None:
        """Count gradients at its outputs, ``(rows, out)``."""
        if self.whole == "input":
            self.output_gram += rows.square().sum(0)
            add_gram(self.product, rows @ weight_matrix(self.layer).to(rows))
        else:
            add_gram(self.output_gram, rows)

    def add_dominant(self, inputs: Tensor, gradients: Tensor) -> None:
        """Count dominant rows: their inputs ``(few, in)`` and gradients ``(few, out)``."""
        rows, squares = inputs * gradients.norm(dim=1, keepdim=True), gradients.square().sum(0)
        if self.whole == "output":
            rows = rows @ weight_matrix(self.layer).to(rows).T
        if self.dominant is not None:
            rows = torch.cat([self.dominant.inputs, rows])
            squares += self.dominant.output_squares
        self.dominant = DominantRows(rows_of_same_gram(rows), squares)

    def keep_first_half(self) -> None:
        """What is added from now on belongs to the second half of the examples."""
        grams = self.input_gram, self.output_gram, self.product
        inputs, outputs, product = (
            gram.clone() if gram.dim() == 1 else keep_below(gram) for gram in grams
        )
        self.first_half = Half(inputs, outputs, product, self.rows)

    def what_lacks(self, leader: Sums | None) -> Damping:
        """Judge the Grams of the first half by those of the second."""
        first = self.first_half
        if first is None or not 0 < first.rows < self.rows:
            return self.lacking
        if leader is not None:
            inputs = leader.lacking.input
        elif self.whole == "output":
            inputs = self._behind(first.product_diagonal, first.input_diagonal)
        else:
            inputs = damping_of_half(first.input_diagonal, self.input_gram)
        if self.whole == "input":
            outputs = self._behind(first.product_diagonal, first.output_diagonal)
        else:
            outputs = damping_of_half(first.output_diagonal, self.output_gram)
        return Damping(inputs, outputs)

    def _behind(self, product_diagonal: Tensor, diagonal: Tensor) -> float:
        """What the Gram of the longer side lacks, by the product."""
        if not len(self.product):
            return 0.0
        weight = weight_matrix(self.layer).to(self.product)
        mixing = weight @ weight.T if self.whole == "output" else weight.T @ weight
        early = kept_below(self.product, product_diagonal)
        later = mirrored(self.product) - early
        return damping_behind(early, later, mixing, float(diagonal.mean()))

    def refuse_infinite(self, name: str) -> None:
        """Refuse sums that are not finite, of a layer of this name.

        Raises:
            InputError: As said.
        """
        dtype = self.layer.weight.dtype
        for what, gram in {
            "inputs": self.input_gram,
            "output gradients": self.output_gram,
            "outputs" if self.whole == "output" else "gradients of inputs": self.product,
        }.items():
            if not bool(torch.isfinite(gram).all()):
                wider = "float64" if dtype == torch.float32 else "float32"
                advice = "" if dtype == torch.float64 else f", or give the model in {wider}"
                raise InputError(
                    f"the squares of the {what} of the layer {name}, added up, are NaN or "
                    "infinite; expected finite ones. Its weight is "
                    f"{str(dtype).removeprefix('torch.')}: check the model's weights and the "
                    f"data{advice}."
                )

    def become_means(self, terms: Mapping[int | None, float]) -> None:
        """Divide each sum by what it is over; ``terms`` are numbers of the loss's, by half."""
        total, rows = sum(terms.values()), max(1, self.rows)
        of_product = rows if self.whole == "output" else total
        counts = (self.input_gram, rows), (self.output_gram, total), (self.product, of_product)
        for gram, count in counts:
            (gram if gram.dim() == 1 else gram.copy_(mirrored(gram))).div_(count)
        if self.dominant is not None:
            inputs, squares = self.dominant.inputs, self.dominant.output_squares
            self.dominant = DominantRows(inputs / math.sqrt(total), squares / total)
        for half, gradient in enumerate(self.gradients):
            gradient /= terms[half]
