"""The invariant: ``verify`` differs where a field was edited, refuses it, or says that it was not
checked; where the folder is signed every edit is found. ``python -m benchmarks faults`` makes all
edits of all fields; here every place is edited once, and a part of them by a careful hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import rankfold
from benchmarks.faults_edits import FILES, Edit, Made, apply, forge, make, net, unseen, write
from rankfold.certificate.signature import checked_signature
from rankfold.report.page import PAGE_FILE, page
from rankfold.report.seen import read_seen
from rankfold.verify import Verification, verify


def each_place_once(kind: str, every: int = 1) -> Callable[[int, Edit], bool]:
    met: dict[tuple[str, str], int] = {}

    def chosen(_: int, edit: Edit) -> bool:
        if edit.kind != kind or (edit.file, edit.place) in met:
            return False
        met[edit.file, edit.place] = len(met)
        return len(met) % every == 0

    return chosen


@pytest.mark.parametrize("kind", ["changed", "added"])
def test_every_place_edited_is_found(kind: str, tmp_path: Path) -> None:
    tried, silent = unseen(tmp_path, each_place_once(kind), careful=False)
    assert not silent
    assert tried > (200 if kind == "changed" else 30)


def test_what_a_careful_hand_edits_is_found_or_named(tmp_path: Path) -> None:
    tried, silent = unseen(tmp_path, each_place_once("changed", every=16), careful=True)
    assert not silent
    assert tried > 10


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture
def whole(made: Made) -> Iterator[None]:
    kept = {one.name: one.read_bytes() for one in made.folder.iterdir()}
    yield
    for one in made.folder.iterdir():
        one.unlink()
    for name, content in kept.items():
        (made.folder / name).write_bytes(content)


def verified(made: Made, key: Path | None = None) -> Verification:
    return verify(made.folder, rankfold.load(made.folder, net()), made.held_out, key=key)


def careful(made: Made, file: str, place: str, value: object) -> None:
    """Edit a field, and put right all that follows from the files."""
    files = {name: json.loads((made.folder / name).read_text()) for name in FILES}
    owner = files[file]
    *outer, last = place.split(".")
    for step in outer:
        owner = owner[step]
    assert owner[last] != value
    owner[last] = value
    write(made.folder, files, forge(files, file, place, made.folder))


BEYOND_THE_FILES = {
    # What the files alone can't tell, and what is said of it.
    "certificate.margin": ("certificate.json", 5.0, "certificate.margin"),
    "run.settings": ("certificate.json", None, "run.settings"),
    "run.versions": ("certificate.json", {"rankfold": "9"}, "run.versions"),
}


@pytest.mark.parametrize("place", BEYOND_THE_FILES)
def test_what_nobody_can_recompute_is_named_and_the_signature_finds_it(
    place: str, made: Made, whole: None
) -> None:
    file, value, named = BEYOND_THE_FILES[place]
    if value is None:
        settings = json.loads((made.folder / file).read_text())["run"]["settings"]
        value = {**settings, "seed": 77}
    careful(made, file, place, value)
    found = verified(made, made.key)
    signature = next(one for one in found.checks if one.what == "signature")
    assert (signature.outcome, found.holds) == ("differs", False)
    assert "certificate.json holds other bytes" in signature.detail
    unsigned = [one for one in verified(made).checks if one.outcome == "not checked"]
    assert any(named in one.detail for one in unsigned)


def test_dropped_examples_and_a_forged_history_are_found(made: Made, whole: None) -> None:
    careful(made, "certificate.json", "data.parts.held_out.examples", 30)
    found = next(c for c in verified(made).checks if c.what == "numbers of examples")
    assert "certificate.examples is 24, data.parts.held_out.examples 30" in found.detail
    assert checked_signature(made.folder, made.key).state == "altered"


def test_an_edited_card_and_page_are_found(made: Made, whole: None) -> None:
    card = made.folder / "README.md"
    card.write_text(card.read_text().replace("certificate", "guarantee"))
    found = next(c for c in verified(made).checks if c.what == "model card README.md")
    assert found.outcome == "differs"
    manifest, document = (json.loads((made.folder / name).read_text()) for name in FILES)
    (made.folder / PAGE_FILE).write_text(page(manifest, document, read_seen(made.folder)))
    of_page = f"page {PAGE_FILE}"
    assert next(c for c in verified(made).checks if c.what == of_page).outcome == "agrees"
    text = (made.folder / PAGE_FILE).read_text()
    (made.folder / PAGE_FILE).write_text(text.replace("<body", "<body data-better"))
    assert next(c for c in verified(made).checks if c.what == of_page).outcome == "not checked"
    assert checked_signature(made.folder, made.key).state == "altered"


def test_damage_that_ended_in_a_traceback_is_named(made: Made, whole: None) -> None:
    """Terms of the stored losses that are not those of the data; a part that is gone."""
    files = {name: json.loads((made.folder / name).read_text()) for name in FILES}
    terms = Edit("certificate.json", ("evidence", "terms", 3), "changed")
    assert apply(files, terms)
    write(made.folder, files, forge(files, *terms[:1], terms.place, made.folder))
    fresh = next(c for c in verified(made).checks if c.what == "certificate from fresh losses")
    assert (fresh.outcome, fresh.detail) == ("differs", "the examples have other numbers of terms")
    del files["rankfold.json"]["data"]["selection"]
    write(made.folder, files, {})
    with pytest.raises(rankfold.InputError, match="expected a part selection"):
        verified(made)
