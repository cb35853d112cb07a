"""From conversations to examples of which the assistant's turns are the labels."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rankfold.data.account import ReadExamples
from rankfold.data.input_settings import InputSettings
from rankfold.data.padding import NO_LABEL
from rankfold.data.reading import Reading
from rankfold.data.sources import Message, assistant_spans, check_written, checked_messages
from rankfold.data.text_examples import read_tokens
from rankfold.data.tokens import Tokens
from rankfold.errors import InputError

MESSAGES, TOOLS = "messages", "tools"
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")  # a template that marks the assistant's words


def conversation_examples(reading: Reading, tokens: Tokens) -> ReadExamples:
    """Token ids of conversations; labels are the ids of what the assistant says, -100 elsewhere.

    Where the template marks the assistant's words (``{% generation %}``) they are the labels, as
    in the training of transformers; else what the template adds for the assistant's turns.

    Raises:
        InputError: The tokenizer has no template, or it refuses a conversation, which is named.
    """
    if getattr(tokens.tokenizer, "chat_template", None) is None:
        raise InputError(
            f"{reading.file} holds conversations (messages), but the tokenizer has no chat "
            "template. Give plain text, or a model whose tokenizer has one."
        )
    reading.inputs = InputSettings(template=_digest(tokens.tokenizer.chat_template))
    messages = reading.values(MESSAGES)
    tools = reading.values(TOOLS) if TOOLS in reading else [None] * len(messages)
    found: dict[int, tuple[list[int], list[int]]] = {}
    seen: set[str] = set()
    for place in reading.places:
        try:
            checked = checked_messages(messages[place])
            chat = _Chat(tokens.tokenizer, tools[place] or None)
            found[place] = chat.labelled(checked)
            if not seen >= {message["role"] for message in checked}:
                check_written(checked, chat.text(checked, False), chat.text)
                seen |= {message["role"] for message in checked}
        except InputError as error:
            raise InputError(f"{reading.what(place)}: {error}") from error
    longest = tokens.length
    silent = [p for p, (_, labels) in found.items() if set(labels[1:longest]) <= {NO_LABEL}]
    if len(silent) == len(found):
        raise InputError(
            f"in {reading.file} the assistant says nothing within the first {longest} tokens of "
            "any conversation; allow more by length=."
        )
    reading.leave_out(f"where the assistant says nothing in the first {longest} tokens", silent)
    kept = [found[place] for place in reading.places]
    for place in reading.places:
        if len(found[place][0]) > longest:
            tokens.cuts(reading.what(place))
    examples = [_example(ids, labels, longest) for ids, labels in kept]
    return read_tokens(examples, reading, tokens, collate=tokens.behind())


def _example(ids: Sequence[int], labels: Sequence[int], longest: int) -> dict[str, Tensor]:
    cut = {"input_ids": ids[:longest], "labels": labels[:longest]}
    return {name: torch.tensor(values, dtype=torch.int64) for name, values in cut.items()}


def _digest(template: Any) -> str:
    """SHA-256 of a chat template, or of several by name."""
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class _Chat:
    """A tokenizer's chat template, with the tools that a conversation may call."""

    def __init__(self, tokenizer: Any, tools: Any) -> None:
        self.tokenizer, self.tools = tokenizer, tools

    def text(self, messages: Sequence[Message], start: bool) -> str:
        """What the template writes.

        Raises:
            InputError: It refuses the messages, or is broken.
        """
        return str(self._applied(messages, tokenize=False, add_generation_prompt=start))

    def labelled(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Ids of a conversation, and labels."""
        if self._marks():
            found = self._applied(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            spoken = [bool(mark) for mark in found["assistant_masks"]]
            if not any(spoken):
                raise InputError("the chat template marks none of it as the assistant's words.")
            ids = list(found["input_ids"])
        else:
            text, spans = assistant_spans(messages, self.text)
            ids, spoken = self._spoken(text, spans)
        return ids, [i if said else NO_LABEL for i, said in zip(ids, spoken, strict=True)]

    def _marks(self) -> bool:
        named = self.tokenizer.chat_template
        template = named.get("default") if isinstance(named, dict) else named
        return isinstance(template, str) and MARKED.search(template) is not None

    def _spoken(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """Ids of a text, and which of them hold a character of one of the spans."""
        if getattr(self.tokenizer, "is_fast", False):
            found = self._ids(text, return_offsets_mapping=True)
            return found["input_ids"], [
                any(first < end and start < last for start, end in spans)
                for first, last in found["offset_mapping"]
            ]
        ids = self._ids(text)["input_ids"]
        spoken = [False] * len(ids)
        for start, end in spans:  # such a tokenizer doesn't say where an id stands
            first, last = (self._ids(text[:place])["input_ids"] for place in (start, end))
            if ids[: len(last)] != last or last[: len(first)] != first:
                raise InputError(
                    "its tokenizer writes an answer otherwise behind its question than alone, so "
                    "their tokens can't be told apart; expected a fast one (tokenizer.json)."
                )
            spoken[len(first) : len(last)] = [True] * (len(last) - len(first))
        return ids, spoken

    def _ids(self, text: str, **more: Any) -> Any:
        # The template writes the special tokens itself.
        return self.tokenizer(text, add_special_tokens=False, verbose=False, **more)

    def _applied(self, messages: Sequence[Message], **more: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(list(messages), tools=self.tools, **more)
        # A template is a program: what it refuses, and what is wrong in it, it raises in any way.
        except Exception as error:
            roles = ", ".join(str(message["role"]) for message in messages)
            raise InputError(
                f"the tokenizer's chat template can't write its turns ({roles}): "
                f"{type(error).__name__}: {error}. Change or remove the conversation, or correct "
                "the template."
            ) from error
