"""Files that change while a command runs: the run ends without a result, and names them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rankfold.cli.inputs import unchanged
from rankfold.errors import InputError
from rankfold.files.unchanged import Unchanged
from rankfold.integrations.transformers import load_folder
from tests.command_line import environment
from tests.small_models import tiny_llama

# A language model that waits where its data are read, until the file "go" is there.
DATA = """
import pathlib, time
import torch


class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 48

    def __getitem__(self, place):
        if place == 0:
            pathlib.Path("started").touch()
            while not pathlib.Path("go").exists():
                time.sleep(0.01)
        return torch.randint(0, 50, (12,), generator=torch.Generator().manual_seed(place))


def slow():
    return Slow()
"""


def _overwrite_in_place(file: Path) -> None:
    """As a copy onto the file does: the same inode, other weights."""
    other = {name: tensor + 0.5 for name, tensor in load_file(file).items()}
    save_file(other, file.with_suffix(".new"), metadata={"format": "pt"})
    with file.open("r+b") as opened:
        opened.write(file.with_suffix(".new").read_bytes())
    file.with_suffix(".new").unlink()


def _replace(file: Path) -> None:
    shutil.copyfile(file, file.with_suffix(".new"))
    with file.with_suffix(".new").open("ab") as opened:
        opened.write(b" ")
    file.with_suffix(".new").replace(file)


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _append(file: Path) -> None:
    with file.open("ab") as opened:
        opened.write(b"\n")


def _add(file: Path) -> None:
    file.write_text("{}")


CHANGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "another checkpoint in place": ("model.safetensors", _overwrite_in_place),
    "a truncated checkpoint": ("model.safetensors", _truncate),
}


# The same without a run, whose start takes the time of all of these.
OTHERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    **CHANGES,
    "weights replaced": ("model.safetensors", _replace),
    "weights gone": ("model.safetensors", Path.unlink),
    "a configuration edited": ("config.json", _append),
    "a tokenizer that came": ("tokenizer_config.json", _add),
}


@pytest.mark.parametrize(("name", "change"), OTHERS.values(), ids=OTHERS)
def test_every_file_of_a_model_is_looked_at(
    tmp_path: Path, name: str, change: Callable[[Path], None]
) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "notes.md").write_text("no input")
    found = unchanged(models=[str(tmp_path / "model")])
    (tmp_path / "model" / "notes.md").unlink()
    found.check_read()
    change(tmp_path / "model" / name)
    with pytest.raises(InputError, match=name):
        found.check_read()
    with pytest.raises(InputError, match=name):
        found.check()


def test_every_kind_of_data_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "pictures" / "a").mkdir(parents=True)
    (tmp_path / "pictures" / "b").mkdir()
    for place in ("a/1.png", "b/2.png"):
        (tmp_path / "pictures" / place).write_bytes(b"png")
    (tmp_path / "data.py").write_text(DATA)
    (tmp_path / "text.txt").write_text("words")
    changed: dict[str, Path] = {
        str(tmp_path / "pictures"): tmp_path / "pictures" / "a" / "3.png",
        f"{tmp_path / 'data.py'}:slow": tmp_path / "data.py",
        str(tmp_path / "text.txt"): tmp_path / "text.txt",
    }
    for spec, file in changed.items():
        found = unchanged(data=[spec, "self", None])
        (tmp_path / "pictures" / "training.log").write_text(spec)
        found.check()
        file.write_text("other")
        with pytest.raises(InputError, match=re.escape(str(file))):
            found.check()


@pytest.mark.parametrize(("name", "change"), CHANGES.values(), ids=CHANGES)
def test_a_model_that_changes_during_a_run_gives_no_result(
    tmp_path: Path, name: str, change: Callable[[Path], None]
) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    (tmp_path / "data.py").write_text(DATA)
    command = [
        str(Path(sys.executable).parent / "rankfold"), "lossless", "model", "--data",
        "data.py:slow", "--size", "0.9", "--out", "out", "--effort", "fast",
    ]  # fmt: skip
    variables = environment() | {"RANKFOLD_HOME": str(tmp_path), "HOME": str(tmp_path)}
    with subprocess.Popen(
        command, cwd=tmp_path, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    ) as process:  # fmt: skip
        while not (tmp_path / "started").exists() and process.poll() is None:
            time.sleep(0.02)
        change(tmp_path / "model" / name)
        (tmp_path / "go").touch()
        stdout, stderr = process.communicate(timeout=200)
    assert process.returncode == 2, stdout + stderr
    assert name in stderr and "changed during the run" in stderr
    assert "Traceback" not in stderr and "lossless" not in stdout
    assert not (tmp_path / "out").exists()


def test_the_weights_of_a_folder_are_read_and_not_mapped(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path, max_shard_size="20KB")
    files = [*tmp_path.glob("*.safetensors")]
    assert len(files) > 1
    model = load_folder(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(tmp_path) not in maps.read_text()
    for file in files:
        _overwrite_in_place(file)
        _truncate(file)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


@given(
    contents=st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=4),
    place=st.integers(0, 3),
    how=st.sampled_from(["edited", "cut", "gone", "new", "touched"]),
)
@settings(deadline=None, max_examples=40)
def test_files_are_named_where_and_only_where_they_changed(
    tmp_path_factory: pytest.TempPathFactory, contents: list[bytes], place: int, how: str
) -> None:
    folder = tmp_path_factory.mktemp("inputs")
    files = [folder / str(number) for number in range(len(contents))]
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)
    found = Unchanged({"the data": lambda: folder.iterdir()})
    found.check()
    found.check_read()
    chosen = files[place % len(files)]
    content = chosen.read_bytes()
    if how == "edited":
        times = chosen.stat().st_atime_ns, chosen.stat().st_mtime_ns
        with chosen.open("r+b") as opened:
            opened.write(bytes([content[0] ^ 1]))
        os.utime(chosen, ns=times)  # nothing but its bytes says so
    elif how == "cut":
        os.truncate(chosen, len(content) - 1)
    elif how == "gone":
        chosen.unlink()
    elif how == "new":
        chosen = folder / "another"
        chosen.write_bytes(content)
    else:
        os.utime(chosen, ns=(0, 0))
        found.check()
        with pytest.raises(InputError, match="written while it was read"):
            found.check_read()
        return
    with pytest.raises(InputError, match="changed during the run") as raised:
        found.check()
    with pytest.raises(InputError, match="changed during the run"):
        found.check_read(whole=True)
    assert str(chosen) in str(raised.value)
    assert not any(str(f) in str(raised.value) for f in files if f != chosen)
