"""What a verdict speaks of, and what is known of other kinds of examples, for a person."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from rankfold.errors import visible
from rankfold.tasks.losses import TEXT

HELD_OUT, OTHER = "held-out examples", "examples of other kinds"
VERDICTS = {
    "better": "it is better than the original",
    "lossless": "it is no worse than the original by more than the margin",
    "worse": "it is worse than the original by more than the margin",
    "not shown": "it is not shown to be within the margin; more held-out examples would decide it",
}


def sure(confidence: float) -> str:
    """A confidence in percent, never more than it is: 95%, 99.17%."""
    return f"{math.floor(confidence * 1e4 + 1e-6) / 100:g}%"


def about(task: object, parts: Mapping[str, Any], guard: Mapping[str, Any] | None) -> str:
    """What a verdict speaks of: data like those that were held out, by their name.

    Args:
        task: Of the run.
        parts: ``usage`` of each part.
        guard: What the report says of other kinds, if anything; it names them.
    """
    source = parts.get("held_out", {}).get("source")
    name = visible(source) if isinstance(source, str) else "the held-out part"
    of_text = task in TEXT or (guard is not None and guard["name"].startswith("text"))
    return f"{'text' if of_text else 'data'} like {name}"


def subject(report: Mapping[str, Any], shown: Callable[[str], str] = str) -> str:
    """Which data the verdict of a run is about, as a sentence goes on from it.

    Args:
        report: The content of ``rankfold.json``.
        shown: What a name becomes where the sentence stands.
    """
    guard = report.get("guard")
    name = shown(about(report["task"], report["data"], guard))
    if guard is None or guard.get("margin") is None:
        return name
    return f"{name} and on {shown(guard['name'])}, both of which must hold,"


def guard_words(guard: Mapping[str, Any]) -> str:
    """What is known of examples of other kinds."""
    if guard["kind"] is None:
        return f"not measured: {visible(guard['missing'])}"
    examples, terms = guard["examples"], guard["terms"]
    if guard["kind"] == "own text":
        which = f"{examples} texts that the original wrote itself (seed {guard['seed']})"
    else:
        which = f"{examples} examples of {visible(guard['source'] or 'guard=')}"
    counted = which if terms == examples else f"{which}, {terms:,} tokens"
    change, error = guard["change"], guard["standard_error"]
    if change is None or error is None:
        return f"the loss is not finite on {counted}; outside the verdict"
    line = f"change {change:+.4f} ± {error:.4f} (standard error) {guard['unit']} on {counted}"
    if guard["margin"] is None:
        return f"{line}; outside the verdict"
    return (
        f"{line}; with {sure(guard['confidence'])} confidence at most {guard['upper_bound']:+.4f} "
        f"(margin {guard['margin']:g}): {guard['verdict']}; the verdict holds only if this does too"
    )


def lacking(certificate: Mapping[str, Any]) -> dict[str, int | None]:
    """How many examples would show what these don't, by what they are; None where none would."""
    guard = certificate.get("guard")
    own = certificate["upper_bound"] > certificate["margin"] or any(
        metric["verdict"] == "not shown" for metric in certificate.get("metrics", ())
    )
    found = {}
    if certificate["verdict"] == "not shown" and "needed" in certificate and (own or not guard):
        found[HELD_OUT] = certificate["needed"]
    if guard and guard.get("verdict") == "not shown":
        found[OTHER] = guard.get("needed")
    return found
