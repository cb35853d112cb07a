"""A certificate in one line, and as the HTML that notebooks show: without script or network."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from rankfold.certificate.in_words import VERDICTS
from rankfold.errors import visible


def bound_words(certificate: Mapping[str, Any]) -> str:
    """The change, its bound and the margin."""
    return (
        f"change {certificate['change']:+.4f}, at most {certificate['upper_bound']:+.4f} with "
        f"{certificate['confidence']:.0%} confidence, margin {certificate['margin']:g} "
        f"{visible(certificate['unit'])}"
    )


def verdict_html(certificate: Mapping[str, Any], words: str) -> Markup:
    """The verdict, what it says, and a drawing of change and bounds beside zero and margin."""
    at = _places(certificate)
    return rendered("verdict", verdict=certificate["verdict"], words=visible(words), at=at,
                    bound=bound_words(certificate))  # fmt: skip


def certificate_html(certificate: Mapping[str, Any]) -> Markup:
    """A certificate alone."""
    metrics = {
        metric["name"]: f"{metric['original']:.4f} -> {metric['factorized']:.4f}"
        for metric in certificate["metrics"]
    }
    rows = {
        "held-out examples": f"{certificate['examples']:,}",
        "standard error of the change": f"{certificate['standard_error']:.4f}",
        "test": certificate["method"],
        **metrics,
    }
    head = verdict_html(certificate, VERDICTS[certificate["verdict"]])
    return listed_html("Certificate", rows, head)


def listed_html(title: str, rows: Mapping[str, object], head: Markup | None = None) -> Markup:
    """Names and values, a row each; names and values are shown as they are."""
    shown = [(visible(name), visible(value)) for name, value in rows.items()]
    return rendered("listed", title=visible(title), head=head or Markup(""), rows=shown)


def rendered(kind: str, **values: Any) -> Markup:
    """One of the fragments of ``notebook.html``, with values escaped."""
    return Markup(_template().render(kind=kind, **values))


def _places(certificate: Mapping[str, Any]) -> dict[str, float] | None:
    """Where zero, margin, change and bounds stand, as percentages of the drawing's width."""
    keys = ("margin", "change", "lower_bound", "upper_bound")
    named = {"zero": 0.0, **{key: certificate[key] for key in keys}}
    values = [*named.values()]
    if any(value is None or not -1e300 < value < 1e300 for value in values):
        return None
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 1.0
    width = high - low + 2 * room
    return {key: round(100 * (value - low + room) / width, 2) for key, value in named.items()}


@cache
def _template() -> Any:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["count"] = lambda value: f"{value:,}"
    environment.filters["percent"] = lambda value: f"{100 * value:.1f} %"
    environment.filters["signed"] = lambda value: f"{value:+.4f}"
    text = (files("rankfold.certificate") / "notebook.html").read_text("utf-8")
    return environment.from_string(text)
