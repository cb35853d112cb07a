"""Which task a model and its data have: recognised where it can be, named, or given.

Every task returns one loss per example and the number of terms in it (tokens of a sequence, 1 for
an image). The loss of a data set is the mean over terms.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from rankfold.data.example import describe
from rankfold.data.parts import Batch, Part
from rankfold.errors import InputError
from rankfold.tasks.agreement import Embedding, Teacher
from rankfold.tasks.evaluation import (
    on_device,
    running,
)
from rankfold.tasks.losses import (
    IGNORED,
    TASKS,
    Task,
    labels_of,
)
from rankfold.tasks.pooling import Pooling
from rankfold.tasks.supervised import (
    CausalLM,
    Classification,
    LossFunction,
    Regression,
    Seq2Seq,
    TokenLabels,
    UserLoss,
)

MULTI_LABEL = "multi-label"  # what a model may be made for, and no task is of
OF_EXAMPLES = ("classification", "regression")  # a label an example
OF_TOKENS = ("causal-lm", "masked-lm", "token-classification", "seq2seq")  # one a token


def recognise_task(
    part: Part,
    loss: LossFunction | None,
    name: str | None = None,
    originals: Sequence[nn.Module] = (),
    hint: str | None = None,
    pooling: Callable[[], Pooling | None] = lambda: None,
) -> Task:
    """The task: the user's loss or name if given, else what model and data show.

    Args:
        part: Examples; one batch of them is looked at.
        loss: The user's own loss, or None.
        name: One of ``TASKS``, or None.
        originals: The original model, for the tasks that compare with it; see ``Teacher``.
        hint: What the model is made for, as far as it says so.
        pooling: Gives the pooling of the model's folder, for the task embedding.

    Raises:
        InputError: No such task, a task and a loss, or nothing is recognised.
    """
    if loss is not None and name is not None:
        raise InputError(f"both loss= and the task {name!r} are given; expected one of them.")
    if loss is not None:
        return UserLoss(loss)
    if name is not None and name not in TASKS:
        near = difflib.get_close_matches(str(name), TASKS, 1)
        suggestion = f" Did you mean {near[0]}?" if near else ""
        raise InputError(
            f"the task is {name!r}; expected one of {', '.join(TASKS)}.{suggestion} Any "
            "other loss is a function of the model and a batch, which Python takes as loss=."
        )
    batch = part.collate(part.examples[:1])
    refuse_multi_label(hint, name)
    if hint in OF_EXAMPLES and name in OF_TOKENS:
        raise InputError(
            f"task= is {name}, whose logits are those of each token, and the model is made for "
            f"{hint}: it gives one row an example. Leave task= out, or give a model made for it."
        )
    found = name or _recognised(batch, hint)
    if found is None:
        raise InputError(
            "the loss can't be recognised from the model and the data, whose examples are "
            f"{describe(batch)}: expected token ids, a mapping with input_ids, or (input, integer "
            f"label) pairs. Name the task, one of {', '.join(TASKS)} (teacher needs no labels), or "
            "in Python pass loss=, a function of the model and a batch that returns one loss per "
            "example."
        )
    if found in ("teacher", "embedding"):
        return _agreement(found, originals, batch, pooling)
    tasks: dict[str, Callable[[], Task]] = {
        "causal-lm": CausalLM,
        "masked-lm": lambda: TokenLabels("masked-lm"),
        "token-classification": lambda: TokenLabels("token-classification"),
        "classification": Classification,
        "seq2seq": Seq2Seq,
        "regression": Regression,
    }
    return tasks[found]()


def _agreement(
    name: str,
    originals: Sequence[nn.Module],
    batch: Batch,
    pooling: Callable[[], Pooling | None],
) -> Task:
    """The task teacher or embedding."""
    if not originals:
        raise InputError(
            f"the task {name} compares with the original model, which is not at hand here: "
            "lossless and compact have it, to verify it is given as the original."
        )
    moved = on_device(batch, originals[0])
    with running(moved):
        if name == "teacher":
            return Teacher(originals, moved)
        return Embedding(originals, moved, pooling())


def refuse_multi_label(hint: str | None, name: str | None) -> None:
    """Refuse a classifier of several labels an example, where no task without labels is named.

    Raises:
        InputError: As said.
    """
    if hint == MULTI_LABEL and name not in ("teacher", "embedding"):
        raise InputError(
            "the model's config says multi_label_classification: each label has a probability of "
            "its own, and none of the tasks is of such. In Python pass loss=, a function of the "
            "model and a batch such as binary_cross_entropy_with_logits(..., "
            "reduction='none').mean(1), or name the task teacher, which needs no labels."
        )


def _recognised(batch: Batch, hint: str | None) -> str | None:
    """The task that a batch's labels and the model's purpose allow; labels decide where they do."""
    labels = labels_of(batch)
    if labels is not None and hint is None:
        _refuse_ambiguous(batch, labels)
    if hint == "embedding" or (labels is None and hint in ("embedding", "causal-lm")):
        return hint
    if labels is not None and labels.dim() == 1 and not labels.is_floating_point():
        return "classification"
    if labels is not None and labels.is_floating_point():
        return "regression" if hint in (None, "regression") else None
    if labels is not None and labels.dim() == 2:
        if hint in ("masked-lm", "token-classification", "seq2seq", "causal-lm"):
            return hint
        return "causal-lm" if isinstance(batch, Mapping) and "input_ids" in batch else None
    if labels is None and hint in (None, "causal-lm"):
        if isinstance(batch, Mapping) and "input_ids" in batch:
            return "causal-lm"
        if torch.is_tensor(batch) and batch.dim() == 2 and not batch.is_floating_point():
            return "causal-lm"
    return None


def _refuse_ambiguous(batch: Batch, labels: Tensor) -> None:
    """Refuse labels that two tasks have, where nothing says which of them the model is for.

    Raises:
        InputError: As said.
    """
    several = labels.dim() == 2 and labels.shape[1] > 1
    if labels.is_floating_point():
        which = "several an example" if several else "one an example"
        if bool(((labels == 0) | (labels == 1)).all()):
            raise InputError(
                f"the labels are 0s and 1s in floating point, {which}: probabilities of labels, or "
                "values? For the squared error name the task regression; for labels in "
                "Python pass loss=, a function of the model and a batch such as "
                "binary_cross_entropy_with_logits(..., reduction='none').mean(1)."
            )
        shares = several and bool((labels >= 0).all() and (labels.sum(1) - 1).abs().max() < 1e-3)
        if shares:
            raise InputError(
                "the labels of each example are 0 or more and add up to 1: shares of classes, or "
                "values? For the squared error name the task regression; for shares in "
                "Python pass loss=, a function of the model and a batch such as "
                "cross_entropy(..., reduction='none')."
            )
    elif labels.dim() == 2 and isinstance(batch, Mapping) and "input_ids" in batch:
        ids = batch["input_ids"]
        if ids.shape != labels.shape or bool(((labels != ids) & (labels != IGNORED)).any()):
            raise InputError(
                "each token has a label that is not the token itself, and nothing says what the "
                "model is for: the class of each token, or a text to be generated? Name the task: "
                "token-classification, masked-lm, seq2seq or causal-lm."
            )
