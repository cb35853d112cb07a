"""``rankfold compact``."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from rankfold.certificate.asked import DEFAULT_MARGIN, check_margin
from rankfold.cli.app import DONE, NOT_FOUND, command, tell
from rankfold.cli.options import Compressing, ModelArgument, margin_option


@command(needs="rankfold.cli.compressing", repeats=True)
def compact(
    model: ModelArgument,
    *,
    save_anyway: Annotated[
        bool,
        typer.Option(
            "--save-anyway",
            help="Save the best model seen also where none is found.",
            rich_help_panel="Output",
        ),
    ] = False,
    margin: Annotated[float, margin_option()] = DEFAULT_MARGIN,
    certified: Annotated[
        bool,
        typer.Option(
            "--certified",
            help="Test all sizes tried, mild to strong, until one fails; keep the smallest shown.",
            rich_help_panel="Certificate",
        ),
    ] = False,
    options: Compressing,
) -> int:
    """The smallest model that is shown to be no worse than the margin allows."""
    from rankfold.cli.compressing import compress
    from rankfold.compress import compact as algorithm

    check_margin(margin)
    result = compress(
        partial(algorithm, margin=margin, certified=certified),
        model,
        options,
        saved=lambda made: made.found or save_anyway,
    )
    if result.found:
        return DONE
    tell(
        f"no smaller model is shown to be within the margin of {margin:g}"
        + ("" if save_anyway else "; nothing was saved (--save-anyway saves the best one seen)")
    )
    return NOT_FOUND
