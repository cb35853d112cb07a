"""Examples of which nothing is to be predicted are left out, counted and told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rankfold.data.parts import as_part
from rankfold.errors import InputError
from rankfold.model.find_layers import find_layers
from rankfold.statistics.labels import UNLABELLED, without_unlabelled
from rankfold.statistics.recorder import collect_statistics
from rankfold.tasks.supervised import CausalLM, Classification, TokenLabels, UserLoss

LENGTH, WORDS = 6, 9
NO_LABELS = torch.full((LENGTH,), -100)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(WORDS, 8), nn.Linear(8, WORDS)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.layer(self.embedding(input_ids))


def example(number: int, labels: Tensor | None) -> dict[str, Tensor]:
    ids = torch.randint(WORDS, (LENGTH,), generator=torch.Generator().manual_seed(number))
    return {"input_ids": ids} if labels is None else {"input_ids": ids, "labels": labels}


def labelled(number: int, has: bool) -> dict[str, Tensor]:
    return example(number, torch.arange(LENGTH) % WORDS if has else NO_LABELS)


@settings(max_examples=40, deadline=None)
@given(has=st.lists(st.booleans(), min_size=8, max_size=40), masked=st.booleans())
def test_those_with_a_label_are_kept_and_the_others_counted(has: list[bool], masked: bool) -> None:
    task = TokenLabels("masked-lm" if masked else "token-classification")
    part = as_part("calibration", [labelled(place, one) for place, one in enumerate(has)])
    if sum(has) < 4:
        with pytest.raises(InputError, match=f"of the {len(has)} .* {len(has) - sum(has)} have no"):
            without_unlabelled(part, task)
        return
    left = without_unlabelled(part, task)
    kept = [digest for digest, one in zip(part.digests, has, strict=True) if one]
    assert left.digests == kept
    assert left.usage()["given"] == len(has)
    missing = len(has) - sum(has)
    assert left.left_out == ({UNLABELLED: missing} if missing else {})


def mask(*shown: int) -> dict[str, Tensor]:
    return {"attention_mask": torch.tensor([int(place in shown) for place in range(LENGTH)])}


# Of a causal language model: an example, and whether a token of it is predicted.
CAUSAL: dict[str, tuple[Any, bool]] = {
    "ids": (torch.arange(LENGTH), True),
    "one token": (torch.arange(1), False),
    "ids by name": (example(0, None), True),
    "the first label alone": (
        example(0, NO_LABELS.clone().index_fill(0, torch.tensor([0]), 1)),
        False,
    ),
    "the last label alone": (
        example(0, NO_LABELS.clone().index_fill(0, torch.tensor([5]), 1)),
        True,
    ),
    "no label": (example(0, NO_LABELS), False),
    "all hidden": (example(0, None) | mask(), False),
    "one token shown": (example(0, None) | mask(0), False),
    "two tokens shown": (example(0, None) | mask(0, 1), True),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_model_predicts_what_stands_after_the_first_token(name: str) -> None:
    one, has = CAUSAL[name]
    others = [labelled(place, True) for place in range(4)]
    if torch.is_tensor(one):
        others = [other["input_ids"] for other in others]
    elif "attention_mask" in one:
        others = [{**example(p, None), **mask(*range(LENGTH))} for p in range(4)]
    elif "labels" not in one:
        others = [{k: v for k, v in other.items() if k != "labels"} for other in others]
    left = without_unlabelled(as_part("calibration", [*others, one]), CausalLM())
    assert len(left.examples) == (5 if has else 4)


def test_labels_that_a_collate_function_makes_count() -> None:
    def collate(texts: list[str]) -> dict[str, Tensor]:
        rows = torch.tensor([[ord(letter) % WORDS for letter in text] for text in texts])
        return {"input_ids": rows, "labels": rows.where(rows > 4, -100)}

    letters = {bool(ord(one) % WORDS > 4): one * LENGTH for one in "abcdefgh"}
    part = as_part("calibration", [letters[place % 2 == 0] for place in range(12)], collate)
    assert without_unlabelled(part, TokenLabels("masked-lm")).left_out == {UNLABELLED: 6}


@pytest.mark.parametrize("task", [Classification(), UserLoss(lambda model, batch: batch)])
def test_other_tasks_have_labels_of_their_own(task: Any) -> None:
    part = as_part("calibration", [labelled(place, False) for place in range(9)])
    assert without_unlabelled(part, task) is part


ORDERS: dict[str, Callable[[int], bool]] = {
    "first half": lambda place: place < 10,
    "second half": lambda place: place >= 10,
    "every other": lambda place: place % 2 == 0,
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("task", ["masked-lm", "token-classification"])
def test_statistics_are_finite_where_a_half_of_the_data_has_no_label(task: Any, order: str) -> None:
    torch.manual_seed(0)
    model, kind = Words().eval(), TokenLabels(task)
    layers, _ = find_layers(model, (), (), {})
    given = [labelled(place, ORDERS[order](place)) for place in range(20)]
    part = without_unlabelled(as_part("calibration", given), kind)
    found = collect_statistics(model, kind, part, layers, curvature="empirical")
    for statistics in found.values():
        assert statistics.gradients is not None
        assert all(bool(gradient.isfinite().all()) for gradient in statistics.gradients)
