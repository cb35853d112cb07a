"""Statistics collected in parts are those of one pass, or the blocks are refused by name."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

import rankfold
from rankfold import InputError
from rankfold.data.parts import as_part
from rankfold.machine import offload
from rankfold.machine.offload import Offload
from rankfold.machine.tensor_file import TensorFile
from rankfold.model.blocks import checkpointed, find_blocks, named_blocks
from rankfold.search import interactions
from rankfold.search.study import Statistics, open_inputs, study_of
from rankfold.settings import Settings
from rankfold.statistics import by_block
from rankfold.statistics.layer_statistics import LayerStatistics
from rankfold.statistics.recorder import collect_statistics
from rankfold.tasks.supervised import Classification
from tests.small_models import CLASSES, same_state, seeded, state, tiny_llama, token_data
from tests.test_families import FAMILIES, _model

LITTLE = 1 << 10  # bytes: less than any model's weights, so a layer at a time


def statistics_of(name: str, where: Offload, **settings: Any) -> Statistics:
    family = FAMILIES[name]
    chosen = Settings(task=family.task if family.asked else None, limit=12, **settings)
    model = _model(family)
    before = state(model)
    found = study_of(open_inputs(model, family.data(), chosen), chosen, offload=where)
    assert same_state(model, before)
    assert all("forward" not in vars(module) for module in model.modules())
    return found.statistics


def tensors(found: dict[str, LayerStatistics]) -> dict[str, Tensor]:
    """All that statistics have, by layer and by what it is."""
    of_all: dict[str, Tensor | None] = {}
    for name, one in found.items():
        of_all[f"{name} A"], of_all[f"{name} B"] = one.input_gram, one.output_gram
        of_all[f"{name} product"] = one.product
        for half, gradient in enumerate(one.gradients or ()):
            of_all[f"{name} gradient {half}"] = gradient
        if one.dominant is not None:
            of_all[f"{name} dominant"] = one.dominant.inputs.T @ one.dominant.inputs
        of_all[f"{name} lacking"] = torch.tensor(one.lacking)
    return {name: values for name, values in of_all.items() if values is not None}


def same(found: dict[str, LayerStatistics], expected: dict[str, LayerStatistics]) -> None:
    assert list(found) == list(expected)
    one, other = tensors(found), tensors(expected)
    assert one.keys() == other.keys()
    apart = {
        name: float((one[name] - values).norm() / values.norm().clamp(min=1e-30))
        for name, values in other.items()
    }
    assert {name: by for name, by in apart.items() if not by < 3e-6} == {}


# What is cut: decoders, one without weights of its own between, an encoder, an encoder and a
# decoder that reads it in every block, convs, experts.
CUT: dict[str, dict[str, Any]] = {
    "llama": {"embeddings": True, "curvature": "empirical"},
    "gpt2": {"curvature": "sampled", "self_share": 0.2},
    "distilbert": {"effort": "fast", "curvature": "sampled"},
    "t5": {"curvature": "empirical"},
    "resnet": {"curvature": "sampled"},
    "swin": {"curvature": "empirical", "gradient_step": False},
    "vit": {"objective": "activation"},
    "mixtral": {"curvature": "sampled", "gradient_step": False},
    "mamba": {"curvature": "empirical"},
}


@pytest.fixture
def never_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_groups(*_: object) -> None:
        raise AssertionError("the model was not cut at its blocks")

    monkeypatch.setattr(by_block, "in_groups", in_groups)


@pytest.mark.usefixtures("never_in_groups")
@pytest.mark.parametrize("name", CUT)
def test_block_by_block_is_as_all_at_once(name: str, tmp_path: Path) -> None:
    expected = statistics_of(name, Offload(), **CUT[name])
    found = statistics_of(name, Offload(tmp_path, memory=1 << 40), **CUT[name])
    same(found.layers, expected.layers)
    assert found.embeddings.keys() == expected.embeddings.keys()
    for matrix, seen in expected.embeddings.items():
        for use, one in seen.uses.items():
            there = found.embeddings[matrix].uses[use]
            assert torch.allclose(there.gram, one.gram, rtol=1e-5, atol=0)
            assert torch.allclose(there.words, one.words, rtol=1e-5, atol=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("never_in_groups")
@pytest.mark.parametrize("name", ["t5", "resnet"])
def test_a_block_too_large_for_memory_is_run_again_for_each_layer(
    name: str, tmp_path: Path
) -> None:
    expected = statistics_of(name, Offload(), **CUT[name])
    same(statistics_of(name, Offload(tmp_path, LITTLE), **CUT[name]).layers, expected.layers)


@pytest.mark.parametrize("name", ["llama", "resnet"])
def test_groups_of_layers_are_as_all_at_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_block, "find_blocks", lambda _: {})
    expected = statistics_of(name, Offload(), **CUT[name])
    found = statistics_of(name, Offload(tmp_path, LITTLE), **CUT[name])
    one, other = tensors(found.layers), tensors(expected.layers)
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[key], other[key], rtol=1e-4, atol=1e-6) for key in other)


@pytest.mark.usefixtures("never_in_groups")
@pytest.mark.parametrize("effort", ["fast", "standard"])
def test_the_same_model_comes_out(
    effort: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "SMALL", 0)
    monkeypatch.setattr(interactions, "checkpointed", checked := Mock(wraps=checkpointed))
    options: dict[str, Any] = {"size": 0.8, "limit": 8, "effort": effort, "refit": False}
    expected = rankfold.lossless(tiny_llama(), token_data(), **options)
    model = tiny_llama()
    size = sum(p.numel() for p in model.parameters())
    found = rankfold.lossless(
        model, token_data(), memory=20 * size, offload_folder=tmp_path, **options
    )
    assert found.report["layers"] == expected.report["layers"]
    assert found.report["certificate"] == expected.report["certificate"]
    assert same_state(found.model, state(expected.model))
    assert not list(tmp_path.iterdir())
    blocks = [call.args[1] for call in checked.call_args_list]
    assert (["model.layers.0", "model.layers.1"] in blocks) == (effort == "standard")


class Inner(nn.Module):
    """A block with a part."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.part = nn.Linear(width, width)

    def forward(self, values: Tensor, *_: Tensor) -> Tensor:
        return values + torch.tanh(self.part(values))


class Blocks(nn.Module):
    """Three blocks and a head; ``way`` calls them."""

    def __init__(self, way: Callable[[Blocks, Tensor], Tensor], block: Any = Inner) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(3))
        self.head = nn.Linear(6, CLASSES)
        self.way = way

    def forward(self, values: Tensor) -> Tensor:
        return self.head(self.way(self, values))


def in_turn(model: Blocks, values: Tensor) -> Tensor:
    for block in model.blocks:
        values = block(values)
    return values


def skipping(model: Blocks, values: Tensor) -> Tensor:
    """What is between blocks reads what an earlier one gave, and changes what one gave in place."""
    first = model.blocks[0](values)
    second = model.blocks[1](torch.tanh(first), first)
    second += first
    return model.blocks[2](second.clone() * first) + second


def twice(model: Blocks, values: Tensor) -> Tensor:
    return in_turn(model, in_turn(model, values))


def by_the_way(model: Blocks, values: Tensor) -> Tensor:
    """A layer of a block is called outside of it."""
    return in_turn(model, values) + model.blocks[1].part(values)


def of_another(model: Blocks, values: Tensor) -> Tensor:
    """A weight of a block is read outside of it."""
    return in_turn(model, values) @ model.blocks[1].part.weight


def depending(model: Blocks, values: Tensor) -> Tensor:
    """Examples call other blocks."""
    positive = bool(values.sum() > 0)
    return model.blocks[int(positive)](values)


class Reading(Inner):
    """Reads what was put on it before its call."""

    told: Tensor

    def forward(self, values: Tensor, *others: Tensor) -> Tensor:
        return super().forward(values) * self.told


class Changing(Inner):
    def forward(self, values: Tensor, *others: Tensor) -> Tensor:
        values += 1
        return super().forward(values)


class Counting(Inner):
    """Gives something else each time, and the same where nobody runs it again."""

    calls = 0

    def forward(self, values: Tensor, *others: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(values) * (1 + 1 / self.calls)


def telling(model: Blocks, values: Tensor) -> Tensor:
    for block in model.blocks:
        block.told = values.mean(1, keepdim=True)
        values = block(values)
    return values


def collected(model: nn.Module, where: Offload) -> dict[str, LayerStatistics]:
    generator = torch.Generator().manual_seed(4)
    values = torch.randn(24, 6, generator=generator)
    part = as_part("calibration", [(x, i % CLASSES) for i, x in enumerate(values)])
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return collect_statistics(
        model, Classification(), part, layers, curvature="empirical", offload=where, batch_size=4
    )


@pytest.mark.usefixtures("never_in_groups")
@pytest.mark.parametrize("way", [in_turn, skipping])
def test_what_stands_between_blocks(way: Any, tmp_path: Path) -> None:
    model = seeded(1, lambda: Blocks(way))
    expected = collected(model, Offload())
    same(collected(model, Offload(tmp_path, memory=1 << 30)), expected)


UNSUITABLE: dict[str, tuple[Any, Any, str]] = {
    "called twice": (twice, Inner, "blocks.0 is called more than once in a pass"),
    "outside": (by_the_way, Inner, "blocks.1.part stands in blocks.1 and is called outside of it"),
    "weight": (of_another, Inner, "what is in none of them reads what it isn't called with"),
    "depending": (depending, Inner, "other examples call others"),
    "told": (telling, Reading, "blocks.[012] reads what|blocks.[012] gives something else"),
    "changing": (in_turn, Changing, "blocks.0 changes what it is called with"),
    "counting": (in_turn, Counting, "blocks.0 gives something else when it runs again"),
}


@pytest.mark.parametrize("case", UNSUITABLE)
def test_blocks_that_a_model_cannot_be_cut_at(case: str, tmp_path: Path) -> None:
    way, block, reason = UNSUITABLE[case]
    model = seeded(1, lambda: Blocks(way, block))
    named = Offload(tmp_path, memory=1 << 30, blocks=("blocks",))
    with pytest.raises(InputError, match=f"blocks: the model can't be cut at them: {reason}"):
        collected(model, named)
    if block is not Counting:  # blocks that were found are passed by where they are unsuitable
        expected = collected(model, Offload())
        found = collected(model, Offload(tmp_path, memory=1 << 30))
        one, other = tensors(found), tensors(expected)
        assert all(torch.allclose(one[key], other[key], rtol=1e-4, atol=1e-6) for key in other)
    assert not list(tmp_path.iterdir())


def test_blocks_are_found_in_every_kind_of_model() -> None:
    found = {name: [*find_blocks(_model(FAMILIES[name]))] for name in ("t5", "llama", "swin")}
    assert found["llama"] == ["model.layers.0", "model.layers.1"]
    assert found["t5"] == [
        *("encoder.block.0", "encoder.block.1"),
        *("decoder.block.0", "decoder.block.1"),
    ]
    assert found["swin"] == ["swin.encoder.layers.0", "swin.encoder.layers.1"]
    layers_alone = nn.ModuleDict({"list": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
    assert find_blocks(layers_alone) == {}


NAMES: dict[str, tuple[tuple[str, ...], str]] = {
    "none": (("layers",), r"no module 'layers' in LlamaForCausalLM; .* such as model\.layers"),
    "layer": (("model.layers.0.mlp.up_proj",), "is a Linear without parts"),
    "within": (("model.layers", "model.layers.1.mlp"), r"stands in model\.layers\.1; expected"),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_of_blocks_that_are_none(case: str) -> None:
    names, message = NAMES[case]
    with pytest.raises(InputError, match=message):
        named_blocks(tiny_llama(), names)


def test_named_blocks_are_lists_patterns_or_modules() -> None:
    model = tiny_llama()
    expected = ["model.layers.0", "model.layers.1"]
    for names in (("model.layers",), ("model.layers.*[01]",), (expected[1], expected[0])):
        assert [*named_blocks(model, names)] == expected


@pytest.fixture
def file(tmp_path: Path) -> Iterator[TensorFile]:
    with TensorFile(tmp_path) as opened:
        assert not list(tmp_path.iterdir())
        yield opened


def test_tensors_come_back_from_a_file_as_they_were(file: TensorFile) -> None:
    values = [
        torch.randn(3, 5),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(4, 6).T,
        torch.arange(7),
        torch.randn(3, 2).bfloat16(),
        torch.tensor(2.5, dtype=torch.float64),
        torch.zeros(0, 3),
        torch.tensor([True, False]),
        torch.randn(3, 1).expand(3, 4),
    ]
    kept = [file.put(one) for one in values]
    for one, there in zip(values, kept, strict=True):
        found = file.get(there)
        assert torch.equal(found, one)
        assert found.dtype == one.dtype
        assert found.stride() == torch.empty_like(one).stride()


def test_places_in_a_file_are_used_again(file: TensorFile) -> None:
    first = file.put(torch.ones(100))
    size = file.size
    file.free(first)
    file.put(torch.zeros(100))
    assert file.size == size
    file.put(torch.zeros(100))
    assert file.size == 2 * size


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with TensorFile(tmp_path) as file:
        monkeypatch.setattr(file, "_write", full)
        with pytest.raises(InputError, match=f"{tmp_path} can't be written: No space left.*limit="):
            file.put(torch.ones(3))
    with pytest.raises(InputError, match="can't be written: No such file"):
        TensorFile(tmp_path / "missing")
