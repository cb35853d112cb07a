"""The command line."""

from rankfold.cli.app import app
from rankfold.cli.commands import main
from rankfold.cli.report import report as report
from rankfold.cli.statistics import merge_statistics as merge_statistics
from rankfold.cli.statistics import statistics as statistics

__all__ = ["app", "main"]
