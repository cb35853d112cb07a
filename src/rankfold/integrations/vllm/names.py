"""Which factorized matrices of a saved model a layer of vLLM holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rankfold.errors import InputError, listed, visible
from rankfold.integrations.vllm.products import FORMS

DENSE = "dense"
INSTEAD = (
    'Write it with all layers multiplied out, rankfold.export(folder, out, to="dense"), and open '
    "that; it has the original's size."
)


@dataclass(frozen=True)
class Matrix:
    """One matrix of a model.

    Attributes:
        name: Of its layer, as the weights are named after vLLM's renaming.
        form: As ``rankfold.json`` calls it, or ``dense``.
        ranks: None where it is dense.
        uses: Of an embedding matrix, the modules that hold it.
    """

    name: str
    form: str = DENSE
    ranks: tuple[int, ...] = ()
    uses: tuple[str, ...] = ()


class Layout:
    """The factorized matrices of a model by name, and which of them a layer has asked for.

    Args:
        structure: As ``config.json`` holds it, checked.

    Raises:
        InputError: It has what no layer of vLLM can hold.
    """

    def __init__(self, structure: Mapping[str, Any]) -> None:
        _refuse_others(structure)
        matrices = [
            Matrix(
                entry["name"],
                entry["form"],
                tuple(r for r in (entry["rank"], entry.get("second_rank")) if r is not None),
                tuple(entry.get("uses") or ()),
            )
            for entry in structure["layers"]
            if entry["rank"] is not None
        ]
        self._layers = {matrix.name: matrix for matrix in matrices if not matrix.uses}
        self._embeddings = {use: matrix for matrix in matrices for use in matrix.uses}
        self._asked: set[str] = set()

    def rename(self, renamed: Callable[[str], str | None]) -> None:
        """Call the modules as a model of vLLM does; those that it leaves out are left out."""
        self._layers = {
            new: replace(matrix, name=new)
            for name, matrix in self._layers.items()
            if (new := renamed(name)) is not None
        }
        self._embeddings = {
            new: replace(matrix, name=new)
            for use, matrix in self._embeddings.items()
            if (new := renamed(use)) is not None
        }

    def of_layer(self, name: str, fused: Mapping[str, Sequence[str]]) -> list[Matrix]:
        """The matrices of a linear layer in their order, those that are dense too.

        Args:
            name: Of vLLM's layer.
            fused: For the last part of a name, the last parts of those it stands for.

        Returns:
            Empty where all of them are dense.
        """
        parent, _, last = name.rpartition(".")
        names = [f"{parent}.{part}".removeprefix(".") for part in fused.get(last, [last])]
        found = [self._layers.get(part, Matrix(part)) for part in names]
        self._asked.update(names)
        return found if any(matrix.form != DENSE for matrix in found) else []

    def of_embedding(self, name: str) -> Matrix | None:
        """The factorized embedding matrix that a lookup or a head uses.

        Args:
            name: Empty where vLLM doesn't say it, of a lookup.

        Raises:
            InputError: It doesn't, and there are several.
        """
        if not name:
            lookups = [n for n in self._embeddings if not n.endswith("head")]
            if len(lookups) > 1:
                raise no_place(lookups, "vLLM doesn't say which of its lookups is which")
            name = next(iter(lookups), "")
        self._asked.add(name)
        return self._embeddings.get(name)

    def below(self, name: str) -> list[str]:
        """The factorized layers that are parts of a module."""
        return [layer for layer in self._layers if layer.startswith(f"{name}.")]

    def check_asked(self) -> None:
        """Refuse where factorized layers have no place in vLLM's model.

        Raises:
            InputError: They are named.
        """
        names = {*self._layers, *self._embeddings} - self._asked
        if names:
            raise no_place(sorted(names), "vLLM's model has no layer of this name")


def no_place(names: Sequence[str], why: str) -> InputError:
    """The error for layers that vLLM can't hold."""
    shown = listed([visible(name) for name in names])
    return InputError(f"vLLM can't open these factorized layers: {why}.\n  {shown}\n{INSTEAD}")


def _refuse_others(structure: Mapping[str, Any]) -> None:
    """Refuse forms and modules of which vLLM's layers know nothing.

    Raises:
        InputError: They are named.
    """
    unpacked, hooks = structure["unpacked"], structure["model"].get("hooks", [])
    if unpacked:
        raise no_place(
            unpacked, "they are packed experts or Conv1D, which vLLM computes in kernels of its own"
        )
    if hooks:
        raise no_place(hooks, "they compute with hooks, which no file holds")
    others = {e["name"]: e["form"] for e in structure["layers"] if e.get("form") not in FORMS}
    others = {n: f for n, f in others.items() if f is not None}
    if others:
        forms = ", ".join(sorted({visible(form) for form in others.values()}))
        raise no_place([*others], f"of the forms {forms}, it has none for them")
