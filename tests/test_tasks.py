from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional

from rankfold.data import as_part
from rankfold.errors import InputError
from rankfold.tasks import (
    CausalLM,
    Classification,
    UserLoss,
    evaluate,
    recognise_task,
)
from tests.small_models import mlp, pair_part, pairs, tiny_llama, token_windows


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_causal_loss_is_that_of_transformers() -> None:
    model, ids = tiny_llama(), torch.stack(token_windows(5))
    result = CausalLM().batch_loss(model, ids)
    assert float(result.losses.mean()) == pytest.approx(
        float(model(input_ids=ids, labels=ids).loss), rel=1e-5
    )
    assert result.terms.tolist() == [11] * 5
    assert result.logits.shape == (55, 48)


def test_masked_tokens_do_not_count() -> None:
    model, ids = tiny_llama(), torch.stack(token_windows(3))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.clone()
    labels[2, :4] = -100
    result = CausalLM().batch_loss(
        model, {"input_ids": ids, "attention_mask": mask, "labels": labels}
    )
    assert result.terms.tolist() == [11, 5, 8]
    alone = CausalLM().batch_loss(model, ids[1:2, :6])
    assert float(result.losses[1]) == pytest.approx(float(alone.losses[0]), rel=1e-4)


def test_classification_loss_and_accuracy() -> None:
    model, part = mlp(), pair_part(30)
    found = evaluate(model, Classification(), part, batch_size=7)
    values = torch.stack([x for x, _ in part.examples])
    labels = torch.tensor([y for _, y in part.examples])
    assert found.mean == pytest.approx(float(functional.cross_entropy(model(values), labels)))
    assert found.accuracy == pytest.approx(
        float((model(values).argmax(1) == labels).float().mean())
    )


def test_mean_is_over_terms_not_examples() -> None:
    examples = [*token_windows(2, length=12), *token_windows(2, seed=1, length=5)]
    found = evaluate(tiny_llama(), CausalLM(), as_part("held_out", examples))
    assert found.terms.tolist() == [11, 11, 4, 4]
    assert found.mean == pytest.approx(float((found.losses * found.terms).sum() / 30))


@pytest.mark.parametrize(
    ("examples", "task"),
    [
        (token_windows(3), CausalLM),
        ([{"input_ids": window} for window in token_windows(3)], CausalLM),
        ([{"input_ids": w, "labels": torch.tensor(1)} for w in token_windows(3)], Classification),
        (pairs(3), Classification),
        ([{"pixel_values": torch.rand(3, 4, 4), "labels": 1}] * 3, Classification),
    ],
)
def test_the_task_is_read_off_the_data(examples: list, task: type) -> None:
    assert isinstance(recognise_task(as_part("calibration", examples), None), task)


def test_a_loss_that_is_given_is_used() -> None:
    part = as_part("calibration", [torch.rand(6)] * 3)
    task = recognise_task(part, lambda model, batch: model(batch).sum(1))
    assert isinstance(task, UserLoss)
    assert len(evaluate(mlp(), task, part).losses) == 3
    with pytest.raises(InputError, match=r"Pass loss="):
        recognise_task(part, None)


def test_labels_outside_the_logits_are_refused() -> None:
    for label in (5, -1):
        with pytest.raises(InputError, match=f"label {label} is outside the model's 5 logits"):
            evaluate(mlp(), Classification(), as_part("held_out", [(torch.rand(6), label)] * 3))


def test_a_loss_that_is_not_finite_names_the_example() -> None:
    examples = pairs(6)
    examples[4] = (torch.full((6,), torch.inf), 1)
    with pytest.raises(InputError, match="held-out example 4"):
        evaluate(mlp(), Classification(), as_part("held_out", examples), batch_size=2)
    found = evaluate(mlp(), Classification(), as_part("selection", examples), finite=False)
    assert torch.isnan(found.losses[4])


def test_a_model_without_logits_is_refused() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"x": x}

    with pytest.raises(InputError, match="Pass loss="):
        evaluate(Odd(), Classification(), pair_part(4))
