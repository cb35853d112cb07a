"""What each part of rankfold is worth: every part switched off in turn, beside the baselines.

    python -m benchmarks.ablation run resnet20 resnet56 smollm2 --seeds 0 1 2
    python -m benchmarks.ablation table
    python -m benchmarks.ablation plot

``run`` appends one JSON line a result to ``benchmarks/out/ablation.jsonl`` and leaves out what is
there already (statistics are kept beside it, in ``statistics``); ``table`` writes the tables of
docs/notebook/ablation.md, ``plot`` draws their figures into docs/figures. Every result goes through
``Preparation.lossless``, as a user's would: the plan is made on selection data, the test examples
are evaluated once. A seed draws the calibration and selection examples; the test examples stay the
same. Size is the share kept of the weights in the layers that can be factorized, or ``compact`` for
the smallest that rankfold finds within its default margin. A language model
is also tested on text of another kind (``pydoc_data.topics``), none of which is in its calibration.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks import figures
from benchmarks.ablation_report import (
    DOCUMENT,
    draw,
    draw_own_text,
    draw_predictions,
    tables,
)
from benchmarks.ablation_runs import MODELS, VARIANTS, Row, Runner
from benchmarks.command_line import commands, parsed
from benchmarks.documents import write_tables
from benchmarks.rows import read_rows

RESULTS = Path(__file__).parent / "out" / "ablation.jsonl"
# Rows by other code than those of the main tables, earlier and later; what differs stands in
# docs/notebook/ablation.md.
EARLIER, SHRINKAGE = (RESULTS.with_name(f"ablation_{n}.jsonl") for n in ("earlier", "shrinkage"))


def size_or_compact(text: str) -> float | None:
    """A size, or None for ``compact``."""
    return None if text == "compact" else float(text)


def rows_apart(file: Path) -> list[Row]:
    """Rows of a file whose tables stand apart, under the model's name and the file's."""
    suffix = file.stem.removeprefix(RESULTS.stem)
    return [replace(row, model=f"{row.model}{suffix}") for row in read_rows(file, Row)]


def main() -> None:
    """Run, print or draw."""
    parser, run = commands(__doc__, RESULTS, "table", "plot")
    run.add_argument("models", nargs="+", choices=MODELS)
    run.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    run.add_argument("--variants", nargs="+", choices=[*VARIANTS], default=[*VARIANTS])
    run.add_argument("--sizes", nargs="+", type=size_or_compact, default=[0.9, 0.8, 0.7, 0.5])
    options = parsed(parser)
    if options.command == "run":
        runner = Runner(options.results, options.device)
        for name in options.models:
            for seed in options.seeds:
                runner.run(name, seed, options.variants, options.sizes)
    rows = read_rows(options.results, Row)
    if options.command == "plot":
        drawn = draw([*rows, *rows_apart(EARLIER)], figures.FOLDER)
        drawn.append(draw_predictions(rows, figures.FOLDER))
        own_text = draw_own_text(rows, figures.FOLDER)
        for file in drawn if own_text is None else [*drawn, own_text]:
            print(file)
    elif options.command == "table":
        write_tables(DOCUMENT, tables([*rows, *rows_apart(EARLIER), *rows_apart(SHRINKAGE)]))
        print(DOCUMENT)
    else:
        found = tables(rows)
        for name in options.models:
            print(f"\n{name}\n\n{found.get(f'ablation {name}', 'nothing is measured')}")


if __name__ == "__main__":
    main()
