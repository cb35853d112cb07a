"""Effort: how much time a run may take, in one word in place of many settings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

EffortName: TypeAlias = Literal["fast", "standard", "thorough"]


@dataclass(frozen=True)
class Effort:
    """What a word stands for.

    The first ones are settings of the same name, which go before it where they are given.

    Attributes:
        smaller_side: Only the Gram of each layer's smaller side is collected.
        conv_forms: Convs may become two along one axis each, or a Tucker-2.
        block_forms: Long layers may become two blocks.
        interactions: Plans are made again with what a first one has shown.
        refit: Layers are fitted again to what the others have changed.
        rounds: How often statistics are collected.
        corrections: How often interactions are measured in any case.
        most_corrections: And how often while plans get better.
        correction_power: How far predictions go towards what was measured, in logarithms.
        compared_on: Share of the selection examples on which lengths of the step are compared.
        plans: How many plans a search within a margin measures in a round.
        refits: And how many it fits again.
        guard: Texts of other kinds than the user's that are measured beside the verdict.
    """

    smaller_side: bool
    conv_forms: bool
    block_forms: bool
    interactions: bool
    refit: bool
    rounds: int
    corrections: int
    most_corrections: int
    correction_power: float
    compared_on: float
    plans: int
    refits: int
    guard: int


# The settings that an effort decides where they are not given.
DECIDED = ("smaller_side", "conv_forms", "block_forms", "interactions", "refit", "rounds")

_STANDARD = Effort(
    smaller_side=False,
    conv_forms=True,
    block_forms=True,
    interactions=True,
    refit=True,
    rounds=1,
    corrections=2,
    most_corrections=6,
    correction_power=0.5,
    compared_on=0.5,
    plans=7,
    refits=3,
    guard=32,
)

EFFORTS: dict[EffortName, Effort] = {
    "fast": Effort(
        smaller_side=True,
        conv_forms=False,
        block_forms=False,
        interactions=False,
        refit=False,
        rounds=1,
        corrections=1,
        most_corrections=1,
        correction_power=0.75,
        compared_on=0.25,
        plans=4,
        refits=1,
        guard=16,
    ),
    "standard": _STANDARD,
    "thorough": replace(_STANDARD, rounds=2, compared_on=1.0, guard=64),
}
