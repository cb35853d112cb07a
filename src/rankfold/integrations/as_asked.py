"""What transformers opens is what the files hold; anything else is refused by name.

transformers fills what a file lacks with random numbers, leaves out what a model has no place for,
and only warns. A warning that says so is an error here; all others are shown.
"""

from __future__ import annotations

import importlib
import io
import logging
import os
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from rankfold.errors import InputError, listed, require, visible
from rankfold.files.json_file import read_json
from rankfold.files.shards import weight_files
from rankfold.files.tensors import read_each, read_names, read_tensors, without_wrappers
from rankfold.integrations.allowed import sealed
from rankfold.machine.offload import Offload
from rankfold.machine.weights import move_to_files

GENERATION_FILE = "generation_config.json"
MOST_QUOTED = 400  # characters of a message of transformers
# What transformers says where it does something else than what a file or the caller says.
_NOT_AS_ASKED = re.compile(
    r"newly initialized|NOT tie|corrupted|to instantiate a model of type"
    r"|incompatible to|field must|Unrecognized keys|Missing required keys|[Ii]ncorrect regex"
    r"|not the same type as the class|without finding the associated"
)


class _Kept(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self.records.append(record)


@contextmanager
def as_asked(where: object) -> Iterator[None]:
    """While transformers opens ``where``: a warning that it does otherwise is an error.

    It neither asks a hub nor opens a pickle. Its other warnings are shown afterwards, its progress
    bars are not.

    Raises:
        InputError: There was such a warning; it is quoted.
    """
    logger, kept = logging.getLogger("transformers"), _Kept()
    said_once: Any = require("transformers.utils.logging", "transformers").warning_once
    said_once.cache_clear()  # of another folder, or of this one before
    with sealed(), without_bars():
        handlers, level, passes = logger.handlers, logger.level, logger.propagate
        logger.handlers, logger.propagate = [kept], False
        logger.setLevel(min(logger.getEffectiveLevel(), logging.WARNING))
        try:
            yield
        finally:
            logger.handlers, logger.propagate = handlers, passes
            logger.setLevel(level)
    # What it reports of the weights is looked at by check_loaded.
    records = [record for record in kept.records if "LOAD REPORT" not in record.getMessage()]
    for record in records:
        if _NOT_AS_ASKED.search(record.getMessage()):
            said = visible(record.getMessage().strip())
            raise InputError(
                f"transformers doesn't open {where} as it is: {said} "
                "Correct the file that this speaks of."
            )
    for record in records:
        if logger.isEnabledFor(record.levelno):
            record.msg, record.args = visible(record.getMessage(), lines=True), None
            logger.handle(record)


@contextmanager
def without_bars() -> Iterator[None]:
    """Without transformers' own progress bars, which would disturb the caller's."""
    bars = require("transformers.utils.logging", "transformers")
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        # Its GGUF reader has a bar of its own that no setting turns off.
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        if shown:
            bars.enable_progress_bar()


_OF_SYSTEM = re.compile(r"\(os error (\d+)\)")


@contextmanager
def saving(what: object, advice: str) -> Iterator[None]:
    """While transformers writes a file: what it refuses names the file and what to do.

    Raises:
        InputError: It raised anything but that the file can't be written.
        OSError: The system refuses the file.
    """
    try:
        yield
    except (InputError, OSError):
        raise
    except Exception as error:  # transformers refuses what it opens itself in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        if refused := _OF_SYSTEM.search(reason):  # tokenizers raise what the disk refuses so
            raise OSError(int(refused[1]), os.strerror(int(refused[1]))) from error
        raise InputError(
            f"transformers can't save {what}: {visible(reason)[:MOST_QUOTED]}. {advice}"
        ) from error


def load_weights_of(
    folder: Path, model_class: Any, config: Any, offload: Offload | None = None
) -> Any:
    """A model of transformers with the weights of a folder, every one of them.

    Names that a compiled, data-parallel or sharded wrapper left in the file are put right.

    Args:
        folder: The folder.
        model_class: A class of transformers.
        config: The folder's configuration.
        offload: Says whether the weights lie in files of their own, copied one by one, and where.

    Raises:
        InputError: A weight is missing, has no place in the model, or is of another shape.
    """
    options: dict[str, Any] = {"dtype": "auto", "local_files_only": True}
    # Of a weight of another shape, all such weights are named below; without it, transformers
    # raises an error that names none.
    options |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
    offload = offload or Offload()
    kept: dict[int, Tensor] = {}  # by the address of a tensor in a file, its values there
    tensors = _tensors_in_files(folder, offload, kept) if offload.weights else None
    tensors = tensors or _unwrapped_tensors(folder)
    with opening(folder), as_asked(folder), _not_mapped():
        if tensors is None:
            model, found = model_class.from_pretrained(
                str(folder), config=config, use_safetensors=True, trust_remote_code=False, **options
            )
        else:
            model, found = model_class.from_pretrained(
                None, config=config, state_dict=tensors, **options
            )
            _as_from_folder(model, folder)
        found["unexpected_keys"] = _not_computed(model, found["unexpected_keys"], folder)
        check_loaded(model, found, folder)
    if offload.weights:
        del tensors
        move_to_files(model, offload, kept)
    return model


def _tensors_in_files(folder: Path, offload: Offload, kept: dict[int, Tensor]) -> dict[str, Tensor]:
    """The tensors of a folder by their names in the model, copied one by one into private files.

    Args:
        folder: Of transformers.
        offload: Where the files lie.
        kept: Gets the values in the files, by the addresses of the tensors.
    """
    files = weight_files(folder)
    inner = _inner_names(folder, files)
    found: dict[str, Tensor] = {}
    for name, values in (pair for file in files for pair in read_each(file)):
        tensor = values
        if offload.takes(values.numel(), values.dtype):
            tensor, there = offload.private(values)
            kept[tensor.data_ptr()] = there
        found[inner[name]] = tensor
    return found


@contextmanager
def _not_mapped() -> Iterator[None]:
    """While transformers opens safetensors files: it reads them, and keeps none mapped.

    The weights of a mapped file change when another process writes it, and a process that reads on
    where one was cut is ended by the system.
    """
    loading: Any = importlib.import_module("transformers.modeling_utils")
    mapped = loading.safe_open

    def read(*arguments: Any, **options: Any) -> Any:
        return mapped(*arguments, **{**options, "backend": "pread"})

    loading.safe_open = read
    try:
        yield
    finally:
        loading.safe_open = mapped


def _not_computed(model: Any, names: Collection[str], folder: Path) -> list[str]:
    """Those of the superfluous tensors of a folder that the model doesn't compute as they are.

    Older versions of transformers stored causal masks and the like, which a model makes itself.
    """
    buffers, prefix = dict(model.named_buffers()), f"{model.base_model_prefix}."
    computed = {name: buffers.get(name, buffers.get(prefix + name)) for name in names}
    stored: dict[str, Tensor] = {}
    if any(buffer is not None for buffer in computed.values()):
        for file in weight_files(folder):
            stored |= read_tensors(file)
    return [
        name
        for name, buffer in computed.items()
        if buffer is None or name not in stored or not _equal(stored[name], buffer)
    ]


def _equal(stored: Tensor, buffer: Tensor) -> bool:
    """Whether a stored tensor has the values of a buffer, as the buffer's type has them."""
    return stored.shape == buffer.shape and torch.equal(stored.to(buffer), buffer)


def _as_from_folder(model: Any, folder: Path) -> None:
    """What ``from_pretrained`` of a folder sets beside the weights."""
    model.config.name_or_path = model.name_or_path = str(folder)
    if model.can_generate():
        file = GENERATION_FILE if (folder / GENERATION_FILE).is_file() else "config.json"
        settings: Any = require("transformers", "transformers").GenerationConfig
        model.generation_config = settings.from_pretrained(
            str(folder), config_file_name=file, local_files_only=True
        )


@contextmanager
def opening(what: object) -> Iterator[None]:
    """While transformers opens a file: what it raises names the file.

    Raises:
        InputError: It raised anything.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # damaged files make transformers fail in any way
        reason = visible(str(error)) or type(error).__name__
        if isinstance(error, KeyError) and error.args:
            reason = _unknown(what, error.args[0])
        if "trust_remote_code" in reason:
            reason = "it needs code of its own, and rankfold runs no code from a folder."
        raise InputError(f"transformers can't open {what}: {reason}") from error


def _unknown(what: object, value: object) -> str:
    """Why transformers stops at a value that it has nothing for, and which settings hold it."""
    file = Path(str(what))
    file = file / "config.json" if file.is_dir() else file
    config = read_json(file) if file.suffix == ".json" and file.is_file() else {}
    names = (
        [key for key, held in config.items() if held == value] if isinstance(config, dict) else []
    )
    where = f", which is the {' and the '.join(names)} in {file.name}" if names else ""
    return visible(f"it knows no {value!r}{where}. Correct it, or install a newer transformers.")


def check_loaded(model: Any, found: dict[str, Any], where: object) -> None:
    """Refuse a model some of whose weights are not those of the file.

    Args:
        model: The model.
        found: The loading info of transformers.
        where: The folder or file, for messages.

    Raises:
        InputError: All such weights are named.
    """
    name = type(model).__name__
    problems = [f"{key}: missing" for key in sorted(found["missing_keys"])]
    problems += [f"{key}: not in {name}" for key in sorted(found["unexpected_keys"])]
    problems += [
        f"{key}: {tuple(stored)} in the file, {tuple(wanted)} in {name}"
        for key, stored, wanted in sorted(found["mismatched_keys"])
    ]
    problems += [str(message) for message in found["error_msgs"]]
    if problems:
        _refuse(name, where, problems)
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    apart = [
        f"{one} and {other}: tied by config.json, and two different matrices in the file"
        for one, other in tied.items()
        if model.get_parameter_or_buffer(one) is not model.get_parameter_or_buffer(other)
    ]
    if apart:
        raise InputError(
            f"the weights in {where} contradict its configuration:\n  {listed(apart)}\n"
            "Where they are meant to differ, set tie_word_embeddings to false in config.json."
        )


def _refuse(name: str, where: object, problems: list[str]) -> NoReturn:
    raise InputError(
        f"the weights in {where} are not those of a {name}, which its configuration names:\n  "
        f"{listed(problems)}\n"
        "transformers would fill what is missing with random numbers and leave out the rest. Save "
        "the model again from the class that it was trained as, or name that class in config.json "
        "(architectures)."
    )


def _unwrapped_tensors(folder: Path) -> dict[str, Tensor] | None:
    """The tensors of a folder by their names in the model itself; None where they have these."""
    files = weight_files(folder)
    inner = _inner_names(folder, files)
    if all(name == own for name, own in inner.items()):
        return None
    return {inner[name]: t for file in files for name, t in read_tensors(file).items()}


def _inner_names(folder: Path, files: Sequence[Path]) -> dict[str, str]:
    """For each name in a folder's files its name in the model; tells where any is another."""
    names = [name for file in files for name in read_names(file)]
    inner = without_wrappers(names, str(folder))
    if any(name != own for name, own in inner.items()):
        said = f"names of {visible(folder)} are those of a wrapped model; they were put right"
        print(said, file=sys.stderr)
    return inner
