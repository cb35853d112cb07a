"""A folder of class folders of files: the class is the folder, the example what its file holds.

Where no labels are wanted the files may stand in one folder, or in folders that are no classes.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch.utils.data import Dataset

from rankfold.data.account import Account, ClassCount
from rankfold.data.labels import absent, class_named
from rankfold.errors import InputError, note

# What systems leave beside a user's files: archives of a Mac, thumbnails of a NAS, rubbish bins.
SYSTEM = (
    "__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "thumbs.db",
    "desktop.ini",
)  # fmt: skip
File = tuple[Path, int | None]


def labelled(inputs: Any, label: int | None) -> Any:
    """An example: inputs by name with ``labels`` among them, or a pair of anything else."""
    if label is None:
        return inputs
    if isinstance(inputs, Mapping):
        return {**inputs, "labels": torch.tensor(label)}
    return inputs, label


class ClassFolder(Dataset[Any]):
    """What a file holds and its class (``labelled``), in the order of the paths; read when used.

    Attributes:
        files: The files and their classes, None where there are none.
        account: What became of the files of the folder.
        skipped: What is wrong with each file that was left out, one message a file.
    """

    def __init__(
        self,
        files: Sequence[File],
        account: Account,
        read: Callable[[Path], Any],
        skipped: Sequence[str] = (),
    ) -> None:
        self.files, self.account, self.read, self.skipped = files, account, read, skipped

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        file, label = self.files[index]
        try:
            return labelled(self.read(file), label)
        except InputError as error:
            raise refused(error) from error


def refused(error: InputError) -> InputError:
    """The same, with the way to go on without the file."""
    return InputError(f"{error} Or leave out such files by skip_broken=True.")


class ClassFiles(NamedTuple):
    """The files of a folder with their classes, and what became of all others."""

    files: list[File]
    account: Account


def class_files(
    folder: Path,
    suffixes: Sequence[str],
    what: str,
    label_ids: Mapping[str, int] | None = None,
    *,
    labels_wanted: bool = True,
) -> ClassFiles:
    """The files of each class; what is hidden, or a system's own, is no data.

    Args:
        folder: Holds one folder per class.
        suffixes: Of the files that count, in lower case.
        what: What one file is called: ``image``.
        label_ids: The model's number of each label. Where the folders' names are labels, theirs
            are the classes, whatever their order; see ``_classes``.
        labels_wanted: Without it all files below the folder will do, with no class, where they
            don't stand in class folders alone.

    Raises:
        InputError: Fewer than two classes, a class without files, no file at all, or names that
            don't say which class is meant.
    """
    hidden: list[Path] = []
    found = sorted(files_of(folder, hidden), key=_in_any_form)
    own = [file for file in found if file.suffix.lower() in suffixes]
    inside = sorted((p for p in folder.iterdir() if p.is_dir() and _is_data(p)), key=_in_any_form)
    loose = [file for file in own if file.parent == folder]
    left = {f"no {what} by its suffix": [_inner(f, folder) for f in found if f not in set(own)]}
    unlabelled = not labels_wanted and (loose or len(inside) < 2)
    if not unlabelled:
        _check_classes(folder, suffixes, what, inside, own)
        left["not in a class folder"] = [_inner(file, folder) for file in loose]
        own = [file for file in own if file.parent != folder]
    elif not own:
        raise InputError(
            f"the folder {folder} holds no {what}; expected {', '.join(suffixes)} files."
        )
    account = Account(
        source=str(folder),
        unit="file",
        given=len(found),
        used=len(own),
        left_out={reason: names for reason, names in left.items() if names},
        notes=_told(hidden, folder),
    )
    if unlabelled:
        return ClassFiles([(file, None) for file in own], account)
    return _labelled(folder, inside, own, account, label_ids or {}, labels_wanted)


def _labelled(
    folder: Path,
    inside: Sequence[Path],
    own: Sequence[Path],
    account: Account,
    label_ids: Mapping[str, int],
    labels_wanted: bool,
) -> ClassFiles:
    """The files of class folders, each with its class, and which folder is which class."""
    names = [unicodedata.normalize("NFC", path.name) for path in inside]
    counts = Counter(file.relative_to(folder).parts[0] for file in own)
    given = label_ids if labels_wanted else {}
    labels = _classes(folder, names, given) if labels_wanted else range(len(names))
    by_folder = {path.name: label for path, label in zip(inside, labels, strict=True)}
    called = {number: name for name, number in given.items()}
    told = [
        ClassCount(name, label, called.get(label), counts[path.name])
        for name, path, label in zip(names, inside, labels, strict=True)
    ]
    files: list[File] = [(file, by_folder[file.relative_to(folder).parts[0]]) for file in own]
    if labels_wanted:
        notes = [*account.notes, *absent(labels, given)]
        account = replace(account, classes=told, notes=notes)
    return ClassFiles(files, account)


def _check_classes(
    folder: Path, suffixes: Sequence[str], what: str, classes: Sequence[Path], own: Sequence[Path]
) -> None:
    if len(classes) < 2:
        found = f"the one class folder {classes[0].name}" if classes else "no class folder"
        raise InputError(
            f"the {what} folder {folder} has {found}; expected two or more folders, one a class, "
            f"with the {what}s of that class in it. {what.capitalize()}s without classes do for "
            'task="teacher".'
        )
    for first, second in pairwise(classes):
        if _in_any_form(first) == _in_any_form(second):
            raise InputError(
                f"the folder {folder} has two class folders called {first.name!r}, in two Unicode "
                "normal forms. Put their files together."
            )
    filled = {file.relative_to(folder).parts[0] for file in own}
    for directory in classes:
        if directory.name not in filled:
            raise InputError(
                f"the class folder {directory} holds no {what}; expected {', '.join(suffixes)} "
                f"files. Remove the folder or add {what}s."
            )


def _classes(folder: Path, names: Sequence[str], label_ids: Mapping[str, int]) -> Sequence[int]:
    """The class of each folder, in the order of their names.

    Names of the model's labels are these. Other names count from 0 in their order, as torchvision
    and ``datasets`` count them, if they are as many as the model's classes. Names that are numbers
    are the classes' own: where both can be meant and differ, nothing says which.

    Raises:
        InputError: As said, or some names are labels and others not.
    """
    unknown = [name for name in names if class_named(name, label_ids) is None]
    if not unknown:
        return [cast("int", class_named(name, label_ids)) for name in names]
    if len(unknown) < len(names):
        raise InputError(
            f"the class folders {', '.join(unknown[:5])} in {folder} are no labels of the model, "
            f"and others there are. Expected its labels: {', '.join(list(label_ids)[:10])}; or no "
            "name of a label at all, then the sorted names count from 0."
        )
    places, count = range(len(names)), len(label_ids) or None
    fits = count in (None, len(names))
    readings = {tuple(places)} if fits else set()
    if all(name.isdecimal() and name == str(int(name)) for name in names):
        values = [int(name) for name in names]
        if max(values) < (count or len(names)):
            readings.add(tuple(values))
        if fits:
            readings.add(tuple(sorted(values).index(value) for value in values))
    if len(readings) == 1:
        return readings.pop()
    if readings:
        raise InputError(
            f"the class folders in {folder} are numbers, and as names they stand in another order "
            f"({', '.join(names[:4])}, ...): {names[2]!r} is class 2 by its place, as torchvision "
            f"counts, and not by its number. Rename them so that both agree ({len(names)} names "
            "with leading zeros: 00, 01, ...), in the order of the model's classes; or give the "
            "data as file.py:function."
        )
    raise InputError(
        f"the folder {folder} has {len(names)} class folders ({', '.join(names[:5])}, ...), none "
        f"of them a label of the model, which has {count} classes: {', '.join(list(label_ids)[:5])}"
        ", ... . Expected its labels as names, or one folder for each of its classes."
    )


def _is_data(path: Path) -> bool:
    """Whether a file or folder is a user's own: not hidden, nor of those that systems leave."""
    return not path.name.startswith(".") and path.name.casefold() not in SYSTEM


def files_of(folder: Path, hidden: list[Path] | None = None) -> Iterator[Path]:
    """All visible files in a folder and those below it, through links, each folder once.

    Args:
        folder: Where to look.
        hidden: Gets the files and folders that are not visible.

    Raises:
        InputError: A folder can't be read.
    """
    seen: set[str] = set()
    for place, below, names in os.walk(folder, onerror=_unreadable, followlinks=True):
        note(*below, *names)
        every = [Path(place, name) for name in (*below, *names)]
        if hidden is not None:
            hidden += [path for path in every if not _is_data(path)]
        below[:] = sorted(name for name in below if _is_data(Path(name)))
        real = os.path.realpath(place)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        yield from (path for path in every if _is_data(path) and path.is_file())


def files_below(folder: Path, suffixes: Sequence[str]) -> Iterator[Path]:
    """Those with one of these suffixes."""
    return (path for path in files_of(folder) if path.suffix.lower() in suffixes)


def _unreadable(error: OSError) -> None:
    raise InputError(f"the folder {error.filename} can't be read: {error.strerror}.") from error


def _in_any_form(path: Path) -> tuple[str, ...]:
    """To sort by: the same for a name in any Unicode normal form."""
    return tuple(unicodedata.normalize("NFC", part) for part in path.parts)


def without_broken(found: ClassFiles, read: Callable[[Path], Any]) -> ClassFolder:
    """The files that can be read; each is read once here to find out, and not kept.

    Raises:
        InputError: A class has no file that can be read.
    """
    good: list[File] = []
    broken: list[File] = []
    skipped: list[str] = []
    for file, label in found.files:
        try:
            read(file)
        except InputError as error:
            broken.append((file, label))
            skipped.append(str(error))
        else:
            good.append((file, label))
    # A class may not disappear: the numbers of the others would stay, but nothing would test it.
    empty = {label for _, label in found.files} - {label for _, label in good}
    if empty:
        classes = sorted(label for label in empty if label is not None)
        which = f"no file of class {classes[0]}" if classes else "none of the files"
        raise InputError(f"{which} can be read: all are broken, the first: {skipped[0]}")
    return ClassFolder(good, _account_without(found.account, broken), read, skipped)


def _account_without(account: Account, broken: Sequence[File]) -> Account:
    if not broken:
        return account
    lost = Counter(label for _, label in broken)
    names = [_inner(file, Path(account.source)) for file, _ in broken]
    return replace(
        account,
        used=account.used - len(broken),
        left_out={**account.left_out, "can't be read": names},
        classes=[replace(c, count=c.count - lost[c.number]) for c in account.classes],
    )


def _told(hidden: Sequence[Path], folder: Path) -> list[str]:
    if not hidden:
        return []
    listed = ", ".join(_inner(path, folder) for path in sorted(hidden)[:5])
    more = ", ..." * (len(hidden) > 5)
    return [f"{len(hidden)} hidden or system files and folders are no data ({listed}{more})"]


def _inner(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()
