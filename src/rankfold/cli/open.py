"""What MODEL and DATA on the command line mean: paths and specs to a module and examples."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import nn

from rankfold.artifact.load import load
from rankfold.artifact.manifest import MANIFEST_FILE
from rankfold.artifact.weights_file import load_weights
from rankfold.certificate.change import weighted_mean
from rankfold.cli.told import told
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
    Limits,
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
from rankfold.integrations.vision import is_named, make_named, parse_named
from rankfold.machine.progress import Progress, TerminalProgress
from rankfold.model.unsuitable import refuse_unsuitable
from rankfold.tasks.evaluation import evaluate
from rankfold.tasks.recognise import recognise_task
from rankfold.tasks.repeated import refuse_random

# A text is split in blocks of consecutive windows, about this many in all, so that few windows
# have a neighbour in another part.
TEXT_BLOCKS = 40
FOLDERS = ("images", "sounds")  # kinds of source that are class folders of files
OWN = ("python", "registered")  # kinds that a function of the user's reads
SELF = "self"  # DATA that the language model writes itself; a file of this name is ./self


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


@dataclass(frozen=True)
class DataOptions:
    """How to read DATA.

    Attributes:
        mean: Per channel, for images and arrays, or None.
        std: Likewise.
        image_size: Side that images of a folder are resized and cropped to, or None. Where all
            three are None the model's folder says how images are prepared, or timm, if one does.
        length: Tokens a window of text, or None for 512 or what the model takes.
        seed: Seeds the split.
        task: One of ``rankfold.tasks.TASKS``, or None to go by what the model is made for.
        text_column: Column of the text in records, None for ``text``.
        label_column: Column of the label, None for ``label``.
        target_column: Column of the target text, None for ``target``.
        tokens_column: Column of the tokens of token classification, None for ``tokens``.
        tags_column: Column of their labels, None for ``tags``.
        own_windows: Windows that the model writes where DATA is ``self``, for each of the parts.
        skip_broken: Leave out files of a folder that can't be read, and name them on stderr.
        limits: Most examples of each part: a stream that is split is read no further than that.
        recorded: What the artifact that is opened was made with.
    """

    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    image_size: int | None = None
    length: int | None = None
    seed: int = 0
    task: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    target_column: str | None = None
    tokens_column: str | None = None
    tags_column: str | None = None
    own_windows: tuple[int, int, int] = (64, 16, 64)
    skip_broken: bool = False
    limits: Limits = USUAL_LIMITS
    recorded: InputSettings = field(default_factory=InputSettings)


def open_model(
    spec: str, weights: Path | None = None, *, to_be_filled: bool = False
) -> OpenedModel:
    """MODEL: a folder, a ``.gguf`` file, ``timm:NAME``, or ``file.py:function`` of the user's own.

    Args:
        spec: MODEL.
        weights: A file of weights, for what a function or a library makes.
        to_be_filled: Other weights are put into it, or compared with its own, before it is used.

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
        model = hf.load_folder(path)
        has_tokenizer = any(path.glob("tokenizer*")) or any(path.glob("vocab*"))
        return OpenedModel(model, hf.load_tokenizer(path) if has_tokenizer else None, path)
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
    has_tokenizer = skeleton is None and any(folder.glob("tokenizer*"))
    return OpenedModel(model, hf.load_tokenizer(folder) if has_tokenizer else None, folder)


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
    kind = _kind(spec, options)
    if kind is None:
        first, second, third = (_own_text(opened, options, part) for part in range(len(PARTS)))
        return Data(first, second, third)
    if kind != "text":
        found = _own_data(spec) if kind in OWN else _examples(spec, kind, opened, options)
        if isinstance(found, Data):
            return found
        return split(found, options.seed, limits=options.limits)
    windows = _examples(spec, kind, opened, options)
    if not _reads_windows(opened, options):
        return split(windows, options.seed, limits=options.limits)
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
    return Data(
        calibration=open_examples(calibration, opened, options, 0),
        selection=open_examples(selection, opened, options, 1),
        held_out=open_examples(held_out, opened, options, 2),
    )


def open_examples(spec: str, opened: OpenedModel, options: DataOptions, part: int = 0) -> Examples:
    """All examples of one source, for the calibration (0), selection (1) or held-out (2) part.

    Raises:
        InputError: Names what is wrong with it.
    """
    kind = _kind(spec, options)
    if kind is None:
        return _own_text(opened, options, part)
    if kind in OWN:
        found = _own_data(spec)
        return as_examples(getattr(found, PARTS[part]) if isinstance(found, Data) else found)
    return _examples(spec, kind, opened, options)


def _own_data(spec: str) -> object:
    source = None if is_spec(spec) else registered_source(Path(spec))
    return read_registered(source, Path(spec)) if source else called(spec)


def _own_text(opened: OpenedModel, options: DataOptions, part: int) -> Examples:
    """Text that the model writes itself; another seed for each part, so that none overlap."""
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
    task = options.task or hf.task_hint(opened.model)
    labels_wanted = task not in ("teacher", "embedding")
    if kind == "npz":
        prepare_array = _pixels(opened, options).prepare
        known = label_ids(opened.model)
        rows = read_npz(path, options.mean, options.std, prepare=prepare_array, label_ids=known)
        shape, side = rows.account.inputs.shape, options.image_size
        if shape is not None and side is not None and shape[1:] != (side, side):
            raise InputError(
                f"image_size= is {side}, and the images in {path} have {shape[1]} x {shape[2]} "
                "pixels: arrays aren't resized. Leave the option away."
            )
        return cast("Examples", told(rows))
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
    return pixels_of(asked, opened.model, _processor_folder(opened))


def _kind(spec: str, options: DataOptions) -> Kind | None:
    """The kind of source, None for ``self``; looked at once, since it may walk through a folder."""
    kind = None if spec == SELF else source_kind(spec)
    pixels = [name for name in ("mean", "std", "image_size") if getattr(options, name) is not None]
    if pixels and kind in OWN and options.recorded == InputSettings():
        raise InputError(
            f"{pixels[0]}= has no part in {spec}: what a function gives is the model's input "
            "already. Leave the option away and prepare the images there."
        )
    if options.skip_broken and kind not in FOLDERS:
        raise InputError(
            f"--skip-broken leaves out files of a folder of class folders; {spec} is none. Leave "
            "the option away."
        )
    return kind


def _records(file: Path, opened: OpenedModel, options: DataOptions, task: str | None) -> Examples:
    found = record_examples(
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
    return cast("Examples", told(found))


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
