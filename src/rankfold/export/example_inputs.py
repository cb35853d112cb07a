"""What a model is called with while it is traced, and other inputs like it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from rankfold.data.example import describe
from rankfold.errors import InputError, check_kind
from rankfold.integrations.transformers import is_transformers_model

# A batch of inputs, by name where there are several; or the shape of one input, batch left out.
Given: TypeAlias = Tensor | Mapping[str, Tensor] | Sequence[int]

BATCH = 2
LENGTH, DECODER_LENGTH = 8, 6  # tokens; they differ, so that the traced axes are told apart
MASK = "attention_mask"
PADDING = 2
HOW = (
    "Give inputs=, which is a batch (a tensor, or a mapping of the model's inputs by name) or the "
    "shape of one example (3x224x224 of an image, the number of tokens of a text)"
)


@dataclass(frozen=True)
class ExampleInputs:
    """One batch of inputs.

    Attributes:
        tensors: ``(batch, ...)`` by the name of the parameter of ``forward``.
        by_name: Whether the model is called with names; else with the one tensor.
        lengths: Names of the axis of tokens, axis 1, of the inputs that have one.
        given: Whether the user gave them, so that their length is one that they want.
    """

    tensors: Mapping[str, Tensor]
    by_name: bool
    lengths: Mapping[str, str]
    given: bool

    @property
    def args(self) -> tuple[Tensor, ...]:
        """Positional arguments of the call."""
        return () if self.by_name else tuple(self.tensors.values())

    @property
    def kwargs(self) -> dict[str, Tensor]:
        """Named arguments of the call."""
        return dict(self.tensors) if self.by_name else {}

    def drawn_again(self, batch: int, longer: int, seed: int) -> ExampleInputs:
        """Inputs of values that are drawn from those here.

        Args:
            batch: Their number.
            longer: Tokens more than here.
            seed: Decides the values.
        """
        generator = torch.Generator().manual_seed(seed)
        drawn = {}
        for name, tensor in self.tensors.items():
            shape = [batch, *tensor.shape[1:]]
            if name in self.lengths:
                shape[1] += longer
            if name == MASK:
                drawn[name] = _padding_mask(*shape)
                continue
            places = torch.randint(tensor.numel(), shape, generator=generator)
            drawn[name] = tensor.flatten()[places]
        return replace(self, tensors=drawn)


def example_inputs(model: nn.Module, given: Given | None) -> ExampleInputs:
    """Inputs for a model, floating ones in its dtype.

    Args:
        model: A transformers model is asked what it takes.
        given: By the user, or None.

    Raises:
        InputError: Nothing is known of the inputs, or what is given is none.
    """
    if torch.is_tensor(given) or isinstance(given, Mapping):
        found = _of_batch(model, given)
    elif is_transformers_model(model):
        found = _of_transformers(model, _shape(given))
    elif given is None:
        raise InputError(
            f"nothing is known of the inputs of {type(model).__name__}, a class of your own. {HOW}."
        )
    else:
        found = _of_batch(model, torch.randn(BATCH, *_shape(given) or (), generator=_seeded()))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    cast_ = {n: t.to(dtype) if t.is_floating_point() else t for n, t in found.tensors.items()}
    return replace(found, tensors=cast_, given=given is not None)


def _of_batch(model: nn.Module, batch: Tensor | Mapping[str, Tensor]) -> ExampleInputs:
    named = isinstance(batch, Mapping)
    tensors: dict[str, Any] = dict(batch) if named else {_first_parameter(model): batch}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.numel() == 0 or tensor.dim() == 0:
            raise InputError(
                f"the input {name} is {describe(tensor)}; expected a tensor whose first axis is "
                "the batch."
            )
    # Integers along two axes are taken for tokens.
    lengths = {
        name: "sequence"
        for name, tensor in tensors.items()
        if tensor.dim() == 2 and not tensor.is_floating_point()
    }
    return ExampleInputs(tensors, named, lengths, given=True)


def _first_parameter(model: nn.Module) -> str:
    name = next(iter(inspect.signature(model.forward).parameters.values()), None)
    if name is None or name.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        raise InputError(
            f"forward of {type(model).__name__} has no named parameter for its input; expected "
            "forward(self, images), say."
        )
    return name.name


def _of_transformers(model: nn.Module, shape: tuple[int, ...] | None) -> ExampleInputs:
    held = cast("Any", model)
    main = str(held.main_input_name)
    taken = inspect.signature(model.forward).parameters
    tensors: dict[str, Tensor] = {}
    lengths: dict[str, str] = {}

    def tokens(name: str, axis: str, length: int) -> None:
        words = int(held.config.get_text_config().vocab_size)
        tensors[name] = torch.randint(words, (BATCH, length), generator=_seeded())
        lengths[name] = axis

    if main == "input_ids":
        if shape is not None and len(shape) != 1:
            raise InputError(
                f"the input shape of {type(model).__name__} is {'x'.join(map(str, shape))}; "
                "expected the number of tokens."
            )
        tokens(main, "sequence", LENGTH if shape is None else shape[0])
        if MASK in taken:
            tensors[MASK] = _padding_mask(*tensors[main].shape)
            lengths[MASK] = lengths[main]
    else:
        shape = shape or _image_shape(held.config if main == "pixel_values" else None)
        if shape is None:
            raise InputError(
                f"the configuration of {type(model).__name__} doesn't say how large its input "
                f"{main} is. {HOW}."
            )
        tensors[main] = torch.randn(BATCH, *shape, generator=_seeded())
    if getattr(held.config, "is_encoder_decoder", False):
        tokens("decoder_input_ids", "decoder_sequence", DECODER_LENGTH)
    return ExampleInputs(tensors, True, lengths, given=False)


def _image_shape(config: Any) -> tuple[int, ...] | None:
    size, channels = (getattr(config, name, None) for name in ("image_size", "num_channels"))
    if not isinstance(channels, int) or size is None:
        return None
    sides = (size, size) if isinstance(size, int) else tuple(size)
    return (channels, *sides)


def _shape(given: Sequence[int] | None) -> tuple[int, ...] | None:
    if given is None:
        return None
    check_kind("inputs", given, (tuple, list), "a batch or a shape. " + HOW)
    shape = tuple(given)
    sides = cast("tuple[object, ...]", shape)
    if not shape or not all(isinstance(side, Integral) and int(side) > 0 for side in sides):
        raise InputError(f"the input shape is {shape}; expected positive numbers. {HOW}.")
    return shape


def _padding_mask(batch: int, length: int) -> Tensor:
    """Ones, and zeros at the end of the last of several rows."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    if batch > 1 and length > PADDING:  # few: the window of a sliding attention reaches past them
        mask[-1, -PADDING:] = 0
    return mask


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
