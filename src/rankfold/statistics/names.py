"""The words for curvatures. Nothing here imports torch, which takes seconds."""

from __future__ import annotations

from typing import Literal, TypeAlias

Curvature: TypeAlias = Literal["empirical", "sampled"]
