"""The invariant: a text's loss is what the model gives for the text alone, whatever it is padded to
in a batch; padding is never made up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings, strategies
from torch import Tensor, nn
from torch.nn import functional

import rankfold
from rankfold import Data, InputError
from rankfold.data.parts import as_part
from rankfold.tasks.agreement import Teacher
from rankfold.tasks.evaluation import evaluate
from rankfold.tasks.last_token import goes_alone, reads_last_token
from rankfold.tasks.supervised import Classification, Regression
from tests.small_models import seeded

WORDS = 30
SMALL: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.3,
    "bos_token_id": 1, "eos_token_id": 2, "num_labels": 3,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "vocab_size": WORDS, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32,
    "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 3,
}  # fmt: skip
DECODERS = {
    "GPT2": GPT2,
    "Llama": SMALL,
    "Mistral": SMALL | {"num_key_value_heads": 1, "sliding_window": 4},
    "GPTNeoX": SMALL,
    "Qwen2": SMALL | {"num_key_value_heads": 1},
    "OPT": SMALL | {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "Bloom": {"vocab_size": WORDS, "hidden_size": 16, "n_layer": 1, "n_head": 2, "num_labels": 3,
              "initializer_range": 0.3},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def classifier(name: str, pad: int | None, **options: Any) -> Any:
    config_class = getattr(transformers, f"{name}Config")
    config = config_class(**(DECODERS.get(name, SMALL) | {"pad_token_id": pad} | options))
    model_class = getattr(transformers, f"{name}ForSequenceClassification")
    return seeded(3, lambda: model_class(config)).eval()


def texts(lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, WORDS, (length,), generator=generator) for length in lengths]


def padded(rows: list[Tensor], token: int, left: bool) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    gaps = [longest - len(row) for row in rows]

    def fill(row: Tensor, gap: int, value: int) -> Tensor:
        return functional.pad(row, (gap, 0) if left else (0, gap), value=value)

    pairs = list(zip(rows, gaps, strict=True))
    return {
        "input_ids": torch.stack([fill(row, gap, token) for row, gap in pairs]),
        "attention_mask": torch.stack([fill(torch.ones_like(r), gap, 0) for r, gap in pairs]),
    }


def alone(model: nn.Module, rows: list[Tensor]) -> Tensor:
    return torch.cat([model(input_ids=row[None]).logits for row in rows])


@pytest.mark.parametrize("name", DECODERS)
@settings(max_examples=8, deadline=None)
@given(
    lengths=strategies.lists(strategies.integers(1, 12), min_size=1, max_size=5),
    token=strategies.integers(0, WORDS - 1),
    left=strategies.booleans(),
)
def test_without_a_padding_token_each_text_goes_alone(
    name: str, lengths: list[int], token: int, left: bool
) -> None:
    model, rows = classifier(name, None), texts(lengths)
    labels = torch.arange(len(rows)) % 3
    batch = padded(rows, token, left) | {"labels": labels}
    wanted = functional.cross_entropy(alone(model, rows), labels, reduction="none")
    found = Classification().batch_loss(model, batch)
    torch.testing.assert_close(found.losses, wanted)


@pytest.mark.parametrize("name", DECODERS)
def test_padding_is_the_models_own_or_refused(name: str) -> None:
    model, rows = classifier(name, 0), texts([3, 9, 5])
    labels = torch.tensor([0, 1, 2])
    batch = padded(rows, 0, left=False) | {"labels": labels}
    wanted = functional.cross_entropy(alone(model, rows), labels, reduction="none")
    torch.testing.assert_close(Classification().batch_loss(model, batch).losses, wanted)
    other = padded(rows, 2, left=False) | {"labels": labels}
    with pytest.raises(InputError, match=r"padded with the token 2.*says 0 \(pad_token_id\)"):
        Classification().batch_loss(model, other)
    equal = {"input_ids": torch.stack(texts([6, 6])), "labels": labels[:2]}
    assert len(Classification().batch_loss(model, equal).losses) == 2


def test_values_and_agreement_likewise() -> None:
    rows = texts([3, 9, 5])
    batch = padded(rows, 7, left=False)
    model = classifier("GPT2", None, num_labels=1)
    values = torch.tensor([0.5, -1.0, 2.0])
    found = Regression().batch_loss(model, batch | {"labels": values})
    torch.testing.assert_close(found.losses, (alone(model, rows)[:, 0] - values).square())
    original, changed = classifier("Llama", None), classifier("Llama", None)
    changed.score.weight.mul_(-0.5)
    task = Teacher([original], batch)
    assert task.logits
    theirs, ours = (alone(m, rows).log_softmax(-1) for m in (original, changed))
    wanted = (theirs.exp() * (theirs - ours)).sum(1)
    torch.testing.assert_close(task.batch_loss(changed, batch).losses, wanted)


def test_other_inputs_of_a_text_go_with_it() -> None:
    model, rows = classifier("GPT2", None), texts([4, 7])
    batch = padded(rows, 5, left=True)
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    labels = torch.tensor([0, 1])
    found = Classification().batch_loss(model, batch | {"labels": labels}).logits
    with_types = [
        model(input_ids=r[None], token_type_ids=torch.zeros_like(r)[None]).logits for r in rows
    ]
    torch.testing.assert_close(found, torch.cat(with_types))


def test_encoders_find_their_logits_elsewhere() -> None:
    model, rows = classifier("Bert", 0), texts([3, 9, 5])
    assert not reads_last_token(model)
    assert not goes_alone(classifier("Bert", None))
    batch = padded(rows, 7, left=False) | {"labels": torch.tensor([0, 1, 2])}
    found = Classification().batch_loss(model, batch).logits
    torch.testing.assert_close(found, alone(model, rows), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_verdict_is_about_texts_alone(seed: int) -> None:
    model = classifier("GPT2", None)
    rows = texts([4 + place % 5 for place in range(60)], seed=seed)
    labels = [int(row.sum()) % 3 for row in rows]
    whole = padded(rows, 0, left=False)
    examples = [
        {name: value[place] for name, value in whole.items()} | {"labels": torch.tensor(label)}
        for place, label in enumerate(labels)
    ]
    data = Data(examples[:24], examples[24:36], examples[36:])
    with torch.enable_grad():
        result = rankfold.lossless(model, data, size=0.9)
    wanted = torch.tensor(labels[36:])
    for name, one in (("original", model), ("factorized", result.model)):
        truth = functional.cross_entropy(alone(one, rows[36:]), wanted)
        assert result.report["loss"][name] == pytest.approx(float(truth), abs=1e-5)
    loss = evaluate(model, Classification(), as_part("held_out", examples), batch_size=7).mean
    truth = functional.cross_entropy(alone(model, rows), torch.tensor(labels))
    assert loss == pytest.approx(float(truth), abs=1e-5)
