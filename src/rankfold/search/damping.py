"""Which damping of the Grams loses least, tried on selection data."""

from __future__ import annotations

import math
from dataclasses import replace

from rankfold.machine.progress import Progress
from rankfold.maths.linalg import Damping
from rankfold.objective import OBJECTIVES
from rankfold.search.round import start_round
from rankfold.search.study import Study
from rankfold.search.trial import measure
from rankfold.settings import Settings

# What damping="auto" tries, of A and B, and at which share of the factorizable layers.
DAMPINGS = (Damping(0.1, 0.1), Damping(0.01, 0.3), Damping(0.1, 1.0), Damping(0.5, 0.5))
DAMPING_SIZE = 0.8


def choose_damping(
    study: Study, settings: Settings, *, progress: Progress | None = None
) -> tuple[Study, Settings]:
    """The settings with those of ``DAMPINGS`` that lose least on selection data.

    Each is tried without the gradient step at ``DAMPING_SIZE`` of the factorizable layers; what
    each gave is kept in the study. An objective without Grams has nothing to try and takes the
    first.

    Raises:
        InputError: As ``start_round``.
    """
    if not OBJECTIVES[settings.objective].needs_data:
        return study, replace(settings, damping=DAMPINGS[0].input)
    trials: list[tuple[Damping, float]] = []
    original = None
    for damping in DAMPINGS:
        other = replace(
            settings, damping=damping.input, output_damping=damping.output, gradient_step=False
        )
        round_ = start_round(study, other, progress=progress, original=original)
        original = round_.original
        trial = measure(round_, round_.plan(DAMPING_SIZE * round_.factorizable))
        trials.append((damping, trial.change.mean))
    known = [(damping, change) for damping, change in trials if math.isfinite(change)]
    best = min(known, key=lambda one: one[1])[0] if known else DAMPINGS[0]
    chosen = replace(settings, damping=best.input, output_damping=best.output)
    return replace(study, damping_trials=tuple(trials)), chosen
