"""The first round of a run, for tests of what happens between statistics and held-out data."""

from __future__ import annotations

from typing import Any

from torch import nn

import rankfold
from rankfold.search.round import Round


def first_round(model: nn.Module, data: object, **options: Any) -> Round:
    """As ``rankfold.prepare`` makes it."""
    return rankfold.prepare(model, data, **options)._round
