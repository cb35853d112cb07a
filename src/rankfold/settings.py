"""Everything that decides a result, checked where it is stated."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from numbers import Integral, Real
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    TypeAlias,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from typing_extensions import TypedDict

from rankfold.certificate.asked import ACCURACY, DEFAULT_CONFIDENCE, TestName, check_metric_margin
from rankfold.data.input_settings import repr_of_changes
from rankfold.effort import DECIDED, EFFORTS, Effort, EffortName
from rankfold.errors import InputError, check_kind
from rankfold.files.json_file import plain
from rankfold.forms.names import Storage
from rankfold.maths.names import StepEstimator
from rankfold.objective import OBJECTIVES, Cost, ObjectiveName
from rankfold.statistics.names import Curvature
from rankfold.tasks.names import TaskName

if TYPE_CHECKING:  # it imports torch, which takes seconds
    from rankfold.maths.linalg import Damping

SizeOf: TypeAlias = Literal["model", "factorizable"]

# The group of an option in the command line's help and in docs/options.md. The research panel holds
# what only an ablation needs; the help does not show it.
Panel: TypeAlias = Literal["Options", "Data", "Certificate", "Search", "Advanced", "Research"]
EVERYDAY: Panel = "Options"
RESEARCH: Panel = "Research"
SEEDS = 1 << 63  # that torch takes


@dataclass(frozen=True)
class Option:
    """A field of ``Settings``, as the command line and the documentation show it.

    Attributes:
        name: In Python.
        type: Its annotation.
        default: Its value where none is given.
        help: What it means.
        panel: The group of options that it stands in.
        unset: What None stands for.
    """

    name: str
    type: Any
    default: Any
    help: str
    panel: Panel
    unset: str | None

    @property
    def alternatives(self) -> tuple[Any, ...]:
        """The types that its value may have; of a plain type that one."""
        union = get_origin(self.type) in (Union, UnionType)
        return get_args(self.type) if union else (self.type,)

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that its value may be."""
        literals = (one for one in self.alternatives if get_origin(one) is Literal)
        return tuple(str(word) for one in literals for word in get_args(one))


def _shown(help: str, panel: Panel, unset: str | None = None) -> dict[str, str | None]:
    """What ``Option`` says of a field."""
    return {"help": help, "panel": panel, "unset": unset}


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result, recorded in the artifact.

    Its fields are keywords of ``lossless``, ``compact`` and ``prepare``. What each means is said
    beside it; ``docs/options.md`` and ``rankfold lossless --help`` are made from that.

    Raises:
        InputError: A value is not one of those allowed.
    """

    task: TaskName | None = field(
        default=None,
        metadata=_shown(
            "What the model is for; teacher and embedding need no labels.",
            "Options",
            unset="as the model and the data show",
        ),
    )
    effort: EffortName = field(
        default="standard",
        metadata=_shown(
            "How much time the run may take: fast is a first look, thorough tries everything.",
            "Options",
        ),
    )
    objective: ObjectiveName = field(
        default="joint", metadata=_shown("What is minimised.", "Search")
    )
    form: Storage = field(
        default="pivoted",
        metadata=_shown(
            "How factors are stored: pivoted has the fewest parameters, pair is two stock layers.",
            "Search",
        ),
    )
    conv_forms: bool | None = field(
        default=None,
        metadata=_shown(
            "Let a conv of several taps become two convs along one axis each, or a Tucker-2, "
            "where that predicts a lower loss.",
            "Advanced",
            unset="as effort",
        ),
    )
    block_forms: bool | None = field(
        default=None,
        metadata=_shown(
            "Let a pivoted Linear or 1x1 conv much longer than wide become two blocks, each with "
            "its own rank, where that predicts a lower loss.",
            "Advanced",
            unset="as effort",
        ),
    )
    embeddings: bool = field(
        default=False,
        metadata=_shown(
            "Factorize embeddings too, and output layers that share them or have too many "
            "outputs for a Gram.",
            "Search",
        ),
    )
    cost: Cost = field(default="parameters", metadata=_shown("What sizes count.", "Search"))
    curvature: Literal["auto"] | Curvature = field(
        default="auto",
        metadata=_shown(
            "Whose labels the curvature is of: the data's (empirical) or drawn from the model's "
            "predictions (sampled). auto decides by the calibration loss.",
            "Research",
        ),
    )
    damping: float | Literal["auto"] = field(
        default=0.1,
        metadata=_shown(
            "Added to the Grams, as a share of their mean eigenvalue. auto chooses on selection "
            "data.",
            "Advanced",
        ),
    )
    output_damping: float | None = field(
        default=None,
        metadata=_shown(
            "Damping of the Grams of output gradients.", "Research", unset="as damping"
        ),
    )
    shrinkage: bool = field(
        default=True,
        metadata=_shown(
            "Damp a Gram of few examples by what halves of the calibration data show that it "
            "lacks, where that is more than the damping.",
            "Advanced",
        ),
    )
    smaller_side: bool | None = field(
        default=None,
        metadata=_shown(
            "Collect the Gram of each layer's smaller side alone: less time and memory, no block "
            "or conv forms, and a step by the longer side's diagonal.",
            "Advanced",
            unset="as effort",
        ),
    )
    gradient_step: bool = field(
        default=True,
        metadata=_shown("Let the joint objective move the weights by its gradient term.", "Search"),
    )
    step_estimator: StepEstimator = field(
        default="cross-validated",
        metadata=_shown("How the gradient term is estimated.", "Research"),
    )
    step_groups: int = field(
        default=1,
        metadata=_shown("Groups of neighbouring layers that have a step length each.", "Research"),
    )
    self_share: float = field(
        default=0.0,
        metadata=_shown(
            "Share of the calibration text that the language model writes itself: 0.5 adds as "
            "much as the data given.",
            "Search",
        ),
    )
    rounds: int | None = field(
        default=None,
        metadata=_shown(
            "Times that statistics are collected: 2 or more compress in parts.",
            "Search",
            unset="as effort",
        ),
    )
    interactions: bool | None = field(
        default=None,
        metadata=_shown(
            "Plan again once a first plan has shown how the layers' errors add up.",
            "Advanced",
            unset="as effort",
        ),
    )
    refit: bool | None = field(
        default=None,
        metadata=_shown(
            "Fit each factorized layer once more to the inputs that the others have changed, "
            "where selection data prefer it.",
            "Advanced",
            unset="as effort",
        ),
    )
    seed: int = field(
        default=0,
        metadata=_shown(
            "Seed of the split, the choice of examples and the sampled labels.", "Data"
        ),
    )
    limit: int | None = field(
        default=None,
        metadata=_shown(
            "Calibration examples used.", "Options", unset="64 windows of text, or 2048"
        ),
    )
    selection_limit: int | None = field(
        default=None,
        metadata=_shown("Selection examples used.", "Data", unset="32 windows of text, or 2048"),
    )
    held_out_limit: int | None = field(
        default=None,
        metadata=_shown("Held-out examples used.", "Data", unset="128 windows of text, or 10000"),
    )
    include: Sequence[str] = field(
        default=(),
        metadata=_shown("Factorize only layers whose name matches this pattern.", "Options"),
    )
    exclude: Sequence[str] = field(
        default=(),
        metadata=_shown("Leave layers whose name matches this pattern as they are.", "Options"),
    )
    confidence: float = field(
        default=DEFAULT_CONFIDENCE,
        metadata=_shown("Confidence of the certificate's one-sided bounds.", "Certificate"),
    )
    test: TestName = field(
        default="bounded",
        metadata=_shown(
            "Test of the certificate. bounded holds for any distribution, up to the largest "
            "change of one example; t assumes a nearly normal mean; betting may stop early.",
            "Certificate",
        ),
    )
    largest_change: float | None = field(
        default=None,
        metadata=_shown(
            "The largest change of one example's loss that counts in full, in nats. Not for the "
            "test t.",
            "Certificate",
            unset="what the selection data show",
        ),
    )
    accuracy_margin: float | None = field(
        default=None,
        metadata=_shown(
            "Share of the accuracy that may be lost.", "Certificate", unset="only reported"
        ),
    )
    guard_margin: float | None = field(
        default=None,
        metadata=_shown(
            "Change of the mean loss on text of other kinds (guard), in nats, up to which the "
            "verdict holds: both must then be shown.",
            "Certificate",
            unset="only reported",
        ),
    )
    private: bool = field(
        default=False,
        metadata=_shown(
            "Keep the held-out examples' single losses out of the artifact.", "Certificate"
        ),
    )
    batch_size: int | None = field(
        default=None, metadata=_shown("Examples a batch.", "Data", unset="what suits the examples")
    )

    __repr__ = repr_of_changes

    def __post_init__(self) -> None:
        """Refuse values outside their ranges, by name; what the effort decides is decided."""
        for name, option in setting_options().items():
            _check_kind(name, given := getattr(self, name), option)
            object.__setattr__(self, name, plain(given))
        for name in DECIDED:
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(EFFORTS[self.effort], name))
        _check_ranges(self)

    @property
    def efforts(self) -> Effort:
        """What the effort stands for."""
        return EFFORTS[self.effort]

    @property
    def dampings(self) -> Damping:
        """Of A and of B.

        Raises:
            ValueError: They are still to be chosen.
        """
        if self.damping == "auto":
            raise ValueError("the damping is chosen on selection data first; see prepare")
        from rankfold.maths.linalg import Damping

        output = self.damping if self.output_damping is None else self.output_damping
        return Damping(self.damping, output)


class SettingKeywords(TypedDict, total=False):
    """The fields of ``Settings`` as keywords of a function: ``**settings``, typed.

    It is written out since type checkers read no other form; a test compares it with ``Settings``.
    """

    task: TaskName | None
    effort: EffortName
    objective: ObjectiveName
    form: Storage
    conv_forms: bool | None
    block_forms: bool | None
    embeddings: bool
    cost: Cost
    curvature: Literal["auto"] | Curvature
    damping: float | Literal["auto"]
    output_damping: float | None
    shrinkage: bool
    smaller_side: bool | None
    gradient_step: bool
    step_estimator: StepEstimator
    step_groups: int
    self_share: float
    rounds: int | None
    interactions: bool | None
    refit: bool | None
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
    guard_margin: float | None
    private: bool
    batch_size: int | None


@cache
def setting_options() -> dict[str, Option]:
    """The fields of ``Settings`` by name, with their help and panel."""
    types = get_type_hints(Settings)
    return {
        one.name: Option(one.name, types[one.name], one.default, **one.metadata)
        for one in fields(Settings)
    }


def _check_ranges(settings: Settings) -> None:
    """Refuse values outside their ranges, and those that contradict each other."""
    check_choice("objective", settings.objective, tuple(OBJECTIVES))
    if settings.embeddings and OBJECTIVES[settings.objective].allocation != "multiplier":
        raise InputError(
            f"embeddings need an objective that predicts the loss by curvature (kronecker or "
            f"joint), not {settings.objective}; leave embeddings out."
        )
    _check_damping("damping", settings.damping, "auto")
    _check_damping("output_damping", settings.output_damping, None)
    if settings.damping == "auto" and settings.output_damping is not None:
        raise InputError(
            "damping is auto, which chooses the output damping too; leave output_damping out."
        )
    for name in ("rounds", "step_groups"):
        if getattr(settings, name) < 1:
            raise InputError(f"{name} is {getattr(settings, name)}; expected 1 or more.")
    if not 0 <= settings.self_share <= 0.9:
        raise InputError(
            f"self_share is {settings.self_share}; expected a share of the text that is "
            "calibrated on, between 0 and 0.9."
        )
    if not 0.5 < settings.confidence < 1:
        raise InputError(f"confidence is {settings.confidence}; expected between 0.5 and 1.")
    if settings.largest_change is not None and not 0 < settings.largest_change < math.inf:
        raise InputError(
            f"largest_change is {settings.largest_change}; expected a finite number above 0, in "
            "nats of one example's loss."
        )
    if settings.largest_change is not None and settings.test == "t":
        raise InputError("largest_change has no part in the t test; leave one of them out.")
    if settings.accuracy_margin is not None:
        check_metric_margin(ACCURACY, settings.accuracy_margin)
    if settings.guard_margin is not None and not 0 <= settings.guard_margin < math.inf:
        raise InputError(
            f"guard_margin is {settings.guard_margin}; expected 0 or more, in nats of mean loss on "
            "text of other kinds."
        )
    if not 0 <= settings.seed < SEEDS:
        raise InputError(f"seed is {settings.seed}; expected a whole number, 0 to {SEEDS - 1}.")
    for name in ("limit", "selection_limit", "held_out_limit"):
        value = getattr(settings, name)
        if value is not None and value < 4:
            raise InputError(f"{name} is {value}; expected at least 4 examples.")
    if settings.batch_size is not None and settings.batch_size < 1:
        raise InputError(f"batch_size is {settings.batch_size}; expected 1 or more.")


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse a value that is not one of those allowed.

    Raises:
        InputError: As said.
    """
    if value not in allowed:
        raise InputError(f"{name} is {value!r}; expected one of {', '.join(allowed)}.")


def _check_kind(name: str, value: object, option: Option) -> None:
    """Refuse a value that is of none of an option's types, or none of its words."""
    if name in ("task", "objective"):
        return  # a task is recognised with its near misses; objectives may be registered
    if option.choices and isinstance(value, str):
        check_choice(name, value, option.choices)
        return
    if value is None and type(None) in option.alternatives:
        return
    known = {
        bool: isinstance(value, bool),
        int: isinstance(value, Integral) and not isinstance(value, bool),
        float: isinstance(value, Real) and not isinstance(value, bool),
    }
    kinds = [kind for kind in known if kind in option.alternatives]
    of_texts = any(get_origin(kind) is Sequence for kind in option.alternatives)
    if of_texts and not _are_texts(value):
        raise InputError(f"{name} is {value!r}; expected a list of patterns.")
    if (kinds or option.choices) and not any(known[kind] for kind in kinds):
        words = {bool: "True or False", int: "a whole number", float: "a number"}
        expected = " or ".join([*(words[kind] for kind in kinds), *option.choices])
        raise InputError(f"{name} is {value!r}; expected {expected}.")


def _are_texts(value: object) -> bool:
    is_list = isinstance(value, Iterable) and not isinstance(value, str)
    return is_list and all(isinstance(one, str) for one in cast("Iterable[object]", value))


def _check_damping(name: str, value: object, otherwise: str | None) -> None:
    known = value == otherwise or (isinstance(value, int | float) and 0 <= value < math.inf)
    if not known:
        or_auto = "" if otherwise is None else f", or {otherwise}"
        raise InputError(f"{name} is {value}; expected a finite number, 0 or more{or_auto}.")


def check_size(size: float, size_of: SizeOf = "model") -> float:
    """The size; one is refused that is outside (0, 1], or one that is a share of something unknown.

    Raises:
        InputError: As said.
    """
    check_choice("size_of", size_of, get_args(SizeOf))
    expected = (
        "the share that is kept, a number above 0 and at most 1 (0.9 keeps 90 % of the parameters)"
    )
    check_kind("the size", size, Real, expected)
    if not 0 < size <= 1:
        raise InputError(f"the size is {size}; expected {expected}.")
    return size
