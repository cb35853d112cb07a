"""The invariant: of a folder that is near to one of a model the message says which it is, and what
to give; nothing of it is executed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rankfold import InputError
from rankfold.cli.open import open_model
from tests.small_models import tiny_llama


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama().save_pretrained(folder)
    return folder


def _write(folder: Path, name: str, value: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(value))


def _refused(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_model(str(folder))
    return str(caught.value)


@pytest.mark.parametrize("with_config", [False, True])
def test_an_adapter_is_not_taken_for_its_model(
    with_config: bool, saved: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    if with_config:
        shutil.copytree(saved, folder)
    _write(folder, "adapter_config.json", {"base_model_name_or_path": "owner/base", "r": 4})
    message = _refused(folder)
    assert "holds an adapter" in message and "owner/base" in message
    assert "merge_and_unload" in message


@pytest.mark.parametrize(
    "inner",
    [
        "snapshots/0123abcd", "models--owner--name/snapshots/0123abcd", "checkpoint-500",
        "0_Transformer", "text_encoder",
    ],
)  # fmt: skip
def test_a_folder_around_models_names_them(inner: str, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / inner)
    _write(tmp_path, "modules.json", [])
    message = _refused(tmp_path)
    assert "Give this:" in message and str(tmp_path / inner) in message
    assert type(open_model(str(tmp_path / inner)).model).__name__ == "LlamaForCausalLM"
    shutil.copytree(saved, tmp_path / "checkpoint-900")
    assert "Give one of these:" in _refused(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"model_type": "mine", "auto_map": {"AutoConfig": "conf_mine.C", "AutoModel": "net.M"}},
            ["conf_mine.py, net.py", "runs no code from a folder", "file.py:function"],
        ),
        (
            {"architectures": ["MineForCausalLM"], "auto_map": {"AutoModelForCausalLM": "net.M"}},
            ["net.py", "trust_remote_code=True, in a function"],
        ),
        ({"architectures": ["MineForCausalLM"]}, ["MineForCausalLM", "installed transformers"]),
        ({"model_type": "mine"}, ["mine"]),
    ],
)
def test_code_of_its_own_is_named_and_never_run(
    change: dict[str, Any], told: list[str], saved: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(saved, tmp_path / "m")
    marker = tmp_path / "ran"
    for name in ("net.py", "conf_mine.py"):
        (folder / name).write_text(f"open({str(marker)!r}, 'w')")
    _write(folder, "config.json", json.loads((saved / "config.json").read_text()) | change)
    message = _refused(folder)
    assert all(words in message for words in told), message
    assert not marker.exists()


def test_code_beside_a_class_of_the_library_is_left_alone(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "m")
    written = json.loads((saved / "config.json").read_text())
    _write(folder, "config.json", written | {"auto_map": {"AutoModelForCausalLM": "net.M"}})
    assert type(open_model(str(folder)).model).__name__ == "LlamaForCausalLM"


def test_a_tokenizer_of_code_is_named(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "m")
    said = {"tokenizer_class": "MineTokenizer", "auto_map": {"AutoTokenizer": ["tok.Mine", None]}}
    _write(folder, "tokenizer_config.json", said)
    message = _refused(folder)
    assert "the tokenizer of" in message
    assert "trust_remote_code" not in message and "no code from a folder" in message


def test_a_model_of_a_hub_is_to_be_downloaded(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"hf download owner/name --local-dir"):
        open_model("owner/name")
