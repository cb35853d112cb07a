"""What a transformers model says of its inputs: names of its classes, tokens, padding."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from rankfold.data.tokens import Tokens
from rankfold.integrations.transformers import task_hint


def label_ids(model: nn.Module) -> dict[str, int] | None:
    """The model's number of each label; None where it names none, or two classes alike."""
    names: Any = getattr(getattr(model, "config", None), "id2label", None)
    found = {str(name): int(number) for number, name in (names or {}).items()}
    return found if found and len(found) == len(names) else None


def tokens_of(model: nn.Module, tokenizer: Any, length: int) -> Tokens:
    """What the model's tokenizer makes of texts, with the inputs and the padding that it knows.

    Args:
        model: Of transformers.
        tokenizer: Its own.
        length: Most tokens of an example.
    """
    names = frozenset(inspect.signature(model.forward).parameters)
    takes = names if "input_ids" in names else None
    known: Any = getattr(getattr(model, "config", None), "pad_token_id", None)
    # Some classifiers look for the last token before the padding, by its id.
    searched = task_hint(model) in ("classification", "regression")
    pads = not searched or known == getattr(tokenizer, "pad_token_id", None)
    return Tokens(tokenizer, length, takes, pads=pads)
