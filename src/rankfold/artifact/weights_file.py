"""A user's own ``.safetensors`` file of weights for a model of their own class.

It may have been written by other tools than rankfold, so what PyTorch's ``load_state_dict`` and
``safetensors.torch.load_model`` take is taken here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from rankfold.artifact.load import load_tensors
from rankfold.errors import InputError
from rankfold.files.tensors import read_tensors, without_wrappers
from rankfold.model.sizes import stored_tensors


def load_weights(model: nn.Module, file: Path) -> nn.Module:
    """Load a user's ``.safetensors`` file into a model of their own class.

    Raises:
        InputError: No such file, not safetensors, or names and shapes that don't match.
    """
    if not file.is_file():
        raise InputError(f"no such weights file: {file}")
    if file.suffix != ".safetensors":
        raise InputError(
            f"the weights file {file} is not .safetensors; rankfold reads no pickles. Convert it "
            "with safetensors.torch.save_file(model.state_dict(), ...)."
        )
    _, aliases = stored_tensors(model)
    stored = read_tensors(file)
    names = without_wrappers(stored, str(file), model.state_dict(keep_vars=True))
    tensors = _completed(model, {names[name]: t for name, t in stored.items()}, aliases)
    load_tensors(model, tensors, aliases, str(file))
    return model


def _completed(
    model: nn.Module, tensors: Mapping[str, Tensor], aliases: Mapping[str, str]
) -> dict[str, Tensor]:
    """The file's tensors, and what a file may leave out.

    One from before PyTorch 0.4.1 has no count of the batches that a norm has seen: the model's own
    stays. Tensors that the model shares may stand under any one of their names.
    """
    stored = model.state_dict()
    counts = {n: t for n, t in stored.items() if n.rpartition(".")[2] == "num_batches_tracked"}
    shared = {name: tensors[alias] for alias, name in aliases.items() if alias in tensors}
    return {**counts, **shared, **tensors}
