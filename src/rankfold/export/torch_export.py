"""A model traced to one program of ``torch.export``, and the ``.pt2`` file that holds it.

The batch is of any size. Sequences of tokens are of any length where the model's code allows it.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor, nn

from rankfold.data.example import describe
from rankfold.errors import InputError
from rankfold.export.example_inputs import HOW, ExampleInputs
from rankfold.integrations.transformers import is_transformers_model
from rankfold.model.evaluation_mode import evaluation_mode
from rankfold.model.replace import put_modules
from rankfold.model.unpacked_modules import EveryExpert, UnpackedExperts


@dataclass(frozen=True)
class Traced:
    """A traced model.

    Attributes:
        program: Returns a tensor, or a dictionary or tuple of tensors.
        inputs: What it was traced with.
        axes: Names of the axes of any length by input: ``{"input_ids": {0: "batch", 1: ...}}``.
    """

    program: torch.export.ExportedProgram
    inputs: ExampleInputs
    axes: Mapping[str, Mapping[int, str]]


def trace(model: nn.Module, inputs: ExampleInputs, *, plain: bool = False) -> Traced:
    """Trace a model.

    Args:
        model: It is prepared for that: a transformers model keeps no cache any more, experts are
            computed for every token.
        inputs: A batch of two or more.
        plain: Let a transformers model compute attention and experts by plain products, of which
            every exporter knows how to write them.

    Raises:
        InputError: Its code can't be traced, or fixes an axis that must be of any length.
    """
    dim: Any = torch.export.Dim
    if not hasattr(dim, "DYNAMIC"):
        raise InputError(
            f"torch {torch.__version__} can't trace axes of any length; install torch 2.6 or newer."
        )
    _prepare(model, plain)
    any_length = dim.DYNAMIC
    if_possible = dim.AUTO if inputs.given else any_length
    dynamic = {
        name: {0: any_length} | ({1: if_possible} if name in inputs.lengths else {})
        for name in inputs.tensors
    }
    hook = model.register_forward_hook(lambda module, args, output: plain_outputs(output))
    try:
        with evaluation_mode(model), _quiet():
            program = torch.export.export(
                model, inputs.args, inputs.kwargs, dynamic_shapes=dynamic, strict=False
            )
    except InputError:
        raise
    except Exception as error:  # the model's own code runs there
        raise InputError(
            f"{type(model).__name__} can't be traced for a batch of any size"
            + (" and sequences of any length" if inputs.lengths else "")
            + f": {_first_line(error)}. A model that fixes the length is traced at the one that "
            "inputs= gives."
        ) from error
    finally:
        hook.remove()
    _drop_paths(program)
    return Traced(program, inputs, _dynamic_axes(program, inputs))


def run(model: nn.Module, inputs: ExampleInputs) -> Any:
    """What a model computes, as ``plain_outputs``.

    Raises:
        InputError: It can't run on these inputs, or returns no tensor.
    """
    try:
        with evaluation_mode(model):
            output = model(*inputs.args, **inputs.kwargs)
    except Exception as error:  # the model's own code runs there
        raise InputError(
            f"{type(model).__name__} can't run on the inputs {describe(dict(inputs.tensors))}: "
            f"{_first_line(error)}. {HOW}."
        ) from error
    return plain_outputs(output)


def plain_outputs(output: Any) -> Any:
    """What of a model's output a program returns: its tensors, under their names if it has some.

    Raises:
        InputError: There is no tensor in it.
    """
    if torch.is_tensor(output):
        return output
    found: Any = None
    if isinstance(output, Mapping):
        found = {str(name): value for name, value in output.items() if torch.is_tensor(value)}
    elif isinstance(output, tuple | list):
        found = tuple(value for value in output if torch.is_tensor(value))
    if not found:
        raise InputError(
            f"the model returned {type(output).__name__}; expected a tensor, or a mapping or tuple "
            "of tensors."
        )
    return found


def output_names(output: Any) -> tuple[str, ...]:
    """Names of the tensors of ``plain_outputs``, in order."""
    if torch.is_tensor(output):
        return ("output",)
    if isinstance(output, Mapping):
        return tuple(output)
    return tuple(f"output_{number}" for number in range(len(output)))


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors of ``plain_outputs``, in order."""
    if torch.is_tensor(output):
        return [output]
    return list(output.values() if isinstance(output, Mapping) else output)


def largest_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference of two lists of outputs, each as a share of its largest value."""
    shares = [0.0]
    for one, other in zip(found, expected, strict=True):
        difference = float((one.double() - other.double()).abs().max())
        largest = float(other.double().abs().max())
        shares.append(difference / largest if largest else difference)
    return math.nan if any(map(math.isnan, shares)) else max(shares)


def write_pt2(traced: Traced, file: Path) -> None:
    """Write the program; ``torch.export.load(file).module()`` opens it.

    Raises:
        OSError: The disk is full, or the like.
    """
    with file.open("wb") as opened, _quiet():
        noting = _NotingFile(opened)
        try:
            torch.export.save(traced.program, cast("Any", noting))
        except Exception:
            if noting.error is None:
                raise
        if noting.error is not None:
            raise noting.error


class _NotingFile(io.RawIOBase):
    """A file for torch's writer, in C++, which ends the process where a write raises an error.

    Attributes:
        error: The first one; what is written after it is dropped.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self._file = file
        self.error: OSError | None = None

    def writable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """As a file does."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """As a file does."""
        return self._file.tell()

    def write(self, content: Any) -> int:
        """Write, or note why not."""
        if self.error is None:
            try:
                self._file.write(content)
                self._file.flush()
            except OSError as error:
                self.error = error
        return len(memoryview(content).cast("B"))


def run_pt2(file: Path, batches: Sequence[ExampleInputs]) -> list[list[Tensor]]:
    """What a written program computes of each batch."""
    with _quiet(), torch.no_grad():
        module = torch.export.load(file).module()
        return [tensors_of(module(*batch.args, **batch.kwargs)) for batch in batches]


def _prepare(model: nn.Module, plain: bool) -> None:
    put_modules(
        model,
        {n: EveryExpert(m) for n, m in model.named_modules() if isinstance(m, UnpackedExperts)},
    )
    if not is_transformers_model(model):
        return
    held = cast("Any", model)
    held.config.get_text_config().use_cache = False
    held.config.use_cache = False
    if plain:
        held.set_attn_implementation("eager")
        if hasattr(held, "set_experts_implementation"):
            held.set_experts_implementation("batched_mm")


def _dynamic_axes(
    program: torch.export.ExportedProgram, inputs: ExampleInputs
) -> dict[str, dict[int, str]]:
    """The axes that stayed of any length, as the traced inputs show."""
    # Here, since it brings sympy, which takes a third as long to import as torch.
    from torch.fx.experimental.symbolic_shapes import is_concrete_int

    values = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
    found = {}
    for name, traced in zip(inputs.tensors, program.graph_signature.user_inputs, strict=True):
        names = {0: "batch", 1: inputs.lengths.get(name, "")}
        shape = values[str(traced)].shape
        found[name] = {a: n for a, n in names.items() if n and not is_concrete_int(shape[a])}
    return found


def _drop_paths(program: torch.export.ExportedProgram) -> None:
    """Take out where on this machine the traced code lies: nobody else can use it."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)


def _first_line(error: Exception) -> str:
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if line.startswith("You marked")]
    return f"{type(error).__name__}: {(named or lines or [''])[0].rstrip('.')}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings about how torch's exporter is written."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
