"""The files that MODEL, DATA and an artifact are read from, to see that they stay as they are."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from rankfold.cli.options import SELF
from rankfold.data.sources import is_spec, source_kind
from rankfold.data.sources.class_folders import files_below, files_of
from rankfold.data.sources.images import SUFFIXES as IMAGES
from rankfold.data.sources.sounds import SUFFIXES as SOUNDS
from rankfold.files.unchanged import Listing, Unchanged
from rankfold.integrations.transformers import files_read


def unchanged(
    *,
    models: Iterable[str | None] = (),
    weights: Path | None = None,
    data: Iterable[str | None] = (),
    artifact: Path | None = None,
) -> Unchanged:
    """Digests of all files that a command will read.

    Args:
        models: Each MODEL, or None.
        weights: A file of weights.
        data: Each DATA, or None.
        artifact: A folder of an earlier run.
    """
    found: dict[str, Listing] = {}
    if artifact is not None:
        found["the factorized model"] = partial(files_read, artifact)
    for spec in models:
        if spec is not None:
            found[f"the model {spec}"] = partial(_of_model, spec)
    if weights is not None:
        found["the weights"] = partial(_alone, weights)
    for spec in data:
        if spec not in (None, SELF):
            found[f"the data {spec}"] = partial(_of_data, spec)
    return Unchanged(found)


def _of_model(spec: str) -> list[Path]:
    if is_spec(spec):
        return [_python_file(spec)]
    path = Path(spec)
    return files_read(path) if path.is_dir() else [path]


def _of_data(spec: str) -> list[Path]:
    """Of a folder of images or sounds these alone: what else lies there is no input."""
    if is_spec(spec):
        return [_python_file(spec)]
    path = Path(spec)
    if not path.is_dir():
        return [path]
    suffixes = {"images": IMAGES, "sounds": SOUNDS}.get(source_kind(spec))
    return [*(files_of(path) if suffixes is None else files_below(path, suffixes))]


def _python_file(spec: str) -> Path:
    """The file of ``file.py:function``; of ``package.module:function`` the one that stands here."""
    place = spec.rpartition(":")[0]
    if place.endswith(".py"):
        return Path(place)
    module = Path(*place.split("."))
    package = module / "__init__.py"
    return package if package.is_file() else module.with_suffix(".py")


def _alone(file: Path) -> list[Path]:
    return [file]
