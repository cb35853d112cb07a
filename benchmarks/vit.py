"""A small vision transformer for CIFAR-10, which ``benchmarks.cifar_training`` trains.

No package that installs without a model hub has the weights of one. Architecture and module names
are those of transformers' ViT (Dosovitskiy et al. 2021), small enough for a CPU: 16 patches of 8x8
pixels.
"""

from __future__ import annotations

from typing import cast

from torch import nn

from benchmarks.cifar_nets import CLASSES

WIDTH, BLOCKS, HEADS, HIDDEN, PATCH = 160, 6, 5, 480, 8


def vit() -> nn.Module:
    """The untrained net."""
    from transformers import ViTConfig, ViTForImageClassification  # takes seconds

    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        intermediate_size=HIDDEN,
        image_size=32,
        patch_size=PATCH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.num_labels = CLASSES
    return cast("nn.Module", ViTForImageClassification(config))
