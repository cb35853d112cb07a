"""Models that timm and torchvision make by name: ``timm:resnet18,num_classes=10``.

A saved one is made again from library, name and options. The name must be one that the library
itself lists, so nothing of a folder is imported, downloaded or executed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from rankfold.errors import InputError, require
from rankfold.files.size_limits import check_modest

LIBRARIES = ("timm", "torchvision")
_SPEC = re.compile(rf"({'|'.join(LIBRARIES)}):([\w.-]+)((?:,[^,=]+=[^,]*)*)")
_OPTION = re.compile(r"[A-Za-z]\w*")
# They name files, downloads and code; weights are given by weights=.
_REFUSED = re.compile(r"pretrained|checkpoint|weights|cache|cfg|progress|file|path|jit|scriptable")
_PLAIN = (bool, int, float, str)


@dataclass(frozen=True)
class NamedModel:
    """A model that a library makes.

    Attributes:
        library: One of ``LIBRARIES``.
        name: As the library lists it.
        options: What it is made with: numbers, truth values and words.

    Raises:
        InputError: A field is of another kind.
    """

    library: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what is no such field; the name is looked up when the model is made."""
        if self.library not in LIBRARIES:
            raise InputError(
                f"the library {self.library!r} is unknown; expected {' or '.join(LIBRARIES)}."
            )
        if not isinstance(self.name, str):
            raise InputError(f"the model name {self.name!r} is no text.")
        if not isinstance(self.options, dict):
            raise InputError(f"the options of {self.library}:{self.name} are no object.")
        for option, value in self.options.items():
            if not _OPTION.fullmatch(option) or _REFUSED.search(option):
                raise InputError(
                    f"{self.library}:{self.name} can't be given the option {option!r}; expected "
                    "what changes the architecture, such as num_classes."
                )
            if not isinstance(value, _PLAIN):
                raise InputError(
                    f"the option {option} of {self.library}:{self.name} is {value!r}; expected a "
                    "number, true, false or a word."
                )

    def __str__(self) -> str:
        """As on the command line."""
        options = (
            f",{name}={value if isinstance(value, str) else json.dumps(value)}"
            for name, value in self.options.items()
        )
        return f"{self.library}:{self.name}{''.join(options)}"

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return asdict(self)


def is_named(spec: str) -> bool:
    """Whether the text has the form ``timm:NAME`` or ``torchvision:NAME,option=value``."""
    return _SPEC.fullmatch(spec) is not None


def parse_named(spec: str) -> NamedModel:
    """The model that a text names.

    Raises:
        InputError: It names none.
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise InputError(
            f"{spec} names no model; expected timm:NAME or torchvision:NAME, with options after "
            "commas: timm:resnet18,num_classes=10."
        )
    library, name, options = match.groups()
    pairs = (option.split("=", 1) for option in options.split(",")[1:])
    return NamedModel(library, name, {option: _value(text) for option, text in pairs})


def _value(text: str) -> object:
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return text


def _imported(library: str) -> ModuleType:
    try:
        return require(library, "vision")
    except InputError:
        raise
    except Exception as error:  # torchvision beside a torch that it wasn't built for
        raise InputError(
            f"{library} can't be imported beside torch {torch.__version__}: {error}. Install the "
            "torchvision that goes with it."
        ) from error


def make_named(named: NamedModel, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A model with random weights, in eval mode.

    Args:
        named: Which.
        tensors: Weights that it is to hold; options that ask for far more than these are refused
            before they take time or memory.

    Raises:
        InputError: The library isn't installed, knows no such model, or not with such options.
    """
    library: Any = _imported(named.library)
    if named.library == "timm":
        names, create = library.list_models(), library.create_model
        options = {**named.options, "pretrained": False}
    else:
        library = library.models
        # Those of this module alone: others download weights of a backbone.
        names, create = library.list_models(module=library), library.get_model
        options = {**named.options, "weights": None}
    if named.name not in names:
        near = [name for name in names if name.startswith(named.name[:5])]
        raise InputError(
            f"{named.library} lists no model {named.name!r}"
            + (f"; it has {', '.join(near[:8])}." if near else ".")
        )
    try:
        if tensors is not None:
            check_modest(lambda: create(named.name, **options), tensors, str(named))
        return cast("nn.Module", create(named.name, **options).eval())
    except InputError:
        raise
    except Exception as error:  # the library says in its own ways that an option doesn't suit
        raise InputError(
            f"{named.library} can't make {named}: {type(error).__name__}: {error}"
        ) from error
