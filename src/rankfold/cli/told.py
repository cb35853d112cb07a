"""What is told on stderr of a source that was read."""

from __future__ import annotations

import sys
from typing import TypeVar

from rankfold.data.account import Account
from rankfold.data.sources import ClassFolder

Read = TypeVar("Read")


def told(examples: Read) -> Read:
    """The same; stderr says what an example is, how many and how long, and what was left out."""
    if isinstance(examples, ClassFolder) and examples.skipped:
        for message in examples.skipped:
            print(f"skipped: {message}", file=sys.stderr)
        count = len(examples.skipped)
        every = f"{count + len(examples)} files of {examples.account.source}"
        print(f"skipped {count} of {every}", file=sys.stderr)
    account = getattr(examples, "account", None)
    if isinstance(account, Account):
        for line in account.lines():
            print(line, file=sys.stderr)
    return examples
