"""How long calls take, beside each other, and what each stage of a run took.

Numbers of this module differ from run to run. They stand in no file that another run is to write
byte for byte again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from rankfold.machine.progress import Progress

Item = TypeVar("Item")
Call = Callable[[], object]

FEWEST_ROUNDS, MOST_ROUNDS = 3, 25
ENOUGH = 0.3  # seconds of rounds after which there are enough, if there are FEWEST_ROUNDS
BLOCK = 0.002  # seconds that the calls of one measurement take together, at least


def timed_beside(calls: Sequence[Call], seconds: float) -> list[list[float]]:
    """Time calls in turn, so that whatever else the machine does meets them alike.

    By ``torch.utils.benchmark``, with as many threads as torch has; it waits for a GPU.

    Args:
        calls: What is timed.
        seconds: They take so long at most, all rounds of all calls together.

    Returns:
        Of each call the seconds that one takes, in each round; none where so few seconds are not
        enough for a round.
    """
    # Here, since most commands time nothing and would wait for it.
    from torch.utils.benchmark import Timer

    threads = torch.get_num_threads()
    timers = [Timer("call()", globals={"call": call}, num_threads=threads) for call in calls]
    began = time.perf_counter()
    for call in calls:  # what is done once is no part of a call's time
        call()
    round_ = 2 * (time.perf_counter() - began)  # each measurement calls once before it measures
    found: list[list[float]] = [[] for _ in calls]
    while len(found[0]) < MOST_ROUNDS:
        now = time.perf_counter()
        if now - began + round_ > seconds:
            break
        if len(found[0]) >= FEWEST_ROUNDS and now - began > ENOUGH:
            break
        for timer, times in zip(timers, found, strict=True):
            times.append(timer.blocked_autorange(min_run_time=BLOCK).median)
        round_ = time.perf_counter() - now
    return found


@dataclass
class Stage:
    """One stage of a run.

    Attributes:
        name: As the progress shows it.
        seconds: That it took, of all times that it ran.
        megabytes: The most memory, in MB (of 1,000,000 bytes), that the process had taken until
            its end; None where the system doesn't tell.
    """

    name: str
    seconds: float
    megabytes: float | None


class Watch:
    """Another progress, that also keeps what each stage took.

    Attributes:
        timing: Whether the run measures times at all.
        stages: In the order in which they ran first. A stage within another is a part of it.
    """

    def __init__(self, shown: Progress, timing: bool) -> None:
        """Show what ``shown`` does."""
        self.shown, self.timing = shown, timing
        self.stages: list[Stage] = []
        self._within = 0

    def track(self, items: Iterable[Item], stage: str, total: int) -> Iterator[Item]:
        """Yield ``items`` as ``shown`` does."""
        began = time.perf_counter()
        self._within += 1
        try:
            yield from self.shown.track(items, stage, total)
        finally:
            self._within -= 1
            if not self._within:
                self._add(Stage(stage, time.perf_counter() - began, peak_megabytes()))

    def _add(self, one: Stage) -> None:
        for known in self.stages:
            if known.name == one.name:
                known.seconds += one.seconds
                known.megabytes = one.megabytes
                return
        self.stages.append(one)


def peak_megabytes() -> float | None:
    """The most memory that this process has taken so far, in MB; None where nobody tells."""
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
