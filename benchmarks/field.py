"""Every method of the field on the same examples, evaluated in the same way: ``run quality``.

For each model and seed one pass over the calibration examples gives the statistics that all
methods share; a method may pass over them again for what is its own. Methods that measure layers
or plans use selection examples, rankfold's included. The held-out examples are evaluated once for
each model that a method made, and by nothing else.

A size is the share kept of the weights in the layers that can be factorized, a pair of factors
counted whole. Beside it stand the parameters and the bytes of the whole model and the FLOPs of one
example, as shares of the dense model's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.choices import Questions, answered, make_questions
from benchmarks.field_models import FIELD_MODELS, LANGUAGE, TASKS, limits_of, other_text
from benchmarks.kept_statistics import collect_or_read, kept_file
from benchmarks.methods import METHODS
from benchmarks.methods.method import Compressed, Study
from benchmarks.observed import Observed, observe
from benchmarks.rows import Recorder
from rankfold.certificate.certify import certify
from rankfold.certificate.change import paired_change
from rankfold.certificate.statement import DEFAULT_MARGIN, state
from rankfold.data.parts import Part
from rankfold.errors import InputError
from rankfold.files.tensors import model_sizes
from rankfold.machine.progress import Progress
from rankfold.model.evaluation_mode import evaluation_mode
from rankfold.settings import Settings
from rankfold.tasks.evaluation import Evaluation, evaluate, on_device
from rankfold.tasks.losses import output_of, without_labels

RESULTS = Path(__file__).parent / "out" / "field.jsonl"


@dataclass(frozen=True)
class Row:
    """One model that a method made, on the held-out examples.

    Attributes:
        size: Share asked for of the factorizable weights, None where there is none to choose.
        kept: Share of the factorizable weights that is stored.
        parameters: Share of the whole model's parameters.
        bytes: Share of the bytes of the whole model's file.
        flops: Share of the FLOPs of one example.
        change: Change of the mean loss; None where it is not finite, or no model was made.
        other_change: The same on text of another kind.
        choices: Share of multiple-choice questions answered correctly (language models).
        upper_bound: Of the change, by the certificate of rankfold's defaults with a statement from
            selection data; None where the change itself is above the margin, so that no
            certificate holds.
        verdict: Of that certificate.
        layers: Share kept of each layer's weights, in the order of the calls; empty for
            methods outside low rank.
        seconds: What the method took beyond the shared statistics, for this size, passes of its own
            that another method had made before included.
        statistics_seconds: What the shared statistics took.
        device: Where the model ran; seconds of different devices are not to be compared.
        note: Why there is no model.
    """

    model: str
    seed: int
    method: str
    size: float | None
    calibration: int
    kept: float | None = None
    parameters: float | None = None
    bytes: float | None = None
    flops: float | None = None
    dense_loss: float | None = None
    change: float | None = None
    standard_error: float | None = None
    dense_accuracy: float | None = None
    accuracy: float | None = None
    accuracy_change: float | None = None
    accuracy_standard_error: float | None = None
    other_change: float | None = None
    other_standard_error: float | None = None
    choices: float | None = None
    choices_change: float | None = None
    choices_standard_error: float | None = None
    dense_choices: float | None = None
    upper_bound: float | None = None
    verdict: str = ""
    layers: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    statistics_seconds: float | None = None
    unit: str = ""
    note: str = ""
    device: str = "cpu"

    @property
    def key(self) -> tuple[object, ...]:
        return (self.model, self.seed, self.method, self.size, self.calibration)


def open_study(
    name: str,
    seed: int,
    progress: Progress,
    calibration: int | None = None,
    results: Path | None = None,
    device: str = "cpu",
) -> tuple[Study, float]:
    """Build a model and pass over its calibration examples; also the seconds of the pass.

    Args:
        name: Of ``FIELD_MODELS``.
        seed: Draws the examples.
        progress: Shows the stages.
        calibration: Number of calibration examples, in place of the model's own.
        results: File beside which the statistics of language models are kept between runs.
        device: Where the model runs.
    """
    build, default = FIELD_MODELS[name]
    count = calibration or default
    model, data = build(seed, count)
    model.to(device)
    settings = Settings(objective="joint", task=TASKS.get(name), seed=seed, **limits_of(data))

    def collected_with(different: dict[str, Any]) -> tuple[Observed, float]:
        chosen = replace(settings, **different)
        if results is not None and name in LANGUAGE:
            file = kept_file(results, name, seed, count, different)
            return collect_or_read(model, data, chosen, file, progress)
        start = time.perf_counter()
        collected = observe(model, data, chosen, progress=progress)
        return collected, time.perf_counter() - start

    collected, seconds = collected_with({})
    if collected.curvature == "sampled":
        return Study(collected, seed, progress), seconds

    def collect_without_step() -> Observed:
        return collected_with({"gradient_step": False})[0]

    return Study(collected, seed, progress, collect_without_step), seconds


def sizes_of(methods: Sequence[str], sizes: Sequence[float]) -> list[tuple[str, float | None]]:
    """Every method with every size, or with None where it has no size to choose."""
    return [
        (method, size)
        for method in methods
        for size in (sizes if METHODS[method].sized else (None,))
    ]


class Runner(Recorder[Row]):
    """Measures what is not measured yet, and writes each result as it comes."""

    def __init__(self, file: Path, device: str = "cpu") -> None:
        super().__init__(file, Row)
        self.device = device

    def run(
        self,
        name: str,
        seed: int,
        methods: Sequence[str],
        sizes: Sequence[float],
        calibration: int | None = None,
        test: int | None = None,
    ) -> None:
        """All rows of one model and seed, from one pass over the calibration examples."""
        wanted = sizes_of(methods, sizes)
        count = calibration or FIELD_MODELS[name][1]
        if all((name, seed, method, size, count) in self.done for method, size in wanted):
            return
        study, spent = open_study(name, seed, self.progress, calibration, self.file, self.device)
        if test is not None:
            collected = study.collected
            collected.parts["held_out"] = collected.parts["held_out"].take(range(test))
        dense = Dense.of(study)
        for method in methods:
            missing = [
                size
                for one, size in wanted
                if one == method and (name, seed, method, size, count) not in self.done
            ]
            if missing and METHODS[method].fits(study):
                self._method(name, study, dense, method, missing, spent)

    def _method(
        self,
        name: str,
        study: Study,
        dense: Dense,
        method: str,
        sizes: Sequence[float | None],
        spent: float,
    ) -> None:
        start, saved = time.perf_counter(), study.saved_seconds
        at = METHODS[method].prepare(study)
        prepared = time.perf_counter() - start + study.saved_seconds - saved
        for size in sizes:
            row: dict[str, Any] = {
                "model": name,
                "seed": study.seed,
                "method": method,
                "size": size,
                "calibration": len(study.collected.parts["calibration"].examples),
                "unit": study.collected.task.unit,
                "statistics_seconds": spent,
                "device": self.device,
            }
            start = time.perf_counter()
            try:
                made = at(1.0 if size is None else size)
            except (ValueError, InputError) as error:  # the method does not reach this size
                self._record(Row(**row, note=str(error)))
                continue
            row["seconds"] = prepared + time.perf_counter() - start
            row |= dense.compare(study, made)
            if METHODS[method].sized and METHODS[method].kind != "outside":
                row["layers"] = layer_shares(study, made.model)
            self._record(Row(**row))

    def _record(self, row: Row) -> None:
        self.write(row)
        what = row.note or f"kept {row.kept:.4f}, bytes {row.bytes:.4f}: {_change(row)}"
        took = "" if row.seconds is None else f" in {row.seconds:.0f} s"
        print(f"{row.model} seed {row.seed} {row.method} {row.size}: {what}{took}", flush=True)


def _change(row: Row) -> str:
    if row.change is None:
        return "the loss is not finite"
    accuracy = "" if row.accuracy is None else f", accuracy {row.accuracy:.4f}"
    return f"{row.change:+.4f} ± {row.standard_error:.4f}{accuracy}"


@dataclass(frozen=True)
class Dense:
    """The dense model, which every method is compared with."""

    evaluation: Evaluation
    selection: Evaluation
    other: Part | None
    other_evaluation: Evaluation | None
    questions: Questions | None
    answered: Evaluation | None
    parameters: int
    bytes: int
    flops: int

    @classmethod
    def of(cls, study: Study) -> Dense:
        collected = study.collected
        other, questions = _asked_besides(study) if study.language else (None, None)
        given = collected.unpacked.given
        sizes = model_sizes(given)
        return cls(
            evaluation=_evaluated(study, given, collected.parts["held_out"]),
            selection=collected.original_losses("selection", None, study.progress),
            other=other,
            other_evaluation=None if other is None else _evaluated(study, given, other),
            questions=questions,
            answered=None if questions is None else _shares(answered(given, questions)),
            parameters=sizes["parameters"],
            bytes=sizes["bytes"],
            flops=flops_of_one(collected, given),
        )

    def compare(self, study: Study, made: Compressed) -> dict[str, Any]:
        """The fields of a row that say what a model weighs and what it lost."""
        model = made.model
        found = _evaluated(study, model, study.collected.parts["held_out"])
        outside = self.parameters - study.factorizable
        row: dict[str, Any] = {
            "kept": (made.parameters - outside) / study.factorizable,
            "parameters": made.parameters / self.parameters,
            "bytes": made.bytes / self.bytes,
            "flops": flops_of_one(study.collected, model) / self.flops,
            "dense_loss": self.evaluation.mean,
            "dense_accuracy": self.evaluation.accuracy,
            "accuracy": found.accuracy,
        }
        row |= _paired("", self.evaluation, found)
        if self.evaluation.correct is not None and found.correct is not None:
            before = Evaluation(self.evaluation.correct, self.evaluation.terms, None)
            after = Evaluation(found.correct, found.terms, None)
            row |= _paired("accuracy_", before, after)
        if row.get("change", math.inf) <= DEFAULT_MARGIN:
            row |= self._certified(study, model, found)
        if self.other is not None and self.other_evaluation is not None:
            there = _evaluated(study, model, self.other)
            row |= _paired("other_", self.other_evaluation, there)
        if self.questions is not None and self.answered is not None:
            hits = _shares(answered(model, self.questions))
            row |= {"choices": hits.mean, "dense_choices": self.answered.mean}
            row |= _paired("choices_", self.answered, hits)
        return row

    def _certified(self, study: Study, model: nn.Module, found: Evaluation) -> dict[str, Any]:
        """What rankfold's certificate says of a model, whoever made it."""
        selected = _evaluated(study, model, study.collected.parts["selection"])
        defaults = Settings()
        statement = state(
            paired_change(self.selection, selected),
            selected.losses - self.selection.losses,
            len(found.losses),
            margin=DEFAULT_MARGIN,
            confidence=defaults.confidence,
            test=defaults.test,
            largest_change=None,
            metric_margins={},
        )
        unit, digest = study.collected.task.unit, study.collected.parts["held_out"].digest
        certificate = certify(self.evaluation, found, statement, unit=unit, data_digest=digest)
        return {"upper_bound": certificate.upper_bound, "verdict": certificate.verdict}


def _asked_besides(study: Study) -> tuple[Part, Questions]:
    """Text of another kind, and multiple-choice questions: what a language model is tested on."""
    from benchmarks.language_models import load_tokenizer, wikitext2_tokens  # needs transformers

    length = len(study.collected.parts["calibration"].examples[0])
    return other_text(length), make_questions(wikitext2_tokens("test", load_tokenizer()))


def _shares(hits: Tensor) -> Evaluation:
    """Questions as examples of one term each."""
    return Evaluation(hits, torch.ones_like(hits), None)


def _paired(prefix: str, before: Evaluation, after: Evaluation) -> dict[str, float]:
    change = paired_change(before, after)
    if not math.isfinite(change.mean):
        return {}
    return {f"{prefix}change": change.mean, f"{prefix}standard_error": change.standard_error}


def _evaluated(study: Study, model: nn.Module, part: Part) -> Evaluation:
    return evaluate(
        model,
        study.collected.task,
        part,
        progress=study.progress,
        stage=f"on {part.name.replace('_', '-')} data",
        finite=False,
    )


def layer_shares(study: Study, model: nn.Module) -> dict[str, float]:
    """Share kept of the weights of each layer, biases left out."""
    return {
        name: sum(
            values.numel()
            for key, values in model.get_submodule(name).named_parameters()
            if key.rpartition(".")[2] != "bias"
        )
        / weight.numel()
        for name, weight in study.weights.items()
    }


def flops_of_one(collected: Observed, model: nn.Module) -> int:
    """Floating-point operations of one calibration example, as PyTorch counts them."""
    part = collected.parts["calibration"]
    batch = on_device(part.collate(part.examples[:1]), model)
    counter = FlopCounterMode(display=False)
    with evaluation_mode(model), torch.no_grad(), counter:
        output_of(model, without_labels(batch))
    return without_attention(counter)


def without_attention(counter: FlopCounterMode) -> int:
    """What was counted, but for fused attention, which has no weights.

    PyTorch counts its fused kernels for a GPU and not the one for a CPU.
    """
    counts = counter.get_flop_counts()["Global"]
    return sum(flops for operation, flops in counts.items() if "attention" not in str(operation))
