"""Examples that are not of the user's kind: the model's own text, or what the user gives.

A verdict is about data like the held-out part. What else a smaller model has lost shows here; no
choice of the search is made by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.certificate.change import paired_change
from rankfold.certificate.openings_file import SHORT
from rankfold.certificate.other_kinds import OTHER_DATA, OTHER_TEXT, Kind, Origin, OtherKinds
from rankfold.certificate.statement import Statement, in_order_of_bets, state
from rankfold.data.account import WRITTEN
from rankfold.data.copies import without_copies_of
from rankfold.data.example import example_input
from rankfold.data.given import up_to
from rankfold.data.parts import FEWEST, USUAL_LIMITS, Data, Part, as_part, drawn, refuse_unlike
from rankfold.errors import InputError
from rankfold.integrations.transformers import own_text, task_hint, writes_text
from rankfold.machine import processes
from rankfold.machine.memory import memory_ran_out
from rankfold.machine.progress import Progress
from rankfold.search.study import DEFAULT_LIMITS, Inputs, limits_of
from rankfold.search.trial import Trial
from rankfold.settings import Settings
from rankfold.statistics.labels import without_unlabelled
from rankfold.tasks.evaluation import Evaluation, evaluate
from rankfold.tasks.losses import TEXT, Task

TOKENS = 64  # of a text that the model writes, at most
AT_ONCE = 16  # texts that it writes in one batch
CHEAP = 10  # times that the calibration part has more tokens than the own text, where it can
TIMES = 32  # examples of one term that are worth a text
SHARE = 0.25  # of the examples, kept apart for the range
RANGING = "kept apart, for how far one example's change may go"
NAME = "guard"
MASK = "attention_mask"


@dataclass(frozen=True)
class Guard:
    """Examples that are not of the user's kind, with the original's losses.

    Attributes:
        part: The examples; None where there are none.
        ranging: Others of the same kind, which say how far one example's change may go where it is
            to be shown, and nobody has stated that.
        origin: Where they come from; None where there are none.
        missing: Why there are none.
        name: What they are called.
        task: Gives the loss.
        original: The original's losses on them.
        settings: Margin, size of a batch.
    """

    part: Part | None
    ranging: Part | None
    origin: Origin | None
    missing: str | None
    name: str
    task: Task
    original: Evaluation | None
    settings: Settings

    @property
    def units(self) -> int:
        """Independent units."""
        return 0 if self.part is None else len(self.part.examples)

    @property
    def stated(self) -> bool:
        """Whether the verdict holds only if these examples' holds."""
        return self.part is not None and self.settings.guard_margin is not None

    def of(self, trial: Trial, model: nn.Module) -> OtherKinds:
        """Evaluate the model of a plan; what is claimed of it here is stated before."""
        origin, progress = self.origin, trial.round.progress
        if self.part is None:
            return OtherKinds(origin, self.missing, self.name, self.task.unit)
        stated = self._statement(trial, model) if self.stated else None
        found = _losses(self, self.part, model, "factorized on other kinds", progress)
        unit = self.task.unit
        return OtherKinds(origin, None, self.name, unit, self.original, found, stated)

    def _statement(self, trial: Trial, model: nn.Module) -> Statement:
        """Its range is of other examples of this kind; data of the user's kind would not tell."""
        change, differences = trial.change, trial.differences
        if self.ranging is not None:
            pair = [
                _losses(self, self.ranging, one, "range of other kinds", trial.round.progress)
                for one in (trial.round.study.subject.unpacked.given, model)
            ]
            change, differences = paired_change(*pair), pair[1].losses - pair[0].losses
        settings = self.settings
        return state(
            change,
            differences,
            self.units,
            margin=settings.guard_margin or 0.0,
            confidence=settings.confidence,
            test=settings.test,
            largest_change=settings.largest_change,
            metric_margins={},
        )


def open_guard(
    inputs: Inputs, data: Data, given: object, settings: Settings, progress: Progress | None
) -> Guard | None:
    """The examples, with the original's losses; None where nothing is to be said of other kinds.

    Args:
        inputs: The model and the user's data: what stands there is no example of another kind.
        data: Whose function makes batches.
        given: The user's examples of other kinds, or None for the model's own text.
        settings: Seed, effort, margin.
        progress: Shows what is done.

    Raises:
        InputError: The examples can't be used, or a margin is stated and there are none.
    """
    margin, found = settings.guard_margin, None
    if given is not None:
        found = _given(inputs, data, given, settings)
    elif _of_language(inputs):
        found = _written(inputs, settings, progress)
    if margin is not None and (found is None or found.part is None):
        why = found.missing if found else "only a language model can write some of its own"
        raise InputError(
            f"guard_margin is {margin:g}, but there are no examples of other kinds to show it on: "
            f"{why}. Give some with guard=, or leave guard_margin out."
        )
    if found is None or found.part is None:
        return found
    model = inputs.subject.unpacked.given
    original = _losses(found, found.part, model, "original on other kinds", progress)
    return replace(found, original=original)


def _of_language(inputs: Inputs) -> bool:
    hint = task_hint(inputs.subject.unpacked.given)
    return inputs.task.name in TEXT or (inputs.task.name == "teacher" and hint in TEXT)


def _given(inputs: Inputs, data: Data, given: object, settings: Settings) -> Guard:
    """The user's examples, so many as the effort is worth; with a margin as many as are held out.

    Raises:
        InputError: They are of another form than the user's data, or too few.
    """
    if isinstance(given, Data):
        raise InputError("guard= is three parts; expected one data set, or a sequence of examples.")
    task, usual = inputs.task, DEFAULT_LIMITS.get(inputs.task.name, USUAL_LIMITS)
    limit = settings.efforts.guard * (1 if task.name in TEXT else TIMES)
    if settings.guard_margin is not None:
        limit = limits_of(settings, usual)[-1]
    try:
        examples, _ = drawn(up_to(given, limit), limit, settings.seed)
    except InputError as error:
        raise InputError(f"guard=: {error}") from error
    part = as_part(NAME, examples, data.collate)
    refuse_unlike([inputs.parts["calibration"], part])
    _refuse_few(part)
    others = [*inputs.parts.values(), inputs.held_out]
    left = without_copies_of(without_unlabelled(part, task), others)
    _refuse_few(left)
    account = None if examples.account is None else examples.account.as_dict()
    told = [] if account is None else account["told"]
    return _guard(inputs, settings, left, "given", settings.seed, told)


def _guard(
    inputs: Inputs, settings: Settings, part: Part, kind: Kind, seed: int, told: Sequence[str] = ()
) -> Guard:
    """Of usable examples; some of them are kept apart where a range is to be stated."""
    name = OTHER_TEXT if _of_language(inputs) else OTHER_DATA
    ranging = None
    if settings.guard_margin is not None and settings.test != "t" and not settings.largest_change:
        places = part.spread_places(max(FEWEST, round(SHARE * len(part.examples))))
        ranging, part = part.take(places), part.without(dict.fromkeys(places, RANGING))
        _refuse_few(part)
    if settings.test == "betting":
        part = in_order_of_bets(part)
    own = kind == "own text"
    texts = [_tokens(example).tolist() for example in part.examples] if own else None
    digests = [digest[:SHORT] for digest in part.digests]
    origin = Origin(kind, seed, part.usage(), digests, told, texts)
    return Guard(part, ranging, origin, None, name, inputs.task, None, settings)


def _refuse_few(part: Part) -> None:
    if len(part.examples) < FEWEST:
        reasons = "; ".join(f"{count} {reason}" for reason, count in part.left_out.items())
        raise InputError(
            f"guard= has {len(part.examples)} examples that can be used; at least {FEWEST} are "
            f"needed. Left out: {reasons or 'none'}. Give examples of another kind than the data."
        )


def _written(inputs: Inputs, settings: Settings, progress: Progress | None) -> Guard:
    """Text that the original writes itself, little beside the calibration part."""
    model, seed = inputs.subject.unpacked.given, (settings.seed << 20) + (1 << 19)
    source = inputs.held_out.source or ""

    def without(missing: str) -> Guard:
        return Guard(None, None, None, missing, OTHER_TEXT, inputs.task, None, settings)

    if not writes_text(model) or inputs.task.name not in ("causal-lm", "teacher"):
        return without(f"{type(model).__name__} writes no text alone; guard= takes text of yours")
    if source.startswith(WRITTEN):
        return without("the data are the model's own text already; guard= takes other text")
    calibration = inputs.parts["calibration"]
    lengths = [len(_tokens(example)) for example in calibration.examples]
    length = min(TOKENS, max(lengths))
    count, fewest = settings.efforts.guard, FEWEST
    if settings.guard_margin is None:
        count = max(FEWEST, min(count, sum(lengths) // (CHEAP * max(1, length))))
    else:
        fewest = 2 * FEWEST  # some are kept apart
    if length < 2:
        return without("the calibration examples have no token that follows another")
    try:
        windows = processes.from_first(
            lambda: own_text(model, count, length, seed, progress, min(2 * count, AT_ONCE)),
            "own text",
        )
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # a model of the user's raises what it likes
        if memory_ran_out(error):
            raise
        said = " ".join(str(error).split())
        return without(f"the model can't write: {type(error).__name__}: {said}")
    first = calibration.examples[0]
    examples = [_like(first, window) for window in windows]
    part = without_copies_of(as_part(NAME, examples), [*inputs.parts.values(), inputs.held_out])
    if len(part.examples) < fewest:
        return without(f"all but {len(part.examples)} texts that the model writes are the data's")
    return _guard(inputs, settings, part, "own text", seed)


def _tokens(example: Any) -> Tensor:
    """``(length,)`` ids of an example of text."""
    inputs = example_input(example)
    ids: Tensor = torch.as_tensor(inputs["input_ids"] if isinstance(inputs, Mapping) else inputs)
    return ids.flatten()


def _like(example: Any, ids: Tensor) -> Any:
    """A text in the form of an example: its ids alone, or by name with a mask."""
    if not isinstance(example, Mapping):
        return ids
    masks = {MASK: torch.ones_like(ids)} if MASK in example else {}
    return {"input_ids": ids, **masks}


def _losses(
    guard: Guard, part: Part, model: nn.Module, shown: str, progress: Progress | None
) -> Evaluation:
    """Where they are only measured they need not be finite."""
    return evaluate(
        model, guard.task, part,
        batch_size=guard.settings.batch_size, progress=progress, stage=shown, finite=guard.stated,
    )  # fmt: skip
