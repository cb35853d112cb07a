"""Conversations as token ids, with the assistant's turns as the labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from rankfold.errors import InputError

Message: TypeAlias = dict[str, Any]
# Messages, and whether the start of the assistant's next turn follows, to token ids.
Template: TypeAlias = Callable[[Sequence[Message], bool], list[int]]
NO_LABEL = -100  # the label that torch's cross-entropy leaves out


def conversation_tokens(messages: object, template: Template) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and labels that are the ids of what the assistant says.

    What belongs to a turn is what the chat template adds for it behind the words that start it,
    its end mark included.

    Args:
        messages: ``[{"role": ..., "content": ...}, ...]``.
        template: The tokenizer's chat template.

    Raises:
        InputError: The messages are of another form, the assistant says nothing, or the template
            rewrites earlier turns, so that turns can't be told apart.
    """
    checked = _checked(messages)
    ids = template(checked, False)
    labels = [NO_LABEL] * len(ids)
    for place, message in enumerate(checked):
        if message["role"] != "assistant":
            continue
        before, through = template(checked[:place], True), template(checked[: place + 1], False)
        if ids[: len(through)] != through or through[: len(before)] != before:
            raise InputError(
                "the tokenizer's chat template writes earlier turns otherwise once more follow, so "
                "the assistant's turns can't be told from the rest. Split the conversations so "
                "that each ends with the one turn to be learned from."
            )
        labels[len(before) : len(through)] = through[len(before) :]
    if all(label == NO_LABEL for label in labels):
        raise InputError("no message of a conversation has the role 'assistant'.")
    return ids, labels


def _checked(messages: object) -> list[Message]:
    good = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )
    if not good or not messages:
        raise InputError(
            f"messages is {str(messages)[:80]!r}; expected a list of "
            '{"role": "user" or "assistant", "content": "..."}.'
        )
    return list(messages)  # type: ignore[call-overload, no-any-return]
