"""The held-out part, sealed: it is opened here alone, for plans that are chosen, and recorded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from rankfold.certificate.asked import ACCURACY, check_margin, check_metric_margin
from rankfold.certificate.certify import Certificate, examples_seen
from rankfold.certificate.document import Evidence, example_digests
from rankfold.certificate.earlier_uses import History, record
from rankfold.certificate.in_words import sure
from rankfold.certificate.opened import Opened, Tested, most_changed
from rankfold.certificate.openings_file import SHORT, Opening
from rankfold.certificate.statement import Statement, fewest_units, state
from rankfold.data.copies import look_alikes
from rankfold.data.given import up_to
from rankfold.data.parts import FEWEST, PARTS, USUAL_LIMITS, Data, Part
from rankfold.errors import InputError
from rankfold.files.digests import json_digest, model_digest
from rankfold.machine import processes
from rankfold.machine.progress import Progress
from rankfold.others.samples import Samples
from rankfold.others.source import LossSource
from rankfold.search.build import control
from rankfold.search.guard import Guard
from rankfold.search.study import Study, three_parts, units_of
from rankfold.search.trial import Trial
from rankfold.settings import Settings
from rankfold.tasks.evaluation import Evaluation, Metric, evaluate, joined, metric_values

LOOKS = 16  # times that the betting test looks whether it may stop
INTERRUPTED = "interrupted"  # the verdict on record where there came none


@dataclass
class HeldOut:
    """The held-out part of a user's data; ``test`` is the only way to open it.

    Attributes:
        settings: Confidence, test, margins of accuracy.
        metrics: The user's own, certified beside the loss.
    """

    settings: Settings
    metrics: tuple[Metric, ...]
    _part: Part = field(repr=False)
    _guard: Guard | None = field(default=None, repr=False)  # examples of other kinds
    # What is the same for every plan, evaluated once and only with a plan to test.
    _original: Evaluation | None = field(default=None, repr=False)
    _original_metrics: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _controls: list[tuple[Study, Evaluation | None]] = field(default_factory=list, repr=False)
    _openings: list[Opening] = field(default_factory=list, repr=False)

    @classmethod
    def sealed(
        cls,
        part: Part,
        settings: Settings,
        metrics: Sequence[Metric],
        margin: float | None,
        guard: Guard | None = None,
    ) -> HeldOut:
        """The part, where it could certify a margin; None for one that isn't known yet.

        Raises:
            InputError: It has too few units, or the guard has.
        """
        held_out = cls(settings, tuple(metrics), part, guard)
        held_out.check(margin)
        if guard is not None and guard.stated:
            _check_guard(guard, settings)
        return held_out

    @property
    def units(self) -> int:
        """Independent units: examples, or the groups that they form."""
        return units_of(self._part)

    @property
    def digest(self) -> str:
        """Of all examples."""
        return self._part.digest

    def check(self, margin: float | None) -> None:
        """Refuse a margin that so few units could never show; None where it isn't known yet.

        Raises:
            InputError: Says how many would.
        """
        check_enough(self.units, margin, self.metrics, self.settings)

    def test(self, order: Sequence[Trial], margin: float) -> Opened:
        """Open the part for plans from mild to strong, until the first that fails, and record it.

        Order and statements are fixed before anything is opened. Each plan is tested at the whole
        confidence, since a false "lossless" can only come from the first one that is not (Learn
        then Test, Angelopoulos et al. 2021).

        Args:
            order: One plan, or several.
            margin: Change of the mean loss up to which the verdict is ``lossless``.
        """
        self.check(margin)
        margin = float(margin)  # of NumPy, too: it is written down
        statements = [self._statement(trial, margin) for trial in order]
        tested: list[Tested | None] = [None] * len(order)
        digests: list[str] = []
        place, verdict = 0, INTERRUPTED
        original = model_digest(order[0].round.study.subject.unpacked.given)
        past: History | None = None
        try:
            for at, (trial, statement) in enumerate(zip(order, statements, strict=True)):
                one = tested[at] = self._tested(trial, statement, digests)
                if at == 0 or one.certificate.holds:
                    place, verdict = at, one.certificate.verdict
                if not one.certificate.holds:
                    break
        finally:  # what was seen is seen, also where a pass fails or is interrupted
            if digests:
                past = self._recorded(original, digests, verdict)
        past = processes.from_first(lambda: past, "the record of openings")
        assert past is not None  # one plan at least was tested
        study = order[place].round.study
        others = [study.parts[name] for name in PARTS[:2]]
        standing = tested[place]
        shown = standing is not None and not self.settings.private
        return Opened(
            tested=tested,
            place=place,
            usage=self._part.usage(),
            original=original,
            control=self._control(order[place]),
            look_alikes=look_alikes(others, self._part),
            history=past,
            changed=most_changed(self._part, standing.evidence) if standing and shown else (),
        )

    def _recorded(self, original: str, models: Sequence[str], verdict: str) -> History | None:
        """Record an opening of the whole part, which the original sees; gives what was before.

        Of several processes the first one records it.
        """
        opening = _opening(original, models, self._digests(), verdict, self.settings.seed)
        past = record(opening, self._openings) if processes.rank() == 0 else None
        self._openings.append(opening)
        return past

    def _digests(self) -> list[str]:
        """Of all examples that a verdict is made of."""
        guard = self._guard
        beside = guard.part if guard is not None and guard.stated else None
        return [*self._part.digests, *(() if beside is None else beside.digests)]

    def _statement(self, trial: Trial, margin: float) -> Statement:
        """What will be claimed of a plan, from its selection data alone."""
        settings = self.settings
        margins = {m.name: m.margin for m in self.metrics if m.margin is not None}
        if settings.accuracy_margin is not None:
            margins[ACCURACY] = settings.accuracy_margin
        return state(
            trial.change,
            trial.differences,
            self.units,
            margin=margin,
            confidence=settings.confidence,
            test=settings.test,
            largest_change=settings.largest_change,
            metric_margins=margins,
        )

    def _tested(self, trial: Trial, statement: Statement, digests: list[str]) -> Tested:
        """Evaluate a plan's model; its digest is added to the others before anything is opened."""
        study = trial.round.study
        given, model = study.subject.unpacked.given, trial.build()
        digests.append(model_digest(model))
        processes.agree("the model that came out", digests[-1])
        if self._original is None:
            self._original = self._evaluated(trial, given, "original on held-out data")
        factorized = self._until_shown(trial, model, self._original, statement)
        seen = len(factorized.losses)
        values: dict[str, tuple[Tensor, Tensor]] = {}
        for metric in self.metrics:
            if metric.name not in self._original_metrics:
                self._original_metrics[metric.name] = self._measured(trial, metric, given)
            before = self._original_metrics[metric.name]
            values[metric.name] = (before, self._measured(trial, metric, model))
        examples, answers = example_digests(self._part, seen)
        groups = None if self._part.groups is None else self._part.groups[:seen]
        original = self._original.first(seen)
        guard = None if self._guard is None else self._guard.of(trial, model)
        evidence = Evidence(examples, answers, original, factorized, groups, values, guard)
        digest = self._part.take(range(seen)).digest
        certificate = evidence.certificate(statement, study.task.unit, digest)
        return Tested(model, statement, evidence, certificate, digests[-1])

    def _evaluated(
        self, trial: Trial, model: nn.Module, shown: str, part: Part | None = None
    ) -> Evaluation:
        return evaluate(
            model,
            trial.round.study.task,
            self._part if part is None else part,
            batch_size=self.settings.batch_size,
            progress=trial.round.progress,
            stage=shown,
        )

    def _measured(self, trial: Trial, metric: Metric, model: nn.Module) -> Tensor:
        return metric_values(
            metric,
            model,
            self._part,
            batch_size=self.settings.batch_size,
            progress=trial.round.progress,
        )

    def _until_shown(
        self, trial: Trial, model: nn.Module, original: Evaluation, statement: Statement
    ) -> Evaluation:
        """Losses of a plan's model; the betting test stops once "lossless" is shown."""
        shown = "factorized on held-out data"
        if statement.test != "betting" or statement.metric_margins:
            return self._evaluated(trial, model, shown)
        count = len(self._part.examples)
        chunk = max(FEWEST, math.ceil(count / LOOKS))
        found: list[Evaluation] = []
        for end in range(chunk, count + chunk, chunk):
            piece = self._part.take(range(end - chunk, min(end, count)))
            found.append(self._evaluated(trial, model, shown, piece))
            together = joined(found)
            seen = original.first(len(together.losses))
            if examples_seen(together.losses - seen.losses, seen.terms, statement) is not None:
                break
        return together

    def _control(self, trial: Trial) -> Evaluation | None:
        """Losses of the dense model moved by the same steps, once a study."""
        study = trial.round.study
        for known, evaluation in self._controls:
            if known is study:
                return evaluation
        moved = control(trial.round)
        found = None
        if moved is not None:
            found = self._evaluated(trial, moved, "control on held-out data")
        self._controls.append((study, found))
        return found


def _check_guard(guard: Guard, settings: Settings) -> None:
    """Refuse a margin that so few examples of other kinds could never show.

    Raises:
        InputError: Says how many would.
    """
    margin, largest = settings.guard_margin or 0.0, settings.largest_change
    least = None if largest is None else fewest_units(margin, largest, settings.confidence)
    if least is not None and guard.units < least:
        raise InputError(
            f"there are {guard.units} examples of other kinds: too few to show a change of at most "
            f"{margin:g} where one may change by {largest:g}, even if none changes at all. That "
            f"needs {least} examples. Give more with guard= (and held_out_limit=), or state a "
            "larger guard_margin=, or a smaller largest_change=."
        )


def enough_held_out(
    data: object, settings: Settings, metrics: Sequence[Metric], margin: float | None
) -> Data:
    """The three parts, where the held-out one could certify anything; before any work.

    Args:
        data: A data set or data loader, which is split, or ``rankfold.Data``.
        settings: The test, its confidence and range.
        metrics: The user's own.
        margin: Of the loss; None where it isn't known yet.

    Raises:
        InputError: Says what is wrong, and how many examples would do.
    """
    check_metrics(metrics)
    data = three_parts(data, settings)
    held_out = up_to(data.held_out, settings.held_out_limit or USUAL_LIMITS[-1])
    units = len(held_out) if data.groups is None else len(set(map(str, data.groups)))
    units = min(units, settings.held_out_limit or units)
    if data.groups is not None and settings.test == "betting":
        raise InputError(
            "the betting test looks at single examples, but the held-out examples come in groups; "
            "use the test bounded."
        )
    check_enough(units, margin, metrics, settings)
    return data


def check_metrics(metrics: Sequence[Metric]) -> None:
    """Refuse metrics that share a name, or whose margin is none.

    Raises:
        InputError: As said.
    """
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


def check_enough(
    units: int, margin: float | None, metrics: Sequence[Metric], settings: Settings
) -> None:
    """Refuse margins that so many units could never show, even if nothing changed; or one unit.

    Raises:
        InputError: Says how many would.
    """
    if units < 2:
        raise InputError(
            "the held-out examples form one group; a bound needs 2 independent ones or more. Give "
            "examples of more groups (documents), or more of them (held_out_limit=)."
        )
    wanted: list[tuple[float, float | None, str, str]] = [
        (settings.accuracy_margin or 0.0, 1.0, "accuracy", "accuracy_margin="),
        *((m.margin or 0.0, 1.0, f"metric {m.name}", "margin of it") for m in metrics),
    ]
    if margin is not None:
        check_margin(margin)
        larger = "margin=, or a smaller largest_change="
        wanted.insert(0, (margin, settings.largest_change, "loss", larger))
    for within, largest, what, larger in wanted:
        least = None if largest is None else fewest_units(within, largest, settings.confidence)
        if least is not None and units < least:
            raise InputError(
                f"the held-out part has {units} independent examples: too few to show a change of "
                f"the {what} of at most {within:g} with {sure(settings.confidence)} confidence "
                f"where one example may change by {largest:g}, even if none changes at all. "
                f"That needs {least} examples. Give more held-out data (held_out_limit=), or "
                f"state a larger {larger}."
            )


def _opening(
    original: str, models: Sequence[str], digests: Sequence[str], verdict: str, seed: int
) -> Opening:
    """What is recorded of an opening; models and examples by their digests."""
    examples = tuple(digest[:SHORT] for digest in digests)
    return Opening(original, tuple(models), examples, verdict, seed)


def open_for_two(
    part: Part,
    statement: Statement,
    original: LossSource,
    other: LossSource,
    *,
    seed: int,
    progress: Progress,
) -> tuple[Evidence, Certificate, History]:
    """Open held-out examples once for two models that were given, and record it.

    Args:
        part: All held-out examples.
        statement: Fixed before.
        original: The model that the other is compared with.
        other: The other one.
        seed: Of the run, for the record.
        progress: Shows the examples.
    """
    verdict, digest = INTERRUPTED, original.identity.digest
    try:
        before = original.losses(part, progress, "original on held-out data", finite=True)
        after = other.losses(part, progress, "other on held-out data", finite=True)
        examples, answers = example_digests(part, len(part.examples))
        evidence = Evidence(examples, answers, before, after, part.groups, {})
        certificate = evidence.certificate(statement, original.unit, part.digest)
        verdict = certificate.verdict
    finally:  # what was seen is seen
        past = record(_opening(digest, [other.identity.digest], part.digests, verdict, seed))
    return evidence, certificate, past


def open_samples(
    samples: Samples, statement: Statement, unit: str
) -> tuple[Evidence, Certificate, History]:
    """Certify from samples that somebody else's evaluation has written, and record it."""
    evidence = Evidence(samples.documents, [], *samples.losses, None, {})
    certificate = evidence.certificate(statement, unit, json_digest(samples.documents))
    first, second = samples.original.digest, samples.other.digest
    past = record(_opening(first, [second], samples.documents, certificate.verdict, seed=0))
    return evidence, certificate, past
