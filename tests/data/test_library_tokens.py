"""What reaches the model is what transformers makes of the same records for training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    NllbTokenizer,
)

from rankfold.data.account import ReadExamples
from rankfold.data.parts import Data, as_part, select_part, split
from rankfold.data.record_examples import record_examples
from rankfold.data.text_examples import line_examples
from rankfold.data.tokens import Tokens
from rankfold.errors import InputError
from tests.small_tokenizers import FAMILIES, TWO_SIDED

LENGTH = 12
COLUMNS = dict.fromkeys(("text", "label", "target", "tokens", "tags"))
TEXTS = ("the film was good", "bad", "the bad film was the good film was bad film", "a film.")


@pytest.fixture(params=FAMILIES)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return FAMILIES[request.param]()


def _jsonl(folder: Path, records: list[dict[str, Any]]) -> Path:
    file = folder / "data.jsonl"
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return file


def _read(file: Path, tokenizer: Any, task: str) -> ReadExamples:
    found = record_examples(file, Tokens(tokenizer, LENGTH), task=task, columns=COLUMNS)
    assert isinstance(found, ReadExamples)
    assert found.account.given == found.account.used == len(found)
    return found


def _compare(found: ReadExamples, features: list[dict[str, Any]], collator: Any) -> None:
    """Batches of all examples, or of each where the tokenizer has no padding token."""
    batches = as_part("part", list(found), found.collate).batches(size=len(features))
    assert [example for batch in batches for example in batch] == list(found)
    padded = collator.tokenizer.pad_token_id is not None
    assert len(batches) == (1 if padded else len(features))
    expected = [features] if padded else [[feature] for feature in features]
    for batch, theirs in zip(batches, expected, strict=True):
        if padded:
            wanted = dict(collator([dict(feature) for feature in theirs]))
        else:
            wanted = {name: torch.tensor([value]) for name, value in theirs[0].items()}
        ours = found.collate(batch)
        assert ours.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.equal(ours[name], value), name


def test_labelled_texts(tokenizer: Any, tmp_path: Path) -> None:
    file = _jsonl(tmp_path, [{"text": t, "label": i % 2} for i, t in enumerate(TEXTS)])
    features = [
        {**tokenizer(text, truncation=True, max_length=LENGTH), "labels": i % 2}
        for i, text in enumerate(TEXTS)
    ]
    found = _read(file, tokenizer, "classification")
    _compare(found, features, DataCollatorWithPadding(tokenizer))
    assert found.account.cut == sum(len(tokenizer(text)["input_ids"]) > LENGTH for text in TEXTS)


def test_texts_to_texts(tokenizer: Any, tmp_path: Path) -> None:
    pairs = list(zip(TEXTS, reversed(TEXTS), strict=True))
    file = _jsonl(tmp_path, [{"text": source, "target": target} for source, target in pairs])
    features = [
        dict(tokenizer(source, text_target=target, truncation=True, max_length=LENGTH))
        for source, target in pairs
    ]
    found = _read(file, tokenizer, "seq2seq")
    _compare(found, features, DataCollatorForSeq2Seq(tokenizer))


@pytest.mark.parametrize("name", TWO_SIDED)
def test_targets_are_written_as_targets(name: str, tmp_path: Path) -> None:
    tokenizer = FAMILIES[name]()
    file = _jsonl(tmp_path, [{"text": text, "target": text} for text in TEXTS])
    for example in _read(file, tokenizer, "seq2seq"):
        assert example["input_ids"].tolist() != example["labels"].tolist()


def test_tagged_words(tokenizer: Any, tmp_path: Path) -> None:
    rows = [text.split() for text in TEXTS]
    records = [{"tokens": row, "tags": [len(word) % 3 for word in row]} for row in rows]
    features = []
    for record in records:
        encoded = tokenizer(
            record["tokens"], is_split_into_words=True, truncation=True, max_length=LENGTH
        )
        labels, before = [], None
        for word in encoded.word_ids():  # as run_ner.py of transformers
            first = word is not None and word != before
            labels.append(record["tags"][word] if first else -100)
            before = word
        features.append({**encoded, "labels": labels})
    found = _read(_jsonl(tmp_path, records), tokenizer, "token-classification")
    _compare(found, features, DataCollatorForTokenClassification(tokenizer))


def test_a_line_of_a_text_is_what_it_is_as_a_record(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("\n".join(TEXTS) + "\n")
    lines = line_examples(tmp_path / "x.txt", Tokens(tokenizer, LENGTH))
    records = _read(_jsonl(tmp_path, [{"text": t} for t in TEXTS]), tokenizer, "embedding")
    for line, record, text in zip(lines, records, TEXTS, strict=True):
        expected = tokenizer(text, truncation=True, max_length=LENGTH)
        assert line.keys() == record.keys() == expected.keys()
        for name, value in expected.items():
            assert line[name].tolist() == record[name].tolist() == value


def test_padding_reaches_the_parts(tmp_path: Path) -> None:
    tokenizer = FAMILIES["bert"]()
    texts = [f"the film was good {'bad ' * n}" for n in range(24)]
    file = _jsonl(tmp_path, [{"text": text, "label": 0} for text in texts])
    found = record_examples(file, Tokens(tokenizer, 99), task="classification", columns=COLUMNS)
    assert isinstance(found, ReadExamples)
    for data in (split(found, 0), Data(found, found, found)):
        assert data.accounts == [found.account]
        part = select_part(data, "calibration", None, 0)
        for batch in part.batches():
            longest = max(len(example["input_ids"]) for example in batch)
            assert part.collate(batch)["input_ids"].shape == (len(batch), longest)
            assert len(batch) == 1 or len(batch) * longest <= 512
        assert len(part.batches()) < len(part.examples) / 3
        assert [len(batch) for batch in part.batches(5)][:-1] == [5] * (len(part.batches(5)) - 1)


def test_a_language_that_nothing_names_is_refused(tmp_path: Path) -> None:
    vocabulary = FAMILIES["nllb"]().get_vocab()
    tokenizer = NllbTokenizer(vocab=vocabulary, merges=[], src_lang="eng_Latn")
    file = _jsonl(tmp_path, [{"text": "a", "target": "b"}])
    for _ in range(2):  # transformers writes the source's language into the tokenizer
        with pytest.raises(InputError, match=r"target language.*tgt_lang="):
            _read(file, tokenizer, "seq2seq")


def test_what_a_model_does_not_take_is_left_out(tmp_path: Path) -> None:
    file = _jsonl(tmp_path, [{"text": "the film"}])
    tokens = Tokens(FAMILIES["bert"](), 9, {"input_ids", "attention_mask"})
    (example,) = record_examples(file, tokens, task="embedding", columns=COLUMNS)
    assert example.keys() == {"input_ids", "attention_mask"}


def test_a_tokenizer_that_fails_names_the_record(tmp_path: Path) -> None:
    def refuses(text: str, **_: Any) -> dict[str, list[int]]:
        if text == "b":
            raise OverflowError("too much")
        return {"input_ids": [1] * len(text), "attention_mask": [1] * len(text)}

    file = _jsonl(tmp_path, [{"text": "a"}, {"text": "b"}])
    with pytest.raises(InputError, match=r"record 1 of .*jsonl: OverflowError: too much"):
        record_examples(file, Tokens(refuses, 9), task="embedding", columns=COLUMNS)
