"""What a long run tells its user: the stage it is in, how far it is, how long it will take."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichBars

from rankfold.errors import visible
from rankfold.machine.freed_memory import trim_freed_memory

Item = TypeVar("Item")
TRIM_EVERY = 3.0  # seconds, at least, between two steps of a stage: what is taken again costs time


class Progress(Protocol):
    """Wraps the loop of one stage."""

    def track(self, items: Iterable[Item], stage: str, total: int) -> Iterator[Item]:
        """Yield ``items`` while showing how many of ``total`` are done."""
        ...


class SilentProgress:
    """Shows nothing: the default of the Python functions."""

    def track(self, items: Iterable[Item], stage: str, total: int) -> Iterator[Item]:
        """Yield ``items`` unchanged."""
        yield from items


class TrimmingProgress:
    """Another progress, that also gives freed memory back between steps.

    What blocks of a few hundred kilobytes took stays with the process otherwise: on SmolLM2 0.7 GB
    once its file is opened, more with each stage.
    """

    def __init__(self, shown: Progress) -> None:
        """Show what ``shown`` does."""
        self.shown = shown

    def track(self, items: Iterable[Item], stage: str, total: int) -> Iterator[Item]:
        """Yield ``items`` as ``shown`` does."""
        trimmed = time.monotonic()
        for item in self.shown.track(items, stage, total):
            yield item
            if time.monotonic() - trimmed > TRIM_EVERY:
                trim_freed_memory()
                trimmed = time.monotonic()
        trim_freed_memory()


class TerminalProgress:
    """A bar with the time left for each stage on a terminal, a line a stage elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        """Show on ``console``, by default on stderr so that stdout stays for results."""
        self.console = console or Console(file=sys.stderr, markup=False, emoji=False)

    def track(self, items: Iterable[Item], stage: str, total: int) -> Iterator[Item]:
        """Yield ``items``; the bar is finished also when the consumer stops early."""
        started, stage = time.monotonic(), visible(stage)
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description:<34}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            with RichBars(*columns, console=self.console, transient=True) as bars:
                task = bars.add_task(stage, total=total)
                for item in items:
                    yield item
                    bars.advance(task)
        else:
            yield from self._lines(items, stage, total, started)
        elapsed = time.monotonic() - started
        self.console.print(f"{stage:<34} {total:>5} done in {elapsed:6.1f} s", highlight=False)

    def _lines(
        self, items: Iterable[Item], stage: str, total: int, started: float
    ) -> Iterator[Item]:
        announced = started
        for done, item in enumerate(items):
            now = time.monotonic()
            if done and now - announced > 15:
                left = (now - started) / done * (total - done)
                line = f"{stage:<34} {done:>5} of {total}, {left:.0f} s left"
                self.console.print(line, highlight=False)
                announced = now
            yield item


def run_stage(progress: Progress, stage: str, function: Callable[[], Item]) -> Item:
    """Run a stage that is one step, and return its result."""
    (result,) = [function() for _ in progress.track([None], stage, 1)]
    return result
