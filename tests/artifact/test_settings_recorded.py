"""What changes a model's inputs is recorded, done again where it isn't asked, and not undone.

For every setting: the artifact names it; ``evaluate`` and ``verify`` without the option compute
what they compute with it; an option or data that contradicts it is refused by both values.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from scipy.io import wavfile
from transformers import BertConfig, BertForMaskedLM
from typer.testing import CliRunner

import rankfold
from rankfold import ArtifactError, InputError, InputSettings
from rankfold.artifact.load import load
from rankfold.cli.commands import app
from rankfold.data.input_settings import joined
from tests.tiny_language_model import TEXT, save_tiny_llama, tiny_tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"
NET = '''
import torch
from torch import nn


class Net(nn.Module):
    """Of images of any size, sounds of any length, or rows of numbers."""

    def __init__(self, channels):
        super().__init__()
        self.first = nn.Linear(channels, 24)
        self.second = nn.Linear(24, 24)
        self.last = nn.Linear(24, 2)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2) if x.dim() > 2 else x
        x = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.last(x.mean(1) if x.dim() > 2 else x)


def one():
    return Net(1)


def three():
    return Net(3)
'''
SIZE = ("--size", "0.8", "--limit", "24", "--selection-limit", "12", "--held-out-limit", "24")


def cli(*words: object, code: int = 0) -> str:
    """What the command prints on stdout, or on stderr where it is to fail."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else done.stderr


def images(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(120):
        pixels = rng.integers(0, 256, (10, 14, 3), dtype=np.uint8)
        file = folder / "images" / f"class{number % 2}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    return folder / "images"


def arrays(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (120, 4, 5, 3), dtype=np.uint8)
    np.savez(folder / "x.npz", x=x, y=rng.integers(0, 2, 120))
    return folder / "x.npz"


def sounds(folder: Path, rate: int = 8000) -> Path:
    rng = np.random.default_rng(0)
    for number in range(120):
        file = folder / f"sounds{rate}" / f"class{number % 2}" / f"{number}.wav"
        file.parent.mkdir(parents=True, exist_ok=True)
        wavfile.write(file, rate, rng.standard_normal(40).astype(np.float32))
    return folder / f"sounds{rate}"


def table(folder: Path, columns: Sequence[str] = ("a", "b", "kind", "c")) -> Path:
    rng = np.random.default_rng(0)
    rows = [[*map(str, rng.standard_normal(3).round(3)), str(n % 2)] for n in range(120)]
    found = [dict(zip(("a", "b", "c", "kind"), row, strict=True)) for row in rows]
    name = f"{''.join(columns)}.csv"
    lines = [columns, *([row.get(c, "0") for c in columns] for row in found)]
    (folder / name).write_text("\n".join(",".join(line) for line in lines) + "\n")
    return folder / name


def records(folder: Path, *names: str) -> Path:
    texts = [TEXT[30 * n : 30 * n + 40].replace("\n", " ") for n in range(120)]
    rows = [dict.fromkeys(names, text) for text in texts]
    file = folder / f"{'-'.join(names)}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def conversations(folder: Path) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}
        for text in (TEXT[30 * n : 30 * n + 30] for n in range(120))
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "chat.jsonl"


def plain_text(folder: Path) -> Path:
    (folder / "text.txt").write_text(TEXT)
    return folder / "text.txt"


@dataclass(frozen=True)
class Case:
    """A run with an option, or with data that decides something.

    Attributes:
        model: What makes it, or the folder of one.
        data: Writes it.
        asked: Options of the run.
        recorded: What the artifact names of it.
        other: An option that contradicts it, and words of the message.
    """

    model: str
    data: Callable[[Path], Path]
    asked: tuple[str, ...]
    recorded: dict[str, Any]
    other: tuple[tuple[str, str, str], ...] = ()


PIXELS = ("--mean", ".4,.5,.6", "--std", ".1,.2,.3")
CASES = {
    "arrays": Case(
        "three", arrays, PIXELS,
        {"prepared_by": "rankfold", "mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3],
         "shape": [3, 4, 5]},
        (("--mean", ".4", "--mean is 0.4, and the model in out was made with 0.4,0.5,0.6"),
         ("--std", "1", "--std is 1, and the model in out was made with 0.1,0.2,0.3")),
    ),
    "arrays without": Case(
        "three", arrays, (),
        {"prepared_by": "rankfold", "mean": [0], "std": [1], "shape": [3, 4, 5]},
        (("--mean", ".4,.4,.4", "--mean is 0.4,0.4,0.4, and the model in out was made with 0"),),
    ),
    "images": Case(
        "three", images, (*PIXELS, "--image-size", "8"),
        {"prepared_by": "rankfold", "mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3],
         "image_size": 8, "shape": [3, 8, 8]},
        (("--image-size", "9", "--image-size is 9, and the model in out was made with 8"),),
    ),
    "table": Case(
        "three", table, ("--label-column", "kind"),
        {"columns": {"label": "kind"}, "features": ["a", "b", "c"]},
        (("--label-column", "a", "--label-column is a, and the model was made with the colum"),),
    ),
    "text": Case(
        "llama", plain_text, ("--length", "16"), {"length": 16},
        (("--length", "12", "--length is 12, and the model in out was made with 16"),),
    ),
    "default length": Case(
        "llama", plain_text, (), {"length": 64},
        (("--length", "12", "--length is 12, and the model in out was made with 64"),),
    ),
    "column": Case(
        "llama", lambda f: records(f, "title", "review", "text"), ("--text-column", "review"),
        {"length": 64, "columns": {"text": "review"}},
        (("--text-column", "text", "--text-column is text, and the model was made with the colu"),),
    ),
    "masked": Case(
        "bert", lambda f: records(f, "text"), ("--seed", "5", "--task", "masked-lm"),
        {"length": 48, "columns": {"text": "text"}, "seed": 5},
        (("--task", "embedding", "--task is embedding, and the model in out was made for masked"),),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    (folder / "net.py").write_text(NET)
    space: dict[str, Any] = {}
    exec(NET, space)
    for name in ("one", "three"):
        torch.manual_seed(0)
        save_file(space[name]().state_dict(), folder / f"{name}.safetensors")
    save_tiny_llama(folder / "llama")
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = tokenizer.convert_ids_to_tokens(5)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=48,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    return folder


@pytest.fixture
def work(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net.py").symlink_to(models / "net.py")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(models: Path, model: str, data: Path, *more: str, code: int = 0) -> str:
    own = (models / model).is_dir()
    named = (
        [models / model]
        if own
        else [f"net.py:{model}", "--weights", models / f"{model}.safetensors"]
    )
    return cli("lossless", *named, "--data", data, *SIZE, *more, "--out", "out", code=code)


def opened(model: str) -> tuple[str, ...]:
    return () if model in ("llama", "bert") else ("--model", f"net.py:{model}")


@pytest.mark.parametrize("name", CASES)
def test_what_is_recorded_is_done_again_and_not_undone(name: str, models: Path, work: Path) -> None:
    case = CASES[name]
    data = case.data(work)
    run(models, case.model, data, *case.asked)
    manifest = json.loads((work / "out" / "rankfold.json").read_text())
    assert manifest["input_settings"] == case.recorded
    assert rankfold.recorded_inputs("out").as_dict() == case.recorded

    named = next(line for line in cli("inspect", "out").splitlines() if line.startswith("inputs: "))
    assert all(f"{name} " in named for name in case.recorded)

    own = opened(case.model)
    told = [word for word in case.asked if word not in ("--seed", "5")]
    evaluate = ("evaluate", "out", "--data", data, *own, "--json")
    found = [json.loads(cli(*evaluate, *more))["loss"] for more in ((), told)]
    assert found[0] == found[1]
    assert json.loads(cli("verify", "out", "--data", data, *own, "--json"))["agrees"]
    for option, value, words in case.other:
        for command in ("evaluate", "verify"):
            refused = cli(command, "out", "--data", data, *own, option, value, code=2)
            assert words in refused, refused


def test_numbers_of_a_table_are_found_by_their_names(models: Path, work: Path) -> None:
    run(models, "three", table(work), "--label-column", "kind")
    evaluate = ("evaluate", "out", "--model", "net.py:three", "--json", "--data")
    found = [
        json.loads(cli(*evaluate, table(work, columns)))["loss"]
        for columns in (("a", "b", "kind", "c"), ("more", "c", "b", "kind", "a"))
    ]
    assert found[0] == found[1]
    lacking = cli(*evaluate, table(work, ("a", "kind", "c")), code=2)
    assert "has no column 'b'; the model was made with the columns 'a', 'b', 'c'" in lacking


def test_parts_that_are_prepared_otherwise_are_refused(models: Path, work: Path) -> None:
    parts = [table(work, columns) for columns in (("a", "b", "c", "kind"), ("b", "a", "c", "kind"))]
    named = zip(("--calibration", "--selection", "--held-out"), (*parts, parts[0]), strict=True)
    model = ("net.py:three", "--weights", models / "three.safetensors", "--label-column", "kind")
    words = [word for pair in named for word in pair]
    refused = cli("lossless", *model, *words, *SIZE, "--out", "out", code=2)
    assert "features is a,b,c in" in refused and "and b,a,c in" in refused


def test_sounds_of_another_rate_are_refused(models: Path, work: Path) -> None:
    run(models, "one", sounds(work))
    assert rankfold.recorded_inputs("out") == InputSettings("rankfold", sample_rate=8000)
    evaluate = ("evaluate", "out", "--model", "net.py:one", "--json", "--data")
    assert json.loads(cli(*evaluate, work / "sounds8000"))["examples"] == 120
    refused = cli(*evaluate, sounds(work, 16000), code=2)
    assert "sample_rate is 16000, and the model in out was made with 8000" in refused


def test_another_data_set_may_have_other_names_of_columns(models: Path, work: Path) -> None:
    run(models, "llama", records(work, "review"), "--text-column", "review")
    other = ("evaluate", "out", "--data", records(work, "text"), "--json")
    assert "has no column 'review'" in cli(*other, code=2)
    assert json.loads(cli(*other, "--text-column", "text"))["examples"] > 90


TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"


def test_another_chat_template_is_refused(models: Path, work: Path) -> None:
    folder = work / "talker"
    folder.mkdir()
    for file in (models / "llama").iterdir():
        shutil.copy(file, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    data = conversations(work)
    cli("lossless", folder, "--data", data, *SIZE, "--out", "out")
    evaluate = ("evaluate", "out", "--data", data, "--json")
    assert json.loads(cli(*evaluate))["examples"] > 90
    (work / "out" / "chat_template.jinja").write_text(TEMPLATE.replace(": ", " says "))
    refused = cli(*evaluate, code=2)
    assert "template is" in refused and "the folder's files as they were saved" in refused


def test_an_option_that_contradicts_the_processor_is_refused(models: Path, work: Path) -> None:
    run(models, "three", arrays(work))
    manifest = json.loads((work / "out" / "rankfold.json").read_text())
    manifest["input_settings"] = {"prepared_by": "processor"}
    (work / "out" / "rankfold.json").write_text(json.dumps(manifest))
    evaluate = ("evaluate", "out", "--model", "net.py:three", "--data", work / "x.npz")
    told = "--mean is 0.5, and images of the model in out are prepared as its processor's files say"
    assert told in cli(*evaluate, "--mean", ".5", code=2)
    # The processor's files are missing, so that nothing would prepare the images.
    lacking = cli(*evaluate, code=2)
    assert "prepared_by is rankfold, and the model in out was made with processor" in lacking


# In Python


def trained(folder: Path, inputs: InputSettings | None = None) -> Path:
    space: dict[str, Any] = {}
    exec(NET, space)
    torch.manual_seed(0)
    values, labels = torch.randn(60, 3, 4, 4), torch.randint(0, 2, (60,))
    data = torch.utils.data.TensorDataset(values, labels)
    result = rankfold.lossless(space["three"](), data, size=0.8, objective="activation")
    return result.save(folder, input_settings=inputs)


def test_options_that_a_function_would_drop_are_refused(models: Path, work: Path) -> None:
    weights = ("--weights", models / "three.safetensors", "--out", "out")
    for option in (("--mean", ".5"), ("--std", ".5"), ("--image-size", "8")):
        words = ("lossless", "net.py:three", "--data", "net.py:three", *SIZE, *option, *weights)
        assert f"{option[0]} has no part in net.py:three" in cli(*words, code=2)


def test_a_size_that_arrays_dont_have_is_refused(models: Path, work: Path) -> None:
    words = run(models, "three", arrays(work), "--image-size", "8", code=2)
    assert "--image-size is 8, and the images in" in words and "have 4 x 5 pixels" in words


def test_what_python_has_prepared_is_recorded_where_it_is_said(work: Path) -> None:
    assert rankfold.recorded_inputs(trained(work / "silent")) == InputSettings()
    told = InputSettings("rankfold", (0.5,), (0.25,), image_size=4)
    assert rankfold.recorded_inputs(trained(work / "told", told)) == told
    evaluate = ("--model", "net.py:three", "--data", images(work), "--json")
    found = [
        json.loads(cli("evaluate", folder, *evaluate, *more))["loss"]
        for folder, more in (
            ("told", ()),
            ("silent", ("--mean", ".5", "--std", ".25", "--image-size", "4")),
        )
    ]
    assert found[0] == found[1]


def test_an_export_takes_the_shape_and_passes_the_settings_on(models: Path, work: Path) -> None:
    run(models, "three", arrays(work), *PIXELS)
    own = ("--model", "net.py:three")
    done = json.loads(cli("export", "out", "--to", "pt2", "--out", "program", *own, "--json"))
    assert done["to"] == "pt2"
    about = json.loads((work / "program" / "export.json").read_text())
    assert about["input_settings"] == CASES["arrays"].recorded
    refused = cli(
        "export", "out", "--to", "pt2", "--out", "other", *own, "--input-shape", "3x8x8", code=2
    )
    assert "shape is 3x8x8, and the model in out was made with 3x4x5" in refused
    assert not (work / "other").exists()


# The record itself

_NUMBERS = st.lists(st.floats(-9, 9), min_size=1, max_size=4).map(tuple)
_POSITIVE = st.lists(st.floats(0.01, 9), min_size=1, max_size=4).map(tuple)
_WHOLE = st.integers(1, 10**6)
_TEXTS = st.lists(st.text(), max_size=3).map(tuple)
SETTINGS = st.builds(
    InputSettings,
    prepared_by=st.sampled_from([None, "rankfold", "processor"]),
    mean=st.none() | _NUMBERS,
    std=st.none() | _POSITIVE,
    image_size=st.none() | _WHOLE,
    shape=st.none() | st.lists(_WHOLE, min_size=1, max_size=3).map(tuple),
    sample_rate=st.none() | _WHOLE,
    length=st.none() | _WHOLE,
    columns=st.dictionaries(st.text(), st.text(), max_size=2),
    features=st.none() | _TEXTS,
    template=st.none() | st.just("0" * 64),
    prompt=st.none() | st.text(),
    lower_case=st.none() | st.booleans(),
    seed=st.none() | st.integers(-(2**62), 2**62),
    pooling=st.none() | _TEXTS,
)


@given(SETTINGS)
def test_the_record_comes_back_from_json(settings: InputSettings) -> None:
    assert InputSettings.from_dict(json.loads(json.dumps(settings.as_dict()))) == settings


@given(SETTINGS, SETTINGS)
def test_sources_agree_or_are_refused_by_what_differs(
    one: InputSettings, other: InputSettings
) -> None:
    differ = one.differences(other)
    assert sorted(differ) == sorted(other.differences(one))
    assert not one.differences(one)
    if differ:
        with pytest.raises(InputError, match=f"^{differ[0]} is "):
            joined([("a", one), ("b", other)])
    else:
        together = joined([("a", one), ("b", other)]).decided()
        assert together.keys() == {*one.decided(), *other.decided()}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mean", "0.5"), ("mean", []), ("mean", [True]), ("mean", [None]), ("std", [0]),
        ("image_size", 0), ("image_size", 8.5), ("shape", [3, 0, 4]), ("sample_rate", "8000"),
        ("length", -1), ("columns", ["text"]), ("columns", {"text": 3}), ("template", "abc"),
        ("prompt", 3), ("lower_case", 1), ("seed", "x"), ("pooling", "mean"), ("invented", 1),
        ("prepared_by", "magic"),
    ],
)  # fmt: skip
def test_a_damaged_record_is_refused_by_its_field(name: str, value: Any, tmp_path: Path) -> None:
    source = FIXTURES / "artifact-0.1.0" / "llama"
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((source / "rankfold.json").read_text())
    (tmp_path / "rankfold.json").write_text(
        json.dumps({**manifest, "input_settings": {name: value}})
    )
    with pytest.raises(ArtifactError, match=f"is damaged: in input_settings, .*{name}"):
        load(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "own", "blocks"])
def test_folders_of_before_record_nothing_and_contradict_nothing(kind: str) -> None:
    assert rankfold.recorded_inputs(FIXTURES / "artifact-0.1.0" / kind) == InputSettings()
