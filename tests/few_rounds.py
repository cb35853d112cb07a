"""A result's speed, measured in few rounds: a run of the tests makes a thousand results."""

from __future__ import annotations

from rankfold.machine import timing

# What a user's run has; ``tests/machine/test_timing.py`` tests the measurement with these.
AS_SHIPPED = {name: getattr(timing, name) for name in ("FEWEST_ROUNDS", "MOST_ROUNDS", "BLOCK")}


def few_rounds() -> None:
    """In this process, from now on."""
    timing.FEWEST_ROUNDS = timing.MOST_ROUNDS = 1
    timing.BLOCK = 0.0001  # seconds
