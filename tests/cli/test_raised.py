"""Errors of a user's own code, and of memory, through the real command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from rankfold.cli.raised import OWN_CODE, ending
from rankfold.errors import InputError
from rankfold.machine.memory import memory_message
from tests.command_line import make_project, rankfold

OWN = """
import torch
from net import Net, pairs


class Raising(Net):
    def forward(self, x):
        return super().forward(x) + {}["absent"]


class Items(torch.utils.data.Dataset):
    def __len__(self):
        return 90

    def __getitem__(self, place):
        if place == 50:
            raise LookupError("row 50 is damaged")
        return torch.zeros(1, 8, 8), place % 4


class Hungry(Net):
    def forward(self, x):
        return super().forward(x) + torch.empty(1 << 55).sum()


class Refusing(Net):
    def forward(self, x):
        raise MemoryError


def raising(): return Raising()
def items(): return Items()
def hungry(): return Hungry()
def refusing(): return Refusing()
def factory(): return 1 / 0


def collating():
    def collate(examples):
        raise OSError("no such tokenizer")
    return torch.utils.data.DataLoader(pairs(), batch_size=8, collate_fn=collate)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_project(tmp_path_factory.mktemp("own"))
    (folder / "own.py").write_text(OWN)
    return folder


def _run(project: Path, model: str, data: str, expect: int) -> str:
    arguments = ("--data", data, "--size", 0.9, "--out", "out")
    done = rankfold("lossless", model, *arguments, cwd=project, expect=expect)
    assert done.stdout == "" and not (project / "out").exists()
    return done.stderr


@pytest.mark.parametrize(
    ("model", "data", "ours", "theirs"),
    [
        ("own.py:raising", "net.py:pairs", "the model can't run", "KeyError: 'absent'"),
        ("net.py:net", "own.py:items", "reading example 50", "LookupError: row 50 is damaged"),
        ("net.py:net", "own.py:collating", "collate function", "OSError: no such tokenizer"),
        ("own.py:factory", "net.py:pairs", "own.py:factory()", "ZeroDivisionError"),
    ],
)
def test_an_exception_of_the_users_code_is_shown_under_one_line(
    project: Path, model: str, data: str, ours: str, theirs: str
) -> None:
    said = _run(project, model, data, OWN_CODE).partition("error: ")[2]
    message, _, rest = said.partition("\nTraceback (most recent call last):\n")
    assert ours in message and "\n" not in message
    assert theirs in rest and "own.py" in rest.splitlines()[0]
    assert "rankfold/cli" not in rest


@pytest.mark.parametrize("model", ["own.py:hungry", "own.py:refusing"])
def test_memory_that_runs_out_is_one_message(project: Path, model: str) -> None:
    said = _run(project, model, "net.py:pairs", 2).partition("error: ")[2]
    assert "memory" in said and "--batch-size" in said and "--offload-folder" in said
    assert "can't run" not in said and said.count("\n") == 1
    assert ("bytes more were asked for" in said) == (model == "own.py:hungry")


def _caused_by(error: Exception) -> Exception:
    try:
        raise InputError("transformers can't open it") from error
    except InputError as raised:
        return raised


@pytest.mark.parametrize(
    ("error", "needed"),
    [
        (MemoryError(), ""),
        (MemoryError("Unable to allocate 7.45 GiB for an array with shape (9,)"), "7.45 GiB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
         "9 bytes"),
        (RuntimeError("unable to mmap 4096 bytes from file <x>: Cannot allocate memory (12)"),
         "4,096 bytes"),
        (OSError(12, "Cannot allocate memory"), ""),
        (ImportError("libtorch.so: failed to map segment from shared object"), ""),
    ],
)  # fmt: skip
def test_every_way_to_say_that_memory_ran_out_is_known(error: Exception, needed: str) -> None:
    for one in (error, _caused_by(error)):
        said = memory_message(one)
        assert said is not None and needed in said
        assert ending(one) == (2, said, "")


@pytest.mark.parametrize("error", [RuntimeError("shapes"), OSError(2, "absent"), KeyError("k")])
def test_other_errors_are_not_of_memory(error: Exception) -> None:
    assert memory_message(error) is None
    assert ending(error) is None  # a fault of ours keeps its traceback
    assert ending(_caused_by(error)) == (2, "transformers can't open it", "")
