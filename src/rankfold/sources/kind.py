"""What kind of source a word on the command line names."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

from rankfold.errors import InputError
from rankfold.sources.arrow import is_dataset_folder
from rankfold.sources.python_object import is_spec
from rankfold.sources.records import SUFFIXES

Kind: TypeAlias = Literal["python", "npz", "images", "records", "text"]

PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".joblib")
EXPECTED = (
    "expected a UTF-8 text file, a .jsonl, .csv, .tsv or .parquet, an .npz with x and y, a folder "
    "of class folders of images, a folder that datasets saved (save_to_disk), or file.py:function "
    "giving a data set"
)


def source_kind(spec: str) -> Kind:
    """Decide by form, suffix and first bytes.

    Raises:
        InputError: Missing, empty, a pickle, or binary.
    """
    if is_spec(spec):
        return "python"
    path = Path(spec)
    if path.is_dir():
        return "records" if is_dataset_folder(path) else "images"
    if not path.exists():
        raise InputError(f"the data {spec} does not exist; {EXPECTED}.")
    if not path.is_file():
        raise InputError(f"the data {spec} is no regular file; {EXPECTED}.")
    if path.stat().st_size == 0:
        raise InputError(f"the data {spec} is empty; {EXPECTED}.")
    if path.suffix.lower() == ".npz":
        return "npz"
    if path.suffix.lower() in SUFFIXES:
        return "records"
    with path.open("rb") as file:
        binary = b"\0" in file.read(4096)
    if path.suffix.lower() in PICKLES:
        raise InputError(f"the data {spec} is a {path.suffix} file, which isn't read; {EXPECTED}.")
    if binary:
        raise InputError(f"the data {spec} is a binary file; {EXPECTED}.")
    return "text"
