"""What matters of a sentence encoder: how near embeddings stay, and which neighbours they keep."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rankfold.model.evaluation_mode import evaluation_mode
from rankfold.search.study import Study
from rankfold.tasks.agreement import Embedding, unit_embeddings
from rankfold.tasks.evaluation import on_device
from rankfold.tasks.losses import without_labels
from rankfold.tasks.pooling import MEAN

AT = (1, 10)  # nearest neighbours that are compared
MOST = 2000  # examples: each is compared with each


def embeddings_kept(study: Study, model: nn.Module, loss: float) -> dict[str, Any] | None:
    """Cosine and neighbours, and the embedding tables' sizes; None of another task.

    The cosine is that of the held-out part: of unit vectors the squared distance, which is the
    loss, is 2 - 2 cos. Neighbours are those among the selection examples, which the held-out part
    is not opened for.

    Args:
        study: Has the original and the selection part.
        model: The factorized model.
        loss: Its mean on the held-out part.
    """
    task = study.task
    if not isinstance(task, Embedding):
        return None
    part = study.parts["selection"].spread(MOST)
    pooling = task.pooling or MEAN

    def embedded(of: nn.Module) -> Tensor:
        with evaluation_mode(of):
            batches = (on_device(part.collate(examples), of) for examples in part.batches())
            found = [unit_embeddings(of, without_labels(b), pooling).cpu() for b in batches]
        return torch.cat(found).double()

    before, after = embedded(study.subject.unpacked.given), embedded(model)
    return {
        "cosine": 1 - loss / 2,
        "examples": len(before),
        "neighbours": {
            str(count): neighbours_kept(before, after, count) for count in AT if count < len(before)
        },
    }


def neighbours_kept(before: Tensor, after: Tensor, count: int) -> float:
    """The mean share of an example's nearest ``count`` others that are so in both.

    Args:
        before: ``(n, features)`` unit vectors.
        after: ``(n, features)`` likewise, of the same examples.
        count: Fewer than n.
    """
    nearest = []
    for vectors in (before, after):
        near = vectors @ vectors.T  # (n, n)
        near.fill_diagonal_(-torch.inf)
        nearest.append(near.topk(count, dim=1).indices)
    same = (nearest[0][:, :, None] == nearest[1][:, None, :]).any(2)
    return float(same.double().mean())
