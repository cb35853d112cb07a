"""Small factorized language models, with every form that vLLM's layers can hold side by side."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from rankfold.artifact.save import save_artifact
from rankfold.forms.embedding.fit import empty_uses
from rankfold.forms.registry import form_named
from rankfold.model.replace import put_modules
from tests.small_models import seeded

WORDS = 120
SIZES = {
    "vocab_size": WORDS, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3,
    "num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 256,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "head_dim": 32,
}  # fmt: skip
# Those whose own code vLLM has, by the name of their configuration.
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {},
    "Gemma": {"tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"},
    "Gemma2": {"query_pre_attn_scalar": 32},
    "Gemma3Text": {"query_pre_attn_scalar": 32, "sliding_window": 64},
    "Phi3": {},
    "Granite": {"tie_word_embeddings": True},
    "OPT": {"ffn_dim": 160, "word_embed_proj_dim": 96, "num_attention_heads": 3},
}
# In turn: what a layer is written as.
FORMS = ("pivoted", "pair", "row-blocks", "column-blocks", None)


def model_of(family: str, **settings: Any) -> nn.Module:
    """A causal language model with random weights, large enough that no two words tie."""
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES[family], **settings})
    name = family.removesuffix("Text")
    made = getattr(transformers, f"{name}ForCausalLM")
    model = seeded(5, lambda: made(config)).eval()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                scale = 2 / parameter.shape[1] ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            elif parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def factorized_folder(
    folder: Path, model: Any, *, embeddings: str | None = None, forms: tuple[Any, ...] = FORMS
) -> Path:
    """Write an artifact whose layers have the forms in turn; the factors are random."""
    generator = torch.Generator().manual_seed(3)
    entries: list[dict[str, Any]] = []
    modules: dict[str, nn.Module] = {}
    head = model.get_output_embeddings()
    turns = itertools.cycle(forms)
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) or layer is head:
            continue
        form = next(turns)
        if form is None:
            continue
        out, in_ = layer.weight.shape
        if form.endswith("blocks"):
            # Each block is to be longer than wide, as those that are found are.
            form = "row-blocks" if out >= in_ else "column-blocks"
        small = min(out, in_)
        ranks = (small // 3, small // 4) if form.endswith("blocks") else (small // 2,)
        pivots = form == "pivoted"
        modules[name] = form_named(form).empty(layer, form, ranks, pivots)
        _fill(modules[name], generator)
        second = ranks[1] if len(ranks) > 1 else None
        entry = {"name": name, "rank": ranks[0], "second_rank": second}
        entries.append({**entry, "form": form, "pivoted": pivots})
    if embeddings is not None:
        lookup = model.get_input_embeddings()
        named = dict(model.named_modules())
        uses = {n: m for n, m in named.items() if m is lookup}
        uses |= {n: m for n, m in named.items() if m is head and m.weight is lookup.weight}
        made = empty_uses(uses, 40, embeddings)
        first, *others = made.values()
        _fill(first, generator)
        for other in others:  # they share the factors, and have the same order each
            if other.order is not None:
                other.order.copy_(first.order)
        modules |= made
        entry = {"name": next(iter(uses)), "rank": 40, "second_rank": None, "form": embeddings}
        entries.append({**entry, "uses": list(uses)})
    put_modules(model, modules)
    save_artifact(folder, model, {"layers": entries})
    return folder


def _fill(module: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name == "order":
                tensor.copy_(torch.randperm(len(tensor), generator=generator))
            elif tensor.dim() == 2:
                tensor.copy_(
                    torch.randn(tensor.shape, generator=generator) / tensor.shape[1] ** 0.5
                )
