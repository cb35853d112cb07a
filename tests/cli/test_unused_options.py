"""Every option for reading data is used, or refused by name: all options, sources and tasks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from scipy.io import wavfile

from rankfold.cli.data_options import READING, DataOptions
from rankfold.cli.open import OpenedModel, open_data, open_examples, open_model, open_parts
from rankfold.errors import InputError
from tests.integrations.small_families import TEXT, save_text_model

COUNT = 20
WORDS = [f"the film was {'good' if n % 2 else 'bad'} {'abcdefghij'[n // 2]}" for n in range(COUNT)]
COLUMNS = frozenset(name for name in READING if name.endswith("_column"))
PIXELS = frozenset(("mean", "std", "image_size"))
# What stands in the files: values that change what is read, where the option applies.
GIVEN: dict[str, Any] = {
    "mean": [0.5], "std": [0.25], "image_size": 8, "skip_broken": True,
    **{name: f"the {name.removesuffix('_column')}" for name in COLUMNS},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A source read for a model.

    Attributes:
        model: Which of ``models``.
        source: Which of ``sources``.
        applies: Options that change what is read.
        task: As of ``DataOptions``.
        length: Tokens that are fewer than the source has.
    """

    model: str
    source: str
    applies: frozenset[str] = frozenset()
    task: str | None = None
    length: int = 5


def _applies(*names: str) -> frozenset[str]:
    return frozenset(names)


LINE = _applies("length", "text_column")
CASES = {
    "classes": Case("classifier", "rows.jsonl", LINE | {"label_column"}),
    "classes of a table": Case("classifier", "rows.csv", LINE | {"label_column"}),
    "classes, parquet": Case("classifier", "rows.parquet", LINE | {"label_column"}),
    "a classifier as teacher": Case("classifier", "rows.jsonl", LINE, "teacher"),
    "values": Case("classifier", "values.csv", LINE | {"label_column"}, "regression"),
    "hidden words of records": Case("fills", "rows.jsonl", LINE),
    "hidden words of lines": Case("fills", "text.txt", _applies("length")),
    "embeddings of records": Case("embeds", "rows.jsonl", LINE),
    "embeddings of lines": Case("embeds", "text.txt", _applies("length")),
    "tags": Case("tagger", "tags.jsonl", _applies("length", "tokens_column", "tags_column")),
    "windows": Case("writer", "text.txt", _applies("length")),
    "texts": Case("writer", "rows.jsonl", LINE),
    "conversations": Case("writer", "chats.jsonl", _applies("length"), length=20),
    "own text": Case("writer", "self", _applies("length")),
    "targets": Case("answers", "rows.jsonl", LINE | {"target_column"}),
    "images": Case("net", "images", PIXELS | {"skip_broken"}),
    "images as teacher": Case("net", "images", PIXELS | {"skip_broken"}, "teacher"),
    "images of a table": Case("net", "images.parquet", PIXELS | {"label_column"}),
    "sounds": Case("net", "sounds", _applies("skip_broken")),
    "arrays of images": Case("net", "images.npz", PIXELS),
    "arrays of numbers": Case("net", "numbers.npz"),
    "a table of numbers": Case("net", "numbers.csv", _applies("label_column")),
    "Python": Case("net", "pairs.py:pairs"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, OpenedModel]:
    folder = tmp_path_factory.mktemp("models")
    kinds = {
        "classifier": ("bert", "ForSequenceClassification"),
        "fills": ("bert", "ForMaskedLM"),
        "embeds": ("bert", "Model"),
        "tagger": ("bert", "ForTokenClassification"),
        "writer": ("llama", "ForCausalLM"),
        "answers": ("t5", "ForConditionalGeneration"),
    }
    found = {
        name: open_model(str(save_text_model(folder / name, TEXT[family], ending)))
        for name, (family, ending) in kinds.items()
    }
    return {**found, "net": OpenedModel(torch.nn.Flatten(), None, None)}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files whose columns have two names each: the usual ones, and those of ``GIVEN``."""
    folder = tmp_path_factory.mktemp("sources")
    rows = [
        {
            "text": text, "the text": f"{text} the", "label": n % 3, "the label": (n + 1) % 3,
            "target": "was good", "the target": "was bad",
        }
        for n, text in enumerate(WORDS)
    ]  # fmt: skip
    _jsonl(folder / "rows.jsonl", rows)
    _csv(folder / "rows.csv", rows)
    _csv(folder / "values.csv", [{**row, "label": n / 4} for n, row in enumerate(rows)])
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    words = [text.split() for text in WORDS]
    tags = [
        {"tokens": w, "the tokens": w[::-1], "tags": [0] * len(w), "the tags": [1] * len(w)}
        for w in words
    ]
    _jsonl(folder / "tags.jsonl", tags)
    chats = [
        [{"role": "user", "content": "was good"}, {"role": "assistant", "content": text}]
        for text in WORDS
    ]
    _jsonl(folder / "chats.jsonl", [{"messages": chat} for chat in chats])
    (folder / "text.txt").write_text("".join(f"{text}\n" for text in WORDS * 4))
    generator = np.random.default_rng(0)
    held = []
    for n in range(COUNT):
        image = Image.fromarray(generator.integers(0, 256, (8, 8, 3)).astype(np.uint8))
        for kind in ("images", "sounds"):
            (folder / kind / f"class {n % 2}").mkdir(parents=True, exist_ok=True)
        file = folder / "images" / f"class {n % 2}" / f"{n}.png"
        image.save(file)
        sound = generator.integers(-99, 99, 50).astype(np.int16)
        wavfile.write(folder / "sounds" / f"class {n % 2}" / f"{n}.wav", 8000, sound)
        bytes_of = {"bytes": file.read_bytes(), "path": None}
        held.append({"image": bytes_of, "label": n % 2, "the label": (n + 1) % 2})
    pq.write_table(pa.Table.from_pylist(held), folder / "images.parquet")
    y = np.arange(COUNT) % 2
    images = generator.integers(0, 256, (COUNT, 8, 8, 3)).astype(np.uint8)
    np.savez(folder / "images.npz", x=images, y=y)
    numbers = generator.normal(size=(COUNT, 3))
    np.savez(folder / "numbers.npz", x=numbers, y=y)
    _csv(
        folder / "numbers.csv",
        [
            {"a": a, "b": b, "label": n % 2, "the label": (n + 1) % 2}
            for n, (a, b, _) in enumerate(numbers.tolist())
        ],
    )
    (folder / "pairs.py").write_text(
        "import torch\ndef pairs():\n    return [(torch.randn(3), n % 2) for n in range(20)]\n"
    )
    return folder


def _jsonl(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def _csv(file: Path, rows: list[dict[str, Any]]) -> None:
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    file.write_text("".join(f"{line}\n" for line in lines))


def _spec(folder: Path, source: str) -> str:
    return source if source == "self" else str(folder / source)


def _plain(example: Any) -> Any:
    if isinstance(example, dict):
        return {name: value.tolist() for name, value in example.items()}
    first = example[0] if isinstance(example, tuple) else example
    rest = [torch.as_tensor(one).tolist() for one in example[1:]] if first is not example else []
    return [first.tolist(), *rest]


def _read(case: Case, models: dict[str, OpenedModel], folder: Path, **options: Any) -> list[Any]:
    asked = DataOptions(task=case.task, own_windows=(4, 4, 4), **options)
    examples = open_examples(_spec(folder, case.source), models[case.model], asked)
    return [_plain(examples[place]) for place in range(4)]


@pytest.mark.parametrize("option", READING)
@pytest.mark.parametrize("name", CASES)
def test_every_option_is_used_or_refused(
    name: str, option: str, models: dict[str, OpenedModel], sources: Path
) -> None:
    case = CASES[name]
    given = {option: case.length if option == "length" else GIVEN[option]}
    if option in case.applies:
        read, without = (_read(case, models, sources, **o) for o in (given, {}))
        free = ("skip_broken", "image_size")  # nothing is broken; arrays have that size
        assert option in free or read != without, f"{option} changes nothing"
        return
    with pytest.raises(InputError) as refused:
        _read(case, models, sources, **given)
    message = str(refused.value)
    words = f"--{option.replace('_', '-')}" if option == "skip_broken" else f"{option}="
    assert words in message, message
    assert any(said in message for said in ("Leave", "need images", "Name one of them")), message


def test_an_option_that_one_of_the_parts_uses_is_used(
    models: dict[str, OpenedModel], sources: Path
) -> None:
    rows, lines = str(sources / "rows.jsonl"), str(sources / "text.txt")
    asked = DataOptions(text_column="the text", own_windows=(4, 4, 4))
    data = open_parts("self", "self", rows, models["writer"], asked)
    assert len(data.held_out) == COUNT
    with pytest.raises(InputError, match=r"text_column= has no part in self, .*text\.txt: the mod"):
        open_parts("self", "self", lines, models["writer"], asked)
    open_examples(lines, models["writer"], asked, beside=True)  # a guard is read as the data are
    with pytest.raises(InputError, match=r"text_column= has no part in .*text\.txt"):
        open_data(lines, models["writer"], asked)
