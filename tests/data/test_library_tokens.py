"""What reaches the model is what transformers makes of the same records for training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    MBartConfig,
    MBartForConditionalGeneration,
    NllbTokenizer,
)

from rankfold.cli.data_options import DataOptions
from rankfold.cli.open import evaluate_examples, open_examples, open_model
from rankfold.data.account import ReadExamples
from rankfold.data.parts import Data, as_part, select_part, split
from rankfold.data.record_examples import record_examples
from rankfold.data.text_examples import line_examples, window_examples
from rankfold.data.tokens import Tokens
from rankfold.errors import InputError
from rankfold.machine.progress import SilentProgress
from tests.command_line import rankfold
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
    found = record_examples(file, tokenizer, LENGTH, task=task, columns=COLUMNS)
    assert isinstance(found, ReadExamples)
    assert found.account.given == found.account.used == len(found)
    return found


def _compare(found: ReadExamples, features: list[dict[str, Any]], collator: Any) -> None:
    """Batches of all examples, or of each where the tokenizer has no padding token, or no mask."""
    batches = as_part("part", list(found), found.collate).batches(size=len(features))
    assert [example for batch in batches for example in batch] == list(found)
    padded = collator.tokenizer.pad_token_id is not None and "attention_mask" in features[0]
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
    found = record_examples(file, tokenizer, 99, task="classification", columns=COLUMNS)
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


@pytest.mark.parametrize("takes", [None, {"input_ids", "attention_mask"}, {"input_ids"}])
@pytest.mark.parametrize("names", [["input_ids"], ["input_ids", "attention_mask"]])
def test_without_a_mask_nothing_is_padded(
    names: list[str], takes: set[str] | None, tmp_path: Path
) -> None:
    tokenizer = FAMILIES["t5"]()
    tokenizer.model_input_names = names
    file = _jsonl(tmp_path, [{"text": text} for text in TEXTS])
    found = record_examples(file, tokenizer, 9, task="embedding", columns=COLUMNS, takes=takes)
    assert isinstance(found, ReadExamples)
    masked = "attention_mask" in names and takes != {"input_ids"}
    assert all(("attention_mask" in example) == masked for example in found)
    assert len(found.collate.batches(list(found))) == (1 if masked else len(TEXTS))


def test_what_a_model_does_not_take_is_left_out(tmp_path: Path) -> None:
    file = _jsonl(tmp_path, [{"text": "the film"}])
    takes = {"input_ids", "attention_mask"}
    (example,) = record_examples(
        file, FAMILIES["bert"](), 9, task="embedding", columns=COLUMNS, takes=takes
    )
    assert example.keys() == {"input_ids", "attention_mask"}


def test_a_tokenizer_that_fails_names_the_record(tmp_path: Path) -> None:
    def refuses(text: str, **_: Any) -> dict[str, list[int]]:
        if text == "b":
            raise OverflowError("too much")
        return {"input_ids": [1] * len(text), "attention_mask": [1] * len(text)}

    file = _jsonl(tmp_path, [{"text": "a"}, {"text": "b"}])
    with pytest.raises(InputError, match=r"record 1 of .*jsonl: OverflowError: too much"):
        record_examples(file, refuses, 9, task="embedding", columns=COLUMNS)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("the film\nbad\n", ["the film", "bad"]),
        ("the film\r\nbad", ["the film", "bad"]),
        ("\ufeffa\u2028b\x0cc\x85d\n\n\nbad\n", ["a\u2028b\x0cc\x85d", "", "", "bad"]),
        ("\n \nbad\n\n", ["", " ", "bad", ""]),
    ],
)
def test_lines_of_a_text_are_examples_or_told(text: str, lines: list[str], tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    file.write_bytes(text.encode())
    tokenizer = FAMILIES["bert"]()
    found = line_examples(file, Tokens(tokenizer, LENGTH))
    told = [place for places in found.account.left_out.values() for place in places]
    assert told == [place for place, line in enumerate(lines) if not line.strip()]
    assert found.account.given == len(lines) and found.account.unit == "line"
    kept = [line for place, line in enumerate(lines) if place not in told]
    assert [e["input_ids"].tolist() for e in found] == [tokenizer(t)["input_ids"] for t in kept]


def test_windows_of_a_text_are_told_with_what_is_left(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("the film\nwas good\n" * 5)
    found = window_examples(tmp_path / "x.txt", Tokens(FAMILIES["bert"](), 6))
    assert [len(window) for window in found] == [6, 6, 6]
    assert found.account.lines() == [
        f"{tmp_path / 'x.txt'}: 3 windows; each is one example of 6 tokens",
        "the last 2 tokens are left out: they are less than a window",
        "windows are cut from the whole text: what the tokenizer writes around a single text "
        "([CLS] [SEP]) is not in them",
    ]


def _encoder(folder: Path, kind: type[Any], **more: Any) -> Path:
    tokenizer = FAMILIES["bert"]()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=64, initializer_range=0.5, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _lines(folder: Path) -> Path:
    lines = [f"the {'bad ' * (n % 9)}film {'abcdefghij'[n % 10]} {n % 7}" for n in range(80)]
    (folder / "x.txt").write_text("\n".join(lines) + "\n\n")
    return folder / "x.txt"


@pytest.mark.parametrize(
    ("kind", "task"),
    [(BertModel, None), (BertForMaskedLM, None), (BertForSequenceClassification, "teacher")],
)
def test_an_encoder_gets_a_line_at_a_time(
    kind: type[Any], task: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = open_model(str(_encoder(tmp_path / "model", kind)))
    found = open_examples(str(_lines(tmp_path)), opened, DataOptions(task=task))
    assert len(found) == 80
    assert "x.txt: 81 lines, 80 of them used; each is one example of" in capsys.readouterr().err
    for example, line in zip(found, _lines(tmp_path).read_text().split("\n"), strict=False):
        expected = opened.tokenizer(line)["input_ids"]
        if "labels" in example:  # the hidden words
            shown = example["labels"] == -100
            ids = torch.where(shown, example["input_ids"], example["labels"])
            assert ids.tolist() == expected and not bool(shown.all())
        else:
            assert example["input_ids"].tolist() == expected


def test_the_report_says_what_became_of_the_lines(tmp_path: Path) -> None:
    _encoder(tmp_path / "model", BertModel)
    _lines(tmp_path)
    done = rankfold(
        "lossless", "model", "--data", "x.txt", "--size", "0.9", "--out", "out", "--json",
        cwd=tmp_path,
    )  # fmt: skip
    (source,) = json.loads(done.stdout)["sources"]
    assert (source["unit"], source["given"], source["used"]) == ("line", 81, 80)
    assert source["left_out"] == {"without text": {"count": 1, "first": [80]}}
    assert source["lengths"][0] < source["lengths"][2] < 20
    kept = json.loads((tmp_path / "out" / "rankfold.json").read_text())
    assert kept["sources"] == [source]
    assert source["told"][0].startswith("x.txt: 81 lines, 80 of them used; each is one example of")
    card = (tmp_path / "out" / "README.md").read_text()
    shown = rankfold("inspect", "out", cwd=tmp_path).stdout
    assert all(f"- {line}\n" in card and f"{line}\n" in shown for line in source["told"])


@pytest.mark.parametrize("size", [1, 7, None])
def test_losses_of_targets_are_those_of_each_pair_alone(size: int | None, tmp_path: Path) -> None:
    tokenizer = FAMILIES["mbart"]()
    config = MBartConfig(
        vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
        decoder_ffn_dim=24, max_position_embeddings=64, pad_token_id=1, init_std=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    MBartForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    opened = open_model(str(tmp_path / "model"))
    pairs = [(f"the {'bad ' * (n % 5)}film", f"was {'good ' * (n % 7)}") for n in range(12)]
    file = _jsonl(tmp_path, [{"text": source, "target": target} for source, target in pairs])
    examples = open_examples(str(file), opened, DataOptions())
    found = evaluate_examples(
        opened, examples, limit=None, batch_size=size, progress=SilentProgress()
    )
    losses, terms = [], []
    for source, target in pairs:
        batch = opened.tokenizer(source, text_target=target, return_tensors="pt")
        with torch.no_grad():
            losses.append(opened.model(**batch).loss.item())
        terms.append(batch["labels"].numel())
    truth = sum(x * n for x, n in zip(losses, terms, strict=True)) / sum(terms)
    assert found["loss"]["mean"] == pytest.approx(truth, abs=1e-5)


@pytest.mark.parametrize("size", [1, 7, None])
def test_losses_are_those_of_each_text_alone(size: int | None, tmp_path: Path) -> None:
    """The truth: plain transformers, a text at a time, in batches padded here."""
    opened = open_model(str(_encoder(tmp_path / "model", BertForSequenceClassification)))
    texts = [f"the {'bad ' * (n % 9)}film" for n in range(12)]
    file = _jsonl(tmp_path, [{"text": text, "label": n % 2} for n, text in enumerate(texts)])
    examples = open_examples(str(file), opened, DataOptions())
    found = evaluate_examples(
        opened, examples, limit=None, batch_size=size, progress=SilentProgress()
    )
    with torch.no_grad():
        truth = [
            opened.model(
                **opened.tokenizer(text, return_tensors="pt"), labels=torch.tensor([n % 2])
            ).loss.item()
            for n, text in enumerate(texts)
        ]
    assert found["loss"]["mean"] == pytest.approx(sum(truth) / len(truth), abs=1e-5)
