"""What vLLM runs in place of a layer's one product. Imported only where vLLM is.

Each matrix is cut to what this process holds when the last of its tensors arrives, so that no
process keeps what others compute with. Products are those of vLLM's own unquantized layers, packed
as they are on each platform.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from rankfold.errors import InputError, visible
from rankfold.integrations.vllm.names import Matrix, no_place
from rankfold.integrations.vllm.products import FORMS, Products, scores, shapes

Loader = Callable[..., None]


class Gemm(nn.Module):
    """One product, as vLLM computes that of an unquantized layer on this platform."""

    def __init__(self, weight: Tensor, method: UnquantizedLinearMethod) -> None:
        super().__init__()
        self.method = method
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        method.process_weights_after_loading(self)

    def forward(self, rows: Tensor) -> Tensor:
        """Map ``(rows, in)`` to ``(rows, out)``."""
        outputs: Tensor = self.method.apply(self, rows)
        return outputs


class FactorizedLinear(LinearMethodBase):  # type: ignore[misc, unused-ignore]
    """A linear layer of vLLM, some or all of whose matrices are factorized.

    Args:
        matrices: In the order of the layer's outputs, those that are dense too.
    """

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        self.matrices = matrices
        self.held: list[dict[str, Tensor]] = [{} for _ in matrices]
        self.parts: dict[int, Any] = {}
        self.method = UnquantizedLinearMethod()

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Register a place for each tensor that the weights may name."""
        self.dtype = params_dtype
        shares = _shares(layer, output_partition_sizes, len(self.matrices))
        if shares is None:
            names = [matrix.name for matrix in self.matrices]
            raise no_place(names, f"its {type(layer).__name__} joins them in another way")
        self.shares = shares
        here = input_size_per_partition
        first = layer.tp_rank * here
        self.columns = None if here == input_size else slice(first, first + here)
        self.wanted = [
            shapes(matrix.form, matrix.ranks, full, input_size)
            for matrix, (full, _) in zip(self.matrices, self.shares, strict=True)
        ]
        for name in {name for wanted in self.wanted for name in wanted}:
            dtype = torch.int32 if name == "order" else params_dtype
            place = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            place.weight_loader = self._loader(layer, name)  # type: ignore[attr-defined]
            layer.register_parameter(name, place)

    def _loader(self, layer: nn.Module, name: str) -> Loader:
        def load(param: nn.Parameter, loaded: Tensor, shard: object = None) -> None:
            number = _number(shard)
            if number is None or number >= len(self.matrices):
                names = [matrix.name for matrix in self.matrices]
                raise no_place(names, f"vLLM loads the part {shard!r} of {len(names)} of them")
            matrix, wanted = self.matrices[number], self.wanted[number]
            found = tuple(loaded.shape)
            if wanted.get(name) != found:
                raise InputError(
                    f"{visible(matrix.name)}.{name} has the shape {found} in the weights; "
                    f"expected {wanted.get(name, 'no such tensor')}, by its form {matrix.form} and "
                    "its ranks. The folder is damaged or of another model."
                )
            dtype = torch.int64 if name == "order" else self.dtype
            held = self.held[number]
            held[name] = loaded.detach().to(dtype, copy=True)
            if held.keys() == wanted.keys():
                tensors = {key: held[key].to(param.device) for key in wanted}
                made = FORMS[matrix.form][1](**tensors)
                self.parts[number] = made.of(self.shares[number][1], self.columns)
                held.clear()

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        """Stack first factors and pack all for this platform.

        Raises:
            InputError: Tensors are missing.
        """
        missing = [
            f"{visible(matrix.name)}.{name}"
            for number, matrix in enumerate(self.matrices)
            for name in self.wanted[number]
            if number not in self.parts and name not in self.held[number]
        ]
        _refuse_missing(missing)
        parts = [self.parts.pop(number) for number in range(len(self.matrices))]
        for name in {name for wanted in self.wanted for name in wanted}:
            delattr(layer, name)
        layer.factorized = Products(parts, lambda weight: Gemm(weight, self.method))
        # What asks a layer for its type and device finds them, as of other packed layers.
        device = next(iter(parts)).order.device
        empty = torch.empty(0, dtype=self.dtype, device=device)
        layer.weight = nn.Parameter(empty, requires_grad=False)
        if isinstance(layer, ParallelLMHead):
            # Words that fill up the last process' share: all shares are joined.
            whole = layer.num_embeddings_per_partition if layer.tp_size > 1 else 0
            self.lacks = max(0, whole - _outputs(self.shares))

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        if isinstance(layer, ParallelLMHead) and self.lacks:
            padded: Tensor = functional.pad(layer.factorized(x), (0, self.lacks))
            return padded if bias is None else padded + bias
        outputs: Tensor = layer.factorized(x, bias)
        return outputs


Shares = list[tuple[int, Tensor | None]]


def _shares(layer: Any, here: Sequence[int], matrices: int) -> Shares | None:
    """For each matrix, its outputs in the whole model and which of them are computed here.

    Returns:
        None where the layer has another number of matrices.
    """
    if isinstance(layer, ParallelLMHead):
        held = layer.shard_indices
        rows = torch.arange(held.org_vocab_start_index, held.org_vocab_end_index, device="cpu")
        whole = len(rows) == layer.org_vocab_size
        return [(layer.org_vocab_size, None if whole else rows)]
    if isinstance(layer, QKVParallelLinear):
        kv = layer.total_num_kv_heads
        full = [
            layer.total_num_heads * layer.head_size, kv * layer.head_size, kv * layer.v_head_size
        ]  # fmt: skip
    else:
        full = list(getattr(layer, "output_sizes", [layer.output_size]))
    if len(full) != len(here) or matrices not in (1, len(full)):
        return None
    ranges: list[range] = []
    for whole, part in zip(full, here, strict=True):
        # Processes that hold the same outputs: heads of keys and values may be fewer than they are.
        copies = part * layer.tp_size // whole
        start = layer.tp_rank // copies * part if copies else 0
        ranges.append(range(start, start + part))
    if matrices == len(full):
        return [
            (whole, None if len(own) == whole else torch.tensor(own, device="cpu"))
            for whole, own in zip(full, ranges, strict=True)
        ]
    begins = [sum(full[:number]) for number in range(len(full))]
    here_of_all = [begin + row for begin, own in zip(begins, ranges, strict=True) for row in own]
    all_here = len(here_of_all) == sum(full)
    return [(sum(full), None if all_here else torch.tensor(here_of_all, device="cpu"))]


def _outputs(shares: Shares) -> int:
    return sum(full if rows is None else len(rows) for full, rows in shares)


def _refuse_missing(names: Sequence[str]) -> None:
    if names:
        raise InputError(f"the weights lack {', '.join(names)}. The folder is damaged.")


def _number(shard: object) -> int | None:
    """The place of a matrix in its layer, by what vLLM calls it; None for any other name."""
    names = {None: 0, "q": 0, "k": 1, "v": 2}
    if isinstance(shard, int) and not isinstance(shard, bool):
        return shard
    return names.get(shard) if shard is None or isinstance(shard, str) else None


class FactorizedEmbedding(QuantizeMethodBase):  # type: ignore[misc, unused-ignore]
    """A lookup, or the head that scores words, of an embedding matrix of low rank.

    Args:
        matrix: The embedding matrix.
    """

    def __init__(self, matrix: Matrix) -> None:
        self.matrix, self.method = matrix, UnquantizedLinearMethod()
        self.loaded: set[str] = set()
        self.tied = False

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Register the two factors, and the order of the columns."""
        (rank,), pivoted = self.matrix.ranks, self.matrix.form == "pivoted"
        rows = sum(output_partition_sizes)
        self.wanted = {
            "weight": (layer.org_vocab_size, rank),
            "mix": (input_size - rank if pivoted else input_size, rank),
            **({"order": (input_size,)} if pivoted else {}),
        }
        own = {"weight": (rows, rank)}
        for name, shape in self.wanted.items():
            dtype = torch.int32 if name == "order" else params_dtype
            held = nn.Parameter(torch.zeros(own.get(name, shape), dtype=dtype), requires_grad=False)
            held.weight_loader = self._loader(layer, name)  # type: ignore[attr-defined]
            if name == "weight":
                held.output_dim, held.input_dim = 0, 1  # type: ignore[attr-defined]
            layer.register_parameter(name, held)

    def _loader(self, layer: Any, name: str) -> Loader:
        def load(param: nn.Parameter, loaded: Tensor, shard: object = None) -> None:
            found = tuple(loaded.shape)
            if found != self.wanted[name]:
                raise InputError(
                    f"{visible(self.matrix.name)}.{name} has the shape {found} in the weights; "
                    f"expected {self.wanted[name]}. The folder is damaged or of another model."
                )
            layer.weight_loader(param, loaded)
            self.loaded.add(name)

        return load

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Let a head score by the factors of a lookup.

        Raises:
            InputError: The lookup's matrix isn't factorized, or in another way.
        """
        for name in self.wanted:
            shared = getattr(embed_tokens, name, None)
            if shared is None or shared.shape != getattr(layer, name).shape:
                raise no_place([self.matrix.name], "it is tied to an embedding of another form")
            setattr(layer, name, shared)
        self.tied = True
        return layer

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack the products of a head.

        Raises:
            InputError: Tensors are missing.
        """
        missing = [] if self.tied else sorted(self.wanted.keys() - self.loaded)
        _refuse_missing([f"{visible(self.matrix.name)}.{name}" for name in missing])
        order = getattr(layer, "order", None)
        if order is not None:
            layer.register_buffer("places", order.long(), persistent=False)
        if isinstance(layer, ParallelLMHead):
            part = scores(layer.weight.data, layer.mix.data, order)
            layer.factorized = Products([part], lambda weight: Gemm(weight, self.method))

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """Map integers ``(...)`` to ``(..., dim)``."""
        hidden = functional.embedding(input_.reshape(-1), layer.weight)
        outputs = functional.linear(hidden, layer.mix)
        if hasattr(layer, "places"):
            outputs = torch.cat([hidden, outputs], dim=-1).index_select(-1, layer.places)
        return outputs.view(*input_.shape, outputs.shape[-1])

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Map ``(..., dim)`` to ``(..., words)``."""
        outputs: Tensor = layer.factorized(x, bias)
        return outputs
