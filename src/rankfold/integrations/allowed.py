"""What the configuration of a folder may ask transformers for: nothing that runs or is downloaded.

``trust_remote_code=False`` is not enough: other keys name kernels and weights on a hub, classes,
and files elsewhere. The table below has every such key of transformers 5.24, found in its source;
SECURITY.md lists them. What the table does not name is data.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from rankfold.errors import InputError, require, visible
from rankfold.files.json_file import read_json
from rankfold.files.own_files import is_plain_name

CONFIG, SPECIAL_TOKENS = "config.json", "special_tokens_map.json"
# What transformers reads of a folder and takes keys of.
FILES = (
    CONFIG, "generation_config.json", "tokenizer_config.json", SPECIAL_TOKENS,
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip

ATTENTION = (
    "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3",
    "flash_attention_4",
)  # fmt: skip
EXPERTS = ("eager", "batched_mm", "grouped_mm")  # the others of transformers are hub kernels

Allowed = Callable[[object], bool]


@dataclass(frozen=True)
class Rule:
    """What a key may hold.

    Attributes:
        keys: Of these names, anywhere in a file.
        allowed: Whether it may hold a value.
        expected: The same in words.
        does: What transformers does with another value.
    """

    keys: re.Pattern[str]
    allowed: Allowed
    expected: str
    does: str


def _one_of(*values: object) -> Allowed:
    """Also of a mapping of parts of the model to such values."""

    def allowed(value: object) -> bool:
        if isinstance(value, dict):
            return all(allowed(one) for one in value.values())
        return any(value is one or (type(value) is type(one) and value == one) for one in values)

    return allowed


def _text(pattern: str) -> Allowed:
    """A text of this pattern, or nothing."""
    return lambda value: (
        value is None
        or (isinstance(value, str) and re.fullmatch(pattern, value, re.ASCII) is not None)
    )


def _empty(value: object) -> bool:
    return value is None or (isinstance(value, dict | list | str) and not value)


def _weights(value: object) -> bool:
    # A sentence, as rankfold writes it, makes transformers stop and quote it.
    return value is None or (
        is_plain_name(value)
        and (" " in str(value) or str(value).endswith((".safetensors", ".safetensors.index.json")))
    )


def _file_names(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(map(is_plain_name, value)))


def _templates(value: object) -> bool:
    """A template, or several by names that become those of files."""
    names: list[object] = [*value] if isinstance(value, dict) else []
    if isinstance(value, list):
        names = [one.get("name") if isinstance(one, dict) else None for one in value]
    return all(_text(r"\w[\w.-]*")(name) and name is not None for name in names)


def _rule(keys: str, allowed: Allowed, expected: str, does: str) -> Rule:
    return Rule(re.compile(keys), allowed, expected, does)


_HUB = "downloads code from a hub and runs it"
_TAKEN = "takes that class by its name, whatever it is"
_ELSEWHERE = "reads a file that the folder names"
RULES = (
    _rule(
        "att(entio)?n_implementation",
        _one_of(None, True, False, *ATTENTION, *(f"paged|{name}" for name in ATTENTION)),
        ", ".join(ATTENTION), _HUB,
    ),
    _rule("experts_implementation", _one_of(None, *EXPERTS), ", ".join(EXPERTS), _HUB),
    _rule("^trust_remote_code$", _one_of(None, False), "false", "runs code of the folder"),
    _rule("^allow_all_kernels$|^use_(hub_)?kernels$", _one_of(None, False), "false", _HUB),
    _rule("^(hub_)?kernels?_(config|mapping)$", _empty, "nothing", _HUB),
    _rule("^fusion_config$", _empty, "nothing", "exchanges classes of its own for all models"),
    _rule("^custom_(pipelines|generate)$|^auto_mapping$", _empty, "nothing", "runs code of it"),
    _rule(
        "^attribute_map$|^sub_configs|^__(?!float__|type$)", lambda _: False, "no such key",
        "gives another meaning to other keys",
    ),
    _rule("^configuration_files$", _empty, "nothing", "reads another configuration"),
    _rule("^fast_tokenizer_files$", _file_names, "names of files beside it", _ELSEWHERE),
    _rule("^gguf_file$", _empty, "nothing", _ELSEWHERE),
    _rule("^transformers_weights$", _weights, "the name of a .safetensors file", _ELSEWHERE),
    _rule("^(index|passages|checkpoint)_path$", _empty, "nothing", _ELSEWHERE + ", also a pickle"),
    _rule("^repo_path$", _empty, "nothing", "downloads a file from a hub"),
    _rule("^init_inputs$", _empty, "nothing", "calls a tokenizer's class with it"),
    _rule(
        "^(slow_)?tokenizer_class$", _text(r"\w*(Tokenizer(Fast)?|Backend)"),
        "a tokenizer of transformers", _TAKEN,
    ),
    _rule(
        "^(image_processor|feature_extractor|video_processor)_type$",
        _text(r"\w*(ImageProcessor|FeatureExtractor|VideoProcessor)(Fast|Pil)?"),
        "an image processor or a feature extractor of transformers", _TAKEN,
    ),
    _rule("^processor_class$", _text(r"\w+"), "the name of a class", _TAKEN),
    _rule(
        "^(backbone|architecture)$",
        lambda value: not isinstance(value, str) or _text(r"[\w.-]+")(value),
        "the name of a model of timm", "downloads a model from a hub",
    ),
    _rule("^chat_template$", _templates, "plain names of templates", "writes a file of that name"),
    _rule("^compile_config$", _empty, "nothing", "compiles by a backend that it names"),
    _rule("^dola_layers$|^force_words_ids$|^constraints$", _empty, "nothing", _HUB),
    _rule("^penalty_alpha$", _one_of(None, 0, 0.0), "0", _HUB),
    _rule("^num_beam_groups$", _one_of(None, 1), "1", _HUB),
)  # fmt: skip

_PATHS = re.compile(r"_(file|path|dir|folder)s?$|^(vocab|merges|tokenizer)$")
# transformers itself puts another path in their place, but for those of special_tokens_map.json.
_REPLACED = (
    "special_tokens_map_file", "tokenizer_file", "tokenizer_config_file", "name_or_path",
    "_name_or_path",
)  # fmt: skip


def check_configuration(folder: Path) -> None:
    """Refuse a folder whose configuration asks for what runs, is downloaded or lies elsewhere.

    Raises:
        InputError: Names the file, the key, its value and what is allowed; or a file is no JSON.
    """
    for name in FILES:
        if (folder / name).is_file():
            check_keys(read_json(folder / name, constants=True), folder / name)


def check_keys(written: object, file: Path | str) -> None:
    """Refuse what a configuration may not hold.

    Args:
        written: The value of JSON, of any depth.
        file: Where it stands.

    Raises:
        InputError: As of ``check_configuration``.
    """
    # Special tokens are looked up after the paths are known, and so replace them.
    replaced = () if Path(file).name == SPECIAL_TOKENS else _REPLACED
    parts: list[tuple[str, object]] = [("", written)]
    while parts:
        where, part = parts.pop()
        if isinstance(part, list):
            parts += [(f"{where}[{place}]", one) for place, one in enumerate(part)]
        if not isinstance(part, dict):
            continue
        for key, value in part.items():
            named = f"{where}.{key}".removeprefix(".")
            for rule in RULES:
                if rule.keys.search(str(key)) and not rule.allowed(value):
                    _refuse(file, named, value, rule.expected, rule.does)
            if key not in replaced and _PATHS.search(str(key)) and _leads_out(value, Path(file)):
                _refuse(file, named, value, "the name of a file beside it", _ELSEWHERE)
            parts.append((named, value))


def _leads_out(value: object, file: Path) -> bool:
    """Whether a text is the path of something that is there, and not beside ``file``."""
    if isinstance(value, list):
        return any(_leads_out(one, file) for one in value)
    if not isinstance(value, str) or is_plain_name(value) or not value or len(value) > 4096:
        return False
    try:
        places = [Path(value), file.parent / value]
        inside = file.parent.resolve()
        return any(p.exists() and inside not in p.resolve().parents for p in places)
    except (OSError, ValueError):  # no name of a file
        return False


def _refuse(file: Path | str, key: str, value: object, expected: str, does: str) -> NoReturn:
    shown = repr(value)
    shown = shown if len(shown) <= 200 else f"{shown[:200]}..."
    raise InputError(
        f"{visible(file)} has {visible(key)} {visible(shown)}; expected {expected}. There "
        f"transformers {does}, which rankfold does for no folder. Take the key out; if you trust "
        "it, open the model yourself, in a function that returns it, and give file.py:function."
    )


@contextmanager
def sealed() -> Iterator[None]:
    """While transformers opens a folder: no hub is asked, no pickle opened, no user asked for code.

    A second wall: ``check_configuration`` names what is refused, this holds where a release of
    transformers has keys that the table above does not know.
    """
    hub: Any = require("huggingface_hub.constants", "transformers")
    code: Any = require("transformers.dynamic_module_utils", "transformers")
    with ExitStack() as stack:
        stack.enter_context(_held(hub, "HF_HUB_OFFLINE", True))
        stack.enter_context(_held(code, "TIME_OUT_REMOTE_CODE", 0))
        stack.enter_context(_held(torch, "load", _no_pickle))
        yield


@contextmanager
def _held(module: Any, name: str, value: object) -> Iterator[None]:
    """While in here, a module's value of this name is another."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _no_pickle(*_: object, **__: object) -> NoReturn:
    raise InputError(
        "the folder holds a pickle (.bin, .pt) that transformers would open; rankfold reads none. "
        "Save the model again as safetensors."
    )
