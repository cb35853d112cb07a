"""Write a factorized model: one folder, complete or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save_file
from torch import nn

from rankfold.artifact.manifest import (
    CONFIG_FILE,
    FLOATS,
    FORMAT_VERSION,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    Manifest,
    artifact_digest,
    library_versions,
    structure,
)
from rankfold.errors import path_of
from rankfold.files.digests import file_digest
from rankfold.files.folder import check_output, folder_in_one_step
from rankfold.files.tensors import METADATA
from rankfold.integrations import transformers as hf
from rankfold.integrations.vision import NamedModel
from rankfold.model.memory_layout import unusual_orders
from rankfold.model.of_user import hooked
from rankfold.model.sizes import stored_tensors


def save_artifact(
    folder: str | Path,
    model: nn.Module,
    manifest: Manifest,
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
    files: Mapping[str, str] | None = None,
    source: NamedModel | None = None,
) -> Path:
    """Write a factorized model; the folder appears complete or not at all.

    Args:
        folder: Where to.
        model: The model with its low-rank layers.
        manifest: What ``rankfold.json`` says; the format's own fields are added here.
        tokenizer: Saved beside a transformers model.
        overwrite: Replace an artifact that stands there.
        files: Texts to write beside, by file name.
        source: What makes a model like the original, where a library does.

    Raises:
        InputError: The folder can't be written.
    """
    target = path_of("the folder", folder)
    check_output(target, overwrite, MANIFEST_FILE)
    tensors, aliases = stored_tensors(model)
    orders = unusual_orders(tensors)
    of_transformers = hf.is_transformers_model(model)
    complete: Manifest = {
        "format_version": FORMAT_VERSION,
        "versions": library_versions(),
        "model": {
            "kind": "transformers" if of_transformers else "module",
            "class": f"{type(model).__module__}.{type(model).__qualname__}",
            "shared_tensors": aliases,
            "computed_buffers": _computed_buffers(model),
            **({"dtype": str(cast("Any", model).dtype)} if of_transformers else {}),
            **({} if source is None else {"source": source.as_dict()}),
            **({"axes_in_memory": orders} if orders else {}),
            **({"hooks": hooks} if (hooks := hooked(model)) else {}),
        },
        **manifest,
    }
    with folder_in_one_step(target) as draft:
        stored = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(stored, draft / WEIGHTS_FILE, metadata=METADATA)
        complete["digest"] = artifact_digest(complete, stored)
        for name, content in (files or {}).items():
            (draft / name).write_text(content, encoding="utf-8")
        if of_transformers:
            hf.write_configuration(model, draft, structure(complete), tokenizer)
            complete["config_digest"] = file_digest(draft / CONFIG_FILE)
        text = json.dumps(complete, indent=1, allow_nan=False, ensure_ascii=False)
        (draft / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")
    return target


def _computed_buffers(model: nn.Module) -> dict[str, str]:
    """Types of the buffers that no file holds, such as rotary frequencies.

    A reloaded model computes them again, in its own type; ``model.to(dtype)`` had rounded them.
    """
    stored = model.state_dict(keep_vars=True)
    return {
        name: str(buffer.dtype)
        for name, buffer in model.named_buffers()
        if name not in stored and str(buffer.dtype) in FLOATS
    }
