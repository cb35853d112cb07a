"""Open a factorized model: exchange the layers of one like the original, and fill them.

``rankfold.json`` says which layers are factorized and how; each form makes an empty module of its
own. Names, shapes and digests are checked before a tensor is put into the model, and a model that
was given is as it was where anything is refused. No code is executed, no pickle is opened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from rankfold.artifact.manifest import (
    FLOATS,
    Manifest,
    check_config_digest,
    check_digest,
    read_manifest,
)
from rankfold.data.sources.python_object import USER_MODULE
from rankfold.errors import (
    MODEL,
    InputError,
    check_kind,
    listed,
    opening_an_artifact,
    path_of,
    visible,
)
from rankfold.files.reading import read_whole
from rankfold.files.shards import read_weights
from rankfold.forms.embedding.fit import empty_uses
from rankfold.forms.registry import form_named
from rankfold.forms.storage import Storage
from rankfold.integrations import transformers as hf
from rankfold.integrations.vision import NamedModel, make_named
from rankfold.model.layer_matrix import MatrixLayer
from rankfold.model.memory_layout import lay_out
from rankfold.model.of_user import hooked
from rankfold.model.replace import put_modules
from rankfold.model.unpack import put_back, unpack_named, unwrapped


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
    if model is not None:
        check_kind("the model", model, nn.Module, MODEL)
    path = path_of("the folder", folder)

    def read() -> tuple[nn.Module, Manifest, dict[str, Tensor]]:
        manifest = read_manifest(path)
        if as_saved and manifest["model"]["kind"] == "transformers":
            check_config_digest(path, manifest)
        tensors = read_weights(path)
        made = skeleton(path, manifest, tensors) if model is None else model
        return made, manifest, tensors

    opened, manifest, tensors = read_whole(path, read)
    return fill(unwrapped(opened), manifest, tensors, where=str(path), as_saved=as_saved).eval()


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
        raise InputError(own_class(folder, manifest))
    return make_named(NamedModel(**source), tensors)


def own_class(folder: Path, manifest: Manifest) -> str:
    """What is missing where a folder holds a model of the user's own class."""
    module, _, name = manifest["model"]["class"].rpartition(".")
    file = module.removeprefix(USER_MODULE)  # of a class that file.py:function gave
    named = f"{name} of {file}.py" if file != module else manifest["model"]["class"]
    return (
        f"{folder} holds a {visible(named)}, a class of your own: pass an instance of it by "
        "model=. It needs no training: the weights are in the folder, which holds no code."
    )


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
    check_hooks(model, manifest["model"], where)
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
    except BaseException:
        put_modules(model, before)
        put_back(model, packed)
        raise
    restore_computed_buffers(model, manifest["model"]["computed_buffers"])
    lay_out(model, orders)
    return model


def check_hooks(model: nn.Module, said: Mapping[str, Any], where: str) -> None:
    """Refuse a model that lacks hooks with which the saved one computed.

    Raises:
        InputError: The modules are named.
    """
    lacking = sorted({*said.get("hooks", [])} - {*hooked(model)})
    if lacking:
        raise InputError(
            f"the model in {where} computes with hooks, which no file holds, and the given one has "
            f"none on these modules:\n  {listed(lacking)}\n"
            "Open it by rankfold.load(folder, model=...), with a model that has the hooks."
        )


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
            owner._buffers[leaf] = buffer.to(FLOATS[dtype])


def empty_modules(model: nn.Module, entry: Mapping[str, Any], where: str) -> dict[str, nn.Module]:
    """The modules that an entry of the manifest puts into a model, still to be filled.

    Raises:
        InputError: The model has no such layer, or one that has no such ranks.
    """
    if entry.get("uses") is None:
        return {entry["name"]: _empty_layer(model, entry, where)}
    kinds = (nn.Linear, nn.Embedding)
    uses = {name: _layer(model, name, kinds, where) for name in entry["uses"]}
    try:
        return {**empty_uses(uses, entry["rank"], cast("Storage", entry["form"]))}
    except ValueError as error:
        raise InputError(f"{where} is damaged or of another model: {error}.") from error


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


def _empty_layer(model: nn.Module, entry: Mapping[str, Any], where: str) -> nn.Module:
    """A module for the layer that an entry names, in the entry's form, still to be filled."""
    name, second = entry["name"], entry.get("second_rank")
    layer: MatrixLayer = _layer(model, name, (nn.Linear, nn.Conv2d), where)
    ranks = (entry["rank"],) if second is None else (entry["rank"], second)
    try:
        form = form_named(entry["form"])
        return form.empty(layer, entry["form"], ranks, entry.get("pivoted") is True)
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
        raise InputError(f"the weights in {where} don't fit the model:\n  {listed(problems)}")


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


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, leaf = name.rpartition(".")
    return model.get_submodule(parent), leaf
