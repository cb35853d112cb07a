"""The README.md of a saved model: sizes, certificate, how it was made, how it is opened."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rankfold.certificate.in_words import VERDICTS, guard_words, subject, sure
from rankfold.errors import visible
from rankfold.report.card_metadata import ON_HUB, metadata_block
from rankfold.report.data_lines import data_lines, source_lines
from rankfold.report.notebook import embedding_words
from rankfold.settings import Settings

CARD_FILE = "README.md"
# What pages make a link of where it stands bare, or as an address of mail; and formulas.
_LINKED = re.compile(r"://|www\.|@|\$", re.IGNORECASE)
_CACHED = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/\w+", re.ASCII)
# Last parts of paths that name no model.
_NAMELESS = re.compile(r"(model|models|checkpoint(-\d+)?|final|best|hf|output|out|[0-9a-f]{40})")


def model_card(
    report: Mapping[str, Any],
    versions: Mapping[str, str],
    class_name: str,
    *,
    of_transformers: bool,
    original: str = "",
    source: str | None = None,
    license: str = "",
    sentences: bool = False,
) -> str:
    """The text of the card; its front matter is what model hubs read.

    Args:
        report: The content of ``rankfold.json``.
        versions: Of the libraries.
        class_name: Of the model, without its module.
        of_transformers: Whether ``from_pretrained`` opens it.
        original: What it was opened as: ``owner/name`` on a hub, a folder's path, or nothing.
            Of a path only what ``public_name`` says is told.
        source: ``library:name,option=value`` where a library makes it.
        license: Of the original, as its own card names it.
        sentences: Whether sentence-transformers opens it, too.
    """
    name = source or public_name(original) or class_name
    library = "sentence-transformers" if sentences else "transformers"
    block = metadata_block(
        report,
        library=library if of_transformers else "rankfold",
        original=public_name(original),
        license=license,
        name=name.rpartition("/")[2],
    )
    parts = [
        f"---\n{block}\n---",
        f"# {as_shown(name)}, factorized to low rank",
        f"{report['ratio']:.1%} of the original's parameters. Made without fine-tuning by "
        f"rankfold {as_shown(versions.get('rankfold', ''))} and tested on held-out data.",
        "## Sizes",
        _sizes(report),
        "## Certificate",
        _certificate(report),
        "## How it was made",
        _how(report, versions, license),
        "## How to open it",
        _opening(class_name, of_transformers, source, sentences),
    ]
    return "\n\n".join(parts) + "\n"


def public_name(original: str) -> str:
    """What a card tells of where a model was opened from, again and again the same.

    Its name on a hub, also of a folder in a hub's cache; else the last part of the path, or the one
    before where that says nothing, such as ``model``.
    """
    if ON_HUB.fullmatch(original):
        return original
    if (cached := _CACHED.search(original)) is not None:
        return f"{cached['owner']}/{cached['name']}"
    parts = [part for part in original.split("/") if part]
    if len(parts) > 1 and _NAMELESS.fullmatch(parts[-1].lower()):
        parts.pop()
    return parts[-1] if parts else ""


def as_shown(text: str) -> str:
    """Markdown that shows a text as it is: no tags, links, emphasis, tables or line ends."""
    if _LINKED.search(text):  # which no backslash keeps from being a link
        return as_code(text)
    marked = re.sub(r"([\\`*\[\]|#~])", r"\\\1", visible(text))
    marked = html.escape(marked, quote=False)
    marked = re.sub(r"^(\d*)([-+.)])", r"\1\\\2", marked)  # a list, where it begins a paragraph
    return re.sub(r"^ ", "&#32;", marked)


def as_code(text: str) -> str:
    """Markdown that shows a text as code, also one with backticks."""
    text = visible(text)
    runs = [len(run) for run in re.findall("`+", text)]
    fence = "`" * (max(runs, default=0) + 1)
    space = " " if runs else ""
    return f"{fence}{space}{text}{space}{fence}"


def _sizes(report: Mapping[str, Any]) -> str:
    before, after = report["original"], report["factorized"]
    rows = [
        f"| {label} | {before[key]:,} | {after[key]:,} | "
        f"{after[key] / before[key] if before[key] else 1:.4f} |"
        for label, key in (
            ("parameters, whole model", "parameters"),
            ("parameters, factorizable layers", "factorizable_parameters"),
            ("bytes of model.safetensors", "bytes"),
            ("FLOPs of weighted layers, one example", "flops"),
        )
    ]
    return "\n".join(["| | original | this model | size |", "| --- | --- | --- | --- |", *rows])


def _certificate(report: Mapping[str, Any]) -> str:
    c, loss = report["certificate"], report["loss"]
    confidence = sure(c["confidence"])
    text = (
        f"On {c['examples']} held-out examples that nothing was tuned on, the mean loss went from "
        f"{loss['original']:.4f} to {loss['factorized']:.4f}, a change of {c['change']:+.4f} ± "
        f"{c['standard_error']:.4f} (standard error) {as_shown(c['unit'])}. With {confidence} "
        f"confidence the change is at most {c['upper_bound']:+.4f}; the margin was "
        f"{c['margin']:g}.\n\n"
        f"Verdict: **{c['verdict']}**: on {subject(report, as_shown)} {VERDICTS[c['verdict']]}."
    )
    if loss["control_change"] is not None:
        text += (
            f" The dense original, moved by the same gradient step, changes by "
            f"{loss['control_change']:+.4f}: that part is adaptation to the calibration data."
        )
    if (kept := report.get("embeddings_kept")) is not None:
        words = embedding_words(kept)
        text += f"\n\n{as_shown(words[0].upper() + words[1:])}."
    if report["agreement"]:
        text += (
            " No labels were used: the loss is the distance from the original model's outputs, so "
            "the verdict speaks of agreement with the original, not of being right."
        )
    if (guard := report.get("guard")) is not None:
        text += f"\n\n{as_shown(guard['name'].capitalize())}: {as_shown(guard_words(guard))}."
    return text + (
        "\n\nThe verdict speaks of no other data. `certificate.txt` says all of it; "
        "`rankfold verify FOLDER --data HELDOUT` computes it again."
    )


def _how(report: Mapping[str, Any], versions: Mapping[str, str], license: str) -> str:
    low_rank = [layer for layer in report["layers"] if layer["rank"] is not None]
    lines = [
        f"- call: {as_code(call_of(report))}; `rankfold.json` has every setting",
        *([f"- license of the original: {as_shown(license)}"] if license else []),
        f"- task: {as_shown(report['task'])}; seed {report['settings']['seed']}",
        f"- layers: {len(low_rank)} factorized, {len(report['layers']) - len(low_rank)} left dense "
        f"by the plan, {len(report['not_factorized'])} that can't be factorized",
        *(
            f"- {name.replace('_', '-')} part: {part['examples']} examples, SHA-256 "
            f"{part['digest'][:16]}…"
            for name, part in report["data"].items()
        ),
        *(f"- {as_shown(line)}" for line in (*source_lines(report), *data_lines(report))),
        "- versions: "
        + as_shown(", ".join(f"{name} {number}" for name, number in versions.items())),
    ]
    return "\n".join(lines)


def call_of(report: Mapping[str, Any]) -> str:
    """The call that made a model: what was asked for, and settings that are not the defaults."""
    default = asdict(Settings())
    asked = {**report["target"]}
    asked |= {k: v for k, v in report["settings"].items() if v != _plain(default[k])}
    arguments = ", ".join(f"{name}={value!r}" for name, value in asked.items())
    return f"rankfold.{report['algorithm']}(model, data, {arguments})"


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def opening_lines(class_name: str, of_transformers: bool, source: str | None) -> list[str]:
    """The Python that opens a saved model; arguments as of ``model_card``."""
    class_name = visible(class_name)
    if of_transformers:
        return [
            "import rankfold  # tells transformers how",
            f"from transformers import {class_name}",
            "",
            f'model = {class_name}.from_pretrained("FOLDER")',
        ]
    if source is not None:
        return ["import rankfold", "", 'model = rankfold.load("FOLDER")']
    return [
        "import rankfold",
        "",
        f'model = rankfold.load("FOLDER", model={class_name}(...))  # your own class',
    ]


def _opening(class_name: str, of_transformers: bool, source: str | None, sentences: bool) -> str:
    extra = "transformers" if of_transformers else "vision" if source is not None else None
    package = "rankfold" if extra is None else f"'rankfold[{extra}]'"
    code = "\n".join(["```python", *opening_lines(class_name, of_transformers, source), "```"])
    if sentences:
        code += (
            "\n\nOr, with sentence-transformers:\n\n```py\nimport rankfold\nfrom "
            "sentence_transformers import SentenceTransformer\n\n"
            'model = SentenceTransformer("FOLDER")\n```'
        )
    return (
        f"`pip install {package}`, then\n\n{code}\n\nNo code of this folder is executed. "
        "`rankfold export FOLDER --to dense` (or `pairs`) writes a form that needs no rankfold."
    )
