"""Options for data of which nothing was read: each is used, or refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rankfold.cli.data_options import DataOptions
from rankfold.data.account import Account
from rankfold.data.input_settings import ASKED, InputSettings
from rankfold.data.sources import Kind
from rankfold.errors import InputError

FOLDERS = ("images", "sounds")  # kinds of source that are class folders of files
OWN = ("python", "registered")  # kinds that a function of the user's reads
_READ: dict[Kind | None, str] = {
    "python": "what a function gives is the model's input already",
    "registered": "what a source of your own gives is the model's input already",
    "npz": "it is read as arrays",
    "images": "it is read as images",
    "sounds": "it is read as sounds",
    "text": "it is read as plain text",
    None: "the model writes the text",
}


class Source(NamedTuple):
    """DATA, its kind (None for ``self``), and the examples that were read of it."""

    spec: str
    kind: Kind | None
    examples: object


def refuse_unused(options: DataOptions, sources: Sequence[Source]) -> None:
    """Refuse an option that was given and changed nothing in any of the sources.

    What a source was read with stands in its account: that is what was used.

    Raises:
        InputError: Names the option and how the data are read.
    """
    used = {name for source in sources for name in _used(source)}
    for name in sorted(options.given() - used):
        specs = ", ".join(dict.fromkeys(source.spec for source in sources))
        if name == "skip_broken":
            raise InputError(
                f"--skip-broken leaves out files of a folder of class folders; {specs} is none. "
                "Leave the option away."
            )
        how = "; ".join(dict.fromkeys(map(_how, sources)))
        raise InputError(f"{name}= has no part in {specs}: {how}. Leave {name}= out.")


def _inputs(source: Source) -> InputSettings:
    account = getattr(source.examples, "account", None)
    return account.inputs if isinstance(account, Account) else InputSettings()


def _used(source: Source) -> set[str]:
    found = _inputs(source)
    names = {name for name in ASKED if getattr(found, name) is not None}
    names |= {f"{kind}_column" for kind in found.columns}
    if found.shape is not None:  # arrays have the size that was asked for, or are refused
        names.add("image_size")
    return names | ({"skip_broken"} if source.kind in FOLDERS else set())


def _how(source: Source) -> str:
    if source.kind != "records":
        return _READ[source.kind]
    found = _inputs(source)
    names = dict.fromkeys((*found.columns.values(), *(found.features or ())))
    return f"what is read of it for the model's task is {' and '.join(map(repr, names))}"
