"""Two runs of lm-evaluation-harness on one task, paired by document.

``lm_eval`` with ``log_samples`` writes a line of JSON for each document: the task's metrics, and
the document's number and digests. Metrics from 0 to 1 of which more is better are compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rankfold.certificate.document import SHORT
from rankfold.errors import InputError, listed, visible
from rankfold.files.digests import json_digest, stream_digest
from rankfold.others.source import Identity
from rankfold.tasks.evaluation import Evaluation

LARGEST = 2 << 30  # bytes of one file
_NAME = re.compile(r"samples_(?P<task>.+?)_\d{4}-\d\d-\d\dT[\d.:-]+\.jsonl")
_DIGESTS = ("doc_hash", "prompt_hash", "target_hash")
_RUN = "lm_eval with log_samples"


@dataclass(frozen=True)
class Samples:
    """What two files say of the same documents.

    Attributes:
        original: Which run is the original's.
        other: Which is the other's.
        metric: Name of the metric.
        task: Of the harness, as the names of the files say it; None where they say nothing.
        documents: ``(n,)`` digests of the documents, in the order of their numbers.
        losses: ``1 - metric`` of each document, of both.
        left_out: Lines of other filters, by the reason, in each of the files.
    """

    original: Identity
    other: Identity
    metric: str
    task: str | None
    documents: list[str]
    losses: tuple[Evaluation, Evaluation]
    left_out: dict[str, int]


def read_samples(
    original: Path, other: Path, metric: str | None = None, filtered: str | None = None
) -> Samples:
    """Pair two files.

    Args:
        original: Of the original model.
        other: Of the other one.
        metric: Which metric; None where the files have one alone.
        filtered: Which filter of the task; None where the files have one alone.

    Raises:
        InputError: A file can't be read, the two are of different tasks or documents, a document
            stands twice, or the metric is none from 0 to 1.
    """
    task = _same_task(original, other)
    files = (original, other)
    lines = [_lines(file) for file in files]
    chosen = _filter(files, lines, filtered)
    kept = [[one for one in each if one.get("filter") == chosen] for each in lines]
    by_document = [_by_document(file, each) for file, each in zip(files, kept, strict=True)]
    _check_alike(files, by_document)
    name = _metric(files, by_document, metric)
    order = sorted(by_document[0], key=_in_order)
    values = [
        [_value(f, each[d], d, name) for d in order]
        for f, each in zip(files, by_document, strict=True)
    ]
    ones = torch.ones(len(order), dtype=torch.float64)
    first, second = (1 - torch.tensor(each, dtype=torch.float64) for each in values)
    away = len(lines[0]) - len(kept[0])
    return Samples(
        original=_identity(original),
        other=_identity(other),
        metric=name,
        task=task,
        documents=[_digest(by_document[0][one]) for one in order],
        losses=(Evaluation(first, ones, None), Evaluation(second, ones, None)),
        left_out={"lines of other filters": away} if away else {},
    )


def _same_task(original: Path, other: Path) -> str | None:
    """The task that the names of both files say."""
    named = [_NAME.fullmatch(file.name) for file in (original, other)]
    tasks = [None if found is None else found["task"] for found in named]
    if None not in tasks and tasks[0] != tasks[1]:
        raise InputError(
            f"{visible(original)} is of the task {visible(tasks[0])}, {visible(other)} of "
            f"{visible(tasks[1])}; expected samples of one task. Give those of the same one."
        )
    return tasks[0] or tasks[1]


def _lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file, a line each."""
    if not file.is_file():
        raise InputError(f"no such file of samples: {file}; expected what {_RUN} writes.")
    if file.stat().st_size > LARGEST:
        raise InputError(f"{file} has {file.stat().st_size} bytes; expected at most {LARGEST}.")
    found: list[dict[str, Any]] = []
    try:
        with file.open(encoding="utf-8") as opened:
            for number, line in enumerate(opened, 1):
                if line.strip():
                    found.append(_object(file, number, line))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{visible(file)} can't be read: {visible(error)}") from error
    if len(found) < 2:
        raise InputError(
            f"{visible(file)} has {len(found)} samples; expected 2 or more, a line of JSON each, "
            f"as {_RUN} writes them."
        )
    return found


def _object(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{visible(file)}, line {number} is no JSON: {visible(error)}") from error
    key = value.get("doc_id") if isinstance(value, dict) else None
    if not isinstance(key, int | str) or isinstance(key, bool):
        raise InputError(
            f"{visible(file)}, line {number} has no doc_id; expected a sample as {_RUN} writes it."
        )
    found: dict[str, Any] = value
    if not isinstance(found.get("filter"), str | None):
        raise InputError(f"{visible(file)}, line {number} has a filter that is no text.")
    return found


def _filter(
    files: Sequence[Path], lines: Sequence[list[dict[str, Any]]], asked: str | None
) -> str | None:
    """The filter whose lines are compared."""
    known = [{one.get("filter") for one in each} for each in lines]
    both = sorted(map(str, known[0] & known[1]))
    if asked is not None:
        if not all(asked in each for each in known):
            raise InputError(
                f"the filter is {visible(asked)!r}; both files have: "
                f"{', '.join(map(visible, both)) or 'none'}."
            )
        return asked
    if known[0] != known[1]:
        raise InputError(
            f"{visible(files[0])} and {visible(files[1])} have samples of different filters; "
            f"name one that both have with filter=: {', '.join(map(visible, both)) or 'none'}."
        )
    if len(known[0]) > 1:
        raise InputError(
            f"the samples are of several filters: {', '.join(map(visible, both))}; each document "
            "stands once for each. Name one with filter=."
        )
    only: str | None = next(iter(known[0]))
    return only


def _by_document(file: Path, lines: Sequence[dict[str, Any]]) -> dict[int | str, dict[str, Any]]:
    found: dict[int | str, dict[str, Any]] = {}
    twice = []
    for one in lines:
        if one["doc_id"] in found:
            twice.append(f"doc_id {visible(one['doc_id'])}")
        found[one["doc_id"]] = one
    if twice:
        raise InputError(
            f"{visible(file)} has documents that stand twice:\n  {listed(twice)}\n"
            "Expected one sample a document. Give the samples of one run of one task."
        )
    return found


def _check_alike(
    files: Sequence[Path], by_document: Sequence[Mapping[int | str, Mapping[str, Any]]]
) -> None:
    """Refuse documents that only one file has, or that differ."""
    first, second = by_document
    alone = [
        f"doc_id {visible(one)}: in {visible(files[0 if one in first else 1])} alone"
        for one in sorted({*first} ^ {*second}, key=_in_order)
    ]
    differ = [
        f"doc_id {visible(one)}: another {_differing(first[one], second[one])}"
        for one in sorted({*first} & {*second}, key=_in_order)
        if _differing(first[one], second[one]) is not None
    ]
    if alone or differ:
        raise InputError(
            f"{visible(files[0])} and {visible(files[1])} are not of the same documents:\n  "
            f"{listed([*alone, *differ])}\n"
            "Expected both models to be asked the same in the same words: one task, one version, "
            "one number of examples in the prompt, one limit."
        )


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    for name in _DIGESTS:
        if one.get(name) != other.get(name):
            return name
    if "doc_hash" not in one and _digest(one) != _digest(other):
        return "doc"
    return None


def _digest(sample: Mapping[str, Any]) -> str:
    """Of a document, short: its own where the harness wrote one."""
    told = {name: sample[name] for name in _DIGESTS if name in sample}
    return json_digest(told or {name: sample.get(name) for name in ("doc", "target")})[:SHORT]


def _metric(
    files: Sequence[Path],
    by_document: Sequence[Mapping[int | str, Mapping[str, Any]]],
    asked: str | None,
) -> str:
    """The metric that is compared."""
    known = [_metrics(next(iter(each.values()))) for each in by_document]
    both = [name for name in known[0] if name in known[1]]
    if asked is None and len(both) == 1:
        return both[0]
    if asked not in both:
        given = "no metric is named" if asked is None else f"the metric is {visible(asked)!r}"
        raise InputError(
            f"{given}; the samples of {visible(files[0])} and {visible(files[1])} have: "
            f"{', '.join(map(visible, both)) or 'none'}. Name one with metric=."
        )
    return str(asked)


def _metrics(sample: Mapping[str, Any]) -> list[str]:
    """Names of the metrics of a sample: as the harness lists them, or those that are numbers."""
    told = sample.get("metrics")
    if isinstance(told, list) and all(isinstance(one, str) for one in told):
        return [one for one in told if one in sample]
    return [
        name
        for name, value in sample.items()
        if isinstance(value, int | float) and name not in ("doc_id", "doc_hash")
    ]


def _value(file: Path, sample: Mapping[str, Any], document: int | str, name: str) -> float:
    value = sample.get(name)
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InputError(
            f"{visible(file)}, doc_id {visible(document)}: {visible(name)} is "
            f"{visible(repr(value))[:60]}; expected a number from 0 to 1 of which more is better, "
            "such as acc or exact_match. Name another metric."
        )
    return float(value)


def _identity(file: Path) -> Identity:
    return Identity("samples", file.name, stream_digest(file), weights_seen=False)


def _in_order(document: int | str) -> tuple[bool, int, str]:
    return (isinstance(document, str), document if isinstance(document, int) else 0, str(document))
