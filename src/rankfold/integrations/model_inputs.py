"""What a transformers model says of its inputs: names of its classes, tokens, padding."""

from __future__ import annotations

import inspect
from typing import Any, TypedDict

from torch import nn

from rankfold.integrations.padding_side import MASK, Side, harmless_side
from rankfold.integrations.transformers import task_hint
from rankfold.tasks.recognise import MULTI_LABEL


def label_ids(model: nn.Module) -> dict[str, int] | None:
    """The model's number of each label; None where it names none, or two classes alike."""
    names: Any = getattr(getattr(model, "config", None), "id2label", None)
    found = {str(name): int(number) for number, name in (names or {}).items()}
    return found if found and len(found) == len(names) else None


class Known(TypedDict):
    """What of a tokenizer's inputs the model knows: arguments of ``Tokens``."""

    takes: frozenset[str] | None
    pads: bool
    side: Side | None


def known_inputs(model: nn.Module, tokenizer: Any) -> Known:
    """The inputs that a model's forward names, and how texts are padded so that no output changes.

    A language model looks back alone: padding behind its texts changes nothing.
    """
    forward = frozenset(inspect.signature(model.forward).parameters)
    takes = forward if "input_ids" in forward else None
    padding: Any = getattr(getattr(model, "config", None), "pad_token_id", None)
    own = getattr(tokenizer, "pad_token_id", None)
    hint = task_hint(model)
    # Some classifiers look for the last token before the padding, by its id.
    searched = hint in ("classification", "regression", MULTI_LABEL)
    pads = isinstance(own, int) and (not searched or padding == own)
    if not pads or (takes is not None and MASK not in takes):
        return {"takes": takes, "pads": pads, "side": None}
    side: Side | None = "right" if hint == "causal-lm" else harmless_side(model, tokenizer, takes)
    return {"takes": takes, "pads": side is not None, "side": side}
