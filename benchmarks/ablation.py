"""What each part of rankfold is worth: every part switched off in turn, beside the baselines.

    python -m benchmarks.ablation run resnet20 resnet56 smollm2 --seeds 0 1 2
    python -m benchmarks.ablation table
    python -m benchmarks.ablation plot

``run`` appends one JSON line a result to ``benchmarks/out/ablation.jsonl`` and leaves out what is
there already (statistics are kept beside it, in ``statistics``); ``table`` prints the tables of
docs/ablation.md, ``plot`` draws their figures into docs/figures. Every result goes through
``Preparation.lossless``, as a user's would: the plan is made on selection data, the test examples
are evaluated once. A seed draws the calibration and selection examples; the test examples stay the
same. Size is the share kept of the weights in the layers that can be factorized. A language model
is also tested on text of another kind (``pydoc_data.topics``), none of which is in its calibration.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn

from benchmarks import figures
from benchmarks.command_line import commands, parsed
from benchmarks.field_models import FIELD_MODELS, LANGUAGE, TASKS, VISION
from benchmarks.kept_statistics import collect_or_read, kept_file
from benchmarks.rows import Recorder, read_rows
from rankfold.certify import paired_change
from rankfold.collected import Collected
from rankfold.compress import Preparation
from rankfold.data import Data, Part, as_part
from rankfold.overlap import refuse_copies
from rankfold.settings import Settings
from rankfold.stage import choose_damping
from rankfold.tasks import Evaluation, evaluate

RESULTS = Path(__file__).parent / "out" / "ablation.jsonl"
OTHER_TEXT_WINDOWS = 16
MODELS = [*LANGUAGE, *(name for name in VISION if name not in TASKS)]  # those with labels


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
    """

    settings: dict[str, Any]
    models: str = "all"
    statistics: dict[str, Any] = field(default_factory=dict)
    share_of_data: float = 1.0
    docstrings: float = 0.0

    @property
    def pass_over_data(self) -> dict[str, Any]:
        """What names the statistics beside model, seed and number of examples."""
        mixed = {"docstrings": self.docstrings} if self.docstrings else {}
        return {**self.statistics, **mixed}

    def fits(self, model: str) -> bool:
        """Whether the variant is run for a model."""
        return self.models in ("all", "language" if model in LANGUAGE else "vision")


OWN = {"self_share": 0.9}
# Where no step is wanted the curvature is another one (docs/theory.md, 3).
NO_STEP = {"gradient_step": False}
VARIANTS: dict[str, Variant] = {
    "all parts": Variant({}),
    "no gradient step": Variant({}, statistics=NO_STEP),
    "no interactions": Variant({"interactions": False}),
    "no step, no interactions": Variant({"interactions": False}, statistics=NO_STEP),
    "pair form": Variant({"form": "pair"}),
    "no block forms": Variant({"block_forms": False}),
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
    "twice the calibration data, no step, damping by selection": Variant(
        {"damping": "auto"}, statistics=NO_STEP, share_of_data=2.0
    ),
    "twice the calibration data, no block forms": Variant(
        {"block_forms": False}, share_of_data=2.0
    ),
    "twice the calibration data, no step, no block forms": Variant(
        {"block_forms": False}, statistics=NO_STEP, share_of_data=2.0
    ),
    "twice the calibration data, two rounds": Variant({"rounds": 2}, share_of_data=2.0),
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
    "half own text": Variant({}, "language", {"self_share": 0.5}),
    "half own text, no step": Variant({}, "language", {"self_share": 0.5, **NO_STEP}),
    "twice the calibration data, half own text, no step": Variant(
        {}, "language", {"self_share": 0.5, **NO_STEP}, share_of_data=2.0
    ),
    "twice the calibration data, half own text, no step, damping 0.3": Variant(
        {"damping": 0.3}, "language", {"self_share": 0.5, **NO_STEP}, share_of_data=2.0
    ),
    "own text, no step": Variant({}, "language", OWN | NO_STEP),
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

# By whether a step is taken: the variants whose calibration has more and more own text.
OWN_TEXT_CURVES = {
    True: ("all parts", "half own text"),
    False: ("no gradient step", "half own text, no step", "own text, no step"),
}


@dataclass(frozen=True)
class Row:
    """One factorized model on the test examples."""

    model: str
    seed: int
    variant: str
    size: float
    kept: float  # share of the whole model's parameters
    bytes_kept: float  # share of the bytes of model.safetensors
    dense_loss: float
    change: float
    standard_error: float
    accuracy: float
    dense_accuracy: float
    predicted: float | None
    control: float | None
    other_change: float | None  # on text of another kind
    other_standard_error: float | None
    other_control: float | None
    eta: float | None
    verdict: str
    seconds: float  # from the statistics on, this size alone

    @property
    def key(self) -> tuple[object, ...]:
        return (self.model, self.seed, self.variant, self.size)


class Runner(Recorder[Row]):
    """Measures what is not measured yet, and writes each result as it comes."""

    def __init__(self, file: Path) -> None:
        super().__init__(file, Row)

    def run(self, name: str, seed: int, variants: Sequence[str], sizes: Sequence[float]) -> None:
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
            key = f"{sorted(chosen.pass_over_data.items())} {chosen.share_of_data}"
            groups.setdefault(key, []).append(variant)
        for group in groups.values():
            self._group(name, seed, group, sizes)

    def _group(self, name: str, seed: int, variants: list[str], sizes: Sequence[float]) -> None:
        first = VARIANTS[variants[0]]
        build, calibration = FIELD_MODELS[name]
        count = round(calibration * first.share_of_data)
        model, data = build(seed, count)
        other = None
        if name in LANGUAGE:
            length = len(data.calibration[0])
            other = other_text(length)
            data = mixed_with_docstrings(data, first.docstrings, length, seed)
            refuse_copies([as_part("calibration", list(data.calibration)), other])
        common = {"seed": seed, "limit": count, **first.statistics}
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
            start = time.perf_counter()
            if settings.damping == "auto":
                settings = choose_damping(collected, settings, progress=self.progress)
            prepared = Preparation.of(collected, settings, progress=self.progress)
            ready = spent + time.perf_counter() - start
            # With rounds the control takes a step a round, which only the result's own stage knows.
            moved = prepared.control() if settings.rounds == 1 else None
            other_control = None
            if other is not None and dense_other is not None and moved is not None:
                other_control = self._other(moved, collected, other).mean - dense_other.mean
            for size in sizes:
                if (name, seed, variant, size) in self.done:
                    continue
                start = time.perf_counter()
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
                    )
                )

    def _other(self, model: nn.Module, collected: Collected, part: Part) -> Evaluation:
        return evaluate(
            model, collected.task, part, progress=self.progress, stage="text of another kind"
        )

    def _record(self, row: Row) -> None:
        self.write(row)
        print(f"{row.model} seed {row.seed} {row.variant} {row.size}: {_change(row)}", flush=True)


def other_text(length: int) -> Part:
    """Windows of Python's documentation of so many tokens."""
    from benchmarks.language_models import cut, load_tokenizer  # needs transformers
    from rankfold.demo import topics_data

    tokens = torch.cat([torch.as_tensor(w) for w in topics_data(load_tokenizer()).held_out])
    return as_part("other text", list(cut(tokens, length)[:OTHER_TEXT_WINDOWS]))


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


def print_tables(rows: Sequence[Row]) -> None:
    """For each model and size a table in Markdown: mean over seeds, and their spread."""
    for name in dict.fromkeys(row.model for row in rows):
        mine = [row for row in rows if row.model == name]
        first = mine[0]
        print(f"\n## {name}\n")
        print(f"Dense: test loss {first.dense_loss:.4f}, accuracy {first.dense_accuracy:.4f}.")
        for size in sorted({row.size for row in mine}, reverse=True):
            here = [row for row in mine if row.size == size]
            language = any(row.other_change is not None for row in here)
            print(f"\n### {size:g} of the factorizable weights\n")
            columns = ["variant", "seeds", "change of the loss", "predicted", "control"]
            columns += ["other text", "control there"] if language else ["accuracy"]
            columns += ["parameters", "bytes", "seconds"]
            print("| " + " | ".join(columns) + " |")
            print("| --- " * len(columns) + "|")
            for variant in [v for v in VARIANTS if any(row.variant == v for row in here)]:
                print(_line(variant, [row for row in here if row.variant == variant], language))


def _line(variant: str, rows: list[Row], language: bool) -> str:
    cells = [
        variant,
        str(len(rows)),
        _spread([r.change for r in rows], mean(r.standard_error for r in rows)),
        _mean([r.predicted for r in rows]),
        _mean([r.control for r in rows]),
    ]
    if language:
        errors = mean(r.other_standard_error or 0.0 for r in rows)
        cells.append(_spread([r.other_change or 0.0 for r in rows], errors))
        cells.append(_mean([r.other_control for r in rows]))
    else:
        cells.append(f"{mean(r.accuracy for r in rows):.3f}")
    cells += [f"{mean(r.kept for r in rows):.4f}", f"{mean(r.bytes_kept for r in rows):.4f}"]
    cells.append(f"{mean(r.seconds for r in rows):.0f}")
    return "| " + " | ".join(cells) + " |"


def _spread(changes: list[float], standard_error: float) -> str:
    text = f"{mean(changes):+.4f} ± {standard_error:.4f}"
    return f"{text}, seeds ± {stdev(changes):.4f}" if len(changes) > 1 else text


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{mean(known):+.4f}" if known else ""


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """One figure a model: change of the loss of every variant, a panel a size."""
    files = []
    for name in dict.fromkeys(row.model for row in rows):
        mine = [row for row in rows if row.model == name]
        sizes = sorted({row.size for row in mine}, reverse=True)
        variants = [v for v in reversed(VARIANTS) if any(row.variant == v for row in mine)]
        file = folder / f"ablation_{name}.svg"
        with figures.saved(
            file,
            ncols=len(sizes),
            sharey=True,
            squeeze=False,
            figsize=(3 + 3 * len(sizes), 1 + len(variants) / 3),
        ) as (figure, panels):
            for panel, size in zip(panels[0], sizes, strict=True):
                _panel(panel, [row for row in mine if row.size == size], variants, size)
            figure.suptitle(f"{name}: change of the mean test loss (nats), every seed a point")
        files.append(file)
    return files


def draw_predictions(rows: Sequence[Row], folder: Path) -> Path:
    """Predicted against measured change of every row that has a prediction, a panel a model."""
    names = list(dict.fromkeys(row.model for row in rows))
    file = folder / "ablation_predicted.svg"
    layout = {"ncols": len(names), "squeeze": False, "figsize": (1 + 4.5 * len(names), 4.6)}
    with figures.saved(file, **layout) as (figure, panels):
        for panel, name in zip(panels[0], names, strict=True):
            mine = [row for row in rows if row.model == name and row.predicted is not None]
            # Okabe and Ito 2008: safe for the colour-blind.
            for stepped, colour, marker in ((False, "#0072B2", "s"), (True, "#D55E00", "o")):
                found = [row for row in mine if bool(row.eta) == stepped]
                if found:
                    panel.errorbar(
                        [row.predicted for row in found],
                        [row.change for row in found],
                        yerr=[row.standard_error for row in found],
                        fmt=marker,
                        color=colour,
                        capsize=2,
                        ms=5,
                        label="with the step" if stepped else "without a step",
                    )
            panel.axline((0, 0), slope=1, color="grey", linewidth=0.8)
            panel.set_title(name)
            panel.set_xlabel("predicted change of the loss (nats)")
            panel.set_ylabel("measured (error bars: ± 1 standard error)")
            panel.grid(alpha=0.3)
            panel.legend(frameon=False)
        figure.suptitle("On the line a prediction is right; below it the model is better")
    return file


def draw_own_text(rows: Sequence[Row], folder: Path) -> Path | None:
    """What text of the model's own costs on the calibration's kind and gains on another.

    A curve a size, with the step and without, from no own text to nearly nothing else.

    Returns:
        None where no curve has two points.
    """
    tested = [row for row in rows if row.other_change is not None]
    sizes = sorted({row.size for row in tested}, reverse=True)
    curves: list[tuple[float, bool, list[Row]]] = []
    for size in sizes:
        for stepped, variants in OWN_TEXT_CURVES.items():
            found = [
                row for v in variants for row in tested if row.variant == v and row.size == size
            ]
            if len({row.variant for row in found}) > 1:
                curves.append((size, stepped, found))
    if not curves:
        return None
    file = folder / "ablation_own_text.svg"
    # Okabe and Ito 2008: safe for the colour-blind.
    colours = dict(zip(sizes, ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=False))
    with figures.saved(file, figsize=(6, 4.6)) as (figure, panel):
        for size, stepped, found in curves:
            panel.errorbar(
                [row.change for row in found],
                [row.other_change for row in found],
                xerr=[row.standard_error for row in found],
                yerr=[row.other_standard_error for row in found],
                fmt="-o" if stepped else "--s",
                color=colours.get(size, "black"),
                capsize=2,
                ms=5,
                label=f"{size:g}, {'with the step' if stepped else 'without a step'}",
            )
            for row in found:
                share = VARIANTS[row.variant].statistics.get("self_share", 0.0)
                panel.annotate(
                    f"{share:g}",
                    (row.change, row.other_change),
                    xytext=(5, 5),
                    textcoords="offset points",
                )
        panel.axvline(0, color="grey", linewidth=0.8)
        panel.axhline(0, color="grey", linewidth=0.8)
        panel.set_xlabel("change on text of the calibration's kind (nats)")
        panel.set_ylabel("change on text of another kind (nats)")
        panel.legend(frameon=False)
        figure.suptitle("Beside each point: the share of calibration text that the model wrote")
    return file


def _panel(panel: Any, rows: list[Row], variants: list[str], size: float) -> None:
    for place, variant in enumerate(variants):
        for row in (row for row in rows if row.variant == variant):
            panel.errorbar(
                row.change, place, xerr=row.standard_error, fmt="o", color="C0", capsize=2, ms=4
            )
            if row.control is not None:
                panel.plot(row.control, place, "x", color="C1")
    if max(abs(row.change) for row in rows) > 1:
        # Logarithmic beyond 0.1: what destroys a model would hide all else.
        panel.set_xscale("symlog", linthresh=0.1)
    else:
        panel.locator_params(axis="x", nbins=4)
    panel.axvline(0, color="grey", linewidth=0.8)
    panel.set_yticks(range(len(variants)), variants)
    panel.set_title(f"{size:g} kept (x: control)")
    panel.grid(axis="x", alpha=0.3)


def main() -> None:
    """Run, print or draw."""
    parser, run = commands(__doc__, RESULTS, "table", "plot")
    run.add_argument("models", nargs="+", choices=MODELS)
    run.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    run.add_argument("--variants", nargs="+", choices=[*VARIANTS], default=[*VARIANTS])
    run.add_argument("--sizes", nargs="+", type=float, default=[0.9, 0.8, 0.7, 0.5])
    options = parsed(parser)
    if options.command == "run":
        runner = Runner(options.results)
        for name in options.models:
            for seed in options.seeds:
                runner.run(name, seed, options.variants, options.sizes)
    rows = read_rows(options.results, Row)
    if options.command == "plot":
        drawn = [*draw(rows, figures.FOLDER), draw_predictions(rows, figures.FOLDER)]
        own_text = draw_own_text(rows, figures.FOLDER)
        for file in drawn if own_text is None else [*drawn, own_text]:
            print(file)
    else:
        print_tables(rows)


if __name__ == "__main__":
    main()
