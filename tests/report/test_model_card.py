"""The README.md that stands in every saved folder."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from torch.nn import Linear
from transformers import LlamaForCausalLM

import rankfold
from rankfold.report.card_metadata import license_of, metadata_of
from rankfold.report.model_card import model_card, public_name
from tests.small_models import SmallCNN, image_data, tiny_llama, token_data, trained_cnn

VERSIONS = {"rankfold": "9.9", "torch": "8.8"}


@pytest.fixture(scope="module")
def result() -> rankfold.Result:
    return rankfold.lossless(tiny_llama(), token_data(), size=0.8, seed=3, damping=0.2)


def card(result: rankfold.Result, **options: Any) -> str:
    return model_card(result.report, VERSIONS, "LlamaForCausalLM", of_transformers=True, **options)


def front_matter(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---")[1])


def test_the_front_matter_is_what_a_hub_reads(result: rankfold.Result) -> None:
    text = card(result, original="owner/name", license="apache-2.0")
    found = front_matter(text)
    (model,) = found.pop("model-index")
    assert found == {
        "library_name": "transformers",
        "license": "apache-2.0",
        "base_model": "owner/name",
        "pipeline_tag": "text-generation",
        "metrics": ["loss", "perplexity", "accuracy"],
        "tags": ["rankfold", "low-rank", "model-compression"],
    }
    assert msgspec.convert(model, OfModel).name == "name"
    assert "# owner/name, factorized to low rank" in text
    assert "- license of the original: apache-2.0" in text


class OfHub(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """An entry of the hub's model-index, by its specification (hub-docs, modelcard.md)."""


class OfMetric(OfHub):
    type: str
    value: float
    name: str | None = None


class OfTask(OfHub):
    type: str
    name: str | None = None


class OfDataset(OfHub):
    type: str
    name: str
    split: str | None = None


class OfResult(OfHub):
    task: OfTask
    dataset: OfDataset
    metrics: list[OfMetric]


class OfModel(OfHub):
    name: str
    results: list[OfResult]


def test_the_hubs_own_reader_finds_the_results(result: rankfold.Result, tmp_path: Path) -> None:
    folder = result.save(tmp_path / "a")
    read = ModelCard.load(folder / "README.md")  # refuses what is no model-index
    found = {one.metric_name: one.metric_value for one in read.data.eval_results}
    loss = result.report["loss"]
    assert found["loss"] == loss["factorized"] and found["loss of the original"] == loss["original"]
    assert found["change of the loss, upper bound"] == result.certificate.upper_bound
    assert found["perplexity"] == pytest.approx(math.exp(loss["factorized"]))
    assert {one.dataset_split for one in read.data.eval_results} == {"held-out"}
    assert metadata_of(folder / "README.md")["library_name"] == read.data.library_name


def test_the_license_is_that_of_the_originals_card(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "SmallName")
    (tmp_path / "SmallName" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# It")
    opened = LlamaForCausalLM.from_pretrained(tmp_path / "SmallName")
    result = rankfold.lossless(opened, token_data(), size=0.9, effort="fast")
    folder = result.save(tmp_path / "a")
    text = (folder / "README.md").read_text()
    assert front_matter(text)["license"] == "cc-by-4.0"
    assert "# SmallName, factorized to low rank" in text
    checks = rankfold.verify(folder, rankfold.load(folder), token_data().held_out).checks
    assert [c.outcome for c in checks if c.what == "model card README.md"] == ["agrees"]
    (folder / "README.md").write_text(text.replace("cc-by-4.0", "mit"))
    checks = rankfold.verify(folder, rankfold.load(folder), token_data().held_out).checks
    assert [c.outcome for c in checks if c.what == "model card README.md"] == ["differs"]


@pytest.mark.parametrize(
    "block",
    ["license: [mit]", "license: 'a b'", "license: |\n  mit\n  # x", "license: *a", "- mit",
     "a: &a [*a]", "license: " + "[" * 1500, "license: MIT\u0000", "license: \udcff", ""],
)  # fmt: skip
def test_a_card_that_names_no_license_names_none(tmp_path: Path, block: str) -> None:
    text = f"---\n{block}\n---\n"
    (tmp_path / "README.md").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert license_of(tmp_path) == ""
    assert license_of(tmp_path / "none") == "" and license_of(None) == ""


@pytest.mark.parametrize(
    ("original", "name"),
    [
        ("owner/name", "owner/name"),
        ("/x/models--owner--na.me/snapshots/" + "a" * 40, "owner/na.me"),
        ("/x/bert-small/model", "bert-small"),
        ("/x/bert-small/checkpoint-500/", "bert-small"),
        ("/x/bert-small", "bert-small"),
        ("model", "model"),
        ("", ""),
    ],
)
def test_the_public_name_says_something(original: str, name: str) -> None:
    assert public_name(original) == name == public_name(public_name(original))


@pytest.mark.parametrize("original", ["", "/home/me/secret/name", "a: b", "x/y\nevil: 1", "../x"])
def test_what_is_no_name_on_a_hub_is_no_base_model(result: rankfold.Result, original: str) -> None:
    text = card(result, original=original)
    assert "base_model" not in front_matter(text) and "evil" not in front_matter(text)
    assert "secret" not in text


def test_it_tells_sizes_certificate_and_how_it_was_made(
    result: rankfold.Result, tmp_path: Path
) -> None:
    folder = result.save(tmp_path / "a")
    text = (folder / "README.md").read_text()
    before, after = result.report["original"], result.report["factorized"]
    assert f"| {before['parameters']:,} | {after['parameters']:,} |" in text
    assert f"| {(folder / 'model.safetensors').stat().st_size:,} |" in text
    certificate = result.certificate
    assert f"**{certificate.verdict}**" in text
    assert f"at most {certificate.upper_bound:+.4f}; the margin was {certificate.margin:g}" in text
    assert "`rankfold.lossless(model, data, size=0.8, " in text
    assert "damping=0.2" in text and "objective=" not in text and "seed 3" in text
    assert rankfold.__version__ in text


def test_the_lines_of_a_transformers_model_open_it(result: rankfold.Result, tmp_path: Path) -> None:
    folder = result.save(tmp_path / "a")
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    found: dict[str, Any] = {}
    exec(code.replace("FOLDER", str(folder)), found)
    assert isinstance(found["model"], LlamaForCausalLM)
    assert not isinstance(found["model"].model.layers[0].mlp.up_proj, Linear)


def test_the_lines_of_an_own_class_open_it(tmp_path: Path) -> None:
    folder = rankfold.lossless(trained_cnn(), image_data(40), size=0.7).save(tmp_path / "a")
    text = (folder / "README.md").read_text()
    assert front_matter(text)["library_name"] == "rankfold"
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    found: dict[str, Any] = {"SmallCNN": SmallCNN}
    exec(code.replace("FOLDER", str(folder)).replace("(...)", "()"), found)
    assert isinstance(found["model"], SmallCNN)


FORGERIES = [
    "x\n# forged", "x\n\n# forged", "x\n===", "[forged](https://evil.example)",
    "https://evil.example", "1. x", "12) x", "+ x", "    x", " # x",
    "www.evil.example", "me@evil.example", "<b>forged</b>", "<!-- forged", "![forged](x)",
    "x\r# forged",
    "```\n# forged", "`x` [forged](y)", "|forged|", "x</code><h1>", "[x]: https://evil.example",
    "\\[forged](x)", "&lt;b&gt;", "x\u2028# forged", "- # forged", "$x$", "---\nforged: 1",
    "HTTPS://evil.example/`a`|b", "*[forged][1]*", "<https://evil.example>", "`", "``", "\\`",
]  # fmt: skip


def texts(value: Any, path: tuple[Any, ...] = ()) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value[:2])
    for key, one in items:
        if isinstance(one, dict | list | tuple):
            yield from texts(one, (*path, key))
        elif isinstance(one, str) and key not in ("verdict", "algorithm", "digest"):
            yield (*path, key)


def put(value: Any, path: tuple[Any, ...], text: str) -> Any:
    if not path:
        return text
    inner = put(value[path[0]], path[1:], text)
    if isinstance(value, dict):
        return {**value, path[0]: inner}
    return [*value[: path[0]], inner, *value[path[0] + 1 :]]


def structure(text: str) -> list[str]:
    """What a page makes of it, but for texts."""
    page = MarkdownIt("commonmark").enable("table").parse(text.split("---", 2)[2])
    blocks = [f"{t.type} {t.tag}" for t in page if t.type != "inline"]
    inline = {c.type for t in page if t.children for c in t.children}
    return [
        *blocks,
        *sorted(
            inline
            - {
                "text",
                "code_inline",
                "softbreak",
                "strong_open",
                "strong_close",
                "em_open",
                "em_close",
                "text_special",
            }
        ),
    ]


def bare(text: str) -> str:
    """Without what stands as code."""
    page = MarkdownIt("commonmark").enable("table").parse(text.split("---", 2)[2])
    return " ".join(c.content for t in page for c in t.children or () if c.type == "text")


@pytest.mark.parametrize("forgery", FORGERIES)
def test_no_name_makes_a_heading_a_link_or_html(result: rankfold.Result, forgery: str) -> None:
    plain = structure(card(result))
    for path in [*texts(result.report), ("layers", 0, "name")]:
        report = put(result.report, path, forgery)
        text = model_card(report, VERSIONS, "LlamaForCausalLM", of_transformers=True)
        assert structure(text) == plain, path
        assert not re.search(r"://|www\\.|@evil", bare(text), re.IGNORECASE), path
        assert "forged" not in front_matter(text)
    for options in ({"original": forgery}, {"source": forgery}):
        text = card(result, **options)
        assert structure(text) == plain and "forged" not in front_matter(text)
        assert not re.search(r"://|www\\.|@evil", bare(text), re.IGNORECASE)
    assert structure(card(result)) == plain
