"""These run in an environment that has vLLM (``make test-serving``), and are skipped elsewhere."""

from __future__ import annotations

import os

import pytest

# Before vLLM is imported: one process, little memory, nothing from a network.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="ERROR",
)  # fmt: skip


@pytest.fixture(autouse=True, scope="session")
def _vllm() -> None:
    pytest.importorskip("vllm")
