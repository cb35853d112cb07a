"""What of the data is not used is told in words, with numbers and reasons."""

from __future__ import annotations

from rankfold.cli.tables import evaluation_lines
from rankfold.data.given import GivenExamples, Stream
from rankfold.data.parts import as_part
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
