"""The certificate of two models that were given: is the other no worse than the original?

The test, its statement before anything is opened, and the record of openings are those of a
factorized model. Nothing is changed and nothing is chosen here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from rankfold.artifact.manifest import library_versions
from rankfold.certificate.asked import ACCURACY, check_margin
from rankfold.certificate.certify import Certificate
from rankfold.certificate.change import Change, paired_change
from rankfold.certificate.document import Document
from rankfold.certificate.statement import Statement, in_order_of_bets, state
from rankfold.data.parts import Part, refuse_overlap
from rankfold.errors import InputError, visible
from rankfold.held_out import check_enough, open_for_two, open_samples
from rankfold.machine.progress import Progress, SilentProgress
from rankfold.others.document import make_given
from rankfold.others.samples import Samples
from rankfold.others.source import LossSource
from rankfold.settings import Settings

# A metric from 0 to 1 changes by 1 at most: nothing has to be learnt of its range.
WHOLE = 1.0


@dataclass(frozen=True)
class GivenCertificate:
    """What held-out data say about two given models.

    Attributes:
        certificate: Verdict and numbers.
        document: Content of ``certificate.json``.
    """

    certificate: Certificate
    document: Document

    @property
    def holds(self) -> bool:
        """Whether the other model is shown to be no worse than the margins allow."""
        return self.certificate.holds


def certify_models(
    original: LossSource,
    other: LossSource,
    held_out: Part,
    selection: Part | None,
    *,
    margin: float,
    settings: Settings,
    progress: Progress | None = None,
) -> GivenCertificate:
    """Compare two models on held-out examples.

    Args:
        original: The model that the other is compared with.
        other: The changed one.
        held_out: The examples that the verdict comes from.
        selection: Other examples, from which the range of one example's change is taken before the
            held-out ones are opened; None where ``largest_change`` states it or the test is ``t``.
        margin: Change of the mean loss that counts as no harm.
        settings: Of these ``confidence``, ``test``, ``largest_change``, ``accuracy_margin``,
            ``private`` and ``seed``.
        progress: Shows the examples.

    Raises:
        InputError: The two have different tasks, there are too few examples, a model can't run on
            them, or examples stand in both parts.
    """
    progress = progress or SilentProgress()
    _check(original, other, held_out, selection, margin, settings)
    if settings.test == "betting":
        held_out = in_order_of_bets(held_out)
    count = len(held_out.examples)
    statement = _statement(original, other, selection, count, margin, settings, progress)
    evidence, certificate, history = open_for_two(
        held_out, statement, original, other, seed=settings.seed, progress=progress
    )
    about = f"data like {visible(held_out.source or 'the held-out data')}"
    document = make_given(
        certificate,
        statement,
        evidence,
        models=(original.identity, other.identity),
        data={
            "held_out": held_out.usage(),
            "selection": None if selection is None else selection.usage(),
        },
        history=history,
        run=_run(original.task, about, settings),
        private=settings.private,
    )
    return GivenCertificate(certificate, document)


def _check(
    original: LossSource,
    other: LossSource,
    held_out: Part,
    selection: Part | None,
    margin: float,
    settings: Settings,
) -> None:
    """Refuse what can't be certified, before anything is opened."""
    check_margin(margin)
    if (original.task, original.unit) != (other.task, other.unit):
        raise InputError(
            f"{visible(original.identity.name)} is of the task {original.task} ({original.unit}), "
            f"{visible(other.identity.name)} of {other.task} ({other.unit}); expected one task."
        )
    check_enough(len(held_out.examples), margin, (), settings)
    if selection is None and settings.largest_change is None and settings.test != "t":
        raise InputError(
            "there are no examples to take the range of one example's change from; give some with "
            "selection=, or state largest_change=."
        )
    if selection is not None:
        refuse_overlap([selection, held_out])
        for source in (original, other):
            source.check(selection)


def certify_samples(samples: Samples, *, margin: float, settings: Settings) -> GivenCertificate:
    """Compare two models by samples of lm-evaluation-harness.

    The loss is 1 minus the metric, so that a margin of 0.01 lets one percentage point be lost.

    Raises:
        InputError: There are too few documents to show a change within the margin.
    """
    check_margin(margin)
    if settings.largest_change is not None:
        raise InputError(
            "largest_change has no part in samples: a metric from 0 to 1 changes by 1 at most. "
            "Leave it out."
        )
    if settings.test == "betting":
        raise InputError("the betting test has no part in samples; use the test bounded.")
    count = len(samples.documents)
    bounded = settings.test == "bounded"
    stated = Settings(
        confidence=settings.confidence,
        test=settings.test,
        largest_change=WHOLE if bounded else None,
    )
    check_enough(count, margin, (), stated)
    statement = Statement(
        margin=float(margin),
        confidence=settings.confidence,
        test=settings.test,
        lowest=-WHOLE if bounded else None,
        highest=WHOLE if bounded else None,
        range_from="stated" if bounded else None,
    )
    unit = f"{visible(samples.metric)} lost"
    evidence, certificate, history = open_samples(samples, statement, unit)
    task = visible(samples.task or "the documents")
    held_out = {
        "examples": count,
        "digest": certificate.data_digest,
        "given": count + sum(samples.left_out.values()),
        "left_out": dict(samples.left_out),
        "source": samples.task,
    }
    document = make_given(
        certificate,
        statement,
        evidence,
        models=(samples.original, samples.other),
        data={"held_out": held_out, "selection": None},
        history=history,
        run=_run(f"{samples.metric} of lm-evaluation-harness", f"documents like {task}", settings),
        private=settings.private,
    )
    return GivenCertificate(certificate, document)


def _statement(
    original: LossSource,
    other: LossSource,
    selection: Part | None,
    held_out: int,
    margin: float,
    settings: Settings,
    progress: Progress,
) -> Statement:
    """What will be claimed, from selection examples alone, or from what the user states."""
    if selection is None:
        spread = settings.largest_change or WHOLE
        change, differences = Change(0.0, spread / 2, 1), torch.zeros(1, dtype=torch.float64)
    else:
        before = original.losses(selection, progress, "original on selection data", finite=True)
        after = other.losses(selection, progress, "other on selection data", finite=False)
        change, differences = paired_change(before, after), after.losses - before.losses
    margins = {} if settings.accuracy_margin is None else {ACCURACY: settings.accuracy_margin}
    return state(
        change,
        differences,
        held_out,
        margin=float(margin),
        confidence=settings.confidence,
        test=settings.test,
        largest_change=settings.largest_change,
        metric_margins=margins,
    )


def _run(task: str, about: str, settings: Settings) -> Mapping[str, Any]:
    asked = asdict(settings)
    names = ("confidence", "test", "largest_change", "accuracy_margin", "private", "seed")
    return {
        "task": task,
        "about": about,
        "settings": {name: asked[name] for name in names},
        "versions": library_versions(),
    }
