"""What ORIGINAL and OTHER of ``certify`` mean: a source of losses for each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rankfold.artifact.manifest import MANIFEST_FILE
from rankfold.cli.data_options import DataOptions
from rankfold.cli.open import (
    TEXT_BLOCKS,
    OpenedModel,
    open_artifact,
    open_examples,
    open_model,
)
from rankfold.data.parts import Part
from rankfold.errors import InputError, visible
from rankfold.integrations import transformers as hf
from rankfold.others.by_byte import OfBytes, same_tokens
from rankfold.others.endpoint import Endpoint, is_url
from rankfold.others.onnx_program import OnnxProgram
from rankfold.others.source import Identity, LossSource, OfModule, weights_digest
from rankfold.others.two_parts import divided, held_out_part
from rankfold.settings import Settings
from rankfold.tasks.recognise import recognise_task


@dataclass(frozen=True)
class Given:
    """A model that a user named.

    Attributes:
        spec: How.
        identity: Which model it is.
        opened: The module and what came with it, None for an endpoint.
        endpoint: The endpoint, or None.
    """

    spec: str
    identity: Identity
    opened: OpenedModel | None
    endpoint: Endpoint | None = None

    @property
    def is_torch(self) -> bool:
        """Whether it is a module whose weights torch has."""
        return self.opened is not None and not isinstance(self.opened.model, OnnxProgram)


def open_given(
    spec: str, device: torch.device, *, weights: Path | None, own: str | None, **endpoint: Any
) -> Given:
    """A model by how it is named.

    Args:
        spec: ORIGINAL or OTHER.
        device: Where a module of torch runs.
        weights: A file of weights, for what a function or a library makes.
        own: ``file.py:function`` giving the class that a rankfold folder needs, or None.
        endpoint: Arguments of ``Endpoint``.

    Raises:
        InputError: Names what is wrong with it.
    """
    path = Path(spec)
    if is_url(spec):
        served = Endpoint(spec, **endpoint)
        return Given(spec, served.identity, None, served)
    if path.suffix == ".onnx":
        program = OnnxProgram(path)
        return Given(
            spec, Identity("onnx", path.name, program.digest()), OpenedModel(program, None, None)
        )
    if path.is_dir():
        if weights is not None:
            raise InputError(f"{spec} holds its own weights; expected no file of weights for it.")
        opened = _folder(path, own)
        kind = "rankfold folder" if (path / MANIFEST_FILE).is_file() else "folder"
    else:
        opened = open_model(spec, weights)
        kind = "gguf" if path.suffix == ".gguf" else "function"
    digest = weights_digest(opened.model)
    opened.model.to(device)
    name = path.resolve().name if path.exists() else path.name
    return Given(spec, Identity(kind, name, digest), opened)


def _folder(folder: Path, own: str | None) -> OpenedModel:
    if (folder / MANIFEST_FILE).is_file():
        return open_artifact(folder, own)
    model = hf.load_folder(folder, quantized=True)
    has_tokenizer = any(folder.glob("tokenizer*")) or any(folder.glob("vocab*"))
    return OpenedModel(model, hf.load_tokenizer(folder) if has_tokenizer else None, folder)


def reader_of(original: Given, other: Given) -> OpenedModel:
    """The model that says how data is read: the original, or the other where it can't.

    Raises:
        InputError: Neither can.
    """
    for one in (original, other):
        if one.is_torch and one.opened is not None:
            return one.opened
    for one in (original, other):
        if one.opened is not None:
            return one.opened
    raise InputError(
        "both models are endpoints, and none of them says how text becomes tokens; expected one "
        "of the two as a folder or a file."
    )


def open_held_out(
    data: str,
    selection: str | None,
    reader: OpenedModel,
    options: DataOptions,
    settings: Settings,
) -> tuple[Part, Part | None]:
    """Held-out examples, and those for the range where they are needed.

    Raises:
        InputError: Names what is wrong with the data.
    """
    examples = open_examples(data, reader, options, 2)
    held_out = held_out_part(examples, settings.held_out_limit, settings.seed)
    if selection is not None:
        others = open_examples(selection, reader, options, 1)
        return held_out, held_out_part(others, settings.selection_limit, settings.seed, "selection")
    if settings.largest_change is not None or settings.test == "t":
        return held_out, None
    text = torch.is_tensor(held_out.examples[0]) and reader.tokenizer is not None
    block = max(1, len(held_out.examples) // TEXT_BLOCKS) if text else 1
    found, rest = divided(held_out, settings.seed, block)
    return rest, found


def loss_sources(
    original: Given,
    other: Given,
    reader: OpenedModel,
    sample: Part,
    task: str | None,
    batch_size: int | None,
) -> tuple[LossSource, LossSource]:
    """What gives the losses of both models, in one unit.

    Args:
        original: The model that the other is compared with.
        other: The other one.
        reader: Says how the data was read.
        sample: Examples that may be looked at.
        task: One of ``rankfold.tasks.TASKS``, or None.
        batch_size: Examples a batch.

    Raises:
        InputError: The two can't be compared on these data.
    """
    originals = () if original.opened is None else (original.opened.model,)
    found = recognise_task(
        sample.take([0]), None, task, originals, hf.task_hint(reader.model),
        pooling=lambda: hf.pooling_of(reader.model),
    )  # fmt: skip
    if _other_tokens(original, other, sample):
        if found.name != "causal-lm":
            raise InputError(
                f"{visible(original.identity.name)} and {visible(other.identity.name)} have "
                f"different tokenizers; expected one for the task {found.name}. Language models "
                "alone are compared without one, in nats per byte."
            )
        return _of_bytes(original, reader), _of_bytes(other, reader)
    sources: list[LossSource] = []
    for one in (original, other):
        if one.endpoint is not None:
            if found.name != "causal-lm":
                raise InputError(
                    f"an endpoint gives losses of the task causal-lm, and this is {found.name}; "
                    "expected plain text and a language model."
                )
            sources.append(one.endpoint)
        elif one.opened is not None:
            sources.append(OfModule(one.identity, one.opened.model, found, batch_size))
    return sources[0], sources[1]


def _other_tokens(original: Given, other: Given, sample: Part) -> bool:
    """Whether both have tokenizers, and different ones."""
    own = [None if one.opened is None else one.opened.tokenizer for one in (original, other)]
    texts = torch.is_tensor(sample.examples[0])
    if own[0] is None or own[1] is None:
        return False
    if texts:
        return not same_tokens(own[0], own[1], sample)
    return bool(own[0].get_vocab() != own[1].get_vocab())


def _of_bytes(one: Given, reader: OpenedModel) -> LossSource:
    if one.opened is None:
        raise InputError("an endpoint has no tokenizer of its own to read texts with.")
    return OfBytes(one.identity, one.opened.model, one.opened.tokenizer, reader.tokenizer)
