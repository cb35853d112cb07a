"""What ``mypy --strict`` sees in a script of a user's: the type of every argument and result."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each line that ends in `# ! code` is an error of that kind; `# is TYPE` is what is revealed.
SCRIPT = """
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

import rankfold
from rankfold.settings import SettingKeywords


def own_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


model = nn.Linear(4, 3)
data = [(torch.zeros(4), 0)] * 60
common: SettingKeywords = {"objective": "joint", "damping": "auto", "include": ["fc*"]}
result = rankfold.lossless(model, data, size=0.8, size_of="model", **common)
reveal_type(result)  # is rankfold.result.Result
reveal_type(result.model)  # is torch.nn.modules.module.Module
reveal_type(result.certificate)  # is rankfold.certificate.certify.Certificate
verdict: Literal["better", "lossless", "worse", "not shown"] = result.certificate.verdict
reveal_type(result.certificate.upper_bound)  # is float
reveal_type(result.certificate.holds)  # is bool
reveal_type(result.found)  # is bool
reveal_type(result.ratio)  # is float
reveal_type(result.save("out", overwrite=True))  # is pathlib.Path
small = rankfold.compact(model, data, margin=0.02, certified=True, loss=own_loss, rounds=2)
reveal_type(small)  # is rankfold.result.Result
prepared = rankfold.prepare(model, data, offload_folder=Path("disk"), test="t", private=True)
reveal_type(prepared)  # is rankfold.compress.Preparation
reveal_type(prepared.lossless(0.7))  # is rankfold.result.Result
reveal_type(prepared.sweep([0.9, 0.8]))  # is rankfold.result.Sweep
reveal_type(prepared.sweep([0.9])[0].summary())  # is str
reveal_type(result.layers)  # is list[dict[str, Any]]
rankfold.lossless(model, (torch.zeros(60, 4), [0] * 60), size=0.8, progress=True)
reveal_type(prepared.compact(margin=0.1))  # is rankfold.result.Result
reveal_type(rankfold.load("out"))  # is torch.nn.modules.module.Module
checked = rankfold.verify("out", rankfold.load("out"), data, original=model, batch_size=8)
reveal_type(checked)  # is rankfold.verify.checks.Verification
reveal_type(checked.holds)  # is bool
reveal_type(rankfold.Settings().confidence)  # is float
reveal_type(rankfold.export("out", "dense", to="dense"))  # is rankfold.export.export.Exported

rankfold.lossless(model, data, size=0.8, objectve="joint")  # ! call-arg
rankfold.lossless(model, data, size=0.8, objective="joined")  # ! arg-type
rankfold.lossless(model, data, size="0.8")  # ! arg-type
rankfold.lossless(model, data)  # ! call-arg
rankfold.lossless(model, data, size=0.8, size_of="whole")  # ! arg-type
rankfold.compact(model, data, limit="many")  # ! arg-type
rankfold.compact(model, data, margin=None)  # ! arg-type
rankfold.compact(model, data, size=0.8)  # ! call-arg
rankfold.prepare(model, data, damping="automatic")  # ! arg-type
rankfold.prepare(model, data, embeddings="yes")  # ! arg-type
rankfold.prepare(model, data, objectve="joint")  # ! call-arg
rankfold.compact(model, data, objectve="joint")  # ! call-arg
rankfold.prepare(model, data, progress="yes")  # ! arg-type
prepared.sweep(0.9)  # ! arg-type
rankfold.Settings(curvature="none")  # ! arg-type
rankfold.verify("out", model)  # ! call-arg
result.verdict  # ! attr-defined
result.certificate.verdict + 1  # ! operator
rankfold.Settings().limit + 1  # ! operator
rankfold.Settings().objective == "joined"  # ! comparison-overlap
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[str]]:
    """What mypy says of each line of the script, once for all tests."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "script.py").write_text(SCRIPT)
    cache = ROOT / ".mypy_cache" / "user"
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={cache}"]
    done = subprocess.run(
        [*command, "--no-error-summary", "--hide-error-context", "script.py"],
        cwd=folder,
        env={**os.environ, "MYPYPATH": str(ROOT / "src")},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    found: dict[int, list[str]] = {}
    for line in done.stdout.splitlines():
        if (place := re.match(r"script\.py:(\d+): (?:error|note): (.*)", line)) is not None:
            found.setdefault(int(place[1]), []).append(place[2])
    return found


LINES = dict(enumerate(SCRIPT.splitlines(), start=1))
REVEALED = [number for number, line in LINES.items() if "# is " in line]
WRONG = [number for number, line in LINES.items() if "# ! " in line]


# The first to ask for `said` waits for mypy, which reads torch where its cache is cold.
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", REVEALED, ids=lambda number: LINES[number].partition("  #")[0])
def test_types_of_results(said: dict[int, list[str]], number: int) -> None:
    expected = LINES[number].partition("# is ")[2]
    (note,) = said[number]
    revealed = note.removeprefix('Revealed type is "').removesuffix('"')
    assert revealed.replace("builtins.", "") == expected


@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", WRONG, ids=lambda number: LINES[number].partition("  #")[0])
def test_what_is_wrong_is_refused(said: dict[int, list[str]], number: int) -> None:
    code = LINES[number].partition("# ! ")[2]
    assert any(message.endswith(f"[{code}]") for message in said[number]), said[number]


@pytest.mark.timeout(900)
def test_what_is_right_is_not(said: dict[int, list[str]]) -> None:
    assert {*said} == {*REVEALED, *WRONG}
