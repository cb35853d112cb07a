"""Several layers at once give what one after the other gives."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from rankfold.machine.at_once import LARGE, at_once, is_small


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_order_whatever_their_size(threads: int) -> None:
    found = list(at_once(range(20), lambda item: (item, torch.get_num_threads()), lambda i: i % 5))
    assert [item for item, _ in found] == list(range(20))
    # A large one has all threads, a small one has one.
    assert all(each == (1 if item % 5 else threads) for item, each in found)
    assert torch.get_num_threads() == threads


def test_decompositions_are_the_same_bits_with_any_number_of_threads(threads: int) -> None:
    torch.manual_seed(0)
    rows = [torch.randn(300, 200, dtype=torch.float64) for _ in range(6)]

    def work(matrix: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigh(matrix.T @ matrix).eigenvectors

    found = list(at_once(rows, work, is_small))
    torch.set_num_threads(1)
    assert all(torch.equal(some, work(matrix)) for some, matrix in zip(found, rows, strict=True))


def test_small_is_by_the_smaller_side() -> None:
    assert is_small(torch.empty(LARGE - 1, 3 * LARGE)) and is_small(torch.empty(8, LARGE, 3, 3))
    assert not is_small(torch.empty(LARGE, LARGE))
    assert not is_small(torch.empty(2, 3, device="meta"))


def test_no_gradients_stay_no_gradients(threads: int) -> None:
    weight = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        found = list(at_once([1, 2], lambda item: (weight * item).requires_grad, lambda _: True))
    assert found == [False, False]


def test_an_error_ends_it_and_no_thread_stays(threads: int) -> None:
    started: list[int] = []

    def work(item: int) -> int:
        started.append(item)
        if item == 2:
            raise ValueError("of item 2")
        return item

    with pytest.raises(ValueError, match="of item 2"):
        list(at_once(range(100), work, lambda _: True))
    assert len(started) < 12
    assert not [t for t in threading.enumerate() if t.name.startswith("ThreadPool")]


def test_what_is_not_asked_for_is_not_begun(threads: int) -> None:
    started: list[int] = []
    results = at_once(range(100), started.append, lambda _: True)
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert len(started) <= threads + 2
    assert not [t for t in threading.enumerate() if t.name.startswith("ThreadPool")]
