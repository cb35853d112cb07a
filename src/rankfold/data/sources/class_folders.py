"""A folder of class folders of files: the class is the folder, the example what its file holds.

Where no labels are wanted the files may stand in one folder, or in folders that are no classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from rankfold.errors import InputError


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
        skipped: What is wrong with each file that was left out, one message a file.
    """

    def __init__(
        self,
        files: Sequence[tuple[Path, int | None]],
        read: Callable[[Path], Any],
        skipped: Sequence[str] = (),
    ) -> None:
        self.files, self.read, self.skipped = files, read, skipped

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


def class_files(
    folder: Path,
    suffixes: Sequence[str],
    what: str,
    label_ids: Mapping[str, int] | None = None,
    *,
    labels_wanted: bool = True,
) -> list[tuple[Path, int | None]]:
    """The files of each class; the class is the place of its folder's name among the sorted names.

    Args:
        folder: Holds one folder per class.
        suffixes: Of the files that count, in lower case.
        what: What one file is called: ``image``.
        label_ids: The model's number of each label. Where the folders' names are labels, theirs
            are the classes, whatever their order.
        labels_wanted: Without it all files below the folder will do, with no class, where they
            don't stand in class folders alone.

    Raises:
        InputError: Fewer than two classes, a class without files, no file at all, or names of which
            some are labels and others not.
    """
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    loose = any(path.suffix.lower() in suffixes for path in folder.glob("[!.]*"))
    if not labels_wanted and (loose or len(classes) < 2):
        found_below = sorted(files_below(folder, suffixes))
        if not found_below:
            raise InputError(
                f"the folder {folder} holds no {what}; expected {', '.join(suffixes)} files."
            )
        return [(file, None) for file in found_below]
    if len(classes) < 2:
        found = f"the one class folder {classes[0].name}" if classes else "no class folder"
        raise InputError(
            f"the {what} folder {folder} has {found}; expected two or more folders, one a class, "
            f"with the {what}s of that class in it. {what.capitalize()}s without classes do for "
            'task="teacher".'
        )
    labels = _labels(folder, [path.name for path in classes], label_ids or {})
    files: list[tuple[Path, int | None]] = []
    for label, directory in zip(labels, classes, strict=True):
        own = sorted(path for path in directory.rglob("*") if path.suffix.lower() in suffixes)
        if not own:
            raise InputError(
                f"the class folder {directory} holds no {what}; expected {', '.join(suffixes)} "
                f"files. Remove the folder or add {what}s."
            )
        files += [(file, label) for file in own]
    return files


def _labels(folder: Path, names: Sequence[str], label_ids: Mapping[str, int]) -> Sequence[int]:
    unknown = [name for name in names if name not in label_ids]
    if not unknown:
        return [label_ids[name] for name in names]
    if len(unknown) < len(names):
        raise InputError(
            f"the class folders {', '.join(unknown[:5])} in {folder} are no labels of the model, "
            f"and others there are. Expected its labels: {', '.join(list(label_ids)[:10])}; or no "
            "name of a label at all, then the sorted names count from 0."
        )
    return range(len(names))


def files_below(folder: Path, suffixes: Sequence[str]) -> Iterator[Path]:
    """Files with one of these suffixes in a folder and in those below it that are not hidden."""
    below = chain(folder.glob("[!.]*"), folder.glob("[!.]*/**/*"))
    return (path for path in below if path.suffix.lower() in suffixes)


def without_broken(
    files: Sequence[tuple[Path, int | None]], read: Callable[[Path], Any]
) -> ClassFolder:
    """The files that can be read; each is read once here to find out, and not kept.

    Raises:
        InputError: A class has no file that can be read.
    """
    good: list[tuple[Path, int | None]] = []
    skipped: list[str] = []
    for file, label in files:
        try:
            read(file)
        except InputError as error:
            skipped.append(str(error))
        else:
            good.append((file, label))
    # A class may not disappear: the numbers of the others would stay, but nothing would test it.
    empty = {label for _, label in files} - {label for _, label in good}
    if empty:
        classes = sorted(label for label in empty if label is not None)
        which = f"no file of class {classes[0]}" if classes else "none of the files"
        raise InputError(f"{which} can be read: all are broken, the first: {skipped[0]}")
    return ClassFolder(good, read, skipped)
