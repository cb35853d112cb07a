"""The faults of ``python -m benchmarks faults``, a few of each."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import faults


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.name)
def test_all_are_survived(fault: faults.Fault, tmp_path: Path) -> None:
    found = fault.inject(tmp_path, 3)
    assert found.tried >= 3 and found.survived == found.tried


def test_a_fault_that_is_not_survived_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "FAULTS", [])
    faults.register_fault("fire", lambda _, times: faults.Counts(times, times - 1), 5)
    lines, survived = faults.table()
    assert lines[-1] == "| fire | 5 | 4 |" and not survived
