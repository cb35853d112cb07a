"""A folder that appears complete or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from rankfold.errors import InputError


def check_output(folder: Path, overwrite: bool, mark: str) -> None:
    """Refuse an output folder that can't be written, before any work is done.

    Args:
        folder: Where to.
        overwrite: Whether an earlier output may be replaced.
        mark: The file by which an earlier output is known.

    Raises:
        InputError: It exists and is not empty (without ``overwrite``), or is a file, or nothing can
            be written where it shall stand.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"the output {folder} is a file; expected a folder that is new or empty.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise InputError(
            f"the output folder {folder} exists and is not empty; choose another one or pass "
            "overwrite=True."
        )
    if folder.is_dir() and any(folder.iterdir()) and not (folder / mark).is_file():
        raise InputError(
            f"the output folder {folder} holds no {mark}, so it is no earlier result of this; it "
            "is not overwritten. Choose another folder or empty this one."
        )
    beside = next((one for one in folder.absolute().parents if one.exists()), folder)
    try:
        Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=beside)).rmdir()
    except OSError as error:
        raise InputError(
            f"the output folder {folder} can't be written: {error}. Choose one in a folder where "
            "you may write."
        ) from error


@contextmanager
def folder_in_one_step(target: Path) -> Iterator[Path]:
    """A draft folder that becomes ``target`` at the end, or vanishes."""
    draft = backup = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        draft.chmod(0o755)
        yield draft
        for file in draft.rglob("*"):  # safetensors writes files that only their owner can read
            file.chmod(0o755 if file.is_dir() else 0o644)
        if target.exists():
            backup = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            target.replace(backup / "old")
        draft.replace(target)
    except BaseException as error:
        if backup is not None and (backup / "old").exists() and not target.exists():
            (backup / "old").replace(target)
        if isinstance(error, OSError | SafetensorError):
            raise InputError(
                f"the output folder {target} can't be written: {error}. Nothing was left there."
            ) from error
        raise
    finally:
        for leftover in (draft, backup):
            if leftover is not None:
                shutil.rmtree(leftover, ignore_errors=True)
