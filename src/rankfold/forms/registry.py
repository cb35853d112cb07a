"""The forms, by the names that ``rankfold.json`` writes.

A form is one object: what makes a layer of a form also says what it costs and rebuilds it empty to
be loaded. A further form needs ``register_form`` and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from rankfold.forms.blocks.form import BLOCKS
from rankfold.forms.conv.form import CONV
from rankfold.forms.curve import Choice, Curve
from rankfold.forms.layer import FactorizedLayer
from rankfold.forms.low_rank.form import LOW_RANK
from rankfold.forms.problem import Calls, LayerProblem, Size
from rankfold.forms.storage import STORAGES, Storage
from rankfold.model.layer_matrix import MatrixLayer


class LayerFactors(Protocol):
    """The factors of one choice of a layer."""

    def dense(self, layer: MatrixLayer) -> Tensor:
        """The matrix that they make, ``(out, in)``, in the layer's type and place."""
        ...

    def module(self, layer: MatrixLayer) -> FactorizedLayer:
        """The module that takes the layer's place: its type, place, bias and flags kept."""
        ...


class Form(Protocol):
    """A way to write one layer's matrix.

    Attributes:
        names: What ``rankfold.json`` calls it; several where it has variants.
        storages: Those that it has.
        setting: The field of ``Settings`` that leaves it out, None where none does.
    """

    names: tuple[str, ...]
    storages: tuple[Storage, ...]
    setting: str | None

    def fits(self, layer: nn.Module) -> bool:
        """Whether a layer may take it at all."""
        ...

    def curve(self, problem: LayerProblem) -> tuple[Curve, Any]:
        """The choices that it offers, and what ``factors`` needs of it again."""
        ...

    def kept(self, state: Any, keep: Callable[[Tensor], Tensor]) -> Any:
        """That state with what ``keep`` makes of its large tensors."""
        ...

    def factors(
        self, problem: LayerProblem, choice: Choice, state: Any, keep: Callable[[Tensor], Tensor]
    ) -> LayerFactors:
        """The factors of a choice; what ``keep`` makes of them where those of all layers stay."""
        ...

    def size(
        self, layer: MatrixLayer, name: str, ranks: Sequence[int], storage: Storage, calls: Calls
    ) -> Size:
        """Parameters and FLOPs at these ranks."""
        ...

    def empty(
        self, layer: MatrixLayer, name: str, ranks: Sequence[int], pivoted: bool
    ) -> FactorizedLayer:
        """A module of the right shapes to load saved tensors into.

        Raises:
            ValueError: The layer has no such ranks, or not this form.
        """
        ...


_BY_NAME: dict[str, Form] = {}


def register_form(form: Form) -> None:
    """Let layers take a further form.

    Raises:
        ValueError: One of its names is another form's.
    """
    taken = [name for name in form.names if name in _BY_NAME]
    if taken:
        raise ValueError(f"a form {taken[0]!r} is registered already")
    _BY_NAME.update(dict.fromkeys(form.names, form))


def unregister_form(form: Form) -> None:
    """Take a form back, for tests."""
    for name in form.names:
        del _BY_NAME[name]


def form_named(name: str) -> Form:
    """The form that a name of ``rankfold.json`` means.

    Raises:
        KeyError: There is none.
    """
    return _BY_NAME[name]


def form_names() -> tuple[str, ...]:
    """All names."""
    return tuple(_BY_NAME)


def other_forms() -> tuple[Form, ...]:
    """All forms but plain low rank, which every layer has."""
    return tuple(dict.fromkeys(form for form in _BY_NAME.values() if form is not LOW_RANK))


class Named(NamedTuple):
    """A choice's form, and the name that it is written by.

    Attributes:
        form: The form.
        name: One of its names.
    """

    form: Form
    name: str


def form_of(choice: Choice, storage: Storage) -> Named:
    """The form of a choice of a rank; a choice that leaves it open is plain low rank.

    Args:
        choice: Of a layer.
        storage: Of the plan; low rank is written by its name.
    """
    name = choice.form
    if name is None or name in STORAGES:
        name = storage
    return Named(form_named(name), name)


for _form in (LOW_RANK, BLOCKS, CONV):
    register_form(_form)
