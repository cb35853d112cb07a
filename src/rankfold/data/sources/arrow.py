"""Records in Apache Arrow: folders that ``datasets`` saved (``save_to_disk``), and ``.parquet``.

Only pyarrow reads them; nothing in a folder is run or unpickled, and ``datasets`` isn't needed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from rankfold.errors import InputError, require

STATE_FILE, SPLITS_FILE, INFO_FILE = "state.json", "dataset_dict.json", "dataset_info.json"
SUFFIXES = (".parquet", ".arrow")


def is_dataset_folder(folder: Path) -> bool:
    """Whether ``datasets`` wrote this folder, as one data set or as several splits."""
    return (folder / STATE_FILE).is_file() or (folder / SPLITS_FILE).is_file()


def read_arrow(path: Path) -> list[dict[str, Any]]:
    """All records of a ``save_to_disk`` folder, a ``.parquet`` or an ``.arrow`` file.

    Raises:
        InputError: pyarrow isn't installed, the folder holds several splits (they are listed), or
            something in it can't be read or holds bytes. (An image as ``datasets`` keeps it, a
            structure of bytes and path, may stand there.)
    """
    pyarrow: Any = require("pyarrow", "arrow")
    records: list[dict[str, Any]] = []
    for file in _shards(path) if path.is_dir() else [path]:
        try:
            table = _table(pyarrow, file)
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(
                f"{file} can't be read as Arrow data: {error}. Write it again, with "
                "save_to_disk or to_parquet."
            ) from error
        _check_columns(pyarrow, file, table.schema)
        records += table.to_pylist()
    return records


def class_names(path: Path, column: str) -> list[str] | None:
    """What the numbers in a column of labels (or of lists of labels) stand for, in their order.

    Only a ``save_to_disk`` folder says so; None where it doesn't, and for anything else.

    Raises:
        InputError: The folder's description of its columns can't be read.
    """
    file = path / INFO_FILE
    if not file.is_file():
        return None
    feature: Any = (_json(file).get("features") or {}).get(column)
    if isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
        feature = feature["feature"]  # of a list
    if not isinstance(feature, dict) or feature.get("_type") != "ClassLabel":
        return None
    return [str(name) for name in feature.get("names") or ()] or None


def _shards(folder: Path) -> list[Path]:
    if not (folder / STATE_FILE).is_file():
        splits = _json(folder / SPLITS_FILE).get("splits", [])
        found = ", ".join(str(folder / str(split)) for split in splits)
        raise InputError(f"{folder} holds several data sets; give one of them: {found}.")
    listed = _json(folder / STATE_FILE).get("_data_files")
    try:
        names = [cast("str", entry["filename"]) for entry in cast("Any", listed)]
        inside = all(Path(name).name == name for name in names)
    except (TypeError, KeyError):
        inside = False
    if not inside:
        raise InputError(
            f"{folder / STATE_FILE} lists {str(listed)[:80]} as _data_files; expected names of "
            "files in the folder, as save_to_disk writes them."
        )
    return [folder / name for name in names]


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} can't be read as JSON: {error}.") from error
    if not isinstance(found, dict):
        raise InputError(f"{file} is a JSON {type(found).__name__}; expected an object.")
    return found


def _table(pyarrow: Any, file: Path) -> Any:
    if file.suffix.lower() == ".parquet":
        return require("pyarrow.parquet", "arrow").read_table(file)
    with pyarrow.OSFile(str(file)) as opened, pyarrow.ipc.open_stream(opened) as stream:
        return stream.read_all()


def _check_columns(pyarrow: Any, file: Path, schema: Any) -> None:
    """Bytes that nothing says the meaning of; beside a path they are a file, such as an image.

    And two columns of one name: a record has one value of a name.
    """
    twice = [name for name in schema.names if schema.names.count(name) > 1]
    if twice:
        raise InputError(
            f"{file} has {len(twice)} columns called {twice[0]!r}; expected names that differ. "
            "Rename one of them."
        )
    for column in schema:
        kind = column.type
        fields = {p.name: p.type for p in kind} if pyarrow.types.is_struct(kind) else {"": kind}
        held = [name for name, part in fields.items() if pyarrow.types.is_binary(part)]
        if held and not (held == ["bytes"] and fields.keys() == {"bytes", "path"}):
            raise InputError(
                f"the column {column.name!r} of {file} holds bytes, which aren't read from there; "
                "expected texts, numbers, lists, and images as datasets keeps them. Save them as a "
                "folder of class folders, or give the data as file.py:function."
            )
