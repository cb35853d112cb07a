"""The invariant: padding that rankfold adds changes no output of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from rankfold.cli.data_options import DataOptions
from rankfold.cli.open import OpenedModel, open_examples
from rankfold.integrations.model_inputs import known_inputs
from rankfold.integrations.padding_side import harmless_side
from tests.small_models import flags, same_state, seeded, state
from tests.small_tokenizers import FAMILIES

BERT: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.5,
}  # fmt: skip
BART: dict[str, Any] = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "max_position_embeddings": 64, "pad_token_id": 1,
}  # fmt: skip
XLNET = {"vocab_size": 80, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24}
GPT2 = {"vocab_size": 80, "n_embd": 16, "n_layer": 1, "n_head": 2, "pad_token_id": 0}
LLAMA: dict[str, Any] = {
    "vocab_size": 80, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2,
}  # fmt: skip


class ReadsPadding(BertForSequenceClassification):
    """Its logits are of all positions, hidden or not."""

    def forward(self, input_ids: Any, attention_mask: Any = None, **more: Any) -> Any:
        more.pop("return_dict", None)
        return super().forward(input_ids, torch.ones_like(input_ids), **more)


def _model(kind: type[Any], config: Any) -> Any:
    return seeded(0, lambda: kind(config)).eval()


@pytest.mark.parametrize("own", ["left", "right"])
@pytest.mark.parametrize(
    ("kind", "config", "family", "right", "left"),
    [
        (BertModel, BertConfig(vocab_size=80, **BERT), "bert", True, False),
        (BertForSequenceClassification, BertConfig(vocab_size=80, **BERT), "bert", True, False),
        (BartModel, BartConfig(vocab_size=80, **BART), "bart", True, False),
        (XLNetForSequenceClassification, XLNetConfig(**XLNET), "xlnet", False, True),
        (GPT2ForSequenceClassification, GPT2Config(**GPT2), "bert",
         True, False),
        (ReadsPadding, BertConfig(vocab_size=80, **BERT), "bert", False, False),
    ],
    ids=["hidden states", "first token", "seq2seq", "last token", "positions", "reads padding"],
)  # fmt: skip
def test_the_side_is_one_on_which_padding_changes_nothing(
    kind: type[Any], config: Any, family: str, right: bool, left: bool, own: str
) -> None:
    model, tokenizer = _model(kind, config).train(), FAMILIES[family]()
    tokenizer.padding_side = own
    before, flagged = state(model), flags(model)
    found = harmless_side(model, tokenizer, None)
    good = {"right": right, "left": left}
    assert found == (own if good[own] else next((s for s, g in good.items() if g), None))
    assert same_state(model, before) and flags(model) == flagged
    assert tokenizer.padding_side == own


def test_a_language_model_is_padded_behind_and_others_are_tried() -> None:
    tokenizer = FAMILIES["llama with padding"]()
    tokenizer.padding_side = "left"
    config = LlamaConfig(**LLAMA)
    assert known_inputs(_model(LlamaForCausalLM, config), tokenizer)["side"] == "right"
    bert = FAMILIES["bert"]()
    known = known_inputs(_model(ReadsPadding, BertConfig(vocab_size=80, **BERT)), bert)
    assert known["pads"] is False


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_show_no_side(value: float) -> None:
    model = _model(BertForSequenceClassification, BertConfig(**BERT, vocab_size=80))
    with torch.no_grad():
        model.classifier.bias[0] = value
    assert harmless_side(model, FAMILIES["bert"](), None) is None


def test_a_model_that_needs_more_than_text_is_believed() -> None:
    text = {**BERT, "vocab_size": 80, "projection_dim": 8}
    model = _model(CLIPModel, CLIPConfig(text_config=text, vision_config={"image_size": 16}))
    tokenizer = FAMILIES["bert"]()
    tokenizer.padding_side = "left"
    assert harmless_side(model, tokenizer, None) == "left"


def test_another_side_than_the_tokenizers_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.txt").write_text("the film\nwas good\n")
    model, tokenizer = _model(BertModel, BertConfig(vocab_size=80, **BERT)), FAMILIES["bert"]()
    for side, told in (("left", True), ("right", False)):
        tokenizer.padding_side = side
        opened = OpenedModel(model, tokenizer, None)
        found: Any = open_examples(str(tmp_path / "x.txt"), opened, DataOptions())
        words = "texts are padded on the right: on the left, the tokenizer's side, padding may"
        assert (words in capsys.readouterr().err) == told
        assert any(words in note for note in found.account.notes) == told
