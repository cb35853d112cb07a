"""rankfold: low-rank factorization of trained networks, proved on held-out data."""

from importlib.metadata import version

import rankfold.machine.interruption  # noqa: F401  (the first: what follows takes seconds)

# isort: split
from rankfold.artifact.load import load
from rankfold.artifact.recorded import recorded_inputs
from rankfold.artifact.registration import register_with_transformers
from rankfold.artifact.save import try_saving
from rankfold.certificate.certify import Certificate
from rankfold.collect import merge_statistics, save_statistics
from rankfold.compress import Preparation, compact, lossless, prepare
from rankfold.data.input_settings import InputSettings
from rankfold.data.parts import Data
from rankfold.data.sources import register_source
from rankfold.errors import ArtifactError, InputError
from rankfold.export.export import Exported, export
from rankfold.forms.low_rank.modules import LowRankConv2d, LowRankLinear
from rankfold.machine.progress import TerminalProgress
from rankfold.result import Result
from rankfold.settings import Settings
from rankfold.tasks.evaluation import Metric
from rankfold.verify import verify

__version__ = version("rankfold")

register_with_transformers()

__all__ = [
    "ArtifactError",
    "Certificate",
    "Data",
    "Exported",
    "InputError",
    "InputSettings",
    "LowRankConv2d",
    "LowRankLinear",
    "Metric",
    "Preparation",
    "Result",
    "Settings",
    "TerminalProgress",
    "compact",
    "export",
    "load",
    "lossless",
    "merge_statistics",
    "prepare",
    "recorded_inputs",
    "register_source",
    "save_statistics",
    "try_saving",
    "verify",
]
