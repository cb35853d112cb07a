"""How fast the original and the result are on this machine, beside each other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from rankfold.data.parts import Batch, Part
from rankfold.errors import InputError
from rankfold.export.pairs import to_pairs
from rankfold.forms.storage import Storage
from rankfold.machine.device import device_of
from rankfold.machine.timing import timed_beside
from rankfold.model.evaluation_mode import evaluation_mode
from rankfold.tasks.evaluation import on_device
from rankfold.tasks.losses import Task, output_of, without_labels
from rankfold.tasks.supervised import UserLoss

BATCHES = (1, 8)
SECONDS = 20.0  # that all of it takes at most
_SHARE = {1: 0.25, 8: 0.45}  # of these seconds for original and result; the rest is for pairs
SLOWER = 1.05  # times the original's, from which on a result is called slower

Latency = dict[str, Any]


def measured_latency(
    original: nn.Module, factorized: nn.Module, task: Task, part: Part, storage: Storage
) -> Latency:
    """Time one call of both models with 1 and 8 examples; plain values, which differ by the run.

    Where the result is slower and its factors are pivoted, the same layers as pairs are timed too.
    torch's fast path of its transformer layers is off, as in all of a run.

    Args:
        original: The user's model.
        factorized: What a run made of it.
        task: Says how a model is called.
        part: Its examples are what the models are called with: no held-out ones.
        storage: Of the factors.
    """
    found: Latency = {
        "device": device_of(factorized),
        "threads": torch.get_num_threads(),
        "what": "the loss function" if isinstance(task, UserLoss) else "the model",
        "rows": [],
        "missing": None,
        "pairs": None,
    }
    models = {"original": original, "factorized": factorized}
    try:
        found["rows"] = _rows(models, task, part, _SHARE, found)
        if storage == "pivoted" and is_slower(found):
            pairs = to_pairs(copy.deepcopy(factorized))
            again = {"original": original, "factorized": pairs}
            share = dict.fromkeys(_SHARE, (1 - sum(_SHARE.values())) / len(_SHARE))
            found["pairs"] = _rows(again, task, part, share, dict(found))
    except InputError as error:
        found["missing"] = str(error)
    except Exception as error:  # the result stands, whatever a model does with one example
        found["missing"] = f"{type(error).__name__}: {error}"
    return found


def is_slower(latency: Mapping[str, Any]) -> bool:
    """Whether the result is slower at one of the batches, by more than the rounds differ."""
    return any(_is_slower(row) for row in latency["rows"])


def speed_sentence(latency: Mapping[str, Any]) -> str:
    """Whether the result is slower, faster or neither, for a person."""
    rows = latency["rows"]
    if not rows:
        return f"The speed was not measured: {latency['missing']}"
    slower = [row for row in rows if _is_slower(row)]
    if not slower:
        faster = [r for r in rows if r["ratio"] < 1 / SLOWER and r["ratio_quartiles"][1] < 1]
        told = f"Faster than the original: it takes {_listed(faster)}."
        return told if faster else _AS_FAST
    told = f"Slower than the original: it takes {_listed(slower)}."
    pairs = latency["pairs"]
    if pairs is None:
        return told
    again = f'The same layers stored with form="pair" take {_listed(pairs)}'
    if len(pairs) == len(rows) and all(row["ratio"] <= SLOWER for row in pairs):
        return f"{told} {again}: not slower."
    return f"{told} {again}." if pairs else told


_AS_FAST = "As fast as the original, as far as these rounds can tell."


def _listed(rows: Sequence[Mapping[str, Any]]) -> str:
    return " and ".join(f"{row['ratio']:.2f} x its time at batch {row['batch']}" for row in rows)


def _is_slower(row: Mapping[str, Any]) -> bool:
    return bool(row["ratio"] > SLOWER and row["ratio_quartiles"][0] > 1)


def _rows(
    models: Mapping[str, nn.Module],
    task: Task,
    part: Part,
    shares: Mapping[int, float],
    found: Latency,
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for size in BATCHES:
        examples = _alike(part, size)
        if len(examples) < size:
            found["missing"] = f"there are no {size} examples of one shape to call the models with"
            break
        batch = part.collate(examples)
        calls = [_call(model, task, on_device(batch, model)) for model in models.values()]
        seconds = SECONDS * shares[size]
        if rows and (rows[-1]["original"] + rows[-1]["factorized"]) * size / 1000 > seconds:
            found["missing"] = f"at batch {size} a call takes too long for {SECONDS:g} s in all"
            break
        with evaluation_mode(models["original"]), evaluation_mode(models["factorized"]):
            times = timed_beside(calls, seconds)
        if not times[0]:
            found["missing"] = f"at batch {size} a call takes too long for {SECONDS:g} s in all"
            break
        rows.append(_row(size, *times))
    return rows


def _alike(part: Part, size: int) -> list[Any]:
    """So many examples that make one batch."""
    return max(part.take(range(min(256, len(part.examples)))).batches(size), key=len)


def _call(model: nn.Module, task: Task, batch: Batch) -> Callable[[], object]:
    if isinstance(task, UserLoss):  # only it knows how the model is called
        return lambda: task.batch_loss(model, batch)
    inputs = without_labels(batch)
    return lambda: output_of(model, inputs)


def _row(batch: int, original: Sequence[float], factorized: Sequence[float]) -> dict[str, Any]:
    """Milliseconds, and how many times the original's time the result takes: of each round.

    What else the machine does differs between rounds more than within one.
    """
    rounds = [after / before for before, after in zip(original, factorized, strict=True)]
    found: dict[str, Any] = {"batch": batch, "rounds": len(rounds)}
    for name, values in {
        "original": [1000 * one for one in original],
        "factorized": [1000 * one for one in factorized],
        "ratio": rounds,
    }.items():
        lower, found[name], upper = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
        found[f"{name}_quartiles"] = [lower, upper]
    return found
