"""The field's benchmark: every method on the same data, and what a user gives up with each.

    python -m benchmarks run quality --models resnet20 minilm --sizes 0.9 0.7 0.5 --seeds 0 1
    python -m benchmarks run vision
    python -m benchmarks run speed --models resnet20 --sizes 0.5
    python -m benchmarks run memory --models resnet20 --sizes 0.5
    python -m benchmarks run stages --models minilm --sizes 0.8 0.6 --set effort=fast
    python -m benchmarks run serving --folders dense smaller --python .venv-serving/bin/python
    python -m benchmarks stages
    python -m benchmarks faults
    python -m benchmarks table
    python -m benchmarks plot

``run`` appends one JSON line a result to ``benchmarks/out/field*.jsonl`` and leaves out what is
there already. ``quality`` measures loss, accuracy and sizes, ``vision`` the same on all image
models, ``speed`` latencies beside the dense model's in one run, ``memory`` the peak of a process
that compresses, ``stages`` where the time of a run goes and what came of it, ``serving`` saved
folders in vLLM beside the dense one; ``all`` is quality, speed and memory. The command ``stages``
sets what different states of the code took side by side.
``faults`` injects faults for real and prints how many were survived, ``--times`` of each.
``table`` writes the tables between the markers of README.md, docs/results.md and
docs/notebook/field.md, ``plot`` the figures of docs/figures, from those lines and nothing else.
"""

from __future__ import annotations

import importlib
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

from benchmarks import faults, figures, results_report, serving
from benchmarks.command_line import commands, parsed
from benchmarks.documents import write_tables
from benchmarks.field import RESULTS, Row, Runner
from benchmarks.field_models import FIELD_MODELS, VISION
from benchmarks.field_report import DOCUMENTS, all_tables, draw, draw_ranks
from benchmarks.memory import PRODUCTS, MemoryRow, measure_memory
from benchmarks.methods import METHODS
from benchmarks.results_report import results_tables
from benchmarks.rows import read_rows
from benchmarks.speed import SpeedRow, measure_speed, sibling
from benchmarks.stages import LossRow, StageRow, measure_stages, side_by_side
from rankfold.cli.setting_options import parsed as value_of
from rankfold.settings import setting_options

DTYPES = ("float32", "bfloat16", "float16")
AXES = ("quality", "vision", "speed", "memory", "stages", "all")


def main() -> None:
    """Run, write the tables, or draw."""
    parser, run = commands(
        __doc__, RESULTS, "table", "plot", "stages", threads=1, prog="python -m benchmarks"
    )
    run.add_argument("axis", choices=AXES)
    run.add_argument("--models", nargs="+", choices=[*FIELD_MODELS])
    known = [*METHODS, *PRODUCTS]
    run.add_argument("--methods", nargs="+", choices=known, default=known)
    run.add_argument("--sizes", nargs="+", type=float, default=[0.9, 0.7, 0.5])
    run.add_argument("--seeds", nargs="+", type=int, default=[0])
    run.add_argument("--calibration", type=int, help="examples, in place of the model's own number")
    run.add_argument("--test", type=int, help="held-out examples, for a quick look")
    run.add_argument("--dtype", default="float32", choices=DTYPES, help="that speed is measured in")
    run.add_argument("--set", nargs="+", default=[], help="of stages: settings, name=value")
    if sys.argv[1:3] == ["run", "serving"]:
        serving.main(sys.argv[3:])
        return
    if sys.argv[1:2] == ["faults"]:
        _faults(sys.argv[2:])
        return
    options = parsed(parser)
    if options.command == "run":
        _run(options)
        return
    if options.command == "stages":
        stages = read_rows(sibling(options.results, "stages"), StageRow)
        losses = read_rows(sibling(options.results, "stages_losses"), LossRow)
        print("\n".join(side_by_side(stages, losses)))
        return
    rows = read_rows(options.results, Row)
    if options.command == "table":
        speed = read_rows(sibling(options.results, "speed"), SpeedRow)
        memory = read_rows(sibling(options.results, "memory"), MemoryRow)
        tables = {**all_tables(rows, speed, memory), **results_tables(rows, speed)}
        for document in [*DOCUMENTS, *results_report.DOCUMENTS]:
            write_tables(document, tables)
            print(document)
    else:
        for file in [*draw(rows, figures.FOLDER), *draw_ranks(rows, figures.FOLDER)]:
            print(file)


def _faults(words: Sequence[str]) -> None:
    parser = ArgumentParser(prog="python -m benchmarks faults", description=faults.__doc__)
    parser.add_argument("--times", type=int, help="of each, in place of its own number")
    parser.add_argument("--names", nargs="+", default=(), help="of the faults, by default all")
    options = parser.parse_args(words)
    for one in ("documents", "edits", "commands", "hostile"):
        importlib.import_module(f"benchmarks.faults_{one}")  # they register their faults
    lines, survived = faults.table(options.times, options.names)
    print("\n".join(lines))
    print("all survived" if survived else "NOT all survived")
    sys.exit(not survived)


def _run(options: Namespace) -> None:
    models = options.models or (VISION if options.axis == "vision" else ["resnet20"])
    quality = options.axis in ("quality", "vision", "all")
    runner = Runner(options.results, options.device) if quality else None
    methods = [method for method in options.methods if method in METHODS]
    for name in models:
        for seed in options.seeds:
            if runner is not None:
                runner.run(name, seed, methods, options.sizes, options.calibration, options.test)
            if options.axis in ("speed", "all"):
                measure_speed(
                    options.results,
                    name,
                    seed,
                    methods,
                    options.sizes,
                    options.device,
                    options.dtype,
                    options.calibration,
                )
            if options.axis == "stages":
                given = (options.sizes, options.threads, options.calibration)
                measure_stages(options.results, name, seed, *given, **_settings(options.set))
            if options.axis in ("memory", "all"):
                measure_memory(
                    options.results,
                    name,
                    seed,
                    options.methods,
                    options.sizes,
                    options.threads,
                    options.calibration,
                )


def _settings(given: Sequence[str]) -> dict[str, Any]:
    """Settings as the command line's ``--set`` takes them."""
    assigned = (one.partition("=") for one in given)
    return {name: value_of(setting_options()[name], text) for name, _, text in assigned}


if __name__ == "__main__":
    main()
