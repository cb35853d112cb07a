"""The sums that several processes have added up, each of its own batches, as one.

All processes end with the same sums: those of one process, but for the order in which they were
added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rankfold.machine import processes
from rankfold.maths.linalg import rows_of_same_gram
from rankfold.statistics.hooks import Recorder
from rankfold.statistics.layer_statistics import DominantRows
from rankfold.statistics.sums import Half, Sums


class _Known(NamedTuple):
    """What one process has of a layer, beside tensors that are added up."""

    leader: str | None
    rows: int
    early_rows: int | None
    dominant: DominantRows | None


def add_up(recorder: Recorder) -> None:
    """Give all processes the sums of all; nothing changes where there is one.

    Raises:
        InputError: Another process has failed or died.
    """
    if not processes.several():
        return
    mine = {name: _known(sums) for name, sums in recorder.sums.items()}
    found = processes.gathered((mine, recorder.terms), "what each layer has seen")
    of_layers = [one for one, _ in found]
    names = [*dict.fromkeys(name for one in of_layers for name in one)]
    leaders = {name: _leader(name, of_layers) for name in names}
    for name, sums in recorder.sums.items():
        if sums.leader is not None and leaders[name] is None:
            _part(sums, recorder.sums[sums.leader])
    recorder.sums = {
        name: recorder.sums.get(name) or _nothing(recorder, name, leaders[name]) for name in names
    }
    for name, sums in recorder.sums.items():
        seen = [one[name] for one in of_layers if name in one]
        _add_layer(name, sums, seen)
    recorder.terms = {half: sum(terms[half] for _, terms in found) for half in recorder.terms}
    recorder.embeddings.add_up()


def leave_to_first(recorder: Recorder) -> None:
    """The first process goes on from what was added up, the others from nothing."""
    if processes.rank() == 0:
        return
    for sums in recorder.sums.values():
        for tensor in (sums.input_gram, sums.output_gram, sums.product, *sums.gradients):
            tensor.zero_()
        sums.rows, sums.dominant = 0, None
    recorder.terms = dict.fromkeys(recorder.terms, 0.0)
    for tensor in recorder.embeddings.tensors().values():
        tensor.zero_()


def _known(sums: Sums) -> _Known:
    early = None if sums.first_half is None else sums.first_half.rows
    return _Known(sums.leader, sums.rows, early, sums.dominant)


def _leader(name: str, of_layers: Sequence[Mapping[str, _Known]]) -> str | None:
    """Whose input Gram a layer uses in all processes that have seen either; None for its own."""
    leaders = {one[name].leader for one in of_layers if name in one}
    leader = leaders.pop()
    if leaders or leader is None:
        return None
    apart = any((name in one) != (leader in one) for one in of_layers)
    return None if apart else leader


def _part(sums: Sums, leader: Sums) -> None:
    """Stop sharing: go on from what the leader has seen."""
    sums.input_gram, sums.leader = leader.input_gram.clone(), None
    if sums.first_half is not None and leader.first_half is not None:
        early = leader.first_half.input_diagonal
        sums.first_half = sums.first_half._replace(input_diagonal=early)


def _nothing(recorder: Recorder, name: str, leader: str | None) -> Sums:
    """Of a layer that no batch of this process has reached."""
    return recorder.empty(name, leader, recorder.layers[name].weight.device)


def _add_layer(name: str, sums: Sums, seen: Sequence[_Known]) -> None:
    """Add up one layer's sums, of which the processes that have any know what ``seen`` says."""
    tensors = [sums.output_gram, sums.product, *sums.gradients]
    tensors += [] if sums.leader is not None else [sums.input_gram]
    early = [one.early_rows for one in seen if one.early_rows is not None]
    if early:
        half = sums.first_half or _no_half(sums)
        inputs, outputs, product = (diagonal.clone() for diagonal in half[:3])
        half = Half(inputs, outputs, product, sum(early))
        sums.first_half = half
        tensors += half[:3]
    processes.add_up(tensors, f"sums of {name}")
    sums.rows = sum(one.rows for one in seen)
    dominant = [one.dominant for one in seen if one.dominant is not None]
    if dominant:
        rows = torch.cat([one.inputs for one in dominant])
        squares = torch.stack([one.output_squares for one in dominant]).sum(0)
        sums.dominant = DominantRows(rows_of_same_gram(rows), squares)


def _no_half(sums: Sums) -> Half:
    def zeros(gram: Tensor) -> Tensor:
        return gram.new_zeros(len(gram))

    return Half(zeros(sums.input_gram), zeros(sums.output_gram), zeros(sums.product), 0)
