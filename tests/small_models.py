"""Tiny models and data that many tests share; every function gives a fresh, equal object."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

import rankfold
from rankfold.data.parts import Data, Part, as_part

CLASSES = 5
VOCABULARY = 48


class SmallCNN(nn.Module):
    """Three convs, one without a bias, a BatchNorm with buffers, one Linear; 8x8 images."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
        )
        self.head = nn.Linear(8 * width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).flatten(1))


class SmallMLP(nn.Module):
    """Six inputs, ``CLASSES`` logits."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.first = nn.Linear(6, width)
        self.second = nn.Linear(width, width, bias=False)
        self.last = nn.Linear(width, CLASSES)

    def forward(self, values: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(values))
        return self.last(torch.tanh(self.second(hidden)))


def seeded(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    """Build a module under a seed, leaving torch's own random state alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def images(count: int, seed: int) -> TensorDataset:
    """Random images with labels drawn from the predictions of a teacher of pooled pixels."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, 3, 8, 8, generator=generator)
    teacher = torch.randn(48, CLASSES, generator=torch.Generator().manual_seed(99))
    pooled = functional.avg_pool2d(values, 2).flatten(1)
    chances = (pooled @ teacher).softmax(-1)
    return TensorDataset(values, torch.multinomial(chances, 1, generator=generator)[:, 0])


@cache
def _trained_cnn() -> nn.Module:
    model = seeded(1, SmallCNN)
    values, labels = images(1000, seed=1).tensors
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(2)
    for _ in range(200):
        rows = torch.randint(len(values), (64,), generator=generator)
        optimizer.zero_grad()
        functional.cross_entropy(model(values[rows]), labels[rows]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def trained_cnn() -> SmallCNN:
    return copy.deepcopy(_trained_cnn())


def image_data(count: int = 120) -> Data:
    """Three parts of fresh images, ``count`` of each."""
    return Data(*(images(count, seed) for seed in (11, 12, 13)))


def mlp() -> SmallMLP:
    return seeded(3, SmallMLP)


def pairs(count: int, seed: int = 0) -> list[tuple[Tensor, int]]:
    """Examples for ``SmallMLP``."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, 6, generator=generator)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return list(zip(values, labels.tolist(), strict=True))


def pair_part(count: int, seed: int = 0, name: str = "calibration") -> Part:
    return as_part(name, pairs(count, seed))


def tiny_llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Random weights, tied embeddings, grouped-query attention."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.2,  # ten times the usual: attention is far from uniform
    )
    return seeded(5, lambda: LlamaForCausalLM(config)).to(dtype).eval()


def token_windows(count: int, seed: int = 0, length: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(VOCABULARY, (count, length), generator=generator))


def token_data(count: int = 12) -> Data:
    return Data(*(token_windows(count, seed) for seed in (21, 22, 23)))


def model_and_artifact(top: Path) -> dict[str, Path]:
    """Folders of a small language model, and of an artifact of it."""
    model = tiny_llama()
    model.save_pretrained(top / "model")
    result = rankfold.lossless(model, token_data(), size=0.9, effort="fast")
    result.save(top / "artifact")
    return {"model": top / "model", "artifact": top / "artifact"}


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(model: nn.Module, before: dict[str, Tensor]) -> bool:
    """Whether all parameters and buffers are bit for bit what they were."""
    now = model.state_dict()
    return now.keys() == before.keys() and all(
        now[name].dtype == tensor.dtype and torch.equal(now[name], tensor)
        for name, tensor in before.items()
    )


def flags(model: nn.Module) -> tuple[list[bool], list[bool], list[int], list[bool]]:
    """Training flags, requires_grad, number of hooks, whether a gradient is there."""
    return (
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [
            len(module._forward_hooks)
            + len(module._forward_pre_hooks)
            + len(module._backward_hooks)
            for module in model.modules()
        ],
        [parameter.grad is not None for parameter in model.parameters()],
    )
