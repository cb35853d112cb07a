"""From plain text to examples: windows of tokens for a language model, a line each for others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankfold.data.account import Account, ReadExamples, spread_of
from rankfold.data.input_settings import InputSettings
from rankfold.data.padding import NO_LABEL, Padding
from rankfold.data.reading import Reading
from rankfold.data.sources import read_text, text_lines, token_windows
from rankfold.data.tokens import Tokens
from rankfold.errors import InputError

HIDDEN_SHARE = 0.15  # of the tokens, in masked language modelling (Devlin et al. 2019)


def hidden_words(windows: Sequence[Tensor], tokenizer: Any, seed: int) -> list[dict[str, Tensor]]:
    """Windows of which a share of the tokens is replaced by the mask token; these are the labels.

    Args:
        windows: ``(length,)`` token ids.
        tokenizer: Has a mask token.
        seed: Which tokens are hidden.

    Raises:
        InputError: The tokenizer has no mask token.
    """
    mask = getattr(tokenizer, "mask_token_id", None)
    if not isinstance(mask, int):
        raise InputError(
            "the task masked-lm needs a tokenizer with a mask token; this one has none. Give the "
            "data as file.py:function, with input_ids and labels, or name another task."
        )
    special = torch.tensor(sorted(tokenizer.all_special_ids))
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for window in windows:
        chances = torch.rand(len(window), generator=generator)
        chances[torch.isin(window, special)] = 2
        count = max(1, round(HIDDEN_SHARE * len(window)))
        hidden = chances.argsort()[:count]
        hidden = hidden[chances[hidden] <= 1]
        labels = torch.full_like(window, NO_LABEL)
        labels[hidden] = window[hidden]
        shown = window.clone()
        shown[hidden] = mask
        examples.append({"input_ids": shown, "labels": labels})
    return examples


def window_examples(file: Path, tokens: Tokens) -> ReadExamples:
    """Windows of tokens of a text file, one after the other, for a language model.

    Raises:
        InputError: The file can't be read.
    """
    length = tokens.length
    ids = tokens.stream(read_text(file), f"the text {file}")
    windows = token_windows(ids, length)
    rest = len(ids) - length * len(windows)
    notes = [f"the last {rest} tokens are left out: they are less than a window"] if rest else []
    if tokens.marks:
        notes.append(
            "windows are cut from the whole text: what the tokenizer writes around a single text "
            f"({tokens.marks}) is not in them"
        )
    lengths = spread_of([length] * len(windows))
    account = Account(
        str(file), "window", len(windows), len(windows), lengths=lengths, notes=notes,
        inputs=tokens.settings,
    )  # fmt: skip
    return ReadExamples(windows, account)


def line_examples(
    file: Path, tokens: Tokens, task: str | None = None, seed: int = 0
) -> ReadExamples:
    """A line of a text file is an example, with the special tokens of its own.

    Args:
        file: The text.
        tokens: Makes the model's inputs of a line.
        task: ``masked-lm`` hides words and makes them the labels.
        seed: Seeds which.

    Raises:
        InputError: The file can't be read, or no line says anything.
    """
    lines = [{"text": line} for line in text_lines(read_text(file))]
    return text_examples(Reading(file, lines, {}, None, unit="line"), tokens, task, seed)


def text_examples(
    reading: Reading, tokens: Tokens, task: str | None = None, seed: int = 0
) -> ReadExamples:
    """Texts without labels as the model's inputs by name; for ``masked-lm`` with hidden words."""
    inputs = written(reading, tokens)
    examples = [inputs[place] for place in reading.places]
    if task == "masked-lm":
        reading.inputs = InputSettings(seed=seed)
        hidden = hidden_words([e["input_ids"] for e in examples], tokens.tokenizer, seed)
        told = [bool((h["labels"] != NO_LABEL).any()) for h in hidden]
        silent = [p for p, good in zip(reading.places, told, strict=True) if not good]
        reading.leave_out("without a token that can be hidden", silent)
        examples = [e | h for e, h, good in zip(examples, hidden, told, strict=True) if good]
    return read_tokens(examples, reading, tokens)


def written(reading: Reading, tokens: Tokens) -> dict[int, dict[str, Tensor]]:
    """The model's inputs of each record's text; those that give no token are left out."""
    texts = reading.texts("text")
    found = {place: tokens.source(texts[place], reading.what(place)) for place in reading.places}
    silent = [place for place, inputs in found.items() if tokens.says_nothing(inputs)]
    reading.leave_out("of which the tokenizer writes nothing", silent)
    return found


def read_tokens(
    examples: Sequence[dict[str, Tensor]],
    reading: Reading,
    tokens: Tokens,
    notes: Sequence[str] = (),
    collate: Padding | None = None,
) -> ReadExamples:
    """Examples made of tokens, with their account, padded a batch at a time."""
    lengths = [len(example["input_ids"]) for example in examples]
    notes = notes if collate is not None else [*notes, *tokens.notes]
    account = reading.account(lengths, tokens, notes)
    return ReadExamples(examples, account, collate or tokens.collate)
