from __future__ import annotations

import io
import sys

import pytest
import torch
from rich.console import Console

from benchmarks.memory import anonymous_bytes
from rankfold.machine import progress as module
from rankfold.machine.freed_memory import trim_freed_memory
from rankfold.machine.progress import SilentProgress, TerminalProgress, TrimmingProgress, run_stage


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
