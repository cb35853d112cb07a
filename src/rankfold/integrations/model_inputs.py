"""What a transformers model says of its inputs: names of its classes, tokens, padding."""

from __future__ import annotations

import inspect
from typing import Any, TypedDict

from torch import nn

from rankfold.data.tokens import Wording
from rankfold.integrations.padding_side import MASK, Side, harmless_side
from rankfold.integrations.transformers import sentences_of, task_hint
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
    wording: Wording | None


def known_inputs(model: nn.Module, tokenizer: Any) -> Known:
    """The inputs that a model's forward names, how texts are worded, how they are padded.

    Padding changes no output: a language model looks back alone, so behind its texts it does not.
    """
    forward = frozenset(inspect.signature(model.forward).parameters)
    takes = forward if "input_ids" in forward else None
    sentences = sentences_of(model)
    wording = None if sentences is None else sentences.wording()
    padding: Any = getattr(getattr(model, "config", None), "pad_token_id", None)
    own = getattr(tokenizer, "pad_token_id", None)
    hint = task_hint(model)
    # Some classifiers look for the last token before the padding, by its id.
    searched = hint in ("classification", "regression", MULTI_LABEL)
    pads = isinstance(own, int) and (not searched or padding == own)
    if not pads or (takes is not None and MASK not in takes):
        return {"takes": takes, "pads": pads, "side": None, "wording": wording}
    side: Side | None = "right" if hint == "causal-lm" else harmless_side(model, tokenizer, takes)
    return {"takes": takes, "pads": side is not None, "side": side, "wording": wording}
