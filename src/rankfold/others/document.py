"""The certificate of two given models as files: to be computed again, to be read, to be shown."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib.resources import files as resources
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, StrictUndefined

from rankfold.certificate.certify import Certificate
from rankfold.certificate.differences import differences
from rankfold.certificate.document import (
    GIVEN_MODELS,
    JSON_FILE,
    Document,
    Evidence,
    document_digest,
    evidence_digest,
    history_line,
    read_statement,
)
from rankfold.certificate.earlier_uses import History
from rankfold.certificate.in_words import VERDICTS, lacking
from rankfold.certificate.schema import (
    EvidenceFields,
    HistoryFields,
    PartFields,
    StatedFields,
    StatementFields,
)
from rankfold.certificate.statement import Statement
from rankfold.errors import InputError, visible
from rankfold.files.checked import Digest, Fields, ShortDigest, check
from rankfold.files.json_file import read_json
from rankfold.others.source import Identity

FORMAT_VERSION = 1
TEXT_FILE, CARD_FILE, BADGE_FILE = "certificate.md", "card.md", "badge.svg"
DIFFERENCES_FILE = "differences.csv"
_ASSETS = resources("rankfold.others") / "assets"
_COLOURS = {"better": "#1a7f37", "lossless": "#1a7f37", "not shown": "#6e7781", "worse": "#b35900"}
_WIDE = 6.6  # pixels of one character, about, at 11 pixels of DejaVu Sans and Verdana


class IdentityFields(Fields):
    """One of the two models."""

    kind: str
    name: str
    digest: Digest
    weights_seen: bool


class PairFields(Fields):
    """Both models."""

    original: IdentityFields
    other: IdentityFields


class GivenData(Fields):
    """The held-out examples, and those that the range was taken from."""

    held_out: PartFields
    selection: PartFields | None
    history: HistoryFields
    held_out_examples: list[ShortDigest]


class GivenDocument(Fields):
    """The whole of ``certificate.json`` of two given models."""

    format_version: int
    kind: Literal["two given models"]
    certificate: StatedFields
    statement: StatementFields
    models: PairFields
    data: GivenData
    run: dict[str, Any]
    evidence: EvidenceFields | None
    evidence_digest: Digest
    digest: Digest
    files: list[str]


def make_given(
    certificate: Certificate,
    statement: Statement,
    evidence: Evidence,
    *,
    models: tuple[Identity, Identity],
    data: Mapping[str, Any],
    history: History,
    run: Mapping[str, Any],
    private: bool,
) -> Document:
    """The content of ``certificate.json``.

    Args:
        certificate: Verdict and numbers.
        statement: What was stated before.
        evidence: What they follow from.
        models: The original and the other one.
        data: ``held_out`` and ``selection``: usage of the parts, None where there is none.
        history: Earlier openings.
        run: Task, what the verdict speaks of, settings, versions.
        private: Leave out every number of single examples and keep their digest.
    """
    plain = evidence.as_dict()
    names = [TEXT_FILE, CARD_FILE, BADGE_FILE, *([] if private else [DIFFERENCES_FILE])]
    document: Document = {
        "format_version": FORMAT_VERSION,
        "kind": GIVEN_MODELS,
        "certificate": certificate.as_dict(),
        "statement": {**asdict(statement), "metric_margins": dict(statement.metric_margins)},
        "models": {
            name: one.as_dict() for name, one in zip(("original", "other"), models, strict=True)
        },
        "data": {**data, "history": asdict(history), "held_out_examples": evidence.examples},
        "run": dict(run),
        "evidence": None if private else plain,
        "evidence_digest": evidence_digest(plain),
        "files": names,
    }
    return {**document, "digest": document_digest(document)}


def read_given(folder: Path) -> Document:
    """``certificate.json`` of two given models.

    Raises:
        InputError: Missing, damaged, of a newer format, or of another kind.
    """
    file = folder / JSON_FILE
    if not file.is_file():
        raise InputError(f"{folder} has no {JSON_FILE}; expected the output of rankfold certify.")
    document = read_json(file)
    if not isinstance(document, dict) or document.get("kind") != GIVEN_MODELS:
        raise InputError(
            f"{visible(file)} is no certificate of two given models; expected one that rankfold "
            "certify made. Of a factorized model, rankfold verify checks it."
        )
    version = document.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise InputError(
            f"{visible(file)} has the format_version {visible(repr(version))[:60]}; this rankfold "
            f"reads {FORMAT_VERSION}."
        )
    check(document, GivenDocument, file)
    return document


def recomputed(document: Document) -> list[str]:
    """What of a certificate doesn't follow from the numbers in it; nothing where all does.

    Raises:
        InputError: The statement is damaged.
    """
    problems = []
    if document["digest"] != document_digest(document):
        problems.append("its digest is another one: the file was edited or damaged")
    plain = document["evidence"]
    if plain is None:
        return [*problems, "single losses are private, so that nothing can be computed again"]
    if document["evidence_digest"] != evidence_digest(plain):
        problems.append("the digest of the single losses is another one")
    data = {"held_out_examples": document["data"]["held_out_examples"]}
    evidence = Evidence.from_dict(
        plain, {"data": {**data, "held_out_answers": [], "held_out_groups": None}}
    )
    stated = document["certificate"]
    changes = evidence.factorized.losses - evidence.original.losses
    if changes.tolist() != plain["differences"]:
        problems.append("the differences are not those of the losses")
    if len(plain["terms"]) != len(document["data"]["held_out_examples"]):
        problems.append("there are other numbers of losses and of examples")
    found = evidence.certificate(read_statement(document), stated["unit"], stated["data_digest"])
    return problems + differences(stated, found, 0.0)


def given_files(document: Document) -> dict[str, str]:
    """The files of a certificate, by name."""
    text = json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    found = {
        JSON_FILE: text,
        TEXT_FILE: "\n".join(text_lines(document)) + "\n",
        CARD_FILE: "\n".join(card_lines(document)) + "\n",
        BADGE_FILE: badge(document),
    }
    if document["evidence"] is not None:
        found[DIFFERENCES_FILE] = _differences(document)
    return found


def verdict_words(document: Document) -> str:
    """The verdict as one sentence, naming what it is about."""
    c, models, run = (document[k] for k in ("certificate", "models", "run"))
    what = VERDICTS[c["verdict"]].removeprefix("it ")
    return (
        f"{c['verdict']}: on {visible(run['about'])}, {visible(models['other']['name'])} {what}, "
        f"compared with {visible(models['original']['name'])}."
    )


def text_lines(document: Document) -> list[str]:
    """The certificate as a person reads it, in Markdown."""
    c, data, run = (document[k] for k in ("certificate", "data", "run"))
    sure = f"{c['confidence']:.0%}"
    lines = [
        f"# Certificate: {c['verdict']}",
        "",
        _escaped(verdict_words(document)),
        "",
        "| | |",
        "|---|---|",
    ]
    rows = [
        ("claim", f"the mean loss is at most {c['margin']:g} {c['unit']} above the original's"),
        (
            "found",
            f"change {c['change']:+.6g} ± {c['standard_error']:.2g} (standard error) {c['unit']}, "
            f"{c['examples']} held-out examples",
        ),
        (
            "bounds",
            f"with {sure} confidence at most {c['upper_bound']:+.6g}, and with {sure} at least "
            f"{c['lower_bound']:+.6g}",
        ),
        *_metric_rows(document, sure),
        ("test", c["method"]),
        *_range_rows(c, sure),
        *_needed_rows(c),
        ("original", _model_words(document["models"]["original"])),
        ("other", _model_words(document["models"]["other"])),
        ("task", run["task"]),
        ("held-out data", f"{data['held_out']['source'] or 'given'}, {c['data_digest']}"),
        *[
            ("left out", reason if count is None else f"{count} {reason}")
            for reason, count in data["held_out"]["left_out"].items()
        ],
        ("opened", history_line(data["history"], c["confidence"])),
        ("made with", ", ".join(f"{name} {number}" for name, number in run["versions"].items())),
        ("digest", document["digest"]),
    ]
    lines += [f"| {name} | {_escaped(visible(value))} |" for name, value in rows]
    return [
        *lines,
        "",
        "The verdict speaks of data like the held-out examples, of this loss alone, and of the "
        "models with these digests. It does not say how they behave on other data.",
    ]


def _metric_rows(document: Document, sure: str) -> list[tuple[str, str]]:
    return [
        (
            metric["name"],
            f"{metric['original']:.4f} to {metric['factorized']:.4f}; with {sure} confidence at "
            f"most {metric['upper_bound']:+.4f} is lost ("
            + (
                "no margin was stated)"
                if metric["margin"] is None
                else f"margin {metric['margin']:g}: {metric['verdict']})"
            ),
        )
        for metric in document["certificate"]["metrics"]
    ]


def _range_rows(c: Mapping[str, Any], sure: str) -> list[tuple[str, str]]:
    if c["highest"] is None:
        return []
    return [
        (
            "range",
            f"the change of one example counts from {c['lowest']:+.6g} to {c['highest']:+.6g} "
            f"({c['range_from']}, before the held-out examples were opened); {c['above']} changed "
            f"by more, with {sure} confidence at most {c['share_above']:.2%} of all do",
        )
    ]


def _needed_rows(c: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (
            "to show it",
            "no number of examples would do: the measured change is not below the margin"
            if needed is None
            else f"about {needed} {what}, if the change is what it seems",
        )
        for what, needed in lacking(c).items()
    ]


def _model_words(model: Mapping[str, Any]) -> str:
    seen = (
        "SHA-256" if model["weights_seen"] else "weights not seen; SHA-256 of what is known of it:"
    )
    return f"{model['name']} ({model['kind']}), {seen} {model['digest']}"


def card_lines(document: Document) -> list[str]:
    """Lines for a model card."""
    c = document["certificate"]
    source = document["data"]["held_out"]["source"] or "held-out data"
    return [
        "## Certificate",
        "",
        f"{_escaped(verdict_words(document))} With {c['confidence']:.0%} confidence the mean loss "
        f"is at most {c['upper_bound']:+.4g} {c['unit']} above the original's (margin "
        f"{c['margin']:g}; {c['examples']} examples of {_escaped(visible(source))}).",
        "",
        f"Paired test by rankfold, {c['test']}; certificate `{document['digest'][:16]}`.",
    ]


def badge(document: Document) -> str:
    """A badge with the verdict, as an SVG file that needs nothing else."""
    c = document["certificate"]
    label = "rankfold certificate"
    sure = f"{c['confidence']:.0%}"
    said = f"{c['verdict']}, at most {c['upper_bound']:+.2g} ({sure})"
    widths = [round(len(text) * _WIDE) + 12 for text in (label, said)]
    text: str = _template("badge.svg").render(
        label=label,
        said=said,
        title=verdict_words(document),
        colour=_COLOURS[c["verdict"]],
        left=widths[0],
        right=widths[1],
    )
    return text + "\n"


@cache
def _template(name: str) -> Any:
    text = (_ASSETS / f"{name}.j2").read_text(encoding="utf-8")
    return Environment(autoescape=True, undefined=StrictUndefined).from_string(text)


def _escaped(text: str) -> str:
    """A text in which Markdown and HTML find nothing of theirs."""
    for sign in "\\`*_[]<>|":
        text = text.replace(
            sign, f"\\{sign}" if sign not in "<>" else f"&{'lt' if sign == '<' else 'gt'};"
        )
    return text


def _differences(document: Document) -> str:
    plain, out = document["evidence"], io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["example", "digest", "terms", "original_loss", "other_loss", "difference"])
    columns = (
        plain["terms"], plain["original_losses"], plain["factorized_losses"], plain["differences"],
    )  # fmt: skip
    digests = document["data"]["held_out_examples"]
    for place, row in enumerate(zip(digests, *columns, strict=True)):
        writer.writerow([place, row[0], *map(repr, row[1:])])
    return out.getvalue()
