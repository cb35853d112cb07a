"""Export targets: what one is, the table of them by name, and the modules that each replaces.

A target is an object with a name, registered once in ``export``; nothing else lists them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeAlias

from torch import nn

from rankfold.artifact.load import skeleton
from rankfold.artifact.manifest import Manifest
from rankfold.errors import InputError
from rankfold.export.example_inputs import Given
from rankfold.forms.embedding.modules import FactorizedUse, LowRankEmbedding, LowRankHead
from rankfold.forms.layer import FactorizedLayer

EXPORT_FILE = "export.json"  # says what the folder is, and that it may be overwritten

# Options of an export that not every target takes.
Option: TypeAlias = Literal["inputs", "dtype"]


@dataclass(frozen=True)
class OpenedArtifact:
    """An artifact that is being exported.

    Attributes:
        folder: Where it lies.
        manifest: Its own.
        model: The factorized model; a target may change it.
        own: For a model of the user's own class, the instance given; it stays as it is.
        inputs: What the user gave for the option of this name, or None.
    """

    folder: Path
    manifest: Manifest
    model: nn.Module
    own: nn.Module | None = None
    inputs: Given | None = None

    @property
    def of_transformers(self) -> bool:
        """Whether the model is one of transformers."""
        return bool(self.manifest["model"]["kind"] == "transformers")

    @property
    def unpacked(self) -> list[str]:
        """Names of the modules that were unpacked, outer ones first."""
        return list(self.manifest["unpacked"])

    def like_the_original(self) -> nn.Module:
        """A model such as the artifact was made from, whose weights are to be loaded."""
        return skeleton(self.folder, self.manifest) if self.own is None else copy.deepcopy(self.own)


@dataclass(frozen=True)
class Written:
    """What a target wrote.

    Attributes:
        model: The model as it is exported; its parameters are counted.
        told: What ``export.json`` says beside what it says of every export.
        difference: Largest difference of an output from the model's, as a share of the largest
            output; None where nothing was compared.
        dynamic: The axes of any length.
    """

    model: nn.Module
    told: Mapping[str, Any] = field(default_factory=dict)
    difference: float | None = None
    dynamic: tuple[str, ...] = ()


class Target(Protocol):
    """A form that needs no rankfold to be opened."""

    @property
    def name(self) -> str:
        """As ``to=`` names it."""

    @property
    def summary(self) -> str:
        """What it is, in half a sentence for the command line's help."""

    @property
    def options(self) -> tuple[Option, ...]:
        """The options that it takes."""

    @property
    def files(self) -> str:
        """Pattern of the names of the files that hold its weights."""

    def write(self, opened: OpenedArtifact, draft: Path) -> Written:
        """Write the model into an empty folder.

        Raises:
            InputError: The model can't be written so.
        """


_targets: dict[str, Target] = {}

TARGETS: Mapping[str, Target] = MappingProxyType(_targets)  # by name, as registered


def register_target(target: Target) -> None:
    """Let ``export`` write a model in one more form.

    Raises:
        ValueError: There is a target of this name.
    """
    if target.name in _targets:
        raise ValueError(f"there is an export target {target.name!r} already")
    _targets[target.name] = target


def unregister_target(name: str) -> None:
    """Take a target out again."""
    del _targets[name]


def target_of(name: str) -> Target:
    """The target of this name.

    Raises:
        InputError: There is none.
    """
    if name not in TARGETS:
        *others, last = TARGETS
        raise InputError(f"to is {name!r}; expected {', '.join(others)} or {last}.")
    return TARGETS[name]


def check_options(target: Target, given: Mapping[Option, object]) -> None:
    """Refuse options, by their names in Python, that a target would not look at.

    Raises:
        InputError: One was given that it doesn't take; the targets that do are named.
    """
    for option, value in given.items():
        if value is not None and option not in target.options:
            taking = [name for name, other in TARGETS.items() if option in other.options]
            raise InputError(
                f"{option} goes with {' and '.join(taking)}; {target.name} keeps what is stored."
            )


def factorized_modules(model: nn.Module) -> dict[str, Any]:
    """The factorized modules of a model, by name."""
    found = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, FactorizedLayer | FactorizedUse)
    }
    # The matrix of a conv in blocks is a part of it.
    return {name: m for name, m in found.items() if name.rpartition(".")[0] not in found}


def place_of_shared_factor(module: nn.Module) -> int | None:
    """Which of a module's stock layers holds what the uses of an embedding matrix share.

    None for a module that shares no factor.
    """
    if isinstance(module, LowRankEmbedding):
        return 0
    return 1 if isinstance(module, LowRankHead) else None
