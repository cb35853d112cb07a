"""What of the data is not used is told in words, with numbers and reasons."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

import rankfold
from rankfold.certificate.document import text_lines
from rankfold.cli.tables import evaluation_lines, result_lines
from rankfold.data.given import ONCE, GivenExamples, Stream
from rankfold.data.parts import SAME, as_part
from rankfold.report.data_lines import data_lines


def test_every_reason_is_told_with_its_part() -> None:
    left_out = {"beyond the 3 that are used (limit=)": 1200, "without a label": 2}
    calibration = as_part("calibration", GivenExamples([[1.0, 2.0]] * 3, left_out=left_out))
    held_out = as_part("held_out", [{"x": [1.0], "text": "a", "id": "b"}] * 2)
    report = {
        "data": {"calibration": calibration.usage(), "held_out": held_out.usage()},
        "left_out": {"the same": 4, "not read: the stream goes on": None},
    }
    assert data_lines(report) == [
        "left out of the data: 4 the same; not read: the stream goes on",
        "left out of the calibration part: 1,200 beyond the 3 that are used (limit=); "
        "2 without a label",
        "columns left out of every example: id, text",
    ]
    assert report["data"]["calibration"]["given"] == 1205


def test_a_data_set_that_draws_is_told() -> None:
    (line,) = data_lines({"data": {"held_out": {"drawn_anew": True}}})
    assert line.startswith("the held-out part is of a data set that draws its examples anew")


def test_nothing_is_told_where_all_is_used_or_nothing_is_known() -> None:
    part = as_part("selection", [[1.0, 2.0]] * 3).usage()
    assert data_lines({"data": {"selection": part}, "left_out": {}}) == []
    assert data_lines({"data": {"selection": {"examples": 3, "digest": "of older files"}}}) == []
    assert data_lines({}) == []


def test_an_evaluation_tells_it_with_the_options_names() -> None:
    reading = Stream(range(100)).first(5)
    found = {
        "loss": {"mean": 1.0, "standard_error": 0.1, "unit": "nats"},
        "examples": 5,
        "accuracy": None,
        "left_out": {**reading.left_out, "beyond the first 5 (limit=)": 7},
    }
    assert evaluation_lines(found)[1:] == [
        "left out of the data: not read: the stream goes on after 5 examples; "
        "7 beyond the first 5 (--limit)"
    ]


def test_a_run_accounts_for_every_example_in_report_terminal_certificate_and_card(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    inputs, labels = torch.randn(100, 6), torch.arange(100) % 3
    rows = [
        {"input": x, "labels": y, "name": "a text"} for x, y in zip(inputs, labels, strict=True)
    ]
    rows += rows[:7]
    loader = DataLoader(rows, batch_size=8, sampler=[*range(107), 3, 4])  # type: ignore[arg-type]
    result = rankfold.lossless(
        model, loader, size=0.9, limit=20, held_out_limit=25, refit=False, gradient_step=False
    )
    report = result.report
    parts = report["data"].values()
    assert report["left_out"] == {ONCE: 2, SAME: 7}
    assert sum(part["given"] for part in parts) + 9 == 109
    for part in parts:
        assert part["given"] == part["examples"] + sum(part["left_out"].values())
        assert part["columns_left_out"] == ["name"]
    told = [
        f"left out of the data: 2 {ONCE}; 7 {SAME}",
        "left out of the calibration part: 30 beyond the 20 that are used (--limit)",
        "left out of the held-out part: 5 beyond the 25 that are used (--held-out-limit)",
        "columns left out of every example: name",
    ]
    lines = result_lines(report)
    assert [line for line in lines if line in told] == told
    assert any("of the held-out part: 5 beyond" in line for line in text_lines(result.document))
    card = (result.save(tmp_path / "saved") / "README.md").read_text(encoding="utf-8")
    assert all(f"- {line}" in card for line in data_lines(report))
