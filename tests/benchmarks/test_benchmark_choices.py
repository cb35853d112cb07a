"""The multiple-choice task, against a model whose probabilities are known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from benchmarks.choices import (
    ANSWERS,
    CONTEXT,
    CONTINUATION,
    NEAR,
    Questions,
    answered,
    make_questions,
)

WORDS = 50
TEXT = torch.randint(WORDS, (2 * NEAR + 3_000,), generator=torch.Generator().manual_seed(3))


class NextWord(nn.Module):
    """Knows which word follows which, or believes the opposite."""

    def __init__(self, sign: float) -> None:
        super().__init__()
        self.sign = sign

    def forward(self, input_ids: Tensor) -> object:
        following = (input_ids + 1) % WORDS
        return SimpleNamespace(logits=self.sign * nn.functional.one_hot(following, WORDS).double())


def test_questions_have_one_context_and_different_answers() -> None:
    questions = make_questions(TEXT, 40)
    assert questions.tokens.shape == (40, ANSWERS, CONTEXT + CONTINUATION)
    assert (questions.tokens[:, :1, :CONTEXT] == questions.tokens[:, :, :CONTEXT]).all()
    again, other = make_questions(TEXT, 40), make_questions(TEXT, 40, seed=1)
    assert torch.equal(questions.tokens, again.tokens)
    assert not torch.equal(questions.tokens, other.tokens)
    assert len(set(questions.right.tolist())) == ANSWERS


def test_the_right_answer_follows_the_context_in_the_text() -> None:
    questions = make_questions(TEXT, 40)
    text = TEXT.tolist()
    places = {tuple(text[i : i + CONTEXT]): i for i in range(len(text) - CONTEXT)}
    for rows, right in zip(questions.tokens.tolist(), questions.right.tolist(), strict=True):
        start = places[tuple(rows[0][:CONTEXT])]
        assert rows[right] == text[start : start + CONTEXT + CONTINUATION]
        wrong = [row[CONTEXT:] for place, row in enumerate(rows) if place != right]
        assert rows[right][CONTEXT:] not in wrong


@pytest.mark.parametrize(("sign", "expected"), [(9.0, 1.0), (-9.0, 0.0)])
def test_a_model_that_knows_the_text_answers_all_and_one_that_errs_none(
    sign: float, expected: float
) -> None:
    counting = torch.arange(len(TEXT)) % WORDS
    questions = make_questions(counting, 30)
    # Every continuation in this text is a run; only those after the context are right.
    distinct = (questions.tokens[:, :, CONTEXT] == questions.tokens[:, :1, CONTEXT - 1] + 1).sum(1)
    alone = questions.tokens[distinct == 1], questions.right[distinct == 1]
    found = answered(NextWord(sign), Questions(*alone))
    assert len(found) >= 10
    assert found.mean() == expected


def test_a_short_text_is_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        make_questions(TEXT[: 2 * NEAR], 40)
