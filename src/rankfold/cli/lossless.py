"""``rankfold lossless``."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from rankfold.certificate.asked import DEFAULT_MARGIN, check_margin
from rankfold.cli.app import DONE, NOT_FOUND, command
from rankfold.cli.options import (
    Compressing,
    ModelArgument,
    SizeOfOption,
    margin_option,
    read_size_of,
)
from rankfold.cli.setting_options import completing
from rankfold.errors import InputError
from rankfold.settings import check_size


@command(needs="rankfold.cli.compressing", repeats=True)
def lossless(
    model: ModelArgument,
    *,
    size: Annotated[
        float,
        typer.Option(help="Share kept of the whole model's parameters: 0.9 keeps 90 %."),
    ],
    size_of: SizeOfOption = "model",
    require: Annotated[
        str | None,
        typer.Option(
            help="lossless ends with exit code 3 where the certificate doesn't hold.",
            show_default="exit code 0 then, too",
            rich_help_panel="Output",
            autocompletion=completing(["lossless"]),
        ),
    ] = None,
    margin: Annotated[float, margin_option("Certificate")] = DEFAULT_MARGIN,
    options: Compressing,
) -> int:
    """The best model of a given size, with the verdict of held-out data."""
    from rankfold.cli.compressing import compress
    from rankfold.compress import lossless as algorithm

    check_size(size)
    check_margin(margin)
    if require not in (None, "lossless"):
        raise InputError(f"--require is {require!r}; expected lossless.")
    counted = read_size_of(size_of)
    result = compress(
        partial(algorithm, size=size, size_of=counted, margin=margin),
        model,
        options,
        size=size if size_of == "model" else 1,
    )
    return NOT_FOUND if require and not result.certificate.holds else DONE
