"""Several processes that do one run have opened the same things, and were asked for the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rankfold.artifact.manifest import library_versions
from rankfold.errors import InputError
from rankfold.files.digests import json_digest, model_digest
from rankfold.machine import processes
from rankfold.machine.offload import Offload
from rankfold.search.study import Inputs
from rankfold.settings import Settings


def same_run(inputs: Inputs, settings: Settings, offload: Offload, kept: Path | None) -> Offload:
    """Refuse processes that have opened something else; where large tensors lie in this one.

    A data set that each process has a share of, as for training, is refused so, too.

    Args:
        inputs: Of this process.
        settings: What it was asked for.
        offload: Where its large tensors are to lie.
        kept: Its folder of statistics.

    Raises:
        InputError: Names what differs.
    """
    if not processes.several():
        return offload
    parts = {name: part.digest for name, part in inputs.parts.items()}
    parts["held-out"] = inputs.held_out.digest
    processes.agree("the versions of the libraries", json_digest(library_versions()))
    processes.agree("the settings", repr(settings))
    processes.agree("the model", model_digest(inputs.subject.unpacked.given))
    for name, digest in parts.items():
        processes.agree(f"the {name} part of the data", digest)
    processes.agree("whether statistics are given", str(kept is not None))
    processes.agree("the blocks", repr(offload.blocks))
    limits = processes.gathered(offload.memory, "memory")
    if all(one is None for one in limits):
        return offload
    if any(one is None for one in limits):
        raise InputError(
            "memory has room for the statistics of all layers in some of the processes, and not in "
            "others; expected all to work alike. Give all of them the same memory=."
        )
    return replace(offload, memory=min(one for one in limits if one is not None))


def same_target(asked: str) -> None:
    """Refuse processes that were asked for something else.

    Raises:
        InputError: Names what differs.
    """
    processes.agree("what is asked for", asked)
