"""A result's speed, measured in few rounds: a run of the tests makes a thousand results."""

from __future__ import annotations

from rankfold.machine import timing

# What a user's run has; ``tests/machine/test_timing.py`` tests the measurement with these.
AS_SHIPPED = {"MOST_ROUNDS": timing.MOST_ROUNDS, "BLOCK": timing.BLOCK}


def few_rounds() -> None:
    """In this process, from now on."""
    timing.MOST_ROUNDS = timing.FEWEST_ROUNDS
    timing.BLOCK = 0.0001  # seconds
