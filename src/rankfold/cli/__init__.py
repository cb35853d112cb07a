"""The command line."""

from rankfold.cli.app import app
from rankfold.cli.commands import main

__all__ = ["app", "main"]
