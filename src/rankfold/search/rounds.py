"""From a round to the next one, which stands on the model that a plan of this one made."""

from __future__ import annotations

from dataclasses import replace

from rankfold.errors import InputError
from rankfold.model.replace import with_replaced
from rankfold.search.allocate import total_cost
from rankfold.search.build import control, plan_weights
from rankfold.search.gradient_step import step_report
from rankfold.search.round import PastRound, Round, start_round
from rankfold.search.trial import measure

MOST_RETREATS = 3


def next_round(round_: Round, budget: float, rounds_left: int) -> Round:
    """Factorize a part of the way, and collect statistics again on what came out.

    The quadratic model is local, so the way to the budget is divided evenly among the rounds
    that are left. Where the model of this round's plan comes out worse on selection data than
    predicted, beyond ``trial.TRUSTED`` and its own error, the round goes half as far.

    Args:
        round_: The round before.
        budget: Cost of the factorizable layers at the end of all rounds.
        rounds_left: This one included.

    Raises:
        InputError: A layer is no longer reached.
    """
    study, settings, progress = round_.study, round_.settings, round_.progress
    spent = total_cost(round_.start) if round_.start else round_.factorizable
    reached = spent + (budget - spent) / rounds_left
    for _ in range(MOST_RETREATS):
        trial = measure(round_, round_.plan(reached))
        if trial.as_predicted:
            break
        reached = (spent + reached) / 2
    made, shares = plan_weights(round_, trial.plan), study.offload.weights
    weights = {name: study.offload.kept(w) if shares else w for name, w in made}
    base = with_replaced(study.subject.base, {}, weights, share=shares)
    dense = control(round_) or study.subject.dense
    following = study.standing_on(base, dense, settings, progress)
    found = following.statistics
    lost = [name for name in following.subject.layers if name not in found.layers]
    lost += [name for name, one in found.embeddings.items() if not one.uses]
    if lost:
        raise InputError(
            f"the model factorized in round {len(round_.earlier) + 1} no longer calls {lost[0]} "
            f"({len(lost)} such layers) on the calibration data, where the round before did: "
            "experts are chosen otherwise now. Use rounds=1, or more calibration data."
        )
    started = start_round(
        following,
        settings,
        progress=progress,
        original=round_.original,
        release=True,
        before=round_.offers,
    )
    past = PastRound(trial.size, trial.predicted, trial.change, step_report(round_.step, settings))
    return replace(started, earlier=(*round_.earlier, past), start=trial.plan)
