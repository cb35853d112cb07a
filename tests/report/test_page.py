"""The page of a saved model: its numbers, its figures, and names that are shown as they are."""

import copy
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import rankfold
from rankfold.files.durable import write_whole
from rankfold.report.figures import figures
from rankfold.report.latency import speed_sentence
from rankfold.report.page import page
from tests.command_line import rankfold as command

HOSTILE = '<script>alert("1")</script>\x1b[2J\u202e&amp;'


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)
    )
    data = [(torch.randn(12), place % 3) for place in range(120)]
    folder = tmp_path_factory.mktemp("page") / "out"
    rankfold.lossless(model.eval(), data, size=0.6).save(folder)
    return folder


@pytest.fixture
def documents(saved):
    return tuple(json.loads((saved / f"{n}.json").read_text()) for n in ("rankfold", "certificate"))


class _Elements(HTMLParser):
    """Tags, texts outside scripts, and the JSON blocks."""

    def __init__(self):
        super().__init__()
        self.tags, self.texts, self.blocks, self.block = [], [], {}, None

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.block = dict(attributes).get("id", "code") if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self.block = None

    def handle_data(self, data):
        if self.block is None:
            self.texts.append(data)
        else:
            self.blocks[self.block] = self.blocks.get(self.block, "") + data


def parsed(text):
    found = _Elements()
    found.feed(text)
    return found


def test_the_page_says_what_the_files_say(documents):
    manifest, certificate = documents
    shown = parsed(page(manifest, certificate))
    text = re.sub(r"\s+", " ", " ".join(shown.texts))
    verdict = manifest["certificate"]
    assert verdict["verdict"].capitalize() in text
    for number in (verdict["change"], verdict["upper_bound"]):
        assert f"{number:+.4f}" in text
    assert f"{manifest['ratio']:.1%} of its parameters" in text
    assert f"{manifest['factorized']['parameters']:,}" in text
    rows = json.loads(shown.blocks["rows"])
    assert [row["after"] for row in rows] == [
        layer["factorized_parameters"] for layer in manifest["layers"]
    ]


def test_it_needs_no_network(documents):
    text = page(*documents)
    loaded = re.findall(r"""(?:src|href)=["']?([^"'> ]+)""", parsed_free_of_scripts(text))
    assert all(one.startswith(("#", "data:")) for one in loaded)
    assert "default-src 'none'" in text
    assert len(text.encode()) < 2_000_000


def parsed_free_of_scripts(text):
    return re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)


def test_every_figure_has_its_numbers(documents):
    manifest, certificate = documents
    drawn = figures(manifest, certificate)
    assert set(drawn) == {"size-loss", "layers", "ranks", "predicted", "examples"}
    assert set(figures(manifest, None)) == set(drawn) - {"examples"}
    bars = drawn["examples"]["data"]["values"]
    assert sum(bar["examples"] for bar in bars) == manifest["certificate"]["examples"]
    measured = [one for one in drawn["size-loss"]["data"]["values"] if one["what"] != "tried"]
    assert measured[-1]["change"] == manifest["certificate"]["change"]
    assert json.loads(json.dumps(drawn, allow_nan=False)) == drawn


def test_names_are_shown_and_not_interpreted(documents):
    manifest, certificate = copy.deepcopy(documents)
    manifest["layers"][0] |= {"name": HOSTILE, "reason_dense": HOSTILE}
    manifest["not_factorized"] = [{"name": HOSTILE, "reason": HOSTILE}]
    manifest["model"]["class"] = f"a.{HOSTILE}"
    manifest["data"]["held_out"]["source"] = HOSTILE
    manifest["versions"][HOSTILE] = HOSTILE
    plain, hostile = parsed(page(*documents)), parsed(page(manifest, certificate))
    assert hostile.tags.count("script") == plain.tags.count("script")
    for text in (page(manifest, certificate), "".join(hostile.texts)):
        assert "\x1b" not in text and "\u202e" not in text
    assert "<script>" in json.loads(hostile.blocks["rows"])[0]["layer"]  # as text


def latency(ratio, pairs=None):
    row = {
        "batch": 1, "original": 1.0, "factorized": ratio, "ratio": ratio, "rounds": 9,
        "original_quartiles": [0.9, 1.1], "factorized_quartiles": [0.9 * ratio, 1.1 * ratio],
        "ratio_quartiles": [0.9 * ratio, 1.1 * ratio],
    }  # fmt: skip
    return {
        "device": "cpu", "threads": 1, "what": "the model", "rows": [row], "missing": None,
        "pairs": None if pairs is None else [{**row, "ratio": pairs, "factorized": pairs}],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("ratio", "pairs", "said"),
    [
        (0.5, None, "Faster than the original: it takes 0.50 x its time at batch 1."),
        (1.02, None, "As fast as the original, as far as these rounds can tell."),
        (2.0, None, "Slower than the original: it takes 2.00 x its time at batch 1."),
        (2.0, 0.9, 'stored with form="pair" take 0.90 x its time at batch 1: not slower.'),
        (2.0, 1.4, 'stored with form="pair" take 1.40 x its time at batch 1.'),
    ],
)
def test_speed_in_words(ratio, pairs, said):
    assert speed_sentence(latency(ratio, pairs)).endswith(said)


def test_what_the_run_saw_is_shown(documents):
    seen = {
        "examples": [
            {"place": "3", "change": 0.25, "label": "1", "text": "<b>bold</b>", "image": None}
        ],
        "latency": latency(2.0),
        "stages": [{"name": "spectra", "seconds": 1.25, "megabytes": 512.0}],
    }
    shown = parsed(page(*documents, seen))
    text = " ".join(shown.texts)
    assert (
        "Slower than the original: it takes 2.00 x its time at batch 1" in text
        and "<b>bold</b>" in text
        and "spectra" in text
    )
    assert "b" not in shown.tags
    assert "Slower" not in " ".join(parsed(page(*documents)).texts)


def test_the_command_writes_it(saved, tmp_path):
    file = tmp_path / "elsewhere.html"
    command("report", saved, "--out", file, cwd=tmp_path)
    assert "rankfold report" in file.read_text()
    elsewhere = tmp_path / "no" / "folder.html"
    done = command("report", saved, "--out", elsewhere, cwd=tmp_path, expect=2)
    assert "can't be written" in done.stderr
    command("report", tmp_path, cwd=tmp_path, expect=2)


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path):
    file = tmp_path / "report.html"
    write_whole(file, [b"old"], 0o644)
    with pytest.raises(UnicodeEncodeError):
        write_whole(file, (text.encode() for text in ("new", "\ud800")), 0o644)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
