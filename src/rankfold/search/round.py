"""A round: what does not depend on the size, and the plans that are made from it.

A round stands on a study. It has the gradient step, the spectra of all matrices and the curves of
their choices; the next round, if there is one, stands on the model that a plan of this one made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, get_args

from torch import Tensor

from rankfold.certificate.change import Change, paired_change
from rankfold.errors import InputError
from rankfold.files.json_file import finite
from rankfold.forms.curve import Curve, merged
from rankfold.forms.low_rank.form import LOW_RANK
from rankfold.forms.problem import LayerProblem
from rankfold.forms.registry import Form, LayerFactors, form_named, other_forms
from rankfold.forms.storage import Storage
from rankfold.machine.at_once import is_small, work_on
from rankfold.machine.progress import Progress, SilentProgress
from rankfold.machine.shared_out import shared_out
from rankfold.maths.gradient import HarmlessRange
from rankfold.maths.spectrum import Spectrum
from rankfold.model.layer_matrix import kept_dtype, weight_matrix
from rankfold.objective import OBJECTIVES, Objective
from rankfold.search.allocate import (
    RankPlan,
    plan_for_budget,
    plan_for_change,
    smallest_cost,
    total_change,
    total_cost,
)
from rankfold.search.gradient_step import Step, search_step, step_directions
from rankfold.search.layer_curves import (
    embedding_curve,
    embedding_spectrum,
    layer_spectrum,
    truncation_changes,
)
from rankfold.search.study import Study
from rankfold.settings import Settings, SizeOf, check_choice
from rankfold.tasks.evaluation import Evaluation, evaluate


@dataclass(frozen=True)
class Offer:
    """What a form offers for a layer.

    Attributes:
        form: The form.
        curve: Its choices, as predicted before any correction.
        state: What its factors are found from, beside the layer itself.
    """

    form: Form
    curve: Curve
    state: Any

    def __reduce__(self) -> tuple[Any, ...]:
        """For other processes of a run: they have the form itself."""
        return _offer_of, (self.form.names[0], self.curve, self.state)


def _offer_of(form: str, curve: Curve, state: Any) -> Offer:
    return Offer(form_named(form), curve, state)


@dataclass(frozen=True)
class PastRound:
    """What a round made of the model before the statistics were collected again.

    Attributes:
        size: Share kept of the whole model, in the unit of the cost.
        predicted: Predicted change of the loss, or None.
        change: Measured change on selection data, against the user's model.
        step: The round's gradient step as in the report, or None.
    """

    size: float
    predicted: float | None
    change: Change
    step: dict[str, Any] | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "ratio": self.size,
            "predicted_change": self.predicted,
            "change": finite(self.change.mean),
            "standard_error": finite(self.change.standard_error),
            "step": self.step,
        }


@dataclass(frozen=True)
class Round:
    """A model that is ready to be factorized at any size.

    Attributes:
        study: Model, data, statistics.
        settings: The settings.
        original: Losses of the user's model on selection data.
        step: The gradient step, for the joint objective.
        progress: Shows the stages.
        offset: Measured change on selection data of ``study.subject.base``, 0 in the first round.
        spectra: Of every matrix.
        ranked: The choices of each matrix by its rank.
        offers: By layer, what other forms offer.
        curves: All choices of each matrix, in the unit of ``settings.cost``.
        earlier: The rounds before this one.
        start: The plan that made ``study.subject.base``, None in the first round.
        factors: By matrix, what measured interactions made of its predictions; None before that.
        level: What brought the predictions of all, beside the factors, to measured changes.
        found: By layer, the factors that were last found, and the choice that they were asked for:
            a plan is measured, then corrected on or built, and plans of one size have much in
            common. Shared with rounds that differ in their curves alone.
    """

    study: Study
    settings: Settings
    original: Evaluation
    step: Step | None
    progress: Progress
    offset: float
    spectra: Mapping[str, Spectrum]
    ranked: Mapping[str, Curve]
    offers: Mapping[str, Sequence[Offer]]
    curves: Mapping[str, Curve]
    earlier: tuple[PastRound, ...] = ()
    start: RankPlan | None = None
    factors: Mapping[str, float] | None = None
    level: float = 1.0
    found: dict[str, tuple[object, LayerFactors]] = field(default_factory=dict)

    @property
    def objective(self) -> Objective:
        """The objective of the settings."""
        return OBJECTIVES[self.settings.objective]

    @property
    def gain(self) -> float:
        """Measured change on selection data of ``study.subject.base`` moved by the step."""
        return self.offset + (self.step.gain if self.step else 0.0)

    @property
    def total(self) -> int:
        """Cost of the whole original model: parameters, or FLOPs of one example."""
        return self.study.subject.total(self.settings.cost)

    @property
    def factorizable(self) -> int:
        """Cost of the layers that can be factorized."""
        return sum(curve.dense_cost for curve in self.curves.values())

    def budget(self, size: float, size_of: SizeOf) -> float:
        """Cost of the factorizable layers at a size of the whole model, or of these layers."""
        check_choice("size_of", size_of, get_args(SizeOf))
        if size_of == "factorizable":
            return size * self.factorizable
        return size * self.total - (self.total - self.factorizable)

    def plan(self, budget: float, smallest: bool = False) -> RankPlan:
        """Ranks for a total cost of the factorizable layers.

        Raises:
            InputError: No plan is that small.
        """
        try:
            return plan_for_budget(self.objective, self.curves, budget, smallest)
        except ValueError as error:
            rest = self.total - self.factorizable
            least = (rest + smallest_cost(self.curves)) / self.total
            if smallest_cost(self.curves) <= budget:
                raise InputError(
                    f"the size is too small for the objective {self.settings.objective}: {error}. "
                    "Ask for a larger size, or use another objective."
                ) from error
            raise InputError(
                f"the size is too small: even at rank 1 everywhere {least:.4f} of the model's "
                f"{self.settings.cost} is kept, of which {rest / self.total:.4f} lies outside the "
                "layers that can be factorized. Ask for a larger size."
            ) from error

    def plan_within(self, margin: float) -> RankPlan:
        """The smallest plan predicted to be within a margin."""
        plan = plan_for_change(self.objective, self.curves, margin - self.gain)
        return self.plan(0.9 * self.factorizable) if plan is None else plan

    def cost_within(self, tolerance: float, default: float) -> float:
        """Cost of the smallest plan predicted to change the loss by no more than a tolerance."""
        plan = plan_for_change(self.objective, self.curves, tolerance)
        return default if plan is None else float(total_cost(plan))

    def size(self, plan: RankPlan) -> float:
        """Share kept of the whole model, in the unit of the cost."""
        return (self.total - self.factorizable + total_cost(plan)) / self.total

    def predicted(self, plan: RankPlan) -> float | None:
        """Predicted change of the loss: the step's measured gain and the truncation's cost."""
        return self.gain + total_change(plan) if self.objective.predicts_loss else None

    def scale(self, name: str) -> float:
        """What a matrix' curves were multiplied by since they were made."""
        return self.level * (self.factors[name] if self.factors else 1.0)

    def harmless_range(self, name: str) -> HarmlessRange:
        """The perturbations of one layer, changed alone, that do no harm.

        Raises:
            ValueError: There is no gradient step, whose estimate is the range's centre.
        """
        if self.step is None:
            raise ValueError("the harmless range needs the joint objective's gradient step")
        return self.step.directions.harmless(name, self.spectra[name].singular_values)

    def moved(self, name: str) -> Tensor:
        """A matrix after the step, if there is one, ``(out, in)``."""
        subject = self.study.subject
        if name in subject.embeddings:  # the step leaves them where they are
            return subject.embeddings[name].weight.detach()
        layer = subject.layers[name]
        return self.step.moved(name, layer) if self.step else weight_matrix(layer)

    def problem(
        self, name: str, changes: Tensor | None = None, errors: Tensor | None = None
    ) -> LayerProblem:
        """What a form is asked about a layer; changes and errors where no curve has them yet."""
        if changes is None:
            changes, errors = self.ranked[name].changes, self.ranked[name].errors
        return LayerProblem(
            layer=self.study.subject.layers[name],
            moved=partial(self.moved, name),
            spectrum=self.spectra[name],
            changes=changes,
            errors=errors,
            statistics=self.study.statistics.layers.get(name),
            damping=self.settings.dampings,
            storage=self.settings.form,
            cost=self.settings.cost,
            calls=self.study.subject.calls(name),
        )

    def keep(self, name: str, factor: Tensor) -> Tensor:
        """A factor of a matrix, as those of all are kept."""
        dtype = kept_dtype(self.study.subject.matrices[name].weight)
        return self.study.offload.kept(factor.to(dtype))


def start_round(
    study: Study,
    settings: Settings,
    *,
    progress: Progress | None = None,
    original: Evaluation | None = None,
    release: bool = False,
    before: Mapping[str, Sequence[Offer]] | None = None,
) -> Round:
    """Original loss on selection data, the gradient step, and the curves of all matrices.

    Args:
        study: With statistics that suffice for the objective.
        settings: The objective, its storage and its damping may differ from the collection's.
        progress: Shows the stages.
        original: Losses of the user's model on selection data, where they are known.
        release: Drop each layer's statistics once used, to save memory.
        before: The offers of the round before: cut in other blocks than there, a layer would not
            have the low rank that it was given.
    """
    progress = progress or SilentProgress()
    if original is None:
        shown = "original on selection data"
        original = on_selection(study, settings, progress, study.subject.unpacked.given, shown)
    start = original
    if study.subject.base is not study.subject.model:
        shown = "start of the round on selection data"
        start = on_selection(study, settings, progress, study.subject.base, shown)
    step = _searched_step(study, settings, start, progress, release)
    offset = paired_change(original, start).mean
    empty = Round(study, settings, original, step, progress, offset, {}, {}, {}, {})
    return _with_curves(empty, release, before or {})


def on_selection(
    study: Study,
    settings: Settings,
    progress: Progress,
    model: Any,
    shown: str,
    *,
    finite: bool = True,
) -> Evaluation:
    """Losses of a model on the selection examples; those of a trial need not be finite."""
    return evaluate(
        model,
        study.task,
        study.parts["selection"],
        batch_size=settings.batch_size,
        progress=progress,
        stage=shown,
        finite=finite,
    )


def with_storage(round_: Round, storage: Storage) -> Round:
    """The same spectra with factors in another storage, and what they cost in it."""
    settings = replace(round_.settings, form=storage)
    subject = round_.study.subject
    ranked = {
        name: replace(curve, costs=subject.rank_costs(name, storage, settings.cost))
        for name, curve in round_.ranked.items()
    }
    there = replace(round_, settings=settings, ranked=ranked)
    offers: dict[str, list[Offer]] = {}
    for name, known in round_.offers.items():
        offers[name] = [
            offer if len(offer.form.storages) == 1 else _offer(there, name, offer.form, known)
            for offer in known
        ]
    return _with_all_forms(replace(there, offers=offers))


def _with_curves(round_: Round, release: bool, before: Mapping[str, Sequence[Offer]]) -> Round:
    """The round with its spectra, and with the choices of every form."""
    study, settings = round_.study, round_.settings
    layers = study.subject.layers
    made = shared_out(
        [*layers],
        lambda name: _choices(round_, name, before.get(name, ())),
        small=lambda name: is_small(layers[name].weight),
        cost=lambda name: work_on(layers[name].weight),
        what="spectra",
        keep=study.offload.kept,
    )
    spectra: dict[str, Spectrum] = {}
    ranked: dict[str, Curve] = {}
    offers: dict[str, list[Offer]] = {}
    shown = round_.progress.track(made, "spectra", len(layers))
    for name, (spectrum, curve, of_forms) in zip(layers, shown, strict=True):
        spectra[name], ranked[name], offers[name] = spectrum, curve, of_forms
        if release and not of_forms:
            study.statistics.layers.pop(name, None)
    for name, matrix in study.subject.embeddings.items():
        uses = study.statistics.embeddings[name]
        spectrum = embedding_spectrum(matrix.weight, uses, settings.dampings)
        spectra[name] = spectrum.kept(partial(round_.keep, name))
        ranked[name] = embedding_curve(
            spectrum,
            uses,
            study.subject.rank_costs(name, settings.form, settings.cost),
            study.subject.dense_cost(name, settings.cost),
        )
        if release:
            study.statistics.embeddings.pop(name)
    return _with_all_forms(replace(round_, spectra=spectra, ranked=ranked, offers=offers))


def _choices(
    round_: Round, name: str, before: Sequence[Offer]
) -> tuple[Spectrum, Curve, list[Offer]]:
    """A layer's spectrum, its choices by rank, and what other forms offer."""
    objective, settings = round_.objective, round_.settings
    layer = round_.study.subject.layers[name]
    statistics = round_.study.statistics.layers.get(name)
    spectrum = layer_spectrum(objective, round_.moved(name), statistics, settings.dampings)
    changes, errors = truncation_changes(objective, layer, spectrum, statistics, settings.dampings)
    spectrum = spectrum.kept(partial(round_.keep, name))
    there = replace(round_, spectra={name: spectrum})
    curve, _ = LOW_RANK.curve(there.problem(name, changes, errors))
    # Forms cut and regroup the longer side: they need its whole Gram.
    whole = statistics is not None and statistics.product is None
    fitting = [form for form in _allowed_forms(settings) if whole and form.fits(layer)]
    there = replace(there, ranked={name: curve})
    return spectrum, curve, [_offer(there, name, form, before) for form in fitting]


def _offer(round_: Round, name: str, form: Form, before: Sequence[Offer]) -> Offer:
    earlier = next((offer.state for offer in before if offer.form is form), None)
    curve, state = form.curve(replace(round_.problem(name), earlier=earlier))
    return Offer(form, curve, form.kept(state, partial(round_.keep, name)))


def _with_all_forms(round_: Round) -> Round:
    """The choices by rank, and beside them those of the other forms that a layer may take."""
    curves = dict(round_.ranked)
    for name, offers in round_.offers.items():
        for offer in offers:
            if round_.settings.form in offer.form.storages:
                # As corrected since: an offer's curve is that of before.
                changes = offer.curve.changes * round_.scale(name)
                curves[name] = merged([curves[name], replace(offer.curve, changes=changes)])
    return replace(round_, curves=curves)


def _allowed_forms(settings: Settings) -> list[Form]:
    """The forms beside plain low rank that the settings allow, where a loss is predicted."""
    if OBJECTIVES[settings.objective].allocation != "multiplier":
        return []
    return [
        form for form in other_forms() if form.setting is None or getattr(settings, form.setting)
    ]


def _searched_step(
    study: Study, settings: Settings, start: Evaluation, progress: Progress, release: bool
) -> Step | None:
    """The gradient step and its length on selection data, None where none is taken."""
    if not study.takes_step(settings):
        return None
    subject = study.subject
    directions = step_directions(
        subject.layers,
        study.statistics.layers,
        settings.dampings,
        progress,
        estimator=settings.step_estimator,
        release=release,
        offload=study.offload,
    )
    return search_step(
        subject.base,
        study.task,
        study.parts["selection"],
        start,
        subject.layers,
        directions,
        batch_size=settings.batch_size,
        progress=progress,
        groups=settings.step_groups,
        compared_on=settings.efforts.compared_on,
        offload=study.offload,
    )
