"""The invariant: of an artifact nothing is read that does not lie in it, and nothing is copied that
does not lie in the folder that it is copied from; what is no file of its own is named, and nothing
waits for a pipe."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, strategies
from typer.testing import CliRunner

import rankfold
from rankfold import InputError
from rankfold.artifact.recorded import recorded_pooling
from rankfold.cli.app import app
from rankfold.cli.open import open_model
from rankfold.files.own_files import check_own_files, is_plain_name
from rankfold.integrations.transformers import copy_processing_files
from tests.small_models import model_and_artifact

SECRET = "nobody may read this"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return model_and_artifact(tmp_path_factory.mktemp("folders"))


def _link(place: Path, outside: Path) -> None:
    place.symlink_to(outside)


def _relative(place: Path, outside: Path) -> None:
    place.symlink_to(os.path.relpath(outside, place.parent))


def _dangling(place: Path, outside: Path) -> None:
    place.symlink_to(outside.parent / "not there")


def _to_itself(place: Path, outside: Path) -> None:
    place.symlink_to(place)


def _inner(place: Path, outside: Path) -> None:
    place.symlink_to("config.json")


def _fifo(place: Path, outside: Path) -> None:
    os.mkfifo(place)


def _socket(place: Path, outside: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        here = Path.cwd()
        os.chdir(place.parent)  # paths of sockets are short
        try:
            one.bind(place.name)
        finally:
            os.chdir(here)


def _folder_link(place: Path, outside: Path) -> None:
    place.symlink_to(outside.parent, target_is_directory=True)


def _like_a_blob(place: Path, outside: Path) -> None:
    (place.parent.parent / "blobs").mkdir(exist_ok=True)
    shutil.copyfile(outside, place.parent.parent / "blobs" / "0123")
    place.symlink_to("../blobs/0123")


MADE: list[Callable[[Path, Path], None]] = [
    _link, _relative, _dangling, _to_itself, _inner, _fifo, _socket, _folder_link, _like_a_blob,
]  # fmt: skip
NAMES = [
    "tokenizer_x.txt", "tokenizer.json", "config.json", "model.safetensors", "certificate.json",
    "certificate.txt", "README.md", "vocab.txt", "1_Pooling", "notes", "chat_template.jinja",
    "additional_chat_templates/x.jinja", "a/b/c",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", MADE)
def test_an_artifact_holds_files_of_its_own(
    make: Callable[[Path, Path], None], name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "outside").mkdir()
    outside = tmp_path / "outside" / "secret.txt"
    outside.write_text(SECRET)
    shutil.copytree(folders["artifact"], tmp_path / "it")
    place = tmp_path / "it" / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    make(place, outside)
    for open_it in (
        lambda: rankfold.load(tmp_path / "it"),
        lambda: rankfold.export(tmp_path / "it", tmp_path / "out", to="dense"),
    ):
        with pytest.raises(InputError) as caught:
            open_it()
        assert place.name in str(caught.value)
        assert SECRET not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [["inspect"], ["evaluate", "--data"], ["verify", "--data"]])
def test_no_command_follows_a_link(
    command: list[str], folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["artifact"], tmp_path / "it")
    (tmp_path / "it" / "tokenizer_x.txt").symlink_to("/etc/passwd")
    (tmp_path / "text.txt").write_text("some words " * 200)
    data = [str(tmp_path / "text.txt")] if len(command) > 1 else []
    ran = CliRunner().invoke(app, [command[0], str(tmp_path / "it"), *command[1:], *data])
    assert ran.exit_code == 2
    assert "tokenizer_x.txt: a link to /etc/passwd" in ran.stderr
    assert "root:" not in ran.output


def test_a_hard_link_and_a_link_to_the_folder_itself_are_fine(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["artifact"], tmp_path / "it", copy_function=os.link)
    (tmp_path / "link").symlink_to(tmp_path / "it")
    rankfold.load(tmp_path / "link")


def _as_cache(folder: Path, top: Path) -> Path:
    """As huggingface_hub keeps it."""
    snapshot = top / "models--owner--name" / "snapshots" / "0123abcd"
    (top / "models--owner--name" / "blobs").mkdir(parents=True)
    for place, file in enumerate(sorted(f for f in folder.rglob("*") if f.is_file())):
        blob = top / "models--owner--name" / "blobs" / f"{place:040x}"
        shutil.copyfile(file, blob)
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.mark.parametrize("kind", ["model", "artifact"])
def test_a_snapshot_of_a_hubs_cache_opens(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders[kind], tmp_path / "it")
    (tmp_path / "it" / "additional_chat_templates").mkdir()
    (tmp_path / "it" / "additional_chat_templates" / "x.jinja").write_text("")
    snapshot = _as_cache(tmp_path / "it", tmp_path / "cache")
    if kind == "model":
        open_model(str(snapshot))
    else:
        rankfold.load(snapshot)
    (tmp_path / "copy").mkdir()
    copy_processing_files(snapshot, tmp_path / "copy")
    assert (tmp_path / "copy" / "additional_chat_templates" / "x.jinja").is_file()
    blob = (snapshot / "config.json").readlink().name
    kept = tmp_path / "cache" / "models--owner--name" / "blobs" / blob
    kept.rename(tmp_path / "elsewhere")
    kept.symlink_to(tmp_path / "elsewhere")  # a blob that leads on
    with pytest.raises(InputError, match="a link to"):
        check_own_files(snapshot)


def test_a_models_folder_may_link_its_weights_but_no_file_that_is_copied(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["model"], tmp_path / "it")
    (tmp_path / "it" / "model.safetensors").rename(tmp_path / "weights")
    (tmp_path / "it" / "model.safetensors").symlink_to(tmp_path / "weights")
    open_model(str(tmp_path / "it"))
    for name in ("tokenizer_x.txt", "special_tokens_map.json", "preprocessor_config.json"):
        (tmp_path / "it" / name).symlink_to("/etc/passwd")
        with pytest.raises(InputError, match=f"{name}: a link to /etc/passwd"):
            open_model(str(tmp_path / "it"))
        (tmp_path / "it" / name).unlink()


@pytest.mark.parametrize(
    "shard",
    ["../other/model.safetensors", "/tmp/model.safetensors", "..", ".", "", "a/b", "a\\b", "\0", 3],
)
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "x.safetensors.index.json"])
def test_an_index_names_files_beside_it(
    index: str, shard: object, folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["model"], tmp_path / "it")
    shutil.copytree(folders["model"], tmp_path / "other")
    (tmp_path / "it" / "model.safetensors").rename(tmp_path / "it" / "weights.safetensors")
    (tmp_path / "it" / index).write_text(json.dumps({"metadata": {}, "weight_map": {"w": shard}}))
    with pytest.raises(InputError, match=r"beside it|lacks files"):
        open_model(str(tmp_path / "it"))


def test_an_artifact_does_not_look_around_itself(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["artifact"], tmp_path / "it")
    own = [{"path": "it", "type": "sentence_transformers.models.Transformer"}]
    own += [{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    (tmp_path / "modules.json").write_text(json.dumps(own))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text("{}")
    assert recorded_pooling(tmp_path / "it") is None
    rankfold.export(tmp_path / "it", tmp_path / "out", to="dense")
    assert not (tmp_path / "out" / "1_Pooling").exists()


@given(strategies.text(max_size=6))
@example("a/../b")
@example("C:\\x")
@example("x\\..")
@example("\0")
def test_a_plain_name_stays_in_its_folder(name: str) -> None:
    folder = Path("/one/two")
    normal = Path(os.path.normpath(folder / name))
    inside = "\0" not in name and normal.parent == folder
    assert not is_plain_name(name) or inside
    if name.isalnum():
        assert is_plain_name(name)
