"""What is published, tried as who gets it: ``python -m tests.distribution dist`` (``make dist``).

The sdist holds what its tests import: it is unpacked, and they are collected there. The wheel holds
every file of the package and its types: a user's script is checked against it by mypy alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
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
        opened.extractall(place)
        script = Path(place) / "script.py"
        script.write_text(SCRIPT)
        command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "script.py"]
        done = subprocess.run(
            [*command, f"--cache-dir={ROOT / '.mypy_cache' / 'wheel'}"],
            cwd=place, env={**os.environ, "MYPYPATH": place}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert 'Revealed type is "builtins.float"' in done.stdout.replace(
            '"float"', '"builtins.float"'
        ), done.stdout
        assert 'Unexpected keyword argument "objectve"' in done.stdout, done.stdout
        assert done.stdout.count("error:") == 1, done.stdout
    print(f"{archive.name}: {len(held)} files, typed")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    try_wheel(only(folder, "*.whl"))
    try_sdist(only(folder, "*.tar.gz"))
