"""What a factorized layer answers when a model asks for its ``weight``.

Many models do, mostly for the dtype: multiplying the factors out each time would cost more than the
layer saves. So the answer knows its shape, dtype and device, and multiplies only when it is
computed with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

# What is known without the product.
_KNOWN = frozenset(
    {
        Tensor.dtype.__get__,  # type: ignore[attr-defined]
        Tensor.device.__get__,
        Tensor.shape.__get__,  # type: ignore[attr-defined]
        Tensor.ndim.__get__,  # type: ignore[attr-defined]
        Tensor.layout.__get__,  # type: ignore[attr-defined]
        Tensor.is_cuda.__get__,  # type: ignore[attr-defined]
        Tensor.size,
        Tensor.dim,
        Tensor.numel,
        Tensor.is_floating_point,
        Tensor.element_size,
    }
)


class FactoredWeight(Tensor):
    """A weight by its factors; every computation with it uses their product, differentiably."""

    product: Callable[[], Tensor]

    @staticmethod
    def of(product: Callable[[], Tensor], shape: Sequence[int], like: Tensor) -> Tensor:
        """The weight of this shape that ``product`` gives, in the dtype and device of ``like``."""
        if torch.compiler.is_compiling():
            return product()
        made: Any = Tensor._make_wrapper_subclass(
            FactoredWeight, torch.Size(shape), dtype=like.dtype, device=like.device
        )
        made.product = product
        weight: Tensor = made
        return weight

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run a torch function, on the product unless it asks for what is known without."""
        given: dict[str, Any] = dict(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            if func in _KNOWN:
                return func(*args, **given)
            return func(*tree_map(_multiplied, tuple(args)), **tree_map(_multiplied, given))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """The same for what reaches the weight below ``__torch_function__``."""
        given = tree_map(_multiplied, dict(kwargs or {}))
        return func(*tree_map(_multiplied, tuple(args)), **given)


def _multiplied(value: Any) -> Any:
    return value.product() if isinstance(value, FactoredWeight) else value
