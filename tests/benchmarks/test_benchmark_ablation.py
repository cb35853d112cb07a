"""Tables and figures of the ablation, from made rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.ablation_report import draw, draw_own_text, draw_predictions, tables
from benchmarks.ablation_runs import Row, mixed_with_docstrings
from benchmarks.observed import observe
from rankfold.data.parts import Data, as_part
from rankfold.settings import Settings

FIRST = Row(
    model="net", seed=0, variant="all parts", size=0.9, kept=0.91, bytes_kept=0.92, dense_loss=1.0,
    change=-0.01, standard_error=0.002, accuracy=0.5, dense_accuracy=0.5, predicted=-0.02,
    control=-0.03, other_change=None, other_standard_error=None, other_control=None, eta=0.001,
    verdict="better", seconds=1.0,
)  # fmt: skip
ROWS = [
    FIRST,
    replace(FIRST, seed=1, change=-0.03),
    replace(FIRST, variant="no gradient step", change=0.01, eta=None, control=None),
]


def test_a_line_has_the_mean_over_the_seeds_and_their_spread() -> None:
    printed = tables(ROWS)["ablation net"]
    assert "| all parts | 2 | -0.0200 ± 0.0020, seeds ± 0.0141 | -0.0200 | -0.0300 |" in printed
    assert "| no gradient step | 1 | +0.0100 ± 0.0020 | -0.0200 |  |" in printed


def test_what_compact_found_has_a_table_of_its_own() -> None:
    found = replace(FIRST, size=None, share=0.6543, kept=0.7, verdict="lossless")
    printed = tables([*ROWS, found])["ablation net"]
    assert "| all parts | 0 | 0.654 | 0.7000 | -0.0100 ± 0.0020 | -0.0300 | lossless |" in printed
    assert "| all parts | 2 | -0.0200 ± 0.0020" in printed  # and is in no other
    assert "compact" not in tables(ROWS)["ablation net"]


def test_seconds_of_a_gpu_stand_apart() -> None:
    printed = tables([FIRST, replace(FIRST, seed=1, device="cuda", seconds=3.0)])["ablation net"]
    assert "| 1; 3 (cuda) |" in printed


def test_a_variant_uses_all_windows_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    from benchmarks import ablation_runs
    from tests.tiny_language_model import tiny_llama

    def windows(count: int, first: int) -> list[torch.Tensor]:
        return [torch.full((4,), first + place) for place in range(count)]

    many = Data(calibration=windows(5, 1), selection=windows(40, 10), held_out=windows(6, 60))
    parts: dict[str, int] = {}

    def stopped(model: torch.nn.Module, data: Data, settings: Settings, *_: object) -> None:
        found = observe(model, data, replace(settings, objective="svd"))
        parts.update({name: len(part.examples) for name, part in found.parts.items()})
        raise InterruptedError

    monkeypatch.setitem(
        ablation_runs.FIELD_MODELS, "smollm2", (lambda seed, count: (tiny_llama(0)[0], many), 5)
    )
    monkeypatch.setattr(
        ablation_runs, "other_text", lambda length: as_part("other", windows(2, 80))
    )
    monkeypatch.setattr(ablation_runs, "collect_or_read", stopped)
    with pytest.raises(InterruptedError):
        ablation_runs.Runner(tmp_path / "rows.jsonl").run("smollm2", 0, ["all parts"], [0.9])
    assert parts == {"calibration": 5, "selection": 40, "held_out": 6}


def test_figures_are_the_same_for_the_same_rows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")

    def drawn() -> dict[str, bytes]:
        files = [*draw(ROWS, tmp_path), draw_predictions(ROWS, tmp_path)]
        return {file.name: file.read_bytes() for file in files}

    first = drawn()
    assert set(first) == {"ablation_net.svg", "ablation_predicted.svg"}
    assert drawn() == first
    draw_predictions(ROWS[:2], tmp_path)
    assert (tmp_path / "ablation_predicted.svg").read_bytes() != first["ablation_predicted.svg"]


def test_own_text_is_drawn_where_a_curve_has_two_points(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    name = "twice the calibration data"
    tested = replace(FIRST, variant=name, other_change=0.1, other_standard_error=0.01)
    assert draw_own_text([tested], tmp_path) is None
    assert draw_own_text(ROWS, tmp_path) is None
    mixed = replace(tested, variant=f"{name}, half own text", other_change=0.05)
    file = draw_own_text([*ROWS, tested, mixed], tmp_path)
    assert file is not None
    first = file.read_bytes()
    draw_own_text([tested, replace(mixed, other_change=0.2)], tmp_path)
    assert file.read_bytes() != first


def test_docstrings_are_read_without_importing_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    from benchmarks.language_models import docstrings

    long, other = "A text of more than twenty characters.", "Another text, long enough as well."
    package = tmp_path / "some_package"
    package.mkdir()
    (package / "__init__.py").write_text(f'"""{long}"""\nraise RuntimeError("imported")\n')
    (package / "again.py").write_text(f'"""{long}"""\nclass A:\n    """{other}"""\n')
    (package / "newer.py").write_text('"""Not parsed by this Python, whichever."""\nx = = 1\n')
    (package / "short.py").write_text('def f():\n    """Short."""\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    assert docstrings(["some_package"], shortest=20) == [long, other]
    with pytest.raises(ValueError, match="no_such_package"):
        docstrings(["no_such_package"])


def test_docstrings_take_the_place_of_the_last_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from benchmarks import language_models

    monkeypatch.setattr(language_models, "load_tokenizer", lambda: None)

    def drawn(tokenizer: None, *, length: int, count: int, seed: int) -> torch.Tensor:
        return torch.full((count, length), seed)

    monkeypatch.setattr(language_models, "docstring_windows", drawn)
    windows = [torch.full((8,), 10 + number) for number in range(4)]
    data = Data(calibration=windows, selection=windows, held_out=windows)
    mixed = mixed_with_docstrings(data, 0.5, 8, seed=3)
    assert [int(window[0]) for window in mixed.calibration] == [10, 11, 3, 3]
    assert mixed_with_docstrings(data, 0.0, 8, seed=3) is data
