"""Recompute a certificate from the artifact, the held-out data and, where given, the original.

Every check ends in one of three ways: it agrees, it differs (and says what), or it was not made
(and says what to give for it).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.artifact.manifest import Manifest, read_manifest, read_report
from rankfold.artifact.recorded import check_read_alike, recorded_pooling
from rankfold.certificate.certify import Certificate
from rankfold.certificate.differences import differences
from rankfold.certificate.document import (
    SHORT,
    Document,
    Evidence,
    evidence_digest,
    read_document,
    read_guard,
    read_statement,
)
from rankfold.certificate.guard_afresh import guard_afresh
from rankfold.certificate.other_kinds import OtherKinds
from rankfold.certificate.statement import ACCURACY
from rankfold.data.example import content_digest
from rankfold.data.given import up_to
from rankfold.data.parts import LIMIT_NAMES, USUAL_LIMITS, Collate, Part, as_part, enough_for
from rankfold.errors import MODEL, InputError, check_kind, path_of
from rankfold.files.digests import model_digest
from rankfold.files.shards import read_weights
from rankfold.machine.progress import Progress
from rankfold.tasks.evaluation import Evaluation, Metric, check_functions, evaluate, metric_values
from rankfold.tasks.losses import TASKS
from rankfold.tasks.recognise import recognise_task
from rankfold.tasks.supervised import LossFunction
from rankfold.verify.checks import NAMED, Check, Verification, outcome
from rankfold.verify.files import file_checks, signature_checks
from rankfold.verify.report import loss_check, original_check, report_checks

FLOAT32 = 1e-4  # relative to 1 + |loss|: another processor, number of threads or batch size
HALF = 2e-2  # likewise in 16-bit types
FRESH = "certificate from fresh losses"
GIVE_ORIGINAL = "single losses are private: give the original: original="
FACTORIZED = "losses of the factorized model"


def verify(
    folder: str | Path,
    model: nn.Module,
    data: object,
    *,
    original: nn.Module | None = None,
    guard: object = None,
    loss: LossFunction | None = None,
    metrics: Sequence[Metric] = (),
    collate: Collate | None = None,
    key: str | Path | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Recompute the certificate of an artifact.

    Args:
        folder: The artifact.
        model: The factorized model, as ``rankfold.load(folder)`` gives it.
        data: Examples among which the held-out ones are; they are found by their content.
        original: The original model, or None: its losses are then taken from the certificate.
        guard: Examples among which those of other kinds are, where the user gave some.
        loss: As it was given for the certificate, where it was.
        metrics: Likewise.
        collate: Likewise.
        key: The public Ed25519 key of whoever signed the artifact, a PEM file.
        batch_size: Examples a batch.
        progress: Shows the stages.

    Raises:
        InputError: The artifact has no certificate, the data holds none of its examples, or the key
            can't be used.
    """
    check_functions(loss, metrics)
    read_manifest(path := path_of("the folder", folder))  # no artifact: no certificate either
    check_read_alike(path, data)
    document, manifest = read_document(path), read_report(path)
    part, of_data = _find(document, data, collate)
    without = _without_data(path, document, manifest, model, original)
    checks = [*signature_checks(path, key), *without, *of_data]
    if part is None:
        return Verification(tuple(checks), None)
    known = document["evidence"]
    stored = None if known is None else Evidence.from_dict(known, document)
    afresh = _Afresh(path, document, part, original, loss, metrics, batch_size, progress)
    tolerance, after = _tolerance(model), afresh.losses(model, "factorized on held-out data")
    if stored is not None:
        checks.append(_losses(FACTORIZED, stored.factorized, after, tolerance))
    before, of_original = _original_losses(afresh, stored, tolerance)
    checks += of_original
    if before is None or not torch.equal(before.terms, after.terms):
        return Verification((*checks, _not_compared(before)), None)
    values, of_values = _metric_values(afresh, model, stored)
    found, of_guard = _guard(afresh, model, guard, collate, tolerance)
    checks += [*of_values, *of_guard]
    groups = document["data"]["held_out_groups"]
    evidence = Evidence(part.digests, [], before, after, groups, values, found)
    if stored is None:
        checks.append(loss_check(manifest, evidence, tolerance * (1 + abs(after.mean))))
    return _concluded(document, part, evidence, checks, tolerance)


def _without_data(
    folder: Path,
    document: Document,
    manifest: Manifest,
    model: nn.Module,
    original: nn.Module | None,
) -> list[Check]:
    """What is checked before any example is looked at."""
    check_kind("the model", model, nn.Module, MODEL)
    tensors = read_weights(folder)
    checks = [*file_checks(folder, document, manifest, tensors), *_numbers(document, manifest)]
    checks += report_checks(manifest, document, model, tensors)
    if original is not None:
        check_kind("the original", original, nn.Module, MODEL)
        checks.append(original_check(manifest, original))
    return checks


def _not_compared(before: Evaluation | None) -> Check:
    """Why fresh losses of both models are not compared."""
    if before is None:
        return Check(FRESH, "not checked", GIVE_ORIGINAL)
    return Check(FRESH, "differs", "the examples have other numbers of terms")


def _concluded(
    document: Document, part: Part, evidence: Evidence, checks: list[Check], tolerance: float
) -> Verification:
    """The certificate of fresh losses, compared with what is stated."""
    guard = evidence.guard
    if guard is not None and guard.factorized is None and document["certificate"]["guard"]:
        checks.append(Check(FRESH, "not checked", "give the examples of other kinds, too: guard="))
        return Verification(tuple(checks), None)
    fresh = evidence.certificate(
        read_statement(document), document["certificate"]["unit"], part.digest
    )
    scale = tolerance * (1 + abs(evidence.factorized.mean))
    checks.append(_certificates(FRESH, document["certificate"], fresh, scale))
    return Verification(tuple(checks), fresh)


@dataclass(frozen=True)
class _Afresh:
    """What is computed once more on the held-out examples.

    Attributes:
        folder: The artifact.
        document: The certificate.
        part: The held-out examples.
        original: The original model, or None.
        loss: The user's own, or None.
        metrics: The user's.
        batch_size: Examples a batch.
        progress: Shows the stages.
    """

    folder: Path
    document: Document
    part: Part
    original: nn.Module | None
    loss: LossFunction | None
    metrics: Sequence[Metric]
    batch_size: int | None
    progress: Progress | None

    def losses(self, model: nn.Module, stage: str, part: Part | None = None) -> Evaluation:
        """Of a model, by the task that the certificate names, on these examples or others.

        Raises:
            InputError: The data gives another task.
        """
        made = self.document["run"]["task"]
        named = made if self.loss is None and made in TASKS else None
        originals = () if self.original is None else (self.original,)
        task = recognise_task(
            self.part, self.loss, named, originals, pooling=lambda: recorded_pooling(self.folder)
        )
        if task.name != made:
            raise InputError(
                f"the certificate is of the task {made}, the data gives "
                f"{task.name}; give the loss that the certificate was made with (from Python)."
            )
        return evaluate(
            model, task, part or self.part, finite=part is None,
            batch_size=self.batch_size, progress=self.progress, stage=stage,
        )  # fmt: skip

    def metric_values(self, model: nn.Module) -> dict[str, Tensor]:
        """Of a model, by metric."""
        return {
            metric.name: metric_values(
                metric, model, self.part, batch_size=self.batch_size, progress=self.progress
            )
            for metric in self.metrics
        }


def _guard(
    afresh: _Afresh, model: nn.Module, given: object, collate: Collate | None, tolerance: float
) -> tuple[OtherKinds | None, list[Check]]:
    """Losses on examples of other kinds, fresh where they are at hand."""
    stated = read_guard(afresh.document)
    if stated is None:
        return None, []

    def losses(one: nn.Module, part: Part) -> Evaluation:
        return afresh.losses(one, "examples of other kinds", part)

    models = (afresh.original, model)
    plain = afresh.document["guard"]
    again = guard_afresh(plain, stated, given, collate, losses, models, tolerance)
    return again.found, [Check("losses on other kinds", again.outcome, again.detail)]


def _original_losses(
    afresh: _Afresh, stored: Evidence | None, tolerance: float
) -> tuple[Evaluation | None, list[Check]]:
    """Losses of the original model: fresh ones, else the stored ones, else None."""
    if afresh.original is None:
        detail = "give the original: original="
        checks = [
            Check(what, "not checked", detail)
            for what in ("weights of the original", "losses of the original model")
        ]
        return None if stored is None else stored.original, checks
    checks = [_original(afresh.original, afresh.document)]
    found = afresh.losses(afresh.original, "original on held-out data")
    if stored is not None:
        what = "losses of the original model"
        checks.append(_losses(what, stored.original, found, tolerance))
    return found, checks


def _metric_values(
    afresh: _Afresh, model: nn.Module, stored: Evidence | None
) -> tuple[Mapping[str, tuple[Tensor, Tensor]], list[Check]]:
    """Values of both models by metric: fresh ones where the metrics are given, else stored ones.

    Without the original model, its values are the stored ones.

    Raises:
        InputError: A metric isn't given, and its values are private.
    """
    wanted = {m["name"] for m in afresh.document["certificate"]["metrics"]} - {ACCURACY}
    unknown = sorted(wanted - {metric.name for metric in afresh.metrics})
    if unknown and stored is not None:
        detail = "their functions are the user's: verify from Python with metrics="
        return stored.metrics, [Check(f"metrics {', '.join(unknown)}", "not checked", detail)]
    if unknown:
        raise InputError(f"give the metrics {', '.join(unknown)}: verify from Python with metrics=")
    if not wanted:
        return {}, []
    if afresh.original is not None:
        before = afresh.metric_values(afresh.original)
    else:
        assert stored is not None  # else there would be no losses of the original, either
        before = {name: values[0] for name, values in stored.metrics.items()}
    return {name: (before[name], v) for name, v in afresh.metric_values(model).items()}, []


def _numbers(document: Document, manifest: Manifest) -> list[Check]:
    """Whether the certificate follows from its own evidence."""
    if document["evidence"] is None:
        what = "certificate from its own losses"
        return [Check(what, "not checked", "single losses are private; they are computed afresh")]
    evidence = Evidence.from_dict(document["evidence"], document)
    same = evidence_digest(document["evidence"]) == document["evidence_digest"]
    detail = "" if same else "they are not what their digest was made of"
    checks = [Check("stored losses", outcome(same), detail), loss_check(manifest, evidence, 0)]
    stated = document["evidence"]["differences"]
    computed = (evidence.factorized.losses - evidence.original.losses).tolist()
    wrong = [i for i, (a, b) in enumerate(zip(stated, computed, strict=False)) if a != b]
    if wrong or len(stated) != len(computed):
        place = wrong[0] if wrong else min(len(stated), len(computed))
        checks.append(
            Check("stored differences", "differs", f"first that of example {place}, from 0")
        )
    try:
        found = evidence.certificate(
            read_statement(document),
            document["certificate"]["unit"],
            document["certificate"]["data_digest"],
        )
    except (ValueError, RuntimeError) as error:
        detail = f"it can't be computed from them: {error}"
        return [*checks, Check("certificate from its own losses", "differs", detail)]
    return [
        *checks,
        _certificates("certificate from its own losses", document["certificate"], found, 0.0),
    ]


def _find(
    document: Document, data: object, collate: Collate | None
) -> tuple[Part | None, list[Check]]:
    """The held-out examples in the data given, in the certificate's order."""
    wanted, answers = (document["data"][f"held_out_{k}"] for k in ("examples", "answers"))
    settings = document["run"]["settings"]
    first, second, third = (
        settings.get(name) or usual
        for name, usual in zip(LIMIT_NAMES.values(), USUAL_LIMITS, strict=True)
    )
    offered = as_part("held_out", up_to(data, enough_for((first, second, third))), collate)
    places: dict[str, list[int]] = defaultdict(list)
    for number, digest in enumerate(offered.digests):
        places[digest[:SHORT]].append(number)
    for numbers in places.values():
        numbers.reverse()
    chosen = [places[digest].pop() if places.get(digest) else None for digest in wanted]
    absent = [number for number, place in enumerate(chosen) if place is None]
    if len(absent) == len(wanted):
        spectra = any("input_features" in e for e in offered.examples if isinstance(e, Mapping))
        raise InputError(
            f"none of the certificate's {len(wanted)} held-out examples is in the data given. Give "
            "the data that was certified on, with the options (length=, mean=, std=, "
            "image_size=) that it was read with."
            + " Spectra of sounds may have other last digits on another processor."
            * spectra
        )
    what = "held-out examples"
    if absent:
        listed = ", ".join(map(str, absent[:NAMED])) + (", ..." if len(absent) > NAMED else "")
        detail = f"{len(absent)} of {len(wanted)} are not in the data given, or were changed"
        return None, [Check(what, "differs", f"{detail} (numbers, from 0: {listed})")]
    part = offered.take([place for place in chosen if place is not None])
    checks = [Check(what, "agrees")]
    if part.digest != document["certificate"]["data_digest"]:
        checks.append(Check("digest of the held-out part", "differs", "it is of other examples"))
    changed = [
        number
        for number, (example, answer) in enumerate(zip(part.examples, answers, strict=False))
        if content_digest(example)[:SHORT] != answer
    ]
    listed = ", ".join(map(str, changed[:NAMED]))
    detail = f"those of {len(changed)} examples were changed (numbers, from 0: {listed})"
    checks.append(Check("labels", outcome(not changed), detail if changed else ""))
    return part, checks


def _original(original: nn.Module, document: Document) -> Check:
    check_kind("the original", original, nn.Module, MODEL)
    same = model_digest(original) == document["models"].get("original")
    detail = "" if same else "the model given is not the one that the certificate compares with"
    return Check("weights of the original", outcome(same), detail)


def _tolerance(model: nn.Module) -> float:
    check_kind("the model", model, nn.Module, MODEL)
    types = {parameter.dtype for parameter in model.parameters()}
    return HALF if types & {torch.float16, torch.bfloat16} else FLOAT32


def _losses(what: str, stated: Evaluation, found: Evaluation, tolerance: float) -> Check:
    if len(stated.losses) != len(found.losses):
        return Check(what, "differs", f"{len(stated.losses)} stated, {len(found.losses)} found")
    allowed = tolerance * (1 + found.losses.abs())
    wrong = ~((stated.losses - found.losses).abs() <= allowed)
    if not torch.equal(stated.terms, found.terms):
        return Check(what, "differs", "the examples have other numbers of terms")
    if not bool(wrong.any()):
        return Check(what, "agrees")
    first = int(wrong.nonzero()[0])
    return Check(
        what,
        "differs",
        f"{int(wrong.sum())} of {len(wrong)} do; first example {first}: stated "
        f"{float(stated.losses[first]):.6g}, found {float(found.losses[first]):.6g}",
    )


def _certificates(
    what: str, stated: Mapping[str, Any], found: Certificate, tolerance: float
) -> Check:
    problems = differences(stated, found, tolerance)
    return Check(what, outcome(not problems), "; ".join(problems[:NAMED]))
