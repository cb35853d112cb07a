"""Text classifiers of transformers whose logits stand at a text's last token.

They find it by the padding token that their configuration names. Without one, and with padding that
is another token, their logits would be those of padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from rankfold.errors import InputError


class _Joined(NamedTuple):
    """What the texts of a batch gave, one after the other: ``(n, classes)``."""

    logits: Tensor


def reads_last_token(model: nn.Module) -> bool:
    """Whether a model is such a classifier: its ``forward`` asks for the padding token."""
    return "ForSequenceClassification" in type(model).__name__ and any(
        "pad_token_id" in _names_in(base.__dict__["forward"])
        for base in type(model).__mro__
        if "forward" in base.__dict__
    )


def goes_alone(model: nn.Module) -> bool:
    """Whether a model is such a classifier, and has no padding token: a batch is one text."""
    return reads_last_token(model) and _padding(model) is None


def last_token_output(
    model: nn.Module, inputs: Mapping[str, Any], call: Callable[[Mapping[str, Any]], Any]
) -> Any:
    """What such a classifier gives for a batch, as it does for each text alone.

    Args:
        model: For which ``reads_last_token`` is true.
        inputs: By name, with ``input_ids`` ``(n, length)``, perhaps padded.
        call: Runs the model.

    Raises:
        InputError: The batch is padded with another token than the model's.
    """
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not torch.is_tensor(ids) or ids.dim() != 2:
        return call(inputs)
    kept = torch.ones_like(ids, dtype=torch.bool)
    if torch.is_tensor(mask) and mask.shape == ids.shape:
        kept = mask != 0
    padding = _padding(model)
    if padding is not None:
        others = ids[~kept & (ids != padding)]
        if len(others):
            raise InputError(
                f"the texts are padded with the token {int(others[0])}, and the model's config "
                f"says {padding} (pad_token_id): its logits would be those of padding. Set "
                f"pad_token_id of the config to {int(others[0])}, or of the tokenizer to {padding}."
            )
        return call(inputs)
    if len(ids) == 1 and bool(kept.all()):
        return call(inputs)
    rows = [call(_alone(inputs, ids, kept, place)) for place in range(len(ids))]
    return _Joined(torch.cat([getattr(row, "logits", row[0]) for row in rows]))


def _alone(inputs: Mapping[str, Any], ids: Tensor, kept: Tensor, place: int) -> dict[str, Any]:
    """The inputs of one text of a batch, without padding."""
    count = len(ids)

    def of_text(value: Any) -> Any:
        if not torch.is_tensor(value) or value.dim() == 0 or len(value) != count:
            return value
        own = value[place : place + 1]
        return own[:, kept[place]] if value.shape[:2] == ids.shape else own

    return {name: of_text(value) for name, value in inputs.items()}


def _padding(model: nn.Module) -> int | None:
    config: Any = cast("Any", model).config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return cast("int | None", getattr(config, "pad_token_id", None))


def _names_in(function: Any) -> tuple[str, ...]:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return () if code is None else code.co_names
