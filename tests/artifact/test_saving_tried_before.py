"""What can fail at saving fails before any work, names what it is, and leaves nothing behind.

The model notes each time that it computes something: it never does before a refusal.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import rankfold
from rankfold import InputError
from rankfold.artifact.save import try_saving
from rankfold.cli.commands import app
from rankfold.files.folder import check_output, folder_in_one_step
from tests.small_models import tiny_llama
from tests.tiny_language_model import TEXT, save_tiny_llama

NET = """
import pathlib

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 24)
        self.second = nn.Linear(24, 24)
        self.last = nn.Linear(24, 2)

    def forward(self, x):
        pathlib.Path(__file__).with_name("computed").touch()
        x = x.flatten(2).transpose(1, 2)
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x))))).mean(1)


def net():
    return Net()


def lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(2))


def odd_name():
    made = Net()
    made.add_module("half\\ud800", nn.Linear(3, 3))
    return made


def _llama():
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def unwritable_config():
    made = _llama()
    made.config.own = object()
    return made


def unwritable_settings():
    made = _llama()
    made.generation_config.temperature = 0.5
    return made
"""
SIZE = ("--size", "0.8", "--limit", "24", "--selection-limit", "12", "--held-out-limit", "24")
NET_RUN = ("lossless", "net.py:net", "--weights", "net.safetensors", "--data", "x.npz", *SIZE)
LLAMA_RUN = ("lossless", "llama", "--data", "text.txt", *SIZE)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    (folder / "net.py").write_text(NET)
    space: dict[str, Any] = {"__file__": str(folder / "net.py")}
    exec(NET, space)
    save_file(space["net"]().state_dict(), folder / "net.safetensors")
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (90, 4, 4, 3), dtype=np.uint8)
    np.savez(folder / "x.npz", x=x, y=rng.integers(0, 2, 90))
    (folder / "text.txt").write_text(TEXT)
    save_tiny_llama(folder / "llama")
    return folder


@pytest.fixture
def work(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(project, tmp_path / "work", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def refused(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 2, done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return " ".join(done.stderr.split())


def listed(folder: Path) -> set[str]:
    found = folder.parent.rglob("*")
    return {str(path) for path in found if "__pycache__" not in str(path)}


class Case(NamedTuple):
    """An output, what stands there, and words of the message."""

    out: str
    words: str
    before: Callable[[Path], object] = lambda work: None
    more: tuple[str, ...] = ()
    run: tuple[str, ...] = NET_RUN


def artifact(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rankfold.json").write_text("{}")


def _inside(folder: Path, name: str) -> None:
    """An earlier artifact that holds what the run reads."""
    artifact(folder)
    shutil.move(folder.parent / name, folder / name)


CASES: Mapping[str, Case] = {
    "name too long": Case("n" * 300, "File name too long"),
    "name too long in between": Case(f"a/{'n' * 256}/out", "File name too long"),
    "path too long": Case("/".join(["n" * 200] * 30), "File name too long"),
    # These two are refused by the reader of the command line.
    "half of a character": Case("half\ud800", "surrogates not allowed"),
    "zero byte": Case("zero\0byte", "embedded null byte"),
    "a file": Case("x.npz", "the output x.npz is a file"),
    "a file with --overwrite": Case("x.npz", "is a file", more=("--overwrite",)),
    "below a file": Case("net.py/out", "net.py/out can't be written: [Errno 20] Not a directory"),
    "a link to nothing": Case(
        "link", "is a link to nowhere, which does not exist",
        lambda w: (w / "link").symlink_to("nowhere"),
    ),
    "below a link to nothing": Case(
        "link/out", "link is a link to nowhere", lambda w: (w / "link").symlink_to("nowhere")
    ),
    "a link to itself": Case("link", "link", lambda w: (w / "link").symlink_to("link")),
    "a link to a file": Case("link", "is a file", lambda w: (w / "link").symlink_to("x.npz")),
    "current folder": Case(".", ". is the current folder or holds it"),
    "folder above": Case("..", ".. is the current folder or holds it"),
    "mount point": Case("/proc", "/proc is a mount point"),
    "where nobody may write": Case("/proc/out", "the output folder /proc/out can't be written"),
    "a folder of something else": Case(
        "thesis", "thesis exists and is not empty",
        lambda w: ((w / "thesis").mkdir(), (w / "thesis" / "a.tex").touch()),
    ),
    "the same with --overwrite": Case(
        "thesis", "holds no rankfold.json, so it is no earlier result",
        lambda w: ((w / "thesis").mkdir(), (w / "thesis" / "a.tex").touch()), ("--overwrite",),
    ),
    "holds the data": Case(
        "out", "out is or holds out/x.npz, which is read here",
        lambda w: _inside(w / "out", "x.npz"), ("--data", "out/x.npz", "--overwrite"),
    ),
    "holds the weights": Case(
        "out", "is or holds out/net.safetensors",
        lambda w: _inside(w / "out", "net.safetensors"),
        ("--weights", "out/net.safetensors", "--overwrite"),
    ),
    "the original itself": Case("llama", "llama exists and is not empty", run=LLAMA_RUN),
    "inside the original": Case("llama/out", "llama/out lies in", run=LLAMA_RUN),
    "inside the original by a link": Case(
        "link/out", "link/out lies in", lambda w: (w / "link").symlink_to("llama"), run=LLAMA_RUN
    ),
    "holds the original": Case(
        "out", "is or holds", lambda w: _inside(w / "out", "llama"), ("--overwrite",),
        ("lossless", "out/llama", *LLAMA_RUN[2:]),
    ),
    "weights whose name is no text": Case(
        "out", r"Rename its modules: half\ud800.weight",
        run=("lossless", "net.py:odd_name", "--data", "x.npz", *SIZE),
    ),
    "a model that can't be factorized": Case(
        "out", "isn't initialized yet: torch makes its parameters in the first call",
        run=("lossless", "net.py:lazy", "--data", "x.npz", *SIZE),
    ),
    "config that can't be written": Case(
        "out", "can't save the config of LlamaForCausalLM",
        run=("lossless", "net.py:unwritable_config", "--data", "net.py:odd_name", *SIZE),
    ),
    "generation settings of a function's model": Case(
        "out", "can't save the generation settings of LlamaForCausalLM",
        run=("lossless", "net.py:unwritable_settings", "--data", "net.py:odd_name", *SIZE),
    ),
    "generation settings of a folder": Case(
        "out", "Greedy methods (do_sample != True)",
        lambda w: (w / "llama" / "generation_config.json").write_text(
            '{"num_return_sequences": 4}'
        ),
        run=LLAMA_RUN,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_fails_at_saving_fails_before_any_work(name: str, work: Path) -> None:
    case = CASES[name]
    case.before(work)
    before = listed(work)
    message = refused(*case.run, *case.more, "--out", case.out)
    assert case.words in message, message
    assert "collect" not in message
    assert listed(work) == before


def test_a_disk_that_is_too_full_is_seen_before(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(work)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    before = listed(work)
    message = refused(*NET_RUN, "--out", "out")
    assert "it needs up to 2,752 bytes, and 1,000 are free there. Make room" in message
    assert listed(work) == before


def test_a_name_as_long_as_the_system_takes_is_taken(work: Path) -> None:
    out = "n" * 255
    for more in ((), ("--overwrite",)):
        done = CliRunner().invoke(app, [*NET_RUN, "--out", out, *more])
        assert done.exit_code == 0, done.output
    assert rankfold.recorded_inputs(work / out).prepared_by == "rankfold"


def test_a_link_to_a_folder_stays_one(work: Path) -> None:
    (work / "disk").mkdir()
    (work / "out").symlink_to("disk")
    done = CliRunner().invoke(app, [*NET_RUN, "--out", "out"])
    assert done.exit_code == 0, done.output
    assert (work / "out").is_symlink() and (work / "disk" / "rankfold.json").is_file()


def test_names_of_classes_that_are_no_text_are_written(work: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(90):
        folder = work / "images" / ("fine", os.fsdecode(b"caf\xe9"))[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    data = ("--data", "images", "--image-size", "4", "--json")
    done = CliRunner().invoke(app, [*NET_RUN, *data, "--out", "out"])
    assert done.exit_code == 0, done.output
    written = json.loads((work / "out" / "rankfold.json").read_bytes())
    assert {c["value"] for c in written["sources"][0]["classes"]} == {"fine", "caf\udce9"}
    again = CliRunner().invoke(
        app, ["evaluate", "out", "--model", "net.py:net", "--data", "images", "--json"]
    )
    assert again.exit_code == 0, again.output


class Refusing:
    """A tokenizer that transformers can't save."""

    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("half")
        raise NotImplementedError("no vocabulary")


def test_python_may_try_before_too(tmp_path: Path) -> None:
    model = tiny_llama()
    try_saving(tmp_path / "new" / "out", model)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="can't save the Refusing of LlamaForCausalLM: no vocab"):
        try_saving(tmp_path / "out", model, tokenizer=Refusing())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [("half\ud800", "a lone surrogate"), ("zero\0byte", "a zero byte"), ("n" * 300, "too long")],
)
def test_names_that_no_system_takes_are_named_in_python(
    name: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"the output folder .* can't be written: .*{words}"):
        try_saving(tmp_path / name, tiny_llama())


PIECES = st.text(st.characters(exclude_characters="/"), min_size=1, max_size=300)


@settings(max_examples=60, deadline=None)
@given(st.lists(PIECES, min_size=1, max_size=3))
def test_a_name_that_is_tried_can_be_written_and_others_are_named(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[str]
) -> None:
    root = tmp_path_factory.mktemp("names")
    target = root.joinpath(*(piece for piece in pieces if piece not in (".", ".."))) / "x"
    try:
        check_output(target, False, "mark")
    except InputError as error:
        assert "can't be written" in str(error)
        assert list(root.iterdir()) == []
        return
    with folder_in_one_step(target) as draft:
        (draft / "mark").touch()
    assert (target / "mark").is_file()


def test_a_failure_leaves_no_parent_behind(tmp_path: Path) -> None:
    target = tmp_path / "new" / "deeper" / "out"
    with pytest.raises(InputError, match="No space left"), folder_in_one_step(target):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []
