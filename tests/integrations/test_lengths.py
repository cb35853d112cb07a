"""The invariant: a model runs on examples of its default length and of the most tokens it takes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from rankfold import InputError
from rankfold.cli.data_options import DataOptions
from rankfold.cli.open import OpenedModel, open_examples
from rankfold.integrations.lengths import default_length, most_tokens, only_length
from tests.small_models import mlp, seeded
from tests.tiny_language_model import TEXT, tiny_tokenizer

LIMIT = 40
SMALL: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": LIMIT, "pad_token_id": 1,
    "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
GPT: dict[str, Any] = {
    "vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": LIMIT,
    "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 32, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "max_position_embeddings": LIMIT, "pad_token_id": 1, "eos_token_id": 2,
    "bos_token_id": 0, "decoder_start_token_id": 2,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2,
    "decoder_start_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
# By class: its configuration, the most tokens it takes, and whether one more token is an error.
MODELS: dict[str, tuple[dict[str, Any], int | None, bool]] = {
    "BertForMaskedLM": (SMALL, LIMIT, True),
    "RobertaForMaskedLM": (SMALL, LIMIT - 2, True),
    "RobertaForCausalLM": (SMALL | {"pad_token_id": 4, "is_decoder": True}, LIMIT - 5, True),
    "XLMRobertaForSequenceClassification": (SMALL, LIMIT - 2, True),
    "CamembertForTokenClassification": (SMALL, LIMIT - 2, True),
    "RobertaPreLayerNormForMaskedLM": (SMALL, LIMIT - 2, True),
    "Data2VecTextForMaskedLM": (SMALL, LIMIT - 2, True),
    "MPNetForMaskedLM": (SMALL, LIMIT - 2, True),
    "LongformerForMaskedLM": (SMALL | {"attention_window": 4}, LIMIT - 2, False),
    "EsmForMaskedLM": (SMALL | {"mask_token_id": 3}, LIMIT - 2, True),
    "ElectraForMaskedLM": (SMALL | {"embedding_size": 16}, LIMIT, True),
    "DebertaV2ForMaskedLM": (SMALL, LIMIT, True),
    "RoFormerForMaskedLM": (SMALL | {"embedding_size": 16}, LIMIT, True),
    "FunnelForMaskedLM": (
        {"vocab_size": 32, "block_sizes": [1, 1], "d_model": 16, "n_head": 2, "d_head": 8,
         "d_inner": 24, "num_decoder_layers": 1}, None, False,
    ),
    "GPT2LMHeadModel": (GPT, LIMIT, True),
    "OpenAIGPTLMHeadModel": (GPT, LIMIT, True),
    "GPTNeoForCausalLM": (
        {"vocab_size": 32, "hidden_size": 16, "num_layers": 1, "num_heads": 2,
         "attention_types": [[["local"], 1]], "window_size": 4,
         "max_position_embeddings": LIMIT}, LIMIT, True,
    ),
    "OPTForCausalLM": (SMALL | {"ffn_dim": 24, "word_embed_proj_dim": 16}, LIMIT, True),
    "BioGptForCausalLM": (SMALL, LIMIT, True),
    "LlamaForCausalLM": (SMALL, LIMIT, False),
    "MistralForCausalLM": (SMALL | {"sliding_window": 8, "num_key_value_heads": 1}, LIMIT, False),
    "BloomForCausalLM": ({"vocab_size": 32, "hidden_size": 16, "n_layer": 1, "n_head": 2}, None,
                         False),
    "MptForCausalLM": ({"vocab_size": 32, "d_model": 16, "n_layers": 1, "n_heads": 2,
                        "max_seq_len": LIMIT}, LIMIT, True),
    "MambaForCausalLM": ({"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1,
                          "state_size": 4}, None, False),
    "BartForConditionalGeneration": (SEQ2SEQ, LIMIT, True),
    "MarianMTModel": (SEQ2SEQ, LIMIT, True),
    "PegasusForConditionalGeneration": (SEQ2SEQ, LIMIT, True),
    "LEDForConditionalGeneration": (
        SEQ2SEQ | {"max_encoder_position_embeddings": 64, "attention_window": 4,
                   "max_decoder_position_embeddings": LIMIT}, LIMIT, False,
    ),
    "T5ForConditionalGeneration": (T5, None, False),
    "MT5ForConditionalGeneration": (T5, None, False),
}  # fmt: skip


def made(name: str) -> Any:
    model_class = getattr(hf, name)
    config = model_class.config_class(**MODELS[name][0])
    return seeded(1, lambda: model_class(config)).eval()


def run(model: Any, length: int) -> None:
    ids = torch.full((1, length), 9)
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), **more)


@pytest.mark.parametrize("name", MODELS)
def test_the_most_tokens_run_and_one_more_is_too_many(name: str) -> None:
    _, limit, strict = MODELS[name]
    model = made(name)
    assert most_tokens(model) == limit
    assert default_length(model) == (limit or 512)
    assert only_length(model) is None
    run(model, default_length(model))
    if strict:
        with pytest.raises((IndexError, RuntimeError)):
            run(model, default_length(model) + 1)


def test_parts_of_several_kinds() -> None:
    small = hf.BertConfig(**SMALL)
    pair = hf.EncoderDecoderConfig.from_encoder_decoder_configs(
        small, hf.BertConfig(**SMALL | {"max_position_embeddings": 24, "is_decoder": True})
    )
    model = seeded(1, lambda: hf.EncoderDecoderModel(pair))
    assert most_tokens(model) == 24
    clip = hf.CLIPConfig(text_config={"max_position_embeddings": 11}, vision_config={})
    assert most_tokens(_holding(clip)) == 11
    assert most_tokens(mlp()) is None
    assert default_length(mlp()) == 512


def _holding(config: Any) -> nn.Module:
    model: Any = nn.Identity()
    model.config = config
    return model


def test_a_model_that_fixes_the_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT[:2000])
    config = hf.PerceiverConfig(
        vocab_size=32, num_latents=4, d_latents=16, d_model=16, num_blocks=1,
        num_self_attends_per_block=1, num_self_attention_heads=2, num_cross_attention_heads=2,
        max_position_embeddings=LIMIT,
    )  # fmt: skip
    model = seeded(1, lambda: hf.PerceiverForMaskedLM(config)).eval()
    assert only_length(model) == default_length(model) == LIMIT
    with pytest.raises(InputError, match=f"this model takes {LIMIT} tokens, no more or fewer"):
        _read(model, DataOptions(length=LIMIT - 1))


@pytest.mark.parametrize(("own", "length"), [(16, 16), (10**30, 38), (0, 38), (None, 38)])
def test_a_tokenizer_says_how_long_its_texts_are(own: Any, length: int) -> None:
    tokenizer = SimpleNamespace(model_max_length=own)
    assert default_length(made("RobertaForMaskedLM"), tokenizer) == length


def _read(model: nn.Module, options: DataOptions) -> Any:
    opened = OpenedModel(model, tiny_tokenizer(), None)
    return open_examples("text.txt", opened, options)


@pytest.mark.parametrize("length", [1, 39, 40])
def test_a_length_that_the_model_does_not_take_is_refused(
    length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT[:2000])
    model = made("RobertaForCausalLM" if length == 1 else "RobertaForMaskedLM")
    with pytest.raises(
        InputError, match=rf"--length is {length}; expected 2 .* at most the model's 3"
    ):
        _read(model, DataOptions(length=length))
