"""The kinds of fault that are looked for: of each the invariant, and the files that test it.

A file tests more cases than are listed here: what is listed is where to add one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

TESTS = Path(__file__).parent
FEWEST = 3  # tests, or rows of tables, of a kind


class Kind(NamedTuple):
    """A kind of fault.

    Attributes:
        invariant: What holds in place of it.
        files: That test it, below ``tests``.
    """

    invariant: str
    files: tuple[str, ...]


KINDS = {
    "padding": Kind(
        "padding is no text: neither copied, nor scored, nor read",
        ("data/test_copies.py", "tasks/test_tokens_as_meant.py",
         "integrations/test_padding_side.py"),
    ),
    "missing weights": Kind(
        "an opened model has every weight of its files and no other",
        ("integrations/test_as_asked.py", "artifact/test_weights_file.py"),
    ),
    "loaders": Kind("what a loader yields is what counts", ("data/test_given.py",)),
    "labels": Kind("one rule says which class a label is", ("data/test_labels.py",)),
    "records": Kind("records in = records used + records named", ("data/test_read_records.py",)),
    "targets": Kind(
        "what reaches a model is what its own library makes for training",
        ("integrations/test_what_reaches_the_model.py", "data/test_library_tokens.py",
         "integrations/test_sentencepiece.py"),
    ),
    "types": Kind("labels, masks and positions keep their type", ("tasks/test_dtypes.py",)),
    "last token": Kind("a text's loss is that of the text alone", ("tasks/test_last_token.py",)),
    "hooks": Kind("what a user put on a layer stays on it", ("model/test_of_user.py",)),
    "images": Kind(
        "an image is read as it looks, and prepared as the processor says but for what is given",
        ("data/test_pictures.py", "integrations/test_processors.py"),
    ),
    "what belongs to a folder": Kind(
        "what made the inputs is recorded, goes along, and is used again",
        ("integrations/test_folder_goes_along.py", "integrations/test_sentence_folder.py",
         "artifact/test_settings_recorded.py"),
    ),
    "units": Kind(
        "what an example is, how many and how long, is told", ("data/test_accounts.py",)
    ),
    "other kinds of data": Kind("a verdict names what it is about", ("search/test_guard.py",)),
    "Python data": Kind("what default_collate takes is taken, or named", ("data/test_example.py",)),
    "fused paths": Kind(
        "the fast path gives what the slow one gives", ("model/test_fast_paths.py",)
    ),
    "lengths": Kind(
        "a model runs on its default length and on its longest", ("integrations/test_lengths.py",)
    ),
    "names": Kind(
        "a name is shown as it is, and matches itself",
        ("cli/test_names.py", "cli/test_hostile_names.py"),
    ),
    "templates": Kind(
        "what is learned is what the assistant says", ("data/test_conversations.py",)
    ),
    "saving": Kind(
        "what can't be saved ends before the work", ("artifact/test_saving_tried_before.py",)
    ),
    "what draws": Kind("what is computed twice is the same", ("tasks/test_repeated.py",)),
    "messages": Kind(
        "a message names what was met; an option is used, or refused by name",
        ("cli/test_bad_input.py", "test_bad_python.py", "cli/test_unused_options.py",
         "integrations/test_other_folders.py", "model/test_unsuitable.py"),
    ),
}  # fmt: skip


def test_there_are_twenty_one_kinds() -> None:
    assert len(KINDS) == 21


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_its_tests(kind: str) -> None:
    lacking = [name for name in KINDS[kind].files if not (TESTS / name).is_file()]
    assert not lacking
    found = "".join((TESTS / name).read_text(encoding="utf-8") for name in KINDS[kind].files)
    assert len(re.findall(r"^def test_", found, re.MULTILINE)) >= FEWEST
