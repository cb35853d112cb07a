"""The figures of a report as Vega-Lite specifications: plain values, no drawing here.

Colours are those of Okabe and Ito, which readers with any kind of colour vision tell apart; what
they say is also said by shape or position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np

from rankfold.errors import visible

Spec = dict[str, Any]

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8a8f98"
BINS = 40  # of the histogram
MOST_LAYERS = 400  # that one map shows


def figures(
    manifest: Mapping[str, Any],
    certificate: Mapping[str, Any] | None,
    stages: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Spec]:
    """All figures that these files have the numbers of, by the id of their place on the page.

    Args:
        manifest: The content of ``rankfold.json``.
        certificate: The content of ``certificate.json``, if there is one.
        stages: Of ``seen.json``.
    """
    known = certificate is not None and certificate.get("evidence") is not None
    found = {
        "size-loss": size_and_loss(manifest),
        "layers": layer_map(manifest["layers"]),
        "ranks": ranks(manifest["layers"]),
        "predicted": predicted_and_measured(manifest),
        "examples": histogram(manifest, certificate) if certificate is not None and known else None,
        "stages": stages_by_time(stages),
    }
    return {name: spec for name, spec in found.items() if spec is not None}


def size_and_loss(manifest: Mapping[str, Any]) -> Spec | None:
    """Every plan that selection data saw, and what the held-out part says of the chosen one."""
    verdict = manifest["certificate"]
    points = [
        {
            "size": trial["ratio"],
            "change": trial["change"],
            "low": trial["change"] - 2 * trial["standard_error"],
            "high": trial["change"] + 2 * trial["standard_error"],
            "what": "tried, fitted again" if trial["refit"] else "tried",
        }
        for trial in manifest["selection"]
        if _finite(trial["change"], trial["standard_error"])
    ]
    if _finite(verdict["change"], verdict["lower_bound"], verdict["upper_bound"]):
        points.append(
            {
                "size": manifest["ratio"],
                "change": verdict["change"],
                "low": verdict["lower_bound"],
                "high": verdict["upper_bound"],
                "what": "this model, held-out",
            }
        )
    if not points:
        return None
    kinds = ["tried", "tried, fitted again", "this model, held-out"]
    sizes = [point["size"] for point in points]
    x = {"field": "size", "type": "quantitative", "title": "share of the parameters", "axis": {
        "format": ".2~%"}, "scale": {"domain": [min(sizes) - 0.01, max(sizes) + 0.01],
        "zero": False, "nice": False}}  # fmt: skip
    y = {"type": "quantitative", "title": "change of the loss"}
    colour = {"field": "what", "type": "nominal", "title": None, "scale": {
        "domain": kinds, "range": [GREY, BLUE, ORANGE]}}  # fmt: skip
    shape = {**colour, "scale": {"domain": kinds, "range": ["circle", "square", "diamond"]}}
    tooltip = [
        {"field": "what", "title": "what"},
        {"field": "size", "title": "share of the parameters", "format": ".2%"},
        {"field": "change", "title": "change", "format": "+.5f"},
        {"field": "low", "title": "from", "format": "+.5f"},
        {"field": "high", "title": "to", "format": "+.5f"},
    ]
    shared = {"x": x, "color": colour, "tooltip": tooltip}
    return {
        "data": {"values": points},
        "layer": [
            rule_at("y", 0, "the original", GREY),
            rule_at("y", verdict["margin"], "margin", GREEN),
            {"mark": {"type": "rule", "strokeWidth": 2}, "encoding": {
                **shared, "y": {**y, "field": "low"}, "y2": {"field": "high"}}},
            {"mark": {"type": "point", "filled": True, "size": 90}, "encoding": {
                **shared, "y": {**y, "field": "change"}, "shape": shape}},
        ],
        **framed(280),
    }  # fmt: skip


def layer_map(layers: Sequence[Mapping[str, Any]]) -> Spec | None:
    """What is kept of each layer, in the order of the model."""
    if not layers:
        return None
    rows = [
        {
            "order": place,
            "layer": visible(layer["name"]),
            "kept": layer["factorized_parameters"] / max(1, layer["parameters"]),
            "parameters": layer["factorized_parameters"],
            "form": layer["form"] or ("dense" if layer["rank"] is None else "low rank"),
            "rank": "none" if layer["rank"] is None else str(layer["rank"]),
        }
        for place, layer in enumerate(layers[:MOST_LAYERS])
    ]
    forms = sorted({row["form"] for row in rows}, key=lambda form: (form == "dense", form))
    colours = cycle((BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9"))
    return {
        "data": {"values": rows},
        "mark": {"type": "bar"},
        "encoding": {
            "x": {"field": "order", "type": "ordinal", "axis": None},
            "y": {"field": "kept", "type": "quantitative", "title": "kept of the layer's weights",
                  "axis": {"format": ".0%"}},
            "color": {"field": "form", "type": "nominal", "title": None, "scale": {
                "domain": forms, "range": [GREY if form == "dense" else next(colours)
                                           for form in forms]}},
            "tooltip": [
                {"field": "layer"},
                {"field": "kept", "format": ".1%"},
                {"field": "rank"},
                {"field": "form"},
                {"field": "parameters", "title": "parameters now", "format": ","},
            ],
        },
        **framed(180),
    }  # fmt: skip


def ranks(layers: Sequence[Mapping[str, Any]]) -> Spec | None:
    """The predicted change of each layer by its rank; which layer is shown is chosen."""
    curved = [layer for layer in layers[:MOST_LAYERS] if layer.get("predicted_by_rank")]
    if not curved:
        return None
    points = [
        {"layer": visible(layer["name"]), "rank": rank, "change": change}
        for layer in curved
        for rank, change in layer["predicted_by_rank"]
        if _finite(change)
    ]
    marks = [
        {"layer": visible(layer["name"]), "rank": rank, "what": what}
        for layer in curved
        for what, rank in (
            ("chosen", layer["rank"]),
            ("harmless from here", (layer["harmless_range"] or {}).get("lossless_rank")),
        )
        if rank is not None
    ]
    names = list(dict.fromkeys(point["layer"] for point in points))
    chosen = {"name": "shown", "value": names[0], "bind": {
        "input": "select", "options": names, "name": "layer "}}  # fmt: skip
    one = [{"filter": "datum.layer == shown"}]
    colour = {"field": "what", "type": "nominal", "title": None, "scale": {
        "domain": ["chosen", "harmless from here"], "range": [ORANGE, GREEN]}}  # fmt: skip
    x = {"field": "rank", "type": "quantitative", "title": "rank"}
    return {
        "params": [chosen],
        "layer": [
            {"data": {"values": points}, "transform": one,
             "mark": {"type": "line", "point": True, "color": BLUE},
             "encoding": {"x": x, "y": {"field": "change", "type": "quantitative",
                                        "title": "predicted change of the loss"},
                          "tooltip": [{"field": "rank"}, {"field": "change", "format": "+.3g"}]}},
            {"data": {"values": marks}, "transform": one,
             "mark": {"type": "rule", "strokeWidth": 2, "strokeDash": [6, 4]},
             "encoding": {"x": x, "color": colour,
                          "tooltip": [{"field": "what"}, {"field": "rank"}]}},
        ],
        **framed(240),
    }  # fmt: skip


def predicted_and_measured(manifest: Mapping[str, Any]) -> Spec | None:
    """What each plan was predicted to change, beside what selection data say."""
    points = [
        {
            "predicted": trial["predicted_change"],
            "measured": trial["change"],
            "size": trial["ratio"],
        }
        for trial in manifest["selection"]
        if _finite(trial["predicted_change"], trial["change"])
    ]
    if not points:
        return None
    ends = [value for point in points for value in (point["predicted"], point["measured"])]
    low, high = min(ends), max(ends)
    room = 0.05 * (high - low) or 0.01
    ends = [low - room, high + room]
    scale = {"domain": ends, "nice": False}
    line = [{"predicted": end, "measured": end} for end in ends]
    x = {"field": "predicted", "type": "quantitative", "title": "predicted", "scale": scale,
         "axis": {"format": ".1~e" if max(map(abs, ends)) < 1e-3 else ".4~f"}}  # fmt: skip
    y = {**x, "field": "measured", "title": "measured"}
    return {
        "layer": [
            {"data": {"values": line}, "mark": {"type": "line", "color": GREY,
                "strokeDash": [4, 4]}, "encoding": {"x": x, "y": y}},
            {"data": {"values": points},
             "mark": {"type": "point", "filled": True, "size": 80, "color": BLUE},
             "encoding": {"x": x, "y": y, "tooltip": [
                 {"field": "size", "title": "share of the parameters", "format": ".2%"},
                 {"field": "predicted", "format": "+.5f"},
                 {"field": "measured", "format": "+.5f"}]}},
        ],
        **framed(240),
    }  # fmt: skip


def histogram(manifest: Mapping[str, Any], certificate: Mapping[str, Any]) -> Spec | None:
    """How the loss of each held-out example changed."""
    differences = np.asarray(certificate["evidence"]["differences"], dtype=np.float64)
    differences = differences[np.isfinite(differences)]
    if not len(differences):
        return None
    counts, edges = np.histogram(differences, bins=BINS)
    bars = [
        {"from": float(low), "to": float(high), "examples": int(count)}
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
    unit = manifest["loss"]["unit"]
    return {
        "data": {"values": bars},
        "layer": [
            {"mark": {"type": "bar", "color": BLUE}, "encoding": {
                "x": {"field": "from", "type": "quantitative", "bin": {"binned": True},
                      "title": f"change of an example's loss, {unit}"},
                "x2": {"field": "to"},
                "y": {"field": "examples", "type": "quantitative"},
                "tooltip": [{"field": "from", "format": "+.4f"}, {"field": "to", "format": "+.4f"},
                            {"field": "examples"}]}},
            rule_at("x", 0, "no change", GREY),
            rule_at("x", manifest["certificate"]["change"], "mean change", ORANGE, row=24),
        ],
        **framed(220),
    }  # fmt: skip


def stages_by_time(stages: Sequence[Mapping[str, Any]]) -> Spec | None:
    """Seconds of each stage, in the order of the run."""
    if not stages:
        return None
    rows = [{**one, "stage": visible(one["name"])} for one in stages]
    return {
        "data": {"values": rows},
        "mark": {"type": "bar", "color": BLUE},
        "encoding": {
            "y": {"field": "stage", "type": "nominal", "sort": None, "title": None,
                  "axis": {"labelLimit": 190}},
            "x": {"field": "seconds", "type": "quantitative", "title": "seconds"},
            "tooltip": [{"field": "stage"}, {"field": "seconds", "format": ".2f"},
                        {"field": "megabytes", "title": "most memory until then, MB",
                         "format": ",.0f"}],
        },
        **framed(18 * len(rows) + 10),
    }  # fmt: skip


def rule_at(axis: str, at: float, label: str, colour: str, row: int = 8) -> Spec:
    """A line across the figure, named at its end."""
    where = {axis: {"datum": at}}
    align = {"y": {"align": "left", "x": 4, "dy": -7}, "x": {"align": "left", "y": row, "dx": 4}}
    return {
        "data": {"values": [{}]},  # once, whatever the figure's data
        "layer": [
            {"mark": {"type": "rule", "color": colour, "strokeDash": [4, 4]}, "encoding": where},
            {"mark": {"type": "text", "text": label, **align[axis]}, "encoding": where},
        ],
    }


def framed(height: int) -> Spec:
    """What every figure has: as wide as its place on the page."""
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
    }


def _finite(*values: float | None) -> bool:
    return all(value is not None and np.isfinite(value) for value in values)
