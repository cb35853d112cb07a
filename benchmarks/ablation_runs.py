"""The variants of the ablation, and what measures them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.field_models import (
    FIELD_MODELS,
    LANGUAGE,
    TASKS,
    VISION,
    limits_of,
    other_text,
    smollm2,
)
from benchmarks.kept_statistics import collect_or_read, kept_file
from benchmarks.observed import Observed
from benchmarks.rows import Recorder
from rankfold.certificate.change import paired_change
from rankfold.compress import Preparation
from rankfold.data.copies import refuse_copies
from rankfold.data.parts import Data, Part, as_part
from rankfold.held_out import HeldOut
from rankfold.machine.timing import Watch
from rankfold.report.seen import Run
from rankfold.search.build import control
from rankfold.search.damping import choose_damping
from rankfold.search.round import Round, start_round
from rankfold.settings import Settings
from rankfold.tasks.evaluation import Evaluation, evaluate

MODELS = [*LANGUAGE, *VISION]
# What only the gradient of the loss at the labels makes a difference to.
OF_LABELS = ("gradient_step", "step_estimator", "step_groups", "curvature")


@dataclass(frozen=True)
class Variant:
    """One way to run rankfold.

    Attributes:
        settings: What differs from the defaults.
        models: Where it makes a difference: ``all``, ``language`` or ``vision``.
        statistics: What of the settings changes the statistics; variants with equal ones share a
            pass over the calibration examples.
        share_of_data: Share of the calibration examples used.
        docstrings: Share of the calibration windows that are docstrings of installed packages.
        windows: Numbers of selection and held-out windows, where they are not the usual ones.
    """

    settings: dict[str, Any]
    models: str = "all"
    statistics: dict[str, Any] = field(default_factory=dict)
    share_of_data: float = 1.0
    docstrings: float = 0.0
    windows: tuple[int, int] | None = None

    @property
    def pass_over_data(self) -> dict[str, Any]:
        """What names the statistics beside model, seed and number of examples."""
        mixed = {"docstrings": self.docstrings} if self.docstrings else {}
        return {**self.statistics, **mixed}

    def fits(self, model: str) -> bool:
        """Whether the variant is run for a model."""
        differs = {**self.settings, **self.statistics}
        of_labels = differs.get("objective") == "first-order" or any(
            k in differs for k in OF_LABELS
        )
        if model in TASKS and of_labels:
            return False
        return self.models in ("all", "language" if model in LANGUAGE else "vision")


# Shares that text of the model's own has in what is calibrated on.
OWN_TEXT = {"a third": 0.333, "half": 0.5, "three quarters": 0.75}
# Where no step is wanted the curvature is another one (docs/theory.md, 3).
NO_STEP = {"gradient_step": False}
VARIANTS: dict[str, Variant] = {
    "all parts": Variant({}),
    "no gradient step": Variant({}, statistics=NO_STEP),
    "no interactions": Variant({"interactions": False}),
    "no refit": Variant({"refit": False}),
    "no step, no interactions": Variant({"interactions": False}, statistics=NO_STEP),
    "pair form": Variant({"form": "pair"}),
    "no block forms": Variant({"block_forms": False}),
    "no shrinkage": Variant({"shrinkage": False}, statistics={"shrinkage": False}),
    "no spatial or Tucker forms": Variant({"conv_forms": False}, "vision"),
    "raw step": Variant({"step_estimator": "raw"}),
    "denoised step": Variant({"step_estimator": "denoised"}),
    "step in three groups": Variant({"step_groups": 3}),
    "twice the calibration data, step in three groups": Variant(
        {"step_groups": 3}, share_of_data=2.0
    ),
    "damping 0.01": Variant({"damping": 0.01}),
    "damping 1": Variant({"damping": 1.0}),
    "damping 0.01 of A, 0.3 of B": Variant({"damping": 0.01, "output_damping": 0.3}),
    "half the calibration data": Variant({}, share_of_data=0.5),
    "twice the calibration data": Variant({}, share_of_data=2.0),
    "twice the calibration data, no step": Variant({}, statistics=NO_STEP, share_of_data=2.0),
    "twice the calibration data, no step, no refit": Variant(
        {"refit": False}, statistics=NO_STEP, share_of_data=2.0
    ),
    "twice the calibration data, no step, damping by selection": Variant(
        {"damping": "auto"}, statistics=NO_STEP, share_of_data=2.0
    ),
    "twice the calibration data, no step, 32 windows to select": Variant(
        {}, "language", NO_STEP, share_of_data=2.0, windows=(32, 32)
    ),
    "twice the calibration data, no step, damping 0.01 of A, 0.3 of B": Variant(
        {"damping": 0.01, "output_damping": 0.3}, statistics=NO_STEP, share_of_data=2.0
    ),
    "twice the calibration data, no step, damping 1 of B": Variant(
        {"output_damping": 1.0}, statistics=NO_STEP, share_of_data=2.0
    ),
    "twice the calibration data, no block forms": Variant(
        {"block_forms": False}, share_of_data=2.0
    ),
    "twice the calibration data, no step, no block forms": Variant(
        {"block_forms": False}, statistics=NO_STEP, share_of_data=2.0
    ),
    "twice the calibration data, two rounds": Variant({"rounds": 2}, share_of_data=2.0),
    "twice the calibration data, two rounds, 32 windows to select, 128 to test": Variant(
        {"rounds": 2}, "language", share_of_data=2.0, windows=(32, 128)
    ),
    "twice the calibration data, three rounds": Variant({"rounds": 3}, share_of_data=2.0),
    "twice the calibration data, two rounds, no step": Variant(
        {"rounds": 2}, statistics=NO_STEP, share_of_data=2.0
    ),
    "two rounds": Variant({"rounds": 2}),
    "two rounds, no step": Variant({"rounds": 2}, statistics=NO_STEP),
    "empirical curvature": Variant({}, "vision", {"curvature": "empirical"}),
    "sampled curvature": Variant({}, "language", {"curvature": "sampled"}),
    "twice the calibration data, no step, empirical curvature": Variant(
        {}, "language", {"curvature": "empirical", **NO_STEP}, share_of_data=2.0
    ),
    **{
        f"twice the calibration data, {share} own text, no step": Variant(
            {}, "language", {"self_share": number, **NO_STEP}, share_of_data=2.0
        )
        for share, number in OWN_TEXT.items()
    },
    "twice the calibration data, half own text, no step, damping 0.3": Variant(
        {"damping": 0.3}, "language", {"self_share": 0.5, **NO_STEP}, share_of_data=2.0
    ),
    "twice the calibration data, half own text": Variant(
        {}, "language", {"self_share": 0.5}, share_of_data=2.0
    ),
    "half docstrings": Variant({}, "language", docstrings=0.5),
    "half docstrings, no step": Variant({}, "language", NO_STEP, docstrings=0.5),
    "twice the calibration data, half docstrings": Variant(
        {}, "language", share_of_data=2.0, docstrings=0.5
    ),
    "twice the calibration data, half docstrings, no step": Variant(
        {}, "language", NO_STEP, share_of_data=2.0, docstrings=0.5
    ),
    "A alone, uniform (SVD-LLM)": Variant({"objective": "activation", "form": "pair"}),
    "row weights (FWSVD)": Variant({"objective": "fwsvd", "form": "pair"}),
    "plain SVD": Variant({"objective": "svd", "form": "pair"}),
    "first order (published)": Variant({"objective": "first-order"}),
}


@dataclass(frozen=True)
class Row:
    """One factorized model on the test examples."""

    model: str
    seed: int
    variant: str
    size: float | None  # None: the smallest that ``compact`` found
    kept: float  # share of the whole model's parameters
    bytes_kept: float  # share of the bytes of model.safetensors
    dense_loss: float
    change: float
    standard_error: float
    accuracy: float | None  # where there are labels
    dense_accuracy: float | None
    predicted: float | None
    control: float | None
    other_change: float | None  # on text of another kind
    other_standard_error: float | None
    other_control: float | None
    eta: float | None
    verdict: str
    seconds: float  # from the statistics on, this size alone
    device: str = "cpu"  # where the model ran
    share: float | None = None  # kept of the factorizable weights, of what ``compact`` found

    @property
    def key(self) -> tuple[object, ...]:
        return (self.model, self.seed, self.variant, self.size)


class Runner(Recorder[Row]):
    """Measures what is not measured yet, and writes each result as it comes."""

    def __init__(self, file: Path, device: str = "cpu") -> None:
        super().__init__(file, Row)
        self.device = device

    def run(
        self, name: str, seed: int, variants: Sequence[str], sizes: Sequence[float | None]
    ) -> None:
        """All rows of one model and seed; variants with the same statistics share their pass."""
        missing = [
            variant
            for variant in variants
            if VARIANTS[variant].fits(name)
            and any((name, seed, variant, size) not in self.done for size in sizes)
        ]
        groups: dict[str, list[str]] = {}
        for variant in missing:
            chosen = VARIANTS[variant]
            key = f"{sorted(chosen.pass_over_data.items())} {chosen.share_of_data} {chosen.windows}"
            groups.setdefault(key, []).append(variant)
        for group in groups.values():
            self._group(name, seed, group, sizes)

    def _group(
        self, name: str, seed: int, variants: list[str], sizes: Sequence[float | None]
    ) -> None:
        first = VARIANTS[variants[0]]
        build, calibration = FIELD_MODELS[name]
        count = round(calibration * first.share_of_data)
        if first.windows is not None:
            selection, held_out = first.windows
            build = partial(smollm2, selection=selection, held_out=held_out)
        model, data = build(seed, count)
        model.to(self.device)
        other = None
        if name in LANGUAGE:
            length = len(data.calibration[0])
            other = other_text(length)
            data = mixed_with_docstrings(data, first.docstrings, length, seed)
            refuse_copies([as_part("calibration", list(data.calibration)), other])
        common = {"seed": seed, "task": TASKS.get(name), **limits_of(data), **first.statistics}
        collected, spent = collect_or_read(
            model,
            data,
            Settings(**common),
            kept_file(self.file, name, seed, count, first.pass_over_data),
            self.progress,
        )
        dense_other = None if other is None else self._other(model, collected, other)
        for variant in variants:
            settings = Settings(**{**common, **VARIANTS[variant].settings})
            study = collected.study
            start = time.perf_counter()
            if settings.damping == "auto":
                study, settings = choose_damping(study, settings, progress=self.progress)
            started = start_round(study, settings, progress=self.progress)
            sealed = HeldOut(settings, (), collected.parts["held_out"])
            run = Run(model, study.offload.kept, Watch(self.progress, timing=False))
            prepared = Preparation(started, sealed, run)
            ready = spent + time.perf_counter() - start
            # With rounds the control takes a step a round, which only the result's own stage knows.
            moved = control(started) if settings.rounds == 1 else None
            other_control = None
            if other is not None and dense_other is not None and moved is not None:
                other_control = self._other(moved, collected, other).mean - dense_other.mean
            for size in sizes:
                if (name, seed, variant, size) in self.done:
                    continue
                start = time.perf_counter()
                if size is None:
                    result = prepared.compact()
                else:
                    result = prepared.lossless(size, size_of="factorizable")
                seconds = ready + time.perf_counter() - start
                report, change = result.report, None
                if other is not None and dense_other is not None:
                    found = self._other(result.model, collected, other)
                    change = paired_change(dense_other, found)
                step, certificate = report["step"], result.certificate
                self._record(
                    Row(
                        model=name,
                        seed=seed,
                        variant=variant,
                        size=size,
                        kept=result.ratio,
                        bytes_kept=report["factorized"]["bytes"] / report["original"]["bytes"],
                        dense_loss=report["loss"]["original"],
                        change=certificate.change,
                        standard_error=certificate.standard_error,
                        accuracy=report["accuracy"]["factorized"],
                        dense_accuracy=report["accuracy"]["original"],
                        predicted=report["loss"]["predicted_change"],
                        control=report["loss"]["control_change"],
                        other_change=None if change is None else change.mean,
                        other_standard_error=None if change is None else change.standard_error,
                        other_control=other_control,
                        eta=None if step is None else step["eta"],
                        verdict=certificate.verdict,
                        seconds=seconds,
                        device=self.device,
                        share=share_kept(started, result.ratio) if size is None else None,
                    )
                )

    def _other(self, model: nn.Module, collected: Observed, part: Part) -> Evaluation:
        return evaluate(
            model, collected.task, part, progress=self.progress, stage="text of another kind"
        )

    def _record(self, row: Row) -> None:
        self.write(row)
        size = f"compact {row.share:.3f} {row.verdict}" if row.share is not None else row.size
        print(f"{row.model} seed {row.seed} {row.variant} {size}: {_change(row)}", flush=True)


def share_kept(prepared: Round, ratio: float) -> float:
    """Share kept of the factorizable weights where this share of the whole model is."""
    return 1 - (1 - ratio) * prepared.total / prepared.factorizable


def mixed_with_docstrings(data: Data, share: float, length: int, seed: int) -> Data:
    """The data with docstrings in the place of a share of the calibration windows."""
    from benchmarks.language_models import docstring_windows, load_tokenizer

    windows = list(data.calibration)
    count = round(share * len(windows))
    if count == 0:
        return data
    drawn = docstring_windows(load_tokenizer(), length=length, count=count, seed=seed)
    return replace(data, calibration=[*windows[: len(windows) - count], *drawn])


def _change(row: Row) -> str:
    text = f"{row.change:+.4f} ± {row.standard_error:.4f}"
    if row.predicted is not None:
        text += f", predicted {row.predicted:+.4f}"
    if row.other_change is not None:
        text += f", other text {row.other_change:+.4f} ± {row.other_standard_error:.4f}"
    return text
