"""The folder that a factorized model is saved in, and how it is read back.

``model.safetensors`` holds every tensor once, ``rankfold.json`` the rest: layers, ranks, forms,
losses, seeds, data hashes, versions, certificate. A transformers model's configuration and
tokenizer stand beside them. Writing is atomic; reading executes no code and opens no pickle.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rankfold.block_modules import BLOCK_FORMS, BlockForm, empty_blocks
from rankfold.certificate_file import json_digest, tensors_digest
from rankfold.certify import Verdict
from rankfold.conv_modules import CONV_FORMS, ConvForm, empty_conv
from rankfold.embedding_modules import LowRankEmbedding, LowRankHead
from rankfold.errors import InputError, opening_an_artifact
from rankfold.integrations import transformers as hf
from rankfold.integrations.vision import NamedModel, make_named
from rankfold.json_file import read_bytes, read_json
from rankfold.layer_matrix import MatrixLayer
from rankfold.memory_layout import lay_out, unusual_orders
from rankfold.modules import FORMS, Form, LowRankConv2d, LowRankLinear, left_rows
from rankfold.replace import put_modules
from rankfold.sizes import stored_tensors
from rankfold.unpack import put_back, unpack_named, unwrapped

FORMAT_VERSION = 1
WEIGHTS_FILE = "model.safetensors"
MANIFEST_FILE = "rankfold.json"
CONFIG_FILE = "config.json"
METADATA = {"format": "pt"}
_FLOATS = {str(t): t for t in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}

Manifest = dict[str, Any]


def check_output(folder: Path, overwrite: bool, mark: str = MANIFEST_FILE) -> None:
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
            "--overwrite (overwrite=True)."
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


def save_artifact(
    folder: str | Path,
    model: nn.Module,
    manifest: Manifest,
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
    files: Mapping[str, str] | None = None,
    source: NamedModel | None = None,
) -> Path:
    """Write a factorized model; the folder appears complete or not at all.

    Args:
        folder: Where to.
        model: The model with its low-rank layers.
        manifest: What ``rankfold.json`` says; the format's own fields are added here.
        tokenizer: Saved beside a transformers model.
        overwrite: Replace an artifact that stands there.
        files: Texts to write beside, by file name.
        source: What makes a model like the original, where a library does.

    Raises:
        InputError: The folder can't be written.
    """
    target = Path(folder)
    check_output(target, overwrite)
    tensors, aliases = stored_tensors(model)
    orders = unusual_orders(tensors)
    of_transformers = hf.is_transformers_model(model)
    complete: Manifest = {
        "format_version": FORMAT_VERSION,
        "versions": library_versions(),
        "model": {
            "kind": "transformers" if of_transformers else "module",
            "class": f"{type(model).__module__}.{type(model).__qualname__}",
            "shared_tensors": aliases,
            "computed_buffers": _computed_buffers(model),
            **({"dtype": str(cast("Any", model).dtype)} if of_transformers else {}),
            **({} if source is None else {"source": source.as_dict()}),
            **({"axes_in_memory": orders} if orders else {}),
        },
        **manifest,
    }
    with folder_in_one_step(target) as draft:
        stored = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(stored, draft / WEIGHTS_FILE, metadata=METADATA)
        complete["digest"] = artifact_digest(complete, stored)
        for name, content in (files or {}).items():
            (draft / name).write_text(content, encoding="utf-8")
        if of_transformers:
            hf.write_configuration(model, draft, structure(complete), tokenizer)
            complete["config_digest"] = _file_digest(draft / CONFIG_FILE)
        text = json.dumps(complete, indent=1, allow_nan=False, ensure_ascii=False)
        (draft / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")
    return target


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


def _check_config_digest(folder: Path, manifest: Manifest) -> None:
    file, stated = folder / CONFIG_FILE, manifest.get("config_digest")
    if stated is not None and stated != _file_digest(file):
        raise InputError(
            f"{file} is not the file that was saved: its digest is not the one in {MANIFEST_FILE}. "
            f"{_ON_PURPOSE}"
        )


_ON_PURPOSE = "If it was changed on purpose: rankfold.load(folder, as_saved=False)."


def _file_digest(file: Path) -> str:
    return hashlib.sha256(read_bytes(file)).hexdigest()


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
def load(folder: str | Path, model: nn.Module | None = None, *, as_saved: bool = True) -> nn.Module:
    """Open a saved model.

    Args:
        folder: An artifact folder.
        model: For a model of the user's own class, an instance of it: its factorized layers are
            exchanged and all its weights loaded, in place. A transformers model needs none, nor
            does one that was saved with what makes it (``Result.save``, ``source``). Of a
            compiled or data-parallel model the model inside is filled and returned.
        as_saved: Refuse a folder whose layers, weights or configuration are not those that were
            saved; False opens one where they were changed on purpose, as long as they fit.

    Returns:
        The model, in eval mode.

    Raises:
        ArtifactError: Not an artifact, made by a newer version, damaged, or not of this model. A
            model that was given is as it was.
    """
    path = Path(folder)
    manifest = read_manifest(path)
    of_transformers = manifest["model"]["kind"] == "transformers"
    if as_saved and of_transformers:
        _check_config_digest(path, manifest)
    tensors = read_tensors(path / WEIGHTS_FILE)
    if model is None:
        model = skeleton(path, manifest, tensors)
    model = unwrapped(model)
    return fill(model, manifest, tensors, where=str(path), as_saved=as_saved).eval()


def skeleton(
    folder: Path, manifest: Manifest, tensors: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """A model like the original, with weights that are still to be loaded.

    Args:
        folder: The artifact.
        manifest: Its own.
        tensors: Its weights; what asks for far more than these is refused.

    Raises:
        InputError: The model is of the user's own class, its library isn't installed or has no
            such model.
    """
    if manifest["model"]["kind"] == "transformers":
        return hf.skeleton(folder, tensors)
    source = manifest["model"].get("source")
    if source is None:
        raise InputError(
            f"{folder} holds a {manifest['model']['class']}, a class of your own: pass an "
            "instance, rankfold.load(folder, model=YourClass(...)) or --model file.py:function."
        )
    return make_named(NamedModel(**source), tensors)


@opening_an_artifact()
def read_manifest(folder: Path) -> Manifest:
    """The checked content of ``rankfold.json``.

    Raises:
        ArtifactError: Missing, not JSON, of a newer format, or with fields of the wrong type.
    """
    file = folder / MANIFEST_FILE
    if not file.is_file():
        raise InputError(
            f"{folder} is no rankfold artifact: it has no {MANIFEST_FILE}. What transformers has "
            "saved again is opened by its from_pretrained."
        )
    manifest = read_json(file)
    if not isinstance(manifest, dict):
        raise InputError(f"{file} holds a {type(manifest).__name__}; expected a JSON object.")
    manifest.setdefault("unpacked", [])  # not written before there was anything to unpack
    check_structure(manifest, str(file))
    return cast("Manifest", manifest)


# What every artifact that rankfold itself has made says, beside its layers.
REPORT_NUMBERS = {
    "original": ("parameters", "factorizable_parameters", "bytes", "flops"),
    "factorized": ("parameters", "factorizable_parameters", "bytes", "flops"),
    "loss": ("original", "factorized", "change", "standard_error"),
    "certificate": ("change", "standard_error", "upper_bound", "margin", "confidence", "examples"),
}
REPORT_TEXTS = {"loss": ("unit",), "certificate": ("unit", "verdict"), "model": ("class",)}
LAYER_NUMBERS = ("full_rank", "parameters", "factorized_parameters")


@opening_an_artifact()
def read_report(folder: Path) -> Manifest:
    """The manifest, with everything that a table of it shows.

    Raises:
        ArtifactError: As ``read_manifest``, or a field is missing.
    """
    manifest = read_manifest(folder)
    problems = [
        f"{group}.{key}"
        for group, keys in REPORT_NUMBERS.items()
        for key in keys
        if not _is_number(_field(manifest.get(group), key))
    ]
    problems += [
        f"{group}.{key}"
        for group, keys in REPORT_TEXTS.items()
        for key in keys
        if not isinstance(_field(manifest.get(group), key), str)
    ]
    problems += [
        f"layers[{index}].{key}"
        for index, layer in enumerate(manifest["layers"])
        for key in LAYER_NUMBERS
        if not _is_number(layer.get(key))
    ]
    listed = manifest.get("not_factorized")
    if not (isinstance(listed, list) and all(isinstance(_field(e, "reason"), str) for e in listed)):
        problems.append("not_factorized")
    if not isinstance(manifest.get("accuracy"), dict):
        problems.append("accuracy")
    if _field(manifest.get("certificate"), "verdict") not in get_args(Verdict):
        problems.append("certificate.verdict")
    if problems:
        raise InputError(
            f"{folder / MANIFEST_FILE} is damaged: {', '.join(problems[:10])} missing or of the "
            "wrong type."
        )
    return manifest


def _field(value: object, key: str) -> object:
    return value.get(key) if isinstance(value, dict) else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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
        raise InputError(f"{where} has the format_version {found!r}; expected a positive integer.")
    if cast("int", found) > FORMAT_VERSION:
        raise InputError(
            f"{where} has format_version {found}; this rankfold reads up to {FORMAT_VERSION}. "
            "Install a newer rankfold."
        )

    def expect(condition: bool, what: str) -> None:
        if not condition:
            raise InputError(f"{where} is damaged: expected {what}.")

    model, layers = manifest.get("model"), manifest.get("layers")
    expect(isinstance(model, dict), "an object 'model'")
    assert isinstance(model, dict)  # for the type checker
    expect(model.get("kind") in ("transformers", "module"), "model.kind transformers or module")
    expect(isinstance(model.get("class"), str), "a text model.class")
    source = model.get("source")
    if source is not None:
        fields = {"library", "name", "options"}
        expect(
            isinstance(source, dict) and source.keys() == fields,
            "an object model.source of library, name and options",
        )
        try:
            NamedModel(**source)
        except InputError as error:
            raise InputError(f"{where} is damaged: in model.source, {error}") from error
    aliases = model.get("shared_tensors")
    expect(
        isinstance(aliases, dict) and all(isinstance(v, str) for v in aliases.values()),
        "an object of names model.shared_tensors",
    )
    buffers = model.get("computed_buffers")
    expect(
        isinstance(buffers, dict) and all(str(value) in _FLOATS for value in buffers.values()),
        "an object of types model.computed_buffers",
    )
    orders = model.get("axes_in_memory", {})
    expect(
        isinstance(orders, dict) and all(_is_order(axes) for axes in orders.values()),
        "an object of orders of axes model.axes_in_memory",
    )
    names = manifest.get("unpacked")
    expect(
        isinstance(names, list) and all(isinstance(name, str) for name in names),
        "a list of names 'unpacked'",
    )
    for key in ("digest", "config_digest"):
        stated = manifest.get(key)
        expect(stated is None or isinstance(stated, str), f"a text {key!r}")
    expect(isinstance(layers, list), "a list 'layers'")
    for layer in cast("list[Any]", layers):
        expect(isinstance(layer, dict) and isinstance(layer.get("name"), str), "named layers")
        expect("rank" in layer, f"a rank of {layer['name']}, or null")
        rank = layer["rank"]
        if rank is not None:
            expect(_is_rank(rank), f"a positive rank of {layer['name']}")
            forms = (*FORMS, *BLOCK_FORMS, *CONV_FORMS)
            expect(layer.get("form") in forms, f"a form of {layer['name']} among {forms}")
            second = layer.get("second_rank")
            expect(second is None or _is_rank(second), f"a second rank of {layer['name']}, or null")
            uses = layer.get("uses")
            expect(
                uses is None
                or (isinstance(uses, list) and all(isinstance(use, str) for use in uses)),
                f"a list of the names of the uses of {layer['name']}",
            )
            expect(uses is None or layer["form"] in FORMS, f"a form of {layer['name']} in {FORMS}")
            if layer["form"] in CONV_FORMS:
                expect(isinstance(layer.get("pivoted"), bool), f"pivoted of {layer['name']}")


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        InputError: It can't be read.
    """
    if not file.is_file():  # a pipe or device would never end
        raise InputError(f"{file} can't be read: there is no such file.")
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, MemoryError, SafetensorError) as error:
        raise InputError(f"{file} can't be read: {error}") from error


def fill(
    model: nn.Module,
    manifest: Manifest,
    tensors: Mapping[str, Tensor],
    where: str,
    as_saved: bool = True,
) -> nn.Module:
    """Exchange the manifest's layers in ``model`` and load all tensors, in place.

    Raises:
        InputError: A layer, a name or a shape does not match; each is named with both shapes. With
            ``as_saved``, also where the digest does not.
    """
    packed = unpack_named(model, manifest.get("unpacked", []), where)
    before: dict[str, nn.Module] = {}
    try:
        modules: dict[str, nn.Module] = {}
        for entry in manifest["layers"]:
            if entry["rank"] is not None:
                modules |= empty_modules(model, entry, where)
        before = put_modules(model, modules)
        aliases = manifest["model"]["shared_tensors"]
        orders = manifest["model"].get("axes_in_memory", {})
        check_fit(model, tensors, aliases, where)
        check_orders(orders, tensors, where)
        if as_saved:
            check_digest(manifest, tensors, where)
        _put_tensors(model, tensors, aliases)
    except InputError:
        put_modules(model, before)
        put_back(model, packed)
        raise
    restore_computed_buffers(model, manifest["model"]["computed_buffers"])
    lay_out(model, orders)
    return model


def check_orders(
    orders: Mapping[str, Sequence[int]], tensors: Mapping[str, Tensor], where: str
) -> None:
    """Refuse an order of axes for a tensor that is not there, or has another number of axes.

    Raises:
        InputError: It is named.
    """
    for name, axes in orders.items():
        found = f"has {tensors[name].dim()}" if name in tensors else "is not there"
        if name not in tensors or tensors[name].dim() != len(axes):
            raise InputError(
                f"{where} is damaged: model.axes_in_memory names {len(axes)} axes of {name}, "
                f"which {found}."
            )


def restore_computed_buffers(model: nn.Module, dtypes: Mapping[str, str]) -> None:
    """Round the buffers that no file holds as they were rounded in the saved model.

    Names that the model doesn't have are left out: another version of its library may do without.
    """
    modules = dict(model.named_modules())
    for name, dtype in dtypes.items():
        parent, _, leaf = name.rpartition(".")
        owner = modules.get(parent)
        buffer = None if owner is None else owner._buffers.get(leaf)
        if owner is not None and buffer is not None and str(buffer.dtype) != dtype:
            owner._buffers[leaf] = buffer.to(_FLOATS[dtype])


def empty_modules(model: nn.Module, entry: Mapping[str, Any], where: str) -> dict[str, nn.Module]:
    """The modules that an entry of the manifest puts into a model, still to be filled.

    Raises:
        InputError: The model has no such layer, or one that has no such ranks.
    """
    if entry.get("uses") is None:
        return {entry["name"]: empty_low_rank(model, entry, where)}
    rank, form = entry["rank"], cast("Form", entry["form"])
    modules: dict[str, nn.Module] = {}
    shared: tuple[nn.Parameter, nn.Parameter] | None = None
    for name in entry["uses"]:
        layer = _layer(model, name, (nn.Linear, nn.Embedding), where)
        words, dim = layer.weight.shape
        _check_rank(name, rank, layer.weight, where)
        if shared is None:
            shared = (
                nn.Parameter(layer.weight.new_empty(words, rank)),
                nn.Parameter(layer.weight.new_empty(left_rows(dim, rank, form), rank)),
            )
        if shared[0].shape[0] != words or shared[1].shape[0] != left_rows(dim, rank, form):
            raise InputError(
                f"{where} is damaged or of another model: {', '.join(entry['uses'])} share one "
                "matrix, but have different shapes in the given model."
            )
        order = torch.arange(dim, device=layer.weight.device) if form == "pivoted" else None
        if isinstance(layer, nn.Embedding):
            modules[name] = LowRankEmbedding(*shared, order, layer.padding_idx)
        else:
            modules[name] = LowRankHead(*shared, order, layer.bias)
    return modules


def _layer(model: nn.Module, name: str, kinds: tuple[type[nn.Module], ...], where: str) -> Any:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        layer = None
    if not isinstance(layer, kinds):
        kind = "no such layer" if layer is None else f"a {type(layer).__name__}"
        raise InputError(
            f"{where} was made from another model: its layer {name} is {kind} in the given model; "
            f"expected a {' or '.join(kind.__name__ for kind in kinds)}."
        )
    return layer


def _check_rank(name: str, rank: int, weight: Tensor, where: str) -> None:
    if rank > min(weight.shape[0], weight[0].numel()):
        raise InputError(
            f"{where} is damaged or of another model: rank {rank} of {name} is above what a weight "
            f"of shape {tuple(weight.shape)} has."
        )


def empty_low_rank(model: nn.Module, entry: Mapping[str, Any], where: str) -> nn.Module:
    """A factorized module for the layer that an entry of the manifest names, still to be filled.

    Raises:
        InputError: The model has no such layer, or one that has no such ranks.
    """
    name, rank = entry["name"], entry["rank"]
    layer: MatrixLayer = _layer(model, name, (nn.Linear, nn.Conv2d), where)
    weight = layer.weight
    if entry["form"] in CONV_FORMS or entry["form"] in BLOCK_FORMS:
        return _empty_in_form(layer, entry, where)
    form = cast("Form", entry["form"])
    _check_rank(name, rank, weight, where)
    left = weight.new_empty(left_rows(weight.shape[0], rank, form), rank)
    right = weight.new_empty(rank, *weight.shape[1:])
    order = torch.arange(weight.shape[0], device=weight.device) if form == "pivoted" else None
    bias = None if layer.bias is None else layer.bias.detach()
    if isinstance(layer, nn.Linear):
        return LowRankLinear(left, right, bias, order)
    return LowRankConv2d(left, right, layer, bias, order)


def _empty_in_form(layer: MatrixLayer, entry: Mapping[str, Any], where: str) -> nn.Module:
    """A layer of the forms that only some layers have."""
    name, form, second = entry["name"], entry["form"], entry.get("second_rank")
    ranks = (entry["rank"],) if second is None else (entry["rank"], second)
    try:
        blocks = form in BLOCK_FORMS
        several = blocks or form == "tucker"
        suits = blocks or isinstance(layer, nn.Conv2d)
        if not suits or len(ranks) != (2 if several else 1):
            raise ValueError(f"form {form} with ranks {ranks} does not suit a {type(layer)}")
        if blocks:
            return empty_blocks(layer, cast("BlockForm", form), ranks)
        return empty_conv(cast("nn.Conv2d", layer), cast("ConvForm", form), ranks, entry["pivoted"])
    except ValueError as error:
        raise InputError(
            f"{where} is damaged or of another model: its layer {name}: {error}."
        ) from error


def load_tensors(
    model: nn.Module, tensors: Mapping[str, Tensor], aliases: Mapping[str, str], where: str
) -> None:
    """Load a complete set of tensors into a model, in their own dtypes.

    Args:
        model: Filled in place, when everything fits.
        tensors: By name.
        aliases: Names whose tensor stands under another name; they end up as one parameter.
        where: Where the tensors come from, for messages.

    Raises:
        InputError: Names or shapes don't match, all of them named.
    """
    check_fit(model, tensors, aliases, where)
    _put_tensors(model, tensors, aliases)


def check_fit(
    model: nn.Module, tensors: Mapping[str, Tensor], aliases: Mapping[str, str], where: str
) -> None:
    """Whether ``load_tensors`` can load them; arguments and errors are its own."""
    wanted = model.state_dict(keep_vars=True)
    offered = _under_all_names(tensors, aliases)
    problems = [f"{name}: missing" for name in wanted if name not in offered]
    problems += [f"{name}: not in the model" for name in offered if name not in wanted]
    problems += [
        f"{alias}: shares {aliases[alias]}, which is missing"
        for alias in aliases
        if aliases[alias] not in tensors
    ]
    problems += [
        f"{name}: {offered[name].dtype} in the file, {wanted[name].dtype} in the model"
        for name in wanted
        if name in offered and not _same_kind(offered[name], wanted[name])
    ]
    problems += [
        f"{name}: {tuple(offered[name].shape)} in the file, "
        f"{tuple(wanted[name].shape)} in the model"
        for name in wanted
        if name in offered and offered[name].shape != wanted[name].shape
    ]
    if problems:
        listed = "\n  ".join(problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise InputError(f"the weights in {where} don't fit the model:\n  {listed}{more}")


def _under_all_names(
    tensors: Mapping[str, Tensor], aliases: Mapping[str, str]
) -> dict[str, Tensor]:
    shared = {alias: tensors[name] for alias, name in aliases.items() if name in tensors}
    return {**tensors, **shared}


def _put_tensors(
    model: nn.Module, tensors: Mapping[str, Tensor], aliases: Mapping[str, str]
) -> None:
    wanted = model.state_dict(keep_vars=True)
    offered = _under_all_names(tensors, aliases)
    # Tensors that the model shares, or the file stores once, are one object: filled once each.
    with torch.no_grad():
        for name, tensor in wanted.items():
            # A copy, since kernels sum in another order where memory is not aligned as torch's own.
            tensor.data = offered[name].to(tensor.device, copy=True)
    for alias, name in aliases.items():
        owner, leaf = _owner(model, alias)
        source, source_leaf = _owner(model, name)
        setattr(owner, leaf, getattr(source, source_leaf))


def _same_kind(first: Tensor, second: Tensor) -> bool:
    """Both floating (of any precision), or of one type."""
    both_floating = first.is_floating_point() and second.is_floating_point()
    return both_floating or first.dtype == second.dtype


def _computed_buffers(model: nn.Module) -> dict[str, str]:
    """Types of the buffers that no file holds, such as rotary frequencies.

    A reloaded model computes them again, in its own type; ``model.to(dtype)`` had rounded them.
    """
    stored = model.state_dict(keep_vars=True)
    return {
        name: str(buffer.dtype)
        for name, buffer in model.named_buffers()
        if name not in stored and str(buffer.dtype) in _FLOATS
    }


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, leaf = name.rpartition(".")
    return model.get_submodule(parent), leaf
