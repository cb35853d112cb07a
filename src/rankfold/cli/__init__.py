"""The command line."""

from rankfold.cli.app import app
from rankfold.cli.certify import certify as certify
from rankfold.cli.commands import main
from rankfold.cli.report import report as report
from rankfold.cli.verify import verify as verify

__all__ = ["app", "main"]
