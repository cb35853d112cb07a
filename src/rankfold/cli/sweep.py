"""``rankfold sweep``."""

from __future__ import annotations

from typing import Annotated, cast, get_args

import typer

from rankfold.certificate.asked import DEFAULT_MARGIN
from rankfold.cli.app import command
from rankfold.cli.options import Compressing, ModelArgument, margin_option
from rankfold.cli.setting_options import completing
from rankfold.errors import InputError
from rankfold.settings import SizeOf


@command(needs="rankfold.cli.sweeping")
def sweep(
    model: ModelArgument,
    *,
    sizes: Annotated[
        str,
        typer.Option(help="Shares kept of the whole model's parameters: 0.95,0.9,0.8."),
    ],
    size_of: Annotated[
        str,
        typer.Option(
            help="What the sizes are shares of: model, or factorizable, the layers that can be "
            "factorized.",
            rich_help_panel="Search",
            autocompletion=completing(get_args(SizeOf)),
        ),
    ] = "model",
    margin: Annotated[float, margin_option("Certificate")] = DEFAULT_MARGIN,
    options: Compressing,
) -> int:
    """Several sizes of one model, largest first: a folder each, one page, one statement."""
    from rankfold.cli.sweeping import swept

    if size_of not in get_args(SizeOf):
        raise InputError(f"--size-of is {size_of!r}; expected model or factorizable.")
    return swept(model, sizes, cast("SizeOf", size_of), margin, options)
