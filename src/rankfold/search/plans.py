"""Which plans are tried on selection data: those of one size, and those within a margin."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy import stats

from rankfold.certificate.change import paired_change
from rankfold.certificate.statement import half_width
from rankfold.errors import InputError
from rankfold.search.allocate import smallest_cost, total_change, total_cost
from rankfold.search.round import Candidate, Stage, lowest

# Chance that compact leaves the held-out test of a model as good as its selection data say.
POWER = 0.9
MOST_PLANS = 7  # plans that a search within a margin measures in a round
MOST_REFITS = 3  # and how many it fits again
CLOSE_ENOUGH = 0.01  # share of the model's size at which that search stops
# How often interactions are measured, each time at the plan that came of the last: so often in any
# case, and further, up to the second number, while the plans get better on selection data.
CORRECTIONS = 2
MOST_CORRECTIONS = 6


def of_size(stage: Stage, budget: float) -> list[Candidate]:
    """Plans for a cost of the factorizable layers, measured on selection data.

    One a round, and one for each time that interactions are measured: at the best of these, at
    the plan that came of it, and on as long as plans get better by more than their own error. The
    best of all is fitted again (``refit``) and measured once more.

    Args:
        stage: The first round.
        budget: Cost, in the unit of ``settings.cost``.

    Raises:
        InputError: No plan is that small.
    """
    tried = [stage.measure(stage.plan(budget))]
    for left in range(stage.settings.rounds - 1, 0, -1):
        stage = stage.next_round(budget, left + 1)
        tried.append(stage.measure(stage.plan(budget)))
    last = lowest(tried)
    for done in range(MOST_CORRECTIONS if stage.corrects else 0):
        # Twice also where the first looks no better: few selection examples can't tell.
        if done >= CORRECTIONS and not _is_better(last, tried[-2]):
            break
        stage = last.stage.corrected(last)
        if stage is last.stage:
            break  # the loss is not finite: the plan would be measured once more
        last = stage.measure(stage.plan(budget))
        tried.append(last)
    return [*tried, *_refitted(lowest(tried))]


def within_margin(stage: Stage, margin: float) -> list[Candidate]:
    """Plans around the smallest one that passes, measured on selection data.

    Interactions are measured first, at the plan predicted to be within the margin; then sizes are
    bracketed. Further rounds go on from the smallest model that passes. What they end at is fitted
    again (``refit``), and smaller plans are as far as that makes them pass.

    Args:
        stage: The first round.
        margin: Largest change of the loss that counts as no harm.
    """
    seen: list[Candidate] = []
    for _ in range(CORRECTIONS if stage.corrects else 0):
        seen.append(stage.measure(stage.plan_within(margin)))
        corrected = stage.corrected(seen[-1])
        if corrected is stage:
            break  # the loss is not finite: the plan would be measured once more
        stage = corrected
    tried = _bracketed(stage, margin, float(stage.total), seen)
    for _ in range(stage.settings.rounds - 1):
        best = _smallest_passing(tried, margin)
        if best is None:
            break  # fresh statistics make small models better, not large ones
        stage = best.stage.next_round(total_cost(best.plan), rounds_left=2)
        rest = stage.total - stage.factorizable
        tried += _bracketed(stage, margin, float(rest + total_cost(best.plan)), [])
    return [*tried, *_refitted_within(favoured(tried, margin), margin)]


def favoured(tried: Sequence[Candidate], margin: float) -> Candidate:
    """The smallest model that passes, or the most promising one where none does."""
    return _smallest_passing(tried, margin) or min(tried, key=promised_bound)


def promised_bound(candidate: Candidate) -> float:
    """The held-out upper bound that a model of this measured change would get.

    One-sided bound at the certificate's confidence for the held-out part's number of examples, and
    room for the selection examples' own luck so that the certificate holds with a chance of
    ``POWER``. Infinite for a model whose loss is not finite.
    """
    change = candidate.change
    if not math.isfinite(change.mean):
        return math.inf
    settings, held_out = candidate.stage.settings, candidate.stage.held_out_units
    deviation = change.deviation
    reach = settings.largest_change
    if reach is not None:
        reach = max(0.0, reach - change.mean)
    bound = half_width(deviation, held_out, settings.confidence, settings.test, reach)
    quantile = float(stats.t.ppf(POWER, change.examples - 1))
    luck = quantile * deviation * math.sqrt(1 / held_out + 1 / change.examples)
    return change.mean + bound + luck


def _refitted(candidate: Candidate) -> list[Candidate]:
    """The candidate fitted again, if it can be and its loss is finite."""
    if not (candidate.stage.refits and math.isfinite(candidate.change.mean)):
        return []
    refitted = candidate.stage.refitted(candidate)
    return [] if refitted.refit is None else [refitted]


def _refitted_within(candidate: Candidate, margin: float) -> list[Candidate]:
    """The candidate fitted again, and smaller plans likewise while they pass."""
    stage, tried = candidate.stage, _refitted(candidate)
    while tried and len(tried) < MOST_REFITS and promised_bound(tried[-1]) <= margin:
        spent, target = total_cost(tried[-1].plan), _next_cost(tried[-1], stage, margin)
        if not target <= spent - CLOSE_ENOUGH * stage.total:
            break
        smaller = _refitted(stage.measure(stage.plan(target, smallest=True)))
        if not smaller:
            break
        tried += smaller
    return tried


def _next_cost(candidate: Candidate, stage: Stage, margin: float) -> float:
    """Cost of the plan that should just be within the margin, by what a measured one showed.

    Its prediction is corrected by the ratio of its actual to its predicted change. NaN where
    nothing was predicted, or nothing finite came.
    """
    excess, predicted = promised_bound(candidate) - stage.gain, total_change(candidate.plan)
    if not (excess > 0 and predicted > 0 and math.isfinite(excess)):
        return math.nan
    return stage.cost_within((margin - stage.gain) * predicted / excess, default=math.nan)


def _is_better(candidate: Candidate, other: Candidate) -> bool:
    """Whether selection losses are lower by more than the standard error of their difference."""
    change = paired_change(other.evaluation, candidate.evaluation)
    return change.mean < -change.standard_error


def _smallest_passing(tried: Sequence[Candidate], margin: float) -> Candidate | None:
    passing = [candidate for candidate in tried if promised_bound(candidate) <= margin]
    return min(passing, key=lambda c: total_cost(c.plan), default=None)


def _bracketed(
    stage: Stage, margin: float, passes: float, seen: Sequence[Candidate]
) -> list[Candidate]:
    """Try plans on selection data, between the smallest that passes and the largest that fails.

    Each trial corrects the prediction by the ratio of actual to predicted change; where
    nothing is predicted the bracket is halved. ``passes`` is a cost of the whole model that is
    known to pass, ``seen`` are plans measured already; they count among those tried.
    """
    rest = stage.total - stage.factorizable
    fails = rest + smallest_cost(stage.curves) - 1.0
    tried = list(seen)
    for candidate in seen:
        spent = rest + total_cost(candidate.plan)
        if promised_bound(candidate) <= margin:
            passes = min(passes, spent)
        else:
            fails = max(fails, spent)
    target = rest + stage.cost_within(margin - stage.gain, default=0.9 * stage.factorizable)
    while len(tried) < MOST_PLANS and passes - fails > CLOSE_ENOUGH * stage.total:
        edge = 0.1 * (passes - fails)
        if math.isnan(target):
            target = (fails + passes) / 2
        target = min(max(target, fails + edge), passes - edge)
        try:
            plan = stage.plan(target - rest, smallest=True)
        except InputError:  # the first-order rule does not reach every size
            fails, target = target, math.nan
            continue
        candidate = stage.measure(plan)
        if tried and candidate.plan == tried[-1].plan:
            break
        tried.append(candidate)
        reached = promised_bound(candidate)
        spent = rest + total_cost(plan)
        if reached <= margin:
            passes = min(passes, spent)
        else:
            fails = max(fails, target)
        target = rest + _next_cost(candidate, stage, margin)
    if not tried:
        raise InputError(
            f"the objective {stage.settings.objective} has no plan at any size that was tried; "
            "use another objective."
        )
    return tried
