"""Held-out data is opened by one object alone, and every opening is recorded."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold
from rankfold import Data, InputError
from rankfold.certificate.earlier_uses import record_file
from rankfold.certificate.openings_file import Opening, read
from rankfold.held_out import HeldOut
from rankfold.search.round import Round
from tests.command_line import make_project
from tests.command_line import rankfold as rankfold_command
from tests.small_models import SmallCNN, image_data, trained_cnn

MARK = 77.0  # a pixel that only held-out images have


def marked_data(count: int = 60) -> Data:
    data = image_data(count)
    values, labels = data.held_out.tensors  # type: ignore[attr-defined]
    values = values.clone()
    values[:, 0, 0, 0] = MARK
    held_out = torch.utils.data.TensorDataset(values, labels)
    return Data(data.calibration, data.selection, held_out)  # type: ignore[arg-type]


class Watched(SmallCNN):
    """Says of each pass over held-out images whether ``HeldOut.test`` asked for it."""

    passes: list[bool] = []  # noqa: RUF012 - copies of the model, which are what runs, share it

    def forward(self, images: Tensor) -> Tensor:
        if bool((images[:, 0, 0, 0] == MARK).any()):
            frames = (frame.frame for frame in inspect.stack(context=0))
            selves = (f.f_locals.get("self") for f in frames if f.f_code.co_name == "test")
            self.passes.append(any(isinstance(one, HeldOut) for one in selves))
        return super().forward(images)


def watched() -> Watched:
    model = Watched().eval()
    model.load_state_dict(trained_cnn().state_dict())
    Watched.passes.clear()
    return model


WAYS: dict[str, Callable[[nn.Module, Data], Any]] = {
    "lossless": lambda model, data: rankfold.lossless(model, data, size=0.7, margin=0.5),
    "damping chosen": lambda model, data: rankfold.lossless(model, data, size=0.7, damping="auto"),
    "rounds": lambda model, data: rankfold.lossless(model, data, size=0.7, rounds=2),
    "compact": lambda model, data: rankfold.compact(model, data, margin=0.5),
    "certified": lambda model, data: rankfold.compact(model, data, margin=0.5, certified=True),
    "prepared lossless": lambda model, data: rankfold.prepare(model, data).lossless(0.7),
    "prepared compact": lambda model, data: rankfold.prepare(model, data).compact(margin=0.5),
    "betting": lambda model, data: rankfold.lossless(model, data, size=0.9, test="betting"),
    "metric": lambda model, data: rankfold.lossless(
        model, data, size=0.8, metrics=[rankfold.Metric("half", _half)]
    ),
}


def _half(model: nn.Module, batch: Any) -> Tensor:
    return torch.full((len(model(batch[0])),), 0.5)


def openings() -> list[Opening]:
    file = record_file()
    assert file is not None
    return read(file).openings


@pytest.mark.parametrize("way", WAYS)
def test_nothing_but_the_held_out_object_opens_it_and_every_way_leaves_a_record(way: str) -> None:
    result = WAYS[way](watched(), marked_data())
    assert Watched.passes and all(Watched.passes)
    (opening,) = openings()
    assert opening.verdict == result.certificate.verdict
    assert result.document["models"]["factorized"] in opening.models


def test_what_prepares_a_run_opens_nothing() -> None:
    prepared = rankfold.prepare(watched(), marked_data())
    assert prepared.inspect() and prepared.sizes["parameters"] > 0
    assert not Watched.passes
    assert openings() == []
    shown = {name for name in dir(prepared) if not name.startswith("_")}
    assert shown == {"lossless", "compact", "sweep", "sizes", "inspect"}
    assert not isinstance(prepared, Round)


def test_a_second_size_is_a_second_opening() -> None:
    prepared = rankfold.prepare(watched(), marked_data())
    prepared.lossless(0.8)
    result = prepared.lossless(0.6)
    assert len(openings()) == 2
    assert result.document["data"]["history"]["others"] == 1


def test_the_watch_sees_a_pass_from_elsewhere() -> None:
    """A test that can't fail would show nothing."""
    model, data = watched(), marked_data()
    model(torch.stack([data.held_out[place][0] for place in range(4)]))
    assert Watched.passes == [False]


def test_the_command_line_records_it_too(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    words = ["net.py:net", "--data", "data.npz", "--weights", "net.safetensors", "--size", "0.9"]
    rankfold_command("lossless", *words, "--out", "out", cwd=project)
    assert len(openings()) == 1


@pytest.mark.parametrize("way", ["lossless", "compact", "prepare"])
@pytest.mark.parametrize(
    ("options", "data", "match"),
    [
        ({"largest_change": 5.0, "accuracy_margin": 0.001}, None, "too few to show a change of"),
        ({"test": "betting"}, "groups", "the betting test looks at single examples"),
        ({}, "one group", "form one group"),
        ({"metrics": [rankfold.Metric("m", _half, 0.001)]}, None, "change of the metric m"),
        ({"metrics": [rankfold.Metric("accuracy", _half)]}, None, "expected different names"),
    ],
)
def test_a_part_that_can_not_suffice_is_refused_before_any_work_on_every_way(
    way: str, options: dict[str, Any], data: str | None, match: str
) -> None:
    given: Any = image_data(40)
    if data is not None:
        groups = ["a"] * 40 if data == "one group" else [str(place // 4) for place in range(40)]
        given = Data(given.calibration, given.selection, given.held_out, groups=groups)
    model = watched()
    calls: list[object] = []
    model.register_forward_pre_hook(lambda *arguments: calls.append(arguments))
    required = {"lossless": {"size": 0.8}, "compact": {}, "prepare": {}}[way]
    with pytest.raises(InputError, match=match):
        getattr(rankfold, way)(model, given, **required, **options)
    assert not calls and openings() == []


def test_a_margin_that_can_not_be_shown_is_refused_by_a_preparation_too() -> None:
    prepared = rankfold.prepare(trained_cnn(), image_data(40), largest_change=1.0)
    for call in (lambda: prepared.lossless(0.8), lambda: prepared.compact()):
        with pytest.raises(InputError, match="That needs 299 examples"):
            call()
    assert openings() == []


def failing_metric(on: int) -> rankfold.Metric:
    calls = iter(range(100))

    def values(model: nn.Module, batch: Any) -> Tensor:
        if next(calls) >= on:
            raise RuntimeError("the metric breaks")
        return _half(model, batch)

    return rankfold.Metric("breaks", values)


class Interrupting(rankfold.TerminalProgress):
    """Ctrl-C when the plan's model has been evaluated."""

    def track(self, items: Any, stage: str, total: int) -> Any:
        yield from items
        if stage == "factorized on held-out data":
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"metrics": [failing_metric(2)]}, InputError),
        ({"progress": Interrupting()}, KeyboardInterrupt),
    ],
)
def test_an_opening_that_ends_early_is_on_record(
    options: dict[str, Any], error: type[BaseException]
) -> None:
    with pytest.raises(error):
        rankfold.lossless(watched(), marked_data(), size=0.7, **options)
    assert Watched.passes
    (opening,) = openings()
    assert opening.verdict == "interrupted"
    assert len(opening.examples) == 60 and len(opening.models) == 1
    later = rankfold.lossless(watched(), marked_data(), size=0.5)
    assert later.document["data"]["history"]["others"] == 1


def test_the_whole_part_is_on_record_also_where_a_test_stopped_early() -> None:
    data = marked_data(120)
    result = rankfold.compact(watched(), data, margin=0.05, certified=True, test="betting")
    (opening,) = openings()
    assert len(opening.examples) == 120 >= result.certificate.examples


def test_one_group_that_is_left_by_a_limit_is_refused_before_any_work() -> None:
    given = marked_data(40)
    data = Data(given.calibration, given.selection, given.held_out, groups=["a"] * 39 + ["b"])
    for seed in range(2):
        with pytest.raises(InputError, match="form one group"):
            rankfold.lossless(watched(), data, size=0.8, held_out_limit=4, seed=seed)
    assert not Watched.passes and openings() == []


def test_a_record_that_can_not_be_written_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKFOLD_OPENINGS", "/proc/nowhere/openings")
    result = rankfold.lossless(watched(), marked_data(), size=0.8)
    assert result.document["data"]["history"]["kept"] is False


def test_what_a_size_is_of_is_checked_before_any_work() -> None:
    model, calls = watched(), []
    model.register_forward_pre_hook(lambda *arguments: calls.append(arguments))
    wrong: Any = "everything"
    with pytest.raises(InputError, match="size_of is 'everything'; expected one of model"):
        rankfold.lossless(model, marked_data(), size=0.8, size_of=wrong)
    assert not calls
