"""``report.html``: what came of a run, to look at; one file that needs no network.

It is made of the two JSON files of a saved model, and of what only the run could see, if that was
kept (``seen.json``). Names from these files are shown, never interpreted: jinja2 escapes them, and
what figures and the table read is JSON in which no tag can end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from rankfold.certificate.in_words import VERDICTS, about, guard_words, subject, sure
from rankfold.errors import InputError, visible
from rankfold.files.listed import PAGE_FILE as PAGE_FILE
from rankfold.report.data_lines import data_lines, source_lines
from rankfold.report.figures import figures
from rankfold.report.latency import speed_sentence
from rankfold.report.model_card import call_of, opening_lines

_ASSETS = files("rankfold.report") / "assets"
_SIZES = {
    "parameters": "parameters",
    "bytes": "bytes of the file",
    "flops": "FLOPs of one example",
}


def page(
    manifest: Mapping[str, Any],
    certificate: Mapping[str, Any] | None,
    seen: Mapping[str, Any] | None = None,
) -> str:
    """The whole page.

    Args:
        manifest: The content of ``rankfold.json``.
        certificate: The content of ``certificate.json``, None where there is none.
        seen: The content of ``seen.json``.
    """
    found = {"examples": [], "latency": None, "stages": [], **(seen or {})}
    shares = _shares(manifest["layers"])
    layers = [
        _layer(place, layer) | share
        for place, (layer, share) in enumerate(zip(manifest["layers"], shares, strict=True), 1)
    ]
    text: str = template("page.html").render(
        manifest=manifest,
        certificate=manifest["certificate"],
        loss=manifest["loss"],
        title=f"{_class_name(manifest)} at {manifest['ratio']:.1%} of its parameters",
        verdict=VERDICTS[manifest["certificate"]["verdict"]],
        subject=subject(manifest),
        about=about(manifest["task"], manifest["data"], manifest.get("guard")),
        guard=None if manifest.get("guard") is None else guard_words(manifest["guard"]),
        sizes=_sizes(manifest),
        lines=[*source_lines(manifest), *data_lines(manifest)],
        layers=layers,
        shape=_shape_of(layers),
        call=visible(call_of(manifest)),
        opening=_opening(manifest),
        seen=found,
        speed=None if found["latency"] is None else speed_sentence(found["latency"]),
        measured=any(layer["measured"] is not None for layer in layers),
        figures=as_json(figures(manifest, certificate, found["stages"])),
        rows=as_json(layers),
        style=asset("page.css"),
        script=Markup("\n").join(map(asset, ("table.js", "figures.js"))),
        vega=asset("vega.min.js"),
    )
    return text


def is_page(file: Path) -> bool:
    """Whether rankfold has made a file of this name, by what its head says.

    Raises:
        InputError: It can't be read.
    """
    try:
        with file.open("rb") as opened:
            return b'<meta name="generator" content="rankfold">' in opened.read(4096)
    except OSError as error:
        raise InputError(f"{visible(file)} can't be read: {error.strerror}.") from error


@cache
def template(name: str) -> Any:
    """A page of the assets, to be rendered; what is put into it is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["shown"] = visible
    environment.filters["sure"] = sure
    environment.filters["signed"] = lambda value: "none" if value is None else f"{value:+.4f}"
    environment.filters["share"] = lambda value: f"{value:.1%}"
    environment.filters["count"] = lambda value: f"{value:,}"
    return environment.from_string((_ASSETS / name).read_text("utf-8"))


def asset(name: str) -> Markup:
    """A file of this package: our own, and in nobody's hands."""
    return Markup((_ASSETS / name).read_text("utf-8"))


def as_json(value: object) -> Markup:
    """JSON that may stand inside a script element: no character of it begins a tag."""
    text = json.dumps(value, allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def _class_name(manifest: Mapping[str, Any]) -> str:
    return visible(str(manifest["model"].get("class", "model")).rpartition(".")[2])


def _sizes(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    before, after = manifest["original"], manifest["factorized"]
    return [
        {
            "what": label,
            "before": before[key],
            "after": after[key],
            "share": after[key] / before[key] if before[key] else 1.0,
        }
        for key, label in _SIZES.items()
    ]


def _layer(place: int, layer: Mapping[str, Any]) -> dict[str, Any]:
    """One row of the table of layers."""
    before, after = layer["parameters"], layer["factorized_parameters"]
    return {
        "place": place,
        "layer": visible(layer["name"]),
        "kind": layer["kind"],
        "shape": " x ".join(map(str, layer["shape"])),
        "rank": layer["rank"],
        "full": layer["full_rank"],
        "form": layer["form"] or ("dense" if layer["rank"] is None else "low rank"),
        "before": before,
        "after": after,
        "kept": after / before if before else 1.0,
        "predicted": layer["predicted_change"],
        "why": visible(layer["reason_dense"] or ""),
    }


def _shares(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, float | None]]:
    """Each layer's share of the predicted change, by itself and with measured interactions."""
    # Layers that stay dense change nothing; without interactions both shares are one.
    alone, together = [], []
    for layer in layers:
        change = (layer["predicted_change"] or 0.0) if layer["rank"] is not None else 0.0
        together.append(change)
        alone.append(change / (layer["interaction_factor"] or 1.0))
    measured = any(layer["interaction_factor"] is not None for layer in layers)
    sums = math.fsum(alone), math.fsum(together)
    return [
        {
            "share": one / sums[0] if sums[0] > 0 else None,
            "measured": other / sums[1] if measured and sums[1] > 0 else None,
        }
        for one, other in zip(alone, together, strict=True)
    ]


def _shape_of(layers: list[dict[str, Any]]) -> dict[str, int]:
    """How many layers are smaller, and how many stayed."""
    smaller = sum(layer["rank"] is not None for layer in layers)
    return {"smaller": smaller, "dense": len(layers) - smaller}


def _opening(manifest: Mapping[str, Any]) -> str:
    model = manifest["model"]
    kind, source = model["kind"], model.get("source")
    return "\n".join(opening_lines(_class_name(manifest), kind == "transformers", source))
