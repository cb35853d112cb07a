"""A paired non-inferiority test on held-out data, and its certificate.

What is claimed is fixed in a ``Statement`` before the held-out part is opened: margin, confidence,
test, and the range in which the change of one example counts. docs/certificate.md has the theory.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias, cast, get_args

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from rankfold import bounds
from rankfold.bounds import Array, BettingTest
from rankfold.errors import InputError
from rankfold.tasks import Evaluation

Verdict: TypeAlias = Literal["better", "lossless", "not shown", "worse"]
TestName: TypeAlias = Literal["bounded", "t", "betting"]
TESTS: tuple[TestName, ...] = get_args(TestName)

DEFAULT_MARGIN = 0.01  # nats of mean loss: a perplexity 1 % higher
DEFAULT_CONFIDENCE = 0.95
ACCURACY = "accuracy"
# The range of the bounded tests is the selection examples' mean +- REACH * n^(1/3) standard
# deviations, n held-out units: at 16 to 128 units the bound is then 1.2 times the t interval
# (1.1 times at 10,000), and it is as careful as that allows. benchmarks/coverage.py measures it.
REACH = 2 / 3
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
class Change:
    """Mean paired change of the loss, factorized minus original.

    Attributes:
        mean: Mean over terms, in the task's unit.
        standard_error: Standard error of the mean; examples are the units of sampling.
        examples: Number of paired examples.
    """

    mean: float
    standard_error: float
    examples: int

    def upper_bound(self, confidence: float) -> float:
        """One-sided t bound: the true change is below it with this confidence."""
        return self.mean + self._quantile(confidence) * self.standard_error

    def lower_bound(self, confidence: float) -> float:
        """One-sided t bound: the true change is above it with this confidence."""
        return self.mean - self._quantile(confidence) * self.standard_error

    def _quantile(self, confidence: float) -> float:
        return float(stats.t.ppf(confidence, self.examples - 1))

    @property
    def deviation(self) -> float:
        """Standard deviation of one example's change."""
        return self.standard_error * math.sqrt(self.examples)


def paired_change(original: Evaluation, changed: Evaluation) -> Change:
    """Change between two evaluations of the same examples.

    Both are weighted by the examples' terms (a ratio estimator; for windows of one length it is
    the plain mean of the paired differences and the t test's standard error).

    Raises:
        ValueError: The evaluations are not of the same examples.
    """
    _check_pairs(original, changed)
    return weighted_mean(changed.losses - original.losses, original.terms)


def _check_pairs(original: Evaluation, changed: Evaluation) -> None:
    if len(original.losses) != len(changed.losses):
        raise ValueError(
            f"the two evaluations are of different examples: {len(original.losses)} and "
            f"{len(changed.losses)} of them"
        )
    if not torch.equal(original.terms, changed.terms):
        raise ValueError("the two evaluations are of different examples")


def weighted_mean(values: Tensor, weights: Tensor) -> Change:
    """Mean of per-example values weighted by the examples' terms, with its standard error.

    Args:
        values: ``(n,)`` float64, n of 2 or more.
        weights: ``(n,)`` float64.
    """
    shares = weights / weights.sum()
    mean = float((shares * values).sum())
    n = len(values)
    spread = float(
        (shares * (values - mean)).square().sum()
    )  # in torch: infinite values are let by
    return Change(mean, math.sqrt(spread * n / (n - 1)), n)


@dataclass(frozen=True)
class Statement:
    """What is claimed and how it is tested, fixed before the held-out part is opened.

    Attributes:
        margin: Largest change of the mean loss that counts as no harm.
        confidence: Of each one-sided bound.
        test: ``bounded``, ``t`` or ``betting``.
        lowest: Lower end of the range in which one example's change counts; None for ``t``.
        highest: Upper end of it; None for ``t``.
        range_from: ``stated`` by the user, or from ``selection data``; None for ``t``.
        expected: Mean change on selection data; the betting test's first bets use it.
        deviation: Standard deviation of one example's change there, likewise.
        metric_margins: How much of each metric may be lost, by name; all must hold.

    Raises:
        InputError: A value is outside its range.
    """

    margin: float = DEFAULT_MARGIN
    confidence: float = DEFAULT_CONFIDENCE
    test: TestName = "bounded"
    lowest: float | None = None
    highest: float | None = None
    range_from: str | None = None
    expected: float = 0.0
    deviation: float = 1.0
    metric_margins: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse values outside their ranges."""
        check_margin(self.margin)
        if not 0.5 < self.confidence < 1:
            raise InputError(
                f"the confidence is {self.confidence}; expected a number between 0.5 and 1."
            )
        if self.test not in TESTS:
            raise InputError(f"the test is {self.test!r}; expected one of {', '.join(TESTS)}.")
        if self.test != "t":
            ends = (self.lowest, self.highest)
            if None in ends or not all(math.isfinite(cast("float", e)) for e in ends):
                raise InputError(
                    f"the test {self.test} needs a finite range of one example's change, stated "
                    f"before the data is seen; it is {self.lowest} to {self.highest}."
                )
        for name, margin in self.metric_margins.items():
            check_metric_margin(name, margin)


def state(
    selection: Change,
    differences: Tensor,
    held_out: int,
    *,
    margin: float,
    confidence: float,
    test: TestName,
    largest_change: float | None,
    metric_margins: Mapping[str, float],
) -> Statement:
    """The statement for a model whose changes on selection data are known.

    Args:
        selection: Mean change on selection data.
        differences: ``(n,)`` changes of the selection examples.
        held_out: Units of the held-out part.
        margin: Stated by the user.
        confidence: Likewise.
        test: Likewise.
        largest_change: Range of one example's change, or None for one from selection data.
        metric_margins: Stated by the user, by metric.
    """
    lowest: float | None
    highest: float | None
    if test == "t":
        lowest = highest = source = None
    elif largest_change is not None:
        lowest, highest, source = -largest_change, largest_change, "stated"
    else:
        reach = REACH * held_out ** (1 / 3) * selection.deviation
        # A model that is destroyed on selection data is refused once its held-out losses are seen.
        known = math.isfinite(selection.mean)
        mean, reach = (selection.mean, reach) if known else (0.0, 0.0)
        if not known:
            differences = torch.zeros(1)
        # A change up to the margin always counts in full.
        highest = max(mean + reach, float(differences.max()), margin)
        lowest = min(mean - reach, float(differences.min()), -margin)
        source = "selection data"
    return Statement(
        margin=margin,
        confidence=confidence,
        test=test,
        lowest=lowest,
        highest=highest,
        range_from=source,
        expected=selection.mean if math.isfinite(selection.mean) else 0.0,
        deviation=selection.deviation if math.isfinite(selection.deviation) else 1.0,
        metric_margins=dict(metric_margins),
    )


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

    @property
    def holds(self) -> bool:
        """Whether the factorized model is shown to be no worse than the margins allow."""
        return self.verdict in ("better", "lossless")

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = asdict(self)
        plain["metrics"] = [{**asdict(m), "verdict": m.verdict} for m in self.metrics]
        return plain


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
    _check_pairs(original, factorized)
    values = (factorized.losses - original.losses).numpy()
    x, w = _units(values, original.terms.numpy(), groups)
    if len(x) < 2:
        raise InputError(
            f"the held-out examples form {len(x)} independent group; a bound needs 2 or more. "
            "Give examples of more groups (documents)."
        )
    if groups is not None and statement.test == "betting":
        raise InputError(
            "the betting test looks at single examples, but the held-out examples come in groups; "
            "use --test bounded."
        )
    change, error = bounds.mean_and_error(x, w)
    upper = _upper(x, w, statement, statement.highest, 1)
    lower = -_upper(-x, w, statement, _minus(statement.lowest), -1)
    compared = tuple(_compare_metrics(original, factorized, statement, groups, metrics or {}))
    verdict = _joint_verdict(_verdict(upper, lower, statement.margin), compared)
    above = None
    if statement.highest is not None:
        above = int((x > statement.highest).sum())
    return Certificate(
        verdict=verdict,
        change=change,
        standard_error=error,
        upper_bound=upper,
        lower_bound=lower,
        margin=statement.margin,
        unit=unit,
        confidence=statement.confidence,
        examples=len(values),
        data_digest=data_digest,
        method=METHODS[statement.test],
        test=statement.test,
        units=len(x),
        t_upper_bound=bounds.t_bound(x, w, statement.confidence),
        lowest=statement.lowest,
        highest=statement.highest,
        range_from=statement.range_from,
        above=above,
        share_above=None
        if above is None
        else bounds.share_bound(above, len(x), statement.confidence),
        needed=None
        if verdict != "not shown"
        else _needed(change, error * math.sqrt(len(x)), statement, compared, len(x)),
        metrics=compared,
    )


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


def _minus(value: float | None) -> float | None:
    return None if value is None else -value


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
    total = terms.sum()
    binary = groups is None and bool(np.isin(before, (0, 1)).all() and np.isin(after, (0, 1)).all())
    return MetricChange(
        name=name,
        original=float((terms * before).sum() / total),
        factorized=float((terms * after).sum() / total),
        lost=float((w * x).sum() / w.sum()),
        upper_bound=_upper(x, w, own, 1.0, 1),
        lower_bound=-_upper(-x, w, own, 1.0, -1),
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


def half_width(
    deviation: float, units: int, confidence: float, test: TestName, reach: float | None = None
) -> float:
    """About how far above the mean a test's bound will lie, for planning.

    Args:
        deviation: Standard deviation of one unit's change.
        units: Number of units.
        confidence: Of the bound.
        test: Which test.
        reach: From the expected mean to the stated largest change; None for the range that
            selection data would give.
    """
    student = float(stats.t.ppf(confidence, units - 1))
    if test == "t":
        return student * deviation / math.sqrt(units)
    if reach is None:
        reach = REACH * units ** (1 / 3) * deviation
    if test == "bounded":
        # The added observation at the top has a share of 1/(n + 1) on average, exponential.
        return reach / (units + 1) + student * math.hypot(
            deviation / math.sqrt(units), reach / units
        )
    needed = math.log(1 / (1 - confidence))
    return math.sqrt(2 * needed / units) * deviation + reach / units


def _needed(
    change: float,
    deviation: float,
    statement: Statement,
    metrics: Sequence[MetricChange],
    units: int,
) -> int | None:
    """Units with which everything would hold, or None where a mean is not below its margin."""
    wanted = [(change, deviation, statement.margin, statement.test, _reach(change, statement))]
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


def _reach(change: float, statement: Statement) -> float | None:
    if statement.range_from == "stated" and statement.highest is not None:
        return max(0.0, statement.highest - change)
    return None


def fewest_units(margin: float, largest_change: float, confidence: float) -> int | None:
    """Units below which no test can call even an unchanged model lossless.

    With n changes of 0, the bounded bound is ``largest * (1 - (1 - confidence)^(1/n))``, as
    Clopper and Pearson's: so many large losses may have been missed.

    Returns:
        The number, or None at a margin of 0, which only a gain can show.
    """
    if margin <= 0:
        return None
    if margin >= largest_change:
        return 1
    return math.ceil(math.log(1 - confidence) / math.log1p(-margin / largest_change))


def order_seed(digest: str) -> int:
    """A seed that only the data decides, for the order of the betting test."""
    return int.from_bytes(hashlib.sha256(digest.encode()).digest()[:8], "big") >> 1


def check_margin(margin: float) -> None:
    """Refuse a margin that is negative or not finite.

    Raises:
        InputError: As said.
    """
    if not (math.isfinite(margin) and margin >= 0):
        raise InputError(
            f"the margin is {margin}; expected 0 or more, in nats of mean loss (default 0.01)."
        )


def check_metric_margin(name: str, margin: float) -> None:
    """Refuse a metric's margin outside [0, 1).

    Raises:
        InputError: As said.
    """
    if not 0 <= margin < 1:
        raise InputError(
            f"the margin of {name} is {margin}; expected a share from 0 to below 1 (0.01 lets 1 "
            "percentage point be lost)."
        )


def _verdict(upper: float, lower: float, margin: float) -> Verdict:
    if upper < 0:
        return "better"
    if upper <= margin:
        return "lossless"
    return "worse" if lower > margin else "not shown"
