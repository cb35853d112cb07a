"""The pages in a browser: everything drawn, sorted, filtered, readable, and nothing interpreted.

By playwright with Debian's chromium; skipped where one of them is not there.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import rankfold
from rankfold.report.page import page
from rankfold.report.runs import row_of
from rankfold.report.several import several_page

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")

HOSTILE = "<script>window.broken = true</script>"
DRAWN = "[...document.querySelectorAll('.figure')].every(one => one.hasAttribute('data-drawn'))"
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A report, and a page of two runs; of a model in which a layer is called a script."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)
    )
    data = [(torch.randn(12), place % 3) for place in range(120)]
    result = rankfold.lossless(model.eval(), data, size=0.6)
    folder = tmp_path_factory.mktemp("pages")
    saved = result.save(folder / "out")
    manifest, certificate, seen = (
        json.loads((saved / f"{name}.json").read_text())
        for name in ("rankfold", "certificate", "seen")
    )
    manifest["layers"][0] |= {"name": HOSTILE, "reason_dense": HOSTILE}
    hostile = copy.deepcopy(seen)
    assert hostile["examples"]
    hostile["examples"][0] |= {"text": HOSTILE, "label": HOSTILE}
    (folder / "one.html").write_text(page(manifest, certificate, hostile))
    row = row_of(HOSTILE, manifest, certificate, seen["latency"])
    other = row_of("other", {**manifest, "ratio": 0.5}, certificate, None)
    (folder / "several.html").write_text(
        several_page([row, other], title=HOSTILE, lines=[HOSTILE], links={"other": "one.html"})
    )
    return folder


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as play:
        made = play.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield made
        made.close()


class Opened:
    """A page that is drawn, and all that its console said."""

    def __init__(self, browser, file: Path, **options) -> None:
        self.said: list[str] = []
        self.page = browser.new_page(**options)
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.said.append(request.url))
        self.page.goto(file.as_uri())
        self.page.wait_for_function(DRAWN)
        self.said.remove(file.as_uri())


NAMES = ("one.html", "several.html")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_everything_is_drawn_and_nothing_is_said(browser, pages, name, width):
    opened = Opened(browser, pages / name, viewport=width)
    assert opened.said == []
    figures = opened.page.locator(".figure")
    assert figures.count() >= 2
    for figure in figures.all():
        assert figure.locator("svg .mark-symbol path, svg .mark-rect path, svg .mark-line path, "
                              "svg .mark-rule line").count()  # fmt: skip
        assert figure.bounding_box()["width"] <= width["width"]
    # No page is wider than the screen: what is wide scrolls in its own place.
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width["width"]
    assert opened.page.evaluate("window.broken") is None
    assert HOSTILE in opened.page.locator("body").inner_text()
    opened.page.close()


def test_layers_are_sorted_and_filtered_by_mouse_and_keyboard(browser, pages):
    shown = Opened(browser, pages / "one.html", viewport=DESKTOP).page
    names = shown.locator("#table tbody td.name")
    assert HOSTILE in names.all_inner_texts()

    def column(place):
        return shown.locator(f"#table tbody td:nth-child({place})").all_inner_texts()

    heading = shown.get_by_role("button", name="parameters")
    heading.click()
    numbers = [int(text.replace(",", "")) for text in column(6)]
    assert numbers == sorted(numbers)
    assert shown.locator("th[aria-sort=ascending]").inner_text().startswith("parameters")
    heading.focus()
    shown.keyboard.press("Enter")
    assert [int(text.replace(",", "")) for text in column(6)] == numbers[::-1]
    shown.get_by_label("Show layers with").fill("SCRIPT")
    assert names.all_inner_texts() == [HOSTILE]
    assert shown.locator("#shown").inner_text() == "1 of 3"
    shown.get_by_label("Show layers with").fill("no such layer")
    assert names.count() == 0
    choice = shown.locator("#ranks select")
    before = shown.locator("#ranks svg").inner_html()
    choice.select_option(index=1)
    shown.wait_for_function("old => document.querySelector('#ranks svg').innerHTML !== old",
                            arg=before)  # fmt: skip
    shown.close()


@pytest.mark.parametrize(
    ("name", "scheme"), [("one.html", "light"), ("one.html", "dark"), ("several.html", "dark")]
)
def test_it_is_readable_for_everybody(browser, pages, name, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    opened = Opened(browser, pages / name, viewport=DESKTOP, color_scheme=scheme, bypass_csp=True)
    found = axe.Axe().run(opened.page).response["violations"]
    told = [(one["id"], [node["html"][:200] for node in one["nodes"]]) for one in found]
    assert told == []
    opened.page.close()


def test_print_hides_what_a_sheet_cannot_do(browser, pages):
    shown = Opened(browser, pages / "one.html", viewport=DESKTOP).page
    shown.emulate_media(media="print")
    assert not shown.locator("#filter").is_visible() and not shown.locator("nav").is_visible()
    assert shown.locator("#size-loss svg").is_visible()
    shown.close()
