"""What is published, tried as who gets it: ``python -m tests.distribution dist`` (``make dist``).

The sdist holds what its tests import: it is unpacked, and they are collected there. The wheel holds
every file of the package and its types: a user's script is checked against it by mypy alone.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = """import torch
import rankfold

result = rankfold.lossless(torch.nn.Linear(2, 2), (torch.zeros(9, 2), torch.zeros(9)), size=0.9)
reveal_type(result.certificate.upper_bound)
rankfold.lossless(torch.nn.Linear(2, 2), [], size=0.9, objectve="joint")
"""


def only(folder: Path, pattern: str) -> Path:
    """The one file of a name."""
    (found,) = folder.glob(pattern)
    return found


def try_sdist(archive: Path) -> None:
    """Collect its tests from what it holds."""
    with tempfile.TemporaryDirectory() as place, tarfile.open(archive) as opened:
        opened.extractall(place, filter="data")
        (root,) = Path(place).iterdir()
        environment = {**os.environ, "PYTHONPATH": str(root / "src")}
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
        print(f"{archive.name}: {done.stdout.strip().splitlines()[-1]}")


def typed(wheel: zipfile.ZipFile, place: Path) -> list[str]:
    """What mypy says of the script where the wheel is installed, the first words of each line."""
    venv.create(place / "user")
    (packages,) = (place / "user" / "lib").glob("python*/site-packages")
    wheel.extractall(packages)
    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.origin is not None
    (packages / "beside.pth").write_text(f"{Path(torch.origin).parents[1]}\n")
    (place / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--no-error-summary"]
    command += [f"--python-executable={place}/user/bin/python", "--hide-error-context"]
    command += [f"--cache-dir={ROOT / '.mypy_cache' / 'wheel'}", "script.py"]
    environment = {name: value for name, value in os.environ.items() if name != "MYPYPATH"}
    done = subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, check=False
    )
    print(done.stdout + done.stderr)
    lines = [line.partition(": ")[2] for line in done.stdout.splitlines()]
    return [" ".join(line.split()[:4]) for line in lines if "defined in" not in line]


def try_wheel(archive: Path) -> None:
    """Compare its files with the package's, read its metadata, and type a user's script."""
    with zipfile.ZipFile(archive) as opened, tempfile.TemporaryDirectory() as place:
        held = {name for name in opened.namelist() if name.startswith("rankfold/")}
        source = ROOT / "src"
        files = (file for file in source.rglob("*") if file.is_file())
        wanted = {str(f.relative_to(source)) for f in files if "__pycache__" not in f.parts}
        assert held == wanted, sorted(held ^ wanted)
        name = next(one for one in opened.namelist() if one.endswith("/METADATA"))
        page = str(message_from_bytes(opened.read(name)).get_payload())
        assert "](docs/" not in page and "](examples/" not in page, "links that lead nowhere"
        found = typed(opened, Path(place))
        assert found == ["note: Revealed type is", "error: Unexpected keyword argument"], found
    print(f"{archive.name}: {len(held)} files, typed")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    try_wheel(only(folder, "*.whl"))
    try_sdist(only(folder, "*.tar.gz"))
