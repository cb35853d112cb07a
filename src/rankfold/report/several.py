"""A page of several runs: a curve of size against loss and a table, one file without a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rankfold.report.figures import BLUE, GREY, Spec, framed, rule_at
from rankfold.report.page import as_json, asset, template
from rankfold.report.runs import Row, groups


def several_page(
    rows: Sequence[Row], *, title: str, lines: Sequence[str], links: Mapping[str, str]
) -> str:
    """The whole page.

    Args:
        rows: The runs.
        title: What they are.
        lines: What a person has to know before comparing them.
        links: Where the page of a run lies, by its name, relative to this one.
    """
    letters = groups(rows)
    shown = [
        {**asdict(row), "letter": letter, "link": links.get(row.name)}
        for row, letter in zip(rows, letters, strict=True)
    ]
    batches = sorted({size for row in rows for size in row.latency})
    text: str = template("several.html").render(
        title=title,
        lines=lines,
        rows=shown,
        batches=batches,
        several=len({*letters}) > 1,
        figures=as_json(several_figures(rows)),
        style=asset("page.css"),
        script=asset("figures.js"),
        vega=asset("vega.min.js"),
    )
    return text


def several_figures(rows: Sequence[Row]) -> dict[str, Spec]:
    """The figures, by the id of their place on the page."""
    found = {"size-loss": _losses(rows)}
    if any(row.latency for row in rows):
        found["speed"] = _times(rows)
    return found


def _losses(rows: Sequence[Row]) -> Spec:
    """Change of the loss against size, one shape and colour for each held-out part."""
    points = [
        {
            "run": row.name,
            "size": row.parameters,
            "change": row.change,
            "low": row.lower_bound,
            "high": row.upper_bound,
            "verdict": row.verdict,
            "data": f"held-out data {letter}",
        }
        for row, letter in zip(rows, groups(rows), strict=True)
    ]
    x = {"field": "size", "type": "quantitative", "title": "share of the parameters",
         "axis": {"format": ".2~%"}, "scale": {"zero": False, "padding": 20}}  # fmt: skip
    y = {"type": "quantitative", "title": "change of the loss"}
    one = len({point["data"] for point in points}) == 1
    colour = {"value": BLUE} if one else {"field": "data", "type": "nominal", "title": None}
    shape = {"value": "circle"} if one else colour
    tooltip = [
        {"field": "run"},
        {"field": "size", "title": "share of the parameters", "format": ".2%"},
        {"field": "change", "format": "+.5f"},
        {"field": "low", "title": "from", "format": "+.5f"},
        {"field": "high", "title": "to", "format": "+.5f"},
        {"field": "verdict"},
    ]
    shared = {"x": x, "color": colour, "tooltip": tooltip}
    margins = sorted({row.margin for row in rows})
    return {
        "data": {"values": points},
        "layer": [
            rule_at("y", 0, "the original", GREY),
            *(rule_at("y", margin, f"margin {margin:g}", "#009E73") for margin in margins),
            {"mark": {"type": "line", "strokeWidth": 1.5}, "encoding": {
                "x": x, "y": {**y, "field": "change"}, "color": colour}},
            {"mark": {"type": "rule", "strokeWidth": 2}, "encoding": {
                **shared, "y": {**y, "field": "low"}, "y2": {"field": "high"}}},
            {"mark": {"type": "point", "filled": True, "size": 90}, "encoding": {
                **shared, "y": {**y, "field": "change"}, "shape": shape}},
        ],
        **framed(300),
    }  # fmt: skip


def _times(rows: Sequence[Row]) -> Spec:
    """How many times the original's time a call takes, against size."""
    points = [
        {"run": row.name, "size": row.parameters, "ratio": ratio, "batch": f"batch {batch}"}
        for row in rows
        for batch, ratio in row.latency.items()
    ]
    colour: dict[str, Any] = {
        "field": "batch", "type": "nominal", "title": None,
        "scale": {"range": [BLUE, "#D55E00", "#CC79A7"]},
    }  # fmt: skip
    return {
        "data": {"values": points},
        "layer": [
            rule_at("y", 1, "the original", GREY),
            {"mark": {"type": "line", "point": {"size": 70, "filled": True}}, "encoding": {
                "x": {"field": "size", "type": "quantitative", "title": "share of the parameters",
                      "axis": {"format": ".0%"}, "scale": {"zero": False, "padding": 20}},
                "y": {"field": "ratio", "type": "quantitative",
                      "title": "of the original's time"},
                "color": colour, "strokeDash": {"field": "batch", "title": None},
                "tooltip": [{"field": "run"}, {"field": "batch"},
                            {"field": "ratio", "format": ".2f"}]}},
        ],
        **framed(240),
    }  # fmt: skip
