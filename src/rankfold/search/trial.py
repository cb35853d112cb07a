"""A plan that was tried on selection data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

from torch import Tensor, nn

from rankfold.certificate.change import Change, paired_change
from rankfold.files.digests import json_digest
from rankfold.machine import processes
from rankfold.model.memory_layout import lay_out
from rankfold.model.of_user import bare_copy
from rankfold.model.replace import put_modules
from rankfold.search.allocate import RankPlan
from rankfold.search.build import build, look_at
from rankfold.search.round import Round, on_selection
from rankfold.tasks.evaluation import Evaluation

TRUSTED = 1.5  # measured / predicted cost of truncation up to which a round goes its whole way


@dataclass(frozen=True)
class Refit:
    """What fitting output factors again made of a plan.

    Attributes:
        modules: By layer.
        residual: Those of them that were fitted to what they are added to.
        examples: Number of calibration examples that they were fitted to.
        gain: How much the change on selection data became by it; below 0 is better.
    """

    modules: Mapping[str, nn.Module]
    residual: Sequence[str]
    examples: int
    gain: float


@dataclass(frozen=True)
class Trial:
    """A plan and what selection data say of it.

    Attributes:
        round: The round that it belongs to.
        plan: The ranks.
        size: Share kept of the whole model, in the unit of the cost.
        predicted: Predicted change of the loss, or None.
        change: Measured change on selection data.
        evaluation: Its losses on the selection examples.
        refit: The layers that were fitted again, None where none was.
    """

    round: Round
    plan: RankPlan
    size: float
    predicted: float | None
    change: Change
    evaluation: Evaluation
    refit: Refit | None = None

    def build(self) -> nn.Module:
        """The model, its tensors laid out as they will be once it was saved and loaded."""
        model = build(self.round, self.plan)
        if self.refit is not None:
            shares = self.round.study.offload.weights  # what lies in files is no copy
            fitted = {
                name: bare_copy(module, {id(p): p for p in module.parameters() if shares})
                for name, module in self.refit.modules.items()
            }
            put_modules(model, fitted)
        lay_out(model)
        return model

    @property
    def differences(self) -> Tensor:
        """``(n,)`` changes of the selection examples' losses."""
        return self.evaluation.losses - self.round.original.losses

    @property
    def as_predicted(self) -> bool:
        """Whether the measured change is not above the predicted one by more than is trusted."""
        if self.predicted is None:
            return True
        harm = self.change.mean - self.round.gain
        foreseen = self.predicted - self.round.gain
        return harm <= TRUSTED * foreseen + 2 * self.change.standard_error


def measure(round_: Round, plan: RankPlan) -> Trial:
    """Measure the change of a plan's model on selection data."""
    size = round_.size(plan)
    processes.agree("the plan", json_digest({name: astuple(one) for name, one in plan.items()}))
    shown = f"size {size:.3f} on selection data"
    evaluation = try_on_selection(round_, look_at(round_, plan), shown)
    change = paired_change(round_.original, evaluation)
    return Trial(round_, plan, size, round_.predicted(plan), change, evaluation)


def try_on_selection(round_: Round, model: nn.Module, shown: str) -> Evaluation:
    """Losses of a trial on the selection examples; they need not be finite."""
    study, settings = round_.study, round_.settings
    return on_selection(study, settings, round_.progress, model, shown, finite=False)


def lowest(tried: Sequence[Trial]) -> Trial:
    """The trial with the lowest measured loss."""
    return min(tried, key=lambda t: t.change.mean if math.isfinite(t.change.mean) else math.inf)


def foreseen_by(round_: Round, trial: Trial) -> float | None:
    """Predicted change of a trial of the same study, by the curves of this round.

    Those that made its plan may have been corrected since, by what it or another plan showed.
    """
    if trial.predicted is None:
        return None
    costs = [
        choice.change * round_.scale(name) / trial.round.scale(name)
        for name, choice in trial.plan.items()
    ]
    return round_.gain + math.fsum(costs) + (trial.refit.gain if trial.refit else 0.0)


def last_prediction(chosen: Trial, tried: Sequence[Trial]) -> float | None:
    """Predicted change of the chosen plan, by what was last measured in its round.

    The first plan may be the best on selection data, and be predicted before anything was measured.
    """
    study = chosen.round.study
    # What is fitted again comes last and is of the round of its plan, which may be an early one.
    measured = [t for t in tried if t.refit is None and t.round.study is study]
    return foreseen_by((measured[-1] if measured else chosen).round, chosen)
