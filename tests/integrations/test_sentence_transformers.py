"""sentence-transformers and pipeline open a saved encoder; skipped where the first is absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

import rankfold
from rankfold.cli.open import open_model
from rankfold.integrations.transformers import pooling_of
from rankfold.report.embeddings_kept import neighbours_kept
from rankfold.tasks.agreement import unit_embeddings
from tests.integrations.test_sentence_folder import write
from tests.tiny_language_model import TEXT

TEXTS = [line for line in dict.fromkeys(TEXT.split(". ")) if line.strip()][:60]


def encoded(tokenizer: Any, texts: list[str], length: int = 12) -> dict[str, torch.Tensor]:
    kept = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
    found = tokenizer(texts, **kept)
    return {name: found[name] for name in ("input_ids", "attention_mask")}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, rankfold.Result, Any]:
    top = tmp_path_factory.mktemp("sentences")
    opened = open_model(str(write(top / "original")))
    words = [text.split() for text in TEXTS]
    texts = [" ".join(one[start : start + 4]) for one in words for start in range(0, len(one), 3)]
    columns = encoded(opened.tokenizer, [*dict.fromkeys(texts)][:80])
    data = [{name: column[n] for name, column in columns.items()} for n in range(
        len(columns["input_ids"]))]  # fmt: skip
    result = rankfold.lossless(opened.model, data, size=0.8, effort="fast", margin=1.0)
    return result.save(top / "a", tokenizer=opened.tokenizer), result, opened.tokenizer


def test_the_report_says_what_matters_of_an_encoder(
    saved: tuple[Path, rankfold.Result, Any],
) -> None:
    folder, result, _ = saved
    kept = result.report["embeddings_kept"]
    assert kept["cosine"] == 1 - result.report["loss"]["factorized"] / 2
    assert set(kept["neighbours"]) == {"1", "10"}
    assert all(0 <= share <= 1 for share in kept["neighbours"].values())
    assert kept["examples"] == result.report["data"]["selection"]["examples"]
    assert f"mean cosine with the original's {kept['cosine']:.4f}" in result.summary()
    assert "parameters without the embedding tables" in result.summary()
    card = (folder / "README.md").read_text()
    assert f"original's {kept['cosine']:.4f}; neighbours kept: " in card
    assert ModelCard(card).data.library_name == "sentence-transformers"


def test_neighbours_kept_against_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.nn.functional.normalize(torch.randn(12, 4, generator=generator).double(), dim=1)
    moved = before + 0.3 * torch.randn(12, 4, generator=generator).double()
    after = torch.nn.functional.normalize(moved, dim=1)
    for count in (1, 3, 11):
        shares = []
        for one in range(12):
            others = [place for place in range(12) if place != one]
            nearest = [
                sorted(others, key=lambda n: -float(v[one] @ v[n]))[:count] for v in (before, after)
            ]
            shares.append(len({*nearest[0]} & {*nearest[1]}) / count)
        assert neighbours_kept(before, after, count) == pytest.approx(sum(shares) / 12)
    assert neighbours_kept(before, before, 5) == 1


def test_sentence_transformers_opens_it(saved: tuple[Path, rankfold.Result, Any]) -> None:
    library = pytest.importorskip("sentence_transformers")
    folder, _, tokenizer = saved
    encoder = library.SentenceTransformer(str(folder), device="cpu")
    texts = [" ".join(text.split()[:4]) for text in TEXTS[:4]]
    found = torch.tensor(encoder.encode(texts, normalize_embeddings=True))
    model = rankfold.load(folder)
    pooling = pooling_of(model)
    assert pooling is not None
    with torch.no_grad():
        wanted = unit_embeddings(model, encoded(tokenizer, texts, encoder.max_seq_length), pooling)
    torch.testing.assert_close(found, wanted.to(found.dtype), atol=1e-6, rtol=1e-5)
    inner = encoder[0].model if hasattr(encoder[0], "model") else encoder[0].auto_model
    assert any("LowRank" in type(module).__name__ for module in inner.modules())


def test_pipeline_opens_it(saved: tuple[Path, rankfold.Result, Any]) -> None:
    from transformers import pipeline

    folder, _, tokenizer = saved
    text = " ".join(TEXTS[0].split()[:4])
    found = torch.tensor(pipeline("feature-extraction", model=str(folder))(text)[0])
    with torch.no_grad():
        wanted = rankfold.load(folder)(**encoded(tokenizer, [text], 64)).last_hidden_state[0]
    torch.testing.assert_close(found, wanted)
