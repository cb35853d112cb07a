"""How vLLM opens a factorized model: as a quantization method, which says what each layer computes.

vLLM reads ``config.json`` and the weights; what the configuration says is checked here, and that
the weights are those that were saved. Imported only where vLLM is.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from rankfold.errors import InputError, opening_an_artifact, visible
from rankfold.integrations.quant_method import QUANT_METHOD
from rankfold.integrations.vllm.names import INSTEAD, Layout, no_place

OLDEST = (0, 32)  # of vLLM, by which all was tested
# Those whose weights vLLM takes as they are named; for others it turns or joins some of them.
ARCHITECTURES = (
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
    "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Phi3ForCausalLM",
    "GraniteForCausalLM", "OPTForCausalLM",
)  # fmt: skip
_WHERE = "the quantization_config of config.json"


class VllmConfig(QuantizationConfig):  # type: ignore[misc, unused-ignore]
    """The part of ``rankfold.json`` that says how to rebuild the layers.

    Args:
        structure: As ``config.json`` holds it, checked.
    """

    def __init__(self, structure: Mapping[str, Any]) -> None:
        super().__init__()
        self.structure = structure
        self.layout = Layout(structure)
        self.known = False

    @classmethod
    @opening_an_artifact()
    def from_config(cls, config: dict[str, Any]) -> VllmConfig:
        """Check what ``config.json`` says.

        Raises:
            ArtifactError: vLLM is too old; it is damaged, of a newer rankfold, or has what vLLM's
                layers can't hold.
        """
        # In vLLM's other processes nothing of this is needed: the configuration is sent to them.
        from rankfold.artifact.manifest import check_structure

        _check_version()
        structure = {key: value for key, value in config.items() if key != "quant_method"}
        check_structure(structure, _WHERE)
        return cls(structure)

    @opening_an_artifact()
    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Check the weights of a folder on this machine, where vLLM has read its configuration.

        Raises:
            ArtifactError: They are not those that were saved, or are tied in a way of their own.
        """
        _check_tied(self.structure["model"]["shared_tensors"], hf_config)
        folder = Path(model_name)
        if not folder.is_dir() or not hasattr(hf_config, "transformers_weights"):
            return  # on a hub, or saved again by transformers, perhaps after training
        from rankfold.artifact.manifest import check_digest
        from rankfold.files.shards import read_weights

        check_digest({**self.structure}, read_weights(folder), str(folder))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Call the layers as vLLM's model does."""
        self.layout.rename(hf_to_vllm_mapper.map_name)

    @opening_an_artifact()
    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """What a layer computes; None where vLLM's own way is meant.

        Raises:
            ArtifactError: Factorized layers are in a module that vLLM computes in its own way, or
                it is not known to load them as they are.
        """
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import (
            ParallelLMHead,
            VocabParallelEmbedding,
        )

        from rankfold.integrations.vllm.layers import FactorizedEmbedding, FactorizedLinear

        if not self.known:
            _check_architecture()
            self.known = True
        if isinstance(layer, VocabParallelEmbedding):
            matrix = self.layout.of_embedding(prefix)
            if matrix is not None:
                return FactorizedEmbedding(matrix)
            if not isinstance(layer, ParallelLMHead):
                return None
        if isinstance(layer, LinearBase | ParallelLMHead):
            matrices = self.layout.of_layer(prefix, self.packed_modules_mapping)
            if matrices:
                return FactorizedLinear(matrices)
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        below = self.layout.below(prefix)
        if below:
            raise no_place(below, f"vLLM computes them within a {type(layer).__name__}")
        return None

    def get_checkpoint_weight_mapper(self) -> Any:
        """Nothing is renamed: called when all layers are made and none is loaded.

        Raises:
            ArtifactError: A factorized layer has no place in vLLM's model.
        """
        from vllm.distributed import get_pp_group
        from vllm.model_executor.models.utils import WeightsMapper

        if get_pp_group().world_size == 1:  # else another process may have it
            with opening_an_artifact():
                self.layout.check_asked()
        return WeightsMapper()

    def get_name(self) -> str:
        """What ``config.json`` calls it."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """All that vLLM computes in."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any GPU: the products are vLLM's own."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None but ``config.json``."""
        return []


def _check_version() -> None:
    """Refuse a vLLM whose layers are made otherwise.

    Raises:
        InputError: It is older than what was tested.
    """
    version = importlib.import_module("vllm").__version__
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is not None and (int(found[1]), int(found[2])) < OLDEST and "dev" not in version:
        raise InputError(
            f"vLLM {visible(version)} is installed; rankfold's folders need vLLM "
            f"{OLDEST[0]}.{OLDEST[1]} or newer. Install it, or: {INSTEAD}"
        )


def _check_architecture() -> None:
    """Refuse models for which vLLM turns weights around while it loads them.

    Raises:
        InputError: It is not one of those that are known.
    """
    from vllm.config import get_current_vllm_config

    model = get_current_vllm_config().model_config
    found = model.architecture
    if found not in ARCHITECTURES and not model.using_transformers_backend():
        raise InputError(
            f"vLLM's own {visible(found)} may reorder weights while it loads them, and rankfold "
            f"knows that it doesn't for {', '.join(ARCHITECTURES)}. Let vLLM run transformers' "
            f'model: model_impl="transformers". {INSTEAD}'
        )


def _check_tied(shared: Mapping[str, str], hf_config: Any) -> None:
    """Refuse tensors that are stored once and that vLLM wouldn't share.

    Raises:
        InputError: They are named.
    """
    text = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
    tied = any(getattr(part, "tie_word_embeddings", False) for part in (hf_config, text))
    of_one = len({name.rpartition(".")[0] for name in shared.values()}) <= 1
    if shared and not (tied and of_one):  # the embeddings and the head
        raise no_place(
            [f"{alias}, stored as {name}" for alias, name in shared.items()],
            "their tensors are shared, and vLLM shares those of tie_word_embeddings alone",
        )
