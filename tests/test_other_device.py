"""rankfold on another device than the CPU makes what it makes on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration

SCRIPT = Path(__file__).with_name("other_device.py")
# Older versions of PyTorch can't have a device that is written in Python.
emulates = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="PyTorch is too old",
)
DEVICES = [
    pytest.param("emulated", marks=emulates),
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.timeout(300)
def test_another_device_makes_the_same_models_and_keeps_them(device: str) -> None:
    command = [sys.executable, str(SCRIPT), device]
    # Sums in another order, as of two threads, may choose another plan: not what is compared here.
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=one_thread)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout)
    assert len(found) == 6
    for case, by_device in found.items():
        here, there = by_device["cpu"], by_device[device]
        assert there["devices"] == [device], case
        assert there["ratio"] == pytest.approx(here["ratio"], abs=1e-3), case
        assert there["change"] == pytest.approx(here["change"], rel=0.02, abs=2e-4), case


@emulates
def test_the_emulated_device_refuses_what_cuda_refuses() -> None:
    program = (
        "import other_device as d, torch\n"
        "d.register()\n"
        "with d.emulated():\n"
        "    there = torch.ones(3).to('emulated')\n"
        "    for wrong in (lambda: there + torch.ones(3), lambda: torch.ones(3)[there.long()],\n"
        "                  lambda: torch.ones(3).add_(there), lambda: there.numpy()):\n"
        "        try:\n"
        "            wrong()\n"
        "        except (RuntimeError, TypeError):\n"
        "            continue\n"
        "        raise SystemExit('accepted')\n"
        "    assert (there * 2 + torch.tensor(1.0)).cpu().tolist() == [3.0] * 3\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=SCRIPT.parent, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
