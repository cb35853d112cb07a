"""The command line."""

from rankfold.cli.app import app
from rankfold.cli.commands import main
from rankfold.cli.report import report as report

__all__ = ["app", "main"]
