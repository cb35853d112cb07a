"""Times of calls beside each other, and what a watch keeps of stages."""

from __future__ import annotations

import time

import pytest

from rankfold.machine import timing
from rankfold.machine.progress import SilentProgress
from rankfold.machine.timing import Watch, timed_beside
from tests.few_rounds import AS_SHIPPED


@pytest.fixture(autouse=True)
def _as_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in AS_SHIPPED.items():
        monkeypatch.setattr(timing, name, value)


def test_calls_are_timed_in_turn() -> None:
    called: list[str] = []

    def call(name: str, seconds: float) -> None:
        called.append(name)
        time.sleep(seconds)

    short, long = timed_beside([lambda: call("a", 0.002), lambda: call("b", 0.008)], 5.0)
    assert timing.FEWEST_ROUNDS <= len(short) == len(long) <= timing.MOST_ROUNDS
    ratios = sorted(b / a for a, b in zip(short, long, strict=True))
    assert ratios[len(ratios) // 2] > 1.5
    # Never all of one and then all of the other.
    assert "".join(called).count("ba") >= timing.FEWEST_ROUNDS


def test_too_few_seconds_give_no_times() -> None:
    began = time.perf_counter()
    assert timed_beside([lambda: time.sleep(0.05)] * 2, 0.1) == [[], []]
    assert time.perf_counter() - began < 5


def test_what_is_watched() -> None:
    watch = Watch(SilentProgress(), timing=True)
    for _ in watch.track(range(2), "outer", 2):
        assert list(watch.track("ab", "inner", 2)) == ["a", "b"]
    for _ in range(2):
        list(watch.track([1], "again", 1))
    with pytest.raises(RuntimeError):
        for _ in watch.track(range(2), "broken", 2):
            raise RuntimeError
    names = [stage.name for stage in watch.stages]
    assert names[:2] == ["outer", "again"]
    assert all(stage.seconds >= 0 for stage in watch.stages)
    list(watch.track([1], "after", 1))
    assert watch.stages[-1].name == "after"
