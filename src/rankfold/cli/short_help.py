"""``--help`` shows the everyday options, ``--help-all`` all of them."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

import typer
from typer.core import TyperCommand

_ALL = "rankfold.help_all"


def _show_all(context: typer.Context, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        context.meta[_ALL] = True
        typer.echo(context.get_help())
        raise typer.Exit


HelpAll: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--help-all", is_eager=True, callback=_show_all, help="Show all options and exit."
    ),
]


class ShortHelp(TyperCommand):
    """A command whose help leaves out the options of all panels but the first."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Show the help; what it leaves out is hidden meanwhile."""
        others = [one for one in self.params if getattr(one, "rich_help_panel", None)]
        left_out: list[Any] = [one for one in others if not getattr(one, "hidden", False)]
        if ctx.meta.get(_ALL):
            left_out = []
        for one in left_out:
            one.hidden = True
        try:
            super().format_help(ctx, formatter)
        finally:
            for one in left_out:
                one.hidden = False
