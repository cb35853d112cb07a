"""What the pages say of themselves and of the code: links, tables, messages, questions, lengths."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import readability, results_report
from benchmarks.documents import filled, markdown
from benchmarks.field import RESULTS, Row
from benchmarks.field_report import all_tables
from benchmarks.results_report import results_tables
from benchmarks.rows import read_rows
from benchmarks.speed import SpeedRow, sibling
from tests.docs.blocks import ROOT

DOCS = ROOT / "docs"
SOURCE = "".join(
    re.sub(r'"\s*\n\s*f?"', "", file.read_text(encoding="utf-8"))
    for file in sorted((ROOT / "src").rglob("*.py"))
)


def anchors(page: Path) -> set[str]:
    """Of the titles of a page, as mkdocs and GitHub make them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", title.replace("`", "")).strip().lower() for title in titles)
    return {re.sub(r"\s+", "-", title) for title in plain}


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"(?<!`)\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file) if file else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


@pytest.mark.parametrize("page", readability.pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_pages_can_be_read(page: Path) -> None:
    assert not list(readability.troubles(page.name, page.read_text(encoding="utf-8")))


def test_what_cannot_be_read_is_found() -> None:
    long = "word " * 31 + ".\n\n" + "a line\n" * 6 + "\n| a |\n" + "|" + " --- |" * 8 + "\n"
    found = list(readability.troubles("page", long))
    for said in ("31 words", "6 lines", "8 columns"):
        assert sum(said in one for one in found) == 1
    code = "```\n" + "word " * 60 + "\n```\n" + "[two words](http://x/y) `a b c d` " * 10 + ".\n"
    assert not [one for one in readability.troubles("page", code) if "characters" not in one]


def test_readme_and_theory_are_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
    assert len((DOCS / "theory.md").read_text(encoding="utf-8").splitlines()) <= 300


def test_tables_are_those_of_the_lines() -> None:
    rows = read_rows(RESULTS, Row)
    tables = results_tables(rows, read_rows(sibling(RESULTS, "speed"), SpeedRow))
    for document in results_report.DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        assert filled(text, tables) == text, f"{document}: python -m benchmarks table writes it"


def test_a_missing_measurement_is_an_open_cell() -> None:
    rows = [
        Row("resnet20", 0, "joint-pivoted", 0.5, 10, bytes=0.5, change=-0.25, standard_error=0.1)
    ]
    table = results_report.choices_table(rows, [])
    assert (
        "| ResNet-20 at 0.50 | pivoted, the default | 0.50 | −0.250\u00a0±\u00a00.100 | – | – |"
        in table
    )
    assert "| ResNet-20 at 0.50 | int8 | – | – | – | – |" in table
    assert markdown(["a"], []) and "quality resnet20" not in results_tables(rows, [])
    assert all_tables is not results_tables


def messages() -> list[str]:
    page = (DOCS / "how-to" / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^### `(.*)`$", page, re.MULTILINE)


@pytest.mark.parametrize("message", messages())
def test_messages_are_those_of_the_code(message: str) -> None:
    assert message in SOURCE


def test_ten_questions_are_answered_by_the_words_listed() -> None:
    page = DOCS / "notebook" / "questions.md"
    rows = re.findall(r"^\| (.*\?) \| \[.*\]\((.*)\) \| (.*) \|$", page.read_text(), re.MULTILINE)
    assert len(rows) == 10
    for question, target, words in rows:
        answer = " ".join((page.parent / target).read_text(encoding="utf-8").split())
        assert words in answer, question
