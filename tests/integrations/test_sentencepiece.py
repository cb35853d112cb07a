"""A folder whose tokenizer is a SentencePiece model: read as transformers reads it, or named."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import transformers as tf

from rankfold.cli.data_options import DataOptions
from rankfold.cli.open import open_examples, open_model
from rankfold.errors import InputError
from rankfold.integrations.tokenizer_files import has_tokenizer
from tests.integrations.small_families import BART, IMAGES, T5, save_other_model
from tests.small_models import seeded

TEXTS = [f"the film {was} good {letter}" for was in ("was", "is") for letter in "abcdefgh"]
MARIAN = {**BART, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
NLLB = {**BART, "pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 0}
# The model's class, its configuration, its tokenizer's class, files of pieces, and their special
# tokens.
FAMILIES: dict[str, tuple[str, dict[str, Any], str, tuple[str, ...]]] = {
    "t5": ("T5ForConditionalGeneration", T5, "T5Tokenizer", ("spiece.model",)),
    "marian": ("MarianMTModel", MARIAN, "MarianTokenizer", ("source.spm", "target.spm")),
    "m2m100": (
        "M2M100ForConditionalGeneration", NLLB, "M2M100Tokenizer", ("sentencepiece.bpe.model",)
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    trainer: Any = pytest.importorskip("sentencepiece").SentencePieceTrainer
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text.txt").write_text("\n".join(TEXTS))
    trainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "x"), vocab_size=40,
        hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    return folder / "x.model"


def _save(name: str, pieces: Path, folder: Path) -> Path:
    model, options, tokenizer, files = FAMILIES[name]
    made = getattr(tf, model)
    config = made.config_class(vocab_size=200, **options)
    seeded(0, lambda: made(config)).save_pretrained(folder)
    for file in files:
        shutil.copy(pieces, folder / file)
    if name != "t5":
        rows = pieces.with_suffix(".vocab").read_text(encoding="utf-8").splitlines()
        words = [*("<s>", "<pad>", "</s>", "<unk>"), *(row.split("\t")[0] for row in rows)]
        numbers = {word: place for place, word in enumerate(dict.fromkeys(words))}
        (folder / "vocab.json").write_text(json.dumps(numbers))
    languages = {"src_lang": "en", "tgt_lang": "de"} if name == "m2m100" else {}
    about = {"tokenizer_class": tokenizer, **languages}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
@pytest.mark.parametrize("name", FAMILIES)
def test_sources_and_targets_are_those_of_transformers(
    name: str, pieces: Path, tmp_path: Path
) -> None:
    folder = _save(name, pieces, tmp_path / name)
    rows = [{"text": text, "target": text[::-1]} for text in TEXTS]
    (tmp_path / "x.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found = open_examples(str(tmp_path / "x.jsonl"), open_model(str(folder)), DataOptions())
    tokenizer = tf.AutoTokenizer.from_pretrained(str(folder))
    for row, example in zip(rows, found, strict=True):
        expected = tokenizer(row["text"], text_target=row["target"])
        assert {key: value.tolist() for key, value in example.items()} == dict(expected)


@pytest.fixture
def without_sentencepiece(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def found(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == "sentencepiece" else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", found)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)


@pytest.mark.usefixtures("without_sentencepiece")
@pytest.mark.parametrize(
    "file", ["spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "source.spm"]
)
def test_the_missing_package_is_named(file: str, tmp_path: Path) -> None:
    made = tf.T5ForConditionalGeneration
    config = made.config_class(vocab_size=40, **T5)
    seeded(0, lambda: made(config)).save_pretrained(tmp_path / "t5")
    assert not has_tokenizer(tmp_path / "t5")
    (tmp_path / "t5" / file).write_bytes(b"pieces")
    assert has_tokenizer(tmp_path / "t5")
    with pytest.raises(InputError, match=rf"{re.escape(file)}.*pip install sentencepiece"):
        open_model(str(tmp_path / "t5"))


@pytest.mark.usefixtures("without_sentencepiece")
def test_a_model_of_images_is_opened_without_it_and_text_names_it(tmp_path: Path) -> None:
    folder = save_other_model(tmp_path / "siglip", IMAGES["siglip"])
    (folder / "spiece.model").write_bytes(b"pieces")
    opened = open_model(str(folder))
    assert opened.tokenizer is None
    (tmp_path / "x.txt").write_text("a film\n" * 9)
    (tmp_path / "x.csv").write_text("text,label\n" + "a film,0\n" * 9)
    for name in ("x.txt", "x.csv"):
        with pytest.raises(InputError, match=r"spiece\.model.*pip install sentencepiece"):
            open_examples(str(tmp_path / name), opened, DataOptions())
