"""Errors."""
import importlib
from types import ModuleType
class InputError(ValueError):
    """x"""
def require(module: str, extra: str) -> ModuleType:
    return importlib.import_module(module)
