"""The published claim, examined: does a ResNeXt reduced to 30 % of its parameters do better?

    python -m benchmarks.paper_claim run --seeds 0 1 2
    python -m benchmarks.paper_claim table
    python -m benchmarks.paper_claim plot

The net is that of ``benchmarks.resnext``, trained on 40,000 images. The 10,000 images kept aside
are split by a seed into calibration, selection and test; the 1,000 CIFAR-10 test images are a
second test that nobody trained on. Every model of a seed is built from the same statistics and
compared with the dense net on the same images. Objectives that predict the loss go the way of a
user's call: of a first plan and those corrected by measured interactions the best on selection
images. Size is the share kept of the whole model's parameters. Two settings: ``kept`` calibrates
on kept images, ``memorised`` on images that the net was trained on, for contrast; selection and
test are the same kept images in both.

What may explain a gain without any compression stands beside it: ``control``, the dense net moved
by the joint objective's step, or by all of its steps where there are several rounds, and
``temperature``, the dense net with its logits divided by the one number that selection images like
best, which changes no prediction.

``run`` appends one JSON line a result to ``benchmarks/out/paper_claim.jsonl``; a result that is
there already is not measured again. ``table`` writes the tables of
docs/notebook/paper_claim.md from those lines, ``plot`` its figure.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks import figures
from benchmarks.command_line import commands, parsed
from benchmarks.documents import write_tables
from benchmarks.paper_claim_report import DOCUMENT, draw, tables
from benchmarks.paper_claim_runs import SETTINGS, VARIANTS, Runner, row_of
from benchmarks.rows import read_rows

RESULTS = Path(__file__).parent / "out" / "paper_claim.jsonl"
SIZES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)


def main() -> None:
    """Run, write the tables, or draw."""
    parser, run = commands(__doc__, RESULTS, "table", "plot")
    run.add_argument("--settings", nargs="+", choices=SETTINGS, default=[*SETTINGS])
    run.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    run.add_argument("--sizes", nargs="+", type=float, default=[*SIZES])
    labels = [variant.label for variant in VARIANTS]
    run.add_argument("--variants", nargs="+", choices=labels, default=labels)
    options = parsed(parser)
    if options.command == "run":
        runner = Runner(options.results, options.device)
        variants = [v for v in VARIANTS if v.label in options.variants]
        for setting in options.settings:
            for seed in options.seeds:
                runner.run(setting, seed, variants, options.sizes)
        return
    rows = read_rows(options.results, row_of)
    if options.command == "plot":
        print(draw(rows, figures.FOLDER))
    else:
        write_tables(DOCUMENT, tables(rows))
        print(DOCUMENT)


if __name__ == "__main__":
    main()
