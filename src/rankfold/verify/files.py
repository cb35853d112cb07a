"""What the files of an artifact say of each other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rankfold.artifact.manifest import (
    CONFIG_FILE,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    Manifest,
    artifact_digest,
    check_config_digest,
)
from rankfold.certificate.document import (
    JSON_FILE,
    TEXT_FILE,
    Document,
    document_digest,
    text_lines,
)
from rankfold.certificate.signature import checked_signature, is_signed
from rankfold.errors import InputError, visible
from rankfold.files.digests import tensors_digest
from rankfold.files.json_file import read_bytes
from rankfold.files.listed import PAGE_FILE, SIGNATURE_FILE, file_names
from rankfold.integrations.vision import NamedModel
from rankfold.report.model_card import CARD_FILE, model_card
from rankfold.report.page import page
from rankfold.report.seen import read_seen
from rankfold.verify.checks import NAMED, Check, found_in, outcome

_WRITTEN = (MANIFEST_FILE, WEIGHTS_FILE, JSON_FILE, TEXT_FILE, CARD_FILE)  # of each artifact
_BESIDE = ("digests", "texts", "statement", "evidence")  # of a guard, in the certificate alone


def file_checks(
    folder: Path, document: Document, manifest: Manifest, tensors: Mapping[str, Tensor]
) -> list[Check]:
    """Digests and texts: which file is not what another one says; ``tensors`` are its weights."""
    same = document_digest(document) == document["digest"]
    detail = "" if same else "its content is not what its digest was made of: it was edited"
    checks = [Check(f"digest of {JSON_FILE}", outcome(same), detail)]
    checks.append(_text(folder / TEXT_FILE, "\n".join(text_lines(document)) + "\n"))
    checks.append(_fields(f"certificate in {MANIFEST_FILE}", manifest["certificate"], document))
    if (guard := document.get("guard")) is not None:
        row = manifest.get("guard") or {}
        keys = {*row, *(key for key in guard if key not in _BESIDE)}
        wrong = sorted(key for key in keys if row.get(key) != guard.get(key))
        detail = f"{', '.join(wrong)} is not what {JSON_FILE} says" if wrong else ""
        checks.append(Check(f"other kinds in {MANIFEST_FILE}", outcome(not wrong), detail))
    checks.append(_plan(manifest, document))
    same = tensors_digest(tensors) == document["models"]["factorized"]
    detail = "" if same else f"{WEIGHTS_FILE} does not hold the weights that were certified"
    checks.append(Check("weights of the factorized model", outcome(same), detail))
    same = manifest.get("digest") == artifact_digest(manifest, tensors)
    if manifest.get("digest") is not None or "report" in document:
        detail = f"they are not what the digest in {MANIFEST_FILE} was made of"
        checks.append(Check("layers and weights", outcome(same), "" if same else detail))
    if manifest.get("config_digest") is not None or (folder / CONFIG_FILE).exists():
        checks.append(_config(folder, manifest))
    checks += [*_listed(folder, manifest), *_page(folder / PAGE_FILE, manifest, document)]
    return [*checks, *_card(folder / CARD_FILE, manifest, document)]


def signature_checks(folder: Path, key: str | Path | None) -> list[Check]:
    """Whether the owner of a public key has signed the folder as it is.

    Raises:
        InputError: The key can't be used.
    """
    if key is None:
        detail = "give the public key of whoever signed: key="
        return [Check("signature", "not checked", detail)] if is_signed(folder) else []
    found = checked_signature(folder, key)
    said = f"{found.state}: {found.detail}"
    return [Check("signature", outcome(found.holds), said)]


def _text(file: Path, expected: str) -> Check:
    if not file.is_file():
        return Check(file.name, "differs", "the file is missing")
    written = read_bytes(file).decode("utf-8", "replace").split("\n")
    lines = expected.split("\n")
    if written == lines:
        return Check(file.name, "agrees")
    longest = max(len(written), len(lines))
    number = next((n for n in range(longest) if written[n : n + 1] != lines[n : n + 1]), 0) + 1
    return Check(file.name, "differs", f"line {number} is not what {JSON_FILE} says")


def _config(folder: Path, manifest: Manifest) -> Check:
    try:
        check_config_digest(folder, manifest)
    except InputError as error:
        return Check(CONFIG_FILE, "differs", str(error))
    if manifest.get("config_digest") is None:
        return Check(CONFIG_FILE, "not checked", f"{MANIFEST_FILE} has no digest of it")
    return Check(CONFIG_FILE, "agrees")


def _listed(folder: Path, manifest: Manifest) -> list[Check]:
    """Whether the folder holds the files that ``rankfold.json`` lists, and which others."""
    what, stated = f"files that {MANIFEST_FILE} lists", manifest.get("files")
    if stated is None and "files" not in manifest:
        return [Check(what, "not checked", "earlier versions listed none")]
    names = stated if isinstance(stated, list) else []
    here = file_names(folder)
    problems = [f"{visible(name)} is missing" for name in names if name not in here]
    problems += [f"{name} is not listed" for name in _WRITTEN if name in here and name not in names]
    if len({*map(str, names)}) != len(names):
        problems.append("a name stands twice")
    checks = [found_in(what, problems)]
    if more := [
        name for name in here if name not in (*names, *_WRITTEN, PAGE_FILE, SIGNATURE_FILE)
    ]:
        detail = f"rankfold did not write them with the rest: {', '.join(map(visible, more))}"
        checks.append(Check("more files", "not checked", detail))
    return checks


def _page(file: Path, manifest: Manifest, document: Document) -> list[Check]:
    """Whether the page, where there is one, is what both files make."""
    if not file.is_file():
        return []
    what, written = f"page {file.name}", read_bytes(file)
    try:
        if page(manifest, document, read_seen(file.parent)).encode() == written:
            return [Check(what, "agrees")]
    except (LookupError, TypeError, ValueError, ArithmeticError, InputError) as error:
        detail = f"it can't be made from {MANIFEST_FILE} again: {type(error).__name__} {error}"
        return [Check(what, "differs", detail)]
    detail = (
        "it is not what this version makes of the folder: another one made it, or it was edited"
    )
    return [Check(what, "not checked", f"{detail}. Make it anew: rankfold report")]


def _plan(manifest: Manifest, document: Document) -> Check:
    keys = ("rank", "second_rank")
    layers = {layer["name"]: [layer.get(key) for key in keys] for layer in manifest["layers"]}
    plan = document["run"]["plan"]
    stated = {name: [choice.get(key) for key in keys] for name, choice in plan.items()}
    wrong = sorted(n for n in {*layers, *stated} if layers.get(n) != stated.get(n))
    detail = f"the ranks of {', '.join(wrong[:NAMED])} are others" if wrong else ""
    forms = {layer["name"]: layer["form"] for layer in manifest["layers"]}
    # A plan leaves open how plain low rank is stored, and a dense layer has no form.
    named = {n: c["form"] for n, c in plan.items() if c.get("form") is not None}
    others = [n for n, form in named.items() if forms.get(n) != form and plan[n]["rank"]]
    if others and not detail:
        detail = f"the forms of {', '.join(others[:NAMED])} are others"
    return Check("plan", outcome(not detail), detail)


def _fields(what: str, stated: Mapping[str, Any], document: Document) -> Check:
    expected = document["certificate"]
    keys = [*dict.fromkeys([*expected, *stated])]
    return found_in(
        what,
        [
            f"{key}: {stated.get(key)!r} there, {expected.get(key)!r} in {JSON_FILE}"
            for key in keys
            if stated.get(key) != expected.get(key)
        ],
    )


def _card(file: Path, manifest: Manifest, document: Document) -> list[Check]:
    """Whether the model card has every line that follows from ``rankfold.json``.

    Lines may be added to it; they are named, since nothing is known of them.
    """
    what = f"model card {file.name}"
    if "report" not in document:
        detail = "the certificate of an earlier version doesn't say how it was written"
        return [Check(what, "not checked", detail)]
    if not file.is_file():
        return [Check(what, "not checked", "the file is missing")]
    said, source = manifest["model"], manifest["model"].get("source")
    try:
        card = model_card(
            manifest,
            manifest["versions"],
            said["class"].rpartition(".")[2],
            of_transformers=said["kind"] == "transformers",
            original=document["models"].get("name") or "",
            source=None if source is None else str(NamedModel(**source)),
            license=document["models"].get("license") or "",
            sentences=document["models"].get("sentences") is True,
        )
    except (LookupError, TypeError, ValueError, ArithmeticError, InputError) as error:
        detail = f"it can't be written from {MANIFEST_FILE} again: {type(error).__name__} {error}"
        return [Check(what, "differs", detail)]
    expected = card.removesuffix("\n").split("\n")
    written = read_bytes(file).decode("utf-8", "replace").removesuffix("\n").split("\n")
    added: list[int] = []
    at = 0
    for number, line in enumerate(written, 1):
        if at < len(expected) and line == expected[at]:
            at += 1
        else:
            added.append(number)
    if at < len(expected):
        detail = f"it lacks a line that {MANIFEST_FILE} gives: {expected[at][:200]}"
        return [Check(what, "differs", detail)]
    if added:
        listed = ", ".join(map(str, added[:NAMED])) + ", ..." * (len(added) > NAMED)
        detail = f"rankfold has not written its lines {listed}"
        return [Check(what, "agrees"), Check(f"lines added to {file.name}", "not checked", detail)]
    return [Check(what, "agrees")]
