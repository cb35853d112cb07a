import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The models are tiny: threads that wait for each other cost more than they bring. This is also the
# number for the commands that tests run.
os.environ["OMP_NUM_THREADS"] = os.environ.setdefault("RANKFOLD_TEST_THREADS", "1")

import gc
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.few_rounds import few_rounds

torch.set_num_threads(int(os.environ["RANKFOLD_TEST_THREADS"]))
few_rounds()


@pytest.fixture(autouse=True, scope="session")
def _no_record_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fixtures of a session run before those of a test: they must not find the user's record."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANKFOLD_OPENINGS", str(tmp_path_factory.mktemp("openings") / "openings"))
        yield


@pytest.fixture(autouse=True, scope="module")
def _no_record_of_other_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nor what the fixtures of another module opened: several begin with the same images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANKFOLD_OPENINGS", str(tmp_path_factory.mktemp("openings") / "openings"))
        yield


@pytest.fixture(scope="session")
def _records(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for each test: ``mktemp`` looks through all there are to number a new one."""
    top = tmp_path_factory.mktemp("records")
    return (top / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def _own_record_of_openings(monkeypatch: pytest.MonkeyPatch, _records: Iterator[Path]) -> None:
    """Tests open the same held-out examples again and again; a user's record stays out of it."""
    folder = next(_records)
    folder.mkdir()
    monkeypatch.setenv("RANKFOLD_OPENINGS", str(folder / "openings"))


def pytest_collection_finish() -> None:
    """What was imported stays: collections of garbage needn't look at it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_random_state() -> None:
    torch.manual_seed(0)
