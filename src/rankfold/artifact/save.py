"""Write a factorized model: one folder, complete or not at all."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

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
from rankfold.certificate.signature import SigningKey, sign
from rankfold.errors import InputError, path_of, visible
from rankfold.files.digests import file_digest
from rankfold.files.durable import synced_meanwhile, write_whole
from rankfold.files.folder import check_output, check_space, folder_in_one_step, trial_folder
from rankfold.files.listed import PAGE_FILE, file_names
from rankfold.files.shards import USUAL_SIZE, write_weights
from rankfold.files.tensors import METADATA, safetensors_bytes
from rankfold.integrations import transformers as hf
from rankfold.integrations.vision import NamedModel
from rankfold.model.memory_layout import unusual_orders
from rankfold.model.of_user import hooked
from rankfold.model.sizes import stored_tensors
from rankfold.model.unpack import unwrapped
from rankfold.model.unsuitable import refuse_unsuitable


def save_artifact(
    folder: str | Path,
    model: nn.Module,
    manifest: Manifest,
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
    files: Mapping[str, str] | None = None,
    source: NamedModel | None = None,
    key: SigningKey | None = None,
    page: Callable[[Manifest], str] | None = None,
    max_shard_size: int = USUAL_SIZE,
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
        key: Signs the folder.
        page: Makes ``report.html`` of the whole manifest; None for no page.
        max_shard_size: Bytes of weights in a file; more are written into several, with an index.

    Raises:
        InputError: The folder can't be written.
    """
    target = path_of("the folder", folder)
    check_output(target, overwrite, MANIFEST_FILE, reads=_opened_from(model))
    tensors, complete = _described(model, manifest, source)
    with folder_in_one_step(target, overwrite) as draft:
        files_of_weights = write_weights(draft, tensors, max_shard_size)
        with synced_meanwhile(*files_of_weights):
            complete["digest"] = artifact_digest(complete, tensors)
        also = () if page is None else (PAGE_FILE,)
        _write(draft, model, complete, tokenizer, files or {}, also)
        if page is not None:
            _write_text(draft / PAGE_FILE, page(complete))
        if key is not None:
            sign(draft, key)
    return target


def list_file(folder: Path, manifest: Manifest, name: str) -> None:
    """Say in an artifact's manifest that a file written later is its own, as those it lists.

    Raises:
        OSError: The manifest can't be written.
    """
    names = manifest.get("files")
    if isinstance(names, list) and name not in names:  # what lists none knows its files by name
        text = _text({**manifest, "files": sorted([*names, name])})
        file = folder / MANIFEST_FILE
        pieces = [text.encode("utf-8", "backslashreplace")]
        write_whole(file, pieces, stat.S_IMODE(file.stat().st_mode))


def try_saving(
    folder: str | Path,
    model: nn.Module,
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
    source: NamedModel | None = None,
    size: float = 1.0,
    reads: Iterable[Path] = (),
) -> None:
    """Find what would keep a factorized model from being saved, before there is one.

    Everything but the weights is written where the folder shall stand, and removed again.

    Args:
        folder: As of ``save_artifact``, as are the next four.
        model: The original.
        tokenizer: Of the model.
        overwrite: Whether an artifact may be replaced.
        source: What makes a model like the original.
        size: The share of the weights that is kept at most.
        reads: Files and folders that are read until then, beside the model's own folder.

    Raises:
        InputError: Says what can't be written, and what to do; or the model can't be factorized.
    """
    target, model = path_of("the folder", folder), unwrapped(model)
    check_output(target, overwrite, MANIFEST_FILE, reads=(*reads, *_opened_from(model)))
    refuse_unsuitable(model)
    tensors, complete = _described(model, {"layers": []}, source)
    with trial_folder(target) as trial:
        _try_names(tensors, trial)
        _write(trial, model, complete, tokenizer, {})
        check_space(trial, int(size * safetensors_bytes(tensors, METADATA)), target)


def _opened_from(model: nn.Module) -> list[Path]:
    """The folder that a model of transformers was opened from."""
    folder = hf.source_folder(model)
    return [] if folder is None else [folder]


def _try_names(tensors: Mapping[str, Tensor], trial: Path) -> None:
    empty = {name: torch.empty(0) for name in tensors}
    try:
        save_file(empty, trial / WEIGHTS_FILE, metadata=METADATA)
    except OSError:
        raise
    except (SafetensorError, ValueError, TypeError) as error:
        odd = [visible(name) for name in tensors if visible(name) != name]
        raise InputError(
            f"the model's weights can't be saved as safetensors: {visible(error)}. Rename its "
            f"modules{': ' + ', '.join(odd[:5]) if odd else ''}."
        ) from error


def _described(
    model: nn.Module, manifest: Manifest, source: NamedModel | None
) -> tuple[dict[str, Tensor], Manifest]:
    """The tensors of a model, and the manifest with what is said of the model itself."""
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
    return tensors, complete


def _write(
    draft: Path,
    model: nn.Module,
    complete: Manifest,
    tokenizer: Any,
    files: Mapping[str, str],
    also: Iterable[str] = (),
) -> None:
    """Write all of an artifact but its weights, and the files ``also`` that are still to come."""
    for name, content in files.items():
        _write_text(draft / name, content)
    if hf.is_transformers_model(model):
        hf.write_configuration(model, draft, structure(complete), tokenizer)
        complete["config_digest"] = file_digest(draft / CONFIG_FILE)
    complete["files"] = file_names(draft, MANIFEST_FILE, *also)
    _write_text(draft / MANIFEST_FILE, _text(complete))


def _text(manifest: Manifest) -> str:
    return json.dumps(manifest, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _write_text(file: Path, text: str) -> None:
    # Names of files that are no text have lone surrogates, which JSON escapes alike.
    file.write_text(text, encoding="utf-8", errors="backslashreplace")


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
