"""What the command-line tests share: a user's folder with their own model, weights and data."""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from rankfold.cli.raised import OWN_CODE
from tests.few_rounds import few_rounds

TIMEOUT = 200  # seconds
# What most runs would import for themselves; what isn't installed is passed over.
IMPORTED_BEFORE = [
    "rankfold.cli",
    "rankfold.cli.compressing",
    "rankfold.cli.recorded",
    "rankfold.cli.verifying",
    "rankfold.cli.export_inputs",
    "rankfold.report.page",
    "torch.utils.benchmark",
    "tests.few_rounds",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.bert.modeling_bert",
]

NET = '''
"""A user's own model and data."""
import pathlib, time

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1)
        self.hidden = nn.Linear(16 * 16, 64)
        self.out = nn.Linear(64, 4)

    def forward(self, x):
        x = torch.relu(self.conv(x))
        x = nn.functional.max_pool2d(x, 2).flatten(1)
        return self.out(torch.relu(self.hidden(x)))


class Slow(Net):
    def forward(self, x):
        pathlib.Path("started").touch()
        time.sleep(0.3)
        return super().forward(x)


class Chatty(Net):
    def forward(self, x):
        print("the user's own print")
        return super().forward(x)


def net():
    return Net()


def slow():
    return Slow()


def hungry():
    def forward(images):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    net = Net()
    net.forward = forward
    return net


def broken():
    raise ValueError("no such luck")


def number():
    return 3


def no_layer():
    return nn.Sequential(nn.Flatten(), nn.ReLU())


def pairs():
    import numpy as np
    with np.load("data.npz") as file:
        x = torch.from_numpy(file["x"]).unsqueeze(1).float() / 255
        return torch.utils.data.TensorDataset(x, torch.from_numpy(file["y"]).long())
'''


class TrainedNet(nn.Module):
    """The same as ``Net`` above, to be trained here."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1)
        self.hidden = nn.Linear(16 * 16, 64)
        self.out = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        x = functional.max_pool2d(x, 2).flatten(1)
        out: Tensor = self.out(torch.relu(self.hidden(x)))
        return out


def images(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """8x8 images with a bright stripe; the class is where it lies, with some labels wrong."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 4, count)
    x = rng.integers(0, 120, (count, 8, 8))
    for i, label in enumerate(y):
        x[i, 2 * label : 2 * label + 2] += 60
    wrong = rng.random(count) < 0.1
    return x.astype(np.uint8), np.where(wrong, rng.integers(0, 4, count), y)


def make_project(folder: Path) -> Path:
    torch.manual_seed(0)
    (folder / "net.py").write_text(NET)
    x, y = images(1200, seed=0)
    np.savez(folder / "data.npz", x=x, y=y)
    inputs, labels = torch.from_numpy(x).unsqueeze(1).float() / 255, torch.from_numpy(y).long()
    model = TrainedNet()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(150):
        rows = torch.randint(0, 600, (100,))
        loss = functional.cross_entropy(model(inputs[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    save_file(model.state_dict(), folder / "net.safetensors", metadata={"format": "pt"})
    return folder


# Of PyTorch's own kernels and of oneDNN's: as on processors that have no more than these.
OTHER_PROCESSORS = {
    "sse": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
}


def rankfold(
    *arguments: object,
    cwd: Path,
    expect: int = 0,
    limit_bytes: int | None = None,
    settings: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, with these environment variables.

    Without a limit or variables that libraries read as they are loaded, the process is forked from
    one that has imported the command: that import takes longer than most of these runs.
    """
    command = [str(Path(sys.executable).parent / "rankfold"), *map(str, arguments)]
    if limit_bytes is not None:
        command = ["prlimit", f"--fsize={limit_bytes}", *command]
    if limit_bytes is None and settings is None:
        done = _forked(command, cwd)
    else:
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, encoding="utf-8", timeout=TIMEOUT,
            env=environment() | dict(settings or {}),
        )  # fmt: skip
    assert done.returncode == expect, done.stdout + done.stderr
    assert ("Traceback" in done.stderr) == (expect == OWN_CODE)
    return done


def _forked(command: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """What ``subprocess.run`` gives for the installed command."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_BEFORE)
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / name for name in ("stdout", "stderr")]
        process = context.Process(target=_command, args=(command, cwd, environment(), said))
        process.start()
        process.join(TIMEOUT)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(list(command), TIMEOUT)
        assert process.exitcode is not None
        return subprocess.CompletedProcess(
            list(command), process.exitcode, *(file.read_text(encoding="utf-8") for file in said)
        )


def _command(
    command: Sequence[str], cwd: Path, variables: Mapping[str, str], said: Sequence[Path]
) -> None:
    """Be the command: its folder, its variables, its arguments, its output in these files."""
    gc.freeze()  # collections pass over what was imported before: its memory stays shared
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv[:] = command
    python_path = [path for path in variables.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:0] = [str(Path(command[0]).parent), *python_path]
    for place, file in enumerate(said, start=1):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, place)
        os.close(opened)
    from rankfold.cli import main

    few_rounds()
    try:
        main()
    finally:
        atexit._run_exitfuncs()


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1"}
