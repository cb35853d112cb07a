"""An objective that rankfold does not know, added by one registration and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import rankfold
from rankfold import InputError
from rankfold.objective import Objective, register_objective, unregister_objective
from tests.command_line import make_project
from tests.command_line import rankfold as rankfold_command
from tests.small_models import SmallCNN, image_data, trained_cnn

TOY = Objective(
    input_gram=True,
    output_gram="diagonal",
    step=False,
    allocation="multiplier",
    source="a test: whitened by A and by the diagonal of B",
)


@pytest.fixture
def toy() -> Iterator[str]:
    register_objective("toy", TOY)
    yield "toy"
    unregister_objective("toy")


def test_it_plans_certifies_saves_and_reloads(toy: str, tmp_path: Path) -> None:
    name: Any = toy  # users' checkers know the built-in names alone
    result = rankfold.lossless(trained_cnn(), image_data(), size=0.7, objective=name)
    report = result.report
    assert report["settings"]["objective"] == toy
    assert report["factorized"]["parameters"] <= 0.7 * report["original"]["parameters"]
    assert report["loss"]["predicted_change"] > 0
    assert report["step"] is None
    again = rankfold.load(result.save(tmp_path / "out"), SmallCNN())
    assert sum(p.numel() for p in again.parameters()) == report["factorized"]["parameters"]
    found = rankfold.verify(tmp_path / "out", again, image_data().held_out)
    assert found.holds


def test_its_ranks_are_other_than_those_of_the_full_gram(toy: str) -> None:
    name: Any = toy
    found = [
        rankfold.lossless(
            trained_cnn(), image_data(), size=0.6, objective=objective, gradient_step=False
        ).report["loss"]["predicted_change"]
        for objective in (name, "kronecker")
    ]
    assert found[0] != found[1]


def test_a_name_is_registered_once(toy: str) -> None:
    with pytest.raises(ValueError, match="'toy' is registered already"):
        register_objective(toy, TOY)
    with pytest.raises(ValueError, match="'joint' is registered already"):
        register_objective("joint", TOY)


def test_without_it_it_is_refused_by_name() -> None:
    name: Any = "toy"
    with pytest.raises(InputError, match="objective is 'toy'; expected one of svd"):
        rankfold.lossless(trained_cnn(), image_data(), size=0.7, objective=name)


def test_the_command_line_refuses_it_likewise(tmp_path: Path) -> None:
    words = ["net.py:net", "--data", "data.npz", "--weights", "net.safetensors", "--size", "0.9"]
    words += ["--objective", "toy", "--out", "out"]
    done = rankfold_command("lossless", *words, cwd=make_project(tmp_path), expect=2)
    assert "objective is 'toy'" in done.stderr


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ((True, "some", False, "uniform", "x"), "output_gram is 'some'; expected none"),
        ((True, "full", False, "best", "x"), "allocation is 'best'; expected uniform"),
        ((True, "none", False, "multiplier", "x"), "predicts the loss by B"),
    ],
)
def test_an_objective_that_means_nothing_is_refused(fields: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Objective(*fields)
