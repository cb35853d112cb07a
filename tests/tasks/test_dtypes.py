"""The invariant: labels, masks, positions and targets reach a task in their own dtype, and losses
are those of plain torch, in float32 or better."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from rankfold.data.parts import as_part
from rankfold.errors import InputError
from rankfold.tasks.agreement import Embedding, Teacher
from rankfold.tasks.evaluation import evaluate, on_device
from rankfold.tasks.supervised import (
    CausalLM,
    Classification,
    Regression,
    Seq2Seq,
    TokenLabels,
    UserLoss,
)
from tests.small_models import mlp, pairs, seeded, tiny_llama, token_windows

HALF = (torch.bfloat16, torch.float16)
FLOATS = (*HALF, torch.float32, torch.float64)
WHOLE = (torch.uint8, torch.int16, torch.int32, torch.int64)


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


KEPT = (
    "labels", "label", "class_labels", "target", "targets", "target_values", "future_values",
    "mask", "attention_mask", "pixel_mask", "mask_labels", "decoder_attention_mask", "loss_mask",
    "positions", "position_ids", "start_positions", "timestamps", "time", "bbox", "coords",
)  # fmt: skip
CAST = (
    "x", "pixel_values", "input_features", "inputs_embeds", "position_embeddings", "past_values",
    "timesteps_embeds", "image", "masked_image_values",
)  # fmt: skip


@settings(deadline=None)
@given(
    dtype=strategies.sampled_from(FLOATS),
    kept=strategies.sampled_from(KEPT),
    cast=strategies.sampled_from(CAST),
    given_dtype=strategies.sampled_from(FLOATS),
)
def test_what_a_name_says_decides(
    dtype: torch.dtype, kept: str, cast: str, given_dtype: torch.dtype
) -> None:
    values = torch.full((3,), 257.1, dtype=given_dtype)
    model = nn.Linear(2, 2, dtype=dtype)
    batch = {kept: values, cast: values, "ids": torch.arange(3), "nested": {kept: [values]}}
    moved = on_device(batch, model)
    assert moved[kept].dtype == moved["nested"][kept][0].dtype == given_dtype
    assert torch.equal(moved[kept], values)
    assert moved[cast].dtype == dtype
    assert moved["ids"].dtype == torch.int64


def test_all_but_the_first_of_a_batch_is_kept_and_kinds_stay() -> None:
    model = nn.Linear(2, 2, dtype=torch.bfloat16)
    values = torch.rand(3)
    Named = namedtuple("Named", "image target")
    named = on_device(Named(values, values), model)
    assert isinstance(named, Named)
    for batch in (named, on_device((values, values), model), on_device([values, values], model)):
        assert batch[0].dtype == torch.bfloat16
        assert torch.equal(batch[1], values)
    assert isinstance(on_device([values], model), list)
    inputs, labels = on_device(((values, {"mask": values}), values), model)
    assert (inputs[0].dtype, inputs[1]["mask"].dtype) == (torch.bfloat16, torch.float32)
    assert labels.dtype == torch.float32
    packed = on_device(pack_sequence([values, values[:2]]), model)
    assert isinstance(packed, PackedSequence)
    assert packed.data.dtype == torch.bfloat16


def _in(dtype: torch.dtype) -> nn.Module:
    return mlp().to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("label_dtype", [*WHOLE, torch.bool], ids=str)
def test_classification(dtype: torch.dtype, label_dtype: torch.dtype) -> None:
    model = _in(dtype)
    examples = [(x, torch.tensor(y % 2).to(label_dtype)) for x, y in pairs(20)]
    found = evaluate(model, Classification(), as_part("held_out", examples))
    logits = model(torch.stack([x for x, _ in examples]).to(dtype))
    labels = torch.tensor([int(y) for _, y in examples])
    wanted = functional.cross_entropy(logits.double(), labels, reduction="none")
    torch.testing.assert_close(found.losses, wanted, rtol=1e-6, atol=1e-6)
    assert found.accuracy == float((logits.argmax(1) == labels).double().mean())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "labels",
    [
        torch.linspace(-3, 3, 20),
        torch.linspace(1000, 1001, 20),  # half precision knows no numbers between these
        torch.linspace(-3, 3, 20).double() + 1e-9,
        torch.arange(20) + 2**24,  # nor float32 between these
        torch.arange(20, dtype=torch.uint8),
        torch.linspace(0, 1, 20).half(),
    ],
    ids=["float32", "large", "float64", "int64", "uint8", "float16"],
)
def test_regression(dtype: torch.dtype, labels: Tensor) -> None:
    model = seeded(1, lambda: nn.Linear(6, 1)).to(dtype)
    values = torch.stack([x for x, _ in pairs(20)])
    part = as_part("held_out", list(zip(values, labels, strict=True)))
    found = evaluate(model, Regression(), part)
    given = model(values.to(dtype))[:, 0]
    wanted = (given.double() - labels.double()).square()
    torch.testing.assert_close(found.losses, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bool, torch.int64, torch.uint8])
def test_language_models(dtype: torch.dtype, mask_dtype: torch.dtype) -> None:
    model, ids = tiny_llama(dtype), torch.stack(token_windows(4))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    examples = [
        {"input_ids": i, "attention_mask": m, "labels": i.to(torch.int32)}
        for i, m in zip(ids, mask.to(mask_dtype), strict=True)
    ]
    logits = model(input_ids=ids, attention_mask=mask).logits.double()
    targets = ids.masked_fill(mask == 0, -100)
    part = as_part("held_out", examples)
    shifted = functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
    assert evaluate(model, CausalLM(), part).mean == pytest.approx(float(shifted), rel=1e-6)
    in_place = functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
    found = evaluate(model, TokenLabels("token-classification"), part)
    assert found.mean == pytest.approx(float(in_place), rel=1e-6)


def test_a_mask_that_hides_no_tokens_needs_labels() -> None:
    ids = torch.stack(token_windows(2))
    square = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    with pytest.raises(InputError, match="doesn't say which tokens count"):
        CausalLM().batch_loss(tiny_llama(), {"input_ids": ids, "attention_mask": square})
    batch = {"input_ids": ids, "attention_mask": square, "labels": ids}
    alone = CausalLM().batch_loss(tiny_llama(), ids)
    torch.testing.assert_close(CausalLM().batch_loss(tiny_llama(), batch).losses, alone.losses)


@pytest.mark.parametrize(
    ("task", "labels"),
    [
        (Classification(), torch.rand(2)),
        (CausalLM(), torch.rand(2, 12)),
        (TokenLabels("masked-lm"), torch.rand(2, 12)),
        (Seq2Seq(), torch.rand(2, 12)),
    ],
)
def test_classes_are_whole_numbers(task: Any, labels: Tensor) -> None:
    batch = {"input_ids": torch.stack(token_windows(2)), "labels": labels}
    with pytest.raises(InputError, match="the labels are float32; expected whole numbers"):
        task.batch_loss(tiny_llama(), batch)


class Encoder(nn.Module):
    """Hidden states of inputs given, as an object of transformers has them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=dtype))

    def forward(self, x: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"last_hidden_state": x * self.scale}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_embeddings_of_long_texts_are_means_in_full_precision(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 700, 5, generator=generator).to(dtype) + 3
    mask = torch.ones(2, 700)
    mask[1, 600:] = 0
    batch = {"x": hidden, "attention_mask": mask}
    original, changed = Encoder(dtype), Encoder(dtype)
    changed.scale.fill_(-0.5)
    found = Embedding([original], batch).batch_loss(changed, batch)
    torch.testing.assert_close(found.losses.double(), torch.full((2,), 4.0).double())
    wanted = (hidden.double() * mask[..., None]).sum(1) / mask.double().sum(1, keepdim=True)
    unit = -functional.normalize(wanted, dim=-1)
    torch.testing.assert_close(found.squared.double(), unit, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("logits", [True, False])
def test_agreement_with_the_original(dtype: torch.dtype, logits: bool) -> None:
    original, changed = _in(dtype), seeded(9, lambda: type(mlp())()).to(dtype)
    values = torch.stack([x for x, _ in pairs(8)]).to(dtype)
    batch: Any = (values, torch.zeros(8, dtype=torch.int64)) if logits else values
    found = Teacher([original], batch).batch_loss(changed, batch)
    ours, theirs = changed(values).double(), original(values).double()
    if logits:
        log = theirs.log_softmax(-1)
        expected = (log.exp() * (log - ours.log_softmax(-1))).sum(1)
    else:
        expected = (ours - theirs).square().sum(1) / theirs.square().sum(1)
    torch.testing.assert_close(found.losses.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_loss_of_the_users_sees_what_the_loader_gave() -> None:
    seen: list[Any] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        seen.append(batch)
        inputs, targets, weights = batch
        return (model(inputs)[:, 0].float() - targets).square() * weights

    examples = [(x, torch.tensor(257.1, dtype=torch.float64), 0.5) for x, _ in pairs(6)]
    evaluate(_in(torch.bfloat16), UserLoss(loss), as_part("held_out", examples), batch_size=6)
    assert [t.dtype for t in seen[0]] == [torch.bfloat16, torch.float64, torch.float32]
