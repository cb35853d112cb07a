"""What transformers runs in ``from_pretrained`` of an artifact: exchange layers, then fill them.

To transformers this is a quantization method. Nothing is quantized: after loading, the model is
marked as an ordinary one, so that it can be cast, trained and saved. Imported only where
transformers is.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from rankfold.artifact.load import (
    check_hooks,
    check_orders,
    empty_modules,
    restore_computed_buffers,
)
from rankfold.artifact.manifest import CONFIG_FILE, check_digest, check_structure
from rankfold.errors import InputError, listed, opening_an_artifact
from rankfold.files.json_file import read_json
from rankfold.files.reading import REPLACED, identity
from rankfold.files.tensors import read_tensors
from rankfold.integrations.allowed import check_keys
from rankfold.integrations.quant_method import QUANT_METHOD
from rankfold.integrations.transformers import is_transformers_model
from rankfold.model.memory_layout import lay_out
from rankfold.model.replace import put_modules
from rankfold.model.unpack import unpack_named

if TYPE_CHECKING:  # this is imported while transformers itself is half imported
    from transformers import PreTrainedConfig, PreTrainedModel

_WHERE = "the quantization_config of config.json"


@register_quantization_config(QUANT_METHOD)
class RankfoldConfig(QuantizationConfigMixin):  # type: ignore[misc, unused-ignore]
    """The part of ``rankfold.json`` that says how to rebuild the layers.

    Args:
        fields: As ``manifest.structure`` gives them.

    Raises:
        ArtifactError: They are damaged, or of a newer version.
    """

    @opening_an_artifact()
    def __init__(self, **fields: Any) -> None:
        fields.pop("quant_method", None)
        check_structure(fields, _WHERE)
        self.quant_method = QUANT_METHOD  # type: ignore[assignment, unused-ignore]
        self.__dict__.update(fields)


@register_quantizer(QUANT_METHOD)
class RankfoldQuantizer(HfQuantizer):  # type: ignore[misc, unused-ignore]
    """Rebuilds factorized layers before transformers loads the weights into them."""

    requires_calibration = True  # rankfold makes the factors, not from_pretrained

    @opening_an_artifact()
    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Let the weights be found: called before transformers looks for them.

        The configuration names no file of weights but tells whoever has no rankfold to install it.

        Raises:
            ArtifactError: It asks for what is downloaded and run.
        """
        for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
            for name in ("_attn_implementation", "_experts_implementation"):
                check_keys({name: getattr(part, name, None)}, "config.json")
        # save_pretrained drops the field: what it has saved again may be trained further.
        self.as_saved = hasattr(config, "transformers_weights")
        if self.as_saved:
            del config.transformers_weights
        return config

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Remember the dtype that is asked for."""
        self.dtype = dtype
        return dtype

    def update_weight_conversions(self, weight_conversions: Any, model: Any = None) -> list[Any]:
        """None: artifacts name tensors as the model does, not as older checkpoints did.

        Args:
            weight_conversions: Left out.
            model: Which releases of transformers before 5.24 don't give.
        """
        return []

    @opening_an_artifact()
    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        structure = self.quantization_config.__dict__
        check_hooks(model, structure["model"], _WHERE)
        # Another head on the same body: layers of the head that was saved have no place in it.
        same = structure["model"]["class"].rpartition(".")[2] == type(model).__name__
        unpacked = _Names(model, same).of_modules(structure["unpacked"])
        unpack_named(model, unpacked, _WHERE)
        for name in unpacked:
            parent = model.get_submodule(name.rpartition(".")[0])
            for part in (parent, *model.get_submodule(name).modules()):
                if not (part._parameters or part._buffers):
                    # It would initialise weights that are not there any more.
                    part._is_hf_initialized = True  # type: ignore[assignment]
        here = _Names(model, same)
        modules: dict[str, nn.Module] = {}
        for entry in structure["layers"]:
            # Of an embedding matrix, the uses that this model has.
            uses = here.of_uses(entry.get("uses") or [entry["name"]])
            if entry["rank"] is not None and uses:
                named = {"name": uses[0], "uses": uses if entry.get("uses") else None}
                modules |= empty_modules(model, {**entry, **named}, _WHERE)
        put_modules(model, modules)
        # Tensors that rankfold stores once: without this the other name would count as missing.
        names = model.state_dict().keys()
        tied = model.all_tied_weights_keys
        for alias, name in structure["model"]["shared_tensors"].items():
            if {alias, name} <= names and alias not in tied and tied.get(name) != alias:
                tied[alias] = name
        self.files = [Path(file) for file in checkpoint_files or ()]
        self.opened = [identity(file) for file in self.files]
        if checkpoint_files:
            try:
                _check_stored(model, None if same else modules, checkpoint_files)
                if self.as_saved:
                    read = [read_tensors(file) for file in self.files]
                    tensors = {name: tensor for file in read for name, tensor in file.items()}
                    check_digest(structure, tensors, str(self.files[0].parent))
            except InputError:
                self._refuse_replaced()
                raise

    def _refuse_replaced(self) -> None:
        """Refuse weights of another folder than the configuration, which has taken its place.

        Raises:
            InputError: The files are others by now, or the configuration is.
        """
        same = self.opened == [identity(file) for file in self.files]
        for folder in {file.parent for file in self.files} if self.as_saved and same else ():
            with suppress(InputError, KeyError, TypeError):
                told = read_json(folder / CONFIG_FILE, constants=True)
                stated = told["quantization_config"] if isinstance(told, dict) else {}
                same = stated["digest"] == self.quantization_config.__dict__.get("digest")
        if not same:
            raise InputError(REPLACED.format(self.files[0].parent))

    @opening_an_artifact()
    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        structure = self.quantization_config.__dict__
        if structure["model"].get("dtype") == str(self.dtype):
            here = _Names(model, strict=False)
            buffers = structure["model"]["computed_buffers"]
            restore_computed_buffers(
                model,
                {found: dtype for name, dtype in buffers.items() if (found := here.of(name))},
            )
        here = _Names(model, strict=False)
        orders = structure["model"].get("axes_in_memory", {})
        orders = {found: axes for name, axes in orders.items() if (found := here.of(name))}
        check_orders(orders, model.state_dict(), _WHERE)
        lay_out(model, orders)
        self._refuse_replaced()
        _mark_as_ordinary(model)

    def is_serializable(self) -> bool:
        """Whether ``save_pretrained`` works: it does."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the weights can be trained: they can."""
        return True


class _Names:
    """Where a module of the saved model is in this one, which may have another head or none."""

    def __init__(self, model: PreTrainedModel, strict: bool) -> None:
        self.model, self.strict = model, strict
        self.modules = dict(model.named_modules()).keys()
        self.prefix = f"{model.base_model_prefix}."

    def of(self, name: str) -> str | None:
        """The name here of a buffer."""
        parent, _, leaf = name.rpartition(".")
        found = self.of_module(parent)
        return None if found is None else f"{found}.{leaf}".removeprefix(".")

    def of_module(self, name: str) -> str | None:
        for candidate in (name, name.removeprefix(self.prefix), self.prefix + name):
            if candidate in self.modules:
                return candidate
        if self.strict:
            raise InputError(
                f"{_WHERE} names a layer {name}, which {type(self.model).__name__} doesn't have; "
                "the folder is damaged or of another version of transformers."
            )
        return None

    def of_uses(self, names: list[str]) -> list[str]:
        """The names here of those modules that are here."""
        return [found for name in names if (found := self.of_module(name)) is not None]

    def of_modules(self, names: list[str]) -> list[str]:
        # One module may be unpacked several times, and what stands in a packed one comes later.
        found: dict[str, str] = {}
        listed: list[str] = []
        for name in names:
            outer = next((o for o in found if f"{name}.".startswith(f"{o}.")), None)
            here = self.of_module(name) if outer is None else found[outer] + name[len(outer) :]
            if here is not None:
                found[name] = here
                listed.append(here)
        return listed


def _check_stored(
    model: PreTrainedModel, only: Collection[str] | None, files: Sequence[str]
) -> None:
    """Refuse what transformers would fill with random numbers and a mere warning.

    Args:
        model: With its factorized layers, still empty.
        only: Modules to look at; None where the files hold this very model.
        files: The safetensors files.

    Raises:
        InputError: A tensor is missing, of another shape, or has no place; all of them are named.
    """
    prefix = f"{model.base_model_prefix}."
    stored: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    stored[name.removeprefix(prefix)] = tuple(opened.get_slice(name).get_shape())
        except (OSError, MemoryError, SafetensorError) as error:
            raise InputError(f"{file} can't be read: {error}") from error
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    wanted = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if only is None or name.rpartition(".")[0] in only
    }
    found = {name: stored.pop(name.removeprefix(prefix), None) for name in wanted}
    problems = [f"{n}: missing" for n, s in found.items() if s is None and n not in tied]
    problems += [
        f"{name}: {shape} in the file, {wanted[name]} in the model"
        for name, shape in found.items()
        if shape is not None and shape != wanted[name]
    ]
    problems += [f"{name}: not in the model" for name in stored if only is None]
    if problems:
        raise InputError(
            f"the weights don't fit what {_WHERE} says. The folder is damaged: save or download it "
            f"again.\n  {listed(problems)}"
        )


def _mark_as_ordinary(model: PreTrainedModel) -> None:
    """Take back what transformers refuses for quantized models: casts, training."""
    marked: Any = model
    marked.hf_quantizer = None
    marked.is_quantized = False
    marked.__dict__.pop("quantization_method", None)
    for module in model.modules():
        if is_transformers_model(module):
            part: Any = module
            part.config._is_quantized = False
