"""Statistics kept in a file, so that a run that was interrupted doesn't pass over the data again.

For SmolLM2 the pass over 128 windows takes longer than all that follows it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.observed import Observed, observe
from rankfold.data.parts import Data
from rankfold.machine.device import device_of
from rankfold.machine.progress import Progress
from rankfold.maths.linalg import Damping
from rankfold.search.study import Labels, Statistics
from rankfold.settings import Settings
from rankfold.statistics.labels import Curvature
from rankfold.statistics.layer_statistics import DominantRows, LayerStatistics

# Of the files: what one of another number holds is not what the code would find today.
FORMAT = 3


def kept_file(
    results: Path, model: str, seed: int, calibration: int, settings: Mapping[str, Any]
) -> Path:
    """Where statistics are kept, beside the results.

    Args:
        results: File of the results.
        model: Name of the model.
        seed: Draws the examples.
        calibration: Number of calibration examples.
        settings: What else differs from the defaults.
    """
    parts = [model, f"seed{seed}", str(calibration)]
    parts += [f"{key}-{value}" for key, value in sorted(settings.items())]
    return results.parent / "statistics" / ("_".join(parts) + ".safetensors")


def collect_or_read(
    model: nn.Module, data: Data, settings: Settings, file: Path, progress: Progress
) -> tuple[Observed, float]:
    """What ``observe`` gives, and the seconds of its pass; from the file where there is one."""
    if file.exists():
        # An objective without statistics finds layers and parts, and makes no pass.
        collected = observe(model, data, replace(settings, objective="svd"), progress=progress)
        return _read(collected, file)
    started = time.perf_counter()
    collected = observe(model, data, settings, progress=progress)
    seconds = time.perf_counter() - started
    _write(collected, seconds, file)
    return collected, seconds


def _write(collected: Observed, seconds: float, file: Path) -> None:
    tensors: dict[str, Tensor] = {}
    leaders: dict[str, str | None] = {}
    for name, stats in collected.statistics.items():
        leaders[name] = stats.shares_input_with
        if stats.shares_input_with is None:
            tensors[f"{name} A"] = stats.input_gram
        if stats.output_gram is not None:
            tensors[f"{name} B"] = stats.output_gram
        if stats.dominant is not None:
            tensors[f"{name} A dominant"] = stats.dominant.inputs
            tensors[f"{name} B dominant"] = stats.dominant.output_squares
        for half, gradient in enumerate(stats.gradients or ()):
            tensors[f"{name} G{half}"] = gradient
    about = {
        "format": FORMAT,
        "leaders": leaders,
        "curvature": collected.curvature,
        "calibration_loss": collected.calibration_loss,
        "lacking": {name: stats.lacking for name, stats in collected.statistics.items()},
        "seconds": seconds,
        "calibration": collected.parts["calibration"].digest,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".draft")
    save_file(tensors, draft, metadata={"about": json.dumps(about)})
    draft.replace(file)


def _read(collected: Observed, file: Path) -> tuple[Observed, float]:
    """The same with the file's statistics, and the seconds that they took."""
    with safe_open(file, framework="pt", device=device_of(collected.model)) as opened:
        about = json.loads(opened.metadata()["about"])
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    if about.get("format") != FORMAT:
        raise ValueError(f"{file} holds statistics of earlier code; delete it")
    if about["calibration"] != collected.parts["calibration"].digest:
        raise ValueError(f"{file} holds statistics of other examples; delete it")
    labels = Labels(cast("Curvature | None", about["curvature"]), about["calibration_loss"])
    found: dict[str, LayerStatistics] = {}
    grams = {key.removesuffix(" A"): tensors.pop(key) for key in [*tensors] if key.endswith(" A")}
    for name, leader in about["leaders"].items():
        back = tensors.pop(f"{name} B", None)
        inputs, outputs = (tensors.pop(f"{name} {side} dominant", None) for side in "AB")
        first, second = (tensors.pop(f"{name} G{half}", None) for half in (0, 1))
        found[name] = LayerStatistics(
            input_gram=grams[leader or name],
            output_gram=back,
            gradients=None if first is None or second is None else (first, second),
            shares_input_with=leader,
            lacking=Damping(*about["lacking"][name]),
            dominant=None if inputs is None or outputs is None else DominantRows(inputs, outputs),
        )
    lacking = {name: stats.lacking for name, stats in found.items()}
    return collected.with_statistics(labels, Statistics(found, {}, lacking)), float(
        about["seconds"]
    )
