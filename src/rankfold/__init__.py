"""rankfold: low-rank factorization of trained networks, proved on held-out data."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

import rankfold.machine.interruption  # noqa: F401  (the first: what a command imports takes time)

# isort: split
from rankfold.artifact.registration import register_with_transformers

if TYPE_CHECKING:
    from rankfold.artifact.load import load
    from rankfold.artifact.recorded import recorded_inputs
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
    from rankfold.result import Result, Sweep
    from rankfold.settings import Settings
    from rankfold.sweep import sweep
    from rankfold.tasks.evaluation import Metric
    from rankfold.verify import verify

    __version__: str

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
    "Sweep",
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
    "sweep",
    "try_saving",
    "verify",
]

# Where each public name is defined: it is imported when it is first asked for, since torch takes
# seconds. A test compares it with the imports above.
_MODULES = {
    "ArtifactError": "errors",
    "Certificate": "certificate.certify",
    "Data": "data.parts",
    "Exported": "export.export",
    "InputError": "errors",
    "InputSettings": "data.input_settings",
    "LowRankConv2d": "forms.low_rank.modules",
    "LowRankLinear": "forms.low_rank.modules",
    "Metric": "tasks.evaluation",
    "Preparation": "compress",
    "Result": "result",
    "Settings": "settings",
    "Sweep": "result",
    "TerminalProgress": "machine.progress",
    "compact": "compress",
    "export": "export.export",
    "load": "artifact.load",
    "lossless": "compress",
    "merge_statistics": "collect",
    "prepare": "compress",
    "recorded_inputs": "artifact.recorded",
    "register_source": "data.sources",
    "save_statistics": "collect",
    "sweep": "sweep",
    "try_saving": "artifact.save",
    "verify": "verify",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        value: object = version("rankfold")
    elif name in _MODULES:
        value = getattr(import_module(f"rankfold.{_MODULES[name]}"), name)
    else:
        raise AttributeError(f"module 'rankfold' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


class _Package(ModuleType):
    """``rankfold.export`` and ``rankfold.verify`` are functions, and packages too.

    Python sets a package as an attribute of the one that holds it when it is imported: here the
    functions stay.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
