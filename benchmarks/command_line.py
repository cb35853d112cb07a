"""What the benchmarks' command lines have in common: ``run``, and commands that show the rows."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch

from rankfold.machine.freed_memory import give_back_freed_memory


def commands(
    doc: str | None,
    results: Path,
    *others: str,
    threads: int = 2,
    prog: str | None = None,
) -> tuple[ArgumentParser, ArgumentParser]:
    """A parser, and that of its command ``run`` for further options.

    Args:
        doc: The module's docstring, whose first line describes the program.
        results: Where the rows are, unless ``--results`` says otherwise.
        others: Commands beside ``run``.
        threads: Of ``run``, unless ``--threads`` says otherwise.
        prog: The program's name, where it isn't the file's.
    """
    parser = ArgumentParser(prog=prog, description=(doc or "").partition("\n")[0])
    added = parser.add_subparsers(dest="command", required=True)
    run = added.add_parser("run")
    run.add_argument("--threads", type=int, default=threads)
    run.add_argument("--device", default="cpu", help="cpu or cuda (memory: cpu)")
    for command in (run, *(added.add_parser(name) for name in others)):
        command.add_argument("--results", type=Path, default=results)
    return parser, run


def parsed(parser: ArgumentParser) -> Namespace:
    """The options; a process that is to ``run`` is made ready for it."""
    options = parser.parse_args()
    if options.command == "run":
        torch.set_num_threads(options.threads)
        torch.backends.cudnn.allow_tf32 = False  # float32 is the CPU's, for convs as for the rest
        give_back_freed_memory()
    return options
