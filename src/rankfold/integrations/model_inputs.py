"""What a transformers model says of its inputs: names of its classes, tokens, padding."""

from __future__ import annotations

import inspect
from typing import Any, TypedDict

from torch import nn

from rankfold.data.tokens import Wording
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
    wording: Wording | None


def known_inputs(model: nn.Module, tokenizer: Any) -> Known:
    """The inputs that a model's forward names, whether padding is its own, how texts are worded."""
    names = frozenset(inspect.signature(model.forward).parameters)
    padding: Any = getattr(getattr(model, "config", None), "pad_token_id", None)
    # Some classifiers look for the last token before the padding, by its id.
    searched = task_hint(model) in ("classification", "regression", MULTI_LABEL)
    pads = not searched or padding == getattr(tokenizer, "pad_token_id", None)
    sentences = sentences_of(model)
    wording = None if sentences is None else sentences.wording()
    takes = names if "input_ids" in names else None
    return {"takes": takes, "pads": pads, "wording": wording}
