"""Bad input through the Python functions: refused by name, and nothing of the user's is changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from rankfold import lossless
from tests.bad_python import BAD, GOOD
from tests.small_models import flags, mlp, same_state, state


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the artifact ``made`` of ``mlp()``."""
    found = tmp_path_factory.mktemp("bad")
    lossless(mlp(), GOOD, size=0.8, effort="fast", objective="svd").save(found / "made")
    return found


def _files(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(case: str, folder: Path) -> None:
    row, model, files = BAD[case], mlp(), _files(folder)
    before, told = state(model), flags(model)
    with pytest.raises(row.error) as caught:
        row.call(model, folder)
    assert type(caught.value) in (row.error, *row.error.__subclasses__())
    message = str(caught.value)
    assert not [fragment for fragment in row.fragments if fragment not in message], message
    assert same_state(model, before) and flags(model) == told
    assert _files(folder) == files
