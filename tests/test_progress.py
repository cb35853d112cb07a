from __future__ import annotations

import io

import pytest
from rich.console import Console

from rankfold import progress as module
from rankfold.progress import SilentProgress, TerminalProgress, run_stage


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
