"""From records to the examples of a task."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankfold.data.account import ReadExamples
from rankfold.data.conversation_examples import MESSAGES, conversation_examples
from rankfold.data.input_settings import InputSettings
from rankfold.data.padding import NO_LABEL
from rankfold.data.reading import Reading
from rankfold.data.sources import (
    ImageReader,
    Record,
    TableImages,
    numbers,
    read_records,
    read_registered,
    registered_source,
)
from rankfold.data.text_examples import read_tokens, text_examples, written
from rankfold.data.tokens import Tokens, Wording
from rankfold.errors import InputError

TEXT, LABEL, TARGET = "text", "label", "target"
TOKENS, TAGS, IMAGE = "tokens", "tags", "image"


def record_examples(
    file: Path,
    tokenizer: Any,
    length: int,
    *,
    task: str | None,
    columns: Mapping[str, str | None],
    label_ids: Mapping[str, int] | None = None,
    seed: int = 0,
    images: Callable[[], ImageReader] | None = None,
    takes: Collection[str] | None = None,
    pads: bool = True,
    side: str | None = None,
    wording: Wording | None = None,
    inputs: InputSettings | None = None,
) -> ReadExamples | TableImages:
    """The examples that a file of records gives for a task.

    With a tokenizer: for token classification tokens and tags; conversations where there is a
    column ``messages``; else the text, with its label or target where there is one, or where it is
    asked for. Without: columns of numbers, and a label. Where a column holds images, and none the
    text for a tokenizer, they are the input. Each record is an example, or the account says why.

    Args:
        file: A file or folder that ``read_records`` or a registered source of records reads.
        tokenizer: Of the model, or None.
        length: Most tokens of an example.
        task: The task, or None.
        columns: Names of ``text``, ``label``, ``target``, ``tokens`` and ``tags``, None for these.
        label_ids: The model's number of each label, or None.
        seed: Seeds the tokens that are hidden for masked-lm.
        images: Gives the function that reads images, where there are some.
        takes: As of ``Tokens``; likewise pads, side, wording.
        pads: As said.
        side: As said.
        wording: As said.
        inputs: What an artifact records: its columns and features, where none are named.

    Raises:
        InputError: Names what is missing, of the wrong type, or what the tokenizer lacks.
    """
    source = registered_source(file)
    records = read_registered(source, file) if source else read_records(file)
    reading = Reading(file, records, columns, label_ids, inputs=inputs)
    picture = None if tokenizer is not None and TEXT in reading else _image_column(records)
    if images is not None and picture is not None:
        return _image_examples(reading, picture, task, images())
    if tokenizer is None:
        return _table_examples(reading, task, None if inputs is None else inputs.features)
    tokens = Tokens(tokenizer, length, takes, pads=pads, side=side, wording=wording)
    if task == "token-classification":
        return _tagged(reading, tokens)
    if MESSAGES in records[0] and reading.columns.get(TEXT) is None:
        return conversation_examples(reading, tokens)
    if task == "masked-lm":
        return text_examples(reading, tokens, task, seed)
    if (kind := _answer(reading, task)) is not None:
        return _answered(reading, tokens, task, kind)
    alone = task in ("embedding", "teacher")
    return text_examples(reading, tokens) if alone else _windows(reading, tokens)


def _answer(reading: Reading, task: str | None) -> str | None:
    """What a model should say of each text: target or label; None where there are none to be."""
    tasks = {TARGET: ("seq2seq",), LABEL: ("classification", "regression")}
    for kind, own in tasks.items():
        asked = reading.columns.get(kind) is not None
        if task in own or (task is None and (asked or kind in reading)):
            return kind
    return None


def _answered(reading: Reading, tokens: Tokens, task: str | None, kind: str) -> ReadExamples:
    """Texts with a label or a target each; records without one are left out."""
    reading.texts(TEXT)
    values = reading.texts(kind) if kind == TARGET else reading.present(kind)
    inputs = written(reading, tokens)
    if kind == TARGET:
        answers = [tokens.target(values[p], reading.what(p)) for p in reading.places]
    else:
        answers = _labels(reading, [values[p] for p in reading.places], task)
    examples = [inputs[p] | {"labels": y} for p, y in zip(reading.places, answers, strict=True)]
    return read_tokens(examples, reading, tokens)


def _labels(reading: Reading, values: Sequence[Any], task: str | None) -> list[Tensor]:
    if task == "regression":
        found = numbers(reading.file, reading.name(LABEL), values, reading.places)
        return [torch.tensor(value) for value in found]
    classes = reading.classes(LABEL, values, 'For values use task="regression".')
    return [torch.tensor(number) for number in classes]


def _windows(reading: Reading, tokens: Tokens) -> ReadExamples:
    """Texts for a language model, which needs no padding: it is given them by their length."""
    inputs = written(reading, tokens)
    short = [place for place in reading.places if len(inputs[place]["input_ids"]) < 2]
    reading.leave_out("of a single token, which nothing comes before", short)
    windows = [inputs[place]["input_ids"] for place in reading.places]
    return ReadExamples(windows, reading.account([len(w) for w in windows], tokens))


def _tagged(reading: Reading, tokens: Tokens) -> ReadExamples:
    """Ids of the tokens; a token's tag labels its first id, the others and the padding have none.

    As in the training of such models: else a token would count as often as it has pieces.
    """
    file = reading.file
    if not getattr(tokens.tokenizer, "is_fast", False):
        raise InputError(
            f"{file} has tags for tokens, and this tokenizer doesn't say which token an id belongs "
            "to; expected a fast one (a folder with tokenizer.json). Or give the data as "
            "file.py:function, with input_ids and labels."
        )
    words, tags = _lists(reading, TOKENS), _lists(reading, TAGS)
    for place, (some, theirs) in enumerate(zip(words, tags, strict=True)):
        if len(some) != len(theirs):
            raise InputError(
                f"record {place} of {file} has {len(some)} {reading.name(TOKENS)} and "
                f"{len(theirs)} {reading.name(TAGS)}; expected one tag a token."
            )
    flat = [tag for row in tags for tag in row if tag != NO_LABEL]
    classes = iter(reading.classes(TAGS, flat, "The model's config names its labels."))
    examples: list[dict[str, Tensor]] = []
    untagged = 0
    for place, (row, theirs) in enumerate(zip(words, tags, strict=True)):
        numbers_here = [NO_LABEL if tag == NO_LABEL else next(classes) for tag in theirs]
        found = _words(reading, tokens, place, row)
        labels: list[int] = []
        previous = None
        for word in found.word_ids():
            first = word is not None and word != previous
            labels.append(numbers_here[word] if first else NO_LABEL)
            previous = word
        tagged = sum(label != NO_LABEL for label in labels)
        if not tagged:
            raise InputError(
                f"record {place} of {file} has no tagged token within {tokens.length} ids; allow "
                "more by length=, or remove it."
            )
        untagged += sum(tag != NO_LABEL for tag in theirs) - tagged
        examples.append(tokens.inputs(found) | {"labels": torch.tensor(labels)})
    notes = []
    if untagged:
        notes = [
            f"{untagged} of {len(flat)} tags are not used: their tokens are cut off, or the "
            "tokenizer writes nothing for them"
        ]
    return read_tokens(examples, reading, tokens, notes)


def _words(reading: Reading, tokens: Tokens, place: int, words: Sequence[Any]) -> Any:
    if not all(isinstance(word, str) for word in words):
        wrong = next(word for word in words if not isinstance(word, str))
        raise InputError(f"{reading.what(place)} holds the token {wrong!r}; expected texts.")
    try:
        return tokens.words(words, f"the tokens of {reading.what(place)}")
    except InputError as error:  # byte-level tokenizers want to put a space before each
        raise InputError(
            f"{error}. Save it with add_prefix_space=True, or give the data as file.py:function."
        ) from error


def _lists(reading: Reading, kind: str) -> list[list[Any]]:
    values = reading.values(kind)
    for place, value in enumerate(values):
        if not isinstance(value, list) or not value:
            raise InputError(
                f"the column {reading.name(kind)!r} of {reading.file} holds {str(value)[:60]!r} in "
                f"record {place}; expected a list with one item a token, as a .jsonl can hold."
            )
    return values


def _image_column(records: Sequence[Record]) -> str | None:
    """The first column of files in memory, as ``datasets`` keeps images, or None."""
    for name in records[0]:
        value = next((record[name] for record in records if record[name] is not None), None)
        if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
            return name
    return None


def _image_examples(
    reading: Reading, name: str, task: str | None, read: ImageReader
) -> TableImages:
    reading.columns[IMAGE] = name
    where = f"{reading.file}, column {name!r}"
    held = reading.present(IMAGE)
    for place in reading.places:
        if not isinstance(held[place].get("bytes"), bytes):
            raise InputError(
                f"record {place} of {where} holds no image, only the path "
                f"{held[place].get('path')!r}; expected the file's bytes. Save the images as a "
                "folder of class folders."
            )
    found: list[int] | None = None
    if task not in ("teacher", "embedding") or LABEL in reading:
        labels = reading.present(LABEL)
        advice = "The model's config names them."
        found = reading.classes(LABEL, [labels[place] for place in reading.places], advice)
    images = {place: held[place]["bytes"] for place in reading.places}
    reading.inputs = read.inputs
    return TableImages(images, found, read, where, reading.account())


def _table_examples(
    reading: Reading, task: str | None, features: Sequence[str] | None
) -> ReadExamples:
    """Rows of numbers, with a label each unless none are wanted.

    Args:
        reading: The records.
        task: The task, or None.
        features: Names of the columns of numbers in the model's order; None for all there are.
    """
    unlabelled = task == "teacher" and LABEL not in reading
    labels = [] if unlabelled else reading.present(LABEL)
    names = [name for name in reading.records[0] if name != reading.name(LABEL)]
    if features is not None:
        lacking = [name for name in features if name not in names]
        if lacking:
            raise InputError(
                f"{reading.file} has no column {lacking[0]!r}; the model was made with the columns "
                f"{', '.join(map(repr, features))}."
            )
        names = list(features)
    if not names:
        raise InputError(f"{reading.file} has no column but the label; expected some of numbers.")
    inputs = list(torch.tensor(reading.numbers(names), dtype=torch.float32).T)
    reading.inputs = InputSettings(features=tuple(names))
    if unlabelled:
        return ReadExamples(inputs, reading.account())
    found = _labels(reading, [labels[place] for place in reading.places], task)
    return ReadExamples(list(zip(inputs, found, strict=True)), reading.account())
