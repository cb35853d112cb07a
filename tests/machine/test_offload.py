from __future__ import annotations

import errno
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rankfold
from benchmarks.memory import anonymous_bytes
from rankfold import Data, InputError
from rankfold.machine import offload
from rankfold.machine.offload import Offload
from rankfold.search.build import look_at
from tests.rounds import first_round
from tests.small_models import (
    SmallCNN,
    image_data,
    pairs,
    same_state,
    seeded,
    state,
    tiny_llama,
    token_data,
    trained_cnn,
)

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors lie in files, too."""
    monkeypatch.setattr(offload, "SMALL", 0)


def files_of(folder: Path) -> list[str]:
    """Files of a folder that are mapped into this process."""
    mapped = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in mapped if str(folder) in line]


def test_without_a_folder_tensors_lie_in_memory() -> None:
    values = torch.ones(3, 2)
    assert Offload().kept(values) is values
    assert torch.equal(Offload().zeros(2, 3, dtype=torch.float64, device="cpu"), torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "values",
    [
        torch.randn(5, 7),
        torch.randn(5, 7).T,
        torch.randn(6, 4)[::2],
        torch.zeros(0, 3),
        torch.ones(()),
    ],
    ids=["contiguous", "transposed", "with gaps", "empty", "scalar"],
)
def test_what_is_kept_is_the_same(
    values: torch.Tensor, dtype: torch.dtype, tmp_path: Path, everything: None
) -> None:
    values = values.to(dtype)
    kept = Offload(tmp_path).kept(values)
    assert kept.dtype == dtype
    assert torch.equal(kept, values)
    assert kept.stride() == torch.empty_like(values).stride()


def test_zeros_can_be_added_to(tmp_path: Path, everything: None) -> None:
    first, second = (
        Offload(tmp_path).zeros(3, 4, dtype=torch.float64, device="cpu") for _ in range(2)
    )
    first += 2
    assert torch.equal(first, torch.full((3, 4), 2.0))
    assert not second.any()


@on_linux
def test_large_tensors_take_no_memory_and_leave_no_file(tmp_path: Path) -> None:
    before = anonymous_bytes()
    large = Offload(tmp_path).zeros(64, 1 << 18, dtype=torch.float32, device="cpu").fill_(1)
    small = Offload(tmp_path).zeros(2, 3, dtype=torch.float32, device="cpu")
    assert anonymous_bytes() - before < 2**23 < large.nbytes
    assert len(files_of(tmp_path)) == 1
    assert not list(tmp_path.iterdir())
    del large, small
    assert not files_of(tmp_path)


CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "convs": (trained_cnn, image_data, {"size": 0.5}),
    "blocks": (
        lambda: seeded(5, lambda: nn.Sequential(nn.Linear(6, 48), nn.Tanh(), nn.Linear(48, 10))),
        lambda: Data(*(pairs(60, seed) for seed in (1, 2, 3))),
        {"size": 0.8},
    ),
    "two rounds": (tiny_llama, token_data, {"size": 0.8, "rounds": 2}),
    "embeddings": (tiny_llama, token_data, {"size": 0.8, "embeddings": True}),
    "first-order": (trained_cnn, image_data, {"size": 0.5, "objective": "first-order"}),
}


@pytest.mark.processors
@pytest.mark.parametrize("case", CASES)
def test_a_result_is_the_same_to_the_bit(case: str, tmp_path: Path, everything: None) -> None:
    make, data, options = CASES[case]
    model = make()
    before = state(model)
    expected = rankfold.lossless(model, data(), **options)
    found = rankfold.lossless(model, data(), offload_folder=str(tmp_path), **options)
    assert same_state(found.model, state(expected.model))
    assert found.report["layers"] == expected.report["layers"]
    assert found.report["settings"] == expected.report["settings"]
    assert same_state(model, before)
    assert not list(tmp_path.iterdir())


@on_linux
def test_what_all_layers_have_lies_in_files(tmp_path: Path, everything: None) -> None:
    prepared = first_round(trained_cnn(), image_data(), offload_folder=tmp_path)
    convs = [
        name for name, layer in prepared.study.subject.layers.items() if layer.weight.dim() == 4
    ]
    mapped = len(files_of(tmp_path))
    # Of a layer the factors of its spectrum, its direction if a step is taken; of a conv both
    # Grams, too.
    directions = len(prepared.step.directions.by_layer)
    assert directions == (len(prepared.spectra) if prepared.step.eta else 0)
    assert mapped >= 2 * len(prepared.spectra) + directions + 2 * len(convs)
    plan = prepared.plan(0.6 * prepared.factorizable)
    looked_at = look_at(prepared, plan)
    # The weights of all layers, and the factors of blocks.
    assert len(files_of(tmp_path)) >= mapped + len(plan)
    del prepared, looked_at
    assert not files_of(tmp_path)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for wrong in (tmp_path / "missing", file):
        with pytest.raises(InputError, match=f"offload folder {wrong} is no folder; expected"):
            rankfold.lossless(trained_cnn(), image_data(), size=0.5, offload_folder=wrong)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match=r"can't be made in the offload folder .*Permission"):
        Offload(tmp_path)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, everything: None) -> None:
    whole = Offload(tmp_path)

    def full(file: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(offload, "_reserve", full)
    with pytest.raises(InputError, match=r"4,000 bytes .* No space left .* 30 free bytes"):
        whole.zeros(10, 100, dtype=torch.float32, device="cpu")
    assert not list(tmp_path.iterdir())


def test_who_has_too_little_memory_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(1, SmallCNN)
    count = sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(offload, "available_memory", lambda: 36 * count - 1)
    room = offload.with_room(Offload(tmp_path), None, model)
    assert room == Offload(tmp_path, memory=40 * count - 1)
    told = offload.advice(count, room)
    assert told is not None
    assert f"{count:,} parameters may need some {40 * count / 1e6:.2f} MB at once" in told
    assert f"kept in {tmp_path}" in told
    monkeypatch.setattr(offload, "available_memory", lambda: 36 * count)
    for unknown in (False, True):
        if unknown:
            monkeypatch.setattr(offload, "available_memory", lambda: None)
        assert offload.with_room(Offload(), None, model) == Offload()
        assert offload.advice(count, Offload()) is None


def test_a_limit_of_memory_decides_how_statistics_are_collected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = seeded(1, SmallCNN)
    count = sum(p.numel() for p in model.parameters())
    there = Path(tempfile.gettempdir())
    assert offload.with_room(Offload(), 40 * count, model) == Offload()
    assert offload.with_room(Offload(), 40 * count - 1, model) == Offload(there, 40 * count - 1)
    named = Offload(blocks=("features",))
    assert offload.with_room(named, 1 << 40, model) == replace(named, folder=there, memory=1 << 40)
    monkeypatch.setattr(offload, "LARGEST", 4)  # one layer has most of this model's weights
    least = offload.LARGEST * max(p.numel() for p in model.parameters())
    short = Offload(there, 8 * count - 1, weights=True)
    assert least < 8 * count  # of float32: two copies of the weights
    assert offload.with_room(Offload(), 8 * count - 1, model) == short
    assert offload.with_room(Offload(), 8 * count, model) == Offload(there, 8 * count)
    with pytest.raises(InputError, match=r"memory is 0\.\d\d MB, .* 0\.\d\d MB or more"):
        offload.with_room(Offload(), least - 1, model)
    with pytest.raises(InputError, match="memory is given, but the model is on a GPU"):
        offload.with_room(Offload(), 1 << 40, seeded(1, SmallCNN).to("meta"))


AMOUNTS = {"8GB": 8 * 10**9, "1.5 gb": 1_500_000_000, "2GiB": 2 << 30, "900MB": 9 * 10**8, 77: 77}


@pytest.mark.parametrize("amount", AMOUNTS)
def test_amounts_of_memory(amount: str | int) -> None:
    assert offload.memory_of(amount) == AMOUNTS[amount]


@pytest.mark.parametrize(
    "amount", ["8", "GB", "-1GB", "8 apples", "", "nanGB", 0, -3, True, 1.5, None]
)
def test_amounts_that_are_none(amount: object) -> None:
    with pytest.raises(InputError, match="expected an amount with its unit, such as 8GB"):
        offload.memory_of(amount)


@on_linux
def test_available_memory_is_the_machines_or_its_containers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, machine = tmp_path / "limit", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(offload, "LIMITS", (limit,))
    assert 0 < (offload.available_memory() or 0) <= machine
    limit.write_text("max\n")
    assert 4096 < (offload.available_memory() or 0) <= machine
    limit.write_text("4096\n")
    assert offload.available_memory() == 4096


@on_linux
@pytest.mark.parametrize("line", ["0::/outer/inner", "7:cpu,memory:/outer/inner"])
def test_available_memory_is_that_of_the_own_control_group_or_of_one_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    groups, inner = tmp_path / "cgroup", tmp_path / "outer" / "inner"
    monkeypatch.setattr(offload, "LIMITS", (tmp_path / "limit",))
    monkeypatch.setattr(offload, "OWN_GROUPS", groups)
    inner.mkdir(parents=True)
    groups.write_text(f"3:cpuset:/other\n{line}\n")
    (inner / "limit").write_text("9000\n")
    assert offload.available_memory() == 9000
    (inner.parent / "limit").write_text("8000\n")
    assert offload.available_memory() == 8000
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "limit").write_text("1\n")
    assert offload.available_memory() == 8000


def test_a_model_elsewhere_is_refused(tmp_path: Path) -> None:
    model = seeded(1, SmallCNN).to("meta")
    with pytest.raises(InputError, match=r"the model is on meta, .* expected a model on the CPU"):
        rankfold.lossless(model, image_data(), size=0.5, offload_folder=tmp_path)
