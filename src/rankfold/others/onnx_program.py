"""An ONNX file run by onnxruntime, called as a module of torch is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankfold.errors import InputError, require, visible
from rankfold.files.digests import json_digest, stream_digest
from rankfold.files.own_files import check_own_files

_TYPES = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(bool)": np.bool_,
}
_OUTPUTS = ("logits", "sentence_embedding", "last_hidden_state")


class Outputs(dict[str, Tensor]):
    """Outputs by name; the logits as an attribute, too, as models of transformers give them."""

    def __getattr__(self, name: str) -> Tensor:
        if name != "logits" or name not in self:
            raise AttributeError(name)
        return self[name]


class OnnxProgram(nn.Module):
    """What stands in an ONNX file. It runs on the CPU, has no parameters and gives no gradient.

    A single output that has no known name counts as logits. Inputs go to the program's inputs by
    name, or by place where the batch has no names; of those that the program doesn't ask for,
    ``token_type_ids`` and ``position_ids`` alone are left out.
    """

    def __init__(self, file: Path) -> None:
        """Open ``file``.

        Raises:
            InputError: It is no ONNX file, or onnxruntime isn't installed or can't run it.
        """
        super().__init__()
        runtime = require("onnxruntime", "onnx")
        if not file.is_file():
            raise InputError(f"no such ONNX file: {file}")
        check_own_files(file.parent, [file])
        options = runtime.SessionOptions()
        options.log_severity_level = 4  # what matters is raised
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self._session = runtime.InferenceSession(
                str(file), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime has a class of error for each cause
            raise InputError(
                f"onnxruntime can't open {visible(file)}: {_short(error)} Expected an ONNX file "
                "with all that it needs beside it."
            ) from error
        self._file = file
        self._inputs = {one.name: one for one in self._session.get_inputs()}
        self._names = [one.name for one in self._session.get_outputs()]

    def digest(self) -> str:
        """SHA-256 of the file, and of the files of weights beside it that have its name."""
        beside = sorted(self._file.parent.glob(f"{self._file.name}*"))
        return json_digest({one.name: stream_digest(one) for one in beside if one.is_file()})

    def forward(self, input_ids: Any = None, *others: Any, **named: Any) -> Outputs:
        """The program's outputs by their names."""
        named.pop("use_cache", None)
        given = [one for one in (input_ids, *others) if one is not None]
        values = {**dict(zip(self._inputs, given, strict=False)), **named}
        if input_ids is not None and "input_ids" in self._inputs and not others:
            values = {**named, "input_ids": input_ids}
        fed = self._fed(values)
        try:
            outputs = self._session.run(None, fed)
        except Exception as error:
            raise InputError(
                f"onnxruntime can't run {visible(self._file)} on the data: {_short(error)} "
                "Expected examples that the program was made for."
            ) from error
        found = Outputs(
            (name, torch.from_numpy(np.array(value)))
            for name, value in zip(self._names, outputs, strict=True)
            if isinstance(value, np.ndarray) and value.dtype.kind in "fiub"
        )
        if not any(name in found for name in _OUTPUTS) and len(found) == 1:
            return Outputs(logits=next(iter(found.values())))
        return found

    def _fed(self, values: dict[str, Any]) -> dict[str, Any]:
        """Arrays for each of the program's inputs."""
        first = next((one for one in values.values() if torch.is_tensor(one)), None)
        if first is not None and "input_ids" in values:
            ids = values["input_ids"]
            if "attention_mask" in self._inputs and "attention_mask" not in values:
                values = {**values, "attention_mask": torch.ones_like(ids)}
            if "token_type_ids" in self._inputs and "token_type_ids" not in values:
                values = {**values, "token_type_ids": torch.zeros_like(ids)}
            if "position_ids" in self._inputs and "position_ids" not in values:
                places = torch.arange(ids.shape[-1]).expand_as(ids)
                values = {**values, "position_ids": places}
        left = {*values} - {*self._inputs} - {"token_type_ids", "position_ids"}
        if "attention_mask" in left and bool((values["attention_mask"] == 1).all()):
            left.discard("attention_mask")
        missing = {*self._inputs} - {*values}
        if left or missing:
            takes, has = (", ".join(map(visible, names)) for names in (self._inputs, values))
            raise InputError(
                f"the ONNX program {visible(self._file)} takes {takes}; the data give "
                f"{has or 'nothing'}. Give data with the names that it was exported with."
            )
        return {name: self._array(name, values[name]) for name in self._inputs}

    def _array(self, name: str, value: Tensor) -> Any:
        kind = _TYPES.get(self._inputs[name].type)
        if kind is None:
            raise InputError(
                f"the input {visible(name)} of {visible(self._file)} is of the type "
                f"{self._inputs[name].type}; expected one of {', '.join(_TYPES)}."
            )
        array = value.detach().cpu().numpy()
        if (array.dtype.kind == "f") != (np.dtype(kind).kind == "f"):
            raise InputError(
                f"the input {visible(name)} of {visible(self._file)} is of the type "
                f"{self._inputs[name].type}; the data give {array.dtype}. Give data of this type."
            )
        return np.ascontiguousarray(array.astype(kind, copy=False))


def _short(error: Exception) -> str:
    text = " ".join(visible(error).split())
    return text[:400].rstrip(".") + "."
