"""The parts of ``rankfold.json`` that describe layers, the step and the losses, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from rankfold.certificate.certify import Certificate
from rankfold.certificate.change import paired_change, weighted_mean
from rankfold.certificate.opened import Opened
from rankfold.data.input_settings import InputSettings, joined
from rankfold.data.parts import PARTS
from rankfold.files.json_file import finite
from rankfold.files.tensors import model_sizes
from rankfold.forms.curve import Choice, Curve
from rankfold.forms.problem import Size
from rankfold.forms.registry import form_of
from rankfold.forms.storage import Storage, factor_parameters
from rankfold.machine.device import device_of
from rankfold.model.layer_matrix import matrix_shape
from rankfold.report.embeddings_kept import embeddings_kept
from rankfold.search.allocate import RankPlan, best_within_cost, total_change, total_cost
from rankfold.search.gradient_step import step_report
from rankfold.search.round import Round
from rankfold.search.study import Study
from rankfold.search.subject import Subject
from rankfold.search.trial import Trial, last_prediction
from rankfold.settings import Settings
from rankfold.tasks.agreement import Embedding
from rankfold.tasks.evaluation import Evaluation

_OF_A_PLAN = (
    "rank",
    "second_rank",
    "form",
    "pivoted",
    "reason_dense",
    "factorized_parameters",
    "factorized_flops",
    "predicted_change",
    "interaction_factor",
)
REPORTED_RANKS = 16  # points of each layer's curve, beside the last


def report_of(
    algorithm: str,
    chosen: Trial,
    opened: Opened,
    target: Mapping[str, Any],
    tried: Sequence[Trial],
) -> dict[str, Any]:
    """Everything that ``rankfold.json`` says of a run, but for the format's own fields.

    Args:
        algorithm: Which one chose the plan.
        chosen: The plan that stands.
        opened: What the held-out part says of it.
        target: What was asked for.
        tried: All plans that selection data saw.
    """
    tested, here = opened.standing, chosen.round
    study, settings = here.study, here.settings
    subject, certificate = study.subject, tested.certificate
    before, after = subject.sizes, model_sizes(tested.model)
    layers = [layer_entry(here, name, choice) for name, choice in chosen.plan.items()]
    after["factorizable_parameters"] = sum(entry["factorized_parameters"] for entry in layers)
    saved = sum(entry["flops"] - entry["factorized_flops"] for entry in layers)
    after["flops"] = before["flops"] - saved
    original, factorized = tested.evidence.original, tested.evidence.factorized
    control = None if opened.control is None else opened.control.first(len(original.losses))
    return {
        "algorithm": algorithm,
        "target": {**target, "margin": certificate.margin},
        "task": study.task.name,
        "agreement": study.task.agreement,
        "settings": settings_report(settings),
        "original": before,
        "factorized": after,
        "ratio": after["parameters"] / before["parameters"],
        "loss": loss_report(
            original, factorized, control, certificate, last_prediction(chosen, tried)
        ),
        "accuracy": {"original": original.accuracy, "factorized": factorized.accuracy},
        "certificate": certificate.as_dict(),
        "embeddings_kept": embeddings_kept(study, tested.model, factorized.mean),
        "guard": None if tested.evidence.guard is None else tested.evidence.guard.row(),
        "allocation": _allocation_report(here, chosen.plan),
        "damping": damping_report(study, settings),
        "device": device_of(subject.model),
        "curvature": study.labels.curvature,
        "calibration_loss": study.labels.calibration_loss,
        "step": step_report(here.step, settings),
        "rounds": [past.as_dict() for past in here.earlier],
        "refit": _refit_report(chosen),
        "selection": [_trial_report(trial) for trial in tried],
        "data": _data_report(study, opened),
        "sources": [account.as_dict() for account in study.accounts],
        "input_settings": _input_settings(study).as_dict(),
        "left_out": dict(study.left_out),
        "layers": layers,
        "unpacked": subject.unpacked.names,
        "not_factorized": [asdict(entry) for entry in subject.skipped],
    }


def _input_settings(study: Study) -> InputSettings:
    """What was decided of the model's inputs, and of what is computed from its output."""
    together = joined((account.source, account.inputs) for account in study.accounts)
    pooling = study.task.pooling if isinstance(study.task, Embedding) else None
    return replace(together, pooling=None if pooling is None else pooling.names)


def inspection(here: Round) -> list[dict[str, Any]]:
    """What is known of every layer before a size is chosen, and of those that stay as they are."""
    known = []
    for name, curve in here.curves.items():
        entry = layer_entry(here, name, curve.choice(len(curve.ranks)))
        known.append({key: value for key, value in entry.items() if key not in _OF_A_PLAN})
    return [*known, *(asdict(entry) for entry in here.study.subject.skipped)]


def layer_entry(here: Round, name: str, choice: Choice) -> dict[str, Any]:
    """What the report says of one layer."""
    predicts = here.objective.predicts_loss
    ranged = here.step is not None and name in here.study.subject.layers
    lacking = here.study.statistics.lacking.get(name)
    return {
        **layer_report(here.study.subject, here.settings.form, name, choice),
        "predicted_change": choice.change if predicts else None,
        "predicted_by_rank": predicted_by_rank(here.ranked[name]) if predicts else None,
        "interaction_factor": None if here.factors is None else here.factors[name],
        "whole_grams": here.study.statistics.whole.get(name),
        "grams_lack": None if lacking is None else lacking._asdict(),
        "harmless_range": asdict(here.harmless_range(name)) if ranged else None,
    }


def layer_report(subject: Subject, storage: Storage, name: str, choice: Choice) -> dict[str, Any]:
    """What a choice makes of a layer: shape, ranks, form, parameters, FLOPs of one example.

    Args:
        subject: Knows the layer and the calls of one example.
        storage: How the factors are stored.
        name: Of the layer.
        choice: Its choice in the plan.
    """
    if name in subject.embeddings:
        return _embedding_report(subject, storage, name, choice)
    layer, calls = subject.layers[name], subject.calls(name)
    out, in_ = matrix_shape(layer)
    dense = Size(out * in_, 2 * calls.rows * out * in_)
    size, taken = dense, None
    if choice.rank is not None:
        form, taken = form_of(choice, storage)
        size = form.size(layer, taken, choice.ranks, storage, calls)
    return {
        "name": name,
        "kind": type(layer).__name__,
        "shape": list(layer.weight.shape),
        **_of_choice(choice, taken, storage == "pivoted"),
        "full_rank": min(out, in_),
        "parameters": dense.parameters,
        "factorized_parameters": size.parameters,
        "flops": dense.flops,
        "factorized_flops": size.flops,
    }


def _embedding_report(
    subject: Subject, storage: Storage, name: str, choice: Choice
) -> dict[str, Any]:
    matrix = subject.embeddings[name]
    words, dim = matrix.weight.shape
    dense = words * dim
    factorized = choice.rank is not None
    kept = factor_parameters(words, dim, choice.rank, storage) if choice.rank is not None else dense
    return {
        "name": name,
        "kind": type(matrix.uses[name]).__name__,
        "uses": list(matrix.uses),
        "shape": [words, dim],
        **_of_choice(choice, storage if factorized else None, storage == "pivoted"),
        "full_rank": min(words, dim),
        "parameters": dense,
        "factorized_parameters": kept,
        "flops": subject.embedding_flops(name, None, storage),
        "factorized_flops": subject.embedding_flops(name, choice.rank, storage),
    }


def _of_choice(choice: Choice, taken: str | None, pivoted: bool) -> dict[str, Any]:
    """Ranks and form of a choice; ``taken`` is the form's name, None for a dense layer."""
    return {
        "rank": choice.rank,
        "second_rank": choice.second_rank,
        "form": taken,
        "pivoted": None if taken is None else pivoted,
        "reason_dense": None if choice.rank is not None else "the plan leaves it dense",
    }


def predicted_by_rank(curve: Curve) -> list[list[float]]:
    """``[rank, predicted change]`` at evenly spaced ranks of a curve with one form."""
    last = len(curve.ranks) - 1
    places = sorted({round(i * last / REPORTED_RANKS) for i in range(REPORTED_RANKS + 1)})
    return [[int(curve.ranks[at]), float(curve.changes[at])] for at in places]


def damping_report(study: Study, settings: Settings) -> dict[str, Any]:
    """The dampings of A and B, and what was tried to choose them."""
    return {
        "input": settings.dampings.input,
        "output": settings.dampings.output,
        "trials": [
            {"input": damping.input, "output": damping.output, "change": finite(change)}
            for damping, change in study.damping_trials
        ],
    }


def loss_report(
    original: Evaluation,
    factorized: Evaluation,
    control: Evaluation | None,
    certificate: Certificate,
    predicted: float | None,
) -> dict[str, Any]:
    """Held-out losses and their change, with the control's."""
    errors = [weighted_mean(e.losses, e.terms).standard_error for e in (original, factorized)]
    return {
        "unit": certificate.unit,
        "original": original.mean,
        "original_standard_error": errors[0],
        "factorized": factorized.mean,
        "factorized_standard_error": errors[1],
        "change": certificate.change,
        "standard_error": certificate.standard_error,
        "predicted_change": predicted,
        **_control_report(original, control),
    }


def _control_report(original: Evaluation, control: Evaluation | None) -> dict[str, Any]:
    """Loss of the control, its paired change, and the errors of both."""
    if control is None:
        return {"control": None, "control_change": None}
    return {
        "control": control.mean,
        "control_standard_error": weighted_mean(control.losses, control.terms).standard_error,
        "control_change": control.mean - original.mean,
        "control_change_standard_error": paired_change(original, control).standard_error,
    }


def settings_report(settings: Settings) -> dict[str, Any]:
    """The settings' fields as JSON takes them."""
    listed: dict[str, Sequence[str]] = {"include": settings.include, "exclude": settings.exclude}
    return {**asdict(settings), **{name: [*patterns] for name, patterns in listed.items()}}


def _refit_report(chosen: Trial) -> dict[str, Any] | None:
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


def _allocation_report(here: Round, plan: RankPlan) -> dict[str, float] | None:
    """How far the plan may be from the best one of its cost, by the curves it was made with."""
    if here.objective.allocation != "multiplier":
        return None
    best = best_within_cost(here.curves, total_cost(plan))
    predicted = total_change(plan)
    return {"predicted_cost": predicted, "gap": max(0.0, predicted - best.bound)}


def _trial_report(trial: Trial) -> dict[str, Any]:
    return {
        "ratio": trial.size,
        "predicted_change": trial.predicted,
        "change": finite(trial.change.mean),
        "standard_error": finite(trial.change.standard_error),
        "refit": trial.refit is not None,
    }


def _data_report(study: Study, opened: Opened) -> dict[str, Any]:
    """Number and digest of the examples of each part, and what is left out of it and why."""
    parts = {name: part.usage() for name, part in study.parts.items()}
    first, second = (parts.pop(name) for name in PARTS[:2])
    return {PARTS[0]: first, PARTS[1]: second, PARTS[2]: dict(opened.usage), **parts}
