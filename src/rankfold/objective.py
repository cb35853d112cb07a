"""The objectives: what each minimises, what it needs, and how it spends a budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, cast, get_args

Cost: TypeAlias = Literal["parameters", "flops"]

ObjectiveName: TypeAlias = Literal[
    "svd", "fwsvd", "activation", "kronecker", "joint", "first-order"
]
OutputGram: TypeAlias = Literal["none", "diagonal", "full"]
Allocation: TypeAlias = Literal["uniform", "multiplier", "first-order"]
OUTPUT_GRAMS: tuple[OutputGram, ...] = get_args(OutputGram)
ALLOCATIONS: tuple[Allocation, ...] = get_args(Allocation)


@dataclass(frozen=True)
class Objective:
    """What an objective minimises, and what it needs.

    Attributes:
        input_gram: Whitens with A.
        output_gram: Whitens with B: ``none``, ``diagonal`` or ``full``.
        step: Moves the weights by the gradient term before truncating.
        allocation: ``uniform`` ratio, ``multiplier`` over predicted loss changes, or the greedy
            ``first-order`` rule. ``multiplier`` needs an output Gram.
        source: Where it comes from.

    Raises:
        ValueError: A word is none of these, or the loss is to be predicted without B.
    """

    input_gram: bool
    output_gram: OutputGram
    step: bool
    allocation: Allocation
    source: str

    def __post_init__(self) -> None:
        """Refuse words that mean nothing, and a prediction of the loss without its curvature."""
        for name, words in (("output_gram", OUTPUT_GRAMS), ("allocation", ALLOCATIONS)):
            if getattr(self, name) not in words:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {', '.join(words)}")
        if self.allocation == "multiplier" and self.output_gram == "none":
            raise ValueError(
                "the multiplier allocation predicts the loss by B; output_gram is none"
            )

    @property
    def needs_backward(self) -> bool:
        """Whether the statistics need gradients."""
        return self.output_gram != "none" or self.step or self.allocation == "first-order"

    @property
    def needs_data(self) -> bool:
        """Whether the statistics need data at all."""
        return self.input_gram or self.needs_backward

    @property
    def predicts_loss(self) -> bool:
        """Whether its curves are in the unit of the loss."""
        return self.allocation != "uniform"


OBJECTIVES: dict[ObjectiveName, Objective] = {
    "svd": Objective(False, "none", False, "uniform", "Eckart and Young 1936"),
    "fwsvd": Objective(
        False, "diagonal", False, "uniform", "Hsu et al. 2022, arXiv 2207.00112 (row weights)"
    ),
    "activation": Objective(
        True, "none", False, "uniform", "Wang et al. 2024, SVD-LLM, arXiv 2403.07378"
    ),
    "kronecker": Objective(
        True, "full", False, "multiplier", "K-FAC whitening on both sides; docs/theory.md, 1"
    ),
    "joint": Objective(True, "full", True, "multiplier", "docs/theory.md, 1 and 2"),
    "first-order": Objective(
        False, "none", False, "first-order", "arXiv 2412.06867 as summarised; docs/theory.md, 6"
    ),
}


def register_objective(name: str, objective: Objective) -> None:
    """Let ``Settings`` take a further objective.

    Raises:
        ValueError: There is one of this name.
    """
    if name in OBJECTIVES:
        raise ValueError(f"an objective {name!r} is registered already")
    OBJECTIVES[cast("ObjectiveName", name)] = objective


def unregister_objective(name: str) -> None:
    """Take a registered objective back, for tests."""
    del OBJECTIVES[cast("ObjectiveName", name)]
