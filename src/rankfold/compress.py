"""The two algorithms, as the stages that they run through.

``lossless`` gives the best model of a given size, ``compact`` the smallest model that is no worse
than the original. Both look at calibration data once (statistics), choose on selection data, and
end in a certificate on held-out data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast, get_args

import torch
from scipy import stats
from torch import Tensor, nn

from rankfold.allocate import (
    Choice,
    Curve,
    RankPlan,
    best_within_cost,
    merged,
    smallest_cost,
    total_change,
    total_cost,
)
from rankfold.artifact import library_versions
from rankfold.block_forms import BlockSpectra, block_form, block_spectra
from rankfold.block_modules import BLOCK_FORMS
from rankfold.certificate_file import (
    Evidence,
    example_digests,
    make_document,
    model_digest,
)
from rankfold.certify import (
    ACCURACY,
    DEFAULT_MARGIN,
    Certificate,
    Change,
    Statement,
    check_margin,
    check_metric_margin,
    examples_seen,
    fewest_units,
    half_width,
    paired_change,
    state,
)
from rankfold.collected import Collected, collect
from rankfold.conv_forms import conv_factors
from rankfold.conv_modules import ConvForm
from rankfold.data import (
    FEWEST,
    PARTS,
    Data,
    as_part,
    split,
)
from rankfold.errors import InputError
from rankfold.factorize import low_rank_module, low_rank_uses, truncate
from rankfold.interactions import (
    LARGEST_CORRECTION,
    OTHER_SHARE_EXAMPLES,
    SHARE_EXAMPLES,
    SHARE_OF_CALIBRATION,
    corrections,
    measured_shares,
)
from rankfold.layer_matrix import MatrixLayer, matrix_shape, weight_matrix
from rankfold.linalg import Damping
from rankfold.modules import FORMS, Form
from rankfold.objectives import (
    OBJECTIVES,
    Objective,
    block_curve,
    conv_curve,
    damped_grams,
    embedding_curve,
    embedding_spectrum,
    layer_curve,
    layer_spectrum,
    plan_for_budget,
    plan_for_change,
)
from rankfold.openings import SHORT, Opening, history, record
from rankfold.overlap import look_alikes
from rankfold.progress import Progress, SilentProgress
from rankfold.replace import with_replaced
from rankfold.report import (
    damping_report,
    finite,
    layer_report,
    loss_report,
    model_sizes,
    predicted_by_rank,
    settings_report,
    step_report,
)
from rankfold.result import Result
from rankfold.settings import Settings, SizeOf, check_choice, check_size
from rankfold.sizes import model_parameters
from rankfold.spectrum import HarmlessRange, Spectrum
from rankfold.step import Step, search_step, step_directions
from rankfold.tasks import (
    Evaluation,
    LossFunction,
    Metric,
    evaluate,
    joined,
    metric_values,
)

# Chance that compact leaves the held-out test of a model as good as its selection data say.
POWER = 0.9
LOOKS = 16  # times that the betting test looks whether it may stop
MOST_PLANS = 7  # plans that compact evaluates on selection data
CORRECTIONS = 2  # how often interactions are measured, each time at the plan that came of the last
TRUSTED = 1.5  # measured / predicted cost of truncation up to which a round goes its whole way
MOST_RETREATS = 3
# What damping="auto" tries, of A and B, and at which share of the factorizable layers.
DAMPINGS = (Damping(0.1, 0.1), Damping(0.01, 0.3), Damping(0.1, 1.0), Damping(0.5, 0.5))
DAMPING_SIZE = 0.8
CLOSE_ENOUGH = 0.01  # share of the model's size at which compact's search stops


def lossless(
    model: nn.Module,
    data: object,
    *,
    size: float,
    size_of: SizeOf = "model",
    margin: float = DEFAULT_MARGIN,
    loss: LossFunction | None = None,
    metrics: Sequence[Metric] = (),
    progress: Progress | None = None,
    **settings: Any,
) -> Result:
    """The best model of a given size, with the verdict of held-out data on it.

    Args:
        model: Any ``nn.Module``; it comes back unchanged.
        data: A data set or data loader, split for you, or ``rankfold.Data``.
        size: Share that is kept, in (0, 1], of the parameters (or FLOPs) of the whole model.
        size_of: ``factorizable`` makes it the share of the layers that can be factorized.
        margin: Change of the mean loss, in nats, up to which the verdict is ``lossless``.
        loss: ``loss(model, batch)`` giving one loss per example, where it isn't recognised.
        metrics: Certified beside the loss; those with a margin must hold too.
        progress: For example ``rankfold.TerminalProgress()``.
        **settings: Fields of ``Settings``.

    Raises:
        InputError: Names the input, what was expected, and what to do.
    """
    check_size(size)
    check_margin(margin)
    data = _enough_held_out(data, margin, metrics, settings)
    prepared = prepare(model, data, loss=loss, metrics=metrics, progress=progress, **settings)
    return prepared.lossless(size, size_of=size_of, margin=margin)


def compact(
    model: nn.Module,
    data: object,
    *,
    margin: float = DEFAULT_MARGIN,
    certified: bool = False,
    loss: LossFunction | None = None,
    metrics: Sequence[Metric] = (),
    progress: Progress | None = None,
    **settings: Any,
) -> Result:
    """The smallest model whose mean loss is no worse than the original's by more than a margin.

    When no smaller model is shown to be within the margin, the result holds the best one seen and
    ``result.certificate.holds`` is False.

    Args:
        model: Any ``nn.Module``; it comes back unchanged.
        data: A data set or data loader, split for you, or ``rankfold.Data``.
        margin: Largest change of the mean loss, in nats, that counts as no harm.
        certified: Test all sizes that the search tried, from mild to strong, until the first that
            fails, instead of only the one that selection data favour.
        loss: ``loss(model, batch)`` giving one loss per example, where it isn't recognised.
        metrics: Certified beside the loss; those with a margin must hold too.
        progress: For example ``rankfold.TerminalProgress()``.
        **settings: Fields of ``Settings``.

    Raises:
        InputError: Names the input, what was expected, and what to do.
    """
    check_margin(margin)
    data = _enough_held_out(data, margin, metrics, settings)
    prepared = prepare(model, data, loss=loss, metrics=metrics, progress=progress, **settings)
    return prepared.compact(margin=margin, certified=certified)


def prepare(
    model: nn.Module,
    data: object,
    *,
    loss: LossFunction | None = None,
    metrics: Sequence[Metric] = (),
    progress: Progress | None = None,
    **settings: Any,
) -> Preparation:
    """Everything that does not depend on the size: statistics, step, spectra.

    Use it to try several sizes, or both algorithms, with one pass over the calibration data.

    Raises:
        InputError: Names the input, what was expected, and what to do.
    """
    chosen = Settings(**settings)
    _check_metrics(metrics)
    collected = collect(model, data, chosen, loss=loss, metrics=metrics, progress=progress)
    if chosen.damping == "auto":
        chosen = choose_damping(collected, chosen, progress=progress)
    return analyse(collected, chosen, progress=progress, release=True)


def _check_metrics(metrics: Sequence[Metric]) -> None:
    names = [metric.name for metric in metrics]
    if len({*names, ACCURACY}) <= len(names):
        raise InputError(
            f"the metrics are called {', '.join(names)}; expected different names, none of them "
            f"{ACCURACY}, which is measured where the task has one (accuracy_margin states how "
            "much of it may be lost)."
        )
    for metric in metrics:
        if metric.margin is not None:
            check_metric_margin(metric.name, metric.margin)


def _enough_held_out(
    data: object, margin: float, metrics: Sequence[Metric], settings: Mapping[str, Any]
) -> Data:
    """The three parts, with a held-out part that could show that nothing changed.

    Raises:
        InputError: Says how many examples are needed.
    """
    chosen = Settings(**settings)
    data = data if isinstance(data, Data) else split(data, chosen.seed)
    units = len(data.held_out) if data.groups is None else len(set(map(str, data.groups)))
    units = min(units, chosen.held_out_limit or units)
    if data.groups is not None and chosen.test == "betting":
        raise InputError(
            "the betting test looks at single examples, but the held-out examples come in groups; "
            "use the test bounded."
        )
    if units < 2:
        raise InputError(
            "the held-out examples form one group; a bound needs 2 independent ones or more. Give "
            "examples of more groups (documents)."
        )
    wanted = [(margin, chosen.largest_change, "--margin", "of the loss")]
    wanted.append((chosen.accuracy_margin or 0.0, 1.0, "--accuracy-margin", "of the accuracy"))
    wanted += [(m.margin or 0.0, 1.0, "margin", f"of the metric {m.name}") for m in metrics]
    for within, largest, option, what in wanted:
        least = None if largest is None else fewest_units(within, largest, chosen.confidence)
        if least is not None and units < least:
            raise InputError(
                f"the held-out part has {units} independent examples: too few to show a change "
                f"{what} of at most {within:g} with {chosen.confidence:.0%} confidence where one "
                f"example may change by {largest:g}, even if none changes at all. That needs "
                f"{least} examples. Give more held-out data (--held-out-limit), or state a larger "
                f"{option}" + (", or a smaller --largest-change." if option == "--margin" else ".")
            )
    return data


def analyse(
    collected: Collected,
    settings: Settings,
    *,
    progress: Progress | None = None,
    release: bool = False,
    block_orders: Mapping[str, Tensor] | None = None,
) -> Preparation:
    """Original loss on selection data, the gradient step, and the spectra of all layers.

    Args:
        collected: From ``collect``, with statistics that suffice for the objective.
        settings: The objective, its form and its damping may differ from the collection's.
        progress: Shows the stages.
        release: Drop each layer's statistics once used, to save memory.
        block_orders: By layer, how an earlier round cut it in blocks: cut otherwise, its blocks
            would not have the low rank that they were given.
    """
    progress = progress or SilentProgress()
    objective = OBJECTIVES[settings.objective]
    task, layers = collected.task, collected.layers
    original = start = collected.original_losses("selection", settings.batch_size, progress)
    if collected.base is not collected.model:
        start = evaluate(
            collected.base,
            task,
            collected.parts["selection"],
            batch_size=settings.batch_size,
            progress=progress,
            stage="start of the round on selection data",
        )
    step = None
    if collected.takes_step(settings):
        directions = step_directions(
            layers,
            collected.statistics,
            settings.dampings,
            progress,
            estimator=settings.step_estimator,
            release=release,
        )
        step = search_step(
            collected.base,
            task,
            collected.parts["selection"],
            start,
            layers,
            directions,
            batch_size=settings.batch_size,
            progress=progress,
            groups=settings.step_groups,
        )
    spectra: dict[str, Spectrum] = {}
    curves: dict[str, Curve] = {}
    blocks: dict[str, BlockSpectra] = {}
    block_curves: dict[str, Curve] = {}
    for name, layer in progress.track(layers.items(), "spectra", len(layers)):
        statistics = collected.statistics.get(name)
        weight = _moved(step, name, layer)
        spectra[name] = layer_spectrum(objective, weight, statistics, settings.dampings)
        curves[name] = layer_curve(
            objective,
            layer,
            spectra[name],
            statistics,
            settings.form,
            collected.cost_per_parameter(name, settings.cost),
        )
        cut = block_form(layer) if _has_forms(settings, settings.block_forms) else None
        if cut is not None and statistics is not None:
            a, b = damped_grams(statistics, settings.dampings)
            blocks[name] = block_spectra(weight, a, b, cut, (block_orders or {}).get(name))
            block_curves[name] = block_curve(
                blocks[name],
                statistics,
                matrix_shape(layer),
                collected.cost_per_parameter(name, settings.cost),
            )
        if release and not _has_conv_forms(layer, settings):
            collected.statistics.pop(name, None)
    for name, matrix in collected.embeddings.items():
        uses = collected.embedding_statistics[name]
        spectra[name] = embedding_spectrum(matrix.weight, uses, settings.dampings)
        curves[name] = embedding_curve(
            spectra[name],
            uses,
            collected.rank_costs(name, settings.form, settings.cost),
            collected.dense_cost(name, settings.cost),
        )
        if release:
            collected.embedding_statistics.pop(name)
    offset = paired_change(original, start).mean
    prepared = Preparation(
        collected, settings, step, spectra, curves, curves, progress, offset, blocks, block_curves
    )
    return prepared._with_all_forms()


def choose_damping(
    collected: Collected, settings: Settings, *, progress: Progress | None = None
) -> Settings:
    """The settings with those of ``DAMPINGS`` that lose least on selection data.

    Each is tried without the gradient step at ``DAMPING_SIZE`` of the factorizable layers; what
    each gave is kept in ``collected.damping_trials``. An objective without Grams has nothing to
    try and takes the first.

    Raises:
        InputError: As ``analyse``.
    """
    if not OBJECTIVES[settings.objective].needs_data:
        return replace(settings, damping=DAMPINGS[0].input)
    for damping in DAMPINGS:
        trial = replace(
            settings, damping=damping.input, output_damping=damping.output, gradient_step=False
        )
        prepared = analyse(collected, trial, progress=progress)
        candidate = prepared.measure(prepared.plan(DAMPING_SIZE * prepared.factorizable))
        collected.damping_trials.append((damping, candidate.change.mean))
    known = [(d, change) for d, change in collected.damping_trials if math.isfinite(change)]
    best = min(known, key=lambda trial: trial[1])[0] if known else DAMPINGS[0]
    return replace(settings, damping=best.input, output_damping=best.output)


def _moved(step: Step | None, name: str, layer: MatrixLayer) -> Tensor:
    """The layer's weight after the step, if there is one, ``(out, in)``."""
    return step.moved(name, layer) if step else weight_matrix(layer)


def _has_conv_forms(layer: nn.Module, settings: Settings) -> bool:
    """Whether a layer may also take the forms of ``conv_modules``."""
    several = isinstance(layer, nn.Conv2d) and layer.weight[0, 0].numel() > 1
    return several and _has_forms(settings, settings.conv_forms)


def _has_forms(settings: Settings, wanted: bool) -> bool:
    """Whether layers may take other forms than one product of factors."""
    return wanted and OBJECTIVES[settings.objective].allocation == "multiplier"


@dataclass
class Preparation:
    """A model that is ready to be factorized at any size.

    Attributes:
        collected: Model, data, statistics.
        settings: The settings.
        step: The gradient step, for the joint objective.
        spectra: By layer.
        ranked: The choices of each layer by its rank in the settings' form.
        curves: All choices of each layer, in the unit of ``settings.cost``.
        progress: Shows the stages.
        offset: Measured change on selection data of ``collected.base``, 0 in the first round.
        blocks: Spectra of both halves of the layers that have block forms.
        block_curves: The choices in these forms.
        earlier: The rounds before this one.
        start: The plan that made ``collected.base``, None in the first round.
        factors: By layer, what measured interactions made of its predictions; None before that.
    """

    collected: Collected
    settings: Settings
    step: Step | None
    spectra: dict[str, Spectrum]
    ranked: dict[str, Curve]
    curves: dict[str, Curve]
    progress: Progress
    offset: float = 0.0
    blocks: dict[str, BlockSpectra] = field(default_factory=dict)
    block_curves: dict[str, Curve] = field(default_factory=dict)
    earlier: list[Round] = field(default_factory=list)
    start: RankPlan | None = None
    factors: dict[str, float] | None = None
    # A list, so that copies with other curves or another form share what was evaluated once.
    _control: list[Evaluation] = field(default_factory=list)

    @property
    def objective(self) -> Objective:
        """The objective of the settings."""
        return OBJECTIVES[self.settings.objective]

    @property
    def gain(self) -> float:
        """Measured change on selection data of ``collected.base`` moved by the step."""
        return self.offset + (self.step.gain if self.step else 0.0)

    @property
    def total(self) -> int:
        """Cost of the whole original model: parameters, or FLOPs of one example."""
        if self.settings.cost == "parameters":
            return model_parameters(self.collected.model)
        return sum(self.collected.seen.flops.values())

    @property
    def factorizable(self) -> int:
        """Cost of the layers that can be factorized."""
        return sum(curve.dense_cost for curve in self.curves.values())

    def lossless(
        self, size: float, *, size_of: SizeOf = "model", margin: float = DEFAULT_MARGIN
    ) -> Result:
        """The best model of a size; see ``rankfold.lossless``."""
        check_size(size)
        check_margin(margin)
        tried = self.candidates(self._budget(size, size_of))
        best = lowest(tried)
        target = {"size": size, "size_of": size_of}
        return best.stage._result("lossless", best, margin, target, tried)

    def candidates(self, budget: float) -> list[Candidate]:
        """Plans for a cost of the factorizable layers, measured on selection data.

        One a round, and one for each time that interactions are measured: at the best of these, and
        at the plan that came of it.

        Raises:
            InputError: No plan is that small.
        """
        tried = [self.measure(self.plan(budget))]
        stage = self
        for left in range(self.settings.rounds - 1, 0, -1):
            stage = stage.next_round(budget, left + 1)
            tried.append(stage.measure(stage.plan(budget)))
        best = lowest(tried)
        for _ in range(CORRECTIONS if self.corrects else 0):
            # Also where the first correction looks no better: few selection examples can't tell.
            stage = best.stage.corrected(best)
            if stage is best.stage:
                break  # the loss is not finite: the plan would be measured once more
            best = stage.measure(stage.plan(budget))
            tried.append(best)
        return tried

    def next_round(self, budget: float, rounds_left: int) -> Preparation:
        """Factorize a part of the way, and collect statistics again on what came out.

        The quadratic model is local, so the way to the budget is divided evenly among the rounds
        that are left. Where the model of this round's plan comes out worse on selection data than
        predicted, beyond ``TRUSTED`` and its own error, the round goes half as far.

        Args:
            budget: Cost of the factorizable layers at the end of all rounds.
            rounds_left: This one included.

        Raises:
            InputError: A layer is no longer reached.
        """
        spent = total_cost(self.start) if self.start else self.factorizable
        reached = spent + (budget - spent) / rounds_left
        for _ in range(MOST_RETREATS):
            candidate = self.measure(self.plan(reached))
            if candidate.as_predicted:
                break
            reached = (spent + reached) / 2
        plan = candidate.plan
        base = with_replaced(self.collected.base, {}, self.weights(plan))
        collected = replace(
            self.collected,
            base=base,
            dense=self.control() or self.collected.dense,
            layers={n: cast("MatrixLayer", base.get_submodule(n)) for n in self.collected.layers},
            embeddings={n: matrix.of(base) for n, matrix in self.collected.embeddings.items()},
            statistics={},
        )
        collected.observe(self.settings, self.progress)
        lost = [name for name in collected.layers if name not in collected.statistics]
        lost += [name for name, s in collected.embedding_statistics.items() if not s.uses]
        if lost:
            raise InputError(
                f"the model factorized in round {len(self.earlier) + 1} no longer calls {lost[0]} "
                f"({len(lost)} such layers) on the calibration data, where the round before did: "
                "experts are chosen otherwise now. Use rounds=1, or more calibration data."
            )
        following = analyse(
            collected,
            self.settings,
            progress=self.progress,
            release=True,
            block_orders={name: blocks.order for name, blocks in self.blocks.items()},
        )
        past = Round(
            candidate.ratio,
            candidate.predicted,
            candidate.change,
            step_report(self.step, self.settings),
        )
        return replace(following, earlier=[*self.earlier, past], start=plan)

    def compact(self, *, margin: float = DEFAULT_MARGIN, certified: bool = False) -> Result:
        """The smallest model within a margin; see ``rankfold.compact``."""
        check_margin(margin)
        stage = self
        seen: list[Candidate] = []
        for _ in range(CORRECTIONS if self.corrects else 0):
            seen.append(stage.measure(stage._plan_for(margin)))
            stage = stage.corrected(seen[-1])
        tried = stage._search(margin, float(self.total), seen)
        for _ in range(self.settings.rounds - 1):
            best = self._smallest_passing(tried, margin)
            if best is None:
                break  # fresh statistics make small models better, not large ones
            stage = best.stage.next_round(total_cost(best.plan), rounds_left=2)
            rest = self.total - self.factorizable
            tried += stage._search(margin, float(rest + total_cost(best.plan)), [])
        best = self._smallest_passing(tried, margin)
        if best is None:
            best = min(tried, key=lambda c: self._promising(c.change))
        if certified:
            return self._fixed_sequence(tried, margin)
        return best.stage._result("compact", best, margin, {}, tried)

    def _fixed_sequence(self, tried: list[Candidate], margin: float) -> Result:
        """Test sizes from mild to strong until the first that fails (Learn then Test).

        Order and statements are fixed here, before the held-out part is opened; each size is
        tested at the whole confidence, since a false "lossless" can only come from the first one
        that is not (Angelopoulos et al. 2021).
        """
        sizes = {c.ratio: c for c in tried if math.isfinite(c.change.mean)}
        order = [sizes[ratio] for ratio in sorted(sizes, reverse=True)] or tried[:1]
        statements = [c.stage._statement(c, margin) for c in order]
        certified: tuple[Candidate, Tested] | None = None
        results: list[Tested | None] = [None] * len(order)
        for place, (candidate, statement) in enumerate(zip(order, statements, strict=True)):
            tested = results[place] = candidate.stage._test(candidate, statement)
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
        return chosen.stage._result(
            "compact", chosen, margin, target, tried, tested=tested, order=record_of_order
        )

    def _smallest_passing(self, tried: Sequence[Candidate], margin: float) -> Candidate | None:
        passing = [c for c in tried if self._promising(c.change) <= margin]
        return min(passing, key=lambda c: total_cost(c.plan), default=None)

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
            raise InputError(
                f"the size is too small: even at rank 1 everywhere {least:.4f} of the model's "
                f"{self.settings.cost} is kept, of which {rest / self.total:.4f} lies outside the "
                "layers that can be factorized. Ask for a larger size."
            ) from error

    def in_form(self, form: Form) -> Preparation:
        """The same spectra with factors in another form, and what they cost in it."""
        collected, settings = self.collected, replace(self.settings, form=form)
        ranked = {
            name: replace(curve, costs=collected.rank_costs(name, form, settings.cost))
            for name, curve in self.ranked.items()
        }
        return replace(self, settings=settings, ranked=ranked)._with_all_forms()

    def _with_all_forms(self) -> Preparation:
        """The choices by rank, and beside them those of the other forms that a layer may take."""
        collected, settings = self.collected, self.settings
        curves = dict(self.ranked)
        if settings.form == "pivoted":
            curves |= {n: merged([self.ranked[n], other]) for n, other in self.block_curves.items()}
        several = [n for n, layer in collected.layers.items() if _has_conv_forms(layer, settings)]
        for name in self.progress.track(several, "conv forms", len(several)) if several else ():
            layer = cast("nn.Conv2d", collected.layers[name])
            other = conv_curve(
                layer,
                self._moved(name),
                collected.statistics[name],
                self.spectra[name],
                settings.dampings,
                settings.form,
                settings.cost,
                collected.seen.rows.get(name, 0),
                collected.seen.image_sizes.get(name, ()),
            )
            curves[name] = merged([self.ranked[name], other])
        return replace(self, curves=curves)

    def _moved(self, name: str) -> Tensor:
        if name in self.collected.embeddings:  # the step leaves them where they are
            return self.collected.embeddings[name].weight.detach()
        return _moved(self.step, name, self.collected.layers[name])

    def modules(self, name: str, choice: Choice) -> Mapping[str, nn.Module]:
        """The modules that a choice of a rank puts in the place of a layer, or of all uses."""
        if name not in self.collected.embeddings:
            return {name: self.module(name, choice)}
        if choice.rank is None:
            raise ValueError(f"the choice leaves {name} dense")
        matrix, form = self.collected.embeddings[name], self.settings.form
        return low_rank_uses(matrix, self.spectra[name], choice.rank, form)

    def module(self, name: str, choice: Choice) -> nn.Module:
        """The module that a choice of a rank puts in the layer's place."""
        layer, form = self.collected.layers[name], self.settings.form
        if choice.rank is None:
            raise ValueError(f"the choice leaves {name} dense")
        if choice.form is None or choice.form in FORMS:
            return low_rank_module(layer, truncate(self.spectra[name], choice.rank, form))
        if choice.form in BLOCK_FORMS:
            return self.blocks[name].module(layer, choice.ranks)
        conv = cast("nn.Conv2d", layer)
        factors = conv_factors(
            self._moved(name).view_as(conv.weight),
            *damped_grams(self.collected.statistics[name], self.settings.dampings),
            cast("ConvForm", choice.form),
            choice.ranks,
            pivot=form == "pivoted",
        )
        return factors.module(conv)

    def build(self, plan: RankPlan) -> nn.Module:
        """A copy of the model with this plan's layers, the dense ones moved by the step."""
        modules: dict[str, nn.Module] = {}
        weights: dict[str, Tensor] = {}
        for name, choice in plan.items():
            if choice.rank is not None:
                modules |= self.modules(name, choice)
            elif self.step and self.step.eta and name in self.collected.layers:
                weights[name] = self._moved(name)
        return with_replaced(self.collected.base, modules, weights)

    def weight(self, name: str, choice: Choice) -> Tensor:
        """What a choice makes of a layer's weight, ``(out, in)``, in the layer's dtype."""
        if choice.rank is None:
            return self._moved(name)
        if choice.form is None or choice.form in FORMS:
            # The product itself: choosing pivots for it would take six times as long.
            like = self.collected.matrices[name].weight
            return self.spectra[name].truncated(choice.rank).to(like.device, like.dtype)
        if choice.form in BLOCK_FORMS:
            like = self.collected.layers[name].weight
            return self.blocks[name].truncated(choice.ranks).to(like.device, like.dtype)
        dense = cast("MatrixLayer", cast("Any", self.module(name, choice)).to_dense())
        return weight_matrix(dense)

    def weights(self, plan: RankPlan) -> dict[str, Tensor]:
        """What a plan makes of all weights."""
        return {name: self.weight(name, choice) for name, choice in plan.items()}

    def look_at(self, plan: RankPlan) -> nn.Module:
        """A model that computes what a plan's model does, with one weight a layer.

        For Linear layers it is made without choosing pivots, which takes most of building. In half
        precision it is the plan's model itself: rounding factors is another error than rounding
        their product.
        """
        matrices = self.collected.matrices.values()
        if any(torch.finfo(matrix.weight.dtype).bits < 32 for matrix in matrices):
            return self.build(plan)
        return with_replaced(self.collected.base, {}, self.weights(plan), share=True)

    def control(self) -> nn.Module | None:
        """The dense model moved by the same steps, None where no step was taken."""
        dense = self.collected.dense
        if self.step and self.step.eta:
            layers = {n: cast("MatrixLayer", dense.get_submodule(n)) for n in self.collected.layers}
            moved = {name: self.step.moved(name, layer) for name, layer in layers.items()}
            return with_replaced(dense, {}, moved)
        return None if dense is self.collected.model else dense

    def harmless_range(self, name: str) -> HarmlessRange:
        """The perturbations of one layer, changed alone, that do no harm.

        Raises:
            ValueError: There is no gradient step, whose estimate is the range's centre.
        """
        if self.step is None:
            raise ValueError("the harmless range needs the joint objective's gradient step")
        return self.step.directions.harmless(name, self.spectra[name].singular_values)

    def predicted(self, plan: RankPlan) -> float | None:
        """Predicted change of the loss: the step's measured gain and the truncation's cost."""
        return self.gain + total_change(plan) if self.objective.predicts_loss else None

    def kept(self, plan: RankPlan) -> float:
        """Share kept of the whole model, in the unit of the cost."""
        return (self.total - self.factorizable + total_cost(plan)) / self.total

    def measure(self, plan: RankPlan) -> Candidate:
        """Measure the change of a plan's model on selection data."""
        share = self.kept(plan)
        evaluation = evaluate(
            self.look_at(plan),
            self.collected.task,
            self.collected.parts["selection"],
            batch_size=self.settings.batch_size,
            progress=self.progress,
            stage=f"size {share:.3f} on selection data",
            finite=False,
        )
        original = self.collected.original_losses(
            "selection", self.settings.batch_size, self.progress
        )
        change = paired_change(original, evaluation)
        differences = evaluation.losses - original.losses
        return Candidate(self, plan, share, self.predicted(plan), change, differences)

    def _budget(self, size: float, size_of: SizeOf) -> float:
        check_choice("size_of", size_of, get_args(SizeOf))
        if size_of == "factorizable":
            return size * self.factorizable
        return size * self.total - (self.total - self.factorizable)

    def _promising(self, change: Change) -> float:
        """The held-out upper bound that a model of this measured change would get.

        One-sided bound at the certificate's confidence for the held-out part's number of
        examples, and room for the selection examples' own luck so that the certificate holds with
        a chance of ``POWER``. Infinite for a model whose loss is not finite.
        """
        if not math.isfinite(change.mean):
            return math.inf
        settings, held_out = self.settings, self._held_out_units()
        deviation = change.deviation
        reach = settings.largest_change
        if reach is not None:
            reach = max(0.0, reach - change.mean)
        bound = half_width(deviation, held_out, settings.confidence, settings.test, reach)
        quantile = float(stats.t.ppf(POWER, change.examples - 1))
        luck = quantile * deviation * math.sqrt(1 / held_out + 1 / change.examples)
        return change.mean + bound + luck

    def _held_out_units(self) -> int:
        """Independent held-out units: examples, or the groups that they form."""
        part = self.collected.parts["held_out"]
        return len(part.examples) if part.groups is None else len(set(part.groups))

    def _search(self, margin: float, passes: float, seen: list[Candidate]) -> list[Candidate]:
        """Try plans on selection data, between the smallest that passes and the largest that fails.

        Each trial corrects the prediction by the ratio of actual to predicted change; where
        nothing is predicted the bracket is halved. ``passes`` is a cost of the whole model that is
        known to pass, ``seen`` are plans measured already; they count among those tried.
        """
        rest = self.total - self.factorizable
        fails = rest + smallest_cost(self.curves) - 1.0
        tried = list(seen)
        for candidate in seen:
            spent = rest + total_cost(candidate.plan)
            if self._promising(candidate.change) <= margin:
                passes = min(passes, spent)
            else:
                fails = max(fails, spent)
        target = rest + self._cost_for(margin - self.gain, default=0.9 * self.factorizable)
        while len(tried) < MOST_PLANS and passes - fails > CLOSE_ENOUGH * self.total:
            edge = 0.1 * (passes - fails)
            if math.isnan(target):
                target = (fails + passes) / 2
            target = min(max(target, fails + edge), passes - edge)
            try:
                plan = self.plan(target - rest, smallest=True)
            except InputError:  # the first-order rule does not reach every size
                fails, target = target, math.nan
                continue
            candidate = self.measure(plan)
            if tried and candidate.plan == tried[-1].plan:
                break
            tried.append(candidate)
            reached = self._promising(candidate.change)
            spent = rest + total_cost(plan)
            if reached <= margin:
                passes = min(passes, spent)
            else:
                fails = max(fails, target)
            excess, predicted = reached - self.gain, total_change(plan)
            target = math.nan
            if excess > 0 and predicted > 0 and math.isfinite(excess):
                tolerance = (margin - self.gain) * predicted / excess
                target = rest + self._cost_for(tolerance, default=math.nan)
        if not tried:
            raise InputError(
                f"the objective {self.settings.objective} has no plan at any size that was tried; "
                "use another objective."
            )
        return tried

    def _plan_for(self, margin: float) -> RankPlan:
        """The smallest plan predicted to be within a margin."""
        plan = plan_for_change(self.objective, self.curves, margin - self.gain)
        return self.plan(0.9 * self.factorizable) if plan is None else plan

    def _cost_for(self, tolerance: float, default: float) -> float:
        plan = plan_for_change(self.objective, self.curves, tolerance)
        return default if plan is None else float(total_cost(plan))

    @property
    def corrects(self) -> bool:
        """Whether plans are made again with measured interactions."""
        return self.settings.interactions and self.objective.allocation == "multiplier"

    def corrected(self, measured: Candidate) -> Preparation:
        """The curves with what a plan of theirs showed of each layer's share in the real change.

        Each layer's predictions are brought towards its measured share (``interactions``), and
        all of them to the change that the plan had on selection data, where it had one. A plan
        whose loss is not finite shows nothing: then the curves stay.
        """
        if not math.isfinite(measured.change.mean):
            return self
        collected = self.collected
        before, after = (
            with_replaced(collected.base, {}, weights, share=True)
            for weights in (
                {name: self._moved(name) for name in collected.matrices},
                self.weights(measured.plan),
            )
        )
        calibration = collected.parts["calibration"]
        most = SHARE_EXAMPLES.get(collected.task.name, OTHER_SHARE_EXAMPLES)
        few = max(1, min(most, round(SHARE_OF_CALIBRATION * len(calibration.examples))))
        shares = measured_shares(
            before,
            after,
            collected.task,
            as_part("calibration", calibration.examples[:few], calibration.collate),
            list(collected.matrices),
            batch_size=self.settings.batch_size,
            progress=self.progress,
        )
        predicted = {name: choice.change for name, choice in measured.plan.items()}
        factors = corrections(shares, predicted)
        known = self.factors or dict.fromkeys(factors, 1.0)
        foreseen = math.fsum(factors[name] * change for name, change in predicted.items())
        harm = measured.change.mean - self.gain
        level = harm / foreseen if harm > 0 and foreseen > 0 else 1.0
        level = min(LARGEST_CORRECTION, max(1 / LARGEST_CORRECTION, level))

        def rescaled(curves: Mapping[str, Curve]) -> dict[str, Curve]:
            return {
                name: replace(curve, changes=curve.changes * (level * factors[name]))
                for name, curve in curves.items()
            }

        return replace(
            self,
            ranked=rescaled(self.ranked),
            curves=rescaled(self.curves),
            factors={name: known[name] * factor for name, factor in factors.items()},
        )

    def held_out(self, model: nn.Module, stage: str) -> Evaluation:
        """Losses of a model on the held-out examples."""
        return evaluate(
            model,
            self.collected.task,
            self.collected.parts["held_out"],
            batch_size=self.settings.batch_size,
            progress=self.progress,
            stage=stage,
        )

    def original_held_out(self) -> Evaluation:
        """Losses of the original model on the held-out examples."""
        return self.collected.original_losses("held_out", self.settings.batch_size, self.progress)

    def control_held_out(self) -> Evaluation | None:
        """Losses of the control on the held-out examples, None where there is no step."""
        if not self._control:
            moved = self.control()
            if moved is not None:
                self._control.append(self.held_out(moved, "control on held-out data"))
        return self._control[0] if self._control else None

    @property
    def original_sizes(self) -> dict[str, int]:
        """Parameters, those of the layers that can be factorized, bytes, FLOPs of one example."""
        matrices = self.collected.matrices.values()
        return {
            **model_sizes(self.collected.unpacked.given),
            "factorizable_parameters": sum(matrix.weight.numel() for matrix in matrices),
            "flops": sum(self.collected.seen.flops.values()),
        }

    def _statement(self, candidate: Candidate, margin: float) -> Statement:
        """What will be claimed of a candidate, from its selection data alone."""
        settings = self.settings
        margins = {m.name: m.margin for m in self.collected.metrics if m.margin is not None}
        if settings.accuracy_margin is not None:
            margins[ACCURACY] = settings.accuracy_margin
        return state(
            candidate.change,
            candidate.differences,
            self._held_out_units(),
            margin=margin,
            confidence=settings.confidence,
            test=settings.test,
            largest_change=settings.largest_change,
            metric_margins=margins,
        )

    def _test(self, candidate: Candidate, statement: Statement) -> Tested:
        """Open the held-out part for a candidate."""
        model = self.build(candidate.plan)
        collected, part = self.collected, self.collected.parts["held_out"]
        original = self.original_held_out()
        factorized = self._evaluate_until_shown(model, original, statement)
        seen = len(factorized.losses)
        values: dict[str, tuple[Tensor, Tensor]] = {}
        for metric in collected.metrics:
            before = collected.original_metrics.get(metric.name)
            if before is None:
                before = self._metric(metric, collected.unpacked.given)
                collected.original_metrics[metric.name] = before
            values[metric.name] = (before, self._metric(metric, model))
        examples, answers = example_digests(part, seen)
        groups = None if part.groups is None else part.groups[:seen]
        evidence = Evidence(examples, answers, original.first(seen), factorized, groups, values)
        digest = part.take(range(seen)).digest
        certificate = evidence.certificate(statement, collected.task.unit, digest)
        return Tested(model, statement, evidence, certificate, model_digest(model))

    def _metric(self, metric: Metric, model: nn.Module) -> Tensor:
        return metric_values(
            metric,
            model,
            self.collected.parts["held_out"],
            batch_size=self.settings.batch_size,
            progress=self.progress,
        )

    def _evaluate_until_shown(
        self, model: nn.Module, original: Evaluation, statement: Statement
    ) -> Evaluation:
        """Losses on the held-out part; the betting test stops once "lossless" is shown."""
        stage = "factorized on held-out data"
        if statement.test != "betting" or statement.metric_margins:
            return self.held_out(model, stage)
        part = self.collected.parts["held_out"]
        count = len(part.examples)
        chunk = max(FEWEST, math.ceil(count / LOOKS))
        found: list[Evaluation] = []
        for end in range(chunk, count + chunk, chunk):
            piece = part.take(range(end - chunk, min(end, count)))
            found.append(
                evaluate(
                    model,
                    self.collected.task,
                    piece,
                    batch_size=self.settings.batch_size,
                    progress=self.progress,
                    stage=stage,
                )
            )
            together = joined(found)
            seen = original.first(len(together.losses))
            if examples_seen(together.losses - seen.losses, seen.terms, statement) is not None:
                break
        return together

    def _result(
        self,
        algorithm: str,
        chosen: Candidate,
        margin: float,
        target: dict[str, Any],
        tried: list[Candidate],
        tested: Tested | None = None,
        order: Sequence[Mapping[str, Any]] = (),
    ) -> Result:
        """Open the held-out part for the chosen model, the original and the control."""
        if tested is None:
            tested = self._test(chosen, self._statement(chosen, margin))
        self.control_held_out()
        certificate = tested.certificate
        opening = Opening(
            original=model_digest(self.collected.unpacked.given),
            models=tuple(entry["model"] for entry in order if entry["model"]) or (tested.digest,),
            examples=tuple(digest[:SHORT] for digest in tested.evidence.examples),
            verdict=certificate.verdict,
            seed=self.settings.seed,
        )
        past = history(opening, self.collected.openings)
        self.collected.openings.append(opening)
        record(opening)
        report = self._report(
            algorithm, chosen, tested.model, certificate, target, tried, tested.evidence
        )
        parts = self.collected.parts
        others = [part for name, part in parts.items() if name in PARTS[:2]]
        document = make_document(
            certificate,
            tested.statement,
            tested.evidence,
            private=self.settings.private,
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

    def _report(
        self,
        algorithm: str,
        chosen: Candidate,
        model: nn.Module,
        certificate: Certificate,
        target: dict[str, Any],
        tried: list[Candidate],
        evidence: Evidence,
    ) -> dict[str, Any]:
        before, after = self.original_sizes, model_sizes(model)
        layers = [self._layer_report(name, choice) for name, choice in chosen.plan.items()]
        after["factorizable_parameters"] = sum(entry["factorized_parameters"] for entry in layers)
        saved = sum(entry["flops"] - entry["factorized_flops"] for entry in layers)
        after["flops"] = before["flops"] - saved
        original, factorized = evidence.original, evidence.factorized
        control = self._control[0].first(len(original.losses)) if self._control else None
        collected = self.collected
        return {
            "algorithm": algorithm,
            "target": {**target, "margin": certificate.margin},
            "task": collected.task.name,
            "agreement": collected.task.agreement,
            "settings": settings_report(self.settings),
            "original": before,
            "factorized": after,
            "ratio": after["parameters"] / before["parameters"],
            "loss": loss_report(original, factorized, control, certificate, chosen.predicted),
            "accuracy": {"original": original.accuracy, "factorized": factorized.accuracy},
            "certificate": certificate.as_dict(),
            "allocation": self._allocation_report(chosen.plan),
            "damping": damping_report(collected, self.settings),
            "curvature": collected.curvature,
            "calibration_loss": collected.calibration_loss,
            "step": step_report(self.step, self.settings),
            "rounds": [past.as_dict() for past in self.earlier],
            "selection": [
                {
                    "ratio": c.ratio,
                    "predicted_change": c.predicted,
                    "change": finite(c.change.mean),
                    "standard_error": finite(c.change.standard_error),
                }
                for c in tried
            ],
            "data": {
                name: {"examples": len(part.examples), "digest": part.digest}
                for name, part in collected.parts.items()
            },
            "layers": layers,
            "unpacked": self.collected.unpacked.names,
            "not_factorized": [asdict(entry) for entry in collected.skipped],
        }

    def _allocation_report(self, plan: RankPlan) -> dict[str, float] | None:
        """How far the plan may be from the best one of its cost, by the curves it was made with."""
        if self.objective.allocation != "multiplier":
            return None
        best = best_within_cost(self.curves, total_cost(plan))
        predicted = total_change(plan)
        return {"predicted_cost": predicted, "gap": max(0.0, predicted - best.bound)}

    def _layer_report(self, name: str, choice: Choice) -> dict[str, Any]:
        predicts = self.objective.predicts_loss
        ranged = self.step is not None and name in self.collected.layers
        return {
            **layer_report(self.collected, self.settings.form, name, choice),
            "predicted_change": choice.change if predicts else None,
            "predicted_by_rank": predicted_by_rank(self.ranked[name]) if predicts else None,
            "interaction_factor": None if self.factors is None else self.factors[name],
            "harmless_range": asdict(self.harmless_range(name)) if ranged else None,
        }


@dataclass(frozen=True)
class Candidate:
    """A plan and what selection data say of it.

    Attributes:
        stage: The round that it belongs to.
        plan: The ranks.
        ratio: Share kept of the whole model, in the unit of the cost.
        predicted: Predicted change of the loss, or None.
        change: Measured change on selection data.
        differences: ``(n,)`` changes of the selection examples.
    """

    stage: Preparation
    plan: RankPlan
    ratio: float
    predicted: float | None
    change: Change
    differences: Tensor

    @property
    def as_predicted(self) -> bool:
        """Whether the measured change is not above the predicted one by more than is trusted."""
        if self.predicted is None:
            return True
        harm = self.change.mean - self.stage.gain
        foreseen = self.predicted - self.stage.gain
        return harm <= TRUSTED * foreseen + 2 * self.change.standard_error


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


@dataclass(frozen=True)
class Round:
    """What one round made of the model before the statistics were collected again.

    Attributes:
        ratio: Share kept of the whole model, in the unit of the cost.
        predicted: Predicted change of the loss, or None.
        change: Measured change on selection data, against the user's model.
        step: The round's gradient step as in the report, or None.
    """

    ratio: float
    predicted: float | None
    change: Change
    step: dict[str, Any] | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "ratio": self.ratio,
            "predicted_change": self.predicted,
            "change": finite(self.change.mean),
            "standard_error": finite(self.change.standard_error),
            "step": self.step,
        }


def lowest(tried: Sequence[Candidate]) -> Candidate:
    """The candidate with the lowest measured loss."""
    return min(tried, key=lambda c: c.change.mean if math.isfinite(c.change.mean) else math.inf)
