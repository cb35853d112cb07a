"""The folder in which the command meets bad input: one good file of each kind, and what is wrong.

Good are ``net.py``, ``net.safetensors``, ``data.npz``, ``llama``, ``text.txt``, ``bert`` and the
artifact ``made``; every other name says what is wrong with it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from tests.command_line import images, rankfold
from tests.small_tokenizers import FAMILIES
from tests.tiny_language_model import TEXT, tiny_tokenizer

MINE = "keep me"
MORE = """

def syntax():
    return eval("1 +")


def needs_argument(width):
    return Net()


def two_nets():
    return [Net(), Net()]


def meta():
    with torch.device("meta"):
        return Net()


def scalar_output():
    net = Net()
    net.forward = lambda x: x.sum()
    return net


def no_output():
    net = Net()
    net.forward = lambda x: None
    return net


def raising_forward():
    net = Net()

    def forward(x):
        raise RuntimeError("not on a Monday")

    net.forward = forward
    return net


def locked():
    import threading

    net = Net()
    net.lock = threading.Lock()
    return net


def no_data():
    return None


def texts():
    return "a text, not examples"


def unlabelled():
    return [torch.rand(1, 8, 8) for _ in range(60)]


def ragged():
    return [(torch.rand(1, 8, 8 + number % 3), 0) for number in range(60)]


def ending():
    def read():
        for number in range(40):
            if number == 30:
                raise OSError("the disk is gone")
            yield torch.rand(1, 8, 8), number % 4

    return read()


def float_labels():
    return [(torch.rand(1, 8, 8), number % 4 + 0.5) for number in range(60)]


def exiting():
    raise SystemExit(0)
"""


def write_bad_files(folder: Path) -> None:
    """Beside the project of ``tests.command_line.make_project``."""
    (folder / "net.py").write_text((folder / "net.py").read_text() + MORE)
    _sources(folder)
    _weights(folder)
    _models(folder)
    _artifacts(folder)


def _arrays(folder: Path) -> None:
    x, y = images(400, seed=3)
    np.savez(folder / "labels.npz", x=x, y=y + 7)
    np.savez(folder / "negative.npz", x=x, y=y - 3)
    np.savez(folder / "halves.npz", x=x, y=y + 0.5)
    nan = x[:, None].astype(np.float32)
    nan[17] = np.nan
    np.savez(folder / "nan.npz", x=nan, y=y)
    np.savez(folder / "noy.npz", x=x)
    np.savez(folder / "none.npz", x=x[:0], y=y[:0])
    np.savez(folder / "unequal.npz", x=x, y=y[:50])
    np.savez(folder / "few.npz", x=x[:9], y=y[:9])
    np.savez(folder / "colour.npz", x=np.repeat(x[..., None], 3, axis=3), y=y)
    np.savez(folder / "object.npz", x=np.array([{}, {}], dtype=object), y=y[:2])
    np.savez(folder / "complex.npz", x=x[:, None] * 1j, y=y)
    np.savez(folder / "words.npz", x=np.array(["a", "b"] * 200), y=y)
    whole = (folder / "data.npz").read_bytes()
    (folder / "cut.npz").write_bytes(whole[: len(whole) // 2])


def _records(folder: Path) -> None:
    def lines(name: str, *rows: object) -> None:
        texts = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        (folder / name).write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")

    words = [letter * times for times in (1, 2) for letter in "abcdefghijklmnopqrst"]
    good = [{"text": f"the film was {word}", "label": len(word) % 2} for word in words]
    lines("good.jsonl", *good)
    lines("broken.jsonl", *good[:3], '{"text": "cut', *good[3:])
    lines("list.jsonl", *good[:2], '["a", 1]')
    lines("nolabel.jsonl", *({"text": row["text"]} for row in good))
    lines("notext.jsonl", *({"body": row["text"], "label": 1} for row in good))
    lines("number.jsonl", *good, {"text": 7, "label": 1})
    lines("labels.jsonl", *good, {"text": "the film", "label": 9})
    lines("names.jsonl", *good, {"text": "the film", "label": "splendid"})
    lines("blank.jsonl", "", "", "")
    lines("three.jsonl", *good[:3])
    lines("one.json", json.dumps(good))
    lines("good.csv", "text,label", *(f"{row['text']},{row['label']}" for row in good))
    lines("header.csv", "text,label")
    lines("columns.csv", "text,label", "good,1", "the film, and more,1,0")
    lines("twice.csv", "text,text,label", "good,bad,1")
    lines("quote.csv", "text,label", "good,1", '"never closed,0')
    (folder / "latin.csv").write_bytes("text,label\ncafé,1\n".encode("latin-1") * 30)
    lines("nolabel.tsv", "text\tother", "good\t1")
    pq.write_table(pa.table({"text": ["good"] * 30}), folder / "nolabel.parquet")
    (folder / "broken.parquet").write_bytes(b"PAR1 and no more")
    lines("text.parquet", "text,label", "good,1")
    (folder / "saved").mkdir()
    (folder / "saved" / "dataset_info.json").write_text("{}")
    (folder / "saved" / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]})
    )
    (folder / "saved" / "data-00000-of-00001.arrow").write_bytes(b"ARROW1 no more")
    lines("pairs.jsonl", *({"tokens": ["the", "film"], "tags": [0]} for _ in range(40)))
    lines("chat.jsonl", *({"messages": [{"role": "user"}]} for _ in range(40)))


def _sources(folder: Path) -> None:
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("Too short a text to be split in three.")
    (folder / "latin.txt").write_bytes("café".encode("latin-1") * 400)
    (folder / "utf16.txt").write_bytes("the film was good. ".encode("utf-16") * 400)
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 40)
    (folder / "white.txt").write_text(" \n\t\n" * 200)
    (folder / "text.txt").write_text(TEXT[:9000])
    (folder / "lines.txt").write_text("the film was good\n" * 40)
    _arrays(folder)
    _records(folder)
    (folder / "one" / "only").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "one" / "only" / "a.png")
    for label in ("cat", "dog"):
        (folder / "broken images" / label).mkdir(parents=True)
        (folder / "broken images" / label / "a.png").write_bytes(b"\x89PNG not an image")
        (folder / "broken sounds" / label).mkdir(parents=True)
        (folder / "broken sounds" / label / "a.wav").write_bytes(b"RIFF not a sound")
        for place, name in (("mixed", "a.png"), ("mixed", "a.wav"), ("empty classes", None)):
            (folder / place / label).mkdir(parents=True, exist_ok=True)
            if name is not None:
                (folder / place / label / name).write_bytes(b"any")
    (folder / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "flat" / "a.png")
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text(TEXT[:500])
    (folder / "nothing").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "mine.txt").write_text(MINE)


def _weights(folder: Path) -> None:
    weights = load_file(folder / "net.safetensors")
    save_file({**weights, "out.weight": torch.zeros(5, 64)}, folder / "shape.safetensors")
    save_file({**weights, "extra": torch.zeros(1)}, folder / "extra.safetensors")
    less = {name: tensor for name, tensor in weights.items() if name != "hidden.bias"}
    save_file(less, folder / "less.safetensors")
    for name, value in (("nan", torch.nan), ("inf", torch.inf)):
        conv = torch.full_like(weights["conv.weight"], value)
        save_file({**weights, "conv.weight": conv}, folder / f"{name}.safetensors")
    save_file({}, folder / "no.tensors.safetensors")
    (folder / "broken.safetensors").write_bytes(b"not safetensors at all")
    (folder / "zero.safetensors").write_bytes(b"")
    whole = (folder / "net.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[:-100])
    (folder / "page.safetensors").write_text("<!DOCTYPE html><html>Not found</html>")
    torch.save(weights, folder / "net.pth")
    (folder / "syntax.py").write_text("def net(:\n    return 1\n")
    (folder / "imports.py").write_text("import no_such_module_of_mine\n")
    (folder / "leaves.py").write_text("raise SystemExit('bye')\n")


def _llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def _bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=len(FAMILIES["bert"]()),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
            num_labels=2,
        )
    )


def _json(file: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(file.read_text(encoding="utf-8"))
    change(value)
    file.write_text(json.dumps(value), encoding="utf-8")


def _models(folder: Path) -> None:
    def other(name: str, of: str = "llama") -> Path:
        return Path(shutil.copytree(folder / of, folder / name))

    _llama().save_pretrained(folder / "llama")
    tiny_tokenizer().save_pretrained(folder / "llama")
    _bert().save_pretrained(folder / "bert")
    FAMILIES["bert"]().save_pretrained(folder / "bert")
    (folder / "novice").mkdir()
    (folder / "novice" / "config.json").write_text('{"model_type": "no-such-model"}')
    (folder / "typeless").mkdir()
    (folder / "typeless" / "config.json").write_text('{"hidden_size": 8}')
    (other("no config") / "config.json").unlink()
    (other("broken config") / "config.json").write_text('{"model_type": "llama",')
    (other("list config") / "config.json").write_text("[]")
    _json(other("wide") / "config.json", lambda config: config.update(hidden_size=32))
    _json(other("deep") / "config.json", lambda config: config.update(num_hidden_layers=2))
    _json(other("worded") / "config.json", lambda config: config.update(hidden_size="many"))
    (other("no weights") / "model.safetensors").unlink()
    cut = other("cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-500])
    index = other("shards") / "model.safetensors.index.json"
    (index.parent / "model.safetensors").unlink()
    shard = "model-00001-of-00001.safetensors"
    names = load_file(folder / "llama" / "model.safetensors")
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, shard)}))
    tensors = load_file(folder / "llama" / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, other("nan") / "model.safetensors", metadata={"format": "pt"})
    (other("no tokenizer") / "tokenizer.json").unlink()
    (folder / "no tokenizer" / "tokenizer_config.json").unlink()
    (other("broken tokenizer") / "tokenizer.json").write_text("{")
    (folder / "sheet.xlsx").write_bytes(b"PK of a spreadsheet")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "somebody/llama"})
    )
    remote = {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.Mine"}}
    (folder / "remote").mkdir()
    (folder / "remote" / "config.json").write_text(json.dumps(remote))
    (folder / "hub" / "snapshots" / "abc").mkdir(parents=True)
    (folder / "hub" / "refs").mkdir()
    (folder / "hub" / "snapshots" / "abc" / "config.json").write_text("{}")
    (folder / "text.gguf").write_text("no GGUF")
    (folder / "head.gguf").write_bytes(b"GGUF\x03\0\0\0")


def _artifacts(folder: Path) -> None:
    """``made``, and copies of it with one thing wrong."""
    few = ("--limit", 40, "--selection-limit", 20, "--held-out-limit", 20, "--effort", "fast")
    net = ("net.py:net", "--weights", "net.safetensors", "--data", "data.npz")
    rankfold("lossless", *net, "--size", 0.6, *few, "--out", "made", cwd=folder)
    text = ("llama", "--data", "text.txt", "--length", 16, "--objective", "svd")
    rankfold("lossless", *text, "--size", 0.8, *few, "--out", "made text", cwd=folder)

    def other(name: str, file: str = "rankfold.json", of: str = "made") -> Path:
        return Path(shutil.copytree(folder / of, folder / name)) / file

    def edited(name: str, change: Callable[[Any], None], file: str = "rankfold.json") -> None:
        _json(other(name, file), change)

    other("unlisted").unlink()
    other("cut list").write_text((folder / "made" / "rankfold.json").read_text()[:900])
    other("empty list").write_text("")
    other("no object").write_text("[1, 2]")
    edited("newer", lambda found: found.update(format_version=99))
    edited("layerless", lambda found: found.pop("layers"))
    edited("ranked", lambda found: found["layers"][0].update(rank=-3))
    edited("formed", lambda found: [layer.update(form="spiral") for layer in found["layers"]])
    edited("larger", lambda found: found["loss"].update(factorized=0.0))
    edited("unmodelled", lambda found: found.update(model="net"))
    other("weightless", "model.safetensors").unlink()
    weights = other("cut weights", "model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-200])
    weights = other("nan weights", "model.safetensors")
    tensors = load_file(weights)
    tensors["conv.bias"] = torch.full_like(tensors["conv.bias"], torch.nan)
    save_file(tensors, weights)
    save_file({"any": torch.zeros(2)}, other("other weights", "model.safetensors"))
    other("uncertified", "certificate.json").unlink()
    other("cut certificate", "certificate.json").write_text('{"format_version": 1,')
    edited("newer certificate", lambda found: found.update(format_version=99), "certificate.json")
    edited("unsaid", lambda found: found.pop("statement"), "certificate.json")
    edited(
        "said in words", lambda found: found["statement"].update(margin="wide"), "certificate.json"
    )
    other("no tokens", "tokenizer.json", "made text").write_text("{")
