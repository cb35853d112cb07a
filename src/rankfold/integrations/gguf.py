"""Models and tokenizers of GGUF files, read by transformers."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rankfold.errors import InputError, require
from rankfold.integrations.allowed import check_configuration
from rankfold.integrations.as_asked import as_asked, check_loaded, opening


def load_gguf(file: Path) -> tuple[nn.Module, Any]:
    """The model (dequantized to float32) and tokenizer of a GGUF file.

    Raises:
        InputError: No such file, or transformers can't read it.
    """
    transformers = require("transformers", "transformers")
    require("gguf", "transformers")
    if not file.is_file():
        raise InputError(f"no such GGUF file: {file}")
    check_configuration(file.parent)  # what lies beside it is asked, too
    arguments: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    arguments |= {"trust_remote_code": False}
    with opening(file), as_asked(file), _read_once():
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), **arguments)
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            str(file.parent),
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **arguments,
        )
        check_loaded(model, found, file)
    # The weights are plain float32 now: without this, saving would claim they are GGUF.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    return model.eval(), tokenizer


class _WithoutMaps:
    """NumPy for gguf's reader, whose maps would end the process where the file is cut meanwhile."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def memmap(file: Path, mode: str) -> Any:
        """The bytes of the file."""
        return np.fromfile(file, dtype=np.uint8)


@contextmanager
def _read_once() -> Iterator[None]:
    """Keep what is read of a GGUF file, which is read and not mapped.

    transformers reads all of it for the configuration, the tokenizer and the weights each, and
    makes the map of its tensors' names once for each module: half of the time of opening it.
    """
    gguf = importlib.import_module("gguf")
    known = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, function in known.items():
        setattr(gguf, name, functools.cache(function))
    reader: Any = importlib.import_module("gguf.gguf_reader")
    reader.np = _WithoutMaps()
    try:
        yield
    finally:
        reader.np = np
        for name, function in known.items():
            setattr(gguf, name, function)
