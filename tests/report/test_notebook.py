"""What a notebook and a terminal show of every public object: short, and names only as texts."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import rankfold
from rankfold.errors import InputError
from rankfold.report import plot
from rankfold.result import Sweep
from tests.small_models import SmallCNN, image_data, images, tiny_llama, token_data, trained_cnn

SHORT = 400  # characters
DATA = image_data(60)


@pytest.fixture(scope="module")
def prepared() -> rankfold.Preparation:
    return rankfold.prepare(trained_cnn(), DATA, effort="fast")


@pytest.fixture(scope="module")
def sweep(prepared: rankfold.Preparation) -> Sweep:
    return prepared.sweep([0.9, 0.7], margin=0.5)


@pytest.fixture(scope="module")
def shown(
    prepared: rankfold.Preparation, sweep: Sweep, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    top = tmp_path_factory.mktemp("shown")
    folder = sweep[0].save(top / "a")
    opened = rankfold.load(folder, model=SmallCNN())
    return {
        "preparation": prepared,
        "sweep": sweep,
        "result": sweep[0],
        "certificate": sweep[0].certificate,
        "verification": rankfold.verify(folder, opened, DATA.held_out),
        "exported": rankfold.export(folder, top / "b", to="dense", model=SmallCNN()),
        "data": DATA,
        "data in lists": rankfold.Data(*(list(images(50, seed)) for seed in (1, 2, 3))),
        "settings": rankfold.Settings(),
        "other settings": rankfold.Settings(seed=3, include=("a*",)),
        "input settings": rankfold.InputSettings(),
        "metric": rankfold.Metric("name", lambda model, batch: batch),
        "progress": rankfold.TerminalProgress(),
    }  # fmt: skip


def test_every_repr_is_short(shown: dict[str, Any]) -> None:
    lengths = {name: len(repr(one)) for name, one in shown.items()}
    assert not {name: length for name, length in lengths.items() if length > SHORT}
    assert not [name for name, one in shown.items() if "\n" in repr(one)]
    assert repr(shown["settings"]) == "Settings()"
    assert repr(shown["other settings"]) == "Settings(seed=3, include=('a*',))"
    assert shown["result"].certificate.verdict in repr(shown["result"])


class Tags(HTMLParser):
    """The tags of a fragment, each closed again, and its texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append(tag)
        assert not [name for name, _ in attributes if name.startswith("on") or name == "src"]
        if tag != "br":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: Any) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.mark.parametrize("name", ["preparation", "sweep", "result", "certificate", "verification"])
def test_a_notebook_shows_a_table(shown: dict[str, Any], name: str) -> None:
    found = Tags(shown[name]._repr_html_())
    assert "table" in found.tags and "script" not in found.tags
    assert ("svg" in found.tags) == (name in ("result", "certificate"))


HOSTILE = "<script>alert(1)</script><img src=x onerror=y>\x1b[31m\u202e"


def test_names_are_shown_and_never_interpreted(sweep: Sweep) -> None:
    result = sweep[0]
    plain = Tags(result._repr_html_()).tags
    report = {**result.report, "algorithm": HOSTILE}
    for key, field in (("layers", "name"), ("not_factorized", "reason"), ("layers", "kind")):
        first, *others = report[key]
        report = {**report, key: [{**first, field: HOSTILE}, *others]}
    report["data"] = {
        name: {**part, "source": HOSTILE, "left_out": {HOSTILE: 1}}
        for name, part in report["data"].items()
    }
    document = {**result.document, "models": {**result.document["models"], "name": HOSTILE}}
    hostile = replace(result, report=report, document=document)
    found = Tags(hostile._repr_html_())
    assert found.tags == plain
    assert "<script>alert(1)</script>" in "".join(found.texts)
    for text in (hostile.summary(), repr(hostile), hostile._repr_html_()):
        assert "\x1b" not in text and "\u202e" not in text


def test_the_summary_says_what_the_report_does(sweep: Sweep) -> None:
    result = sweep[0]
    text, report = result.summary(), result.report
    before, after = report["original"], report["factorized"]
    assert f"{before['parameters']:,} -> {after['parameters']:,} ({result.ratio:.1%})" in text
    assert f"verdict: {result.certificate.verdict}: " in text
    assert f"at most {result.certificate.upper_bound:+.4f}" in text
    assert "embedding table" not in text


def test_layers_are_records(sweep: Sweep) -> None:
    result = sweep[0]
    names = [one["name"] for key in ("layers", "not_factorized") for one in result.report[key]]
    assert [record["layer"] for record in result.layers] == names
    assert len({tuple(record) for record in result.layers}) == 1  # the same columns
    plain = (str, int, float, type(None))
    assert all(isinstance(value, plain) for one in result.layers for value in one.values())
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(result.layers).dropna(subset="parameters")
    assert table["parameters"].sum() == result.report["original"]["factorizable_parameters"]


def test_a_sweep_is_its_results(prepared: rankfold.Preparation, sweep: Sweep) -> None:
    assert len(sweep) == 2 and [*sweep] == [sweep[0], sweep[-1]] and isinstance(sweep[:1], Sweep)
    assert [one["size"] for one in sweep.records] == [result.ratio for result in sweep]
    assert [one["asked"] for one in sweep.records] == [0.9, 0.7]
    alone = prepared.lossless(0.9, margin=0.5)
    assert sweep[0].report["factorized"] == alone.report["factorized"]
    assert "2 sizes" in sweep.summary() and "all of them together with 90%" in sweep.summary()
    assert "together" not in sweep[:1].summary()


@pytest.mark.parametrize("sizes", [[], [0.9, 0.9], [0.9, 1.5], 0.9, "0.9", [True]])
def test_sizes_are_checked_first(prepared: rankfold.Preparation, sizes: Any) -> None:
    with pytest.raises(InputError, match="size"):
        prepared.sweep(sizes)


def test_plots(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    for figure in (sweep[0].plot(), sweep.plot()):
        assert figure._repr_png_().startswith(b"\x89PNG")
    left, right = sweep[0].plot().axes
    assert len(right.patches) == len(sweep[0].report["layers"])
    assert "parameters kept" in left.get_xlabel()
    (axes,) = sweep.plot().axes
    places = [float(x) for x in axes.containers[0].lines[0].get_xdata()]
    assert places == [100 * result.ratio for result in sweep]


def test_without_matplotlib_the_extra_is_named(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    plot._figure_class.cache_clear()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=re.escape("pip install 'rankfold[plot]'")):
        sweep[0].plot()


def test_sizes_without_the_embedding_table(tmp_path: Path) -> None:
    model = tiny_llama()
    result = rankfold.lossless(model, token_data(), size=0.9, effort="fast", embeddings=True)
    table = model.model.embed_tokens.weight.numel()
    whole = result.report["original"]["parameters"]
    kept = [one for one in result.report["layers"] if "uses" in one]
    after = result.report["factorized"]["parameters"] - kept[0]["factorized_parameters"]
    line = f"parameters without the embedding tables: {whole - table:,} -> {after:,} "
    assert line in result.summary()
