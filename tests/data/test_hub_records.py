"""A ``datasets.Dataset`` as data; skipped where the package is absent."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rankfold
from rankfold.data.given import GivenExamples, as_examples
from rankfold.data.hub_records import is_hub_data
from rankfold.data.parts import as_part
from rankfold.errors import InputError
from tests.small_models import VOCABULARY, tiny_llama, token_windows

datasets = pytest.importorskip("datasets")
COUNT = 60
VALUE = datasets.Value("int64")
IDS = [window.tolist() for window in token_windows(COUNT)]


def hub(**columns: Any) -> Any:
    return datasets.Dataset.from_dict(columns)


def read(data: object) -> GivenExamples:
    found = as_examples(data)
    assert isinstance(found, GivenExamples)
    return found


def test_a_run_on_tokenized_records() -> None:
    data = hub(text=["a"] * COUNT, input_ids=IDS)
    result = rankfold.lossless(tiny_llama(), data, size=0.9, effort="fast")
    (source,) = result.report["sources"]
    assert (source["unit"], source["given"], source["used"]) == ("record", COUNT, COUNT)
    assert all(part["columns_left_out"] == ["text"] for part in result.report["data"].values())
    same = rankfold.lossless(
        tiny_llama(), [{"input_ids": row} for row in IDS], size=0.9, effort="fast"
    )
    assert result.certificate == same.certificate


@pytest.mark.parametrize("kind", [None, "torch", "numpy"])
def test_its_format_is_kept_and_changes_nothing(kind: str | None) -> None:
    data = hub(input_ids=IDS, label=[0, 1] * 30).with_format(kind)
    part = as_part("calibration", data)
    plain = as_part("calibration", [{"input_ids": i, "label": n % 2} for n, i in enumerate(IDS)])
    assert part.digests == plain.digests
    assert all(int(e["label"]) == n % 2 for n, e in enumerate(part.examples))
    assert all(
        torch.equal(e["input_ids"], torch.tensor(IDS[n])) for n, e in enumerate(part.examples)
    )


def test_records_are_used_or_left_out_for_a_reason() -> None:
    ids = [None if place % 7 == 0 else row for place, row in enumerate(IDS)]
    labels = [None if place % 5 == 0 else place % 2 for place in range(COUNT)]
    features = datasets.Features(
        text=datasets.Value("string"),
        input_ids=datasets.Sequence(datasets.Value("int64")),
        label=datasets.ClassLabel(names=["no", "yes"]),
    )
    data = datasets.Dataset.from_dict(
        {"text": [None] * COUNT, "input_ids": ids, "label": labels}, features=features
    )
    for given, order in ((data, range(COUNT)), (data.select(range(59, -1, -1)), range(59, -1, -1))):
        found = read(given)
        account = found.account
        assert account is not None
        expected = {
            "without input_ids": [n for n, place in enumerate(order) if place % 7 == 0],
            "without label": [n for n, p in enumerate(order) if p % 7 and p % 5 == 0],
        }
        assert account.left_out == expected
        assert account.given == COUNT == account.used + sum(map(len, expected.values()))
        kept = [place for place in order if place % 7 and place % 5]
        assert [example["label"] for example in found] == [place % 2 for place in kept]
        assert [c.value for c in account.classes] == ["0 (no)", "1 (yes)"]


def test_what_has_no_input_says_how_to_make_one() -> None:
    with pytest.raises(InputError, match=r"tokenizer\(rows\['text'\], truncation=True\)"):
        as_examples(hub(text=["a"] * COUNT, label=[0, 1] * 30))
    with pytest.raises(InputError, match="no record that can be used: without input_ids"):
        as_examples(hub(input_ids=[None] * COUNT, label=[0, 1] * 30).cast_column("label", VALUE))


def test_splits_and_streams() -> None:
    data = hub(input_ids=IDS)
    with pytest.raises(InputError, match=r"several data sets .train"):
        as_examples(datasets.DatasetDict(train=data))
    assert not is_hub_data(data.to_iterable_dataset())
    assert len(as_examples(data.to_iterable_dataset())) == COUNT
    assert max(max(row) for row in IDS) < VOCABULARY
