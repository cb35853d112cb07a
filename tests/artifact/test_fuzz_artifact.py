"""Damaged folders: each is refused by name, or opens as the model that was saved.

Every damage is drawn under its number, so that one that fails can be made again:
``damaged(FOLDER, number, COPY)``.
"""

from __future__ import annotations

import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import rankfold
from benchmarks.damages import damage_json, damaged, damaged_for_transformers
from rankfold import ArtifactError
from tests.small_models import SmallCNN, image_data, seeded, token_data, trained_cnn

SECONDS = 20  # no load may take longer, on a busy machine
GIGABYTE = 1 << 30


@contextmanager
def limited(what: str) -> Iterator[None]:
    """Stop what takes too long; memory that it asks for beyond a gigabyte is refused to it."""

    def late(*_: object) -> None:
        raise TimeoutError(f"{what}: not opened and not refused in {SECONDS} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + GIGABYTE, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


def outside(root: Path) -> list[tuple[str, int, int]]:
    """All that stands around a damaged folder, with sizes and times of change."""
    return [
        (str(path), path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in sorted(root.rglob("*"))
    ]


def same_model(model: nn.Module, expected: nn.Module) -> bool:
    pairs = zip(model.state_dict().items(), expected.state_dict().items(), strict=True)
    buffers = zip(model.named_buffers(), expected.named_buffers(), strict=True)
    return str(model) == str(expected) and all(
        name == other and tensor.dtype == wanted.dtype and torch.equal(tensor, wanted)
        for (name, tensor), (other, wanted) in (*pairs, *buffers)
    )


def hammer(
    source: Path,
    numbers: range,
    work: Path,
    open_folder: Callable[[Path], nn.Module],
    expected: nn.Module,
    damage: Callable[[Path, int, Path], str] = damaged,
) -> int:
    """Open damaged copies of a folder.

    Returns:
        How many were refused.
    """
    (work / "neighbour.txt").write_text("not to be touched")
    refused = 0
    for number in numbers:
        target = work / "folder"
        told = f"{number}: {damage(source, number, target)}"
        before = outside(work)
        try:
            with limited(told):
                model = open_folder(target)
            assert same_model(model, expected), told
        except ArtifactError as error:
            refused += 1
            assert str(target) in str(error) or "config.json" in str(error), told
        except OSError as error:  # transformers' own word where there is no file of weights
            assert damage is damaged_for_transformers, told
            assert "model.safetensors" in str(error), told
            refused += 1
        except UnpicklingError as error:  # of a weights file that is called pytorch_model.bin now
            assert damage is damaged_for_transformers and "renamed" in told, told
            assert "Weights only load failed" in str(error), told
            refused += 1
        except Exception as error:
            raise AssertionError(told) from error
        assert outside(work) == before, told
        shutil.rmtree(target)
    assert not Path("executed").exists()
    return refused


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = rankfold.lossless(trained_cnn(), image_data(40), size=0.5)
    return result.save(tmp_path_factory.mktemp("own") / "a")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cast after it was made, so that a buffer's type is told by the manifest."""
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = seeded(5, lambda: LlamaForCausalLM(config)).bfloat16().eval()
    result = rankfold.lossless(model, token_data(), size=0.8)
    return result.save(tmp_path_factory.mktemp("llama") / "a")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work").mkdir()


def test_damaged_folders_of_an_own_class(own: Path, tmp_path: Path) -> None:
    expected = rankfold.load(own, SmallCNN())
    refused = hammer(
        own, range(1400), tmp_path / "work", lambda f: rankfold.load(f, SmallCNN()), expected
    )
    assert 900 < refused < 1400


def test_damaged_folders_of_a_transformers_model(llama: Path, tmp_path: Path) -> None:
    expected = rankfold.load(llama)
    refused = hammer(llama, range(1000), tmp_path / "work", rankfold.load, expected)
    assert 600 < refused < 1000


def test_damaged_configurations_that_are_opened_all_the_same(llama: Path, tmp_path: Path) -> None:
    """Without the digests: what transformers makes of them is another model, or refused."""
    for number in range(300):
        target = tmp_path / "folder"
        shutil.copytree(llama, target)
        told = f"{number}: {damage_json(target / 'config.json', random.Random(number))}"
        try:
            with limited(told):
                assert isinstance(rankfold.load(target, as_saved=False), LlamaForCausalLM), told
        except ArtifactError:
            pass
        except Exception as error:
            raise AssertionError(told) from error
        shutil.rmtree(target)


def test_damaged_folders_through_from_pretrained(llama: Path, tmp_path: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(llama)
    assert same_model(expected, rankfold.load(llama))
    refused = hammer(
        llama,
        range(400),
        tmp_path / "work",
        AutoModelForCausalLM.from_pretrained,
        expected,
        damaged_for_transformers,
    )
    assert 200 < refused < 400
