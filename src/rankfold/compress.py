"""The two algorithms and the pipeline that both run through: statistics, plans, certificate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from typing_extensions import Unpack

from rankfold.certificate.asked import DEFAULT_MARGIN, check_margin
from rankfold.errors import check_flag
from rankfold.held_out import HeldOut, enough_held_out
from rankfold.keywords import Options, read_options
from rankfold.report.prepared import Prepared
from rankfold.report.seen import Run
from rankfold.result import Result, Sweep, check_sizes, result_of
from rankfold.search.damping import choose_damping
from rankfold.search.guard import open_guard
from rankfold.search.plans import favoured, mild_to_strong, of_size, within_margin
from rankfold.search.round import start_round
from rankfold.search.same_run import same_run, same_target
from rankfold.search.study import open_inputs, study_of
from rankfold.search.trial import lowest
from rankfold.settings import SizeOf, check_size


def lossless(
    model: nn.Module,
    data: object,
    *,
    size: float,
    size_of: SizeOf = "model",
    margin: float = DEFAULT_MARGIN,
    **options: Unpack[Options],
) -> Result:
    """The best model of a given size, with the verdict of held-out data on it.

    Args:
        model: Any ``nn.Module``; it comes back unchanged.
        data: A data set or data loader, split for you, or ``rankfold.Data``.
        size: Share that is kept, in (0, 1], of the parameters (or FLOPs) of the whole model.
        size_of: ``factorizable`` makes it the share of the layers that can be factorized.
        margin: Change of the mean loss, in nats, up to which the verdict is ``lossless``.
        **options: See ``rankfold.keywords.Options``, and the fields of ``Settings``.

    Raises ``InputError``, which names the input, what was expected, and what to do.
    """
    check_size(size, size_of)
    ready = _ready(model, data, check_margin(margin), options)
    return ready.lossless(size, size_of=size_of, margin=margin)


def compact(
    model: nn.Module,
    data: object,
    *,
    margin: float = DEFAULT_MARGIN,
    certified: bool = False,
    **options: Unpack[Options],
) -> Result:
    """The smallest model whose mean loss is no worse than the original's by more than a margin.

    Arguments are those of ``lossless``. Where none is shown to be, the result holds the best one
    seen, and its certificate doesn't hold. ``certified`` tests all sizes tried, mild to strong.
    """
    ready = _ready(model, data, check_margin(margin), options)
    return ready.compact(margin=margin, certified=certified)


def prepare(model: nn.Module, data: object, **options: Unpack[Options]) -> Preparation:
    """Everything that does not depend on the size; arguments and errors as of ``lossless``."""
    return _ready(model, data, None, options)


def _ready(model: nn.Module, data: object, margin: float | None, given: Options) -> Preparation:
    settings, loss, metrics, guard, progress, offload, folder = read_options(given, model)
    data = enough_held_out(data, settings, metrics, margin)
    run = Run(model, offload.kept, progress)
    with run.as_it_was():
        inputs = open_inputs(model, data, settings, loss=loss, metrics=metrics)
        offload = same_run(inputs, settings, offload, folder)
        guarded = open_guard(inputs, data, guard, settings, progress)
        held_out = HeldOut.sealed(inputs.held_out, settings, metrics, margin, guarded)
        study = study_of(inputs, settings, progress=progress, offload=offload, kept=folder)
        if settings.damping == "auto":
            study, settings = choose_damping(study, settings, progress=progress)
        begun = start_round(study, settings, progress=progress, release=True)
    return Preparation(begun, held_out, run.prepared())


@dataclass(frozen=True, repr=False)
class Preparation(Prepared):
    """A model that is ready to be factorized at any size, by both algorithms."""

    _held_out: HeldOut
    _run: Run

    def lossless(
        self, size: float, *, size_of: SizeOf = "model", margin: float = DEFAULT_MARGIN
    ) -> Result:
        """The best model of a size; see ``rankfold.lossless``."""
        asked: dict[str, Any] = {"size": float(check_size(size, size_of)), "size_of": size_of}
        self._held_out.check(margin)
        with self._run.as_it_was():
            same_target(f"{asked}, margin {margin}")
            tried = of_size(self._round, self._round.budget(**asked))
            opened = self._held_out.test([chosen := lowest(tried)], margin)
            return result_of("lossless", chosen, opened, asked, tried, self._run)

    def compact(self, *, margin: float = DEFAULT_MARGIN, certified: bool = False) -> Result:
        """The smallest model within a margin; see ``rankfold.compact``."""
        self._held_out.check(margin)
        asked = {"certified": True} if check_flag("certified", certified) else {}
        with self._run.as_it_was():
            same_target(f"{asked}, margin {margin}")
            tried = within_margin(self._round, margin)
            order = mild_to_strong(tried) if certified else [favoured(tried, margin)]
            opened = self._held_out.test(order, margin)
            return result_of("compact", order[opened.place], opened, asked, tried, self._run, order)

    def sweep(
        self, sizes: Sequence[float], *, size_of: SizeOf = "model", margin: float = DEFAULT_MARGIN
    ) -> Sweep:
        """A result for each of several sizes, all tested on the one held-out part."""
        asked: Any = {"size_of": size_of, "margin": margin}
        return Sweep([self.lossless(size, **asked) for size in check_sizes(sizes, size_of)])
