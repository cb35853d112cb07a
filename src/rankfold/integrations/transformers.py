"""Folders of Hugging Face transformers: open a model, rebuild one, write what it needs.

Only configuration and safetensors are read; ``trust_remote_code`` is always off.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from rankfold.errors import InputError, require, visible
from rankfold.files.json_file import read_json
from rankfold.files.own_files import check_own_files
from rankfold.files.size_limits import check_modest
from rankfold.files.tensors import read_names
from rankfold.integrations.allowed import sealed
from rankfold.integrations.as_asked import (
    GENERATION_FILE,
    as_asked,
    load_weights_of,
    opening,
    saving,
    without_bars,
)
from rankfold.integrations.other_folders import refuse_other_folders
from rankfold.integrations.quant_method import QUANT_METHOD
from rankfold.integrations.sentence_folder import SentenceFolder, sentence_folder
from rankfold.integrations.tokenizer_files import refuse_unread_pieces
from rankfold.machine.offload import Offload
from rankfold.machine.progress import Progress, SilentProgress
from rankfold.model.evaluation_mode import evaluation_mode
from rankfold.tasks.pooling import Pooling
from rankfold.tasks.recognise import MULTI_LABEL

# Those of transformers that read safetensors; each asks for a library of its own.
QUANTIZED = ("torchao", "bitsandbytes", "compressed-tensors", "gptq", "awq", "quanto", "hqq", "fp8")
# Stands in config.json where the name of the file of weights may stand. Where rankfold is imported
# it is taken out before that name is read. Elsewhere, transformers would load the folder with a
# mere warning, the factorized layers filled with random numbers: so it stops, and quotes this.
WITHOUT_RANKFOLD = (
    "this model was made by rankfold. To open it, pip install 'rankfold[transformers]' and write "
    "'import rankfold' before from_pretrained"
)
IN_PAIRS = (
    'this folder was written by rankfold.export with to="pairs", and its README.md opens it; '
    'from_pretrained opens what to="dense" writes'
)
IN_A_PROGRAM = (
    'this folder was written by rankfold.export with to="onnx" or to="pt2": onnxruntime or '
    'torch.export.load opens its model file; from_pretrained opens what to="dense" writes'
)
# Beside the weights and their configuration: what turns data into inputs.
_PROCESSING_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "spiece.model", "sentencepiece*.model", "normalizer.json", "chat_template.*",
    "additional_chat_templates/*.jinja", "*processor_config.json", "spm*.model", "*.spm",
    "vocab-*.json", "bpe.codes", "tekken.json", "entity_vocab.json", "*.tiktoken",
)  # fmt: skip
# All that is read of a folder, those and what sentence-transformers keeps in folders of its own.
_READ = ("*.json", "*.safetensors", "*.txt", *_PROCESSING_FILES, "[0-9]*_*/*")
OWN_TEXTS_AT_ONCE = 16  # windows sampled in one batch


def is_transformers_model(model: nn.Module) -> bool:
    """Whether the model is a ``PreTrainedModel``, without importing transformers."""
    return any(
        base.__module__.startswith("transformers.") and base.__name__ == "PreTrainedModel"
        for base in type(model).__mro__
    )


def opened_as(model: nn.Module) -> str:
    """The name on a hub or the absolute folder that a model was opened from, or nothing."""
    name = str(cast("Any", model).config.name_or_path or "")
    return str(Path(name).resolve()) if name and Path(name).exists() else name


def source_folder(model: nn.Module) -> Path | None:
    """The folder that a model was opened from, in a hub's cache, too; None where there is none."""
    name = opened_as(model) if is_transformers_model(model) else ""
    if not name or Path(name).exists():
        return Path(name) if name and Path(name).is_dir() else None
    hub: Any = require("huggingface_hub", "transformers")
    commit = getattr(cast("Any", model).config, "_commit_hash", None)
    try:
        file = hub.try_to_load_from_cache(name, "config.json", revision=commit)
    except hub.errors.HFValidationError:  # no name of a model on a hub
        return None
    return Path(file).parent if isinstance(file, str) else None


def sentences_of(model: nn.Module) -> SentenceFolder | None:
    """What sentence-transformers keeps with a model that was opened from a folder, or None."""
    folder = source_folder(model)
    return None if folder is None else sentence_folder(folder)


def pooling_of(model: nn.Module) -> Pooling | None:
    """How the folder of a model makes embeddings of its hidden states, None where it says none."""
    sentences = sentences_of(model)
    return None if sentences is None else sentences.pooling()


# What the name of a class of transformers ends in says what it is made for.
_PURPOSES = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForMaskedLM": "masked-lm",
    "ForTokenClassification": "token-classification",
    "ForSequenceClassification": "classification",
    "ForImageClassification": "classification",
    "ForAudioClassification": "classification",
    "ForVideoClassification": "classification",
    "ForConditionalGeneration": "seq2seq",
    "ForSpeechSeq2Seq": "seq2seq",
}


def task_hint(model: nn.Module) -> str | None:
    """What a transformers model is made for, as far as it says so; None for any other model.

    A model without a head gives hidden states: it is taken for an encoder of ``embedding``.
    """
    if not is_transformers_model(model):
        return None
    name, config = type(model).__name__, cast("Any", model).config
    purpose = next((p for part, p in _PURPOSES.items() if part in name), None)
    generates = bool(cast("Any", model).can_generate())
    if purpose == "classification":
        # As in the losses of transformers: one value an example is a regression.
        kind = getattr(config, "problem_type", None)
        if kind == "regression" or (kind is None and getattr(config, "num_labels", None) == 1):
            return "regression"
        return MULTI_LABEL if kind == "multi_label_classification" else purpose
    if purpose == "seq2seq" or (purpose is None and generates):
        # Of a decoder alone it is a language model, which may look at images, too.
        return "seq2seq" if getattr(config, "is_encoder_decoder", False) else "causal-lm"
    if purpose is None and name.endswith("Model"):
        return "embedding"
    return purpose


def files_read(folder: Path) -> list[Path]:
    """The files that a model, its tokenizer and its processor are read from, sorted."""
    return sorted({file for pattern in _READ for file in folder.glob(pattern) if file.is_file()})


def load_folder(
    folder: Path, *, quantized: bool = False, offload: Offload | None = None
) -> nn.Module:
    """The model of a transformers folder, in the dtype it is stored in, on the CPU.

    Args:
        folder: The folder.
        offload: Says whether its weights lie in files, and where.
        quantized: Take a model whose weights a library of ``QUANTIZED`` has quantized, too: it can
            be run, not factorized.

    Raises:
        InputError: No such folder, no configuration, no safetensors, or a rankfold artifact.
    """
    check_own_files(folder, _processing_files(folder))  # they are copied at the end
    refuse_other_folders(folder)
    config = _config(folder)
    quantization = getattr(config, "quantization_config", None)
    if isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD:
        raise InputError(
            f"{folder} is a model that rankfold has factorized already; give the original."
        )
    if quantization is not None and not (quantized and _method_of(quantization) in QUANTIZED):
        raise InputError(
            f"the model in {folder} is quantized by {_method_of(quantization)}; expected one of "
            f"{', '.join(QUANTIZED)}, or a model in float32, bfloat16 or float16."
            if quantized
            else f"the model in {folder} is quantized ({quantization}); expected a model "
            "in float32, bfloat16 or float16. Factorize the original, quantize afterwards."
        )
    if not list(folder.glob("*.safetensors")):
        raise InputError(
            f"{folder} holds no .safetensors file; rankfold reads no pickles (.bin). "
            "Save the model again with safe_serialization=True."
        )
    model_class = _model_class(config, folder)
    if sentence_folder(folder) is not None:
        model_class = _without_head(folder, model_class)
    return cast("nn.Module", load_weights_of(folder, model_class, config, offload).eval())


def _method_of(quantization: Any) -> str:
    """How a configuration calls what has quantized the weights."""
    held = isinstance(quantization, Mapping)
    method = quantization.get("quant_method") if held else quantization.quant_method
    return visible(getattr(method, "value", method))


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a transformers folder.

    Raises:
        InputError: The folder has none, or a package is missing that reads it.
    """
    transformers = require("transformers", "transformers")
    refuse_unread_pieces(folder)
    where = f"the tokenizer of {folder}, which text data needs"
    with opening(where), as_asked(where):
        return transformers.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )


def skeleton(folder: Path, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A model of the folder's configuration with weights that are still to be loaded.

    Args:
        folder: Holds ``config.json``.
        tensors: The weights. A configuration that asks for far more than these is refused before
            it takes time or memory.

    Raises:
        InputError: The configuration is damaged, or of no model of transformers.
    """
    _check_counts(folder)
    try:
        config = _config(folder)
        for name in ("quantization_config", "transformers_weights"):
            if hasattr(config, name):
                delattr(config, name)
        model_class = _model_class(config, folder)
        with sealed():
            if tensors is not None:
                where = f"the config.json in {folder}"
                check_modest(lambda: model_class(copy.deepcopy(config)), tensors, where)
            model = model_class(config).eval()
        settings = folder / GENERATION_FILE
        if model.can_generate() and settings.is_file():
            read_json(settings)  # which names the file where it is damaged
            transformers = require("transformers", "transformers")
            model.generation_config = transformers.GenerationConfig.from_pretrained(
                str(folder), local_files_only=True
            )
        return cast("nn.Module", model)
    except InputError:
        raise
    except Exception as error:  # a damaged configuration makes transformers fail in any way
        raise InputError(
            f"the configuration in {folder} makes no model: {type(error).__name__}: {error}"
        ) from error


# What transformers makes as many of as config.json says, at once: layers, labels, experts.
_COUNT = re.compile(r"^(num|n)_|_layers?$|^depths?$")
LARGEST_COUNT = 1_000_000


def _check_counts(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        return  # _config says so
    parts = [read_json(folder / "config.json", constants=True)]
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts += part
        elif isinstance(part, dict):
            for name, value in part.items():
                parts += [value] if isinstance(value, dict | list) else []
                large = isinstance(value, int) and abs(value) > LARGEST_COUNT
                if large and _COUNT.search(name):
                    raise InputError(
                        f"the config.json in {folder} has {name} {value}; expected at most "
                        f"{LARGEST_COUNT}."
                    )


def writes_text(model: nn.Module) -> bool:
    """Whether the model is a transformers model that generates text."""
    return (
        is_transformers_model(model)
        and bool(cast("Any", model).can_generate())
        and not bool(getattr(cast("Any", model).config, "is_encoder_decoder", False))
    )


def own_text(
    model: nn.Module,
    count: int,
    length: int,
    seed: int,
    progress: Progress | None = None,
    at_once: int = OWN_TEXTS_AT_ONCE,
) -> list[Tensor]:
    """Windows of texts that the model writes itself, each from a token drawn from all there are.

    They need no data. The first token is drawn evenly and the others at temperature 1, as for
    LLM-QAT (Liu et al. 2023, arXiv 2305.17888): from the start token alone a model writes fewer
    kinds of text (docs/theory.md, 10). A text that ends is followed by the next one.

    Args:
        model: For which ``writes_text`` is true; its weights are only read.
        count: Windows.
        length: Tokens a window, the first one included.
        seed: Decides what is written; torch's own random state is untouched.
        progress: Shows the windows.
        at_once: Texts a batch; it decides what is written, too.

    Returns:
        ``(length,)`` int64 tensors.

    Raises:
        InputError: The model writes no text.
    """
    if not writes_text(model):
        raise InputError(
            f"{type(model).__name__} writes no text of its own; expected a causal language model "
            "of transformers. Give calibration data instead."
        )
    texts = _own_texts(cast("Any", model), length, seed, at_once)
    drawn = itertools.islice(_filled(texts, length), count)
    return list((progress or SilentProgress()).track(drawn, "the model writes text", count))


def _filled(texts: Iterator[Tensor], length: int) -> Iterator[Tensor]:
    """Windows that begin with a text, filled up by those that follow; no text is in two of them."""
    while True:
        window = next(texts)
        while len(window) < length:
            window = torch.cat([window, next(texts)])
        yield window[:length].clone()


def _own_texts(hf: Any, length: int, seed: int, at_once: int) -> Iterator[Tensor]:
    """Texts one after the other, each to where the model ends it, or of ``length`` tokens."""
    settings = copy.deepcopy(hf.generation_config)
    settings.update(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=length - 1,
        pad_token_id=0, use_cache=True,
    )  # fmt: skip
    # Models trained to answer write nothing but padding after the token that ends an answer.
    ends = settings.eos_token_id
    ends = torch.tensor([] if ends is None else ends, dtype=torch.int64).view(-1)
    device = next(hf.parameters()).device
    cuda = [device] if device.type == "cuda" else []
    words = hf.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(seed)
    while True:
        with torch.random.fork_rng(cuda), evaluation_mode(hf):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            ids = torch.randint(words, (at_once, 1)).to(device)
            written = hf.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=settings
            ).cpu()
        for text in written:
            ended = torch.isin(text[1:], ends).nonzero()
            yield text[: 2 + int(ended[0])] if len(ended) else text


def write_configuration(
    model: nn.Module, folder: Path, structure: dict[str, Any], tokenizer: Any = None
) -> None:
    """Write all that ``from_pretrained`` needs beside the weights.

    Args:
        model: The factorized model.
        folder: Where to.
        structure: What rebuilds its layers, for config.json.
        tokenizer: A tokenizer or processor. Files of the folder that the model was opened from are
            copied where it writes none.

    Raises:
        InputError: transformers refuses to save something; it is named.
    """
    hf, where = cast("Any", model), opened_as(model) or type(model).__name__
    with saving(f"the config of {where}", "Correct it, in config.json or in the model's config."):
        config = hf.config.__class__.from_dict(hf.config.to_dict())
        config.architectures = [type(model).__name__]
        config.dtype = hf.dtype
        config.quantization_config = {"quant_method": QUANT_METHOD, **structure}
        config.save_pretrained(folder)
        _name_no_weights(folder, WITHOUT_RANKFOLD)
    if getattr(hf, "generation_config", None) is not None and hf.can_generate():
        with saving(
            f"the generation settings of {where}",
            f"Correct them in {GENERATION_FILE}, or in the model's generation_config.",
        ):
            hf.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        with saving(f"the {type(tokenizer).__name__} of {where}", "Correct its files."):
            tokenizer.save_pretrained(folder)
    source = source_folder(model)
    if source is not None:
        copy_processing_files(source, folder)


def _name_no_weights(folder: Path, why: str) -> None:
    """Make ``from_pretrained`` of a folder stop and quote ``why``."""
    file = folder / "config.json"
    # Not before it is saved: save_pretrained drops this field.
    written = {**json.loads(file.read_text(encoding="utf-8")), "transformers_weights": why}
    file.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_plain_folder(model: nn.Module, folder: Path, source: Path) -> None:
    """Write a stock model as transformers does, with the generation settings of ``source``."""
    hf = cast("Any", model)
    hf.tie_weights()
    with without_bars():
        hf.save_pretrained(folder)
    _copy_generation_settings(source, folder)


def write_configuration_alone(model: nn.Module, folder: Path, source: Path, why: str) -> None:
    """Write the configuration of a model whose weights ``from_pretrained`` can't open, and why."""
    cast("Any", model).config.save_pretrained(folder)
    _name_no_weights(folder, why)
    _copy_generation_settings(source, folder)


def _copy_generation_settings(source: Path, target: Path) -> None:
    if (source / GENERATION_FILE).is_file():
        shutil.copyfile(source / GENERATION_FILE, target / GENERATION_FILE)


def copy_processing_files(source: Path, target: Path) -> None:
    """Copy tokenizer, processor and chat template, except where ``target`` has its own.

    And what sentence-transformers keeps there: pooling, normalisation, lengths, prompts.

    Raises:
        InputError: A file of sentence-transformers isn't what it should be, or one is a link to
            elsewhere.
    """
    if not (source / "config.json").is_file():  # of a GGUF file, say
        return
    sentences = sentence_folder(source)
    if sentences is not None:
        sentences.copy_to(target)
    files = _processing_files(source)
    check_own_files(source, files)
    for file in files:
        copied = target / file.relative_to(source)
        if file.is_file() and not copied.exists():
            copied.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copied)


def _processing_files(source: Path) -> list[Path]:
    return [file for pattern in _PROCESSING_FILES for file in source.glob(pattern)]


def _without_head(folder: Path, model_class: Any) -> Any:
    """The class that sentence-transformers opens: where the file lacks the head, one without.

    Its folders often name the class with the head that the model was trained with before.
    """
    transformers = require("transformers", "transformers")
    names = [name for file in sorted(folder.glob("*.safetensors")) for name in read_names(file)]
    prefix = f"{model_class.base_model_prefix}."
    base = transformers.MODEL_MAPPING.get(model_class.config_class, None)
    is_base = base is None or any(prefix in name for name in names)
    return model_class if is_base else base


def _config(folder: Path) -> Any:
    transformers = require("transformers", "transformers")
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is no transformers folder: it has no config.json.")
    with opening(folder / "config.json"), as_asked(folder / "config.json"):
        config = transformers.AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        config.name_or_path = str(folder)  # the file may name another, whose files would be copied
    return config


def _model_class(config: Any, folder: Path) -> Any:
    """A class that transformers itself exports; nothing from the folder is executed."""
    transformers = require("transformers", "transformers")
    names = config.architectures or []
    found = getattr(transformers, names[0], None) if names else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise InputError(
            f"the config.json in {folder} names the architecture {names or 'nothing'}; expected a "
            "model class of the installed transformers library (rankfold runs no model code from "
            "a folder)."
        )
    of_model: Any = found
    if not isinstance(config, of_model.config_class or ()):
        raise InputError(
            f"the config.json in {folder} contradicts itself: {names[0]} is no model of the type "
            f"{config.model_type} (model_type). Correct one of the two."
        )
    return of_model
