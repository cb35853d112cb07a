"""``rankfold.json``: what it says, and how what it says is checked."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from rankfold.artifact.schema import ReportFields
from rankfold.certificate.document import GIVEN_MODELS, JSON_FILE
from rankfold.data.input_settings import InputSettings
from rankfold.errors import InputError, opening_an_artifact, visible
from rankfold.files.checked import check
from rankfold.files.digests import file_digest, json_digest, tensors_digest
from rankfold.files.json_file import read_json
from rankfold.files.own_files import check_own_files
from rankfold.files.shards import SINGLE
from rankfold.forms.registry import form_named, form_names
from rankfold.forms.storage import STORAGES
from rankfold.integrations.allowed import check_configuration
from rankfold.integrations.vision import NamedModel

FORMAT_VERSION = 1

WEIGHTS_FILE, MANIFEST_FILE, CONFIG_FILE = SINGLE, "rankfold.json", "config.json"

# Of the tensors whose types a manifest says.
FLOATS = {str(t): t for t in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}

Manifest = dict[str, Any]


def structure(manifest: Manifest) -> Manifest:
    """The part of a manifest that rebuilds the layers; config.json holds it, too."""
    keys = ("name", "rank", "second_rank", "form", "pivoted")
    return {
        "format_version": manifest["format_version"],
        "digest": manifest.get("digest"),
        "model": manifest["model"],
        "unpacked": manifest.get("unpacked", []),
        "layers": [
            # Only embeddings have uses; a key for all would change the digests of old folders.
            {key: entry.get(key) for key in keys}
            | ({"uses": entry["uses"]} if entry.get("uses") else {})
            for entry in manifest["layers"]
            if entry["rank"] is not None
        ],
    }


def artifact_digest(manifest: Manifest, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of all that decides what a model computes, but for what its own class does."""
    said = {**structure(manifest), "digest": None}
    return json_digest({"structure": said, "tensors": tensors_digest(tensors)})


def check_digest(manifest: Manifest, tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse layers or weights that are not those that were saved.

    Raises:
        InputError: Their digest is another. Artifacts of earlier versions have none.
    """
    stated = manifest.get("digest")
    if stated is not None and stated != artifact_digest(manifest, tensors):
        raise InputError(
            f"the layers or weights in {where} are not those that were saved: their digest is not "
            f"the one stated. The folder is damaged: save or copy it again. {_ON_PURPOSE}"
        )


def check_config_digest(folder: Path, manifest: Manifest) -> None:
    """Refuse a ``config.json`` that is not the one that was saved.

    Raises:
        InputError: Its digest is another.
    """
    file, stated = folder / CONFIG_FILE, manifest.get("config_digest")
    if stated is not None and stated != file_digest(file):
        raise InputError(
            f"{file} is not the file that was saved: its digest is not the one in {MANIFEST_FILE}. "
            f"{_ON_PURPOSE}"
        )


_ON_PURPOSE = "If it was changed on purpose: rankfold.load(folder, as_saved=False)."


def library_versions() -> dict[str, str]:
    """Versions of rankfold and of the libraries that its numbers depend on."""
    found: dict[str, str] = {}
    for name in (
        "rankfold", "torch", "numpy", "scipy", "safetensors", "transformers", "timm", "torchvision",
    ):  # fmt: skip
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@opening_an_artifact()
def _is_of_given_models(certificate: Path) -> bool:
    """Whether a file is a certificate of two given models."""
    try:
        found: Any = read_json(certificate)
    except InputError:
        return False
    return isinstance(found, dict) and found.get("kind") == GIVEN_MODELS


def read_manifest(folder: Path) -> Manifest:
    """The checked content of ``rankfold.json``.

    Raises:
        ArtifactError: Missing, not JSON, of a newer format, or with fields of the wrong type; the
            folder holds what is no file of its own, or its configuration asks for what isn't
            allowed.
    """
    file = folder / MANIFEST_FILE
    if not file.is_file():
        if _is_of_given_models(folder / JSON_FILE):
            raise InputError(
                f"{folder} holds a certificate of two given models, and no model: it has no "
                f"{MANIFEST_FILE}. rankfold certify computes it again, with check={folder}."
            )
        raise InputError(
            f"{folder} is no rankfold artifact: it has no {MANIFEST_FILE}. What transformers has "
            "saved again is opened by its from_pretrained."
        )
    check_own_files(folder)
    check_configuration(folder)
    manifest = read_json(file)
    if not isinstance(manifest, dict):
        raise InputError(f"{file} holds a {type(manifest).__name__}; expected a JSON object.")
    manifest.setdefault("unpacked", [])  # not written before there was anything to unpack
    check_structure(manifest, str(file))
    return cast("Manifest", manifest)


@opening_an_artifact()
def read_report(folder: Path) -> Manifest:
    """The manifest, with everything that a table of it shows.

    Raises:
        ArtifactError: As ``read_manifest``, or a field is missing.
    """
    manifest = read_manifest(folder)
    check(manifest, ReportFields, folder / MANIFEST_FILE)
    return manifest


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_order(value: object) -> bool:
    """Whether a value is a list of ``0, 1, ..., n - 1`` in some order."""
    numbers = isinstance(value, list) and all(type(axis) is int for axis in value)
    return numbers and sorted(cast("list[int]", value)) == [*range(len(cast("list[int]", value)))]


def check_structure(manifest: Mapping[str, Any], where: str) -> None:
    """Check the version and every field that loading relies on.

    Raises:
        InputError: Of a newer format, or a field is missing or of the wrong type; it is named.
    """
    found = manifest.get("format_version")
    if not _is_rank(found):
        raise InputError(
            f"{where} has the format_version {visible(repr(found))[:60]}; expected a positive "
            "integer."
        )
    if cast("int", found) > FORMAT_VERSION:
        raise InputError(
            f"{where} has format_version {found}; this rankfold reads up to {FORMAT_VERSION}. "
            "Install a newer rankfold."
        )
    _check_model(manifest.get("model"), where)
    if "input_settings" in manifest:
        try:
            InputSettings.from_dict(manifest["input_settings"])
        except InputError as error:
            raise InputError(f"{where} is damaged: in input_settings, {error}.") from error
    _expect(_are_names(manifest.get("unpacked")), "a list of names 'unpacked'", where)
    for key in ("digest", "config_digest"):
        stated = manifest.get(key)
        _expect(stated is None or isinstance(stated, str), f"a text {key!r}", where)
    layers = manifest.get("layers")
    _expect(isinstance(layers, list), "a list 'layers'", where)
    for layer in cast("list[Any]", layers):
        named = isinstance(layer, dict) and isinstance(layer.get("name"), str)
        _expect(named, "named layers", where)
        _expect("rank" in layer, f"a rank of {layer['name']}, or null", where)
        if layer["rank"] is not None:
            _check_layer(layer, where)


def _check_model(model: object, where: str) -> None:
    """Check what the manifest says of the model and of its tensors as a whole."""
    _expect(isinstance(model, dict), "an object 'model'", where)
    said = cast("dict[str, Any]", model)
    known = said.get("kind") in ("transformers", "module")
    _expect(known, "model.kind transformers or module", where)
    _expect(isinstance(said.get("class"), str), "a text model.class", where)
    if said.get("source") is not None:
        _check_source(said["source"], where)
    aliases = said.get("shared_tensors")
    _expect(
        isinstance(aliases, dict) and all(isinstance(v, str) for v in aliases.values()),
        "an object of names model.shared_tensors",
        where,
    )
    buffers = said.get("computed_buffers")
    _expect(
        isinstance(buffers, dict) and all(str(value) in FLOATS for value in buffers.values()),
        "an object of types model.computed_buffers",
        where,
    )
    orders = said.get("axes_in_memory", {})
    _expect(
        isinstance(orders, dict) and all(_is_order(axes) for axes in orders.values()),
        "an object of orders of axes model.axes_in_memory",
        where,
    )
    _expect(_are_names(said.get("hooks", [])), "a list of names model.hooks", where)


def _check_source(source: object, where: str) -> None:
    """Check what makes the model, where a library does."""
    fields = {"library", "name", "options"}
    _expect(
        isinstance(source, dict) and source.keys() == fields,
        "an object model.source of library, name and options",
        where,
    )
    try:
        NamedModel(**cast("dict[str, Any]", source))
    except InputError as error:
        raise InputError(f"{where} is damaged: in model.source, {error}") from error


def _check_layer(layer: Mapping[str, Any], where: str) -> None:
    """Check the entry of a factorized layer."""
    name = layer["name"]
    _expect(_is_rank(layer["rank"]), f"a positive rank of {name}", where)
    forms = form_names()
    _expect(layer.get("form") in forms, f"a form of {name} among {forms}", where)
    form: str = layer["form"]
    second = layer.get("second_rank")
    _expect(second is None or _is_rank(second), f"a second rank of {name}, or null", where)
    uses = layer.get("uses")
    named = uses is None or (_are_names(uses) and len(uses) > 0)
    _expect(named, f"a list of the names of the uses of {name}", where)
    _expect(uses is None or form in STORAGES, f"a form of {name} in {STORAGES}", where)
    if form not in STORAGES and len(form_named(form).storages) > 1:
        _expect(isinstance(layer.get("pivoted"), bool), f"pivoted of {name}", where)


def _expect(condition: bool, what: str, where: str) -> None:
    if not condition:
        raise InputError(f"{where} is damaged: expected {what}.")


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
