"""The invariant: a loss that is the same for every model is none. Of one logit, of values and of
labels each apart no softmax is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification

import rankfold
from rankfold import InputError
from rankfold.data.parts import as_part
from rankfold.integrations.transformers import task_hint
from rankfold.tasks.agreement import Teacher
from rankfold.tasks.evaluation import evaluate
from rankfold.tasks.recognise import recognise_task
from rankfold.tasks.supervised import Classification, Regression, TokenLabels
from tests.small_models import seeded

SMALL: dict[str, Any] = {
    "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 16, "initializer_range": 0.3,
}  # fmt: skip


def bert(**options: Any) -> Any:
    config = BertConfig(**SMALL, **options)
    return seeded(3, lambda: BertForSequenceClassification(config)).eval()


def texts(labels: Tensor) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(20, (len(labels), 7), generator=generator)
    return [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]


class OneLogit(nn.Module):
    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.first, self.last, self.flat = nn.Linear(6, 8), nn.Linear(8, 1), flat

    def forward(self, values: Tensor) -> Tensor:
        out = self.last(self.first(values).relu())
        return out[:, 0] if self.flat else out


@pytest.mark.parametrize("flat", [False, True])
def test_one_logit_and_classes_are_refused(flat: bool) -> None:
    examples = [(torch.rand(6), n % 2) for n in range(40)]
    message = "expected logits" if flat else "cross-entropy of one class is always 0.*regression"
    with pytest.raises(InputError, match=message):
        rankfold.lossless(seeded(1, lambda: OneLogit(flat)), examples, size=0.8)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        inputs, labels = batch
        logits = model(inputs).flatten()
        return functional.binary_cross_entropy_with_logits(
            logits, labels.to(logits.dtype), reduction="none"
        )

    result = rankfold.lossless(seeded(1, lambda: OneLogit(flat)), examples, size=0.9, loss=loss)
    assert result.report["task"] == "custom"


def test_one_class_of_tokens_is_refused() -> None:
    config = BertConfig(**SMALL, num_labels=1)
    model = seeded(3, lambda: BertForTokenClassification(config))
    batch = {"input_ids": torch.ones(2, 5, dtype=torch.int64)}
    with pytest.raises(InputError, match="one logit"):
        labels = torch.zeros(2, 5, dtype=torch.int64)
        TokenLabels("token-classification").batch_loss(model, batch | {"labels": labels})


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"num_labels": 1}, "regression"),
        ({"num_labels": 1, "problem_type": "regression"}, "regression"),
        ({"num_labels": 2}, "classification"),
        ({"num_labels": 3, "problem_type": "single_label_classification"}, "classification"),
        ({"num_labels": 3, "problem_type": "regression"}, "regression"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, "multi-label"),
        ({"num_labels": 1, "problem_type": "multi_label_classification"}, "multi-label"),
    ],
)
def test_what_a_model_is_made_for_is_that_of_transformers(
    options: dict[str, Any], hint: str
) -> None:
    assert task_hint(bert(**options)) == hint


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_one_value_is_scored_as_transformers_trains_it(dtype: torch.dtype) -> None:
    model, labels = bert(num_labels=1), torch.arange(6).to(dtype)
    part = as_part("held_out", texts(labels))
    task = recognise_task(part, None, "regression", hint=task_hint(model))
    assert isinstance(task, Regression)
    with torch.no_grad():
        batch = part.collate(part.examples)
        wanted = model(input_ids=batch["input_ids"], labels=labels.float()).loss
    assert evaluate(model, task, part).mean == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("name", [None, "classification", "regression"])
def test_labels_each_apart_are_refused(name: str | None) -> None:
    model = bert(num_labels=3, problem_type="multi_label_classification")
    for labels in (torch.eye(3).repeat(2, 1), torch.arange(6) % 3):
        part = as_part("held_out", texts(labels))
        with pytest.raises(
            InputError, match=r"multi_label_classification.*In Python pass loss=.*teacher"
        ):
            recognise_task(part, None, name, hint=task_hint(model))


def test_several_0s_and_1s_an_example_are_asked_about() -> None:
    examples = [(torch.rand(6), torch.tensor([0.0, 1.0, 1.0])) for _ in range(4)]
    part = as_part("held_out", examples)
    with pytest.raises(InputError, match="0s and 1s in floating point, several an example"):
        recognise_task(part, None)
    assert isinstance(recognise_task(part, None, "regression"), Regression)
    values = as_part("held_out", [(torch.rand(6), torch.tensor([0.5, 1.0]))])
    one = as_part("held_out", [(torch.rand(6), torch.tensor(float(n % 2))) for n in range(4)])
    with pytest.raises(InputError, match="0s and 1s in floating point, one an example"):
        recognise_task(one, None)
    shares = as_part("held_out", [(torch.rand(6), torch.tensor([0.25, 0.75]))] * 4)
    with pytest.raises(InputError, match=r"add up to 1.*regression.*cross_entropy"):
        recognise_task(shares, None)
    assert isinstance(recognise_task(shares, None, "regression"), Regression)
    tags = [{"input_ids": torch.arange(5), "labels": torch.arange(5) % 3} for _ in range(4)]
    with pytest.raises(InputError, match=r"not the token itself.*token-classification"):
        recognise_task(as_part("held_out", tags), None)
    own = [{"input_ids": torch.arange(5), "labels": torch.tensor([-100, 1, 2, 3, 4])}] * 4
    assert recognise_task(as_part("held_out", own), None).name == "causal-lm"
    assert isinstance(recognise_task(values, None), Regression)
    classes = as_part("held_out", [(torch.rand(6), 1)] * 3)
    assert isinstance(recognise_task(classes, None), Classification)


@pytest.mark.parametrize(
    "options",
    [
        {"num_labels": 1},
        {"num_labels": 1, "problem_type": "multi_label_classification"},
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        {"num_labels": 3, "problem_type": "regression"},
    ],
)
def test_agreement_sees_every_change_of_such_logits(options: dict[str, Any]) -> None:
    original, changed = bert(**options), bert(**options)
    changed.classifier.bias.data += 2  # a softmax is the same
    batch = {"input_ids": torch.stack([e["input_ids"] for e in texts(torch.zeros(4))])}
    task = Teacher([original], batch)
    assert not task.logits
    assert "squared distance" in task.unit
    with torch.no_grad():
        theirs = original(**batch).logits
        found = task.batch_loss(changed, batch).losses
    wanted = 4 * theirs.shape[1] / theirs.square().sum(1)
    torch.testing.assert_close(found, wanted)
    of_classes = Teacher([bert(num_labels=3)], batch)
    assert of_classes.logits
