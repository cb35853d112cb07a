"""Every field of both JSON files of an artifact, edited by a careless and a careful hand.

The careless one edits a value and nothing else. The careful one puts right all that follows from
the files themselves: digests, texts, the model card, and the same value in the other file. Survived
means: ``rankfold verify`` refuses the folder, differs, or names the field as not checked; and where
the folder is signed, every edit is found by the signature.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor, nn

import rankfold
from benchmarks.faults import Counts, register_fault
from rankfold.artifact.manifest import MANIFEST_FILE, WEIGHTS_FILE, artifact_digest, read_report
from rankfold.certificate.document import (
    JSON_FILE,
    document_digest,
    evidence_digest,
    read_document,
    text_lines,
)
from rankfold.certificate.signature import checked_signature
from rankfold.errors import InputError
from rankfold.files.digests import json_digest
from rankfold.files.tensors import read_tensors
from rankfold.report.model_card import CARD_FILE, model_card
from rankfold.verify import verify
from rankfold.verify.files import file_checks
from rankfold.verify.report import NOT_TRACED, report_checks

FILES = (MANIFEST_FILE, JSON_FILE)
KINDS = ("changed", "null", "removed")
SAME = (  # places in rankfold.json, and where certificate.json has the same
    ("algorithm", "run.algorithm"), ("task", "run.task"), ("settings", "run.settings"),
    ("ratio", "run.ratio"), ("versions", "run.versions"), ("data", "data.parts"),
    ("model.class", "models.class"), ("target.margin", "certificate.margin"),
    ("target.margin", "statement.margin"), ("loss.unit", "certificate.unit"),
    ("loss.change", "certificate.change"), ("loss.standard_error", "certificate.standard_error"),
    ("certificate", "certificate"),
)  # fmt: skip
MARGINS = ("statement.margin", "certificate.margin", "target.margin")

Steps = tuple[Any, ...]


class Edit(NamedTuple):
    """What is done to one place of a file: changed, made null, removed, or a field added to it."""

    file: str
    steps: Steps
    kind: str

    @property
    def place(self) -> str:
        """As the list of what is not traced names it: without the numbers of list elements."""
        return place_of(self.steps)


def place_of(steps: Steps) -> str:
    text = "".join("[]" if isinstance(step, int) else f".{step}" for step in steps)
    return text.removeprefix(".")


@dataclass(frozen=True)
class Made:
    """A folder that is whole, with what verifies it.

    Attributes:
        folder: The artifact, signed.
        model: As loaded.
        held_out: The data.
        key: The public key.
    """

    folder: Path
    model: nn.Module
    held_out: object
    key: Path


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3)
    )


def _examples(count: int, seed: int) -> list[tuple[Tensor, int]]:
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(count, 8, generator=draw)
    return [(value, int(value[:3].argmax())) for value in values]


def held_out() -> list[tuple[Tensor, int]]:
    """The held-out examples of ``make``, for the command line."""
    return _examples(24, 3)


def parts() -> rankfold.Data:
    """The data of ``make``, for the command line."""
    return rankfold.Data(_examples(24, 1), _examples(24, 2), held_out())


def make(root: Path) -> Made:
    """A small certified and signed artifact."""
    key = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    pem, public = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    (root / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    (root / "public.pem").write_bytes(key.public_key().public_bytes(pem, public))
    data = parts()
    result = rankfold.lossless(net(), data, size=0.6)
    folder = result.save(root / "made", sign=root / "key.pem")
    return Made(folder, rankfold.load(folder, net()), data.held_out, root / "public.pem")


def edits(folder: Path) -> Iterator[Edit]:
    """Every value of both files in every kind, and in every object a field more."""
    for file in FILES:
        whole = json.loads((folder / file).read_text())
        for steps, value in _places(whole):
            if isinstance(value, dict):
                yield Edit(file, steps, "added")
            if steps:
                kinds = KINDS if not isinstance(value, dict | list) else ("null", "removed")
                yield from (Edit(file, steps, kind) for kind in kinds)


def _places(value: object, steps: Steps = ()) -> Iterator[tuple[Steps, object]]:
    yield steps, value
    if not isinstance(value, dict | list):
        return
    for key, one in [*(value.items() if isinstance(value, dict) else enumerate(value))]:
        yield from _places(one, (*steps, key))


def apply(files: dict[str, Any], edit: Edit) -> bool:
    """Edit one of the files in place; False where that leaves it as it is."""
    before, owner = deepcopy(files[edit.file]), files[edit.file]
    if edit.kind == "added":
        for step in edit.steps:
            owner = owner[step]
        owner["added"] = "better"
        return True
    for step in edit.steps[:-1]:
        owner = owner[step]
    if edit.kind == "removed":
        del owner[edit.steps[-1]]
    else:
        value = owner[edit.steps[-1]]
        owner[edit.steps[-1]] = None if edit.kind == "null" else _changed(value)
    return bool(json.dumps(before) != json.dumps(files[edit.file]))


def _changed(value: object) -> object:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value + 0.01
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{16,64}", value):
        return ("1" if value[0] == "0" else "0") + value[1:]
    return 0.5 if value is None else f"{value}x"


def at(value: Any, place: str) -> Any:
    for step in place.split("."):
        value = value[step]
    return value


def put(value: Any, place: str, new: object) -> None:
    *outer, last = place.split(".")
    for step in outer:
        value = value[step]
    value[last] = deepcopy(new)


def forge(files: dict[str, Any], edited: str, place: str, folder: Path) -> dict[str, str]:
    """What a careful hand puts right; gives the texts that belong to the files."""
    manifest, document = files[MANIFEST_FILE], files[JSON_FILE]
    texts: dict[str, str] = {}
    for own, other in SAME:
        here, there = (own, other) if edited == MANIFEST_FILE else (other, own)
        source, target = (manifest, document) if edited == MANIFEST_FILE else (document, manifest)
        if place == here or place.startswith((f"{here}.", f"{here}[")) or here.startswith(place):
            _tried(lambda s=source, h=here, t=target, th=there: put(t, th, at(s, h)))  # type: ignore[misc]
    if place in MARGINS:
        value = _tried(lambda: at(files[edited], place))
        for one in (manifest, document):
            for where in MARGINS:
                _tried(lambda o=one, w=where: put(o, w, value))  # type: ignore[misc]
    tensors = read_tensors(folder / WEIGHTS_FILE)
    _tried(lambda: manifest.update(digest=artifact_digest(manifest, tensors)))
    _tried(lambda: document.update(evidence_digest=evidence_digest(document["evidence"])))
    if isinstance(document.get("report"), dict) and place != "report":
        known = [name for name in document["report"] if name in manifest]
        document["report"] = {name: json_digest(manifest[name]) for name in known}
    _tried(lambda: document.update(digest=document_digest(document)))
    _tried(lambda: texts.update({"certificate.txt": "\n".join(text_lines(document)) + "\n"}))
    _tried(lambda: texts.update({CARD_FILE: _card(manifest, document)}))
    return texts


def _card(manifest: dict[str, Any], document: dict[str, Any]) -> str:
    said = manifest["model"]
    return model_card(
        manifest, manifest["versions"], said["class"].rpartition(".")[2],
        of_transformers=False, original=document["models"].get("name") or "", source=None,
    )  # fmt: skip


def _tried(call: Callable[[], object]) -> object:
    try:
        return call()
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError):
        return None  # what was edited doesn't allow it


def write(folder: Path, files: dict[str, Any], texts: dict[str, str]) -> None:
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, indent=1) + "\n")
    for name, text in texts.items():
        (folder / name).write_text(text)


def answer(made: Made, edit: Edit) -> str:
    """What ``verify`` makes of an edited folder; empty where it is silent.

    Its own checks of the files are asked first, the whole of it where they find nothing.
    """
    folder = made.folder
    try:
        manifest, document = read_report(folder), read_document(folder)
        tensors = read_tensors(folder / WEIGHTS_FILE)
        checks = [
            *file_checks(folder, document, manifest, tensors),
            *report_checks(manifest, document, made.model, tensors),
        ]
        if not any(one.outcome == "differs" for one in checks):
            checks = [*verify(folder, rankfold.load(folder, net()), made.held_out).checks]
    except InputError as error:
        return f"refused: {error}"
    for one in checks:
        if one.outcome == "differs":
            return f"differs: {one.what}: {one.detail}"
    if any(edit.place in one.what.split() for one in checks if one.outcome == "not checked"):
        return f"named: {edit.place}"
    names = {MANIFEST_FILE: "rankfold", JSON_FILE: "certificate"}
    said = " ".join(one.detail for one in checks if one.outcome == "not checked")
    for place in NOT_TRACED[names[edit.file]]:
        under = edit.place == place or edit.place.startswith((f"{place}.", f"{place}["))
        if under and place in said:
            return f"named: {place}"
    of_field = edit.place.removeprefix("report.") if edit.kind == "removed" else "added"
    if edit.place == "layers[]":
        of_field = f"layers[].{of_field}"
    if of_field in said.partition("says nothing of ")[2].replace(",", "").split():
        return f"named: {of_field}"
    if edit.place == "data.history" or edit.place.startswith("data.history."):
        return "named: earlier openings" if "the record" in said else ""
    return ""


def unseen(root: Path, chosen: Callable[[int, Edit], bool], careful: bool) -> tuple[int, list[str]]:
    """How many edits were made, and those of them that nothing found."""
    made = make(root)
    first = {file: json.loads((made.folder / file).read_text()) for file in FILES}
    whole = {one.name: one.read_bytes() for one in made.folder.iterdir()}
    tried, silent = 0, []
    for number, edit in enumerate(edits(made.folder)):
        if not chosen(number, edit):
            continue
        files = deepcopy(first)
        if not apply(files, edit):
            continue
        texts = forge(files, edit.file, edit.place, made.folder) if careful else {}
        if files == first:
            continue  # a digest that was put right again
        write(made.folder, files, texts)
        tried += 1
        try:
            if not answer(made, edit) and not _says_the_same(first, edit):
                silent.append(f"{edit.kind} {edit.place} of {edit.file}")
            if checked_signature(made.folder, made.key).state != "altered":
                silent.append(f"by the signature: {edit.kind} {edit.place} of {edit.file}")
        except Exception as error:
            silent.append(f"{type(error).__name__} {error}: {edit.kind} {edit.place}, {edit.file}")
        for name, content in whole.items():
            (made.folder / name).write_bytes(content)
    return tried, silent


def _says_the_same(files: dict[str, Any], edit: Edit) -> bool:
    """Whether a field is removed that says nothing: it is read as if it were there."""
    value: Any = files[edit.file]
    for step in edit.steps:
        value = value[step]
    return edit.kind == "removed" and value in (None, [], {}, False)


def every_leaf(folder: Path, times: int, careful: bool) -> Counts:
    """So many edits, spread over all, or all that there are."""
    place = folder / "counted"
    place.mkdir()
    every = max(1, sum(1 for _ in edits(make(place).folder)) // times)
    tried, silent = unseen(folder, lambda number, _: number % every == 0, careful)
    for line in silent:
        print(f"not found: {line}", file=sys.stderr)
    return Counts(tried, tried - len({one.removeprefix("by the signature: ") for one in silent}))


register_fault(
    "every value of both JSON files edited", lambda f, n: every_leaf(f, n, careful=False), 100_000
)
register_fault(
    "the same, with all digests and texts put right",
    lambda f, n: every_leaf(f, n, careful=True),
    100_000,
)
