"""``file.py:function`` or ``package.module:function``: the user's own code, asked for by name."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

from rankfold.errors import InputError

USER_MODULE = "rankfold_user_"  # before the name of a module that a file was imported as
_FILE = re.compile(r"(?s)^(?P<place>.+\.py):(?P<name>[A-Za-z_]\w*)$")
_MODULE = re.compile(r"^(?P<place>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_]\w*)$")


def is_spec(text: str) -> bool:
    """Whether the text has the form ``file.py:function`` or ``package.module:function``."""
    return bool(_FILE.match(text) or _MODULE.match(text))


def load_object(spec: str) -> object:
    """Import the file or module and return what the name after the colon stands for.

    The folder of a file, or the working folder for a module, is importable meanwhile and after,
    as it is for ``python file.py``.

    Raises:
        InputError: No such file, module or name, or importing it failed.
    """
    match = _FILE.match(spec) or _MODULE.match(spec)
    if match is None:
        raise InputError(f"{spec} is not file.py:function or package.module:function.")
    place, name = match["place"], match["name"]
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    try:
        return getattr(module, name)
    except AttributeError as error:
        public = [key for key in vars(module) if not key.startswith("_")]
        raise InputError(
            f"{place} has no {name}; it defines {', '.join(public[:20]) or 'nothing'}."
        ) from error


def _import_file(file: Path) -> ModuleType:
    if not file.is_file():
        raise InputError(f"no such file: {file}; expected a Python file with the named function.")
    name = f"{USER_MODULE}{file.stem}"
    found = sys.modules.get(name)
    if found is not None and found.__file__ == str(file.resolve()):
        return found  # model and data may come from one file: run it once
    specification = importlib.util.spec_from_file_location(name, file.resolve())
    if specification is None or specification.loader is None:
        raise InputError(f"{file} can't be imported as Python.")
    _importable(file.resolve().parent)
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # so that dataclasses and classes in the file find their module
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise InputError(f"importing {file} failed: {type(error).__name__}: {error}") from error
    return module


def _import_module(name: str) -> ModuleType:
    _importable(Path.cwd())
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise InputError(
            f"importing the module {name} failed: {type(error).__name__}: {error}"
        ) from error


def _importable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
