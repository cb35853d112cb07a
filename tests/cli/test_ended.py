"""How a command ends: by signals, on broken streams, on full disks; what is finished is kept."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import rankfold
from rankfold import InputError
from rankfold.artifact.save import save_artifact
from rankfold.cli.kept import save_somewhere
from rankfold.export.example_inputs import ExampleInputs
from rankfold.export.torch_export import trace, write_pt2
from rankfold.files.folder import folder_in_one_step
from rankfold.integrations.as_asked import saving
from tests.command_line import environment, make_project

COMMAND = str(Path(sys.executable).parent / "rankfold")
RUN = (
    "lossless", "net.py:net", "--weights", "net.safetensors", "--data", "data.npz", "--size",
    "0.8", "--limit", "60", "--selection-limit", "40", "--held-out-limit", "60", "--effort", "fast",
)  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("project"))


def shell(line: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", line, COMMAND, *RUN], cwd=cwd, capture_output=True, encoding="utf-8",
        env=environment() | variables, timeout=120,
    )  # fmt: skip


def is_whole(folder: Path) -> bool:
    with pytest.raises(rankfold.ArtifactError, match=r"was made from another model|don.t fit"):
        rankfold.load(folder, model=nn.Module())
    return (folder / "rankfold.json").is_file() and (folder / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("streams", "expected", "words"),
    [
        (">/dev/full", 7, "stdout can't be written: [Errno 28]"),
        (">&-", 0, ""),
        (">&- 2>&-", 0, ""),
        ("2>/dev/full", 0, ""),
        ("| true", 0, ""),
    ],
)
def test_a_finished_result_outlives_its_streams(
    work: Path, streams: str, expected: int, words: str
) -> None:
    out = f"out{abs(hash(streams))}"
    done = shell(f'"$0" "$@" --out {out} {streams}; exit "${{PIPESTATUS[0]}}"', work)
    assert done.returncode == expected, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr
    assert is_whole(work / out)


def test_names_that_the_locale_lacks_are_written_out(work: Path) -> None:
    done = shell('"$0" "$@" --out "o[red]é"', work, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert r"saved: o[red]\xe9" in done.stdout
    assert is_whole(work / "o[red]é")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("after", [0.15, 1.0])
def test_interrupted_while_it_imports(work: Path, sent: signal.Signals, after: float) -> None:
    with subprocess.Popen(
        [COMMAND, "inspect", "nowhere"], cwd=work, env=environment(), stderr=subprocess.PIPE,
        encoding="utf-8", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        time.sleep(after)
        process.send_signal(sent)
        _, errors = process.communicate(timeout=60)
    if after < 0.5:  # Python itself may be still starting
        assert process.returncode in (128 + sent, -sent) or "KeyboardInterrupt" in errors
    else:
        assert process.returncode in (128 + sent, 2)
        assert "Traceback" not in errors


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP])
def test_a_polite_kill_cleans_and_says_so_even_twice(work: Path, sent: signal.Signals) -> None:
    (work / "started").unlink(missing_ok=True)
    before = {one.name for one in work.iterdir()}
    command = [COMMAND, *RUN, "--out", "never"]
    command[2] = "net.py:slow"
    with subprocess.Popen(
        command, cwd=work, env=environment(), stderr=subprocess.PIPE, encoding="utf-8"
    ) as process:
        while not (work / "started").exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(sent)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode in (128 + sent, 128 + signal.SIGTERM)
    assert "interrupted; nothing was saved" in errors and "Traceback" not in errors
    assert {one.name for one in work.iterdir()} - before <= {"started", "__pycache__"}


def test_nohup_goes_on_after_a_hangup(work: Path) -> None:
    (work / "started").unlink(missing_ok=True)
    done = shell(
        'trap "" HUP; "$0" "$@" --out hung & while [ ! -d hung ] && kill -HUP $! ; do sleep 0.3; '
        "done; wait $!",
        work,
    )
    assert done.returncode == 0, done.stderr
    assert is_whole(work / "hung")


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(200, 200)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x)
        return out


def in_a_child_with_files_up_to(size: int, call: object) -> int:
    """Exit code of a forked process in which no file may be larger; 7 where it raised OSError."""
    if not (child := os.fork()):
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            call()  # type: ignore[operator]
            os._exit(0)
        except (OSError, InputError):
            os._exit(7)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_program_on_a_full_disk_is_an_error_and_no_abort(tmp_path: Path) -> None:
    inputs = ExampleInputs({"x": torch.randn(2, 200)}, by_name=False, lengths={}, given=True)
    traced = trace(_Net().eval(), inputs)
    file = tmp_path / "model.pt2"
    write_pt2(traced, file)
    size = file.stat().st_size
    module = torch.export.load(file).module()
    assert module(torch.ones(3, 200)).shape == (3, 200)
    for limit in (0, 1, 4096, 65536, size // 2, size - 1):
        code = in_a_child_with_files_up_to(limit, lambda: write_pt2(traced, file))
        assert code == 7, (limit, code)


def test_saving_on_a_full_disk_keeps_what_stood_there(tmp_path: Path) -> None:
    out, model = tmp_path / "out", nn.Sequential(nn.Linear(200, 200))
    save_artifact(out, model, {"layers": []})
    before = {one.name: one.read_bytes() for one in out.iterdir()}
    for limit in (0, 100, 65536, 131072, 160_000):
        code = in_a_child_with_files_up_to(
            limit, lambda: save_artifact(out, model, {"layers": []}, overwrite=True)
        )
        assert code == 7, (limit, code)
        assert {one.name: one.read_bytes() for one in out.iterdir()} == before
        assert [one.name for one in tmp_path.iterdir()] == ["out"]


def test_what_a_tokenizer_says_of_the_disk_is_the_disks(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"No space left .*bytes are free there.*Make room"),
        folder_in_one_step(tmp_path / "out"),
        saving("the tokenizer of x", "Correct its files."),
    ):
        raise Exception("No space left on device (os error 28)")
    with pytest.raises(InputError, match="can't save the tokenizer of x: no vocabulary"):  # noqa: SIM117
        with saving("the tokenizer of x", "Correct its files."):
            raise Exception("no vocabulary")


def test_a_result_that_can_not_be_saved_is_saved_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "file").touch()
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(InputError, match=r"The result was saved in .*saved instead"):
        save_somewhere(
            lambda folder: save_artifact(folder, model, {"layers": []}), tmp_path / "file"
        )
    (saved,) = (tmp_path / "temporary").glob("*/saved")
    rankfold.load(saved, model=nn.Sequential(nn.Linear(3, 2)))
