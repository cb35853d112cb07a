"""Everything that decides a result, checked where it is stated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, cast, get_args

from typing_extensions import TypedDict

from rankfold.certificate.statement import (
    ACCURACY,
    DEFAULT_CONFIDENCE,
    TESTS,
    TestName,
    check_metric_margin,
)
from rankfold.errors import InputError
from rankfold.forms.storage import STORAGES, Storage
from rankfold.machine.offload import Offload
from rankfold.machine.progress import Progress, SilentProgress, TrimmingProgress
from rankfold.maths.gradient import STEP_ESTIMATORS, StepEstimator
from rankfold.maths.linalg import Damping
from rankfold.objective import OBJECTIVES, Cost, ObjectiveName
from rankfold.statistics.labels import Curvature
from rankfold.tasks.evaluation import Metric
from rankfold.tasks.losses import TaskName
from rankfold.tasks.supervised import LossFunction

SizeOf: TypeAlias = Literal["model", "factorizable"]


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result, recorded in the artifact.

    Attributes:
        task: One of ``TASKS``; None to recognise it from the model and the data.
        objective: What is minimised; one of ``OBJECTIVES``.
        form: ``pivoted`` (fewest parameters) or ``pair`` (two stock layers).
        conv_forms: Whether a conv with several taps may also become two convs along one axis
            each, or a Tucker-2 of three (``conv_modules``), where the objective predicts the loss.
        block_forms: Whether a pivoted Linear or 1x1 conv whose matrix is much longer than wide may
            also become two blocks, each with a rank of its own (``block_modules``), likewise.
        embeddings: Whether embedding matrices are factorized, too, and output layers that share
            them or have too many outputs for a Gram. They are factorizable parameters then.
        cost: What the size counts: ``parameters`` or ``flops``.
        curvature: ``empirical``, ``sampled``, or ``auto``: by what the calibration loss shows.
        damping: Added to A, as a share of its mean eigenvalue; ``auto`` chooses among ``DAMPINGS``
            on selection data, for both Grams.
        output_damping: The same for B; None for the value of ``damping``.
        shrinkage: Whether one half of the calibration examples says what the Grams of the other
            lack; a Gram that lacks more than the damping is damped by that (``shrinkage``).
        gradient_step: Whether the joint objective moves the weights by its gradient term.
        step_estimator: How that term is estimated: ``cross-validated``, ``denoised`` or ``raw``.
        step_groups: Groups of neighbouring layers that have a length each; 1 for one length.
        self_share: Share that text of the language model's own has in what A and B are collected
            on: .5 adds as much as the user gave; see ``integrations.transformers.own_text``.
        rounds: Times that the statistics are collected: more than one compresses in parts.
        interactions: Whether the plan is made again once a first one has shown each layer's share
            in the change of all of them together; see ``interactions``.
        refit: Whether the result's layers are fitted once more to the inputs that the others have
            changed, and stay so where selection data prefer it; see ``refit``.
        seed: Seeds the split, the choice of examples and sampled labels.
        limit: Calibration examples used; None for the task's default.
        selection_limit: Selection examples used, likewise.
        held_out_limit: Held-out examples used, likewise.
        include: Glob patterns of layers to factorize; empty for all.
        exclude: Glob patterns of layers to leave as they are.
        confidence: Of the certificate's one-sided bounds.
        test: Of the certificate: ``bounded`` (any distribution, up to a largest change of one
            example), ``t`` (assumes a nearly normal mean) or ``betting`` (may stop early).
        largest_change: The largest change of one example that counts in full, in the unit of the
            loss; None for a range that the selection data give. Not for ``t``.
        accuracy_margin: How much of the accuracy may be lost, as a share; None only reports it.
        private: Keep the held-out examples' single losses out of the artifact.
        batch_size: Examples a batch; None for a size that suits the examples.

    Raises:
        InputError: A value is not one of those allowed.
    """

    task: TaskName | None = None
    objective: ObjectiveName = "joint"
    form: Storage = "pivoted"
    conv_forms: bool = True
    block_forms: bool = True
    embeddings: bool = False
    cost: Cost = "parameters"
    curvature: Curvature | Literal["auto"] = "auto"
    damping: float | Literal["auto"] = 0.1
    output_damping: float | None = None
    shrinkage: bool = True
    gradient_step: bool = True
    step_estimator: StepEstimator = "cross-validated"
    step_groups: int = 1
    self_share: float = 0.0
    rounds: int = 1
    interactions: bool = True
    refit: bool = True
    seed: int = 0
    limit: int | None = None
    selection_limit: int | None = None
    held_out_limit: int | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    confidence: float = DEFAULT_CONFIDENCE
    test: TestName = "bounded"
    largest_change: float | None = None
    accuracy_margin: float | None = None
    private: bool = False
    batch_size: int | None = None

    def __post_init__(self) -> None:
        """Refuse values outside their ranges, by name."""
        check_choice("objective", self.objective, tuple(OBJECTIVES))
        if self.embeddings and OBJECTIVES[self.objective].allocation != "multiplier":
            raise InputError(
                f"embeddings need an objective that predicts the loss by curvature (kronecker or "
                f"joint), not {self.objective}; leave embeddings out."
            )
        check_choice("form", self.form, STORAGES)
        check_choice("cost", self.cost, get_args(Cost))
        check_choice("curvature", self.curvature, ("auto", "empirical", "sampled"))
        check_choice("step_estimator", self.step_estimator, STEP_ESTIMATORS)
        for name in ("damping", "output_damping"):
            value = getattr(self, name)
            known = value == "auto" if name == "damping" else value is None
            if not (known or (not isinstance(value, str) and 0 <= value < math.inf)):
                expected = "a finite number, 0 or more" + ", or auto" * (name == "damping")
                raise InputError(f"{name} is {value}; expected {expected}.")
        if self.damping == "auto" and self.output_damping is not None:
            raise InputError(
                "damping is auto, which chooses the output damping too; leave output_damping out."
            )
        for name in ("rounds", "step_groups"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected 1 or more.")
        if not 0 <= self.self_share <= 0.9:
            raise InputError(
                f"self_share is {self.self_share}; expected a share of the text that is "
                "calibrated on, between 0 and 0.9."
            )
        if not 0.5 < self.confidence < 1:
            raise InputError(f"confidence is {self.confidence}; expected between 0.5 and 1.")
        check_choice("test", self.test, TESTS)
        if self.largest_change is not None and not 0 < self.largest_change < math.inf:
            raise InputError(
                f"largest_change is {self.largest_change}; expected a finite number above 0, in "
                "nats of one example's loss."
            )
        if self.largest_change is not None and self.test == "t":
            raise InputError("largest_change has no part in the t test; leave one of them out.")
        if self.accuracy_margin is not None:
            check_metric_margin(ACCURACY, self.accuracy_margin)
        for name in ("limit", "selection_limit", "held_out_limit"):
            value = getattr(self, name)
            if value is not None and value < 4:
                raise InputError(f"{name} is {value}; expected at least 4 examples.")
        if self.batch_size is not None and self.batch_size < 1:
            raise InputError(f"batch_size is {self.batch_size}; expected 1 or more.")

    @property
    def dampings(self) -> Damping:
        """Of A and of B.

        Raises:
            ValueError: They are still to be chosen.
        """
        if self.damping == "auto":
            raise ValueError("the damping is chosen on selection data first; see prepare")
        output = self.damping if self.output_damping is None else self.output_damping
        return Damping(self.damping, output)


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse a value that is not one of those allowed.

    Raises:
        InputError: As said.
    """
    if value not in allowed:
        raise InputError(f"{name} is {value!r}; expected one of {', '.join(allowed)}.")


def check_size(size: float) -> None:
    """Refuse a size outside (0, 1].

    Raises:
        InputError: As said.
    """
    if not 0 < size <= 1:
        raise InputError(
            f"the size is {size}; expected the share that is kept, above 0 and at most 1 "
            "(0.9 keeps 90 % of the parameters)."
        )


class SettingKeywords(TypedDict, total=False):
    """The fields of ``Settings`` as keywords of a function: ``**settings``, typed.

    It is written out since type checkers read no other form; a test compares it with ``Settings``.
    """

    task: TaskName | None
    objective: ObjectiveName
    form: Storage
    conv_forms: bool
    block_forms: bool
    embeddings: bool
    cost: Cost
    curvature: Curvature | Literal["auto"]
    damping: float | Literal["auto"]
    output_damping: float | None
    shrinkage: bool
    gradient_step: bool
    step_estimator: StepEstimator
    step_groups: int
    self_share: float
    rounds: int
    interactions: bool
    refit: bool
    seed: int
    limit: int | None
    selection_limit: int | None
    held_out_limit: int | None
    include: Sequence[str]
    exclude: Sequence[str]
    confidence: float
    test: TestName
    largest_change: float | None
    accuracy_margin: float | None
    private: bool
    batch_size: int | None


class Options(SettingKeywords, total=False):
    """Keywords that ``lossless``, ``compact`` and ``prepare`` share, beside those of ``Settings``.

    Attributes:
        loss: ``loss(model, batch)`` giving one loss per example, where it isn't recognised.
        metrics: Certified beside the loss; those with a margin must hold too.
        progress: For example ``rankfold.TerminalProgress()``.
        offload_folder: Statistics, steps and spectra of all layers lie in files of this folder
            (``rankfold.machine.offload``), not in memory; the model must be on the CPU.
    """

    loss: LossFunction | None
    metrics: Sequence[Metric]
    progress: Progress | None
    offload_folder: str | Path | None


class Asked(NamedTuple):
    """The keywords of a run, read; fields as of ``Options``."""

    settings: Settings
    loss: LossFunction | None
    metrics: tuple[Metric, ...]
    progress: Progress
    offload: Offload


def read_options(options: Options) -> Asked:
    """Settings and what is none of them, of the keywords of a call.

    Raises:
        InputError: A setting is out of its range.
        TypeError: There is no such keyword.
    """
    settings = dict(options)
    loss, metrics = settings.pop("loss", None), settings.pop("metrics", ())
    progress, folder = settings.pop("progress", None), settings.pop("offload_folder", None)
    return Asked(
        Settings(**cast("Any", settings)),
        cast("LossFunction | None", loss),
        tuple(cast("Sequence[Metric]", metrics)),
        TrimmingProgress(cast("Progress | None", progress) or SilentProgress()),
        Offload(None if folder is None else Path(cast("str", folder))),
    )
