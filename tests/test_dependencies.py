"""The invariant: no release that `pyproject.toml` allows has a hole that is known to reach what
rankfold does with files of strangers.

CI reaches the package registry and no database of vulnerabilities (pip-audit's is refused there),
so the known ones stand here, with where they were read. Who finds another adds a line.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]

# Package, first release without the hole, the hole, the thread or page where it was read.
HOLES = [
    ("transformers", "5.0", "CVE-2026-1839: the Trainer's rng_state.pth is unpickled",
     "insights.marvin-42.com, after CVE.org"),
    ("transformers", "5.3", "CVE-2026-4372, GHSA-29pf-2h5f-8g72: config.json runs a hub kernel",
     "mem0ai/mem0#6110; huggingface/transformers#44395"),
    ("transformers", "5.5", "CVE-2026-5241, GHSA-fgcw-684q-jj6r: config.json turns "
     "trust_remote_code on", "ogx-ai/ogx#6309; huggingface/transformers#45122"),
    ("transformers", "5.10", "CVE-2026-9856, GHSA-xrqw-3rrv-vx5w: chat templates are written to "
     "any path", "RBLN-SW/optimum-rbln#709"),
    ("transformers", "5.10.1", "tokenizer_config.json names files anywhere, which are read",
     "huggingface/transformers#46279, and the source of 5.9.0 and 5.10.1"),
    ("transformers", "5.12", "custom_generate/generate.py of a local folder runs",
     "the source of 5.10.1 and 5.12.0"),
    ("jinja2", "3.1.6", "CVE-2025-27516: a chat template leaves the sandbox",
     "canonical/craft-parts#1038"),
    ("onnx", "1.21", "CVE-2026-27489, CVE-2026-34445: external data is read by links; "
     "attributes are overwritten", "microsoft/onnxruntime#29606"),
    ("pillow", "12.3", "PYSEC-2026-2253 to 2257: images", "OSV, by ansible/ansible-compat#607"),
    ("pyarrow", "23.0.1", "CVE-2026-25087", "climateandtech/report-analyst#129"),
]  # fmt: skip

# Known, and not reached: nothing here calls torch.load, and `sealed` refuses it to transformers.
NOT_REACHED = [
    ("torch", "2.6", "CVE-2025-32434: torch.load runs code even with weights_only",
     "autogluon/autogluon#5270"),
    ("torch", "2.10", "CVE-2026-24747: the same, by damaged memory", "bojieli/ai-agent-book#574"),
]  # fmt: skip

ROOT = Path(__file__).parents[1]


def asked_for() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    lines = [*project["dependencies"], *(line for extra in extras for line in extra)]
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize(("package", "closed", "hole", "where"), HOLES)
def test_no_allowed_release_has_a_known_hole(
    package: str, closed: str, hole: str, where: str
) -> None:
    found = [one for one in asked_for() if one.name.lower() == package]
    assert found, f"{package} is not asked for: {hole}"
    for one in found:
        lowest = [Version(s.version) for s in one.specifier if s.operator in (">=", "==", "~=")]
        assert lowest and max(lowest) >= Version(closed), f"{one} allows {hole} ({where})"


@pytest.mark.parametrize(("package", "closed", "hole", "where"), HOLES)
def test_what_is_installed_has_none(package: str, closed: str, hole: str, where: str) -> None:
    assert Version(version(package)) >= Version(closed), f"{hole} ({where})"


def test_what_is_not_reached_is_not_reached() -> None:
    calls = ("torch.load(", "pickle.load", "joblib.", "allow_pickle=True")
    for file in (ROOT / "src").rglob("*.py"):
        code = file.read_text(encoding="utf-8")
        for package, _, hole, _ in NOT_REACHED:
            assert not any(call in code for call in calls), f"{file}: {package}, {hole}"


def test_security_md_names_the_bound() -> None:
    (bound,) = {str(one.specifier) for one in asked_for() if one.name == "transformers"}
    assert ">=5.12" in bound
    assert "at least 5.12" in (ROOT / "SECURITY.md").read_text(encoding="utf-8")
