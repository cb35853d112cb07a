"""The command line."""

from rankfold.cli.app import app
from rankfold.cli.commands import main
from rankfold.cli.compare import compare as compare
from rankfold.cli.report import report as report
from rankfold.cli.sweep import sweep as sweep

__all__ = ["app", "main"]
