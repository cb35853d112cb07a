from pathlib import Path

import pytest

from benchmarks import stages
from benchmarks.growth import exponent
from benchmarks.rows import read_rows
from benchmarks.stages import LossRow, Spent, StageRow, measure_stages, side_by_side
from tests.small_models import image_data, trained_cnn


def build(seed, calibration):
    return trained_cnn(), image_data(200)


def test_stages_of_several_sizes_and_what_each_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(stages.FIELD_MODELS, "small", (build, 200))
    unit = Spent(wall=1.0, user=1.0, system=1.0)
    monkeypatch.setattr(stages, "_unit_in_a_process", lambda *_: unit)
    file = tmp_path / "field.jsonl"
    measure_stages(file, "small", 0, [0.8, 0.7, 0.6], 1, effort="fast")
    rows = read_rows(tmp_path / "field_stages.jsonl", StageRow)
    losses = read_rows(tmp_path / "field_stages_losses.jsonl", LossRow)
    parts = [row.what for row in rows if row.stage == "all"]
    assert parts == ["prepare", "lossless", "further size, 0.7", "further size, 0.6"]
    for part in ("prepare", "lossless"):
        of_part = [row for row in rows if row.what == part]
        whole = next(row for row in of_part if row.stage == "all")
        assert whole.wall == pytest.approx(sum(r.wall for r in of_part if r is not whole))
    assert [loss.size for loss in losses] == [0.8, 0.7, 0.6]
    assert losses[0].less(losses[0]).mean == 0
    differences = [b - a for a, b in zip(losses[2].original, losses[2].factorized, strict=True)]
    assert losses[2].less().mean == pytest.approx(sum(differences) / len(differences))
    assert "| lossless | all |" in capsys.readouterr().out
    shown = "\n".join(side_by_side(rows, losses))
    assert shown.count("small, 200, effort fast, 0") == 7


def test_an_exponent_is_the_slope_of_logarithms() -> None:
    assert exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)
