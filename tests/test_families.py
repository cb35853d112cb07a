"""Small models of real architectures, end to end: compress, save, reload, compare.

Random weights: the loss says little, and is not what is tested. What is: every layer is found or
listed, the reloaded model computes the same bit for bit, the numbers in the report are those of the
file, and a model whose matrices have low rank is recovered to it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import rankfold
from rankfold import InputError
from rankfold.forms.storage import factor_parameters
from rankfold.model.find_layers import find_layers
from rankfold.model.layer_matrix import matrix_shape, weight_matrix
from rankfold.model.replace import with_replaced
from rankfold.model.sizes import model_parameters
from rankfold.model.unpack import unpack
from rankfold.search.build import build
from rankfold.tasks.evaluation import on_device
from tests.rounds import first_round

WORDS = 64
RANK = 4
SMALL: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.1,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A model class, its small configuration, and what it is fed.

    Attributes:
        model: Name of the class in transformers.
        config: Name of the configuration's class.
        options: Of the configuration.
        data: Gives examples.
        task: What must be recognised, or is asked for.
        asked: Whether the task is asked for.
        dense: Parts of names of matrices that stay dense, beside embeddings, heads tied to them,
            and depthwise convs.
    """

    model: str
    config: str
    options: dict[str, Any]
    data: Callable[[], list[Any]]
    task: str
    asked: bool = False
    dense: tuple[str, ...] = field(default=())


def _tokens(count: int = 40, length: int = 10) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randint(3, WORDS, (count, length), generator=generator))


def _hidden_words() -> list[dict[str, Tensor]]:
    examples = []
    for window in _tokens():
        labels = torch.full_like(window, -100)
        labels[1:4] = window[1:4]
        examples.append({"input_ids": window, "labels": labels})
    return examples


def _labelled_text() -> list[dict[str, Any]]:
    return [{"input_ids": w, "labels": torch.tensor(i % 3)} for i, w in enumerate(_tokens())]


def _pairs_of_text() -> list[dict[str, Tensor]]:
    return [{"input_ids": w, "labels": w[:6].flip(0)} for w in _tokens()]


def _pictures(size: int = 32) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(40, 3, size, size, generator=generator)
    return [{"pixel_values": x, "labels": torch.tensor(i % 3)} for i, x in enumerate(images)]


def _pictures_with_texts() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": w, "pixel_values": torch.randn(3, 32, 32, generator=generator)}
        for w in _tokens()
    ]


def _sounds() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    sounds = torch.randn(40, 400, generator=generator)
    return [{"input_values": x, "labels": torch.tensor(i % 3)} for i, x in enumerate(sounds)]


def _sounds_with_texts() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_features": torch.randn(8, 40, generator=generator), "labels": w[:6]}
        for w in _tokens()
    ]


T5 = {
    "vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
BART = {
    "vocab_size": WORDS, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "max_position_embeddings": 64, "init_std": 0.1,
    "decoder_start_token_id": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VIT = {
    "image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.1, "num_labels": 3,
}  # fmt: skip
GPT = {"num_key_value_heads": 2}  # grouped-query attention

FAMILIES = {
    "llama": Family("LlamaForCausalLM", "LlamaConfig", SMALL | GPT, _tokens, "causal-lm"),
    "qwen3": Family(
        "Qwen3ForCausalLM", "Qwen3Config", SMALL | GPT | {"head_dim": 8}, _tokens, "causal-lm"
    ),
    "gemma2-sliding-window": Family(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        SMALL | GPT | {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8},
        _tokens,
        "causal-lm",
    ),
    "mistral-sliding-window": Family(
        "MistralForCausalLM", "MistralConfig", SMALL | GPT | {"sliding_window": 4}, _tokens,
        "causal-lm",
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
            "initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2,
        },
        _tokens,
        "causal-lm",
    ),
    "gpt-neox": Family("GPTNeoXForCausalLM", "GPTNeoXConfig", SMALL, _tokens, "causal-lm"),
    "opt": Family(
        "OPTForCausalLM", "OPTConfig",
        SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.1}, _tokens, "causal-lm",
    ),
    "phi": Family("PhiForCausalLM", "PhiConfig", SMALL | GPT, _tokens, "causal-lm"),
    "falcon": Family(  # its Linears write their product in another way
        "FalconForCausalLM", "FalconConfig", SMALL, _tokens, "causal-lm"
    ),
    "mixtral": Family(
        "MixtralForCausalLM", "MixtralConfig",
        SMALL | GPT | {"num_local_experts": 4, "num_experts_per_tok": 2}, _tokens, "causal-lm",
        dense=("gate",),
    ),
    "qwen2-moe": Family(
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig",
        SMALL | GPT | {
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1,
        },
        _tokens, "causal-lm", dense=("gate",),
    ),
    "gpt-oss": Family(  # experts with biases, their weights stored transposed
        "GptOssForCausalLM", "GptOssConfig",
        SMALL | GPT | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8,
                       "sliding_window": 4},
        _tokens, "causal-lm", dense=("router",),
    ),
    "mamba": Family(
        "MambaForCausalLM", "MambaConfig",
        {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        _tokens, "causal-lm", dense=("dt_proj", "mixer"),
    ),
    "bert": Family("BertForMaskedLM", "BertConfig", SMALL, _hidden_words, "masked-lm"),
    "roberta": Family(
        "RobertaForTokenClassification", "RobertaConfig", SMALL | {"num_labels": WORDS},
        _hidden_words, "token-classification",
    ),
    "distilbert": Family(
        "DistilBertForSequenceClassification", "DistilBertConfig",
        {"vocab_size": WORDS, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4,
         "num_labels": 3},
        _labelled_text, "classification",
    ),
    "bert-without-a-head": Family(
        "BertModel", "BertConfig", SMALL, _tokens, "embedding", dense=("pooler",)
    ),
    "t5": Family("T5ForConditionalGeneration", "T5Config", T5, _pairs_of_text, "seq2seq"),
    "bart": Family("BartForConditionalGeneration", "BartConfig", BART, _pairs_of_text, "seq2seq"),
    "marian": Family("MarianMTModel", "MarianConfig", BART, _pairs_of_text, "seq2seq"),
    "whisper": Family(
        "WhisperForConditionalGeneration", "WhisperConfig",
        BART | {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 16},
        _sounds_with_texts, "seq2seq",
    ),
    "wav2vec2": Family(  # its positions are a conv with groups, whose weight is weight-normed
        "Wav2Vec2ForSequenceClassification", "Wav2Vec2Config",
        SMALL | {
            "conv_dim": [16, 16], "conv_kernel": [10, 3], "conv_stride": [5, 2],
            "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 4, "classifier_proj_size": 16, "num_labels": 3,
            "mask_time_prob": 0.0,
        },
        _sounds, "classification",
    ),
    "resnet": Family(
        "ResNetForImageClassification", "ResNetConfig",
        {"embedding_size": 16, "hidden_sizes": [32, 48], "depths": [1, 1], "num_labels": 3},
        _pictures, "classification",
    ),
    "regnet-grouped": Family(  # the blocks of ResNeXt: 3x3 convs with groups between 1x1 convs
        "RegNetForImageClassification", "RegNetConfig",
        {"embedding_size": 16, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1],
         "groups_width": 8, "layer_type": "x", "num_labels": 3},
        _pictures, "classification",
    ),
    "efficientnet": Family(
        "EfficientNetForImageClassification", "EfficientNetConfig",
        {"width_coefficient": 0.5, "depth_coefficient": 0.2, "image_size": 32, "hidden_dim": 640,
         "initializer_range": 0.3,
         "num_labels": 3},
        _pictures, "classification",
    ),
    "mobilenet-v2": Family(
        "MobileNetV2ForImageClassification", "MobileNetV2Config",
        {"depth_multiplier": 0.35, "image_size": 32, "num_labels": 3},
        _pictures, "classification",
    ),
    "convnext": Family(
        "ConvNextForImageClassification", "ConvNextConfig",
        {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1], "num_labels": 3,
         "layer_scale_init_value": 1.0},
        _pictures, "classification",
    ),
    "vit": Family("ViTForImageClassification", "ViTConfig", VIT, _pictures, "classification"),
    "deit-without-labels": Family(
        "DeiTForImageClassification", "DeiTConfig", VIT, _pictures, "teacher", asked=True
    ),
    "swin": Family(
        "SwinForImageClassification", "SwinConfig",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1],
         "num_heads": [2, 4], "window_size": 4, "num_labels": 3},
        _pictures, "classification",
    ),
    "clip": Family(
        "CLIPModel", "CLIPConfig",
        {
            "text_config": SMALL,
            "vision_config": {k: v for k, v in VIT.items() if k != "num_labels"},
            "projection_dim": 16,
        },
        _pictures_with_texts, "teacher", asked=True,
    ),
}  # fmt: skip

PACKED, READS = "no: packed layers", "no: the model reads a layer's attributes"
NO_PAIRS = {
    **dict.fromkeys(
        ("mixtral", "qwen2-moe", "gpt-oss", "whisper", "wav2vec2", "regnet-grouped"), PACKED
    ),
    **dict.fromkeys(("t5", "mobilenet-v2", "vit", "deit-without-labels", "clip"), READS),
}
# The layer that is read, where a plan may leave it dense: then the pairs open.
READ_LAYER = dict.fromkeys(("vit", "deit-without-labels"), "patch_embeddings.projection")
# Of each kind of layer one, for the short run as on other processors.
AS_ON_OTHERS = ("llama", "gpt2", "wav2vec2", "resnet", "efficientnet")
SEEN: dict[str, dict[str, Any]] = {}  # reports of the runs so far, by family


def _model(family: Family) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(hf, family.config)(**family.options)
    model = getattr(hf, family.model)(config)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if norms:  # statistics of what they see, as after training: else signals fade to nothing
        pictures = torch.stack([example["pixel_values"] for example in _pictures()])
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            model.train()(pictures)
    return model.eval()


def _outputs(model: nn.Module, example: Any) -> dict[str, Tensor]:
    batch = {"input_ids": example} if torch.is_tensor(example) else dict(example)
    if getattr(model.config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = batch["labels"]
    batch = {key: value[None] for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        given = model(**on_device(batch, model))
    found = {key: value for key, value in given.items() if torch.is_tensor(value)}
    assert found
    return found


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.processors] if name in AS_ON_OTHERS else [])
        for name in FAMILIES
    ],
)
def test_compress_save_reload_compare(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = _model(family)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = rankfold.lossless(
        model, family.data(), size=0.75, size_of="factorizable",
        task=family.task if family.asked else None, gradient_step=False,
    )  # fmt: skip
    report = result.report
    assert report["task"] == family.task
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    kept, all_of = (report[k]["factorizable_parameters"] for k in ("factorized", "original"))
    assert 0.6 < kept / all_of <= 0.75

    first = family.data()[0]
    for key, value in _outputs(unpack(model).model, first).items():
        torch.testing.assert_close(value, _outputs(model, first)[key], atol=1e-4, rtol=1e-4)

    # Every matrix is factorizable or listed, and what is listed is what can't be.
    matrices = {
        path for path, module in unpack(model).model.named_modules()
        if any(p is not None and p.dim() > 1 for p in module._parameters.values())
    }  # fmt: skip
    listed = {e["name"]: (e["kind"], e["reason"]) for e in report["not_factorized"]}
    found = {entry["name"] for entry in report["layers"]}
    assert matrices <= found | listed.keys()
    for path in matrices & listed.keys():
        kind, reason = listed[path]
        expected = "Embedding" in kind or "shared with" in reason or "rank 1 already" in reason
        positions = any(word in kind.lower() for word in ("embed", "position"))
        assert expected or positions or any(p in path for p in family.dense), (path, kind, reason)

    folder = result.save(tmp_path / "out")
    assert report["factorized"]["parameters"] == model_parameters(result.model)
    assert report["factorized"]["bytes"] == (folder / "model.safetensors").stat().st_size
    again = rankfold.load(folder)
    assert type(again) is type(model)
    assert model_parameters(again) == model_parameters(result.model)
    outputs, reloaded = (_outputs(m, family.data()[0]) for m in (result.model, again))
    assert outputs.keys() == reloaded.keys()
    assert all(torch.equal(outputs[key], reloaded[key]) for key in outputs)
    opened = _outputs(type(model).from_pretrained(folder), family.data()[0])
    assert outputs.keys() == opened.keys()
    assert all(torch.equal(outputs[key], opened[key]) for key in outputs)

    dense = rankfold.export(folder, tmp_path / "dense", to="dense")
    assert dense.parameters == model_parameters(model)
    _close(_outputs(type(model).from_pretrained(dense.folder), family.data()[0]), outputs)
    SEEN[name] = report | {"pairs": NO_PAIRS.get(name, "yes")}
    if NO_PAIRS.get(name) == PACKED:
        with pytest.raises(InputError, match="made of several layers"):
            rankfold.export(folder, tmp_path / "pairs", to="pairs")
        return
    pairs = _opened_by_its_readme(rankfold.export(folder, tmp_path / "pairs", to="pairs").folder)
    cut = [entry["name"] for entry in report["layers"] if entry["rank"] is not None]
    if name in NO_PAIRS and any(READ_LAYER.get(name, "") in path for path in cut):
        with pytest.raises(AttributeError, match="Sequential"):
            _outputs(pairs, family.data()[0])
    else:
        _close(_outputs(pairs, family.data()[0]), outputs)


def _close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        largest = float(value.abs().max())
        torch.testing.assert_close(found[key], value, atol=1e-4 * largest, rtol=0)


def _opened_by_its_readme(folder: Path) -> nn.Module:
    _, code = (folder / "README.md").read_text().split("```python")
    names: dict[str, Any] = {}
    exec(code.partition("```")[0].replace('folder = "."', f"folder = {str(folder)!r}"), names)
    return names["model"]


def _support_matrix() -> str:
    """What the runs of this file showed, as Markdown."""
    lines = [
        "# Support",
        "",
        "Written by `tests/test_families.py` from what it ran, with small configurations and",
        "random weights of the classes of transformers; it fails where this file differs. To write",
        "it anew: `RANKFOLD_WRITE_SUPPORT=1 python -m pytest tests/test_families.py`. In every row",
        "statistics, factorization, saving and reloading were run, the latter by `rankfold.load`",
        "and by transformers' own `from_pretrained`; the reloaded model computed the same bit for",
        "bit on the same machine, and a model of the same class whose matrices have low rank was",
        "recovered to it. What `rankfold export --to dense` writes computed the same to 1e-4 of",
        "the largest output, and so did `--to pairs` where that column says yes. Modules without a",
        "matrix (norms) are not listed.",
        "",
        "| family | class | task | layers | unpacked modules | pairs | left dense, and why |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, family in FAMILIES.items():
        report = SEEN[name]
        reasons: dict[str, list[str]] = {}
        for entry in report["not_factorized"]:
            if entry["reason"] != "it holds no matrix":
                reason = re.sub(r"with .*:", "with another module:", entry["reason"])
                reason = re.sub(r"its \d+ groups", "its groups", reason)
                reason = re.sub(r" \(.*", "", reason)
                reasons.setdefault(reason, []).append(f"`{entry['name']}`")
        dense = "; ".join(
            ", ".join(names[:2])
            + (f" and {len(names) - 2} more" if len(names) > 2 else "")
            + f": {why}"
            for why, names in reasons.items()
        )
        cells = (
            name, f"`{family.model}`", family.task, str(len(report["layers"])),
            str(len(report["unpacked"])), report["pairs"], dense or "nothing",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def test_the_support_matrix_is_what_the_runs_showed() -> None:
    if SEEN.keys() != FAMILIES.keys():
        pytest.skip("not all families ran before this")
    file = Path(__file__).resolve().parents[1] / "docs" / "support.md"
    if os.environ.get("RANKFOLD_WRITE_SUPPORT"):
        file.write_text(_support_matrix())
    assert file.read_text() == _support_matrix()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_of_low_rank_is_recovered_to_it(name: str) -> None:
    """In float64, so that what is lost is what the factors lose, not what rounding does."""
    family = FAMILIES[name]
    # Where the layers are packed, the matrices are those of the unpacked model.
    model = unpack(_model(family).double()).model
    layers, _ = find_layers(model)
    with torch.no_grad():
        for layer in layers.values():
            u, sigma, v = torch.linalg.svd(weight_matrix(layer), full_matrices=False)
            low = (u[:, :RANK] * sigma[:RANK]) @ v[:RANK]
            layer.weight.copy_(low.view_as(layer.weight))
    prepared = first_round(
        model, family.data(), task=family.task if family.asked else None, gradient_step=False,
        conv_forms=False,
    )  # fmt: skip
    full = {n: min(matrix_shape(layer)) for n, layer in prepared.study.subject.layers.items()}
    shapes = {n: matrix_shape(layer) for n, layer in prepared.study.subject.layers.items()}
    budget = sum(
        factor_parameters(*shapes[n], RANK, "pivoted") if full[n] > RANK else out * in_
        for n, (out, in_) in shapes.items()
    )
    plan = prepared.plan(budget)
    ranks = {n: full[n] if choice.rank is None else choice.rank for n, choice in plan.items()}
    assert all(rank <= max(RANK, 0) or full[n] <= RANK for n, rank in ranks.items()), ranks
    assert prepared.predicted(plan) == pytest.approx(0, abs=1e-9)
    built = build(prepared, plan)
    factors = {n: m for n, m in built.named_modules() if hasattr(m, "to_dense")}
    assert factors
    dense = with_replaced(built, {n: m.to_dense() for n, m in factors.items()})
    counted = sum(
        factor_parameters(*shapes[n], plan[n].rank, "pivoted") for n in factors
    )  # fmt: skip
    stored = sum(m.left.numel() + m.right.numel() for m in factors.values())
    assert stored == counted
    outputs = [_outputs(m, family.data()[0]) for m in (model, built, dense)]
    for key, value in outputs[0].items():
        torch.testing.assert_close(outputs[1][key], value, atol=1e-7, rtol=1e-6)
        torch.testing.assert_close(outputs[2][key], outputs[1][key], atol=1e-9, rtol=1e-8)
