"""Layers of transformers that hold their matrices in a way of their own, as plain Linear layers.

They are recognised by what they offer, not by the architecture that they belong to.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rankfold.model.of_user import bare_copy
from rankfold.model.unpacked_modules import UnpackedExperts, linear


def unpack_transformers_layer(module: nn.Module) -> nn.Module | None:
    """The same module made of Linear layers, or None where it is no such module."""
    if _is_transposed_linear(module):
        held: Any = module
        return linear(held.weight.T, held.bias).train(module.training)
    if _holds_packed_experts(module):
        return _unpacked_experts(module)
    return None


def _is_transposed_linear(module: nn.Module) -> bool:
    """``transformers.pytorch_utils.Conv1D``: a Linear whose weight is stored as ``(in, out)``."""
    held: Any = module
    return (
        type(module).__name__ == "Conv1D"
        and type(module).__module__.startswith("transformers.")
        and tuple(held.weight.shape) == (held.nx, held.nf)
    )


def _holds_packed_experts(module: nn.Module) -> bool:
    """What ``transformers.integrations.moe.use_experts_implementation`` makes of a class."""
    names = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "num_experts")
    if not all(hasattr(module, name) for name in names):
        return False
    held: Any = module
    own = module._parameters
    weights = [own.get("gate_up_proj" if held.has_gate else "up_proj"), own.get("down_proj")]
    return all(weight is not None and weight.dim() == 3 for weight in weights)


class _Gate(nn.Module):
    """What a packed experts module does between its two matrices, without its matrices."""

    def __init__(self, rule: nn.Module) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, values: Tensor) -> Tensor:
        rule: Any = self.rule
        gated: Tensor = rule._apply_gate(values) if rule.has_gate else rule.act_fn(values)
        return gated


def _unpacked_experts(module: nn.Module) -> UnpackedExperts:
    held: Any = module
    first = "gate_up_proj" if held.has_gate else "up_proj"
    packed = (first, "down_proj", f"{first}_bias", "down_proj_bias")

    def layers(name: str) -> list[nn.Linear]:
        weights = getattr(held, name)
        biases = getattr(held, f"{name}_bias") if held.has_bias else [None] * held.num_experts
        return [
            linear(weight.T if held.is_transposed else weight, bias).train(module.training)
            for weight, bias in zip(weights, biases, strict=True)
        ]

    weights = [p for name in packed if (p := module._parameters.get(name)) is not None]
    # The module's own gate, activation and norm are kept; its packed weights are not copied.
    rule: Any = bare_copy(module, {id(weight): weight for weight in weights})
    for name in packed:
        rule._parameters.pop(name, None)
    after = held.post_expert_norm if held.has_post_expert_norm else nn.Identity()
    unpacked = UnpackedExperts(layers(first), layers("down_proj"), _Gate(rule), after)
    if held.has_post_expert_norm:
        del rule.post_expert_norm
    return unpacked.train(module.training)
