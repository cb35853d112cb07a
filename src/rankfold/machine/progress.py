"""What a long run tells its user: the stage it is in, how far it is, how long it will take."""

from __future__ import annotations

import html
import importlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol, TypeVar

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
SHOW_EVERY = 0.2  # seconds between two pictures of a bar in a notebook
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

    def __init__(self, console: Console | None = None, *, keep: bool = True) -> None:
        """Show on ``console``, by default on stderr so that stdout stays for results.

        Without ``keep``, a terminal keeps no line of a stage that is done.
        """
        self.keep = keep
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
        if self.console.is_terminal and not self.keep:
            return
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


class NotebookProgress:
    """One line with a bar below the cell that runs, for all stages of it."""

    def __init__(self, shell: Any) -> None:
        """Show in the notebook of an IPython shell."""
        self._shell = shell
        self._cell: object = None
        self._handle: Any = None
        self._shown = self._started = 0.0

    def track(self, items: Iterable[Item], stage: str, total: int) -> Iterator[Item]:
        """Yield ``items``; what was begun and not ended says so."""
        begun, stage, done = time.monotonic(), visible(stage), 0
        self._show(stage, 0, total, "", now=True)
        try:
            for item in items:
                yield item
                done += 1
                left = (time.monotonic() - begun) / done * max(0, total - done)
                self._show(stage, done, total, f"{left:.0f} s left")
        except BaseException:
            self._show(stage, done, total, "stopped", now=True)
            raise
        self._show(stage, done, total, "done", now=True)

    def _show(self, stage: str, done: int, total: int, how: str, now: bool = False) -> None:
        time_now = time.monotonic()
        if not now and time_now - self._shown < SHOW_EVERY:
            return
        if self._cell != self._shell.execution_count or self._handle is None:
            self._cell, self._started, self._handle = self._shell.execution_count, time_now, None
        said = f"{stage}: {done} of {total}" + (f", {how}" if how else "")
        shown = _Shown(said, done / max(1, total), f"{time_now - self._started:.0f} s")
        if self._handle is None:
            self._handle = importlib.import_module("IPython.display").display(
                shown, display_id=True
            )
        else:
            self._handle.update(shown)
        self._shown = time_now


class _Shown(NamedTuple):
    """What a notebook shows of a stage."""

    said: str
    share: float
    since: str

    def __repr__(self) -> str:
        return f"{self.said} ({self.since} in all)"

    def _repr_html_(self) -> str:
        bar = f'<progress value="{self.share:.3f}" max="1"></progress>'
        return f"<div>{bar} {html.escape(self.said)} ({html.escape(self.since)} in all)</div>"


def shown_progress(asked: Progress | bool | None) -> Progress:
    """What was asked for: an object, True for what this place can show, or nothing."""
    if not isinstance(asked, bool):
        return asked or SilentProgress()
    if not asked:
        return SilentProgress()
    ipython: Any = sys.modules.get("IPython")  # a notebook has imported it
    shell = None if ipython is None else ipython.get_ipython()
    if shell is not None and hasattr(shell, "kernel"):
        return NotebookProgress(shell)
    return TerminalProgress(keep=False)


def run_stage(progress: Progress, stage: str, function: Callable[[], Item]) -> Item:
    """Run a stage that is one step, and return its result."""
    (result,) = [function() for _ in progress.track([None], stage, 1)]
    return result
