"""What an artifact records of its model's inputs and embeddings, and what must agree with it."""

from __future__ import annotations

from pathlib import Path

from rankfold.artifact.manifest import MANIFEST_FILE, read_manifest
from rankfold.data.account import Account
from rankfold.data.input_settings import InputSettings, refuse_other
from rankfold.errors import InputError, visible
from rankfold.integrations.sentence_folder import MODULES_FILE, sentence_folder
from rankfold.tasks.pooling import MEAN, Pooling


def recorded_inputs(folder: str | Path) -> InputSettings:
    """What an artifact's data was made with; nothing where an earlier version recorded none.

    Raises:
        ArtifactError: Not an artifact, or damaged.
    """
    return InputSettings.from_dict(read_manifest(Path(folder)).get("input_settings", {}))


def check_read_alike(folder: Path, data: object) -> None:
    """Refuse data that rankfold has read in another way than an artifact records.

    Args:
        folder: The artifact.
        data: What was read; nothing is known of how a user's own code made it.

    Raises:
        InputError: Says what is recorded and what was found.
    """
    account = getattr(data, "account", None)
    if isinstance(account, Account):
        refuse_other(recorded_inputs(folder), account.inputs, folder)


def recorded_pooling(folder: Path) -> Pooling | None:
    """How an artifact's folder makes embeddings of hidden states, None where it says nothing.

    Raises:
        InputError: It is not what was recorded when the folder was saved.
    """
    sentences, recorded = sentence_folder(folder), recorded_inputs(folder).pooling
    found = None if sentences is None else sentences.pooling()
    names = (found or MEAN).names
    if recorded is not None and names != recorded:
        raise InputError(
            f"{visible(folder)} makes an embedding by {', '.join(names)} ({MODULES_FILE}), and was "
            f"made with {', '.join(recorded)} ({MANIFEST_FILE}, input_settings). A file is missing "
            "or was changed: save or copy the folder again."
        )
    return found
