"""How many tokens a model of transformers takes: what its configuration and its positions allow."""

from __future__ import annotations

from typing import Any

from torch import nn

from rankfold.integrations.transformers import sentences_of

# What configurations call the most tokens of a text. Others, of sounds and images, are no such.
_LIMITS = (
    "max_position_embeddings", "max_encoder_position_embeddings", "max_decoder_position_embeddings",
    "max_target_positions", "max_seq_len",
)  # fmt: skip
USUAL = 512  # tokens an example, where a model takes more


def most_tokens(model: nn.Module) -> int | None:
    """The most tokens of a text that the model takes; None where nothing limits them.

    Relative positions and states that run along do not. Families such as RoBERTa count positions
    from behind the padding token, so that their first rows are no token's.
    """
    limits = [
        value
        for config in _text_configs(getattr(model, "config", None))
        for name in _LIMITS
        if isinstance(value := getattr(config, name, None), int) and value > 0
    ]
    limits += [
        module.num_embeddings - module.padding_idx - 1
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and name.rpartition(".")[2] == "position_embeddings"
        and module.padding_idx is not None
    ]
    return min(limits, default=None)


def only_length(model: nn.Module) -> int | None:
    """The one length that a model takes, None for nearly all: of Perceiver, the language model."""
    return most_tokens(model) if type(model).__name__ == "PerceiverForMaskedLM" else None


def default_length(model: nn.Module, tokenizer: Any = None) -> int:
    """Tokens an example where none are asked for: 512, or what model, tokenizer and folder take."""
    if (fixed := only_length(model)) is not None:
        return fixed
    own = getattr(tokenizer, "model_max_length", None)  # a huge number where there is no limit
    sentences = sentences_of(model)
    limits = [USUAL, most_tokens(model), own if isinstance(own, int) and own > 1 else None]
    limits.append(None if sentences is None else sentences.length())
    return min(limit for limit in limits if limit is not None)


def _text_configs(config: Any) -> list[Any]:
    """The configurations of the parts that read and write text, of a model of several."""
    if not hasattr(config, "get_text_config"):
        return [config]
    found = []
    for side in ({"decoder": True}, {"encoder": True}, {}):
        try:
            found.append(config.get_text_config(**side))
        except ValueError:  # it has several of them
            continue
    return found or [config]
