"""Where a user's data and functions come from: one small reader for each kind of file.

Readers only open and check; nothing here knows of models or tasks.
"""

from rankfold.sources.arrays import read_npz
from rankfold.sources.images import read_image_folder
from rankfold.sources.kind import source_kind
from rankfold.sources.python_object import is_spec, load_object
from rankfold.sources.text import read_text, token_windows

__all__ = [
    "is_spec",
    "load_object",
    "read_image_folder",
    "read_npz",
    "read_text",
    "source_kind",
    "token_windows",
]
