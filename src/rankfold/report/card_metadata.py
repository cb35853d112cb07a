"""The block of metadata above a model card, by huggingface_hub: what model hubs read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankfold.errors import InputError
from rankfold.files.json_file import read_bytes

ON_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)  # owner/name
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")  # an identifier of the hub's, such as mit
_OTHER = re.compile(r"[^A-Za-z0-9._]+")
PIPELINES = {
    "causal-lm": "text-generation",
    "masked-lm": "fill-mask",
    "token-classification": "token-classification",
    "embedding": "feature-extraction",
}
TAGS = ("rankfold", "low-rank", "model-compression")


def metadata_block(
    report: Mapping[str, Any], *, library: str, original: str, license: str, name: str
) -> str:
    """YAML without the lines around it.

    Args:
        report: The content of ``rankfold.json``.
        library: What opens the model.
        original: Where it is on a hub, ``owner/name``; anything else isn't told here.
        license: Of the original, as its card has it; empty where it says nothing.
        name: Of the model, which is told in the letters of a name on a hub.
    """
    import huggingface_hub as hub  # takes a second, and only who saves a model needs it

    results = [
        hub.EvalResult(
            task_type=PIPELINES.get(report["task"]) or _plain(str(report["task"])),
            dataset_type="held-out",
            dataset_name=_plain(str(report["data"]["held_out"].get("source") or "held-out part")),
            dataset_split="held-out",
            metric_type=kind,
            metric_value=value,
            metric_name=words,
        )
        for kind, words, value in _metrics(report)
    ]
    data = hub.ModelCardData(
        base_model=original if ON_HUB.fullmatch(original) else None,
        eval_results=results,
        library_name=library,
        license=license if _LICENSE.fullmatch(license) else None,
        metrics=[*dict.fromkeys(result.metric_type for result in results)],
        model_name=_plain(name),
        pipeline_tag=PIPELINES.get(report["task"]) if library != "rankfold" else None,
        tags=[*TAGS],
    )
    return str(data.to_yaml())


def _metrics(report: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Kind, words and value of what the held-out part says, as far as it is a number."""
    loss, accuracy, certificate = report["loss"], report["accuracy"], report["certificate"]
    found: list[tuple[str, str, float | None]] = [
        ("loss", "loss", loss["factorized"]),
        ("loss", "loss of the original", loss["original"]),
        ("loss", "change of the loss, upper bound", certificate["upper_bound"]),
    ]
    if "token" in loss["unit"]:
        for key, words in (("factorized", ""), ("original", " of the original")):
            found.append(("perplexity", f"perplexity{words}", math.exp(min(700.0, loss[key]))))
    found += [
        ("accuracy", f"accuracy{words}", accuracy[key])
        for key, words in (("factorized", ""), ("original", " of the original"))
    ]
    return [(kind, words, v) for kind, words, v in found if v is not None and math.isfinite(v)]


def _plain(name: str) -> str:
    """A name in letters that mean nothing in YAML or HTML."""
    return _OTHER.sub("-", name).strip("-.") or "model"


def metadata_of(card: Path) -> dict[str, Any]:
    """What the block of a card says; nothing where it has none.

    Raises:
        InputError: It can't be read.
    """
    import huggingface_hub as hub
    import yaml

    read_bytes(card)  # which refuses what is no file, or far too long
    try:
        return dict(hub.metadata_load(card) or {})
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"the metadata of {card} can't be read: {error}") from error


def license_of(folder: Path | None) -> str:
    """The license that the model card of a folder names; nothing where there is none to be read."""
    card = None if folder is None else folder / "README.md"
    if card is None or not card.is_file():
        return ""
    try:
        found = metadata_of(card).get("license")
    except InputError:
        return ""
    return found if isinstance(found, str) and _LICENSE.fullmatch(found) else ""
