"""The held-out part is opened for a chosen plan: certificate, report and result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from rankfold.artifact.manifest import library_versions
from rankfold.certificate.certify import Certificate, examples_seen
from rankfold.certificate.document import Evidence, example_digests, make_document
from rankfold.certificate.earlier_uses import SHORT, Opening, history, record
from rankfold.certificate.statement import ACCURACY, Statement, state
from rankfold.data.copies import look_alikes
from rankfold.data.parts import FEWEST, PARTS
from rankfold.files.digests import model_digest
from rankfold.files.json_file import finite
from rankfold.files.tensors import model_sizes
from rankfold.forms.curve import Choice
from rankfold.machine.device import device_of
from rankfold.report.report import (
    damping_report,
    layer_report,
    loss_report,
    predicted_by_rank,
    settings_report,
)
from rankfold.result import Result
from rankfold.search.allocate import RankPlan, best_within_cost, total_change, total_cost
from rankfold.search.gradient_step import step_report
from rankfold.search.round import Candidate, Stage, last_prediction
from rankfold.tasks.evaluation import Evaluation, Metric, evaluate, joined, metric_values

LOOKS = 16  # times that the betting test looks whether it may stop


@dataclass(frozen=True)
class Tested:
    """A model that the held-out part was opened for.

    Attributes:
        model: The model.
        statement: What was stated before.
        evidence: Losses of every example.
        certificate: What follows.
        digest: Of the model's weights.
    """

    model: nn.Module
    statement: Statement
    evidence: Evidence
    certificate: Certificate
    digest: str


def result_of(
    algorithm: str,
    chosen: Candidate,
    margin: float,
    target: Mapping[str, Any],
    tried: Sequence[Candidate],
    tested: Tested | None = None,
    order: Sequence[Mapping[str, Any]] = (),
) -> Result:
    """The held-out part's word on the chosen model, the original and the control.

    Args:
        algorithm: ``lossless`` or ``compact``.
        chosen: By selection data.
        margin: Change of the mean loss up to which the verdict is ``lossless``.
        target: What was asked for, for the report.
        tried: All plans that selection data saw.
        tested: Where the held-out part has been opened for it already.
        order: What a fixed sequence of tests gave.
    """
    stage = chosen.stage
    if tested is None:
        tested = opened(chosen, statement_on(chosen, margin))
    certificate = tested.certificate
    opening = Opening(
        original=model_digest(stage.collected.unpacked.given),
        models=tuple(entry["model"] for entry in order if entry["model"]) or (tested.digest,),
        examples=tuple(digest[:SHORT] for digest in tested.evidence.examples),
        verdict=certificate.verdict,
        seed=stage.settings.seed,
    )
    past = history(opening, stage.collected.openings)
    stage.collected.openings.append(opening)
    record(opening)
    report = _report(algorithm, chosen, tested, target, tried)
    parts = stage.collected.parts
    others = [part for name, part in parts.items() if name in PARTS[:2]]
    document = make_document(
        certificate,
        tested.statement,
        tested.evidence,
        private=stage.settings.private,
        models={
            "class": f"{type(tested.model).__module__}.{type(tested.model).__qualname__}",
            "original": opening.original,
            "factorized": tested.digest,
        },
        data={
            "parts": report["data"],
            "look_alikes": [asdict(p) for p in look_alikes(others, parts["held_out"])],
            "history": asdict(past),
        },
        run={
            "algorithm": algorithm,
            "ratio": report["ratio"],
            "task": report["task"],
            "plan": {
                name: {"rank": c.rank, "second_rank": c.second_rank, "form": c.form}
                for name, c in chosen.plan.items()
            },
            "order": list(order),
            "settings": report["settings"],
            "versions": library_versions(),
        },
    )
    return Result(tested.model, certificate, report, document)


def result_of_fixed_sequence(tried: Sequence[Candidate], margin: float) -> Result:
    """Test sizes from mild to strong until the first that fails (Learn then Test).

    Order and statements are fixed here, before the held-out part is opened; each size is tested at
    the whole confidence, since a false "lossless" can only come from the first one that is not
    (Angelopoulos et al. 2021).
    """
    known = [c for c in tried if math.isfinite(c.change.mean)]
    # Of one size the better one, which comes last here.
    sizes = {c.ratio: c for c in sorted(known, key=lambda c: c.change.mean, reverse=True)}
    order = [sizes[ratio] for ratio in sorted(sizes, reverse=True)] or [*tried[:1]]
    statements = [statement_on(c, margin) for c in order]
    certified: tuple[Candidate, Tested] | None = None
    results: list[Tested | None] = [None] * len(order)
    for place, (candidate, statement) in enumerate(zip(order, statements, strict=True)):
        tested = results[place] = opened(candidate, statement)
        if certified is None or tested.certificate.holds:
            certified = (candidate, tested)
        if not tested.certificate.holds:
            break
    assert certified is not None  # order has one at least
    chosen, tested = certified
    record_of_order = [
        {
            "ratio": c.ratio,
            "upper_bound": r and r.certificate.upper_bound,
            "verdict": r and r.certificate.verdict,
            "model": r and r.digest,
        }
        for c, r in zip(order, results, strict=True)
    ]
    target = {"certified": True}
    return result_of("compact", chosen, margin, target, tried, tested=tested, order=record_of_order)


def statement_on(candidate: Candidate, margin: float) -> Statement:
    """What will be claimed of a candidate, from its selection data alone."""
    stage = candidate.stage
    settings = stage.settings
    margins = {m.name: m.margin for m in stage.collected.metrics if m.margin is not None}
    if settings.accuracy_margin is not None:
        margins[ACCURACY] = settings.accuracy_margin
    return state(
        candidate.change,
        candidate.differences,
        stage.held_out_units,
        margin=margin,
        confidence=settings.confidence,
        test=settings.test,
        largest_change=settings.largest_change,
        metric_margins=margins,
    )


def opened(candidate: Candidate, statement: Statement) -> Tested:
    """Open the held-out part for a candidate."""
    stage = candidate.stage
    model = candidate.build()
    collected, part = stage.collected, stage.collected.parts["held_out"]
    original = stage.original_held_out()
    factorized = _evaluate_until_shown(stage, model, original, statement)
    seen = len(factorized.losses)
    values: dict[str, tuple[Tensor, Tensor]] = {}
    for metric in collected.metrics:
        before = collected.original_metrics.get(metric.name)
        if before is None:
            before = _metric(stage, metric, collected.unpacked.given)
            collected.original_metrics[metric.name] = before
        values[metric.name] = (before, _metric(stage, metric, model))
    examples, answers = example_digests(part, seen)
    groups = None if part.groups is None else part.groups[:seen]
    evidence = Evidence(examples, answers, original.first(seen), factorized, groups, values)
    digest = part.take(range(seen)).digest
    certificate = evidence.certificate(statement, collected.task.unit, digest)
    return Tested(model, statement, evidence, certificate, model_digest(model))


def _metric(stage: Stage, metric: Metric, model: nn.Module) -> Tensor:
    return metric_values(
        metric,
        model,
        stage.collected.parts["held_out"],
        batch_size=stage.settings.batch_size,
        progress=stage.progress,
    )


def _evaluate_until_shown(
    stage: Stage, model: nn.Module, original: Evaluation, statement: Statement
) -> Evaluation:
    """Losses on the held-out part; the betting test stops once "lossless" is shown."""
    shown = "factorized on held-out data"
    if statement.test != "betting" or statement.metric_margins:
        return stage.held_out(model, shown)
    part = stage.collected.parts["held_out"]
    count = len(part.examples)
    chunk = max(FEWEST, math.ceil(count / LOOKS))
    found: list[Evaluation] = []
    for end in range(chunk, count + chunk, chunk):
        piece = part.take(range(end - chunk, min(end, count)))
        found.append(
            evaluate(
                model,
                stage.collected.task,
                piece,
                batch_size=stage.settings.batch_size,
                progress=stage.progress,
                stage=shown,
            )
        )
        together = joined(found)
        seen = original.first(len(together.losses))
        if examples_seen(together.losses - seen.losses, seen.terms, statement) is not None:
            break
    return together


def _report(
    algorithm: str,
    chosen: Candidate,
    tested: Tested,
    target: Mapping[str, Any],
    tried: Sequence[Candidate],
) -> dict[str, Any]:
    stage, certificate = chosen.stage, tested.certificate
    before, after = stage.original_sizes, model_sizes(tested.model)
    layers = [layer_entry(stage, name, choice) for name, choice in chosen.plan.items()]
    after["factorizable_parameters"] = sum(entry["factorized_parameters"] for entry in layers)
    saved = sum(entry["flops"] - entry["factorized_flops"] for entry in layers)
    after["flops"] = before["flops"] - saved
    original, factorized = tested.evidence.original, tested.evidence.factorized
    control = stage.control_held_out()
    if control is not None:
        control = control.first(len(original.losses))
    collected = stage.collected
    return {
        "algorithm": algorithm,
        "target": {**target, "margin": certificate.margin},
        "task": collected.task.name,
        "agreement": collected.task.agreement,
        "settings": settings_report(stage.settings),
        "original": before,
        "factorized": after,
        "ratio": after["parameters"] / before["parameters"],
        "loss": loss_report(
            original, factorized, control, certificate, last_prediction(chosen, tried)
        ),
        "accuracy": {"original": original.accuracy, "factorized": factorized.accuracy},
        "certificate": certificate.as_dict(),
        "allocation": _allocation_report(stage, chosen.plan),
        "damping": damping_report(collected, stage.settings),
        "device": device_of(collected.model),
        "curvature": collected.curvature,
        "calibration_loss": collected.calibration_loss,
        "step": step_report(stage.step, stage.settings),
        "rounds": [past.as_dict() for past in stage.earlier],
        "refit": _refit_report(chosen),
        "selection": [
            {
                "ratio": c.ratio,
                "predicted_change": c.predicted,
                "change": finite(c.change.mean),
                "standard_error": finite(c.change.standard_error),
                "refit": c.refit is not None,
            }
            for c in tried
        ],
        "data": {
            name: {"examples": len(part.examples), "digest": part.digest}
            for name, part in collected.parts.items()
        },
        "layers": layers,
        "unpacked": collected.unpacked.names,
        "not_factorized": [asdict(entry) for entry in collected.skipped],
    }


def _refit_report(chosen: Candidate) -> dict[str, Any] | None:
    """Which layers were fitted again, to how many examples, and what selection data say of it."""
    refit = chosen.refit
    if refit is None:
        return None
    return {
        "layers": [*refit.modules],
        "residual": list(refit.residual),
        "examples": refit.examples,
        "gain": finite(refit.gain),
    }


def _allocation_report(stage: Stage, plan: RankPlan) -> dict[str, float] | None:
    """How far the plan may be from the best one of its cost, by the curves it was made with."""
    if stage.objective.allocation != "multiplier":
        return None
    best = best_within_cost(stage.curves, total_cost(plan))
    predicted = total_change(plan)
    return {"predicted_cost": predicted, "gap": max(0.0, predicted - best.bound)}


def layer_entry(stage: Stage, name: str, choice: Choice) -> dict[str, Any]:
    """What the report says of one layer."""
    predicts = stage.objective.predicts_loss
    ranged = stage.step is not None and name in stage.collected.layers
    lacking = stage.collected.lacking.get(name)
    return {
        **layer_report(stage.collected, stage.settings.form, name, choice),
        "predicted_change": choice.change if predicts else None,
        "predicted_by_rank": predicted_by_rank(stage.ranked[name]) if predicts else None,
        "interaction_factor": None if stage.factors is None else stage.factors[name],
        "grams_lack": None if lacking is None else lacking._asdict(),
        "harmless_range": asdict(stage.harmless_range(name)) if ranged else None,
    }
