from __future__ import annotations

import io
import sys
import types

import pytest
import torch
from rich.console import Console

from benchmarks.memory import anonymous_bytes
from rankfold.machine import progress as module
from rankfold.machine.freed_memory import trim_freed_memory
from rankfold.machine.progress import (
    SilentProgress,
    TerminalProgress,
    TrimmingProgress,
    run_stage,
    shown_progress,
)


def test_silent_progress_passes_items_through() -> None:
    assert list(SilentProgress().track([1, 2], "stage", 2)) == [1, 2]


def test_a_line_per_stage_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    out = io.StringIO()
    progress = TerminalProgress(Console(file=out, width=100))
    assert list(progress.track(range(4), "collect", 4)) == [0, 1, 2, 3]
    lines = out.getvalue().splitlines()
    assert "1 of 4" in lines[0] and "s left" in lines[0]
    assert "collect" in lines[-1] and "done in" in lines[-1]


def test_bar_on_a_terminal_is_removed_also_after_an_error() -> None:
    out = io.StringIO()
    progress = TerminalProgress(Console(file=out, force_terminal=True, width=100))
    with pytest.raises(KeyboardInterrupt):
        for item in progress.track(range(4), "collect", 4):
            if item == 2:
                raise KeyboardInterrupt
    assert "collect" in out.getvalue()
    assert "done in" not in out.getvalue()
    assert out.getvalue().endswith(("\x1b[?25h", "\x1b[2K", "\n")) or "\x1b[?25h" in out.getvalue()


def test_run_stage_returns_the_result() -> None:
    assert run_stage(SilentProgress(), "one", lambda: 42) == 42


def test_freed_memory_is_given_back_between_steps_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times: list[int] = []
    clock = iter([0, 1.5, 3.3, 3.3, 6.0, 6.6, 6.6])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    seen: list[str] = []
    monkeypatch.setattr(module, "trim_freed_memory", lambda: times.append(len(seen)))
    for item in TrimmingProgress(SilentProgress()).track("abcd", "stage", 4):
        seen.append(item)
    assert seen == ["a", "b", "c", "d"]
    assert times == [2, 4, 4]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_small_freed_blocks_go_back_to_the_system() -> None:
    trim_freed_memory()
    before = anonymous_bytes()
    # Every other block stays, so that the heap can't shrink from its end.
    blocks = [torch.ones(25_000) for _ in range(2_000)]
    kept = blocks[::2]
    grown = anonymous_bytes() - before
    del blocks
    trim_freed_memory()
    assert anonymous_bytes() - before < 0.7 * grown
    assert len(kept) == 1_000


class Shell:
    """As much of a notebook's IPython as is asked."""

    kernel = object()
    execution_count = 1


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> tuple[Shell, list[list[str]]]:
    """A notebook, and what each of its outputs has shown."""
    shell, outputs = Shell(), []

    class Handle:
        def __init__(self) -> None:
            outputs.append([])

        def update(self, shown: object) -> None:
            outputs[-1].append(shown._repr_html_())  # type: ignore[attr-defined]

    def display(shown: object, display_id: bool) -> Handle:
        assert display_id
        handle = Handle()
        handle.update(shown)
        return handle

    ipython, shows = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    ipython.get_ipython, shows.display = lambda: shell, display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", shows)
    return shell, outputs


def test_a_notebook_shows_one_output_a_cell(notebook: tuple[Shell, list[list[str]]]) -> None:
    shell, outputs = notebook
    progress = shown_progress(True)
    for stage in range(20):
        assert list(progress.track(range(5), f"stage <{stage}>", 5)) == [0, 1, 2, 3, 4]
    assert len(outputs) == 1 and "stage &lt;19&gt;: 5 of 5, done" in outputs[0][-1]
    shell.execution_count = 2
    list(progress.track([1], "another", 1))
    assert len(outputs) == 2
    with pytest.raises(KeyboardInterrupt):
        for _ in progress.track(range(4), "cut", 4):
            raise KeyboardInterrupt
    assert len(outputs) == 2


def test_what_true_shows_outside_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert isinstance(shown_progress(True), TerminalProgress)
    assert isinstance(shown_progress(False), SilentProgress)
    assert isinstance(shown_progress(None), SilentProgress)
    own = TerminalProgress()
    assert shown_progress(own) is own
    out = io.StringIO()
    quiet = TerminalProgress(Console(file=out, force_terminal=True, width=100), keep=False)
    assert list(quiet.track(range(4), "collect", 4)) == [0, 1, 2, 3]
    assert "done in" not in out.getvalue()
