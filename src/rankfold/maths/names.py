"""The words for estimators. Nothing here imports torch, which takes seconds."""

from __future__ import annotations

from typing import Literal, TypeAlias

StepEstimator: TypeAlias = Literal["cross-validated", "denoised", "raw"]
