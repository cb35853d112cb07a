"""The coverage benchmark on few repetitions: its rates against exact ones, resuming, the table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks import coverage
from benchmarks.coverage import WORLDS, Row, World, keep, simulate, table, verdict
from benchmarks.rows import read_rows
from rankfold.certificate.change import weighted_mean
from rankfold.certificate.statement import state


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "REPETITIONS", 400)
    monkeypatch.setattr(coverage, "SLOW_REPETITIONS", 50)
    monkeypatch.setattr(coverage, "TRUTH", 40_000)
    coverage._truth.cache_clear()


def test_rates_are_kept_and_not_simulated_again(tmp_path: Path) -> None:
    file = tmp_path / "out" / "rows.jsonl"
    done: set[tuple[str, int, str]] = set()
    keep(simulate("0 or 1", 20, 10, done), file, done)
    rows = {row.test: row for row in read_rows(file, Row)}
    assert {"bounded", "t", "hall", "bootstrap-t", "betting, stated"} <= rows.keys()
    # With 20 units no sample of 0s and 1s refutes 5 %: .95^20 is .36.
    assert rows["bounded, stated"].false == 0
    assert rows["t"].rate == pytest.approx(stats.binom.cdf(0, 20, 0.05), abs=0.08)
    before = file.read_text()
    keep(simulate("0 or 1", 20, 10, done), file, done)
    assert file.read_text() == before
    lines = "\n".join([*table(list(rows.values())), *verdict(list(rows.values()))])
    assert "| 0 or 1 |" in lines and f"**{rows['t'].rate:.1%}**" in lines
    assert "plain t exceeds 5 % (at 99 % confidence) in: 0 or 1 (20:" in lines


def test_the_simulated_range_is_the_products() -> None:
    import torch

    chosen = np.random.default_rng(0).normal(0, 1, (5, 12))
    for row, highest in zip(chosen, coverage.stated_range(chosen, 50, 0.01), strict=True):
        values = torch.from_numpy(row)
        statement = state(
            weighted_mean(values, torch.ones_like(values)),
            values,
            50,
            margin=0.01,
            confidence=0.95,
            test="bounded",
            largest_change=None,
            metric_margins={},
        )
        assert statement.highest == pytest.approx(highest)


def test_the_best_of_several_plans_looks_better_on_selection_data_only() -> None:
    x, chosen = coverage.samples("best of 50 plans", 30, 10, 300, seed=0)
    assert abs(x.mean()) < 0.002
    assert chosen.mean() < -0.01


def test_cut_means_are_those_of_the_cut_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WORLDS, "uniform", World(lambda r, s: r.random(s), 1.0))
    assert coverage.cut_means("uniform", np.array([0.5, 2.0])) == pytest.approx(
        [0.375, 0.5], abs=0.01
    )


def test_a_row_exceeds_only_beyond_its_own_luck() -> None:
    assert not Row("w", 16, 8, "t", 1000, 60, 0, None).exceeds
    assert Row("w", 16, 8, "t", 1000, 80, 0, None).exceeds
