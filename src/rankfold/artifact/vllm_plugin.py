"""What vLLM calls at its start, by the entry point ``vllm.general_plugins``.

vLLM calls it in each of its processes, whatever model is served: it takes no time, and nothing
that is wrong here may keep another model from being served.
"""

from __future__ import annotations

import importlib
import logging

from rankfold.integrations.quant_method import QUANT_METHOD

_LIST_OF_METHODS = "vllm.model_executor.layers.quantization"


def register() -> None:
    """Let vLLM open what rankfold saves."""
    try:
        methods = importlib.import_module(_LIST_OF_METHODS)
        config = importlib.import_module("rankfold.artifact.vllm_config")
        methods.register_quantization_config(QUANT_METHOD)(config.VllmConfig)
    except (ImportError, AttributeError) as error:
        logging.getLogger("vllm.rankfold").warning(
            "This vLLM can't open models that rankfold has factorized, others as before: %s. %s",
            error,
            "rankfold needs vLLM 0.32 or newer.",
        )
