"""What is told on stderr of a source that was read."""

from __future__ import annotations

from typing import TypeVar

from rankfold.cli.app import say
from rankfold.data.account import Account
from rankfold.data.sources import ClassFolder

Read = TypeVar("Read")


def told(examples: Read) -> Read:
    """The same; stderr says what an example is, how many and how long, and what was left out."""
    if isinstance(examples, ClassFolder) and examples.skipped:
        for message in examples.skipped:
            say(f"skipped: {message}", err=True)
        count = len(examples.skipped)
        every = f"{count + len(examples)} files of {examples.account.source}"
        say(f"skipped {count} of {every}", err=True)
    account = getattr(examples, "account", None)
    if isinstance(account, Account):
        for line in account.lines():
            say(line, err=True)
    return examples
