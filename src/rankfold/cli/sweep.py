"""``rankfold sweep``."""

from __future__ import annotations

from typing import Annotated

import typer

from rankfold.certificate.asked import DEFAULT_MARGIN
from rankfold.cli.app import command
from rankfold.cli.options import (
    Compressing,
    ModelArgument,
    SizeOfOption,
    margin_option,
    read_size_of,
)


@command(needs="rankfold.cli.sweeping")
def sweep(
    model: ModelArgument,
    *,
    sizes: Annotated[
        str,
        typer.Option(help="Shares kept of the whole model's parameters: 0.95,0.9,0.8."),
    ],
    size_of: SizeOfOption = "model",
    margin: Annotated[float, margin_option("Certificate")] = DEFAULT_MARGIN,
    options: Compressing,
) -> int:
    """Several sizes of one model, largest first: a folder each, one page, one statement."""
    from rankfold.cli.sweeping import swept

    return swept(model, sizes, read_size_of(size_of), margin, options)
