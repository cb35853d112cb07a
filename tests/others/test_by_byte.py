"""Losses by byte: sums over tokens, whatever the tokens are."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from rankfold.data.parts import as_part
from rankfold.errors import InputError
from rankfold.machine.progress import SilentProgress
from rankfold.others.by_byte import OfBytes, same_tokens
from rankfold.others.source import Identity
from tests.small_tokenizers import FAMILIES
from tests.tiny_language_model import TEXT, tiny_llama, tiny_tokenizer

WHO = Identity("folder", "tiny", "0" * 64)
TEXTS = ("a word, and another", "größer 漢字 🙂", TEXT[1000:1060])


def test_sum_of_the_tokens_by_the_bytes_of_the_text() -> None:
    model, tokenizer = tiny_llama(3)
    reader = tiny_tokenizer(add_prefix_space=False)
    part = as_part("held_out", [torch.tensor(reader(text)["input_ids"]) for text in TEXTS])
    source = OfBytes(WHO, model, tokenizer, reader)
    source.check(part)
    found = source.losses(part, SilentProgress(), "shown", finite=True)
    assert found.terms.tolist() == [len(text.encode()) for text in TEXTS]
    for text, loss in zip(TEXTS, found.losses.tolist(), strict=True):
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits.double()
        wanted = functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
        assert loss * len(text.encode()) == pytest.approx(float(wanted), rel=1e-5)


def test_windows_that_cut_a_character_lose_its_rest() -> None:
    model, tokenizer = tiny_llama(1)
    ids = tokenizer("🙂 and a word 🙂")["input_ids"]
    part = as_part("held_out", [torch.tensor(ids[1:-1])])
    source = OfBytes(WHO, model, tokenizer, tokenizer)
    found = source.losses(part, SilentProgress(), "shown", finite=True)
    assert found.terms.tolist() == [len(b" and a word ")]


def test_tokenizers_are_compared_by_vocabulary_and_by_what_they_read() -> None:
    tokenizer, twin = tiny_tokenizer(), tiny_tokenizer()
    part = as_part("held_out", [torch.tensor(tokenizer(text)["input_ids"]) for text in TEXTS])
    assert same_tokens(tokenizer, twin, part)
    assert not same_tokens(tokenizer, FAMILIES["gpt2"](), part)
    assert not same_tokens(tokenizer, tiny_tokenizer(add_prefix_space=True), part)


def test_what_can_not_be_compared_is_named() -> None:
    model, tokenizer = tiny_llama(1)
    source = OfBytes(WHO, model, tokenizer, tokenizer)
    with pytest.raises(InputError, match="compared on plain text alone"):
        source.check(as_part("held_out", [{"input_ids": torch.ones(4, dtype=torch.int64)}]))
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="has no start token"):
        OfBytes(WHO, model, tokenizer, tokenizer)
