"""The invariant: whatever a stranger's file is called or holds, no command writes a byte that a
terminal or a page interprets, and no line that only a name has made."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import rankfold
from rankfold import InputError
from rankfold.cli.app import app
from rankfold.cli.raised import OWN_CODE
from rankfold.data.sources import read_image_folder, read_npz, read_wav_folder
from rankfold.data.sources.records import read_records
from tests.small_models import tiny_llama, token_data

NASTY = "n\x1b[31m\x07\x9b5m\u202e\u2066\u200b\r\u2028[bold]<b>\nFORGED: yes"
LONE = "\udcff\ud800"
WATCHED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
CODE = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({{name: nn.Linear(12, 12) for name in [{name!r}, 'b']}})
    def forward(self, x):
        for part in self.parts.values():
            x = part(torch.relu(x))
        return x
def make():
    torch.manual_seed(0)
    return Net()
def other():
    return nn.Sequential(nn.Linear(12, 12))
def fails():
    raise ValueError({name!r})
def data():
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (80,), generator=g)
    return [(torch.randn(12, generator=g), int(label)) for label in labels]
def failing():
    raise KeyError({name!r})
"""


def ran(*arguments: object, code: tuple[int, ...] = (0, 2, 3, 4, 6)) -> Result:
    """What a command does, with everything that it writes watched."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert result.exit_code in code
    for text in (result.stdout, result.stderr):
        watched(text)
    assert ("Traceback" in result.output) == (result.exit_code == OWN_CODE)
    return result


def watched(text: str) -> None:
    found = WATCHED.search(text)
    assert found is None, repr(text[max(0, found.start() - 200) : found.end() + 40])
    assert not re.search(r"^\W*FORGED", text, re.MULTILINE), text


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of hostile names: code, an artifact and its weights."""
    top = tmp_path_factory.mktemp("names") / NASTY
    top.mkdir()
    (top / "net.py").write_text(CODE.format(name=NASTY), encoding="utf-8")
    spec = top / "net.py"
    ran("lossless", f"{spec}:make", "--data", f"{spec}:data", "--size", "0.9", "--out",
        top / "out", "--no-gradient-step", "--no-refit", code=(0,))  # fmt: skip
    return top


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("language")
    model = tiny_llama()
    model.save_pretrained(top / "model")
    rankfold.lossless(model, token_data(), size=0.9, effort="fast").save(top / "artifact")
    return top


def test_every_command_on_a_folder_of_hostile_names(own: Path) -> None:
    spec = own / "net.py"
    data = ("--data", f"{spec}:data", "--model", f"{spec}:make")
    ran("inspect", own / "out", code=(0,))
    found = json.loads(ran("inspect", own / "out", "--json", code=(0,)).stdout)
    layers = [*found["layers"], *found["not_factorized"]]
    assert f"parts.{NASTY}" in [layer["name"] for layer in layers]
    ran("inspect", own / "out", "--layer", f"parts.{NASTY}")
    ran("inspect", own / "out", "--layer", NASTY, code=(2, 6))
    ran("evaluate", own / "out", *data, code=(0,))
    json.loads(ran("evaluate", own / "out", *data, "--json", code=(0,)).stdout)
    ran("verify", own / "out", *data)
    json.loads(ran("verify", own / "out", *data, "--json").stdout)
    ran("export", own / "out", "--to", "dense", "--out", own / "exported", *data[2:], code=(0,))
    exported = ran(
        "export", own / "out", "--to", "pairs", "--out", own / "pairs", *data[2:], "--json"
    )
    assert json.loads(exported.stdout)["folder"] == str(own / "pairs")
    for file in (*own.rglob("*.md"), *own.rglob("*.txt")):
        watched(file.read_text(encoding="utf-8"))
        assert "<b>" not in file.read_text(encoding="utf-8")


def test_every_command_refuses_with_hostile_names(own: Path, tmp_path: Path) -> None:
    spec, out = own / "net.py", own / "out"
    (tmp_path / f"{NASTY}.csv").write_text("a,b\n1,2\n")
    (tmp_path / f"{NASTY}.pt").write_text("x")
    missing = own / f"{NASTY}x"
    for one in (missing, spec, own, f"{spec}:none", f"{spec}:fails", f"{NASTY}:x", "timm:" + NASTY):
        for data in (f"{spec}:data", f"{spec}:failing", missing, tmp_path / f"{NASTY}.csv", own,
                     tmp_path / f"{NASTY}.pt", f"{missing}.jsonl", f"{spec}:{NASTY}"):  # fmt: skip
            ran("lossless", one, "--data", data, "--size", "0.9", "--out", own / "new", code=(2, 6))
    for folder in (missing, spec, own):
        for command in ("inspect", "evaluate", "verify", "export"):
            more = {"inspect": (), "export": ("--to", "dense", "--out", own / "n")}
            ran(command, folder, *more.get(command, ("--data", f"{spec}:data")), code=(2, 6))
    for model in (f"{spec}:other", f"{spec}:fails", f"{spec}:{NASTY}", missing):
        ran("evaluate", out, "--data", f"{spec}:data", "--model", model, code=(2, 6))
        ran("verify", out, "--data", f"{spec}:data", "--model", model, code=(2, 6))
    ran("export", out, "--to", NASTY, "--out", own / "n", code=(2, 6))
    ran("export", out, "--to", "dense", "--out", spec, code=(2, 6))
    ran(
        "lossless",
        f"{spec}:make",
        "--data",
        f"{spec}:data",
        "--size",
        "0.9",
        "--out",
        out,
        code=(2,),
    )
    ran("lossless", f"{spec}:make", "--data", f"{spec}:data", "--size", "0.9", "--out",
        own / "n", "--include", NASTY, "--task", NASTY, code=(2, 6))  # fmt: skip


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of every text, of a list the first one's."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:1])
    for key, one in items:
        if isinstance(one, dict | list) and one:
            yield from leaves(one, (*path, key))
        elif isinstance(one, str):
            yield (*path, key)


def edited(value: Any, path: tuple[Any, ...], put: object) -> Any:
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = put
    return copy


@pytest.mark.parametrize("name", ["rankfold.json", "config.json"])
def test_every_text_of_an_artifact(name: str, language: Path, tmp_path: Path) -> None:
    shutil.copytree(language / "artifact", tmp_path / "it")
    written = json.loads((tmp_path / "it" / name).read_text())
    for path in leaves(written):
        (tmp_path / "it" / name).write_text(json.dumps(edited(written, path, NASTY + LONE)))
        inspected = ran("inspect", tmp_path / "it")
        json.loads(ran("inspect", tmp_path / "it", "--json").stdout or "0")
        if name == "config.json" or (inspected.exit_code and len(path) < 3):
            ran("evaluate", tmp_path / "it", "--data", "self")


@pytest.mark.parametrize("put", [NASTY, LONE])
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors.index.json"]
)
def test_every_text_of_a_models_folder(
    name: str, put: object, language: Path, tmp_path: Path
) -> None:
    shutil.copytree(language / "model", tmp_path / "it")
    file = tmp_path / "it" / name
    if not file.is_file():
        file.write_text(json.dumps({"metadata": {"a": "b"}, "weight_map": {"a": "b"}}))
    written = json.loads(file.read_text())
    for path in leaves(written):
        file.write_text(json.dumps(edited(written, path, put)))
        ran("evaluate", tmp_path / "it", "--data", "self", code=(2, 6))
        ran("lossless", tmp_path / "it", "--data", tmp_path / "no", "--size", "0.9", "--out",
            tmp_path / "out", code=(2, 6))  # fmt: skip


def test_names_of_tensors(language: Path, own: Path, tmp_path: Path) -> None:
    for kind in ("model", "artifact"):
        shutil.copytree(language / kind, tmp_path / kind)
        file = tmp_path / kind / "model.safetensors"
        tensors = load_file(file)
        tensors[NASTY] = tensors.pop(next(iter(tensors)))
        save_file(tensors, file, metadata={"format": "pt"})
    ran("lossless", tmp_path / "model", "--data", tmp_path, "--size", "0.9", "--out",
        tmp_path / "out", code=(2, 6))  # fmt: skip
    ran("evaluate", tmp_path / "artifact", "--data", "self", code=(2, 6))
    save_file({NASTY: next(iter(tensors.values()))}, tmp_path / "w.safetensors")
    spec = own / "net.py"
    ran("lossless", f"{spec}:make", "--weights", tmp_path / "w.safetensors", "--data",
        f"{spec}:data", "--size", "0.9", "--out", tmp_path / "out", code=(2, 6))  # fmt: skip


def test_errors_of_readers_hold_no_line_of_a_name(tmp_path: Path) -> None:
    odd = NASTY.replace("/", "")
    lines = [json.dumps({odd: 1}), json.dumps({f"{odd}2": 1})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.csv").write_text(f"{_quoted(odd)},{_quoted(odd)}\n1,2\n")
    (tmp_path / "c.csv").write_text(f"a,b\n{_quoted(odd)}\n")
    np.savez(tmp_path / "d.npz", **{odd: np.zeros(3)})
    np.savez(tmp_path / "e.npz", **{odd: np.zeros(3), "x": np.zeros(3), "y": np.zeros(3)})
    for name in (odd, f"{odd}2"):
        (tmp_path / "f" / name).mkdir(parents=True)
        (tmp_path / "f" / name / f"{odd}.png").write_text("no image")
        (tmp_path / "g" / name).mkdir(parents=True)
        (tmp_path / "g" / name / f"{odd}.wav").write_text("no sound")
    readers: list[tuple[Callable[[Path], Any], str]] = [
        (read_records, "a.jsonl"), (read_records, "b.csv"), (read_records, "c.csv"),
        (read_npz, "d.npz"), (read_npz, "e.npz"),
        (lambda folder: read_image_folder(folder, size=8)[0], "f"),
        (lambda folder: read_wav_folder(folder, prepare=None)[0], "g"),
    ]  # fmt: skip
    for read, name in readers:
        with pytest.raises(InputError) as caught:
            read(tmp_path / name)
        watched(str(caught.value))


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def test_columns_labels_and_names_of_files(own: Path, tmp_path: Path) -> None:
    odd, spec = NASTY.replace("/", ""), own / "net.py"
    rows = [f"{_quoted(odd + str(n % 3))},{n}" for n in range(30)]
    files = {
        "columns.csv": f"{_quoted(odd)},other\n" + "\n".join(f"{n},{n}" for n in range(9)),
        "twice.csv": f"{_quoted(odd)},{_quoted(odd)}\n1,2\n",
        "labels.csv": "label,text\n" + "\n".join(rows),
        "long.csv": f"label,text\n1,2,{_quoted(odd)}\n",
        "text.jsonl": "\n".join(json.dumps({odd: odd, "label": [odd]}) for _ in range(9)),
        "labels.jsonl": "\n".join(json.dumps({"text": odd, "label": odd}) for _ in range(9)),
        "broken.jsonl": '{"text": "' + odd + '"',
        "keys.jsonl": json.dumps({odd: 1})[:-1] + f", {json.dumps(odd)}: 2}}",
        "rows.tsv": f"text\tlabel\n{odd}\n",
        "x.npz": "no archive",
        f"{odd}.jsonl": "[]",
        f"{odd}.npz": "no archive",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    np.savez(tmp_path / "y.npz", **{"x": np.zeros((9, 12), "f4"), "y": np.array([odd] * 9)})
    np.savez(tmp_path / "z.npz", **{NASTY.replace("\x00", ""): np.zeros(3)})
    pictures = tmp_path / "pictures"
    for name in (odd, f"{odd}2"):
        (pictures / name).mkdir(parents=True)
        (pictures / name / f"{odd}.png").write_text("no image")
        (pictures / name / f"{odd}.wav").write_text("no sound")
    for name in [*files, "y.npz", "z.npz", "pictures"]:
        for more in ((), ("--skip-broken",), ("--text-column", NASTY)):
            ran("evaluate", own / "out", "--model", f"{spec}:make", "--data", tmp_path / name,
                *more, code=(2, 6))  # fmt: skip
