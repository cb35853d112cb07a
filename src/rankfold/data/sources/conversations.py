"""Conversations as a chat template writes them, and where in that text the assistant speaks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from rankfold.errors import InputError

Message: TypeAlias = dict[str, Any]
# Messages, and whether the start of the assistant's next turn follows, to text.
Template: TypeAlias = Callable[[Sequence[Message], bool], str]
ASSISTANT = "assistant"


def checked_messages(messages: object) -> list[Message]:
    """Messages with a role, and with a text unless they call tools; without what is null in them.

    Raises:
        InputError: They are of another form, hold more than text, or the assistant says nothing.
    """
    good = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages
    )
    if not isinstance(messages, list) or not good or not messages:
        raise InputError(
            f"messages is {str(messages)[:80]!r}; expected a list of "
            '{"role": "user" or "assistant", "content": "..."}.'
        )
    for message in messages:
        _check_content(message)
    if all(message["role"] != ASSISTANT for message in messages):
        raise InputError(f"no message of a conversation has the role {ASSISTANT!r}.")
    # Tables have each key in every message, null where there is nothing.
    return [{k: v for k, v in m.items() if v is not None or k == "content"} for m in messages]


def _check_content(message: Message) -> None:
    content = message.get("content")
    if isinstance(content, str) or (content is None and message.get("tool_calls")):
        return
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        others = [str(part.get("type")) for part in content if part.get("type") != "text"]
        if content and not others:
            return
        if others:
            raise InputError(
                f"a message of {message['role']!r} holds a part of type {others[0]!r}; only texts "
                "are read from conversations. Give the data as file.py:function."
            )
    raise InputError(
        f"the content of a message of {message['role']!r} is {repr(content)[:60]}; expected a "
        "text, or a list of parts of type text."
    )


def assistant_spans(
    messages: Sequence[Message], template: Template
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and the first and last places of each of the assistant's turns.

    What belongs to a turn is what the chat template adds for it behind the words that start it,
    its end mark included.

    Args:
        messages: From ``checked_messages``.
        template: The tokenizer's chat template.

    Raises:
        InputError: The template refuses them, or writes turns so that they can't be told apart.
    """
    text = template(messages, False)
    if not text:
        raise InputError("the tokenizer's chat template writes nothing for it.")
    spans: list[tuple[int, int]] = []
    for place, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        before, through = template(messages[:place], True), template(messages[: place + 1], False)
        if not text.startswith(through):
            raise InputError(
                "the tokenizer's chat template writes earlier turns otherwise once more follow, so "
                "the assistant's turns can't be told from the rest. Split the conversations so "
                "that each ends with the one turn to be learned from."
            )
        if not through.startswith(before):
            raise InputError(
                "the tokenizer's chat template starts an answer (add_generation_prompt) with "
                f"{before[-40:]!r}, and doesn't write the assistant's turns so. Correct the "
                "template."
            )
        spans.append((len(before), len(through)))
    return text, spans


def check_written(messages: Sequence[Message], text: str, template: Template) -> None:
    """Refuse a template that writes the same whatever one of the messages says.

    Args:
        messages: One for each role.
        text: Theirs.
        template: The tokenizer's chat template.

    Raises:
        InputError: Names the role.
    """
    for place, message in enumerate(messages):
        content = message.get("content")
        if not isinstance(content, str) or not content.strip():
            continue
        other = [*messages]
        other[place] = message | {"content": f"{content.strip()} and more"}
        if template(other, False) == text:
            raise InputError(
                f"the tokenizer's chat template leaves out what {message['role']!r} says. Remove "
                "such messages, or correct the template."
            )
