"""What MODEL and DATA on the command line mean: paths and specs to a module and examples."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import nn

from rankfold.artifact.load import load
from rankfold.artifact.manifest import MANIFEST_FILE
from rankfold.artifact.weights_file import load_weights
from rankfold.certificate.change import weighted_mean
from rankfold.cli.data_options import DataOptions
from rankfold.cli.options import SELF
from rankfold.cli.told import told
from rankfold.cli.unused import OWN, Source, refuse_unused
from rankfold.data.account import WRITTEN, Account, ReadExamples, spread_of
from rankfold.data.given import as_examples, up_to
from rankfold.data.input_settings import InputSettings
from rankfold.data.parts import (
    FEWEST,
    PARTS,
    SHARES,
    USUAL_LIMITS,
    Data,
    Examples,
    as_part,
    split,
)
from rankfold.data.record_examples import record_examples
from rankfold.data.sources import (
    Kind,
    image_reader,
    is_spec,
    load_object,
    read_image_folder,
    read_npz,
    read_registered,
    read_wav_folder,
    registered_source,
    source_kind,
)
from rankfold.data.text_examples import line_examples, window_examples
from rankfold.data.tokens import Tokens
from rankfold.errors import InputError
from rankfold.integrations import transformers as hf
from rankfold.integrations.gguf import load_gguf
from rankfold.integrations.lengths import default_length, most_tokens, only_length
from rankfold.integrations.model_inputs import known_inputs, label_ids
from rankfold.integrations.pixels import Pixels, pixels_of
from rankfold.integrations.processors import has_processor, sound_preparation
from rankfold.integrations.tokenizer_files import has_tokenizer, unread_pieces
from rankfold.integrations.vision import is_named, make_named, parse_named
from rankfold.machine.offload import Offload
from rankfold.machine.progress import Progress, TerminalProgress
from rankfold.model.unsuitable import refuse_unsuitable
from rankfold.tasks.evaluation import evaluate
from rankfold.tasks.recognise import recognise_task, refuse_multi_label
from rankfold.tasks.repeated import refuse_random
from rankfold.tasks.tokens_as_meant import check_tokens

# A text is split in blocks of consecutive windows, about this many in all, so that few windows
# have a neighbour in another part.
TEXT_BLOCKS = 40


@dataclass(frozen=True)
class OpenedModel:
    """A model and what came with it.

    Attributes:
        model: In eval mode.
        tokenizer: Of a transformers folder that has one, else None.
        folder: The transformers folder, for messages, or None.
        source: ``timm:NAME`` or ``torchvision:NAME`` where that made it, else None.
    """

    model: nn.Module
    tokenizer: Any
    folder: Path | None
    source: str | None = None


def open_model(
    spec: str,
    weights: Path | None = None,
    *,
    to_be_filled: bool = False,
    offload: Offload | None = None,
) -> OpenedModel:
    """MODEL: a folder, a ``.gguf`` file, ``timm:NAME``, or ``file.py:function`` of the user's own.

    Args:
        spec: MODEL.
        weights: A file of weights, for what a function or a library makes.
        to_be_filled: Other weights are put into it, or compared with its own, before it is used.
        offload: Says whether the weights of a folder lie in files, and where.

    Raises:
        InputError: Names what is wrong with it.
    """
    if is_named(spec):
        model = _own_model(spec, weights)
        if weights is None and not to_be_filled:
            raise InputError(
                f"{spec} makes a model with random weights; expected --weights FILE.safetensors "
                "with those of the trained model."
            )
        return OpenedModel(model, None, None, spec)
    if is_spec(spec):
        model = _own_model(spec, weights)
        if not to_be_filled:
            refuse_unsuitable(model)
        return OpenedModel(model, None, None)
    path = Path(spec)
    if weights is not None:
        raise InputError(
            f"--weights goes with a model given as file.py:function or timm:NAME; {spec} holds its "
            "own weights."
        )
    if path.suffix == ".gguf":
        model, tokenizer = load_gguf(path)
        return OpenedModel(model, tokenizer, None)
    if path.is_dir():
        if (path / MANIFEST_FILE).is_file():
            raise InputError(
                f"{path} is a model that rankfold has factorized already; give the original."
            )
        model = hf.load_folder(path, offload=offload)
        return OpenedModel(model, _tokenizer(path), path)
    what = "is a file" if path.exists() else "does not exist"
    hub = not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", spec)
    raise InputError(
        f"the model {spec} {what}; expected a transformers folder, a .gguf file, or, with "
        "--weights FILE.safetensors, timm:NAME, torchvision:NAME or file.py:function giving an "
        "nn.Module."
        + (f" Of a hub, download it before: hf download {spec} --local-dir DIR." if hub else "")
    )


def open_artifact(folder: Path, spec: str | None, *, as_saved: bool = True) -> OpenedModel:
    """A factorized model, with an instance of the user's own class where it needs one.

    Args:
        folder: The artifact.
        spec: ``file.py:function`` giving an instance of the user's own class, or None.
        as_saved: As of ``rankfold.load``.

    Raises:
        InputError: Not an artifact, or not of this model.
    """
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}; expected the --out folder of an earlier run.")
    skeleton = _own_model(spec, None) if spec is not None else None
    model = load(folder, model=skeleton, as_saved=as_saved)
    return OpenedModel(model, None if skeleton is not None else _tokenizer(folder), folder)


def _tokenizer(folder: Path) -> Any:
    """The folder's tokenizer; None without one, and where images may do without it."""
    unread = unread_pieces(folder) is not None and has_processor(folder)
    return hf.load_tokenizer(folder) if has_tokenizer(folder) and not unread else None


GIVES_MODEL = (
    "file.py:function or package.module:function, a function of yours without arguments that "
    "returns the model"
)


def gives_module(spec: str) -> bool:
    """Whether MODEL is made by a function, the user's own or a library's."""
    return is_named(spec) or is_spec(spec)


def _own_model(spec: str, weights: Path | None) -> nn.Module:
    if is_named(spec):
        model = make_named(parse_named(spec))
        return load_weights(model, weights) if weights is not None else model
    if not is_spec(spec):
        raise InputError(f"--model is {spec}; expected {GIVES_MODEL}.")
    made = called(spec)
    if not isinstance(made, nn.Module):
        raise InputError(
            f"{spec} gave a {type(made).__name__}; expected a function without arguments that "
            "returns an nn.Module."
        )
    return load_weights(made, weights) if weights is not None else made


def called(spec: str) -> object:
    """What a user's function gives, or a module that is one.

    Raises:
        InputError: It raised something.
    """
    function = cast("Any", load_object(spec))
    if isinstance(function, nn.Module):
        return function
    try:
        return function()
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"calling {spec}() failed: {type(error).__name__}: {error}. Expected a function "
            "without arguments."
        ) from error


def open_data(spec: str, opened: OpenedModel, options: DataOptions) -> Data:
    """DATA as one source, split into three disjoint parts.

    Raises:
        InputError: Names what is wrong with it.
    """
    kind = _kind(spec)
    if kind is None:
        written = [_own_text(opened, options, part) for part in range(len(PARTS))]
        refuse_unused(options, [Source(spec, kind, text) for text in written])
        first, second, third = written
        return Data(first, second, third)
    found = _own_data(spec) if kind in OWN else _examples(spec, kind, opened, options)
    refuse_unused(options, [Source(spec, kind, found)])
    if isinstance(found, Data):
        return found
    if kind != "text" or not _reads_windows(opened, options):
        return split(found, options.seed, limits=options.limits)
    windows = cast("Examples", found)
    block = max(1, len(windows) // TEXT_BLOCKS)
    needed = 3 * FEWEST
    if len(windows) < needed:
        raise InputError(
            f"the text {spec} gives {len(windows)} windows of {_length(opened, options)} tokens; "
            f"calibration, selection and held-out parts need at least {needed} together, and "
            f"{round(FEWEST / min(SHARES))} to be split. Give a longer text, or shorter windows "
            "with --length."
        )
    return split(windows, options.seed, block=block)


def open_parts(
    calibration: str, selection: str, held_out: str, opened: OpenedModel, options: DataOptions
) -> Data:
    """DATA as three sources.

    Raises:
        InputError: Names what is wrong with one.
    """
    specs = (calibration, selection, held_out)
    read = [_read(spec, opened, options, part) for part, spec in enumerate(specs)]
    refuse_unused(options, read)
    first, second, third = (cast("Examples", source.examples) for source in read)
    return Data(first, second, third)


def open_examples(
    spec: str, opened: OpenedModel, options: DataOptions, part: int = 0, *, beside: bool = False
) -> Examples:
    """All examples of one source, for the calibration (0), selection (1) or held-out (2) part.

    Args:
        spec: DATA.
        opened: The model.
        options: How it is read.
        part: Which part.
        beside: Other data were read with these options, which need not all apply to these.

    Raises:
        InputError: Names what is wrong with it.
    """
    source = _read(spec, opened, options, part)
    if not beside:
        refuse_unused(options, [source])
    return cast("Examples", source.examples)


def _read(spec: str, opened: OpenedModel, options: DataOptions, part: int) -> Source:
    kind = _kind(spec)
    if kind is None:
        return Source(spec, kind, _own_text(opened, options, part))
    if kind in OWN:
        found = _own_data(spec)
        own = as_examples(getattr(found, PARTS[part]) if isinstance(found, Data) else found)
        return Source(spec, kind, own)
    return Source(spec, kind, _examples(spec, kind, opened, options))


def _own_data(spec: str) -> object:
    source = None if is_spec(spec) else registered_source(Path(spec))
    return read_registered(source, Path(spec)) if source else called(spec)


def _own_text(opened: OpenedModel, options: DataOptions, part: int) -> Examples:
    """Text that the model writes itself; another seed for each part, so that none overlap."""
    if options.skip_broken:  # before the model writes for minutes
        alone = replace(options, asked=frozenset({"skip_broken"}))
        refuse_unused(alone, [Source(SELF, None, None)])
    count = options.own_windows[part]
    seed = len(PARTS) * options.seed + part
    length = _length(opened, options)
    windows = hf.own_text(opened.model, count, length, seed << 20, TerminalProgress())
    lengths = spread_of([length] * count)
    source = f"{WRITTEN} for the {PARTS[part].replace('_', '-')} part"
    inputs = InputSettings(length=length)
    account = Account(source, "window", count, count, lengths=lengths, inputs=inputs)
    return told(ReadExamples(windows, account))


def _examples(spec: str, kind: Kind, opened: OpenedModel, options: DataOptions) -> Examples:
    path = Path(spec)
    hint = hf.task_hint(opened.model)
    refuse_multi_label(hint, options.task)
    task = options.task or hint
    labels_wanted = task not in ("teacher", "embedding")
    if kind == "npz":
        return _arrays(path, opened, options)
    if kind == "images":
        pixels = _pixels(opened, options)
        found = read_image_folder(
            path,
            pixels.mean,
            pixels.std,
            pixels.size,
            prepare=pixels.prepare,
            label_ids=label_ids(opened.model),
            labels_wanted=labels_wanted,
            skip_broken=options.skip_broken,
        )
        return cast("Examples", told(found))
    if kind == "sounds":
        folder = _processor_folder(opened)
        sounds = read_wav_folder(
            path,
            prepare=None if folder is None else sound_preparation(folder),
            label_ids=label_ids(opened.model),
            labels_wanted=labels_wanted,
            skip_broken=options.skip_broken,
        )
        return cast("Examples", told(sounds))
    if kind == "records":
        return _records(path, opened, options, task)
    if opened.tokenizer is None:
        _refuse_unread(opened)
        raise InputError(
            f"the data {spec} is text, but the model has no tokenizer; give a transformers folder "
            "with one, or the data as file.py:function."
        )
    inputs = known_inputs(opened.model, opened.tokenizer)
    tokens = Tokens(opened.tokenizer, _length(opened, options), **inputs)
    if _reads_windows(opened, options):
        return told(window_examples(path, tokens))
    if task in ("classification", "token-classification", "seq2seq", "regression"):
        raise InputError(
            f"the task {task} needs labels, and plain text has none; expected a .jsonl, .csv or "
            ".tsv with a label (or target) column, or a .jsonl with tokens and tags, or --task "
            "teacher, which needs none."
        )
    return told(line_examples(path, tokens, task, options.seed))


def _arrays(path: Path, opened: OpenedModel, options: DataOptions) -> Examples:
    prepare, known = _pixels(opened, options).prepare, label_ids(opened.model)
    side = options.image_size
    rows = read_npz(path, options.mean, options.std, side, prepare=prepare, label_ids=known)
    shape = rows.account.inputs.shape
    if shape is not None and side is not None and shape[1:] != (side, side):
        raise InputError(
            f"image_size= is {side}, and the images in {path} have {shape[1]} x {shape[2]} "
            "pixels: arrays aren't resized. Leave the option away."
        )
    return cast("Examples", told(rows))


def _reads_windows(opened: OpenedModel, options: DataOptions) -> bool:
    """Whether the model reads a text in windows, as a language model; others read it by lines."""
    hint = hf.task_hint(opened.model)
    return "causal-lm" in (options.task, hint) and options.task in (None, "causal-lm", "teacher")


def _processor_folder(opened: OpenedModel) -> Path | None:
    """The model's folder, where it says how inputs are prepared."""
    folder = opened.folder
    return folder if folder is not None and has_processor(folder) else None


def _pixels(opened: OpenedModel, options: DataOptions) -> Pixels:
    asked = Pixels(options.mean, options.std, options.image_size)
    # As an artifact records it, whatever lies in its folder.
    folder = None if options.recorded.prepared_by == "rankfold" else _processor_folder(opened)
    return pixels_of(asked, opened.model, folder)


def _kind(spec: str) -> Kind | None:
    """The kind of source, None for ``self``; looked at once, since it may walk through a folder."""
    return None if spec == SELF else source_kind(spec)


def _records(file: Path, opened: OpenedModel, options: DataOptions, task: str | None) -> Examples:
    read = partial(
        record_examples,
        file,
        opened.tokenizer,
        _length(opened, options),
        task=task,
        columns={
            "text": options.text_column,
            "label": options.label_column,
            "target": options.target_column,
            "tokens": options.tokens_column,
            "tags": options.tags_column,
        },
        label_ids=label_ids(opened.model),
        seed=options.seed,
        images=lambda: image_reader(*_pixels(opened, options)),
        inputs=options.recorded,
        **known_inputs(opened.model, opened.tokenizer),
    )
    try:
        found = read()
    except InputError:
        _refuse_unread(opened)
        raise
    return cast("Examples", told(found))


def _refuse_unread(opened: OpenedModel) -> None:
    """Say why a tokenizer that the model's folder has is not at hand."""
    if opened.tokenizer is None and opened.folder is not None and has_tokenizer(opened.folder):
        hf.load_tokenizer(opened.folder)


def _length(opened: OpenedModel, options: DataOptions) -> int:
    asked, fixed, longest = options.length, only_length(opened.model), most_tokens(opened.model)
    if asked is None:
        return default_length(opened.model, opened.tokenizer)
    if fixed is not None and asked != fixed:
        raise InputError(f"--length is {asked}; this model takes {fixed} tokens, no more or fewer.")
    if asked < 2 or (longest is not None and asked > longest):
        raise InputError(
            f"--length is {asked}; expected 2 tokens or more"
            + (f", and at most the model's {longest}." if longest else ".")
        )
    return asked


def evaluate_examples(
    opened: OpenedModel,
    examples: Examples,
    *,
    limit: int | None,
    batch_size: int | None,
    progress: Progress,
    name: str | None = None,
) -> dict[str, Any]:
    """Mean loss of a model on examples, with its standard error; examples are the units.

    Raises:
        InputError: Too few examples, or their loss isn't recognised or not finite.
    """
    given = up_to(examples, limit or USUAL_LIMITS[-1])
    count = min(limit or len(given), len(given))
    if count < 2:
        raise InputError(
            f"the data gives {count} examples; expected 2 or more. Give more data, or "
            "shorter windows of text with --length."
        )
    beyond = len(given) - count
    left_out = {f"beyond the first {count} (limit=)": beyond} if beyond else {}
    part = as_part("evaluation", given.take(range(count), {**given.left_out, **left_out}))
    task = recognise_task(part, None, name, hint=hf.task_hint(opened.model))
    check_tokens(opened.model, task, [part])
    refuse_random(opened.model, task, part)
    found = evaluate(opened.model, task, part, batch_size=batch_size, progress=progress)
    return {
        "task": task.name,
        "examples": count,
        "sources": [] if given.account is None else [given.account.as_dict()],
        "left_out": dict(part.left_out),
        "columns_left_out": [*part.columns],
        "loss": {
            "unit": task.unit,
            "mean": found.mean,
            "standard_error": weighted_mean(found.losses, found.terms).standard_error,
        },
        "accuracy": found.accuracy,
        "data_digest": part.digest,
    }
