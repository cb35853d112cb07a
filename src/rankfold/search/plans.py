"""Which plans are tried on selection data: those of one size, and those within a margin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

from rankfold.certificate.change import paired_change
from rankfold.certificate.quantiles import student_quantile
from rankfold.certificate.statement import half_width
from rankfold.errors import InputError
from rankfold.search.allocate import smallest_cost, total_change, total_cost
from rankfold.search.interactions import corrected, corrects
from rankfold.search.refit import refits, refitted
from rankfold.search.round import Round
from rankfold.search.rounds import next_round
from rankfold.search.trial import Trial, lowest, measure

# Chance that compact leaves the held-out test of a model as good as its selection data say.
POWER = 0.9
CLOSE_ENOUGH = 0.01  # share of the model's size at which that search stops


def of_size(round_: Round, budget: float) -> list[Trial]:
    """Plans for a cost of the factorizable layers, measured on selection data.

    One a round, and one for each time that interactions are measured: at the best of these, at
    the plan that came of it, and on, if the effort allows it, as long as plans get better by more
    than their own error. The best of all is fitted again (``refit``) and measured once more.

    Args:
        round_: The first one.
        budget: Cost, in the unit of ``settings.cost``.

    Raises:
        InputError: No plan is that small.
    """
    effort = round_.settings.efforts
    tried = [measure(round_, round_.plan(budget))]
    for left in range(_rounds_after_the_first(round_), 0, -1):
        round_ = next_round(round_, budget, left + 1)
        tried.append(measure(round_, round_.plan(budget)))
    last = lowest(tried)
    for done in range(effort.most_corrections if corrects(round_) else 0):
        # Also where an earlier one looks no better: few selection examples can't tell.
        if done >= effort.corrections and not _is_better(last, tried[-2]):
            break
        round_ = corrected(last.round, last)
        if round_ is last.round:
            break  # the loss is not finite: the plan would be measured once more
        last = measure(round_, round_.plan(budget))
        tried.append(last)
    return [*tried, *_refitted(lowest(tried))]


def within_margin(round_: Round, margin: float) -> list[Trial]:
    """Plans around the smallest one that passes, measured on selection data.

    Interactions are measured first, at the plan predicted to be within the margin; then sizes are
    bracketed. Further rounds go on from the smallest model that passes. What each ends at is fitted
    again (``refit``), and smaller plans are as far as that makes them pass: more rounds try all
    that fewer do.

    Args:
        round_: The first one.
        margin: Largest change of the loss that counts as no harm.
    """
    seen: list[Trial] = []
    for _ in range(round_.settings.efforts.corrections if corrects(round_) else 0):
        seen.append(measure(round_, round_.plan_within(margin)))
        following = corrected(round_, seen[-1])
        if following is round_:
            break  # the loss is not finite: the plan would be measured once more
        round_ = following
    tried = _bracketed(round_, margin, float(round_.total), seen)
    ends = [favoured(tried, margin)]
    for _ in range(_rounds_after_the_first(round_)):
        best = _smallest_passing(tried, margin)
        if best is None:
            break  # fresh statistics make small models better, not large ones
        round_ = next_round(best.round, total_cost(best.plan), rounds_left=2)
        rest = round_.total - round_.factorizable
        tried += _bracketed(round_, margin, float(rest + total_cost(best.plan)), [])
        ends.append(favoured(tried, margin))
    different = {id(end): end for end in ends}.values()
    return [*tried, *chain.from_iterable(_refitted_within(end, margin) for end in different)]


def favoured(tried: Sequence[Trial], margin: float) -> Trial:
    """The smallest model that passes, or the most promising one where none does."""
    return _smallest_passing(tried, margin) or min(tried, key=promised_bound)


def promised_bound(trial: Trial) -> float:
    """The held-out upper bound that a model of this measured change would get.

    One-sided bound at the certificate's confidence for the held-out part's number of examples, and
    room for the selection examples' own luck so that the certificate holds with a chance of
    ``POWER``. Infinite for a model whose loss is not finite.
    """
    change = trial.change
    if not math.isfinite(change.mean):
        return math.inf
    settings, held_out = trial.round.settings, trial.round.study.held_out_units
    deviation = change.deviation
    reach = settings.largest_change
    if reach is not None:
        reach = max(0.0, reach - change.mean)
    bound = half_width(deviation, held_out, settings.confidence, settings.test, reach)
    quantile = student_quantile(POWER, change.examples - 1)
    luck = quantile * deviation * math.sqrt(1 / held_out + 1 / change.examples)
    return change.mean + bound + luck


def _rounds_after_the_first(round_: Round) -> int:
    return (round_.settings.rounds or 1) - 1


def _refitted(trial: Trial) -> list[Trial]:
    """The trial fitted again, if it can be and its loss is finite."""
    if not (refits(trial.round) and math.isfinite(trial.change.mean)):
        return []
    found = refitted(trial)
    return [] if found.refit is None else [found]


def _refitted_within(trial: Trial, margin: float) -> list[Trial]:
    """The trial fitted again, and smaller plans likewise while they pass."""
    round_, tried = trial.round, _refitted(trial)
    most = round_.settings.efforts.refits
    while tried and len(tried) < most and promised_bound(tried[-1]) <= margin:
        spent, target = total_cost(tried[-1].plan), _next_cost(tried[-1], round_, margin)
        if not target <= spent - CLOSE_ENOUGH * round_.total:
            break
        smaller = _refitted(measure(round_, round_.plan(target, smallest=True)))
        if not smaller:
            break
        tried += smaller
    return tried


def _next_cost(trial: Trial, round_: Round, margin: float) -> float:
    """Cost of the plan that should just be within the margin, by what a measured one showed.

    Its prediction is corrected by the ratio of its actual to its predicted change. NaN where
    nothing was predicted, or nothing finite came.
    """
    excess, predicted = promised_bound(trial) - round_.gain, total_change(trial.plan)
    if not (excess > 0 and predicted > 0 and math.isfinite(excess)):
        return math.nan
    return round_.cost_within((margin - round_.gain) * predicted / excess, default=math.nan)


def _is_better(trial: Trial, other: Trial) -> bool:
    """Whether selection losses are lower by more than the standard error of their difference."""
    change = paired_change(other.evaluation, trial.evaluation)
    return change.mean < -change.standard_error


def _smallest_passing(tried: Sequence[Trial], margin: float) -> Trial | None:
    passing = [trial for trial in tried if promised_bound(trial) <= margin]
    return min(passing, key=lambda c: total_cost(c.plan), default=None)


def _bracketed(round_: Round, margin: float, passes: float, seen: Sequence[Trial]) -> list[Trial]:
    """Try plans on selection data, between the smallest that passes and the largest that fails.

    Each trial corrects the prediction by the ratio of actual to predicted change; where
    nothing is predicted the bracket is halved. ``passes`` is a cost of the whole model that is
    known to pass, ``seen`` are plans measured already; they count among those tried.
    """
    rest = round_.total - round_.factorizable
    fails = rest + smallest_cost(round_.curves) - 1.0
    tried = list(seen)
    for trial in seen:
        spent = rest + total_cost(trial.plan)
        if promised_bound(trial) <= margin:
            passes = min(passes, spent)
        else:
            fails = max(fails, spent)
    target = rest + round_.cost_within(margin - round_.gain, default=0.9 * round_.factorizable)
    most = round_.settings.efforts.plans
    while len(tried) < most and passes - fails > CLOSE_ENOUGH * round_.total:
        edge = 0.1 * (passes - fails)
        if math.isnan(target):
            target = (fails + passes) / 2
        target = min(max(target, fails + edge), passes - edge)
        try:
            plan = round_.plan(target - rest, smallest=True)
        except InputError:  # the first-order rule does not reach every size
            fails, target = target, math.nan
            continue
        trial = measure(round_, plan)
        if tried and trial.plan == tried[-1].plan:
            break
        tried.append(trial)
        reached = promised_bound(trial)
        spent = rest + total_cost(plan)
        if reached <= margin:
            passes = min(passes, spent)
        else:
            fails = max(fails, target)
        target = rest + _next_cost(trial, round_, margin)
    if not tried:
        raise InputError(
            f"the objective {round_.settings.objective} has no plan at any size that was tried; "
            "use another objective."
        )
    return tried


def mild_to_strong(tried: Sequence[Trial]) -> list[Trial]:
    """The sizes tried, from the largest to the smallest, in which a sequence of tests takes them.

    Of one size the better trial. Those whose loss is not finite are left out, but one stays.
    """
    known = [trial for trial in tried if math.isfinite(trial.change.mean)]
    # Of one size the better one, which comes last here.
    sizes = {t.size: t for t in sorted(known, key=lambda t: t.change.mean, reverse=True)}
    return [sizes[size] for size in sorted(sizes, reverse=True)] or [*tried[:1]]
