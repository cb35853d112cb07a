"""On which side texts are padded so that a model gives for each what it gives without padding."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from rankfold.integrations.lengths import most_tokens
from rankfold.model.evaluation_mode import evaluation_mode

Side: TypeAlias = Literal["left", "right"]

SIDES: tuple[Side, ...] = ("right", "left")
MASK = "attention_mask"
PROBE = "the first of these words"
ADDED = 8  # tokens of padding that a text is tried with
ROUNDING, ROUNDING_HALF = 1e-4, 5e-2  # differences, relative to the largest output, that are none


def harmless_side(model: nn.Module, tokenizer: Any, takes: Collection[str] | None) -> Side | None:
    """The side on which padding changes no output: the tokenizer's own if it is one.

    Models that count positions from the first token, or read a text's class there, are moved by
    padding on the left; those that read it at the last one, by padding on the right. One short text
    is tried. Where the model can't run on it alone (it needs images, say), the tokenizer's side
    is believed.

    Args:
        model: Of transformers.
        tokenizer: Its own, with a padding token.
        takes: Names of the inputs that the model takes, None for any.

    Returns:
        The side, or None where padding changes the outputs on either.
    """
    own: Side = tokenizer.padding_side
    encoded = tokenizer(PROBE, verbose=False)
    inputs = {name: [ids] for name, ids in encoded.items() if takes is None or name in takes}
    longest = len(inputs["input_ids"][0]) + ADDED
    if longest > (most_tokens(model) or longest):
        return own
    try:
        alone = _outputs(model, {name: torch.tensor(ids) for name, ids in inputs.items()})
    except Exception:  # a user's model raises what it likes
        return own
    for side in sorted(SIDES, key=lambda side: side != own):
        padded = tokenizer.pad(
            inputs, padding="max_length", max_length=longest, padding_side=side,
            return_attention_mask=True, return_tensors="pt", verbose=False,
        )  # fmt: skip
        mask = padded[MASK]
        if all(map(_same, alone, (_shown(o, mask) for o in _outputs(model, dict(padded))))):
            return side
    return None


def _outputs(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """``(1, ...)`` each: logits, hidden states, those of an encoder."""
    device = next(model.parameters()).device
    given = {name: ids.to(device) for name, ids in inputs.items()}
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = given["input_ids"].new_ones(1, 2)
    with evaluation_mode(model):
        output = model(**given, return_dict=True)
    return [one for one in output.values() if torch.is_tensor(one) and one.is_floating_point()]


def _shown(output: Tensor, mask: Tensor) -> Tensor:
    """What of an output is of tokens that aren't padding; all, where it isn't of each token."""
    each = output.dim() == 3 and output.shape[:2] == mask.shape
    return output[mask.to(output.device) != 0][None] if each else output


def _same(alone: Tensor, padded: Tensor) -> bool:
    rounding = ROUNDING_HALF if alone.dtype in (torch.bfloat16, torch.float16) else ROUNDING
    within = rounding * float(alone.abs().max())
    known = alone.shape == padded.shape and math.isfinite(within)  # else the loss is refused
    return known and torch.allclose(alone, padded, rtol=0, atol=within)
