"""The parts of ``rankfold.json`` that describe layers, the step and the losses, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, cast

from torch import nn

from rankfold.certificate.certify import Certificate
from rankfold.certificate.change import weighted_mean
from rankfold.files.json_file import finite
from rankfold.forms.blocks.modules import BLOCK_FORMS, block_parameters
from rankfold.forms.conv.modules import ConvForm, conv_factor_flops, conv_factor_parameters
from rankfold.forms.curve import Choice, Curve
from rankfold.forms.storage import FORMS, Form, factor_parameters
from rankfold.model.layer_matrix import matrix_shape
from rankfold.search.study import Collected
from rankfold.settings import Settings
from rankfold.tasks.evaluation import Evaluation

REPORTED_RANKS = 16  # points of each layer's curve, beside the last


def layer_report(collected: Collected, form: Form, name: str, choice: Choice) -> dict[str, Any]:
    """What a choice makes of a layer: shape, ranks, form, parameters, FLOPs of one example.

    Args:
        collected: Knows the layer and the calls of one example.
        form: How the factors of a choice by rank are stored.
        name: Of the layer.
        choice: Its choice in the plan.
    """
    if name in collected.embeddings:
        return _embedding_report(collected, form, name, choice)
    layer = collected.layers[name]
    out, in_ = matrix_shape(layer)
    dense, pivoted = out * in_, form == "pivoted"
    rows = collected.seen.rows.get(name, 0)
    taken: str | None = None
    kept, flops = dense, 2 * rows * dense
    if choice.rank is not None and (choice.form is None or choice.form in FORMS):
        taken = form
        kept = factor_parameters(out, in_, choice.rank, form)
        flops = 2 * rows * kept
    elif choice.form in BLOCK_FORMS and choice.rank is not None:
        taken = choice.form
        kept = block_parameters(out, in_, choice.form, choice.ranks)
        flops = 2 * rows * kept
    elif choice.rank is not None:
        conv, taken = cast("nn.Conv2d", layer), choice.form
        shape, of_conv = tuple(conv.weight.shape), cast("ConvForm", choice.form)
        kept = conv_factor_parameters(shape, of_conv, choice.ranks, pivoted)
        sizes = collected.seen.image_sizes.get(name, ())
        flops = sum(
            conv_factor_flops(conv, of_conv, choice.ranks, *size, pivoted) for size in sizes
        )
    return {
        "name": name,
        "kind": type(layer).__name__,
        "shape": list(layer.weight.shape),
        **_of_choice(choice, taken, pivoted),
        "full_rank": min(out, in_),
        "parameters": dense,
        "factorized_parameters": kept,
        "flops": 2 * rows * dense,
        "factorized_flops": flops,
    }


def _embedding_report(
    collected: Collected, form: Form, name: str, choice: Choice
) -> dict[str, Any]:
    matrix = collected.embeddings[name]
    words, dim = matrix.weight.shape
    dense = words * dim
    factorized = choice.rank is not None
    kept = factor_parameters(words, dim, choice.rank, form) if choice.rank is not None else dense
    return {
        "name": name,
        "kind": type(matrix.uses[name]).__name__,
        "uses": list(matrix.uses),
        "shape": [words, dim],
        **_of_choice(choice, form if factorized else None, form == "pivoted"),
        "full_rank": min(words, dim),
        "parameters": dense,
        "factorized_parameters": kept,
        "flops": collected.embedding_flops(name, None, form),
        "factorized_flops": collected.embedding_flops(name, choice.rank, form),
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


def damping_report(collected: Collected, settings: Settings) -> dict[str, Any]:
    """The dampings of A and B, and what was tried to choose them."""
    return {
        "input": settings.dampings.input,
        "output": settings.dampings.output,
        "trials": [
            {"input": damping.input, "output": damping.output, "change": finite(change)}
            for damping, change in collected.damping_trials
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
        "control": None if control is None else control.mean,
        "control_change": None if control is None else control.mean - original.mean,
    }


def settings_report(settings: Settings) -> dict[str, Any]:
    """The settings' fields as JSON takes them."""
    listed: dict[str, Sequence[str]] = {"include": settings.include, "exclude": settings.exclude}
    return {**asdict(settings), **{name: [*patterns] for name, patterns in listed.items()}}
