"""Where a user's data and functions come from: one small reader for each kind of file.

Readers only open and check; nothing here knows of models or tasks.
"""

from rankfold.data.sources.arrays import read_npz
from rankfold.data.sources.arrow import class_names
from rankfold.data.sources.class_folders import ClassFolder
from rankfold.data.sources.conversations import (
    Message,
    assistant_spans,
    check_written,
    checked_messages,
)
from rankfold.data.sources.images import (
    DEFAULT_SIZE,
    ImagePreparation,
    ImageReader,
    TableImages,
    image_reader,
    read_image_folder,
)
from rankfold.data.sources.kind import Kind, source_kind
from rankfold.data.sources.python_object import is_spec, load_object
from rankfold.data.sources.records import Record, Records, column, numbers, read_records
from rankfold.data.sources.registry import read_registered, register_source, registered_source
from rankfold.data.sources.sounds import SoundPreparation, read_wav_folder
from rankfold.data.sources.text import read_text, text_lines, token_windows

__all__ = [
    "DEFAULT_SIZE",
    "ClassFolder",
    "ImagePreparation",
    "ImageReader",
    "Kind",
    "Message",
    "Record",
    "Records",
    "SoundPreparation",
    "TableImages",
    "assistant_spans",
    "check_written",
    "checked_messages",
    "class_names",
    "column",
    "image_reader",
    "is_spec",
    "load_object",
    "numbers",
    "read_image_folder",
    "read_npz",
    "read_records",
    "read_registered",
    "read_text",
    "read_wav_folder",
    "register_source",
    "registered_source",
    "source_kind",
    "text_lines",
    "token_windows",
]
