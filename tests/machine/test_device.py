from __future__ import annotations

import pytest
import torch
from torch import nn

from rankfold.errors import InputError
from rankfold.machine.device import check_device, device_of, unused_gpu


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"card {index}")


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0", "cuda:1"])
def test_devices_that_are_there(name: str, two_gpus: None) -> None:
    assert check_device(name) == torch.device(name)


@pytest.mark.parametrize("name", ["gpu", "", "cuda:2", "mps", "meta"])
def test_devices_that_are_not(name: str, two_gpus: None) -> None:
    with pytest.raises(InputError, match="expected cpu, cuda"):
        check_device(name)


def test_an_error_counts_the_gpus(monkeypatch: pytest.MonkeyPatch, two_gpus: None) -> None:
    with pytest.raises(InputError, match="sees 2 GPUs"):
        check_device("cuda:5")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="sees no GPU"):
        check_device("cuda")


def test_who_leaves_a_gpu_idle_is_told(two_gpus: None) -> None:
    assert 'device="cuda" would use the card 0' in str(unused_gpu(torch.device("cpu")))
    assert unused_gpu(torch.device("cuda", 0)) is None


def test_without_a_gpu_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert unused_gpu(torch.device("cpu")) is None


def test_where_a_model_is() -> None:
    assert device_of(nn.Linear(2, 2)) == "cpu"
    assert device_of(nn.Linear(2, 2, device="meta")) == "meta"
    assert device_of(nn.ReLU()) == "cpu"
