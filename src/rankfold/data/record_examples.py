"""From records and windows of text to the examples of a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from rankfold.data.sources import (
    ImageReader,
    Record,
    TableImages,
    class_names,
    column,
    conversation_tokens,
    numbers,
    read_records,
    read_registered,
    registered_source,
)
from rankfold.errors import InputError

HIDDEN_SHARE = 0.15  # of the tokens, in masked language modelling (Devlin et al. 2019)
NO_LABEL = -100
TEXT, LABEL, TARGET, MESSAGES = "text", "label", "target", "messages"
TOKENS, TAGS = "tokens", "tags"


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


def record_examples(
    file: Path,
    tokenizer: Any,
    length: int,
    *,
    task: str | None,
    columns: dict[str, str | None],
    label_ids: dict[str, int] | None = None,
    seed: int = 0,
    images: Callable[[], ImageReader] | None = None,
) -> Sequence[Any]:
    """The examples that a file of records gives for a task.

    With a tokenizer: for token classification the columns of tokens and tags; conversations where
    there is a column ``messages``; else the text column, with its label or target where there is
    one, or where it is asked for. Without: the columns of numbers are the input, and the label
    column the label. Where a column holds images, and none the text of a model with a tokenizer,
    they are the input.

    Args:
        file: A file or folder that ``read_records`` or a registered source of records reads.
        tokenizer: Of the model, or None.
        length: Most tokens of an example.
        task: The task, or None.
        columns: Names of the columns ``text``, ``label``, ``target``, ``tokens`` and ``tags``, None
            for these names.
        label_ids: The model's number of each label, or None.
        seed: Seeds the tokens that are hidden for masked-lm.
        images: Gives the function that reads images, where there are some.

    Raises:
        InputError: A column is missing, a label of the wrong type, or the tokenizer lacks what the
            task needs.
    """
    source = registered_source(file)
    records = read_registered(source, file) if source else read_records(file)
    texts_here = tokenizer is not None and (columns["text"] or TEXT) in records[0]
    if images is not None and not texts_here and (picture := _image_column(records)) is not None:
        classes = columns["label"] or LABEL
        return _image_examples(file, records, picture, classes, task, label_ids, images())
    if tokenizer is None:
        return _table_examples(file, records, columns["label"] or LABEL, task)
    if task == "token-classification":
        names = (columns["tokens"] or TOKENS, columns["tags"] or TAGS)
        return cast("list[Any]", _tagged(file, records, tokenizer, length, names, label_ids))
    if MESSAGES in records[0] and columns["text"] is None:
        return _conversations(file, records, tokenizer, length)
    name = columns["text"] or TEXT
    texts = [str(value) for value in column(file, records, name, "text_column=")]
    encoded = [_ids(tokenizer, text, length) for text in texts]
    if task == "masked-lm":
        return cast("list[Any]", hidden_words(encoded, tokenizer, seed))
    answers = _answers(file, records, tokenizer, length, task, columns, label_ids)
    if answers is not None:
        inputs = _inputs(encoded, tokenizer)
        return [e | {"labels": y} for e, y in zip(inputs, answers, strict=True)]
    if task in ("embedding", "teacher"):
        return cast("list[Any]", _inputs(encoded, tokenizer))
    return [window for window in encoded if len(window) > 1]


def _answers(
    file: Path,
    records: Sequence[Record],
    tokenizer: Any,
    length: int,
    task: str | None,
    columns: dict[str, str | None],
    label_ids: dict[str, int] | None,
) -> list[Tensor] | None:
    """What a model should say of each text: target or label; None where there are none to be."""
    target = columns["target"] or (TARGET if task in (None, "seq2seq") else None)
    label = columns["label"] or (LABEL if task in (None, "classification", "regression") else None)
    if columns["target"] or task == "seq2seq" or target in records[0]:
        targets = column(file, records, str(target), "target_column=")
        return _padded([_ids(tokenizer, str(t), length) for t in targets], NO_LABEL)
    if columns["label"] or task in ("classification", "regression") or label in records[0]:
        values = column(file, records, str(label), "label_column=")
        return _labels(file, str(label), values, task, label_ids)
    return None


def _ids(tokenizer: Any, text: str, length: int) -> Tensor:
    ids = tokenizer(text, truncation=True, max_length=length, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _padded(rows: Sequence[Tensor], value: int) -> list[Tensor]:
    longest = max(len(row) for row in rows)
    return [torch.nn.functional.pad(row, (0, longest - len(row)), value=value) for row in rows]


def _inputs(encoded: Sequence[Tensor], tokenizer: Any) -> list[dict[str, Tensor]]:
    """Ids and attention masks of one length, so that batches can be made of them."""
    pad = getattr(tokenizer, "pad_token_id", None)
    ids = _padded(encoded, pad if isinstance(pad, int) else 0)
    masks = _padded([torch.ones_like(row) for row in encoded], 0)
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, masks, strict=True)]


def _labels(
    file: Path, name: str, values: Sequence[Any], task: str | None, label_ids: dict[str, int] | None
) -> list[Tensor]:
    if task == "regression":
        return [torch.tensor(value) for value in numbers(file, name, values)]
    found = _label_numbers(file, name, values, label_ids, 'For values use task="regression".')
    return [torch.tensor(number) for number in found]


def _label_numbers(
    file: Path, name: str, values: Sequence[Any], label_ids: dict[str, int] | None, advice: str
) -> list[int]:
    texts = [str(value) for value in _by_name(file, name, values, label_ids)]
    if all(text.lstrip("-").isdigit() for text in texts):
        return [int(text) for text in texts]
    if label_ids and all(text in label_ids for text in texts):
        return [label_ids[text] for text in texts]
    unknown = sorted({text for text in texts if text not in (label_ids or {})})[:5]
    known = f"{', '.join(list(label_ids)[:10])}" if label_ids else "whole numbers from 0"
    raise InputError(
        f"the column {name!r} of {file} holds the labels {', '.join(unknown)}; expected "
        f"{known}. {advice}"
    )


def _by_name(
    file: Path, name: str, values: Sequence[Any], label_ids: dict[str, int] | None
) -> Sequence[Any]:
    """Numbers of labels as the model's names, where the data set names its own and they agree.

    A model may number the same labels in another order than a data set does.
    """
    names = class_names(file, name)
    known = {label.casefold(): label for label in label_ids or ()}
    if names is None or not all(label.casefold() in known for label in names):
        return values
    by_number = {str(number): known[label.casefold()] for number, label in enumerate(names)}
    return [by_number.get(str(value), value) for value in values]


def _tagged(
    file: Path,
    records: Sequence[Record],
    tokenizer: Any,
    length: int,
    names: tuple[str, str],
    label_ids: dict[str, int] | None,
) -> list[dict[str, Tensor]]:
    """Ids of the tokens; a token's tag labels its first id, the others and the padding have none.

    As in the training of such models: else a token would count as often as it has pieces.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{file} has tags for tokens, and this tokenizer doesn't say which token an id belongs "
            "to; expected a fast one (a folder with tokenizer.json). Or give the data as "
            "file.py:function, with input_ids and labels."
        )
    tokens_column = _lists(file, names[0], column(file, records, names[0], "tokens_column="))
    tags_column = _lists(file, names[1], column(file, records, names[1], "tags_column="))
    for place, (tokens, tags) in enumerate(zip(tokens_column, tags_column, strict=True)):
        if len(tokens) != len(tags):
            raise InputError(
                f"record {place} of {file} has {len(tokens)} {names[0]} and {len(tags)} "
                f"{names[1]}; expected one tag a token."
            )
    flat = [tag for tags in tags_column for tag in tags]
    remaining = iter(
        _label_numbers(file, names[1], flat, label_ids, "The model's config names its labels.")
    )
    encoded: list[Tensor] = []
    labels: list[Tensor] = []
    for place, tokens in enumerate(tokens_column):
        numbers_here = [next(remaining) for _ in tokens]
        found = _encoded(file, place, tokenizer, tokens, length)
        row: list[int] = []
        previous = None
        for word in found.word_ids():
            row.append(NO_LABEL if word is None or word == previous else numbers_here[word])
            previous = word
        if all(label == NO_LABEL for label in row):
            raise InputError(
                f"record {place} of {file} has no tagged token within {length} ids; allow more "
                "by length=, or remove it."
            )
        encoded.append(torch.tensor(found["input_ids"], dtype=torch.int64))
        labels.append(torch.tensor(row, dtype=torch.int64))
    padded = _padded(labels, NO_LABEL)
    return [e | {"labels": y} for e, y in zip(_inputs(encoded, tokenizer), padded, strict=True)]


def _encoded(file: Path, place: int, tokenizer: Any, tokens: list[Any], length: int) -> Any:
    try:
        return tokenizer(
            [str(token) for token in tokens],
            is_split_into_words=True,
            truncation=True,
            max_length=length,
            verbose=False,
        )
    # Byte-level tokenizers refuse tokens unless they put a space before each.
    except (AssertionError, TypeError, ValueError) as error:
        raise InputError(
            f"the tokenizer can't take the tokens of record {place} of {file}: {error}. Save it "
            "with add_prefix_space=True, or give the data as file.py:function."
        ) from error


def _lists(file: Path, name: str, values: Sequence[Any]) -> list[list[Any]]:
    for place, value in enumerate(values):
        if not isinstance(value, list) or not value:
            raise InputError(
                f"the column {name!r} of {file} holds {str(value)[:60]!r} in record {place}; "
                "expected a list with one item a token, as a .jsonl can hold."
            )
    return list(values)


def _conversations(
    file: Path, records: Sequence[Record], tokenizer: Any, length: int
) -> list[dict[str, Tensor]]:
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError(
            f"{file} holds conversations (messages), but the tokenizer has no chat template. Give "
            "plain text, or a model whose tokenizer has one."
        )

    def template(messages: Sequence[Record], start: bool) -> list[int]:
        if not messages:
            return []
        found = tokenizer.apply_chat_template(
            list(messages), tokenize=True, add_generation_prompt=start, return_dict=True
        )["input_ids"]
        return cast("list[int]", found)

    examples: list[dict[str, Tensor]] = []
    for place, record in enumerate(records):
        try:
            ids, labels = conversation_tokens(record[MESSAGES], template)
        except InputError as error:
            raise InputError(f"record {place} of {file}: {error}") from error
        cut = slice(0, length)
        if any(label != NO_LABEL for label in labels[1:length]):
            examples.append(
                {"input_ids": torch.tensor(ids[cut]), "labels": torch.tensor(labels[cut])}
            )
    if not examples:
        raise InputError(
            f"in {file} the assistant says nothing within the first {length} tokens of any "
            "conversation; allow more by length=."
        )
    return examples


def _image_column(records: Sequence[Record]) -> str | None:
    """The first column of files in memory, as ``datasets`` keeps images, or None."""
    for name, value in records[0].items():
        if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
            return name
    return None


def _image_examples(
    file: Path,
    records: Sequence[Record],
    name: str,
    label: str,
    task: str | None,
    label_ids: dict[str, int] | None,
    read: ImageReader,
) -> Sequence[Any]:
    where = f"{file}, column {name!r}"
    held = [record[name] or {} for record in records]
    for place, value in enumerate(held):
        if not isinstance(value.get("bytes"), bytes):
            raise InputError(
                f"record {place} of {where} holds no image, only the path {value.get('path')!r}; "
                "expected the file's bytes. Save the images as a folder of class folders."
            )
    found: list[int] | None = None
    if task not in ("teacher", "embedding") or label in records[0]:
        values = column(file, records, label, "label_column=")
        found = _label_numbers(file, label, values, label_ids, "The model's config names them.")
    images = TableImages([value["bytes"] for value in held], found, read, where)
    return cast("Sequence[Any]", images)


def _table_examples(
    file: Path, records: Sequence[Record], label: str, task: str | None
) -> list[tuple[Tensor, Tensor] | Tensor]:
    unlabelled = task == "teacher" and label not in records[0]
    inputs = [name for name in records[0] if name != label]
    columns = [numbers(file, name, column(file, records, name, "label_column=")) for name in inputs]
    rows = torch.tensor(columns, dtype=torch.float32).T
    if unlabelled:
        return list(rows)
    values = column(file, records, label, "label_column=")
    found = _labels(file, label, values, task, None)
    return list(zip(rows, found, strict=True))
