"""What calibration data showed of one layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from rankfold.maths.linalg import (
    UNDAMPED,
    Damping,
    trace,
)

# Which of a layer's two Grams are kept whole; the other is known by its diagonal, and by what it is
# behind the weight (``LayerStatistics.product``).
Whole: TypeAlias = Literal["both", "input", "output"]


@dataclass(frozen=True)
class DominantRows:
    """What the rows that dominate a layer's gradient (``dominant_rows``) are of its statistics.

    They are few, so what has their Gram is kept in place of it.

    Attributes:
        inputs: ``(few, in)``; ``inputs^T inputs`` is 1/N sum over these rows of ``|g|^2 x x^T``.
            Where the Gram of outputs alone is whole, ``(few, out)``, the same of ``W x``.
        output_squares: ``(out,)``, 1/N sum over these rows of ``g^2``.
    """

    inputs: Tensor
    output_squares: Tensor


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one layer's matrix ``(out, in)``, in float32, or float64 for a float64 model.

    Attributes:
        input_gram: A, ``(in, in)``; the same tensor for layers that share their input. ``(in,)``,
            its diagonal, where the smaller side is that of the outputs and the only one kept.
        output_gram: B, ``(out, out)``, of all rows but dominant ones, or ``(out,)`` likewise; None
            when no backward pass was asked for.
        gradients: Mean gradients ``(out, in)`` of the two halves, None when not asked for.
        shares_input_with: Name of the layer whose input Gram this is, or None.
        dominant: Of the rows that dominate the gradient; None where none do.
        lacking: What both Grams lack along their small eigenvalues (``shrinkage``), by what half of
            the examples lack; 0 where only one half reached the layer.
        product: Where one Gram is known by its diagonal: ``W A W^T``, ``(out, out)``, the Gram of
            the layer's own outputs without bias, or ``W^T B W``, ``(in, in)``, that of what it
            gives back to its inputs. With the other Gram it decides the best weight of any rank.
        rows: Number of rows that the Gram of inputs is the mean of.
        terms: Of the loss, in the user's first half, the second, and the prior.
    """

    input_gram: Tensor
    output_gram: Tensor | None
    gradients: tuple[Tensor, Tensor] | None
    shares_input_with: str | None
    dominant: DominantRows | None = None
    lacking: Damping = UNDAMPED
    product: Tensor | None = None
    rows: int = 0
    terms: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def gradient(self) -> Tensor:
        """Mean gradient over all examples, ``(out, in)``."""
        if self.gradients is None:
            raise ValueError("these statistics were collected without gradients")
        return (self.gradients[0] + self.gradients[1]) / 2

    @property
    def whole(self) -> Whole:
        """Of which side the Gram is whole."""
        if self.product is None:
            return "both"
        return "input" if self.input_gram.dim() == 2 else "output"

    @property
    def is_silent(self) -> bool:
        """Whether the data gave this layer no input, or no gradient."""
        grams = [self.input_gram] + ([] if self.output_gram is None else [self.output_gram])
        return any(float(trace(gram)) == 0 for gram in grams)
