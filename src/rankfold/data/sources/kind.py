"""What kind of source a word on the command line names."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Literal, TypeAlias

from rankfold.data.sources.arrow import is_dataset_folder
from rankfold.data.sources.class_folders import files_below
from rankfold.data.sources.images import SUFFIXES as IMAGES
from rankfold.data.sources.python_object import is_spec
from rankfold.data.sources.records import SUFFIXES
from rankfold.data.sources.registry import registered_source
from rankfold.data.sources.sounds import SUFFIXES as SOUNDS
from rankfold.errors import InputError

Kind: TypeAlias = Literal["python", "registered", "npz", "images", "sounds", "records", "text"]

PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".joblib")
# Files that are often given, by their suffix: what they are, and what to do.
OTHERS = {
    (".xlsx", ".xls", ".xlsm", ".ods", ".numbers"): ("a spreadsheet", "Save it as .csv"),
    (".docx", ".doc", ".odt", ".rtf", ".pdf", ".epub"): (
        "a document", "Save its text as plain UTF-8 (.txt)"
    ),
    (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"): (
        "an archive", "Unpack it"
    ),
    (".h5", ".hdf5", ".mat", ".feather", ".arrow", ".orc", ".avro", ".tfrecord", ".db", ".sqlite",
     ".sqlite3", ".dta", ".sav", ".rds"): ("a file of tables or arrays", "Save it as .parquet"),
    IMAGES: ("one image", "Give the folder with a folder of images for each class"),
    SOUNDS: ("one sound", "Give the folder with a folder of sounds for each class"),
}  # fmt: skip
EXPECTED = (
    "expected a UTF-8 text file, a .jsonl, .csv, .tsv or .parquet, an .npz with x and y, a folder "
    "of class folders of images or wav files, a folder that datasets saved (save_to_disk), or "
    "file.py:function giving a data set"
)


def source_kind(spec: str) -> Kind:
    """Decide by form, suffix and first bytes; a registered suffix comes first.

    Raises:
        InputError: Missing, empty, a pickle, or binary.
    """
    if is_spec(spec):
        return "python"
    path = Path(spec)
    own = registered_source(path) if path.exists() else None
    if own is not None:
        return "records" if own.records else "registered"
    if path.is_dir():
        return _folder_kind(path)
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
    for suffixes, (what, advice) in OTHERS.items():
        if path.suffix.lower() in suffixes:
            raise InputError(f"the data {spec} is {what} ({path.suffix}). {advice}.")
    with path.open("rb") as file:
        start = file.read(4096)
    if path.suffix.lower() in PICKLES:
        raise InputError(f"the data {spec} is a {path.suffix} file, which isn't read; {EXPECTED}.")
    if path.suffix.lower() == ".json":
        raise InputError(
            f"the data {spec} is one JSON value; expected a .jsonl with an object a line, such as "
            '{"text": "..."}. Write each record in a line of its own.'
        )
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(
            f"the text {spec} is UTF-16; expected plain UTF-8 text. Convert it, for example with "
            f"iconv -f utf-16 -t utf-8 {spec}."
        )
    if b"\0" in start:
        raise InputError(f"the data {spec} is a binary file; {EXPECTED}.")
    return "text"


def _folder_kind(folder: Path) -> Kind:
    if is_dataset_folder(folder):
        return "records"
    sounds, images = (any(files_below(folder, kind)) for kind in (SOUNDS, IMAGES))
    others = sorted(files_below(folder, (*SUFFIXES, ".txt", ".npz")))
    if others and not (sounds or images):
        listed = ", ".join(map(str, others[:5])) + ", ..." * (len(others) > 5)
        raise InputError(
            f"the folder {folder} holds files of records or text: {listed}. Give one of them; "
            "several parts of one data set are read from a folder of save_to_disk."
        )
    if not sounds:
        return "images"
    if images:
        raise InputError(
            f"the folder {folder} holds both images and wav files; expected those of one kind. "
            "Put them in two folders."
        )
    return "sounds"
