"""The commands as a user runs them, each in a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rankfold.settings import RESEARCH, setting_options
from tests.command_line import environment, images, make_project, rankfold
from tests.tiny_language_model import TEXT, save_tiny_llama

NET = ("net.py:net", "--weights", "net.safetensors")
DATA = ("--data", "data.npz")
LOSSLESS = ("lossless", *NET, *DATA, "--size", "0.6", "--out", "out")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture
def work(project: Path, tmp_path: Path) -> Path:
    """A fresh folder with the user's files in it."""
    for file in ("net.py", "net.safetensors", "data.npz"):
        (tmp_path / file).symlink_to(project / file)
    return tmp_path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny_llama(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    return folder


def test_lossless_then_evaluate_then_inspect(work: Path) -> None:
    weights_before = (work / "net.safetensors").read_bytes()
    done = rankfold(*LOSSLESS, "--json", cwd=work)
    report = json.loads(done.stdout)
    assert "collect statistics" in done.stderr
    original, factorized = report["original"], report["factorized"]
    assert report["ratio"] == factorized["parameters"] / original["parameters"] <= 0.6
    assert factorized["bytes"] == (work / "out" / "model.safetensors").stat().st_size
    assert original["bytes"] == len(weights_before)
    loss, certificate = report["loss"], report["certificate"]
    change = loss["factorized"] - loss["original"]
    assert loss["change"] == pytest.approx(change) == pytest.approx(certificate["change"])
    assert loss["standard_error"] > 0
    for key in ("verdict", "upper_bound", "margin", "confidence", "examples"):
        assert key in certificate
    assert {layer["name"] for layer in report["layers"]} == {"conv", "hidden", "out"}
    assert (work / "net.safetensors").read_bytes() == weights_before

    found = rankfold("evaluate", "out", "--model", "net.py:net", *DATA, "--json", cwd=work)
    evaluation = json.loads(found.stdout)
    assert evaluation["examples"] == 1200
    assert evaluation["loss"]["mean"] == pytest.approx(loss["factorized"], abs=0.2)

    shown = rankfold("inspect", "out", cwd=work).stdout
    assert "hidden" in shown and f"{factorized['parameters']:,}" in shown
    assert json.loads(rankfold("inspect", "out", "--json", cwd=work).stdout)["layers"]
    curve = rankfold("inspect", "out", "--layer", "hidden", cwd=work).stdout
    assert "predicted change" in curve and "hidden" in curve
    unknown = rankfold("inspect", "out", "--layer", "nothing", cwd=work, expect=2)
    assert "no factorized layer is called 'nothing'" in unknown.stderr


def test_same_seed_same_bytes(work: Path) -> None:
    first, second = (rankfold(*LOSSLESS[:-1], out, "--no-timing", cwd=work) for out in ("a", "b"))
    tensors = [(work / out / "model.safetensors").read_bytes() for out in ("a", "b")]
    assert tensors[0] == tensors[1]
    assert first.stdout.replace("saved: a", "") == second.stdout.replace("saved: b", "")


def test_an_offload_folder_changes_no_bytes_and_must_be_there(work: Path) -> None:
    (work / "disk").mkdir()
    rankfold(*LOSSLESS[:-1], "a", cwd=work)
    rankfold(*LOSSLESS[:-1], "b", "--offload-folder", "disk", cwd=work)
    tensors = [(work / out / "model.safetensors").read_bytes() for out in ("a", "b")]
    assert tensors[0] == tensors[1]
    assert not list((work / "disk").iterdir())
    done = rankfold(*LOSSLESS[:-1], "c", "--offload-folder", "nowhere", cwd=work, expect=2)
    assert "the offload folder nowhere is no folder; expected" in done.stderr


def test_compact_language_model_and_text(llama: Path, tmp_path: Path) -> None:
    text, model = llama / "text.txt", llama / "model"
    common = ("--data", text, "--length", 32)
    out = tmp_path / "out"
    compact = ("compact", model, *common, "--out", out, "--margin", 0.5, "--json")
    report = json.loads(rankfold(*compact, cwd=tmp_path).stdout)
    assert report["certificate"]["verdict"] in ("better", "lossless")
    assert report["ratio"] < 1
    assert report["certificate"]["unit"] == "nats per token"
    evaluated = json.loads(rankfold("evaluate", out, *common, "--json", cwd=tmp_path).stdout)
    assert evaluated["loss"]["mean"] == pytest.approx(report["loss"]["factorized"], abs=0.5)
    refused = rankfold("compact", out, *common, "--out", tmp_path / "x", cwd=tmp_path, expect=2)
    assert "factorized already" in refused.stderr


def test_a_language_model_needs_no_data(llama: Path, tmp_path: Path) -> None:
    common = ("lossless", llama / "model", "--size", 0.9, "--length", 32, "--json")
    limits = ("--limit", 8, "--selection-limit", 6, "--held-out-limit", 7)
    own = rankfold(*common, *limits, "--data", "self", "--out", tmp_path / "a", cwd=tmp_path)
    report = json.loads(own.stdout)
    counts = {name: part["examples"] for name, part in report["data"].items()}
    assert counts == {"calibration": 8, "selection": 6, "held_out": 7}
    text = ("--data", llama / "text.txt", "--self-share", 0.5, "--rounds", 2)
    mixed = rankfold(*common, *text, "--out", tmp_path / "b", "--no-gradient-step", cwd=tmp_path)
    report = json.loads(mixed.stdout)
    assert report["data"]["own_text"]["examples"] == report["data"]["calibration"]["examples"]
    assert report["step"] is None
    assert "start of the round on selection data" in mixed.stderr  # whichever came out best
    # Two rounds, and the best corrected twice or more.
    assert 4 <= len(report["selection"]) <= 8


def test_own_text_needs_a_language_model(work: Path) -> None:
    done = rankfold(
        *LOSSLESS[:2], "--data", "self", "--size", 0.6, "--out", "x", cwd=work, expect=2
    )
    assert "writes no text of its own" in done.stderr


def test_compact_without_a_model_within_the_margin(work: Path) -> None:
    compact = ("compact", *NET, *DATA, "--margin", 0, "--held-out-limit", 20, "--objective", "svd")
    done = rankfold(*compact, "--out", "none", cwd=work, expect=3)
    assert "no smaller model" in done.stderr
    assert "loss change" in done.stdout
    assert not (work / "none").exists()
    rankfold(*compact, "--out", "any", "--save-anyway", cwd=work, expect=3)
    assert (work / "any" / "rankfold.json").is_file()


def test_require_lossless(work: Path) -> None:
    tiny = ("lossless", *NET, *DATA, "--size", "0.05", "--require", "lossless", "--out", "tiny")
    assert "verdict: worse" in rankfold(*tiny, cwd=work, expect=3).stdout
    assert (work / "tiny" / "model.safetensors").is_file()


def test_parts_named_apart_and_python_data(work: Path) -> None:
    for seed, name in enumerate(("calibration", "selection", "held-out")):
        x, y = images(200, seed=seed + 1)
        np.savez(work / f"{name}.npz", x=x, y=y)
    parts = [f"--{name}={name}.npz" for name in ("calibration", "selection", "held-out")]
    rankfold("lossless", *NET, *parts, "--size", 0.8, "--out", "a", cwd=work)
    rankfold("lossless", *NET, "--data", "net.py:pairs", "--size", 0.8, "--out", "b", cwd=work)
    parts[2] = "--held-out=selection.npz"
    shared = rankfold("lossless", *NET, *parts, "--size", 0.8, "--out", "c", cwd=work, expect=2)
    assert "share 200 examples" in shared.stderr


def test_image_folder(work: Path) -> None:
    x, y = images(120, seed=5)
    for number, (image, label) in enumerate(zip(x, y, strict=True)):
        folder = work / "images" / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.kron(image, np.ones((4, 4), dtype=np.uint8))).save(
            folder / f"{number}.png"
        )
    (work / "rgb.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(),\n"
        "                         nn.Linear(8 * 7 * 7, 4))\n"
    )
    done = rankfold(
        *("lossless", "rgb.py:net", "--data", "images", "--image-size", 16, "--size", 0.7),
        *("--mean", ".4,.4,.4", "--std", ".2,.2,.2", "--out", "out"),
        cwd=work,
    )
    assert "held-out accuracy" in done.stdout
    (work / "images" / "class1" / "broken.png").write_bytes(b"\x89PNG not an image")
    broken = rankfold(
        *("lossless", "rgb.py:net", "--data", "images", "--size", 0.7, "--out", "b"),
        cwd=work,
        expect=2,
    )
    assert "class1/broken.png" in broken.stderr and "--skip-broken" in broken.stderr
    skipping = rankfold(
        *("lossless", "rgb.py:net", "--data", "images", "--image-size", 16, "--size", 0.7),
        *("--skip-broken", "--out", "b"),
        cwd=work,
    )
    assert "skipped: the image images/class1/broken.png can't be read" in skipping.stderr
    assert "skipped 1 of 121 files of images" in skipping.stderr
    for data in ("data.npz", "self", "net.py:pairs"):
        refused = rankfold(
            *("lossless", "net.py:net", "--data", data, "--size", 0.7, "--out", "c"),
            "--skip-broken",
            cwd=work,
            expect=2,
        )
        assert f"{data} is none. Leave the option away" in refused.stderr


@pytest.mark.parametrize(("sent", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_halfway(work: Path, sent: signal.Signals, expected: int) -> None:
    before = {path.name for path in work.iterdir()}
    command = [str(Path(sys.executable).parent / "rankfold"), *LOSSLESS]
    command[2] = "net.py:slow"
    with subprocess.Popen(
        command,
        cwd=work,
        env=environment(),
        stderr=subprocess.PIPE,
        encoding="utf-8",
        # A test run in the background is started with SIGINT ignored, and hands that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        deadline = time.monotonic() + 60
        while not (work / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (work / "started").exists()
        process.send_signal(sent)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == expected
    assert "Traceback" not in errors
    assert {path.name for path in work.iterdir()} - before <= {"started", "__pycache__"}


def test_where_nothing_can_be_written_no_work_is_done(work: Path) -> None:
    slow = [*LOSSLESS]
    slow[1] = "net.py:slow"
    done = rankfold(*slow, "--out", "net.py/out", cwd=work, expect=2)
    assert "the output folder net.py/out can't be written" in done.stderr
    assert not (work / "started").exists()


def test_full_disk(work: Path) -> None:
    before = {path.name for path in work.iterdir()}
    done = rankfold(*LOSSLESS, cwd=work, expect=2, limit_bytes=4096)
    assert "can't be written" in done.stderr
    assert {path.name for path in work.iterdir()} - before <= {"__pycache__"}


def test_overwrite_replaces_an_artifact(work: Path) -> None:
    rankfold(*LOSSLESS, cwd=work)
    first = (work / "out" / "rankfold.json").read_text()
    rankfold(*LOSSLESS, cwd=work, expect=2)
    rankfold(*LOSSLESS, "--overwrite", "--objective", "svd", cwd=work)
    assert (work / "out" / "rankfold.json").read_text() != first


def test_json_alone_on_stdout_though_the_model_prints(work: Path) -> None:
    (work / "chatty.py").write_text("from net import Chatty as net\n")
    arguments = [*LOSSLESS, "--json"]
    arguments[1] = "chatty.py:net"
    assert json.loads(rankfold(*arguments, cwd=work).stdout)["ratio"] < 0.61


def test_help_states_every_setting_but_those_of_research() -> None:
    shown = rankfold("lossless", "--help-all", cwd=Path.cwd()).stdout
    for name, option in setting_options().items():
        assert (f"--{name.replace('_', '-')} " in shown) == (option.panel != RESEARCH)
    assert rankfold("--version", cwd=Path.cwd()).stdout.startswith("rankfold ")


def test_set_gives_what_the_option_gives(work: Path) -> None:
    by_option, by_set = ("--no-refit", "--curvature", "sampled"), ("refit=false", "rounds=1")
    rankfold(*LOSSLESS[:-1], "a", *by_option, cwd=work)
    given = [word for one in (*by_set, "curvature=sampled") for word in ("--set", one)]
    rankfold(*LOSSLESS[:-1], "b", *given, cwd=work)
    written = [(work / out / "model.safetensors").read_bytes() for out in ("a", "b")]
    assert written[0] == written[1]
    settings = json.loads((work / "b" / "rankfold.json").read_text())["settings"]
    assert settings["curvature"] == "sampled" and settings["refit"] is False
    refused = rankfold(*LOSSLESS[:-1], "c", "--set", "refitt=false", cwd=work, expect=2)
    assert "there is no setting 'refitt'" in refused.stderr and "refit" in refused.stderr


def test_messages_from_below_name_options(work: Path) -> None:
    (work / "few.npz").write_bytes((work / "data.npz").read_bytes())
    rankfold(*LOSSLESS, "--device", "cpu", cwd=work)
    again = rankfold(*LOSSLESS, cwd=work, expect=2).stderr
    assert "choose another one or pass --overwrite." in again
    assert "overwrite=" not in again
    told = rankfold("verify", "out", *DATA, "--model", "net.py:net", cwd=work).stdout
    assert "give the original: --model, and --weights where it needs it" in told
    missing = rankfold("evaluate", "out", *DATA, cwd=work, expect=2).stderr
    assert "pass an instance of it by --model file.py:function." in missing
