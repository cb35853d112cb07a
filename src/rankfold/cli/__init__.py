"""The command line."""

from rankfold.cli.commands import app, main

__all__ = ["app", "main"]
