"""Latency beside the dense model's: ``run speed``.

Latency: the dense model and all others are built first and then run in turn, batch by batch, so
that whatever else the machine does meets them alike. A round's ratio is a model's time over the
dense model's in the same round; the median over rounds is reported, with its quartiles. The
peak of a forward pass is that of all tensors that PyTorch holds in it, weights and activations;
what a kernel takes for itself is not in it.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker

from benchmarks.field import open_study, sizes_of
from benchmarks.field_models import VISION
from benchmarks.int8 import in_int8
from benchmarks.methods import METHODS
from benchmarks.rows import append_row, read_rows
from rankfold.errors import InputError
from rankfold.machine.progress import TerminalProgress
from rankfold.model.evaluation_mode import evaluation_mode
from rankfold.tasks.evaluation import on_device
from rankfold.tasks.losses import output_of, without_labels

BATCHES = (1, 8, 32)
ROUNDS = 15
TOKENS = 64  # of a language model's windows
# Stored in a way that no kernel here computes with: as fast as the dense model, or slower. torchao
# has one for int8 weights of Linear layers.
SIMULATED = ("int8", "joint-int8", "joint-pair-int8", "magnitude", "wanda", "control")


@dataclass(frozen=True)
class SpeedRow:
    """Latency of one model at one batch size.

    Attributes:
        ratio: Median over rounds of its time over the dense model's.
        low: First quartile of the ratios.
        high: Third quartile.
        milliseconds: Median of its time for a batch.
        dense_milliseconds: Median of the dense model's.
        memory: Peak of weights and activations in a forward pass over the dense model's.
        weights: Of the weights alone.
        device: Where they ran.
        dtype: Of weights and activations.
    """

    model: str
    seed: int
    method: str
    size: float | None
    batch: int
    ratio: float
    low: float
    high: float
    milliseconds: float
    dense_milliseconds: float
    threads: int
    memory: float | None = None
    weights: float | None = None
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def what(self) -> tuple[str, float | None, str, str]:
        """Model, size, method, and where it ran."""
        return (self.model, self.size, self.method, f"{self.device}, {self.dtype}")

    @property
    def key(self) -> tuple[object, ...]:
        measured = (self.model, self.seed, self.method, self.size, self.batch)
        return (*measured, self.device, self.dtype)


def sibling(results: Path, axis: str) -> Path:
    """The file of another axis beside that of the quality."""
    return results.with_name(f"{results.stem}_{axis}{results.suffix}")


def measure_speed(
    results: Path,
    name: str,
    seed: int,
    methods: Sequence[str],
    sizes: Sequence[float],
    device: str = "cpu",
    dtype: str = "float32",
    calibration: int | None = None,
) -> None:
    """Build what is not measured yet, and time all of it together.

    Args:
        results: File of the quality, beside which that of the speed is.
        name: Of ``FIELD_MODELS``.
        seed: Draws the examples.
        methods: Of ``METHODS``.
        sizes: Shares of the factorizable weights.
        device: Where the models are made and run.
        dtype: What the finished models are cast to before they are timed, by torch's name.
        calibration: Number of calibration examples, in place of the model's own.

    Raises:
        InputError: There are fewer calibration examples than the largest batch has.
    """
    if calibration is not None and calibration < BATCHES[-1]:
        raise InputError(
            f"--calibration {calibration} is too few: batches of {BATCHES[-1]} are timed. Give at "
            f"least {BATCHES[-1]}."
        )
    file = sibling(results, "speed")
    done = {row.key for row in read_rows(file, SpeedRow)}
    wanted = [
        (method, size)
        for method, size in sizes_of(methods, sizes)
        if _timed(name, method)
        and (name, seed, method, size, BATCHES[-1], device, dtype) not in done
    ]
    if not wanted:
        return
    study, _ = open_study(name, seed, TerminalProgress(), calibration, results, device)
    kind = getattr(torch, dtype)
    dense = copy.deepcopy(study.collected.unpacked.given).to(kind)
    models: dict[tuple[str, float | None], nn.Module] = {}
    for method in dict.fromkeys(method for method, _ in wanted):
        if not METHODS[method].fits(study):
            continue
        if method == "int8":
            models[method, None] = in_int8(dense)
            continue
        at = METHODS[method].prepare(study)
        for size in (size for one, size in wanted if one == method):
            try:
                models[method, size] = at(1.0 if size is None else size).model.to(kind)
            except (ValueError, InputError) as error:
                print(f"{name} {method} {size}: {error}", flush=True)
    part = study.collected.parts["calibration"]
    for batch_size in BATCHES:
        batch = on_device(part.collate(part.examples[:batch_size]), dense)
        inputs = _shortened(without_labels(batch)) if study.language else without_labels(batch)
        times = interleaved([dense, *models.values()], inputs)
        most = forward_bytes(dense, inputs)
        for (method, size), own in zip(models, times[1:], strict=True):
            ratios = [mine / dense for mine, dense in zip(own, times[0], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            peak = None if method == "int8" else forward_bytes(models[method, size], inputs)
            row = SpeedRow(
                model=name,
                seed=seed,
                method=method,
                size=size,
                batch=batch_size,
                ratio=middle,
                low=low,
                high=high,
                milliseconds=1000 * statistics.median(own),
                dense_milliseconds=1000 * statistics.median(times[0]),
                threads=torch.get_num_threads(),
                memory=None if peak is None else peak.total / most.total,
                weights=None if peak is None else peak.weights / most.weights,
                device=device,
                dtype=dtype,
            )
            append_row(file, row)
            print(
                f"{name} {method} {size} batch {batch_size}: {middle:.2f}x the time"
                + ("" if row.memory is None else f", {row.memory:.2f}x the memory"),
                flush=True,
            )


def _timed(name: str, method: str) -> bool:
    return method not in SIMULATED or (method == "int8" and name not in VISION)


def _shortened(batch: Any) -> Any:
    """The first tokens of each window: a whole batch of 32 would take minutes."""
    if isinstance(batch, Tensor):
        return batch[:, :TOKENS]
    return {key: value[:, :TOKENS] for key, value in batch.items()}


def interleaved(
    models: Sequence[nn.Module], inputs: Any, rounds: int = ROUNDS
) -> list[list[float]]:
    """Seconds of a forward pass of every model in every round, after one that isn't counted."""
    times: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for turn in range(rounds + 1):
            for place, model in enumerate(models):
                with evaluation_mode(model):
                    start = _now()
                    output_of(model, inputs)
                    spent = _now() - start
                if turn:
                    times[place].append(spent)
    return times


def _now() -> float:
    """Seconds, once a GPU has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass(frozen=True)
class ForwardBytes:
    """What PyTorch holds in a forward pass, at its peak."""

    total: int
    weights: int


def forward_bytes(model: nn.Module, inputs: Any) -> ForwardBytes:
    """Peak of the tensors of a forward pass without gradients: weights, buffers, activations."""
    # The tracker hooks every parameter, and can only hook those that require a gradient.
    twin = copy.deepcopy(model).eval().requires_grad_(True)
    tracker = MemTracker()
    tracker.track_external(twin)
    with torch.no_grad(), tracker:
        output_of(twin, inputs)
    peak = tracker.get_tracker_snapshot("peak")[next(twin.parameters()).device]
    found = {getattr(kind, "value", kind): count for kind, count in peak.items()}
    return ForwardBytes(found["Total"], found["Parameter"] + found["Buffer"])
