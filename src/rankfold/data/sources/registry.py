"""Sources of a user's own: a suffix, and the function that reads files or folders that have it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeAlias

from rankfold.data.sources.records import SUFFIXES as RECORD_SUFFIXES
from rankfold.errors import InputError

Reader: TypeAlias = Callable[[Path], Any]
GROUP = "rankfold.sources"  # of entry points
OWN_SUFFIXES = (".npz", *RECORD_SUFFIXES)


@dataclass(frozen=True)
class Source:
    """What ``register_source`` was given."""

    suffix: str
    read: Reader
    records: bool


_registered: dict[str, Source] = {}


def register_source(suffix: str, read: Reader, *, records: bool = False) -> None:
    """Let DATA on the command line, and in ``rankfold.cli.open``, be of a kind of your own.

    Call it where the file that gives your model is imported (``file.py:function``). A package can
    have it called where it is needed: by an entry point of the group ``rankfold.sources`` that
    has the suffix without its dot as its name and names a function without arguments.

    Args:
        suffix: With its dot: ``.h5``. Upper and lower case are the same. A function registered
            again for a suffix takes the place of the earlier one.
        read: Gets the path of a file or folder. Gives examples: a sequence, a data set or a loader
            of ``(input, label)`` pairs, token ids or mappings with ``input_ids``; or a
            ``rankfold.Data`` with the three parts. Raise ``rankfold.InputError`` for bad files.
        records: ``read`` gives dictionaries of named columns instead, all with the same, which are
            tokenized and labelled as those of a ``.jsonl`` are.

    Raises:
        InputError: It is no suffix, one that rankfold reads itself, or ``read`` can't be called.
    """
    known = str(suffix).lower()
    if not known.startswith(".") or len(known) < 2 or Path(f"x{known}").suffix != known:
        raise InputError(f"the suffix is {suffix!r}; expected one with its dot, such as .h5.")
    if known in OWN_SUFFIXES:
        raise InputError(
            f"rankfold reads {known} files itself; register another suffix, or give the data as "
            "file.py:function."
        )
    if not callable(read):
        raise InputError(
            f"the reader of {known} is {type(read).__name__}; expected a function of a path."
        )
    _registered[known] = Source(known, read, records)


def registered_source(path: Path) -> Source | None:
    """The source registered for a path's suffix, also by an installed package, or None.

    Raises:
        InputError: The package's entry point fails, or registers nothing for the suffix.
    """
    suffix = path.suffix.lower()
    if suffix in OWN_SUFFIXES or suffix in _registered:
        return _registered.get(suffix)
    for entry in entry_points(group=GROUP, name=suffix.removeprefix(".")) if suffix else ():
        try:
            entry.load()()
        except Exception as error:
            raise InputError(
                f"{entry.value}, the entry point that reads {suffix}, failed: "
                f"{type(error).__name__}: {error}"
            ) from error
        if suffix not in _registered:
            raise InputError(
                f"{entry.value}, the entry point that reads {suffix}, registered no such source; "
                f"expected it to call rankfold.register_source({suffix!r}, ...)."
            )
    return _registered.get(suffix)


def read_registered(source: Source, path: Path) -> Any:
    """What the user's function gives for a path.

    Raises:
        InputError: It failed, or gave no records where it should.
    """
    try:
        found = source.read(path)
        if source.records:
            found = list(found)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"the registered reader of {source.suffix} failed on {path}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if source.records:
        _check_records(source, path, found)
    return found


def _check_records(source: Source, path: Path, found: list[Any]) -> None:
    for place, record in enumerate(found):
        if not isinstance(record, dict) or record.keys() != found[0].keys():
            raise InputError(
                f"the registered reader of {source.suffix} gave {str(record)[:60]!r} as record "
                f"{place} of {path}; expected dictionaries, all with the same columns."
            )
    if not found:
        raise InputError(f"the registered reader of {source.suffix} found no record in {path}.")
