"""What sentence-transformers keeps beside a transformer goes along, and computes what it computes.

The truth is written here with NumPy and loops, as the modules of sentence-transformers say it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForMaskedLM, BertModel
from typer.testing import CliRunner

import rankfold
from rankfold.cli.commands import app
from rankfold.cli.data_options import DataOptions
from rankfold.cli.open import open_examples, open_model
from rankfold.errors import InputError
from rankfold.integrations.sentence_folder import sentence_folder
from rankfold.integrations.transformers import load_folder, pooling_of
from rankfold.tasks.agreement import unit_embeddings
from rankfold.tasks.pooling import MODES, Pooling
from tests.cases import SEEDS, normal
from tests.tiny_language_model import TEXT, tiny_tokenizer

KEYS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
WIDTH = 16
SIZE = ("--size", "0.8", "--limit", "24", "--selection-limit", "12", "--held-out-limit", "24")


def truth(modes: tuple[str, ...], hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Of ``(length, features)`` and ``(length,)`` zeros and ones, one embedding."""
    kept = [(place, row) for place, row in enumerate(hidden) if mask[place]]
    rows = np.array([row for _, row in kept])
    weights = np.array([place + 1 for place, _ in kept])[:, None]
    found = {
        "cls": hidden[0],
        "max": rows.max(0),
        "mean": rows.mean(0),
        "mean_sqrt_len_tokens": rows.sum(0) / np.sqrt(len(rows)),
        "weightedmean": (rows * weights).sum(0) / weights.sum(),
        "lasttoken": rows[-1],
    }
    return np.concatenate([found[mode] for mode in KEYS if mode in modes])


@given(SEEDS, st.sets(st.sampled_from([*KEYS]), min_size=1), st.booleans())
def test_every_pooling_is_that_of_sentence_transformers(
    seed: int, wanted: set[str], left: bool
) -> None:
    modes = tuple(mode for mode in MODES if mode in wanted)
    hidden = normal(seed, 3, 6, 4)
    lengths = [1 + (seed + n) % 6 for n in range(3)]
    mask = torch.tensor([[1] * n + [0] * (6 - n) for n in lengths])
    mask = mask.flip(1) if left else mask
    found = Pooling(modes)(hidden, mask)
    wanted_rows = [truth(modes, h.numpy(), m.numpy()) for h, m in zip(hidden, mask, strict=True)]
    torch.testing.assert_close(found, torch.from_numpy(np.stack(wanted_rows)))


def write(folder: Path, *, modes: tuple[str, ...] = ("mean",), **more: Any) -> Path:
    """A folder as sentence-transformers saves it; ``more`` says what is otherwise."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=48, initializer_range=0.5,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    inner = folder / more.get("inner", "")
    inner.mkdir(parents=True)
    more.get("model", BertModel)(config).save_pretrained(inner)
    tokenizer.save_pretrained(inner)
    types = "sentence_transformers.models."
    modules = [
        {"idx": 0, "name": "0", "path": more.get("inner", ""), "type": f"{types}Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{types}Pooling"},
    ]
    said: dict[str, Any] = {"word_embedding_dimension": WIDTH}
    said |= {key: mode in modes for mode, key in KEYS.items()}
    _json(folder / "1_Pooling" / "config.json", said | more.get("pooling", {}))
    if more.get("dense"):
        weight, bias = torch.randn(5, WIDTH * len(modes)), torch.randn(5)
        activation = "torch.nn.modules.activation.Tanh"
        said = {"in_features": weight.shape[1], "out_features": 5, "bias": True}
        _json(folder / "2_Dense" / "config.json", said | {"activation_function": activation})
        save_file(
            {"linear.weight": weight, "linear.bias": bias}, folder / "2_Dense" / "model.safetensors"
        )
        modules.append({"idx": 2, "name": "2", "path": "2_Dense", "type": f"{types}Dense"})
    modules.append({"idx": 3, "name": "3", "path": "3_Normalize", "type": f"{types}Normalize"})
    _json(folder / "modules.json", modules)
    _json(inner / "sentence_bert_config.json", {"max_seq_length": 20, "do_lower_case": False})
    _json(folder / "config_sentence_transformers.json", more.get("settings", {"prompts": {}}))
    return folder


def _json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def sentences(folder: Path) -> Path:
    lines = [TEXT[70 * n : 70 * n + 20 + n % 30].replace("\n", " ").strip() for n in range(120)]
    (folder / "text.txt").write_text("\n".join(line for line in lines if line) + "\n")
    return folder / "text.txt"


def embeddings(folder: Path, texts: list[str]) -> np.ndarray:
    """As sentence-transformers computes them of what stands in a folder, one text at a time."""
    modules = json.loads((folder / "modules.json").read_text())
    inner = folder / modules[0]["path"]
    settings = json.loads((folder / "config_sentence_transformers.json").read_text())
    told = json.loads((inner / "sentence_bert_config.json").read_text())
    prompt = settings["prompts"].get(settings.get("default_prompt_name"), "")
    model, tokenizer = AutoModel.from_pretrained(inner).eval(), AutoTokenizer.from_pretrained(inner)
    said = json.loads((folder / "1_Pooling" / "config.json").read_text())
    modes = tuple(mode for mode, key in KEYS.items() if said[key])
    found = []
    for text in texts:
        text = (prompt + text).strip()
        text = text.lower() if told["do_lower_case"] else text
        batch = tokenizer(
            text, return_tensors="pt", truncation=True, max_length=told["max_seq_length"]
        )
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state[0].numpy()
        value = truth(modes, hidden, batch["attention_mask"][0].numpy())
        if (folder / "2_Dense").exists():
            from safetensors.numpy import load_file

            dense = load_file(folder / "2_Dense" / "model.safetensors")
            value = np.tanh(dense["linear.weight"] @ value + dense["linear.bias"])
        found.append(value / np.linalg.norm(value))
    return np.stack(found)


KINDS: Mapping[str, dict[str, Any]] = {
    "mean": {},
    "first token": {"modes": ("cls",)},
    "several": {"modes": ("max", "lasttoken")},
    "dense": {"modes": ("weightedmean",), "dense": True},
    "prompt": {
        "modes": ("mean_sqrt_len_tokens",),
        "settings": {"prompts": {"q": "query: "}, "default_prompt_name": "q"},
    },
    "inner folder": {"modes": ("cls",), "inner": "0_Transformer"},
    "named by its head": {"modes": ("cls",), "architectures": ["BertForMaskedLM"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_folder_makes_embeddings_as_its_original(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    more = dict(KINDS[kind])
    named = more.pop("architectures", None)
    folder = write(tmp_path / "encoder", **more)
    inner = folder / more.get("inner", "")
    if named:
        config = json.loads((inner / "config.json").read_text())
        _json(inner / "config.json", config | {"architectures": named})
    lines = sentences(tmp_path).read_text().splitlines()
    texts, data = lines[:24], tmp_path / "held-out.txt"
    parts: list[object] = []
    for name, part in (
        ("held-out", texts),
        ("calibration", lines[24:60]),
        ("selection", lines[60:]),
    ):
        (tmp_path / f"{name}.txt").write_text("\n".join(part) + "\n")
        parts += [f"--{name}", tmp_path / f"{name}.txt"]

    def loss(*words: object) -> Any:
        done = CliRunner().invoke(app, [*map(str, words), "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    report = loss("lossless", inner, *parts, *SIZE, "--out", "out")
    recorded = report["input_settings"]
    modes = "+".join(m for m in MODES if m in more.get("modes", ("mean",)))
    steps = ["dense 16 to 5, Tanh"] * more.get("dense", False)
    assert recorded["pooling"] == [modes, *steps, "normalize"]
    assert recorded["length"] == 20
    # What rankfold calls the embedding is what sentence-transformers computes.
    opened = open_model(str(inner))
    examples = open_examples(str(data), opened, DataOptions())[: len(texts)]
    pooling = pooling_of(opened.model)
    assert pooling is not None
    with torch.no_grad():
        found = [
            unit_embeddings(opened.model, {k: v[None] for k, v in e.items()}, pooling)
            for e in examples
        ]
    original = embeddings(folder, texts)
    np.testing.assert_allclose(torch.cat(found).numpy(), original, atol=1e-5)
    # And so of the saved folder, whose distance from the original is the one that is reported.
    saved = tmp_path / "out"
    for name in ("sentence_bert_config.json", "config_sentence_transformers.json"):
        assert (saved / name).is_file()
    distances = np.square(embeddings(saved, texts) - original).sum(1)
    assert report["data"]["held_out"]["examples"] == len(texts)
    assert distances.mean() == pytest.approx(report["loss"]["factorized"], rel=1e-4) != 0
    assert loss("verify", "out", "--model", inner, "--data", data)["agrees"]
    # The dense export is opened without rankfold.
    loss("export", "out", "--to", "dense", "--out", "dense")
    np.testing.assert_allclose(
        embeddings(tmp_path / "dense", texts), embeddings(saved, texts), atol=1e-5
    )


def test_python_finds_the_pooling_of_the_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "encoder", modes=("cls",))
    model = BertModel.from_pretrained(folder).eval()
    torch.manual_seed(0)
    data = [{"input_ids": torch.randint(1, 200, (9,))} for _ in range(60)]
    result = rankfold.lossless(model, data, size=0.8, task="embedding", objective="activation")
    saved = result.save(tmp_path / "out")
    assert rankfold.recorded_inputs(saved).pooling == ("cls", "normalize")
    found = rankfold.verify(saved, rankfold.load(saved), data, original=model)
    assert found.holds and found.certificate is not None
    # Another pooling in the saved folder is another embedding than the one that was certified.
    said = json.loads((saved / "1_Pooling" / "config.json").read_text())
    _json(saved / "1_Pooling" / "config.json", said | {KEYS["cls"]: False, KEYS["mean"]: True})
    with pytest.raises(InputError, match=r"by mean, normalize .*was made with cls, normalize"):
        rankfold.verify(saved, rankfold.load(saved), data, original=model)
    shutil.rmtree(saved / "1_Pooling")
    with pytest.raises(InputError, match=r"1_Pooling.config\.json can't be read"):
        rankfold.verify(saved, rankfold.load(saved), data, original=model)


def _modules(change: Callable[[list[dict[str, Any]]], Any]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        listed = json.loads((folder / "modules.json").read_text())
        _json(folder / "modules.json", change(listed) or listed)

    return changed


def _said(name: str, **values: Any) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        _json(folder / name, json.loads((folder / name).read_text()) | values)

    return changed


BAD: Mapping[str, tuple[Callable[[Path], None], str]] = {
    "another module": (
        _modules(lambda m: m[2].update(type="sentence_transformers.models.LSTM")),
        "names LSTM|names sentence_transformers.models.LSTM",
    ),
    "own code": (_modules(lambda m: m[0].update(type="custom.Transformer")), "custom.Transformer"),
    "path above": (_modules(lambda m: m[1].update(path="../1_Pooling")), r"'\.\./1_Pooling'"),
    "absolute path": (_modules(lambda m: m[1].update(path="/etc")), "names the path '/etc'"),
    "no list": (_modules(lambda m: {"modules": m}), "is no list of modules"),
    "nothing": (lambda f: (f / "modules.json").write_text("["), "is not valid JSON"),
    "no pooling": (_modules(lambda m: m[:1]), "names no Pooling"),
    "two poolings": (_modules(lambda m: [*m, m[1]]), "names a Pooling behind other modules"),
    "unknown pooling": (_said("1_Pooling/config.json", pooling_mode="sum"), "the pooling sum"),
    "pickle": (lambda f: (f / "2_Dense" / "model.safetensors").rename(f / "2_Dense" / "x.bin"),
               "has no model.safetensors; rankfold reads no pickles"),
    "activation": (
        _said("2_Dense/config.json", activation_function="os.system"), "the activation os.system"
    ),
    "prompt that is left out": (
        lambda f: (_said("1_Pooling/config.json", include_prompt=False)(f), _said(
            "config_sentence_transformers.json", prompts={"q": "a"}, default_prompt_name="q")(f)),
        "leaves the prompt 'a' out",
    ),
    "prompt that is not there": (
        _said("config_sentence_transformers.json", default_prompt_name="q"), "has no prompt 'q'"
    ),
    "length": (_said("sentence_bert_config.json", max_seq_length="20"), "max_seq_length '20'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_rankfold_cant_do_is_refused_by_its_file(name: str, tmp_path: Path) -> None:
    change, words = BAD[name]
    folder = write(tmp_path / "encoder", dense=True)
    change(folder)
    with pytest.raises(InputError, match=words) as refused:
        opened = open_model(str(folder))
        open_examples(str(sentences(tmp_path)), opened, DataOptions())
        pooling_of(opened.model)
    assert "encoder" in str(refused.value)


def test_other_folders_have_nothing_of_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "encoder")
    (folder / "modules.json").unlink()
    assert sentence_folder(folder) is None
    (tmp_path / "modules.json").write_text("of a web page, [")  # beside the folder, of anything
    assert sentence_folder(folder) is None
    (tmp_path / "modules.json").write_text(json.dumps([{"path": "another", "type": "x"}]))
    assert sentence_folder(folder) is None


def test_the_folder_around_a_transformer_names_it_alone(tmp_path: Path) -> None:
    folder = write(tmp_path / "encoder", inner="0_Transformer", dense=True)
    with pytest.raises(InputError, match=r"Give this:\n  .*0_Transformer$"):
        open_model(str(folder))


def test_a_head_in_the_file_is_kept(tmp_path: Path) -> None:
    folder = write(tmp_path / "encoder", model=BertForMaskedLM)
    assert type(load_folder(folder)) is BertForMaskedLM
