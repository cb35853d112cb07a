"""A model that is ready to be factorized: its step, its spectra, and the plans made from them.

A stage has what does not depend on the size. There is one a round: the next one stands on the
model that a plan of the last one made.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias, TypeVar, cast, get_args

import torch
from torch import Tensor, nn

from rankfold.allocate import (
    Choice,
    Curve,
    RankPlan,
    merged,
    smallest_cost,
    total_change,
    total_cost,
)
from rankfold.block_forms import BlockFactors, Cut, block_factors, block_form
from rankfold.block_modules import BLOCK_FORMS
from rankfold.certify import Change, paired_change
from rankfold.collected import Collected
from rankfold.conv_forms import SpatialFactors, TuckerFactors, conv_factors
from rankfold.conv_modules import ConvForm
from rankfold.curvature import damped_grams
from rankfold.data import Part
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
from rankfold.layer_matrix import MatrixLayer, kept_dtype, weight_matrix
from rankfold.linalg import Damping
from rankfold.memory_layout import lay_out
from rankfold.modules import FORMS, Form
from rankfold.objectives import (
    OBJECTIVES,
    Objective,
    block_curve,
    conv_curve,
    embedding_curve,
    embedding_spectrum,
    layer_curve,
    layer_spectrum,
    plan_for_budget,
    plan_for_change,
)
from rankfold.progress import Progress, SilentProgress
from rankfold.refit import fitted_again
from rankfold.replace import put_modules, with_replaced
from rankfold.report import finite, model_sizes, step_report
from rankfold.settings import Settings, SizeOf, check_choice
from rankfold.sizes import model_parameters
from rankfold.spectrum import HarmlessRange, Spectrum
from rankfold.step import Step, search_step, step_directions
from rankfold.tasks import Evaluation, evaluate

TRUSTED = 1.5  # measured / predicted cost of truncation up to which a round goes its whole way
MOST_RETREATS = 3
# What damping="auto" tries, of A and B, and at which share of the factorizable layers.
DAMPINGS = (Damping(0.1, 0.1), Damping(0.01, 0.3), Damping(0.1, 1.0), Damping(0.5, 0.5))
DAMPING_SIZE = 0.8

StageT = TypeVar("StageT", bound="Stage")
Factors: TypeAlias = BlockFactors | SpatialFactors | TuckerFactors


@dataclass
class Stage:
    """A model that is ready to be factorized at any size.

    Attributes:
        collected: Model, data, statistics.
        settings: The settings.
        step: The gradient step, for the joint objective.
        progress: Shows the stages.
        offset: Measured change on selection data of ``collected.base``, 0 in the first round.
        spectra: By layer.
        ranked: The choices of each layer by its rank in the settings' form.
        curves: All choices of each layer, in the unit of ``settings.cost``.
        cuts: How the layers that have block forms are cut.
        block_curves: The choices in these forms.
        earlier: The rounds before this one.
        start: The plan that made ``collected.base``, None in the first round.
        factors: By layer, what measured interactions made of its predictions; None before that.
        level: What brought the predictions of all layers, beside the factors, to measured changes.
    """

    collected: Collected
    settings: Settings
    step: Step | None
    progress: Progress
    offset: float = 0.0
    spectra: dict[str, Spectrum] = field(default_factory=dict)
    ranked: dict[str, Curve] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    cuts: dict[str, Cut] = field(default_factory=dict)
    block_curves: dict[str, Curve] = field(default_factory=dict)
    earlier: list[Round] = field(default_factory=list)
    start: RankPlan | None = None
    factors: dict[str, float] | None = None
    level: float = 1.0
    # A list, so that copies with other curves or another form share what was evaluated once.
    _control: list[Evaluation] = field(default_factory=list)
    # By layer, the last factors of a block or conv form, and the choice that they were asked for: a
    # plan is measured, then corrected on or built, and plans of one size have much in common.
    _factors: dict[str, tuple[object, Factors]] = field(default_factory=dict)

    @classmethod
    def of(
        cls: type[StageT],
        collected: Collected,
        settings: Settings,
        *,
        progress: Progress | None = None,
        release: bool = False,
        block_orders: Mapping[str, Tensor] | None = None,
    ) -> StageT:
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
        original = start = collected.original_losses("selection", settings.batch_size, progress)
        if collected.base is not collected.model:
            start = evaluate(
                collected.base,
                collected.task,
                collected.parts["selection"],
                batch_size=settings.batch_size,
                progress=progress,
                stage="start of the round on selection data",
            )
        step = _searched_step(collected, settings, start, progress, release)
        stage = cls(collected, settings, step, progress, paired_change(original, start).mean)
        stage._decompose_layers(release, block_orders or {})
        stage._decompose_embeddings(release)
        return stage._with_all_forms()

    def _decompose_layers(self, release: bool, block_orders: Mapping[str, Tensor]) -> None:
        collected, settings = self.collected, self.settings
        layers = collected.layers
        for name, layer in self.progress.track(layers.items(), "spectra", len(layers)):
            statistics = collected.statistics.get(name)
            weight, price = self._moved(name), collected.cost_per_parameter(name, settings.cost)
            spectrum = layer_spectrum(self.objective, weight, statistics, settings.dampings)
            self.spectra[name] = spectrum.kept(partial(self._keep, weight))
            self.ranked[name] = layer_curve(
                self.objective, layer, spectrum, statistics, settings.form, price
            )
            cut = block_form(layer) if _has_forms(settings, settings.block_forms) else None
            if cut is not None and statistics is not None:
                self.block_curves[name], found = block_curve(
                    weight, statistics, cut, settings.dampings, block_orders.get(name), price
                )
                directions = self._keep(weight, found.directions)
                self.cuts[name] = replace(found, directions=directions)
            if release and name not in self.block_curves and not _has_conv_forms(layer, settings):
                collected.statistics.pop(name, None)

    def _decompose_embeddings(self, release: bool) -> None:
        collected, settings = self.collected, self.settings
        for name, matrix in collected.embeddings.items():
            uses = collected.embedding_statistics[name]
            spectrum = embedding_spectrum(matrix.weight, uses, settings.dampings)
            self.spectra[name] = spectrum.kept(partial(self._keep, matrix.weight))
            self.ranked[name] = embedding_curve(
                spectrum,
                uses,
                collected.rank_costs(name, settings.form, settings.cost),
                collected.dense_cost(name, settings.cost),
            )
            if release:
                collected.embedding_statistics.pop(name)

    def _keep(self, weight: Tensor, factor: Tensor) -> Tensor:
        """A factor of a weight, as those of all layers are kept."""
        return self.collected.offload.kept(factor.to(kept_dtype(weight)))

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

    def in_form(self: StageT, form: Form) -> StageT:
        """The same spectra with factors in another form, and what they cost in it."""
        collected, settings = self.collected, replace(self.settings, form=form)
        ranked = {
            name: replace(curve, costs=collected.rank_costs(name, form, settings.cost))
            for name, curve in self.ranked.items()
        }
        return replace(self, settings=settings, ranked=ranked)._with_all_forms()

    def _with_all_forms(self: StageT) -> StageT:
        """The choices by rank, and beside them those of the other forms that a layer may take."""
        collected, settings = self.collected, self.settings
        curves = dict(self.ranked)
        if settings.form == "pivoted":
            curves |= {n: self._merged(n, other) for n, other in self.block_curves.items()}
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
            curves[name] = self._merged(name, other)
        return replace(self, curves=curves)

    def _merged(self, name: str, other: Curve) -> Curve:
        """A layer's choices by rank and those of another form, as predicted before corrections."""
        corrected = replace(other, changes=other.changes * self._scale(name))
        return merged([self.ranked[name], corrected])

    def _moved(self, name: str) -> Tensor:
        """The layer's weight after the step, if there is one, ``(out, in)``."""
        if name in self.collected.embeddings:  # the step leaves them where they are
            return self.collected.embeddings[name].weight.detach()
        layer = self.collected.layers[name]
        return self.step.moved(name, layer) if self.step else weight_matrix(layer)

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
        return self._factors_of(name, choice).module(cast("nn.Conv2d", layer))

    def _factors_of(self, name: str, choice: Choice) -> Factors:
        """The factors of a choice of a block or conv form."""
        asked = (self.settings.form, choice.form, choice.ranks)
        known = self._factors.get(name)
        if known is None or known[0] != asked:
            known = self._factors[name] = asked, self._find_factors(name, choice)
        return known[1]

    def _find_factors(self, name: str, choice: Choice) -> Factors:
        weight = self._moved(name)
        grams = damped_grams(self.collected.statistics[name], self.settings.dampings)
        if choice.form in BLOCK_FORMS:
            blocks = block_factors(weight, *grams, self.cuts[name], choice.ranks)
            return blocks.kept(partial(self._keep, weight))
        return conv_factors(
            weight.view_as(self.collected.layers[name].weight),
            *grams,
            cast("ConvForm", choice.form),
            choice.ranks,
            pivot=self.settings.form == "pivoted",
        )

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
            like, blocks = self.collected.layers[name].weight, self._factors_of(name, choice)
            return cast("BlockFactors", blocks).weight().to(like.device, like.dtype)
        dense = cast("MatrixLayer", cast("Any", self.module(name, choice)).to_dense())
        return weight_matrix(dense)

    def weights(self, plan: RankPlan) -> Iterator[tuple[str, Tensor]]:
        """What a plan makes of all weights, one after the other."""
        for name, choice in plan.items():
            yield name, self.weight(name, choice)

    def look_at(self, plan: RankPlan) -> nn.Module:
        """A model that computes what a plan's model does, with one weight a layer.

        For Linear layers it is made without choosing pivots, which takes most of building. In half
        precision it is the plan's model itself: rounding factors is another error than rounding
        their product.
        """
        matrices = self.collected.matrices.values()
        if any(torch.finfo(matrix.weight.dtype).bits < 32 for matrix in matrices):
            return self.build(plan)
        # Shown: the halves of block forms take a second a layer of SmolLM2, once for each plan.
        choices = self.progress.track(plan.items(), "weights of the plan", len(plan))
        weights = ((name, self.weight(name, choice)) for name, choice in choices)
        return self._with_weights(self.collected.base, weights)

    def _with_weights(self, model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> nn.Module:
        """A copy of a model with these weights of layers, for passes alone."""
        keep = self.collected.offload.kept
        kept = {name: keep(weight) for name, weight in weights}
        return with_replaced(model, {}, kept, share=True)

    def control(self) -> nn.Module | None:
        """The dense model moved by the same steps, None where no step was taken."""
        dense = self.collected.dense
        if self.step and self.step.eta:
            layers = {n: cast("MatrixLayer", dense.get_submodule(n)) for n in self.collected.layers}
            moved = ((name, self.step.moved(name, layer)) for name, layer in layers.items())
            return self._with_weights(dense, moved)
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

    def foresees(self, candidate: Candidate) -> float | None:
        """Predicted change of a candidate of the same round, by the curves of this stage.

        Those that made its plan may have been corrected since, by what it or another plan showed.
        """
        if candidate.predicted is None:
            return None
        costs = [
            choice.change * self._scale(name) / candidate.stage._scale(name)
            for name, choice in candidate.plan.items()
        ]
        return self.gain + math.fsum(costs) + (candidate.refit.gain if candidate.refit else 0.0)

    def _scale(self, name: str) -> float:
        """What a layer's curves were multiplied by since they were made."""
        return self.level * (self.factors[name] if self.factors else 1.0)

    def kept(self, plan: RankPlan) -> float:
        """Share kept of the whole model, in the unit of the cost."""
        return (self.total - self.factorizable + total_cost(plan)) / self.total

    def measure(self, plan: RankPlan) -> Candidate:
        """Measure the change of a plan's model on selection data."""
        share = self.kept(plan)
        evaluation = self._on_selection(self.look_at(plan), f"size {share:.3f} on selection data")
        change = paired_change(self.original_selection(), evaluation)
        return Candidate(self, plan, share, self.predicted(plan), change, evaluation)

    @property
    def refits(self) -> bool:
        """Whether output factors are fitted once more to what other layers have changed."""
        return self.settings.refit and self.objective.allocation == "multiplier"

    def refitted(self, candidate: Candidate) -> Candidate:
        """A candidate of this round with its output factors fitted again, measured.

        The candidate itself where it has no layer that can be.
        """
        collected, model = self.collected, self.build(candidate.plan)
        fitted = fitted_again(
            self.control() or collected.dense,
            model,
            [name for name, choice in candidate.plan.items() if choice.rank is not None],
            collected.task,
            collected.parts["calibration"],
            batch_size=self.settings.batch_size,
            progress=self.progress,
        )
        if not fitted.modules:
            return candidate
        put_modules(model, fitted.modules)
        shown = f"size {candidate.ratio:.3f}, refit, on selection data"
        evaluation = self._on_selection(model, shown)
        change = paired_change(self.original_selection(), evaluation)
        gain = change.mean - candidate.change.mean
        refit = Refit(fitted.modules, fitted.residual, fitted.examples, gain)
        predicted = None if candidate.predicted is None else candidate.predicted + refit.gain
        return replace(
            candidate, predicted=predicted, change=change, evaluation=evaluation, refit=refit
        )

    def _on_selection(self, model: nn.Module, stage: str) -> Evaluation:
        """Losses of a trial on the selection examples; they need not be finite."""
        return evaluate(
            model,
            self.collected.task,
            self.collected.parts["selection"],
            batch_size=self.settings.batch_size,
            progress=self.progress,
            stage=stage,
            finite=False,
        )

    @property
    def corrects(self) -> bool:
        """Whether plans are made again with measured interactions."""
        return self.settings.interactions and self.objective.allocation == "multiplier"

    def corrected(self: StageT, measured: Candidate) -> StageT:
        """The curves with what a plan of theirs showed of each layer's share in the real change.

        Each layer's predictions are brought towards its measured share (``interactions``), and
        all of them to the change that the plan had on selection data, where it had one. A plan
        whose loss is not finite shows nothing: then the curves stay.
        """
        if not math.isfinite(measured.change.mean):
            return self
        collected = self.collected
        before, after = (
            self._with_weights(collected.base, weights)
            for weights in (
                ((name, self._moved(name)) for name in collected.matrices),
                self.weights(measured.plan),
            )
        )
        shares = measured_shares(
            before,
            after,
            collected.task,
            self._share_examples(),
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
            level=self.level * level,
        )

    def _share_examples(self) -> Part:
        """The examples that each layer's share is measured on, so many of either part.

        Of selection data where there are as many: the Grams have seen the calibration examples, and
        what is cut because these don't use it shows no change on them.
        """
        calibration, selection = (self.collected.parts[p] for p in ("calibration", "selection"))
        most = SHARE_EXAMPLES.get(self.collected.task.name, OTHER_SHARE_EXAMPLES)
        few = max(1, min(most, round(SHARE_OF_CALIBRATION * len(calibration.examples))))
        part = selection if len(selection.examples) >= few else calibration
        return part.spread(few)

    def next_round(self: StageT, budget: float, rounds_left: int) -> StageT:
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
        base = with_replaced(self.collected.base, {}, dict(self.weights(plan)))
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
        following = self.of(
            collected,
            self.settings,
            progress=self.progress,
            release=True,
            block_orders={name: cut.order for name, cut in self.cuts.items()},
        )
        past = Round(
            candidate.ratio,
            candidate.predicted,
            candidate.change,
            step_report(self.step, self.settings),
        )
        return replace(following, earlier=[*self.earlier, past], start=plan)

    def original_selection(self) -> Evaluation:
        """Losses of the original model on the selection examples."""
        return self.collected.original_losses("selection", self.settings.batch_size, self.progress)

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

    @property
    def held_out_units(self) -> int:
        """Independent held-out units: examples, or the groups that they form."""
        part = self.collected.parts["held_out"]
        return len(part.examples) if part.groups is None else len(set(part.groups))


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
class Candidate:
    """A plan and what selection data say of it.

    Attributes:
        stage: The round that it belongs to.
        plan: The ranks.
        ratio: Share kept of the whole model, in the unit of the cost.
        predicted: Predicted change of the loss, or None.
        change: Measured change on selection data.
        evaluation: Its losses on the selection examples.
        refit: The layers that were fitted again, None where none was.
    """

    stage: Stage
    plan: RankPlan
    ratio: float
    predicted: float | None
    change: Change
    evaluation: Evaluation
    refit: Refit | None = None

    def build(self) -> nn.Module:
        """The model."""
        model = self.stage.build(self.plan)
        if self.refit is not None:
            put_modules(model, copy.deepcopy(dict(self.refit.modules)))
        lay_out(model)  # as it will be once it was saved and loaded
        return model

    @property
    def differences(self) -> Tensor:
        """``(n,)`` changes of the selection examples' losses."""
        return self.evaluation.losses - self.stage.original_selection().losses

    @property
    def as_predicted(self) -> bool:
        """Whether the measured change is not above the predicted one by more than is trusted."""
        if self.predicted is None:
            return True
        harm = self.change.mean - self.stage.gain
        foreseen = self.predicted - self.stage.gain
        return harm <= TRUSTED * foreseen + 2 * self.change.standard_error


def last_prediction(chosen: Candidate, tried: Sequence[Candidate]) -> float | None:
    """Predicted change of the chosen plan, by what was last measured in its round.

    The first plan may be the best on selection data, and be predicted before anything was measured.
    """
    collected = chosen.stage.collected
    # What is fitted again comes last and has the stage of its plan, which may be an early one.
    measured = [c for c in tried if c.refit is None and c.stage.collected is collected]
    return (measured[-1] if measured else chosen).stage.foresees(chosen)


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


def choose_damping(
    collected: Collected, settings: Settings, *, progress: Progress | None = None
) -> Settings:
    """The settings with those of ``DAMPINGS`` that lose least on selection data.

    Each is tried without the gradient step at ``DAMPING_SIZE`` of the factorizable layers; what
    each gave is kept in ``collected.damping_trials``. An objective without Grams has nothing to
    try and takes the first.

    Raises:
        InputError: As ``Stage.of``.
    """
    if not OBJECTIVES[settings.objective].needs_data:
        return replace(settings, damping=DAMPINGS[0].input)
    for damping in DAMPINGS:
        trial = replace(
            settings, damping=damping.input, output_damping=damping.output, gradient_step=False
        )
        stage = Stage.of(collected, trial, progress=progress)
        candidate = stage.measure(stage.plan(DAMPING_SIZE * stage.factorizable))
        collected.damping_trials.append((damping, candidate.change.mean))
    known = [(d, change) for d, change in collected.damping_trials if math.isfinite(change)]
    best = min(known, key=lambda trial: trial[1])[0] if known else DAMPINGS[0]
    return replace(settings, damping=best.input, output_damping=best.output)


def _searched_step(
    collected: Collected,
    settings: Settings,
    start: Evaluation,
    progress: Progress,
    release: bool,
) -> Step | None:
    """The gradient step and its length on selection data, None where none is taken."""
    if not collected.takes_step(settings):
        return None
    directions = step_directions(
        collected.layers,
        collected.statistics,
        settings.dampings,
        progress,
        estimator=settings.step_estimator,
        release=release,
        offload=collected.offload,
    )
    return search_step(
        collected.base,
        collected.task,
        collected.parts["selection"],
        start,
        collected.layers,
        directions,
        batch_size=settings.batch_size,
        progress=progress,
        groups=settings.step_groups,
    )


def _has_conv_forms(layer: nn.Module, settings: Settings) -> bool:
    """Whether a layer may also take the forms of ``conv_modules``."""
    several = isinstance(layer, nn.Conv2d) and layer.weight[0, 0].numel() > 1
    return several and _has_forms(settings, settings.conv_forms)


def _has_forms(settings: Settings, wanted: bool) -> bool:
    """Whether layers may take other forms than one product of factors."""
    return wanted and OBJECTIVES[settings.objective].allocation == "multiplier"
