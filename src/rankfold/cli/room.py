"""The options for where large tensors lie, and how much memory a run may take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

if TYPE_CHECKING:  # it imports torch, which takes seconds
    from torch import nn

    from rankfold.machine.offload import Offload

Weights: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        help="A .safetensors file for a model given as file.py:function.",
        rich_help_panel="Advanced",
    ),
]


@dataclass(frozen=True)
class Room:
    """Where what a run needs lies, and how much memory it may take."""

    offload_folder: Annotated[
        Path | None,
        typer.Option(
            help="Folder on a disk for statistics and spectra, some 30 bytes a parameter, which "
            "then take no memory.",
            show_default="memory",
            rich_help_panel="Advanced",
        ),
    ] = None
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="AMOUNT",
            help="What the run may take, such as 8GB. Where the statistics of all layers are too "
            "much, they are collected block by block, and lie in files.",
            show_default="what the machine has",
            rich_help_panel="Advanced",
        ),
    ] = None
    blocks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A block of the model, or the list that holds all of them, for a run block by "
            "block. Repeatable.",
            show_default="those that are found",
            rich_help_panel="Advanced",
        ),
    ] = None
    model_offload: Annotated[
        bool,
        typer.Option(
            "--model-offload",
            help="The model's weights lie in files of --offload-folder, too. By itself where "
            "memory has no room for them.",
            rich_help_panel="Advanced",
        ),
    ] = False
    weights: Weights = None

    def of_large_tensors(self) -> dict[str, Any]:
        """The keywords of the library for where large tensors lie."""
        return {
            "offload_folder": self.offload_folder,
            "memory": self.memory,
            "model_offload": self.model_offload,
            "blocks": self.blocks or (),
        }

    def room(self, model: nn.Module) -> Offload:
        """Where large tensors of a run of this model lie, and how much memory it may take.

        Raises:
            InputError: It can't be so.
        """
        from rankfold.machine.offload import Offload, with_room
        from rankfold.machine.weights import in_files

        blocks, weights = tuple(self.blocks or ()), self.model_offload or in_files(model)
        return with_room(Offload(self.offload_folder, None, blocks, weights), self._limit(), model)

    def of_weights(self, model: str, device: str) -> Offload:
        """Where the weights of MODEL shall lie, before it is opened.

        Raises:
            InputError: On a GPU they can't lie in files, or the folder is none.
        """
        from rankfold.machine.offload import (
            Offload,
            available_memory,
            check_offload,
            weights_in_files,
        )

        wanted = self.model_offload
        if not wanted and device == "cpu":
            size = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
            limit = self._limit()
            wanted = weights_in_files(size, available_memory() if limit is None else limit)
        folder = self.offload_folder or Path(gettempdir())
        offload = Offload(folder if wanted else None, weights=wanted)
        check_offload(offload, device)
        return offload

    def _limit(self) -> int | None:
        from rankfold.machine.offload import memory_of

        return None if self.memory is None else memory_of(self.memory)
