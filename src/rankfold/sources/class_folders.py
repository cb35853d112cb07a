"""A folder of class folders of files: the class is the folder, the example what its file holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from rankfold.errors import InputError


def labelled(inputs: Any, label: int) -> Any:
    """An example: inputs by name with ``labels`` among them, or a pair of anything else."""
    if isinstance(inputs, Mapping):
        return {**inputs, "labels": torch.tensor(label)}
    return inputs, label


class ClassFolder(Dataset[Any]):
    """What a file holds and its class (``labelled``), in the order of the paths; read when used.

    Attributes:
        files: The files and their classes.
        skipped: What is wrong with each file that was left out, one message a file.
    """

    def __init__(
        self,
        files: Sequence[tuple[Path, int]],
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
    return InputError(f"{error} Or leave out such files with --skip-broken.")


def class_files(
    folder: Path,
    suffixes: Sequence[str],
    what: str,
    label_ids: Mapping[str, int] | None = None,
) -> list[tuple[Path, int]]:
    """The files of each class; the class is the place of its folder's name among the sorted names.

    Args:
        folder: Holds one folder per class.
        suffixes: Of the files that count, in lower case.
        what: What one file is called: ``image``.
        label_ids: The model's number of each label. Where the folders' names are labels, theirs
            are the classes, whatever their order.

    Raises:
        InputError: Fewer than two classes, a class without files, or names of which some are labels
            and others not.
    """
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    if len(classes) < 2:
        found = f"the one class folder {classes[0].name}" if classes else "no class folder"
        raise InputError(
            f"the {what} folder {folder} has {found}; expected two or more folders, one a class, "
            f"with the {what}s of that class in it."
        )
    labels = _labels(folder, [path.name for path in classes], label_ids or {})
    files: list[tuple[Path, int]] = []
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


def holds_files(folder: Path, suffixes: Sequence[str]) -> bool:
    """Whether a class folder holds a file of one of these suffixes."""
    found = (path.suffix.lower() in suffixes for path in folder.glob("[!.]*/**/*"))
    return any(found)


def without_broken(files: Sequence[tuple[Path, int]], read: Callable[[Path], Any]) -> ClassFolder:
    """The files that can be read; each is read once here to find out, and not kept.

    Raises:
        InputError: A class has no file that can be read.
    """
    good: list[tuple[Path, int]] = []
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
        raise InputError(
            f"no file of class {min(empty)} can be read: all are broken, the first: {skipped[0]}"
        )
    return ClassFolder(good, read, skipped)
