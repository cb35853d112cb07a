"""Which piece of text comes next: a multiple-choice task made from WikiText-2, without any example.

As in HellaSwag (Zellers et al. 2019) a context has one true continuation and false ones beside it,
and the model chooses the one that it gives the highest probability. Here the false ones are pieces
from nearby, mostly of the same article, so topic and style seldom tell them apart. Context, answers
and their order are drawn once; every model gets the same questions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.model.evaluation_mode import evaluation_mode
from rankfold.tasks.evaluation import on_device
from rankfold.tasks.losses import output_of

QUESTIONS = 100
ANSWERS = 4
CONTEXT, CONTINUATION = 24, 8  # tokens
NEAR = 1_000  # tokens to either side within which the false continuations lie
BATCH = 16  # questions


@dataclass(frozen=True)
class Questions:
    """Multiple-choice questions.

    Attributes:
        tokens: ``(questions, answers, CONTEXT + CONTINUATION)`` int64; the context is the same for
            all answers of a question.
        right: ``(questions,)`` int64, the place of the true answer.
    """

    tokens: Tensor
    right: Tensor


def make_questions(text: Tensor, count: int = QUESTIONS, seed: int = 0) -> Questions:
    """Questions from places of a text that are drawn by the seed.

    Args:
        text: ``(n,)`` tokens.
        count: Number of questions.
        seed: Draws places and the order of the answers.

    Raises:
        ValueError: The text is too short.
    """
    length = CONTEXT + CONTINUATION
    if len(text) < 2 * NEAR + count * length:
        raise ValueError(f"{len(text)} tokens are too few for {count} questions")
    generator = torch.Generator().manual_seed(seed)

    def drawn(below: int, number: int) -> list[int]:
        return torch.randperm(below, generator=generator)[:number].tolist()

    slots = drawn((len(text) - 2 * NEAR) // length, count)
    right = torch.randint(ANSWERS, (count,), generator=generator)
    # Pieces that neither overlap the question nor each other.
    pieces = [p for p in range(-NEAR, NEAR - length, CONTINUATION) if abs(p) >= length]
    rows = []
    for slot, place in zip(slots, right.tolist(), strict=True):
        start = NEAR + slot * length
        answer = start + CONTEXT
        others = [start + pieces[i] for i in drawn(len(pieces), ANSWERS - 1)]
        starts = [*others[:place], answer, *others[place:]]
        context = text[start:answer]
        rows.append(torch.stack([torch.cat([context, text[s : s + CONTINUATION]]) for s in starts]))
    return Questions(torch.stack(rows), right)


@torch.no_grad()
def answered(model: nn.Module, questions: Questions) -> Tensor:
    """Whether each question is answered correctly: ``(questions,)`` float64, 0 or 1."""
    found = []
    with evaluation_mode(model):
        for tokens in questions.tokens.split(BATCH):
            batch: Any = on_device({"input_ids": tokens.flatten(0, 1)}, model)
            output: Any = output_of(model, batch)
            logits = output.logits[:, CONTEXT - 1 : -1].double().log_softmax(-1)
            likelihood = logits.gather(-1, batch["input_ids"][:, CONTEXT:, None]).sum((1, 2))
            found.append(likelihood.view(tokens.shape[:2]).argmax(1).cpu())
    return (torch.cat(found) == questions.right).double()
