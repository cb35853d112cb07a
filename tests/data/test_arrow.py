"""Folders that ``datasets`` saved, and ``.parquet``: the layout is written here as it writes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch

from rankfold.data.record_examples import record_examples
from rankfold.data.sources import class_names, image_reader, read_records, source_kind
from rankfold.errors import InputError
from tests.command_line import rankfold

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

RECORDS = [{"text": f"number {i}", "label": i % 2, "tags": [i, 1]} for i in range(7)]


def _save_to_disk(folder: Path, shards: Sequence[list[dict[str, Any]]]) -> Path:
    """As datasets 5.2 does; compared with a folder of its own."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-{len(shards):05}.arrow" for i in range(len(shards))]
    for name, records in zip(names, shards, strict=True):
        table = pa.Table.from_pylist(records)
        with (
            pa.OSFile(str(folder / name), "wb") as sink,
            pa.ipc.new_stream(sink, table.schema) as writer,
        ):
            writer.write_table(table)
    state = {"_data_files": [{"filename": n} for n in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text('{"features": {}}')
    return folder


def test_records_of_all_shards_in_order(tmp_path: Path) -> None:
    folder = _save_to_disk(tmp_path / "saved", [RECORDS[:4], RECORDS[4:]])
    assert source_kind(str(folder)) == "records"
    assert read_records(folder) == RECORDS
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "x.parquet")
    assert source_kind(str(tmp_path / "x.parquet")) == "records"
    assert read_records(tmp_path / "x.parquet") == RECORDS


def test_splits_are_listed(tmp_path: Path) -> None:
    _save_to_disk(tmp_path / "all" / "train", [RECORDS])
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(InputError, match=r"give one of them: .*all/train, .*all/test\."):
        read_records(tmp_path / "all")
    assert read_records(tmp_path / "all" / "train") == RECORDS


def test_what_cant_be_read_is_named(tmp_path: Path) -> None:
    folder = _save_to_disk(tmp_path / "saved", [RECORDS])
    shard = folder / "data-00000-of-00001.arrow"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"data-00000-of-00001\.arrow can't be read as Arrow"):
        read_records(folder)
    shard.unlink()
    with pytest.raises(InputError, match=r"data-00000-of-00001\.arrow can't be read as Arrow"):
        read_records(folder)
    for state, message in (
        ('{"_data_files": [{"filename": "../other.arrow"}]}', "expected names of files in the"),
        ("{}", "lists None as _data_files"),
        ("[]", "is a JSON list; expected an object"),
        ("{", "can't be read as JSON"),
    ):
        (folder / "state.json").write_text(state)
        with pytest.raises(InputError, match=message):
            read_records(folder)
    (tmp_path / "x.parquet").write_text("no parquet")
    with pytest.raises(InputError, match=r"x\.parquet can't be read as Arrow"):
        read_records(tmp_path / "x.parquet")


@pytest.mark.parametrize("value", [b"\x89PNG", {"bytes": b"\x89PNG", "kind": "a.png"}])
def test_bytes_of_unknown_meaning_are_refused(value: object, tmp_path: Path) -> None:
    folder = _save_to_disk(tmp_path / "saved", [[{"image": value, "label": 0}]])
    with pytest.raises(InputError, match=r"the column 'image' of .* holds bytes"):
        read_records(folder)


def _pictures(count: int) -> list[dict[str, Any]]:
    """Rows as ``datasets`` keeps images, each of one colour that its label decides."""
    pillow = pytest.importorskip("PIL.Image")
    rows = []
    for place in range(count):
        written = BytesIO()
        pillow.new("RGB", (12, 9), (place, 200 * (place % 2), 7)).save(written, "PNG")
        rows.append({"image": {"bytes": written.getvalue(), "path": None}, "label": place % 2})
    return rows


def test_images_in_a_table_are_its_inputs(tmp_path: Path) -> None:
    folder = _save_to_disk(tmp_path / "saved", [_pictures(5), _pictures(3)])
    columns: dict[str, str | None] = {"text": None, "label": None}

    def examples(task: str | None) -> Sequence[Any]:
        return record_examples(
            folder, None, 9, task=task, columns=columns,
            images=lambda: image_reader([0.5], [0.25], 8),
        )  # fmt: skip

    found = examples("classification")
    assert len(found) == 8
    values, label = found[3]
    assert label == 1 and values.shape == (3, 8, 8)
    expected = (torch.tensor([3, 200, 7]) / 255 - 0.5) / 0.25
    torch.testing.assert_close(values, expected[:, None, None].expand(3, 8, 8))
    # Beside a text they are left alone.
    rows = [{"text": "ab", **row} for row in _pictures(2)]
    texts = record_examples(
        _save_to_disk(tmp_path / "texts", [rows]),
        lambda text, **_: {"input_ids": [1, len(text)]}, 9, task="causal-lm",
        columns=columns | {"target": None}, images=lambda: pytest.fail(),
    )  # fmt: skip
    assert [window.tolist() for window in texts] == [[1, 2]] * 2


def test_broken_and_missing_images_of_a_table_are_named(tmp_path: Path) -> None:
    rows = _pictures(3)
    rows[1]["image"]["bytes"] = b"no image"
    columns: dict[str, str | None] = {"text": None, "label": None}

    def examples(name: str) -> Sequence[Any]:
        folder = _save_to_disk(tmp_path / name, [rows])
        return record_examples(
            folder, None, 9, task=None, columns=columns, images=lambda: image_reader(None, None, 8)
        )

    with pytest.raises(InputError, match=r"image in record 1 of .*column 'image' can't be read"):
        examples("broken")[1]
    rows[2]["image"] = {"bytes": None, "path": "elsewhere.png"}
    with pytest.raises(InputError, match=r"record 2 of .* only the path 'elsewhere\.png'"):
        examples("missing")
    columns["label"] = "kind"
    rows[2]["image"] = rows[0]["image"]
    with pytest.raises(InputError, match=r"no column 'kind'; it has 'image', 'label'"):
        examples("other")


def test_the_command_on_a_table_of_images(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\ndef net():\n    return nn.Sequential("
        "nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 2))\n"
    )
    _save_to_disk(tmp_path / "pictures", [_pictures(60)])
    done = rankfold(
        "lossless", "net.py:net", "--data", "pictures", "--image-size", "8", "--size", "0.9",
        "--out", "out", "--json", cwd=tmp_path,
    )  # fmt: skip
    assert json.loads(done.stdout)["task"] == "classification"


def test_numbers_of_labels_are_matched_by_name(tmp_path: Path) -> None:
    rows = [{"text": "a b", "label": i, "tags": [i, 0]} for i in range(2)]
    folder = _save_to_disk(tmp_path / "saved", [rows])
    feature = {"names": ["neg", "pos"], "_type": "ClassLabel"}
    features = {"label": feature, "tags": {"feature": feature, "_type": "List"}}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))

    def labels(known: dict[str, int] | None) -> list[int]:
        columns = {"text": None, "label": None, "target": None}
        found = record_examples(
            folder,
            lambda text, **_: {"input_ids": [len(text)]},
            9,
            task="classification",
            columns=columns,
            label_ids=known,
        )
        return [int(example["labels"]) for example in found]

    assert labels({"POS": 0, "NEG": 1}) == [1, 0]
    assert labels({"LABEL_0": 0, "LABEL_1": 1}) == [0, 1]
    assert labels(None) == [0, 1]
    assert class_names(folder, "tags") == ["neg", "pos"]
    assert class_names(folder, "text") is None
    assert class_names(tmp_path / "x.csv", "label") is None


def test_the_command_on_a_saved_folder(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\ndef net():\n"
        "    return nn.Sequential(nn.Linear(2, 16), nn.Linear(16, 16), nn.Linear(16, 2))\n"
    )
    rows = [{"a": i / 7, "b": float(i % 5), "kind": i % 2} for i in range(60)]
    _save_to_disk(tmp_path / "rows", [rows[:30], rows[30:]])
    command = ("lossless", "net.py:net", "--data", "rows", "--size", "0.9", "--out", "out")
    done = rankfold(*command, "--label-column", "kind", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["task"] == "classification"
    refused = rankfold(*command[:-1], "other", cwd=tmp_path, expect=2)
    assert "rows has no column 'label'; it has 'a', 'b', 'kind'" in refused.stderr
