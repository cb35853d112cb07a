"""What ``verify`` does: open artifact, original and data, and compute the certificate again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rankfold.certificate.document import read_document
from rankfold.cli.app import as_options
from rankfold.cli.inputs import unchanged
from rankfold.cli.open import gives_module, open_artifact, open_examples, open_model
from rankfold.cli.options import Reading
from rankfold.cli.recorded import as_recorded
from rankfold.data.parts import PARTS
from rankfold.errors import InputError
from rankfold.files.digests import model_digest
from rankfold.machine.device import check_device
from rankfold.machine.progress import TerminalProgress
from rankfold.verify import Verification
from rankfold.verify import verification_lines as verification_lines
from rankfold.verify import verify as verify_artifact


def verified(
    folder: Path,
    data: str,
    options: Reading,
    *,
    model: str | None,
    weights: Path | None,
    guard: str | None,
    key: Path | None,
    task: str | None,
    batch_size: int | None,
) -> Verification:
    """What was found; arguments are the command's.

    Raises:
        InputError: Names what can't be opened.
    """
    device = check_device(options.device)
    # A class of the user's own is needed to open the artifact at all.
    own = model if model is not None and gives_module(model) else None
    if model is None and weights is not None:
        raise InputError("--weights goes with --model; give both, or none of them.")
    given = unchanged(artifact=folder, models=[model], weights=weights, data=[data, guard])
    # Other weights than the certified ones are what it is to find and name.
    opened = open_artifact(folder, own, as_saved=False)
    original = None if model is None else open_model(model, weights, to_be_filled=True).model
    if own is not None and weights is None and original is not None:
        # Without its weights a function may give any: only certified ones are an original.
        stated = read_document(folder)["models"].get("original")
        original = original if model_digest(original) == stated else None
    opened.model.to(device)
    if original is not None:
        original.to(device)
    reading = as_recorded(folder, options.data_options(task), original=True)
    found = verify_artifact(
        folder,
        opened.model,
        open_examples(data, opened, reading, part=PARTS.index("held_out")),
        original=original,
        guard=None if guard is None else open_examples(guard, opened, reading, beside=True),
        key=key,
        batch_size=batch_size,
        progress=TerminalProgress(),
    )
    given.check()
    checks = tuple(replace(one, detail=as_options(one.detail)) for one in found.checks)
    return replace(found, checks=checks)
