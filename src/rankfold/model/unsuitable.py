"""Refuses by name what factorizing would change silently: adapters, quantized weights."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from rankfold.errors import InputError, visible


def refuse_unsuitable(model: nn.Module) -> None:
    """Refuse models whose layers are not what they seem.

    Raises:
        InputError: As said; names the first such layer.
    """
    for name, module in model.named_modules():
        _refuse_unfinished(name, module)
        where = f"the layer {name or 'at the root'} ({type(module).__name__})"
        if hasattr(module, "lora_A") or (
            hasattr(module, "base_layer") and hasattr(module, "merge")
        ):
            raise InputError(
                f"{where} has an adapter beside its weight; expected a model without adapters. "
                "Merge them first, with peft: model = model.merge_and_unload()."
            )
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise InputError(
                f"{where} has no running statistics (track_running_stats=False): it normalises "
                "each batch by its own mean, and so what an example gives depends on the others in "
                "its batch. Nothing can be said of single examples then. Expected a model trained "
                "with running statistics, or with a norm of each example, such as GroupNorm."
            )
        if reason := _quantized(module):
            raise InputError(
                f"{where} is quantized: {reason}; expected weights in float32, bfloat16 or "
                "float16. Factorize the original model and quantize afterwards."
            )


def _refuse_unfinished(name: str, module: nn.Module) -> None:
    """Refuse a module without values of its own, or with a weight that is computed by a mask."""
    where = f"the layer {visible(name) or 'at the root'} ({type(module).__name__})"
    held = {**module._parameters, **module._buffers}
    if any(tensor is not None and is_lazy(tensor) for tensor in held.values()):
        raise InputError(
            f"{where} isn't initialized yet: torch makes its parameters in the first call. Run the "
            "model once on an example before."
        )
    lacking = [key for key, tensor in held.items() if tensor is not None and tensor.is_meta]
    if lacking:
        raise InputError(
            f"{where} has no values: its {', '.join(lacking)} lie on the device meta, as under "
            "init_empty_weights, or where accelerate has offloaded them. Load the model's weights "
            "into memory, without device_map=."
        )
    if any(
        type(hook).__module__ == "torch.nn.utils.prune"
        for hook in module._forward_pre_hooks.values()
    ):
        pruned = [key.removesuffix("_orig") for key in module._parameters if key.endswith("_orig")]
        raise InputError(
            f"{where} is pruned: its {', '.join(pruned)} is computed from a mask at each call. "
            "Make it permanent: "
            + "; ".join(f"torch.nn.utils.prune.remove(layer, {key!r})" for key in pruned)
            + "."
        )


def _quantized(module: nn.Module) -> str | None:
    if ".quantized" in type(module).__module__ and type(module).__module__.startswith("torch"):
        return f"it is a {type(module).__module__}.{type(module).__name__}"
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        kind = type(parameter.data)
        if kind is not Tensor:
            return f"its {name} is a {kind.__module__}.{kind.__name__}, no plain tensor"
        low = parameter.is_floating_point() and parameter.element_size() < 2
        whole = not parameter.is_floating_point() and not parameter.is_complex()
        if parameter.dim() > 1 and (low or whole):
            return f"its {name} is {parameter.dtype}"
    for name in ("qweight", "weight", "weight_packed"):
        held = module._buffers.get(name)
        if held is not None and not held.is_floating_point() and held.dim() > 1:
            return f"its {name} is {held.dtype}"
    return None
