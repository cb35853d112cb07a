import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The models are tiny: threads that wait for each other cost more than they bring. This is also the
# number for the commands that tests run.
os.environ["OMP_NUM_THREADS"] = os.environ.setdefault("RANKFOLD_TEST_THREADS", "1")

from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(int(os.environ["RANKFOLD_TEST_THREADS"]))


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


@pytest.fixture(autouse=True)
def _own_record_of_openings(monkeypatch: pytest.MonkeyPatch, tmp_path_factory) -> None:
    """Tests open the same held-out examples again and again; a user's record stays out of it."""
    file = tmp_path_factory.mktemp("openings") / "openings"
    monkeypatch.setenv("RANKFOLD_OPENINGS", str(file))


@pytest.fixture(autouse=True)
def _same_random_state() -> None:
    torch.manual_seed(0)
