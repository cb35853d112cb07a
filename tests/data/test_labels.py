"""One rule for every source: labels are names where all are, else numbers; it tells which."""

from __future__ import annotations

import csv
import json
import unicodedata
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from rankfold.cli.data_options import DataOptions
from rankfold.cli.open import OpenedModel, open_examples, open_parts
from rankfold.data.labels import class_numbers, folded
from rankfold.errors import InputError
from rankfold.integrations.model_inputs import label_ids
from tests.command_line import rankfold
from tests.small_tokenizers import FAMILIES

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

STARS = {"1": 0, "2": 1, "3": 2, "4": 3, "5": 4}
GENERIC = {f"LABEL_{i}": i for i in range(5)}


def _numbers(values: list[Any], known: dict[str, int] | None, **more: Any) -> list[int]:
    return class_numbers("the column 'label' of x", values, known, **more).numbers


@pytest.mark.parametrize(
    ("values", "known", "wanted"),
    [
        (["1", "5"], STARS, [0, 4]),
        ([1, 4], STARS, [0, 3]),
        ([1.0, 4.0], STARS, [0, 3]),
        (["1.0", "4.0"], STARS, [0, 3]),
        ([0, 4], GENERIC, [0, 4]),
        (["0", "4.0"], GENERIC, [0, 4]),
        (["LABEL_3", "label_0"], GENERIC, [3, 0]),
        (["pos", "NEG"], {"Pos": 1, "Neg": 0}, [1, 0]),
        (["us", "US"], {"us": 0, "US": 1}, [0, 1]),
        ([unicodedata.normalize("NFD", "é")], {"É": 0, "e": 1}, [0]),
        ([True, False], {"true": 1, "false": 0}, [1, 0]),
        ([np.int64(2), np.int32(1)], STARS, [1, 0]),
        ([np.str_("2"), torch.tensor(1)], STARS, [1, 0]),
        ([np.float32(2)], None, [2]),
        ([7, 0], None, [7, 0]),
        (["-1"], {"-1": 0, "1": 1}, [0]),
    ],
)
def test_names_come_before_numbers(values: list[Any], known: Any, wanted: list[int]) -> None:
    assert _numbers(values, known) == wanted


@pytest.mark.parametrize(
    ("values", "known", "message"),
    [
        ([0, 1, 5], STARS, "labels '0', which are no names .* beside '1', '5', which are"),
        (["LABEL_0", "1"], GENERIC, "labels '1', which are no names"),
        ([5], GENERIC, "label 5; the model has the 5 classes 0 to 4, LABEL_0"),
        ([-1, 1], GENERIC, "labels '-1'; expected LABEL_0"),
        ([-1, 1], STARS, "labels '-1', which are no names"),
        (["01", "1"], None, "labels '01'; expected whole numbers from 0"),
        ([1.5], None, "labels '1.5'"),
        (["²"], None, "labels '²'"),
        (["٣"], None, "labels '٣'"),
        ([" pos"], {"pos": 0, "neg": 1}, "labels ' pos'; expected pos, neg"),
        ([True], None, "labels 'True'"),
        ([[1, 0]], GENERIC, r"labels '\[1, 0\]'"),
        (["Us"], {"us": 0, "US": 1}, "labels 'Us'"),
    ],
)
def test_what_may_mean_two_classes_or_none_is_refused(
    values: list[Any], known: Any, message: str
) -> None:
    with pytest.raises(InputError, match=f"the column 'label' of x holds the {message}"):
        _numbers(values, known)


def test_names_of_the_source_are_its_labels() -> None:
    names = ["neg", "pos"]
    assert _numbers([0, 1], {"POS": 0, "NEG": 1}, own_names=names) == [1, 0]
    found = class_numbers("x", [0, 1, 1], {"BAD": 0, "GOOD": 1}, own_names=names)
    assert found.numbers == [0, 1, 1]
    assert [str(c) for c in found.counts] == [
        "'0 (neg)' is class 0 'BAD' (1)",
        "'1 (pos)' is class 1 'GOOD' (2)",
    ]
    # The numbers 1 to 4 are places among these names, and no names themselves.
    stars = [f"{i} stars" for i in range(1, 6)]
    assert _numbers([1, 4], STARS, own_names=stars) == [1, 4]
    with pytest.raises(InputError, match="no names"):
        _numbers([0, 1], {"neg": 0, "neutral": 1}, own_names=names)


def test_classes_without_an_example_are_told() -> None:
    found = class_numbers("x", ["1", "3", "3"], STARS)
    assert [(c.value, c.number, c.name, c.count) for c in found.counts] == [
        ("1", 0, "1", 1),
        ("3", 2, "3", 2),
    ]
    assert found.notes == ["no example of the model's class 1 '2', 3 '4', 4 '5'"]


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=6, unique_by=folded),
    data=st.data(),
)
def test_every_name_is_its_class_in_any_writing(names: list[str], data: st.DataObject) -> None:
    known = {name: number for number, name in enumerate(names)}
    values = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=8))
    wanted = [known[value] for value in values]
    found = class_numbers("x", values, known)
    assert found.numbers == wanted and sum(c.count for c in found.counts) == len(values)
    for form in ("NFC", "NFD"):
        assert _numbers([unicodedata.normalize(form, v) for v in values], known) == wanted


class _Model(nn.Module):
    """As much of a model of transformers as the sources ask for."""

    def __init__(self, known: dict[str, int]) -> None:
        super().__init__()
        self.config = type("Config", (), {"id2label": {i: n for n, i in known.items()}})()


def _sources(folder: Path, labels: list[str]) -> dict[str, str]:
    """The same labels in every kind of source."""
    texts = [{"text": "the film", "label": label} for label in labels]
    (folder / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in texts))
    numbers = [r | {"label": int(r["label"])} for r in texts] if labels[0].isdigit() else texts
    (folder / "n.jsonl").write_text("".join(json.dumps(r) + "\n" for r in numbers))
    for name, mark in (("x.csv", ","), ("x.tsv", "\t")):
        written = StringIO(newline="")
        csv.writer(written, delimiter=mark).writerows(
            [("text", "label"), *(r.values() for r in texts)]
        )
        (folder / name).write_text(written.getvalue())
    pq.write_table(pa.Table.from_pylist(numbers), folder / "x.parquet")
    pixels = BytesIO()
    Image.new("RGB", (8, 8)).save(pixels, "PNG")
    picture = {"bytes": pixels.getvalue(), "path": None}
    pictures = [{"image": picture, "label": label} for label in labels]
    pq.write_table(pa.Table.from_pylist(pictures), folder / "images.parquet")
    for number, label in enumerate(labels):
        (folder / "images" / label).mkdir(parents=True, exist_ok=True)
        (folder / "images" / label / f"{number}.png").write_bytes(pixels.getvalue())
    tagged = {"tokens": ["a"] * len(labels), "tags": labels}
    (folder / "tags.jsonl").write_text(json.dumps(tagged) + "\n")
    images = np.zeros((len(labels), 8, 8, 3), np.uint8)
    np.savez(folder / "x.npz", x=images, y=np.array([int(label) for label in labels]))
    records = ("x.jsonl", "n.jsonl", "x.csv", "x.tsv", "x.parquet", "images.parquet")
    found = dict.fromkeys(("x.npz", "images", *records), "classification")
    return found | {"tags.jsonl": "token-classification"}


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(order=st.permutations(["1", "2", "3", "4", "5"]), count=st.integers(2, 5))
def test_every_source_has_the_same_rule(
    order: list[str], count: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    known = {name: number for number, name in enumerate(order)}
    labels = sorted(order)[:count]
    folder = tmp_path_factory.mktemp("sources")
    for source, task in _sources(folder, labels).items():
        tokenizer = None if "image" in source or "npz" in source else FAMILIES["bert"]()
        opened = OpenedModel(_Model(known), tokenizer, None)
        size = 4 if "image" in source else None
        found = open_examples(str(folder / source), opened, DataOptions(task=task, image_size=size))
        examples = [found[place] for place in range(len(found))]
        numbers = [e["labels"] if isinstance(e, dict) else torch.as_tensor(e[1]) for e in examples]
        given_labels = torch.stack(numbers).flatten()
        given_labels = given_labels[given_labels != -100]
        assert sorted(given_labels.tolist()) == sorted(known[label] for label in labels), source
        told = {c.value: c.number for c in found.account.classes}  # type: ignore[attr-defined]
        assert told == {label: known[label] for label in labels}, source


def test_a_label_is_one_class_in_all_parts(tmp_path: Path) -> None:
    opened = OpenedModel(nn.Flatten(), None, None)
    for name, classes in (("all", ["cat", "dog", "owl"]), ("some", ["cat", "owl"])):
        for label in classes:
            (tmp_path / name / label).mkdir(parents=True)
            for place in range(4):
                image = Image.new("RGB", (8, 8), (place, len(name), 0))
                image.save(tmp_path / name / label / f"{place}.png")
    folders = [str(tmp_path / name) for name in ("all", "all", "some")]
    with pytest.raises(InputError, match=r"'owl' is class 2 in .*all, and class 1 in .*some"):
        open_parts(*folders, opened, DataOptions(image_size=4))  # type: ignore[call-arg, arg-type]
    Image.new("RGB", (8, 8)).save(tmp_path / "some" / "dog.png")
    (tmp_path / "some" / "dog").mkdir()
    (tmp_path / "some" / "dog.png").rename(tmp_path / "some" / "dog" / "0.png")
    data = open_parts(*folders, opened, DataOptions(image_size=4))  # type: ignore[call-arg, arg-type]
    assert [account.source for account in data.accounts] == [folders[0], folders[2]]


@pytest.mark.parametrize(("names", "wanted"), [
    ({0: "a", 1: "b"}, {"a": 0, "b": 1}), ({0: "a", 1: "a"}, None), (None, None), ({}, None),
])  # fmt: skip
def test_names_of_a_models_classes(names: Any, wanted: Any) -> None:
    model = nn.Flatten()
    model.config = type("Config", (), {"id2label": names, "label2id": {"b": 0, "a": 1}})()
    assert label_ids(model) == wanted


def test_a_label_is_the_class_that_it_was_when_the_model_was_made(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\ndef net():\n    return nn.Sequential("
        "nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 3))\n"
    )
    values = np.random.default_rng(0).integers(0, 256, (36, 8, 8, 3)).astype(np.uint8)
    for place, label in enumerate(["cat", "dog", "owl"] * 12):
        for name in ("all", "some") if label != "dog" else ("all",):
            (tmp_path / name / label).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values[place]).save(tmp_path / name / label / f"{place}.png")
    size = ("--image-size", "8")
    rankfold("lossless", "net.py:net", "--data", "all", *size, "--size", "0.9", "--out", "out",
             cwd=tmp_path)  # fmt: skip
    evaluate = ("evaluate", "out", "--model", "net.py:net", *size, "--data")
    rankfold(*evaluate, "all", cwd=tmp_path)
    refused = rankfold(*evaluate, "some", cwd=tmp_path, expect=2).stderr
    assert "the label 'owl' is class 2 in all, of which the model was made, and class 1" in refused
