"""Invariants of tokens. Padding without a mask is never scored, or read, as text: refused.

No prediction of a language model depends on the token itself, or on what comes behind it. Every id
has a row of the embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from rankfold import Data, lossless
from rankfold.data.account import Account, ReadExamples
from rankfold.data.parts import as_part
from rankfold.errors import InputError
from rankfold.integrations.transformers import task_hint
from rankfold.tasks.recognise import recognise_task
from rankfold.tasks.tokens_as_meant import check_tokens, refuse_reading_ahead

PAD, EOS, WORDS, LENGTH = 1, 3, 60, 12
SMALL = {
    "initializer_range": 0.3,
    "vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 32, "pad_token_id": PAD, "bos_token_id": 2,
    "eos_token_id": EOS,
}  # fmt: skip
GPT2 = {
    "vocab_size": WORDS, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32,
    "bos_token_id": 2, "eos_token_id": EOS,
}  # fmt: skip


def _bert(name: str, **more: Any) -> Any:
    return getattr(tf, name)(tf.BertConfig(**SMALL, **more))


def _xlnet() -> Any:
    return tf.XLNetLMHeadModel(
        tf.XLNetConfig(vocab_size=WORDS, d_model=16, n_layer=1, n_head=2, d_inner=32)
    )


def _bart() -> Any:
    return tf.BartForCausalLM(
        tf.BartConfig(
            vocab_size=WORDS, d_model=16, decoder_layers=1, decoder_attention_heads=2,
            decoder_ffn_dim=32, max_position_embeddings=32, is_decoder=True,
            is_encoder_decoder=False,
        )
    )  # fmt: skip


class Bag(nn.Module):
    """Predicts each token from the mean of all: looks ahead without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, 16), nn.Linear(16, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.embed(ids)
        return self.head(hidden + hidden.mean(1, keepdim=True))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """A language model of a user's own, one way or both ways."""

    def __init__(self, both: bool, padding: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 16, padding_idx=padding)
        self.states = nn.GRU(16, 16, batch_first=True, bidirectional=both)
        self.head = nn.Linear(16 * (1 + both), WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.states(self.embed(ids))[0])  # type: ignore[no-any-return]


BACK: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL)),
    "llama in bfloat16": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL)).bfloat16(),
    "bert as a decoder": lambda: _bert("BertLMHeadModel", is_decoder=True),
    "bart's decoder": _bart,
    "xlm": lambda: tf.XLMWithLMHeadModel(
        tf.XLMConfig(vocab_size=WORDS, emb_dim=16, n_layers=1, n_heads=2, causal=True)
    ),
    "ctrl": lambda: tf.CTRLLMHeadModel(
        tf.CTRLConfig(vocab_size=WORDS, n_embd=16, dff=32, n_layer=1, n_head=2)
    ),
    "mamba": lambda: tf.MambaForCausalLM(
        tf.MambaConfig(vocab_size=WORDS, hidden_size=16, num_hidden_layers=1, state_size=4)
    ),
    "a GRU": lambda: Recurrent(both=False),
}
AHEAD: dict[str, Callable[[], Any]] = {
    "bert": lambda: _bert("BertLMHeadModel"),
    "roberta": lambda: tf.RobertaForCausalLM(tf.RobertaConfig(**SMALL)),
    "electra": lambda: tf.ElectraForCausalLM(tf.ElectraConfig(**SMALL, embedding_size=16)),
    "xlnet": _xlnet,
    "xlm": lambda: tf.XLMWithLMHeadModel(
        tf.XLMConfig(vocab_size=WORDS, emb_dim=16, n_layers=1, n_heads=2)
    ),
    "a bag of words": Bag,
    "a GRU both ways": lambda: Recurrent(both=True),
}


def _seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make().eval()


def _text(number: int, length: int = LENGTH) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(5, WORDS, (length,), generator=generator)


def _task(model: Any, part: Any, name: str | None = "causal-lm") -> Any:
    return recognise_task(part, None, name, [model], task_hint(model))


@pytest.mark.filterwarnings("ignore:If you want to use")
@pytest.mark.parametrize(
    ("name", "ahead"),
    [*((name, False) for name in BACK), *((name, True) for name in AHEAD)],
)
def test_no_prediction_sees_its_token_or_what_comes_behind(name: str, ahead: bool) -> None:
    model = _seeded((AHEAD if ahead else BACK)[name])
    part = as_part("calibration", [_text(n) for n in range(6)])
    if not ahead:
        refuse_reading_ahead(model, _task(model, part), part)
        return
    with pytest.raises(InputError, match=r"no model for causal-lm .* has seen what"):
        refuse_reading_ahead(model, _task(model, part), part)


def test_one_that_looks_ahead_is_refused_by_the_product() -> None:
    texts = [_text(n) for n in range(40)]
    with pytest.raises(InputError, match="BertLMHeadModel is no model for causal-lm"):
        lossless(_seeded(AHEAD["bert"]), texts, size=0.9)


def _padded(number: int, padding: int = PAD, left: bool = False) -> Tensor:
    length = LENGTH - number % 4
    gap = torch.full((LENGTH - length,), padding)
    return torch.cat([gap, _text(number, length)] if left else [_text(number, length), gap])


def _classifier() -> Any:
    return _bert("BertForSequenceClassification", num_labels=2)


def _decoder_classifier() -> Any:
    return tf.GPT2ForSequenceClassification(tf.GPT2Config(**GPT2, pad_token_id=PAD, num_labels=2))


def _labelled(number: int, **more: Any) -> dict[str, Any]:
    return {"input_ids": _padded(number), "labels": number % 2, **more}


def _gpt2(**more: Any) -> Any:
    return tf.GPT2LMHeadModel(tf.GPT2Config(**{**GPT2, **more}))


def _counted(number: int) -> dict[str, Any]:
    ids = _padded(number)
    return {"input_ids": ids, "labels": ids.masked_fill(ids == PAD, -100)}


def _by_collate(examples: list[Any]) -> dict[str, Tensor]:
    return {"input_ids": torch.stack(examples)}


MakeModel = Callable[[], Any]
UNMASKED: dict[str, tuple[MakeModel, Callable[[int], Any], str | None]] = {
    "a language model": (lambda: _gpt2(pad_token_id=PAD), _padded, None),
    "on the left": (lambda: _gpt2(pad_token_id=PAD), lambda n: _padded(n, left=True), None),
    "with the end token": (_gpt2, lambda n: _padded(n, EOS), None),
    "lists by name": (lambda: _gpt2(pad_token_id=PAD), lambda n: {"input_ids": _padded(n)}, None),
    "a classifier": (_classifier, _labelled, None),
    "pairs": (_classifier, lambda n: (_padded(n), n % 2), None),
    "an encoder": (lambda: _bert("BertModel"), lambda n: {"input_ids": _padded(n)}, "embedding"),
    "hidden words": (lambda: _bert("BertForMaskedLM"), _counted, None),
    "a net of one's own": (lambda: Recurrent(both=False, padding=PAD), _padded, None),
}
MASKED: dict[str, tuple[MakeModel, Callable[[int], Any], str | None]] = {
    "a mask": (
        lambda: _gpt2(pad_token_id=PAD),
        lambda n: {"input_ids": _padded(n), "attention_mask": (_padded(n) != PAD).long()},
        None,
    ),
    "a mask of ones": (
        _gpt2,
        lambda n: {"input_ids": _padded(n, EOS), "attention_mask": torch.ones(LENGTH).long()},
        None,
    ),
    "labels of a decoder": (lambda: _gpt2(pad_token_id=PAD), _counted, None),
    "a decoder that finds its padding": (_decoder_classifier, _labelled, None),
    "one end token": (_gpt2, lambda n: torch.cat([_text(n), torch.tensor([EOS])]), None),
    "the token within": (
        lambda: _gpt2(pad_token_id=PAD),
        lambda n: torch.cat([_text(n), torch.tensor([PAD, PAD, 7])]),
        None,
    ),
    "a net that counts padding": (
        lambda: nn.Sequential(
            nn.Embedding(WORDS, 8, padding_idx=PAD), nn.Flatten(), nn.Linear(8 * LENGTH, 2)
        ),
        lambda n: (_padded(n), n % 2),
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNMASKED)
def test_padding_without_a_mask_is_refused(case: str) -> None:
    make, example, name = UNMASKED[case]
    model, part = _seeded(make), as_part("selection", [example(n) for n in range(8)])
    with pytest.raises(InputError, match=r"[246] of 8 examples of the selection part .* 3 times"):
        check_tokens(model, _task(model, part, name), [part])


@pytest.mark.parametrize("case", MASKED)
def test_what_is_masked_or_no_padding_is_taken(case: str) -> None:
    make, example, name = MASKED[case]
    model, part = _seeded(make), as_part("selection", [example(n) for n in range(8)])
    check_tokens(model, _task(model, part, name), [part])


def test_padding_of_a_collate_function_is_found() -> None:
    model = _seeded(lambda: _gpt2(pad_token_id=PAD))
    part = as_part("held_out", [_padded(n) for n in range(8)], _by_collate)
    with pytest.raises(InputError, match=r"examples of the held-out part seem to be padded"):
        check_tokens(model, _task(model, part), [part])


def test_what_a_file_holds_is_text() -> None:
    examples = ReadExamples([_padded(n, EOS) for n in range(8)], Account("a.txt", "window", 8, 8))
    part = as_part("calibration", examples)
    check_tokens(model := _seeded(_gpt2), _task(model, part), [part])


def test_each_part_is_looked_at() -> None:
    good, bad = [_text(n) for n in range(40)], [_padded(n) for n in range(40, 50)]
    data = Data(good[:20], good[20:], bad)
    with pytest.raises(InputError, match=r"of the held-out part seem to be padded"):
        lossless(_seeded(lambda: _gpt2(pad_token_id=PAD)), data, size=0.9)


@pytest.mark.parametrize("token", [WORDS, -1])
def test_an_id_without_a_row_of_the_embedding_is_named(token: int) -> None:
    texts = [_text(n) for n in range(40)]
    texts[7] = torch.cat([texts[7][:-1], torch.tensor([token])])
    with pytest.raises(InputError, match=rf"example 7 .* the token id {token}, .* ids 0 to 59"):
        lossless(_seeded(_gpt2), Data(texts[:20], texts[20:30], texts[30:]), size=0.9)
