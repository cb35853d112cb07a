"""``rankfold lossless``."""

from __future__ import annotations

from functools import partial
from typing import Annotated, cast, get_args

import typer

from rankfold.certificate.asked import DEFAULT_MARGIN, check_margin
from rankfold.cli.app import DONE, NOT_FOUND, command
from rankfold.cli.options import Compressing, ModelArgument, margin_option
from rankfold.cli.setting_options import completing
from rankfold.errors import InputError
from rankfold.settings import SizeOf, check_size


@command(needs="rankfold.cli.compressing", repeats=True)
def lossless(
    model: ModelArgument,
    *,
    size: Annotated[
        float,
        typer.Option(help="Share kept of the whole model's parameters: 0.9 keeps 90 %."),
    ],
    size_of: Annotated[
        str,
        typer.Option(
            help="What the size is a share of: model, or factorizable, the layers that can be "
            "factorized.",
            rich_help_panel="Search",
            autocompletion=completing(get_args(SizeOf)),
        ),
    ] = "model",
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
    if size_of not in get_args(SizeOf):
        raise InputError(f"--size-of is {size_of!r}; expected model or factorizable.")
    counted = cast("SizeOf", size_of)
    result = compress(
        partial(algorithm, size=size, size_of=counted, margin=margin),
        model,
        options,
        size=size if size_of == "model" else 1,
    )
    return NOT_FOUND if require and not result.certificate.holds else DONE
