"""An export target of somebody else's, which takes one registration and no edit elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import rankfold
from rankfold import InputError
from rankfold.cli.commands import app
from rankfold.export.dense import Dense, to_dense
from rankfold.export.export import TARGETS, register_target
from rankfold.export.targets import OpenedArtifact, Written, unregister_target
from tests.export.test_export import outputs
from tests.small_models import SmallCNN, image_data, images, trained_cnn


class Npz:
    """The weights of a dense model as arrays of NumPy."""

    name = "toy"
    summary = "arrays of NumPy"
    options = ("dtype",)
    files = "*.npz"

    def write(self, opened: OpenedArtifact, draft: Path) -> Written:
        dense = to_dense(opened.model)
        arrays = {name: tensor.numpy() for name, tensor in dense.state_dict().items()}
        np.savez(draft / "weights.npz", **arrays)
        return Written(dense, told={"arrays": len(arrays)})


@pytest.fixture
def toy() -> Iterator[None]:
    register_target(Npz())
    yield
    unregister_target("toy")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "a"
    return rankfold.lossless(trained_cnn(), image_data(40), size=0.5).save(folder)


def filled(folder: Path) -> SmallCNN:
    """The user's class with the exported weights."""
    arrays = dict(np.load(folder / "weights.npz"))
    model = SmallCNN()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    return model.eval()


@pytest.mark.usefixtures("toy")
def test_from_python(artifact: Path, tmp_path: Path) -> None:
    done = rankfold.export(artifact, tmp_path / "out", to="toy", model=SmallCNN())
    pixels = images(6, seed=31).tensors[0]
    expected = outputs(rankfold.load(artifact, model=SmallCNN()), pixels)
    torch.testing.assert_close(outputs(filled(done.folder), pixels), expected)
    assert done.to == "toy" and done.difference is None
    assert done.bytes == (done.folder / "weights.npz").stat().st_size
    assert done.parameters == sum(p.numel() for p in SmallCNN().parameters())
    told = json.loads((done.folder / "export.json").read_text())
    assert told["to"] == "toy" and told["arrays"] == len(SmallCNN().state_dict())


@pytest.mark.usefixtures("toy")
def test_from_the_command_line(artifact: Path, tmp_path: Path) -> None:
    net = tmp_path / "net.py"
    net.write_text("from tests.small_models import SmallCNN as net\n")
    words = ["export", str(artifact), "--to", "toy", "--model", f"{net}:net"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["to"] == "toy"
    assert filled(tmp_path / "out")


@pytest.mark.usefixtures("toy")
def test_options_are_those_that_it_takes(artifact: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"to": "toy", "model": SmallCNN()}
    done = rankfold.export(artifact, tmp_path / "out", **options, dtype="float16")
    assert np.load(done.folder / "weights.npz")["head.weight"].dtype == np.float16
    with pytest.raises(InputError, match="inputs goes with onnx and pt2; toy keeps"):
        rankfold.export(artifact, tmp_path / "other", **options, inputs=(3, 8, 8))


def test_a_name_is_registered_once(toy: None) -> None:
    for taken in (Npz(), Dense()):
        with pytest.raises(ValueError, match=f"an export target '{taken.name}' already"):
            register_target(taken)


def test_what_is_not_registered_is_refused(artifact: Path, tmp_path: Path) -> None:
    assert list(TARGETS) == ["dense", "pairs", "onnx", "pt2"]
    with pytest.raises(InputError, match="to is 'toy'; expected dense, pairs, onnx or pt2"):
        rankfold.export(artifact, tmp_path / "out", to="toy", model=SmallCNN())
