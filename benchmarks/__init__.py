"""What rankfold is measured on, and the commands that print every number the documentation states.

Nothing here is installed with the package. The data lie in ``../shared/data`` beside the
repository, or under the folder that the environment variable ``RANKFOLD_SHARED`` names.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path


def shared_data() -> Path:
    """The folder of the shared data sets and trained nets.

    Raises:
        FileNotFoundError: There is none.
    """
    default = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("RANKFOLD_SHARED", default)) / "data"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no benchmark data in {folder}: set RANKFOLD_SHARED to the folder that holds data/"
        )
    return folder


def package_folder(package: str, install: str) -> Path:
    """The folder of an installed package, found without running its code.

    Args:
        package: Its name.
        install: What pip installs it by.

    Raises:
        FileNotFoundError: It isn't installed.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"pip install --no-deps {install}")
    return Path(spec.submodule_search_locations[0])
