"""The two algorithms, as the stages that they run through.

``lossless`` gives the best model of a given size, ``compact`` the smallest model that is no worse
than the original. Both look at calibration data once (``collected``), make plans and measure them
on selection data (``stage``, ``search``), and end in a certificate on held-out data (``outcome``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from typing_extensions import Unpack

from rankfold.certificate.statement import (
    ACCURACY,
    DEFAULT_MARGIN,
    check_margin,
    check_metric_margin,
    fewest_units,
)
from rankfold.data.parts import Data, split
from rankfold.errors import InputError
from rankfold.held_out import result_of, result_of_fixed_sequence
from rankfold.machine.freed_memory import trim_freed_memory
from rankfold.machine.offload import Offload
from rankfold.machine.progress import Progress, SilentProgress, TrimmingProgress
from rankfold.result import Result
from rankfold.search.plans import favoured, of_size, within_margin
from rankfold.search.round import Stage, choose_damping, lowest
from rankfold.search.study import collect
from rankfold.settings import SettingKeywords, Settings, SizeOf, check_size
from rankfold.tasks.evaluation import Metric
from rankfold.tasks.supervised import LossFunction


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
    offload_folder: str | Path | None = None,
    **settings: Unpack[SettingKeywords],
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
        offload_folder: Statistics, steps and spectra of all layers lie in files of this folder
            (``rankfold.machine.offload``), not in memory; the model must be on the CPU.
        **settings: Fields of ``Settings``.

    Raises:
        InputError: Names the input, what was expected, and what to do.
    """
    check_size(size)
    check_margin(margin)
    data = _enough_held_out(data, margin, metrics, settings)
    prepared = prepare(
        model,
        data,
        loss=loss,
        metrics=metrics,
        progress=progress,
        offload_folder=offload_folder,
        **settings,
    )
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
    offload_folder: str | Path | None = None,
    **settings: Unpack[SettingKeywords],
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
        offload_folder: Statistics, steps and spectra of all layers lie in files of this folder
            (``rankfold.machine.offload``), not in memory; the model must be on the CPU.
        **settings: Fields of ``Settings``.

    Raises:
        InputError: Names the input, what was expected, and what to do.
    """
    check_margin(margin)
    data = _enough_held_out(data, margin, metrics, settings)
    prepared = prepare(
        model,
        data,
        loss=loss,
        metrics=metrics,
        progress=progress,
        offload_folder=offload_folder,
        **settings,
    )
    return prepared.compact(margin=margin, certified=certified)


def prepare(
    model: nn.Module,
    data: object,
    *,
    loss: LossFunction | None = None,
    metrics: Sequence[Metric] = (),
    progress: Progress | None = None,
    offload_folder: str | Path | None = None,
    **settings: Unpack[SettingKeywords],
) -> Preparation:
    """Everything that does not depend on the size: statistics, step, spectra.

    Use it to try several sizes, or both algorithms, with one pass over the calibration data.

    Raises:
        InputError: Names the input, what was expected, and what to do.
    """
    chosen = Settings(**settings)
    _check_metrics(metrics)
    progress = TrimmingProgress(progress or SilentProgress())
    trim_freed_memory()  # what opening the model left
    offload = Offload(None if offload_folder is None else Path(offload_folder))
    collected = collect(
        model, data, chosen, loss=loss, metrics=metrics, progress=progress, offload=offload
    )
    if chosen.damping == "auto":
        chosen = choose_damping(collected, chosen, progress=progress)
    return Preparation.of(collected, chosen, progress=progress, release=True)


class Preparation(Stage):
    """A model that is ready to be factorized at any size, by both algorithms."""

    def lossless(
        self, size: float, *, size_of: SizeOf = "model", margin: float = DEFAULT_MARGIN
    ) -> Result:
        """The best model of a size; see ``rankfold.lossless``."""
        check_size(size)
        check_margin(margin)
        tried = of_size(self, self.budget(size, size_of))
        target = {"size": size, "size_of": size_of}
        return result_of("lossless", lowest(tried), margin, target, tried)

    def compact(self, *, margin: float = DEFAULT_MARGIN, certified: bool = False) -> Result:
        """The smallest model within a margin; see ``rankfold.compact``."""
        check_margin(margin)
        tried = within_margin(self, margin)
        if certified:
            return result_of_fixed_sequence(tried, margin)
        return result_of("compact", favoured(tried, margin), margin, {}, tried)


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
