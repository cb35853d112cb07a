from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn import functional
from transformers import T5Config, T5ForConditionalGeneration

from rankfold.data.parts import as_part
from rankfold.errors import InputError
from rankfold.integrations.transformers import task_hint
from rankfold.model.unpack import unpack
from rankfold.tasks import agreement
from rankfold.tasks.agreement import Embedding, Teacher, unit_embeddings
from rankfold.tasks.evaluation import evaluate
from rankfold.tasks.losses import TASKS
from rankfold.tasks.recognise import recognise_task
from rankfold.tasks.supervised import (
    CausalLM,
    Classification,
    Regression,
    Seq2Seq,
    TokenLabels,
    UserLoss,
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
    with pytest.raises(InputError, match=r"teacher needs no labels\), or in Python pass loss="):
        recognise_task(part, None)
    with pytest.raises(InputError, match="both loss= and the task 'teacher'"):
        recognise_task(part, lambda model, batch: model(batch).sum(1), "teacher")
    with pytest.raises(InputError, match=r"expected one of causal-lm.*Did you mean regression\?"):
        recognise_task(part, None, "regresion")


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

    with pytest.raises(InputError, match="In Python pass loss="):
        evaluate(Odd(), Classification(), pair_part(4))


def _masked(count: int) -> list[dict[str, torch.Tensor]]:
    examples = []
    for window in token_windows(count):
        labels = torch.full_like(window, -100)
        labels[2:5] = window[2:5]
        examples.append({"input_ids": window, "labels": labels})
    return examples


def test_token_labels_are_scored_in_their_own_place() -> None:
    model, part = tiny_llama(), as_part("held_out", _masked(4))
    task = recognise_task(part, None, hint="token-classification")
    assert isinstance(task, TokenLabels) and task.name == "token-classification"
    found = evaluate(model, task, part)
    ids = torch.stack([e["input_ids"] for e in part.examples])
    logits = model(ids).logits[:, 2:5]
    expected = functional.cross_entropy(logits.flatten(0, 1), ids[:, 2:5].flatten())
    assert found.mean == pytest.approx(float(expected), rel=1e-5)
    assert found.terms.tolist() == [3] * 4
    with pytest.raises(InputError, match=r"masked-lm needs labels(.|\n)*task teacher"):
        evaluate(model, TokenLabels("masked-lm"), as_part("held_out", token_windows(4)))
    wrong = [{"input_ids": w, "labels": torch.tensor(1)} for w in token_windows(4)]
    with pytest.raises(InputError, match="one label a token"):
        evaluate(model, TokenLabels("masked-lm"), as_part("held_out", wrong))


def test_seq2seq_is_the_loss_that_the_model_is_trained_with() -> None:
    config = T5Config(
        vocab_size=48, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    ids, labels = torch.stack(token_windows(3)), torch.stack(token_windows(3, seed=4, length=6))
    labels[1, 4:] = -100
    batch = {"input_ids": ids, "labels": labels}
    result = Seq2Seq().batch_loss(model, batch)
    total = (result.losses * result.terms).sum() / result.terms.sum()
    assert float(total) == pytest.approx(float(model(**batch).loss), rel=1e-5)
    assert result.terms.tolist() == [6, 4, 6]
    assert task_hint(model) == "seq2seq"


def test_regression_is_the_mean_squared_error() -> None:
    part = as_part("held_out", [(x, torch.rand(5)) for x in torch.rand(7, 6)])
    task, model = recognise_task(part, None), mlp()
    assert isinstance(task, Regression)
    values = model(torch.stack([x for x, _ in part.examples]))
    wanted = torch.stack([y for _, y in part.examples])
    found = evaluate(model, task, part)
    assert found.mean == pytest.approx(float(functional.mse_loss(values, wanted)), rel=1e-5)
    single = [(x, float(x[0])) for x in torch.rand(7, 6)]
    head = nn.Sequential(nn.Linear(6, 1))
    inputs, targets = zip(*single, strict=True)
    errors = head(torch.stack(inputs))[:, 0] - torch.tensor(targets)
    assert evaluate(head, Regression(), as_part("held_out", single)).mean == pytest.approx(
        float(errors.square().mean()), rel=1e-5
    )
    with pytest.raises(InputError, match="as many values an example as labels"):
        evaluate(model, Regression(), as_part("held_out", single))
    with pytest.raises(InputError, match="For values use task regression"):
        evaluate(model, Classification(), as_part("held_out", single))


def test_a_teacher_is_at_no_distance_from_itself_and_at_the_divergence_from_others() -> None:
    original, other = mlp(), mlp()
    for parameter in other.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape))
    part = pair_part(20)
    batch = part.collate(part.examples)
    task = recognise_task(part, None, "teacher", [original])
    assert isinstance(task, Teacher) and task.unit == "nats of divergence from the original"
    assert evaluate(original, task, part).mean == 0
    found = evaluate(other, task, part)
    expected = functional.kl_div(
        other(batch[0]).log_softmax(-1), original(batch[0]).softmax(-1), reduction="batchmean"
    )
    assert found.mean == pytest.approx(float(expected), rel=1e-4) and found.mean > 0
    # Without labels a plain tensor may be anything: squared distance, whatever its scale.
    unlabelled = as_part("held_out", [x for x, _ in part.examples])
    task = recognise_task(unlabelled, None, "teacher", [original])
    assert task.unit.startswith("squared distance")
    shares = (other(batch[0]) - original(batch[0])).square().sum(1) / original(
        batch[0]
    ).square().sum(1)
    assert evaluate(other, task, unlabelled).mean == pytest.approx(float(shares.mean()), rel=1e-4)
    with pytest.raises(InputError, match="not at hand here"):
        recognise_task(part, None, "teacher")


@pytest.mark.parametrize("kept_bytes", [2**26, 0])
def test_the_original_is_called_once_for_a_batch(
    kept_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "KEPT_BYTES", kept_bytes)
    original, other = mlp(), mlp()
    part = pair_part(20)
    task = Teacher([original], part.collate(part.examples))
    calls: list[int] = []
    original.register_forward_hook(lambda *_: calls.append(1))
    first, second = (evaluate(other, task, part, batch_size=10) for _ in range(2))
    assert len(calls) == (2 if kept_bytes else 4)
    assert torch.equal(first.losses, second.losses)
    fresh = Teacher([original], part.collate(part.examples))
    assert torch.equal(first.losses, evaluate(other, fresh, part, batch_size=10).losses)
    # Other examples, and the same ones in other batches, are other batches.
    turned = as_part("held_out", part.examples[::-1])
    losses = evaluate(other, task, turned, batch_size=10).losses
    torch.testing.assert_close(losses.flip(0), first.losses)


def test_a_teacher_of_tokens_leaves_out_what_the_mask_hides() -> None:
    original, other = tiny_llama(), tiny_llama()
    other.model.embed_tokens.weight.mul_(1.2)
    ids = torch.stack(token_windows(2))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    result = Teacher([original], batch).batch_loss(other, batch)
    assert result.terms.tolist() == [12, 7]
    alone = {"input_ids": ids[1:, :7], "attention_mask": mask[1:, :7]}
    short = Teacher([original], batch).batch_loss(other, alone)
    assert float(result.losses[1]) == pytest.approx(float(short.losses[0]), rel=1e-3)


def test_embeddings_are_unit_means_over_the_tokens() -> None:
    encoder = tiny_llama().model
    ids = torch.stack(token_windows(3))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    found = unit_embeddings(encoder, batch)
    hidden = encoder(**batch).last_hidden_state
    torch.testing.assert_close(found[0], functional.normalize(hidden[0, :5].mean(0), dim=0))
    other = tiny_llama().model
    other.embed_tokens.weight.mul_(1.5)
    task = Embedding([encoder], batch)
    losses = task.batch_loss(other, batch).losses
    similar = (found * unit_embeddings(other, batch)).sum(1)
    torch.testing.assert_close(losses, 2 - 2 * similar, atol=1e-5, rtol=1e-4)
    assert float(task.batch_loss(encoder, batch).losses.abs().max()) == 0
    assert task_hint(encoder) == "embedding"
    assert isinstance(
        recognise_task(
            as_part("calibration", token_windows(3)), None, None, [encoder], "embedding"
        ),
        Embedding,
    )


def test_what_a_model_is_made_for() -> None:
    assert task_hint(mlp()) is None
    assert task_hint(tiny_llama()) == "causal-lm"
    for name, config, expected in (
        ("MarianMTModel", hf.MarianConfig(), "seq2seq"),
        ("BertGenerationDecoder", hf.BertGenerationConfig(is_decoder=True), "causal-lm"),
        ("BertForMaskedLM", hf.BertConfig(), "masked-lm"),
        ("BertForQuestionAnswering", hf.BertConfig(), None),
        ("BertModel", hf.BertConfig(), "embedding"),
        ("ViTForImageClassification", hf.ViTConfig(), "classification"),
        ("VideoMAEForVideoClassification", hf.VideoMAEConfig(), "classification"),
        ("DeiTForImageClassificationWithTeacher", hf.DeiTConfig(), "classification"),
    ):
        with torch.device("meta"):
            assert task_hint(getattr(hf, name)(config)) == expected, name
    assert set(TASKS) >= {"causal-lm", "teacher"}


def test_pairs_of_ids_and_labels_are_scored_as_mappings_are() -> None:
    sizes = {"vocab_size": 30, "num_labels": 4, "pad_token_id": 0}
    wide = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    torch.manual_seed(0)
    tagger = hf.BertForTokenClassification(
        hf.BertConfig(**sizes, **wide, num_attention_heads=2)
    ).eval()
    writer = T5ForConditionalGeneration(
        T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2,
                 decoder_start_token_id=0)
    ).eval()  # fmt: skip
    ids, tags = torch.randint(3, 30, (5, 6)), torch.randint(0, 4, (5, 6))
    for model, task in ((tagger, TokenLabels("token-classification")), (writer, Seq2Seq())):
        pairs_of, named = (
            task.batch_loss(model, batch).losses
            for batch in ((ids, tags), {"input_ids": ids, "labels": tags})
        )
        assert torch.equal(pairs_of, named)
    part = as_part(
        "calibration", [(i.tolist(), t.tolist()) for i, t in zip(ids, tags, strict=True)]
    )
    assert (
        recognise_task(part, None, None, (), "token-classification").name == "token-classification"
    )
    with pytest.raises(
        InputError, match=r"task seq2seq needs token ids, and the data give \(float"
    ):
        Seq2Seq().batch_loss(writer, (torch.rand(2, 6), tags[:2]))


@pytest.mark.parametrize("name", ["causal-lm", "masked-lm", "token-classification", "seq2seq"])
@pytest.mark.parametrize("hint", ["classification", "regression"])
def test_a_task_of_tokens_is_none_of_a_model_of_examples(name: str, hint: str) -> None:
    with pytest.raises(InputError, match=f"task= is {name}, .* the model is made for {hint}"):
        recognise_task(pair_part(4), None, name, hint=hint)


def test_a_batch_norm_without_running_statistics_is_refused() -> None:
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 3)
    )
    with pytest.raises(InputError, match=r"layer 1 \(BatchNorm1d\) has no running statistics"):
        unpack(model)
    unpack(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.InstanceNorm1d(8)).eval())
