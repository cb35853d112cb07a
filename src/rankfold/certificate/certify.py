"""A paired non-inferiority test on held-out data, and its certificate.

What is claimed is fixed in a ``Statement`` before the held-out part is opened: margin, confidence,
test, and the range in which the change of one example counts. docs/certificate.md has the theory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias, cast, get_args

import numpy as np
from torch import Tensor

from rankfold.certificate import bounds
from rankfold.certificate.bounds import Array, BettingTest
from rankfold.certificate.change import check_pairs
from rankfold.certificate.shown import bound_words, certificate_html
from rankfold.certificate.statement import (
    ACCURACY,
    Statement,
    TestName,
    half_width,
    reach_of,
)
from rankfold.errors import InputError
from rankfold.tasks.evaluation import Evaluation

Verdict: TypeAlias = Literal["better", "lossless", "not shown", "worse"]
FROM_BEST: tuple[Verdict, ...] = get_args(Verdict)

MOST_UNITS = 10**9  # beyond which a number of examples needed isn't given

GRID = 400  # means that the betting bound is read off

METHODS: dict[TestName, str] = {
    "bounded": (
        "one-sided bounded-mean test of paired differences, distribution-free (Gaffke 2005; "
        "Learned-Miller and Thomas 2020); assumes independent examples; the change of one example "
        "counts up to the stated largest change"
    ),
    "t": "paired t, one-sided; assumes independent examples and a nearly normal mean difference",
    "betting": (
        "one-sided test by betting on paired differences, valid at any stopping time and for any "
        "distribution (Ville 1939; Waudby-Smith and Ramdas 2024); assumes examples in random "
        "order; the change of one example counts up to the stated largest change"
    ),
}


@dataclass(frozen=True)
class MetricChange:
    """What held-out data say about one metric in [0, 1], of which more is better.

    Attributes:
        name: ``accuracy`` or the user's name.
        original: Mean of the original model.
        factorized: Mean of the factorized model.
        lost: original - factorized.
        upper_bound: One-sided upper confidence bound of the share that is lost.
        lower_bound: One-sided lower confidence bound of it.
        margin: What may be lost, or None where the metric is only reported.
        p_value: Exact McNemar test of "no more is lost than won", where the values are 0 and 1.
    """

    name: str
    original: float
    factorized: float
    lost: float
    upper_bound: float
    lower_bound: float
    margin: float | None
    p_value: float | None

    @property
    def verdict(self) -> Verdict | None:
        """As for the loss; None where no margin was stated."""
        if self.margin is None:
            return None
        return _verdict(self.upper_bound, self.lower_bound, self.margin)


@dataclass(frozen=True)
class Certificate:
    """What held-out data say about the factorized model.

    Attributes:
        verdict: ``better`` (upper bound below 0), ``lossless`` (upper bound at most the margin),
            ``worse`` (lower bound above the margin), else ``not shown``. Metrics with a margin
            must hold too.
        change: Mean paired change of the loss, factorized minus original.
        standard_error: Of ``change``.
        upper_bound: One-sided upper confidence bound of the true change.
        lower_bound: One-sided lower confidence bound of the true change.
        margin: The largest change that counts as no harm, stated before the data was seen.
        unit: Unit of all of these.
        confidence: Confidence of each one-sided bound.
        examples: Number of held-out examples (sequences, images) that were evaluated.
        data_digest: SHA-256 of the held-out examples.
        method: Name of the test and what it assumes.
        test: ``bounded``, ``t`` or ``betting``.
        units: Independent units: examples, or the groups that they belong to.
        t_upper_bound: Student's t bound of the same data, for comparison.
        lowest: Range of one example's change, stated before; None for ``t``.
        highest: Its upper end. Changes above it were counted in full, but the guarantee is on the
            mean of changes cut there.
        range_from: ``stated`` or ``selection data``.
        above: Examples whose change was above ``highest``.
        share_above: Upper confidence bound of the share of such examples (of units, where
            examples come in groups).
        needed: Units with which a model of this change would be shown lossless, as far as these
            data can tell; None where it is shown, or where the change is not below the margin.
        metrics: Accuracy, where the task has one, and the user's metrics.
        guard: Of examples of other kinds, where a margin was stated for them: the verdict then
            holds only if both do. All other fields are of the held-out part.
    """

    verdict: Verdict
    change: float
    standard_error: float
    upper_bound: float
    lower_bound: float
    margin: float
    unit: str
    confidence: float
    examples: int
    data_digest: str
    method: str
    test: TestName
    units: int
    t_upper_bound: float
    lowest: float | None
    highest: float | None
    range_from: str | None
    above: int | None
    share_above: float | None
    needed: int | None
    metrics: tuple[MetricChange, ...] = ()
    guard: Certificate | None = None

    @property
    def holds(self) -> bool:
        """Whether the factorized model is shown to be no worse than the margins allow."""
        return self.verdict in ("better", "lossless")

    def __repr__(self) -> str:
        words = bound_words(vars(self))
        return f"<Certificate {self.verdict}: {words}; {self.examples} held-out examples>"

    def _repr_html_(self) -> str:
        return certificate_html(self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = asdict(self)
        plain["metrics"] = [{**asdict(m), "verdict": m.verdict} for m in self.metrics]
        plain["guard"] = None if self.guard is None else self.guard.as_dict()
        return plain

    def guarded_by(self, guard: Certificate | None) -> Certificate:
        """The same with the worse verdict of the two, where other examples have one."""
        if guard is None:
            return self
        both = (self.verdict, guard.verdict)
        return replace(self, guard=guard, verdict=max(both, key=FROM_BEST.index))


def certify(
    original: Evaluation,
    factorized: Evaluation,
    statement: Statement,
    *,
    unit: str,
    data_digest: str,
    groups: Sequence[str] | None = None,
    metrics: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> Certificate:
    """Compare two models on held-out examples that nothing was tuned on.

    Args:
        original: Of the original model.
        factorized: Of the factorized model, on the same examples.
        statement: What is claimed, fixed before.
        unit: Of the losses.
        data_digest: SHA-256 of the examples.
        groups: ``(n,)`` the group, such as a document, that each example belongs to: groups are
            then the independent units. None where the examples themselves are independent.
        metrics: The user's metrics by name: values of both models, ``(n,)`` in [0, 1].

    Raises:
        ValueError: The evaluations are not of the same examples.
        InputError: A metric is outside [0, 1] or has no value for an example; there are fewer
            than two units; the test can't respect groups.
    """
    x, w = _units_of_losses(original, factorized, groups)
    _check_units(len(x), groups, statement)
    change, error = bounds.mean_and_error(x, w)
    lower, upper = _bounds(x, w, statement)
    compared = tuple(_compare_metrics(original, factorized, statement, groups, metrics or {}))
    verdict = _joint_verdict(_verdict(upper, lower, statement.margin), compared)
    above, share_above = _above_range(x, statement)
    needed = None
    if verdict == "not shown":
        needed = _needed(change, error * math.sqrt(len(x)), statement, compared, len(x))
    return Certificate(
        verdict=verdict,
        change=change,
        standard_error=error,
        upper_bound=upper,
        lower_bound=lower,
        margin=statement.margin,
        unit=unit,
        confidence=statement.confidence,
        examples=len(original.losses),
        data_digest=data_digest,
        method=METHODS[statement.test],
        test=statement.test,
        units=len(x),
        t_upper_bound=bounds.t_bound(x, w, statement.confidence),
        lowest=statement.lowest,
        highest=statement.highest,
        range_from=statement.range_from,
        above=above,
        share_above=share_above,
        needed=needed,
        metrics=compared,
    )


def _units_of_losses(
    original: Evaluation, factorized: Evaluation, groups: Sequence[str] | None
) -> tuple[Array, Array]:
    """Changes of the loss, and weights, of the independent units."""
    check_pairs(original, factorized)
    changes = (factorized.losses - original.losses).numpy()
    return _units(changes, original.terms.numpy(), groups)


def _units(values: Array, terms: Array, groups: Sequence[str] | None) -> tuple[Array, Array]:
    """Values and weights of the independent units: examples, or means over groups."""
    if groups is None:
        return values, terms
    if len(groups) != len(values):
        raise InputError(
            f"there are {len(groups)} groups for {len(values)} held-out examples; expected one a "
            "example."
        )
    _, place = np.unique(np.asarray(groups), return_inverse=True)
    weights: Array = np.bincount(place, terms).astype(np.float64)
    return np.bincount(place, terms * values) / weights, weights


def _check_units(units: int, groups: Sequence[str] | None, statement: Statement) -> None:
    """Refuse units that the statement's test can't judge by."""
    if units < 2:
        raise InputError(
            f"the held-out examples form {units} independent group; a bound needs 2 or more. "
            "Give examples of more groups (documents)."
        )
    if groups is not None and statement.test == "betting":
        raise InputError(
            "the betting test looks at single examples, but the held-out examples come in groups; "
            'use test="bounded".'
        )


def _bounds(x: Array, w: Array, statement: Statement) -> tuple[float, float]:
    """One-sided bounds of the mean of ``x``, the lower and the upper one."""
    lowest = None if statement.lowest is None else -statement.lowest
    upper = _upper(x, w, statement, statement.highest, 1)
    return -_upper(-x, w, statement, lowest, -1), upper


def _upper(x: Array, w: Array, statement: Statement, top: float | None, sign: int) -> float:
    """Upper bound of the mean of ``x``, whose sign was turned where ``sign`` is -1."""
    if statement.test == "t" or top is None:
        return bounds.t_bound(x, w, statement.confidence)
    if statement.test == "bounded":
        return bounds.bounded_bound(x, w, statement.confidence, top)
    expected = sign * statement.expected
    low = min(expected, sign * statement.margin, top) - 5 * statement.deviation
    grid = np.linspace(low, top, GRID, endpoint=False)
    # The margin itself stands in the grid, so that the verdict is the test at the margin.
    grid = np.unique(np.append(grid, [v for v in (sign * statement.margin, 0.0) if v < top]))
    test = BettingTest(grid, top, float(w.max()), expected, statement.deviation)
    test.add(x, w)
    return test.bound(statement.confidence)


def _above_range(x: Array, statement: Statement) -> tuple[int | None, float | None]:
    """How many units changed by more than the range's end, and a bound of the share of all."""
    if statement.highest is None:
        return None, None
    above = int((x > statement.highest).sum())
    return above, bounds.share_bound(above, len(x), statement.confidence)


def _compare_metrics(
    original: Evaluation,
    factorized: Evaluation,
    statement: Statement,
    groups: Sequence[str] | None,
    metrics: Mapping[str, tuple[Tensor, Tensor]],
) -> list[MetricChange]:
    found: dict[str, tuple[Array, Array, Array]] = {}
    if original.correct is not None and factorized.correct is not None:
        terms = original.terms.numpy()
        found[ACCURACY] = (original.correct.numpy(), factorized.correct.numpy(), terms)
    for name, (before, after) in metrics.items():
        for whose, values in (("original", before), ("factorized", after)):
            check_metric_values(name, whose, values, len(original.losses))
        found[name] = (before.numpy(), after.numpy(), np.ones(len(before)))
    missing = [name for name in statement.metric_margins if name not in found]
    if missing:
        raise InputError(
            f"a margin is stated for {', '.join(missing)}, but the task has no such metric; "
            f"there is {', '.join(found) or 'none'}."
        )
    return [_compare_metric(n, *v, statement, groups) for n, v in found.items()]


def _compare_metric(
    name: str,
    before: Array,
    after: Array,
    terms: Array,
    statement: Statement,
    groups: Sequence[str] | None,
) -> MetricChange:
    """A metric's loss lies in [-1, 1] by nature, so nothing is cut and no range is stated."""
    x, w = _units(before - after, terms, groups)
    own = Statement(
        margin=statement.metric_margins.get(name, 0.0),
        confidence=statement.confidence,
        test="betting" if statement.test == "betting" else "bounded",
        lowest=-1.0,
        highest=1.0,
        deviation=0.2,
    )
    lower, upper = _bounds(x, w, own)
    total = terms.sum()
    binary = groups is None and bool(np.isin(before, (0, 1)).all() and np.isin(after, (0, 1)).all())
    return MetricChange(
        name=name,
        original=float((terms * before).sum() / total),
        factorized=float((terms * after).sum() / total),
        lost=float((w * x).sum() / w.sum()),
        upper_bound=upper,
        lower_bound=lower,
        margin=statement.metric_margins.get(name),
        p_value=bounds.mcnemar_p_value(int((x > 0).sum()), int((x < 0).sum())) if binary else None,
    )


def check_metric_values(name: str, whose: str, values: Tensor, examples: int) -> None:
    """Refuse values of a metric that are not one number in [0, 1] an example.

    Raises:
        InputError: Names the metric, the model and the first bad example.
    """
    if values.shape != (examples,):
        raise InputError(
            f"the metric {name} gave {tuple(values.shape)} values for {examples} examples of the "
            f"{whose} model; expected one an example."
        )
    bad = ~((values >= 0) & (values <= 1))  # NaN is bad too
    if bool(bad.any()):
        place = int(bad.nonzero()[0])
        raise InputError(
            f"the metric {name} is {float(values[place])} for example {place} of the {whose} "
            "model; expected values from 0 to 1."
        )


def _joint_verdict(loss: Verdict, metrics: Sequence[MetricChange]) -> Verdict:
    """All must hold, so no confidence is shared out: each is tested at the whole."""
    verdicts = [loss, *(m.verdict for m in metrics if m.verdict is not None)]
    for verdict in ("worse", "not shown"):
        if verdict in verdicts:
            return cast("Verdict", verdict)
    return loss


def examples_seen(differences: Tensor, terms: Tensor, statement: Statement) -> int | None:
    """Where the betting test may stop: the first number of examples that shows "lossless".

    Args:
        differences: ``(n,)`` changes in the order in which they come.
        terms: ``(n,)``.
        statement: With the test ``betting``.

    Returns:
        The number, or None where all of them don't show it.
    """
    top = cast("float", statement.highest)
    if statement.margin >= top:
        return 1
    w = terms.numpy()
    test = BettingTest(
        np.array([statement.margin]),
        top,
        float(w.max()),
        statement.expected,
        statement.deviation,
    )
    target = math.log(1 / (1 - statement.confidence))
    for place, value in enumerate(differences.numpy()):
        test.add(np.array([value]), w[place : place + 1])
        if test.wealth[0] >= target:
            return place + 1
    return None


def _needed(
    change: float,
    deviation: float,
    statement: Statement,
    metrics: Sequence[MetricChange],
    units: int,
) -> int | None:
    """Units with which everything would hold, or None where a mean is not below its margin."""
    wanted = [(change, deviation, statement.margin, statement.test, reach_of(change, statement))]
    for metric in metrics:
        if metric.margin is not None and metric.verdict == "not shown":
            spread = max(1e-6, (metric.upper_bound - metric.lost) / 2 * math.sqrt(units))
            test: TestName = "betting" if statement.test == "betting" else "bounded"
            wanted.append((metric.lost, spread, metric.margin, test, 1 - metric.lost))
    needed = 2
    for mean, spread, margin, test, reach in wanted:
        if mean >= margin:
            return None

        def short(
            n: int,
            mean: float = mean,
            spread: float = spread,
            margin: float = margin,
            test: TestName = test,
            reach: float | None = reach,
        ) -> bool:
            return mean + half_width(spread, n, statement.confidence, test, reach) > margin

        high = 2
        while short(high):
            high *= 2
            if high > MOST_UNITS:
                return None
        low = max(1, high // 2)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if short(middle) else (low, middle)
        needed = max(needed, high)
    return max(needed, units + 1)


def _verdict(upper: float, lower: float, margin: float) -> Verdict:
    if upper < 0:
        return "better"
    if upper <= margin:
        return "lossless"
    return "worse" if lower > margin else "not shown"
