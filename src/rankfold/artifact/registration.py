"""Tells transformers how to open what rankfold saves, once transformers is there to be told.

Importing the part of transformers that keeps the list of methods takes as long as importing torch,
so ``import rankfold`` does not: it waits for that part to be imported by whoever needs it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_LIST_OF_METHODS = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Make ``from_pretrained`` open artifacts, now or when transformers is imported."""
    if _LIST_OF_METHODS in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Waiting())


def _register() -> None:
    # A transformers without such a list must still import. It refuses artifacts by itself.
    if hasattr(sys.modules[_LIST_OF_METHODS], "register_quantizer"):
        importlib.import_module(
            "rankfold.artifact.from_pretrained"
        )  # at import it registers itself


class _Waiting(MetaPathFinder):
    """Finds nothing itself; registers after the list of methods has been imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Python's question where a module is; answered for one module, once."""
        if fullname != _LIST_OF_METHODS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
