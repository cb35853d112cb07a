"""The faults of ``python -m benchmarks faults``, a few of each."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import faults, faults_commands, faults_documents, faults_edits, faults_hostile

MODULES = (faults_commands, faults_documents, faults_edits, faults_hostile)  # register their faults
# tests/benchmarks/test_faults_hostile.py and tests/test_verify_edits.py have the first; the others,
# of whole commands, take too long for the tests: python -m benchmarks faults.
ELSEWHERE = (
    "hostile", "edited", "put right", "of lossless", "of the same", "of a result", "memory limits"
)  # fmt: skip
FAULTS = [one for one in faults.FAULTS if not any(word in one.name for word in ELSEWHERE)]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_all_are_survived(fault: faults.Fault, tmp_path: Path) -> None:
    found = fault.inject(tmp_path, 3)
    assert found.tried >= 3 and found.survived == found.tried


def test_a_fault_that_is_not_survived_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "FAULTS", [])
    faults.register_fault("fire", lambda _, times: faults.Counts(times, times - 1), 5)
    lines, survived = faults.table()
    assert lines[-1] == "| fire | 5 | 4 |" and not survived


def test_all_faults_are_registered() -> None:
    assert len(faults.FAULTS) >= 13 and len({one.name for one in faults.FAULTS}) >= 13
    assert len(FAULTS) >= 5
