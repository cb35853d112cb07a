"""A model in half precision comes out as good as the same numbers in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import rankfold
from tests.small_models import tiny_llama, token_data


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_files", [False, True])
def test_a_language_model(dtype: torch.dtype, in_files: bool, tmp_path: Path) -> None:
    options: Any = {"size": 0.8, "effort": "standard", "margin": 0.5, "timing": False}
    plain = rankfold.lossless(tiny_llama(dtype).float(), token_data(), **options)
    if in_files:
        options |= {"model_offload": True, "offload_folder": tmp_path, "memory": "1GB"}
    half = rankfold.lossless(tiny_llama(dtype), token_data(), **options)
    assert {p.dtype for p in half.model.parameters()} == {dtype}
    before, after = (
        [r.report["loss"][which] for which in ("original", "factorized")] for r in (plain, half)
    )
    assert after == pytest.approx(before, rel=torch.finfo(dtype).eps), (before, after)
