"""The certificate as files: ``certificate.json`` to be recomputed, ``certificate.txt`` to be read.

The JSON holds what was stated before, the numbers of every held-out example (or only their digest,
where the user's data is private), and what they were computed from. ``rankfold verify`` recomputes
it; a digest over the whole shows accidental edits, the recomputation shows deliberate ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from rankfold.certificate.certify import Certificate, certify
from rankfold.certificate.in_words import HELD_OUT, about, guard_words, lacking, sure
from rankfold.certificate.other_kinds import OtherKinds
from rankfold.certificate.schema import DocumentFields
from rankfold.certificate.statement import Statement
from rankfold.data.example import content_digest
from rankfold.data.parts import Part
from rankfold.errors import InputError, visible
from rankfold.files.checked import check
from rankfold.files.digests import json_digest
from rankfold.files.json_file import read_json
from rankfold.tasks.evaluation import Evaluation

FORMAT_VERSION = 1

JSON_FILE, TEXT_FILE = "certificate.json", "certificate.txt"
GIVEN_MODELS = "two given models"  # the kind of a certificate of no factorized model

SHORT = 32  # hexadecimal digits of a digest that is kept for each example

Document = dict[str, Any]


@dataclass(frozen=True)
class Evidence:
    """Everything that a certificate's numbers are computed from.

    Attributes:
        examples: ``(n,)`` digests of the examples' inputs.
        answers: ``(n,)`` digests of the whole examples, labels included.
        original: Of the original model.
        factorized: Of the factorized model.
        groups: ``(n,)`` groups, or None.
        metrics: The user's metrics by name: values of both models.
        guard: Examples of other kinds, None where nothing is known of them.
    """

    examples: list[str]
    answers: list[str]
    original: Evaluation
    factorized: Evaluation
    groups: list[str] | None
    metrics: Mapping[str, tuple[Tensor, Tensor]]
    guard: OtherKinds | None = None

    def certificate(self, statement: Statement, unit: str, data_digest: str) -> Certificate:
        """The certificate that follows from it."""
        found = certify(
            self.original,
            self.factorized,
            statement,
            unit=unit,
            data_digest=data_digest,
            groups=self.groups,
            metrics=self.metrics,
        )
        return found.guarded_by(None if self.guard is None else self.guard.certificate())

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain: dict[str, Any] = {
            "terms": self.original.terms.tolist(),
            "original_losses": self.original.losses.tolist(),
            "factorized_losses": self.factorized.losses.tolist(),
            "differences": (self.factorized.losses - self.original.losses).tolist(),
            "metrics": {
                name: {"original": before.tolist(), "factorized": after.tolist()}
                for name, (before, after) in self.metrics.items()
            },
        }
        if self.original.correct is not None and self.factorized.correct is not None:
            plain["original_correct"] = self.original.correct.tolist()
            plain["factorized_correct"] = self.factorized.correct.tolist()
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any], document: Mapping[str, Any]) -> Evidence:
        """Back from JSON."""
        terms = _tensor(plain["terms"])
        correct = [
            _tensor(plain[key]) if key in plain else None
            for key in ("original_correct", "factorized_correct")
        ]
        return cls(
            examples=document["data"]["held_out_examples"],
            answers=document["data"]["held_out_answers"],
            original=Evaluation(_tensor(plain["original_losses"]), terms, correct[0]),
            factorized=Evaluation(_tensor(plain["factorized_losses"]), terms, correct[1]),
            groups=document["data"]["held_out_groups"],
            metrics={
                name: (_tensor(values["original"]), _tensor(values["factorized"]))
                for name, values in plain["metrics"].items()
            },
            guard=read_guard(document),
        )


def read_guard(document: Mapping[str, Any]) -> OtherKinds | None:
    """Examples of other kinds; None in older certificates, and where there are none."""
    plain = document.get("guard")
    return None if plain is None else OtherKinds.from_dict(plain)


def _tensor(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def example_digests(part: Part, count: int) -> tuple[list[str], list[str]]:
    """Short digests of the first ``count`` inputs of a part, and of its whole examples."""
    answers = [content_digest(example)[:SHORT] for example in part.examples[:count]]
    return [digest[:SHORT] for digest in part.digests[:count]], answers


def make_document(
    certificate: Certificate,
    statement: Statement,
    evidence: Evidence,
    *,
    private: bool,
    models: Mapping[str, Any],
    data: Mapping[str, Any],
    run: Mapping[str, Any],
    report: Mapping[str, Any],
) -> Document:
    """The content of ``certificate.json``.

    Args:
        certificate: The verdict and its numbers.
        statement: What was stated before.
        evidence: What they follow from.
        private: Leave out every number of single examples and keep their digest.
        models: ``original``, ``factorized``: digests of weights; ``class``.
        data: Digests of the parts, what is known of overlap and of earlier openings.
        run: Plan, order of tests, task, settings, seed, versions.
        report: What ``rankfold.json`` says beside the fields of its format.
    """
    plain = evidence.as_dict()
    document: Document = {
        "format_version": FORMAT_VERSION,
        "certificate": certificate.as_dict(),
        "statement": {**asdict(statement), "metric_margins": dict(statement.metric_margins)},
        "models": dict(models),
        "data": {
            **data,
            "held_out_examples": evidence.examples,
            "held_out_answers": evidence.answers,
            "held_out_groups": evidence.groups,
        },
        "run": dict(run),
        "guard": None if evidence.guard is None else evidence.guard.as_dict(private),
        "evidence": None if private else plain,
        "evidence_digest": evidence_digest(plain),
    }
    return with_report(document, report)


def with_report(document: Document, report: Mapping[str, Any]) -> Document:
    """The same with a digest of each field of ``rankfold.json``."""
    found = {**document, "report": {name: json_digest(value) for name, value in report.items()}}
    return {**found, "digest": document_digest(found)}


def document_digest(document: Mapping[str, Any]) -> str:
    """SHA-256 over everything in it but the digest itself."""
    return json_digest({key: value for key, value in document.items() if key != "digest"})


def evidence_digest(plain: Mapping[str, Any]) -> str:
    """SHA-256 over the numbers of all examples."""
    return json_digest(dict(plain))


def files(document: Document) -> dict[str, str]:
    """The files of a certificate, by name."""
    text = json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False)
    return {JSON_FILE: text + "\n", TEXT_FILE: "\n".join(map(visible, text_lines(document))) + "\n"}


def read_document(folder: Path) -> Document:
    """``certificate.json`` of an artifact.

    Raises:
        InputError: Missing, no JSON, of a newer format, or with a field of the wrong kind.
    """
    file = folder / JSON_FILE
    if not file.is_file():
        raise InputError(
            f"{folder} has no {JSON_FILE}: it was made without a certificate that can be checked, "
            "or the file was removed. Certify the model again."
        )
    document = read_json(file)
    version = document.get("format_version") if isinstance(document, dict) else None
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise InputError(
            f"{visible(file)} has the format_version {visible(repr(version))[:60]}; this rankfold "
            f"reads {FORMAT_VERSION}."
        )
    check(document, DocumentFields, file)
    read_statement(document)
    return cast("Document", document)


def read_statement(document: Mapping[str, Any]) -> Statement:
    """What was stated before the held-out part was opened.

    Raises:
        InputError: A value is outside its range.
    """
    try:
        return Statement(**document["statement"])
    except (InputError, TypeError) as error:
        raise InputError(
            f"the statement in {JSON_FILE} is damaged: {error} Copy the artifact again, or certify "
            "the model again."
        ) from error


def text_lines(document: Mapping[str, Any]) -> list[str]:
    """The certificate as a person reads it."""
    parts = (_claim, _found, _range, _metrics, _to_show_it, _guard, _data, _order, _origin)
    return [line for part in parts for line in part(document)]


def _claim(document: Mapping[str, Any]) -> list[str]:
    """The verdict, of which models, and what was to be shown."""
    c, run, models = (document[k] for k in ("certificate", "run", "models"))
    return [
        f"rankfold certificate: {c['verdict']}",
        "",
        f"model          {models['class']}, {run['algorithm']}, {run['ratio']:.4f} of the "
        "original's parameters",
        f"weights        {models['factorized']}",
        f"original       {models['original']}",
        f"claim          the mean loss is at most {c['margin']:g} {c['unit']} above the original's"
        + ("" if c["highest"] is None else ", each example's change counted up to the range's end"),
        *_about(document),
    ]


def _about(document: Mapping[str, Any]) -> list[str]:
    """Which data the claim speaks of; older certificates don't name them."""
    parts, guard = document["data"]["parts"], document.get("guard")
    if "source" not in parts["held_out"]:
        return []
    line = about(document["run"]["task"], parts, guard)
    if guard is not None and document["certificate"].get("guard") is not None:
        line += f", and on {guard['name']}: both must hold"
    return [f"about          {line}"]


def _guard(document: Mapping[str, Any]) -> list[str]:
    """What is known of examples of other kinds; nothing in older certificates."""
    guard = document.get("guard")
    return [] if guard is None else [f"beside         {guard['name']}: {guard_words(guard)}"]


def _found(document: Mapping[str, Any]) -> list[str]:
    """The change of the loss and its bounds."""
    c, sure = document["certificate"], _sure(document)
    return [
        f"found          change {c['change']:+.6g} ± {c['standard_error']:.2g} (standard error) "
        f"over {c['examples']} held-out examples in {c['units']} independent units",
        f"bound          with {sure} confidence at most {c['upper_bound']:+.6g}, and with {sure} "
        f"at least {c['lower_bound']:+.6g} {c['unit']}",
        f"test           {c['method']}",
    ]


def _range(document: Mapping[str, Any]) -> list[str]:
    """The range in which one example's change counts, where there is one."""
    c = document["certificate"]
    if c["highest"] is None:
        return []
    return [
        f"range          the change of one example counts from {c['lowest']:+.6g} to "
        f"{c['highest']:+.6g} {c['unit']} ({c['range_from']}, before the held-out part was opened)",
        f"beyond it      {c['above']} of {c['units']} units changed by more; with "
        f"{_sure(document)} confidence at most {c['share_above']:.2%} of all do. They are counted "
        "in full here, but what those not seen here would add is not bounded",
        f"t interval     its upper bound is {c['t_upper_bound']:+.6g}, for comparison",
    ]


def _metrics(document: Mapping[str, Any]) -> list[str]:
    """What of each metric may be lost."""
    return [
        f"{metric['name']:<14} {metric['original']:.4f} to {metric['factorized']:.4f}; with "
        f"{_sure(document)} confidence at most {metric['upper_bound']:+.4f} is lost ("
        + (
            "no margin was stated)"
            if metric["margin"] is None
            else f"margin {metric['margin']:g}: {metric['verdict']})"
        )
        for metric in document["certificate"]["metrics"]
    ]


def _to_show_it(document: Mapping[str, Any]) -> list[str]:
    """How many units would show what these don't."""
    return [
        f"to show it     no number of {what} would do: the measured change is not below the margin"
        if needed is None
        else f"to show it     about {needed} {what}, if the change is what it seems"
        for what, needed in _lacking(document).items()
    ]


def _lacking(document: Mapping[str, Any]) -> dict[str, int | None]:
    """In the words of ``certificate.txt``."""
    found = lacking(document["certificate"])
    words = {HELD_OUT: "examples" if found.get(HELD_OUT, 0) is None else "units"}
    return {words.get(what, what): needed for what, needed in found.items()}


def _data(document: Mapping[str, Any]) -> list[str]:
    """The parts of the data, and what is known of them."""
    c, data = document["certificate"], document["data"]
    lines = [f"held-out       {c['data_digest']}"]
    for name in ("calibration", "selection"):
        lines.append(f"{name:<14} {data['parts'][name]['digest']}")
    for reason, count in data["parts"]["held_out"].get("left_out", {}).items():
        known = reason if count is None else f"{count} {reason}"
        lines.append(f"left out       of the held-out part: {known}")
    lines.append(f"disjoint       {overlap_line(data)}")
    lines.append(f"opened         {history_line(data['history'], c['confidence'])}")
    return lines


def _order(document: Mapping[str, Any]) -> list[str]:
    """The models in the order in which they were to be tested, where there were several."""
    order = document["run"]["order"]
    lines = [
        f"{'order of tests' if number == 1 else '':<14} {number}. {tested['ratio']:.4f} of the "
        "parameters: "
        + (
            "not tested"
            if tested["verdict"] is None
            else f"{tested['verdict']}, at most {tested['upper_bound']:+.6g}"
        )
        for number, tested in enumerate(order, 1)
    ]
    if order:
        lines.append(
            f"{'':<14} fixed before, tested until the first that fails: one confidence for all "
            "(fixed-sequence testing)"
        )
    return lines


def _origin(document: Mapping[str, Any]) -> list[str]:
    """What makes the same again, and the digest of all."""
    run = document["run"]
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    return [
        f"seed           {run['settings']['seed']}",
        f"made with      {versions}",
        f"digest         {document['digest']}",
    ]


def _sure(document: Mapping[str, Any]) -> str:
    return sure(document["certificate"]["confidence"])


def overlap_line(data: Mapping[str, Any]) -> str:
    """What is known of copies between the parts."""
    alike = data["look_alikes"]
    line = "no example, mirrored image or copied text stands in two parts"
    if alike:
        listed = ", ".join(
            f"{pair['part']} {pair['example']} = held-out {pair['held_out']}" for pair in alike[:5]
        )
        line += f"; {len(alike)} held-out images look like one of another part ({listed})"
    return line


def history_line(history: Mapping[str, Any], confidence: float) -> str:
    """What is known of earlier openings of the held-out examples."""
    if history.get("trouble") is not None:
        more = "how many others were certified before is not known"
        if history["others"]:
            more = "at least " + history_line({**history, "trouble": None}, confidence)
        return f"{visible(history['trouble'])}; {more}"
    if history["others"] == 0:
        kept = "no earlier opening for another model is on record"
        return kept if history["kept"] else kept + " (no record is kept on this machine)"
    tries = history["others"] + 1
    worst = min(1.0, tries * (1 - confidence))
    return (
        f"{history['others']} other models were certified before on {history['shared']} of these "
        f"examples ({history['lossless']} of them shown lossless or better): the best of {tries} "
        f"openings is falsely lossless with a chance of up to {_chance(worst)}, not "
        f"{_chance(1 - confidence)}"
    )


def _chance(chance: float) -> str:
    """In percent, never less than it is: 5%, 0.84%."""
    return f"{math.ceil(chance * 1e4 - 1e-6) / 100:g}%"
