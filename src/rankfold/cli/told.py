"""What is told on stderr of a source that was read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TypeVar

from rankfold.artifact.manifest import read_manifest
from rankfold.data.account import Account, recorded, refuse_two_meanings
from rankfold.data.sources import ClassFolder
from rankfold.errors import visible

Read = TypeVar("Read")


def check_classes(folder: Path, examples: object) -> None:
    """Refuse labels that are other classes than in the data that a model was made of.

    Args:
        folder: The factorized model.
        examples: Read from another source.

    Raises:
        InputError: Names the label and both sources.
    """
    account = getattr(examples, "account", None)
    if isinstance(account, Account):
        refuse_two_meanings([*recorded(read_manifest(folder)), account])


def told(examples: Read) -> Read:
    """The same; stderr says what an example is, how many and how long, and what was left out."""
    if isinstance(examples, ClassFolder) and examples.skipped:
        for message in examples.skipped:
            _say(f"skipped: {message}")
        count = len(examples.skipped)
        every = f"{count + len(examples)} files of {examples.account.source}"
        _say(f"skipped {count} of {every}")
    account = getattr(examples, "account", None)
    if isinstance(account, Account):
        for line in account.lines():
            _say(line)
    return examples


def _say(line: str) -> None:
    print(visible(line), file=sys.stderr)
