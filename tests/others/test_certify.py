"""``rankfold certify`` as a user calls it, on tiny models of each kind."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from typer.testing import CliRunner

from rankfold.cli import app
from rankfold.errors import InputError
from rankfold.others.document import read_given, recomputed
from tests.others.served import served
from tests.others.test_samples import samples, write
from tests.small_tokenizers import FAMILIES
from tests.tiny_language_model import TEXT, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
WINDOWS = ("--length", "16", "--held-out-limit", "32")


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of a model, of a rounded and of a ruined one, and a text."""
    folder = tmp_path_factory.mktemp("models")
    model, tokenizer = tiny_llama(20)
    rounded, ruined = copy.deepcopy(model), copy.deepcopy(model)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16().float()
    for layer in ruined.model.layers:
        layer.mlp.down_proj.weight.data *= -2
    for name, one in (("model", model), ("rounded", rounded), ("ruined", ruined)):
        one.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "text.txt").write_text(TEXT[:9000])
    (folder / "samples").mkdir()
    return folder


@pytest.fixture
def at(top: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(top)
    yield top


def certify(*arguments: object, expect: int = 0) -> Any:
    done = CliRunner().invoke(app, ["certify", *map(str, arguments)])
    assert done.exit_code == expect, done.output + repr(done.exception)
    return done


def as_json(*arguments: object, expect: int = 0) -> Any:
    return json.loads(certify(*arguments, "--json", expect=expect).stdout)


def test_folder(at: Path, tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("badge.svg", "card.md")}
    told = certify(
        "model", "rounded", "--data", "text.txt", *WINDOWS, "--out", tmp_path / "out",
        "--badge", files["badge.svg"], "--card", files["card.md"],
    ).stdout  # fmt: skip
    assert told.startswith("lossless: on data like text.txt, rounded is no worse")
    out = tmp_path / "out"
    document = read_given(out)
    assert recomputed(document) == []
    assert document["data"]["held_out"]["examples"] == 24
    assert document["data"]["selection"]["examples"] == 8
    rows = (out / "differences.csv").read_text().splitlines()
    assert len(rows) == 25
    assert float(rows[1].split(",")[-1]) == document["evidence"]["differences"][0]
    assert (out / "badge.svg").read_bytes() == files["badge.svg"].read_bytes()
    svg = ElementTree.parse(files["badge.svg"]).getroot()
    assert "lossless, at most" in "".join(svg.itertext())
    assert "lossless" in files["card.md"].read_text()
    certify("--check", out)
    refused = certify("model", "rounded", "--data", "text.txt", "--out", out, expect=2)
    assert "not empty" in refused.stderr
    verified = CliRunner().invoke(app, ["verify", str(out), "--data", "text.txt"])
    assert verified.exit_code == 2
    assert "certificate of two given models" in verified.stderr


def test_edited_certificate_does_not_agree(at: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    certify("model", "ruined", "--data", "text.txt", *WINDOWS, "--out", out, expect=5)
    file = out / "certificate.json"
    document = json.loads(file.read_text())
    assert document["certificate"]["verdict"] == "worse"
    document["certificate"]["verdict"] = "lossless"
    file.write_text(json.dumps(document))
    told = certify("--check", out, expect=4).stdout
    assert "verdict: 'lossless' stated, 'worse' found" in told
    assert "its digest is another one" in told


def test_same_inputs_give_the_same_bytes(at: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        certify("model", "rounded", "--data", "text.txt", *WINDOWS, "--out", tmp_path / name)
    first, second = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in "ab")
    assert first == second


def test_private_keeps_numbers_of_examples(at: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    certify("model", "rounded", "--data", "text.txt", *WINDOWS, "--private", "--out", out)
    assert read_given(out)["evidence"] is None
    assert not (out / "differences.csv").exists()
    assert "single losses are private" in certify("--check", out, expect=4).stdout


def test_range_that_is_stated_leaves_all_held_out(at: Path) -> None:
    found = as_json("model", "rounded", "--data", "text.txt", *WINDOWS, "--largest-change", "0.02")
    assert found["data"]["held_out"]["examples"] == 32
    assert found["data"]["selection"] is None
    few = certify(
        "model", "rounded", "--data", "text.txt", *WINDOWS, "--largest-change", "5", expect=2
    ).stderr
    assert "That needs" in few


def test_other_models_tried_on_the_same_examples_are_told(at: Path) -> None:
    as_json("model", "ruined", "--data", "text.txt", *WINDOWS, expect=5)
    history = as_json("model", "rounded", "--data", "text.txt", *WINDOWS)["data"]["history"]
    assert (history["kept"], history["others"]) == (True, 1)
    again = as_json("model", "rounded", "--data", "text.txt", *WINDOWS)["data"]["history"]
    assert again["others"] == 1


def test_endpoint(at: Path) -> None:
    model, _ = tiny_llama(20)
    with served(model) as server:
        found = as_json("model", server.url, "--data", "text.txt", *WINDOWS)
    assert abs(found["certificate"]["change"]) < 1e-4
    other = found["models"]["other"]
    assert other["weights_seen"] is False
    assert other["name"] == f"tiny at {server.url}"


def test_int8_of_torchao(at: Path, tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="pip install torchao")
    from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

    config = TorchAoConfig(quantization.Int8WeightOnlyConfig(set_inductor_config=False))
    model = AutoModelForCausalLM.from_pretrained("model", quantization_config=config)
    model.save_pretrained(tmp_path / "int8")
    AutoTokenizer.from_pretrained("model").save_pretrained(tmp_path / "int8")
    found = as_json("model", tmp_path / "int8", "--data", "text.txt", *WINDOWS)
    assert found["holds"]
    digests = [found["models"][name]["digest"] for name in ("original", "other")]
    assert digests[0] != digests[1]


def test_rankfold_folder(at: Path, tmp_path: Path) -> None:
    import rankfold

    model, tokenizer = tiny_llama(20)
    ids = torch.tensor(tokenizer(TEXT[9000:], verbose=False)["input_ids"])[: 24 * 16].view(24, 16)
    data = rankfold.Data(list(ids[:8]), list(ids[8:16]), list(ids[16:]))
    result = rankfold.lossless(model, data, size=0.95, effort="fast")
    result.save(tmp_path / "small", tokenizer=tokenizer)
    found = certify(
        "model", tmp_path / "small", "--data", "text.txt", *WINDOWS, "--margin", "50"
    ).stdout
    assert "small is" in found


def test_other_tokenizer_is_compared_by_bytes(at: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = FAMILIES["gpt2"]()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    found = as_json("model", tmp_path / "other", "--data", "text.txt", *WINDOWS, expect=5)
    assert found["certificate"]["unit"] == "nats per byte"
    assert sum(found["evidence"]["terms"]) > 2 * 24


def test_samples(at: Path, tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", samples()), write(tmp_path / "b", samples(160))
    told = certify("--samples", first, second, "--metric", "acc", expect=5).stdout
    assert told.startswith("worse: on documents like arc_easy")
    certify("--samples", first, first, "--metric", "acc", "--out", tmp_path / "out")
    certify("--check", tmp_path / "out")


WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing": ((), "ORIGINAL, OTHER, --data is missing"),
    "no data": (("model", "rounded"), "--data is missing"),
    "no model": (("model", "none", "--data", "text.txt"), "the model none does not exist"),
    "samples and models": (
        ("model", "rounded", "--data", "text.txt", "--samples", "a", "b"), "stands alone",
    ),
    "metric of nothing": (
        ("model", "rounded", "--data", "text.txt", "--metric", "acc"), "--metric goes with",
    ),
    "nobody there": (
        ("http://127.0.0.1:9/v1", "model", "--data", "text.txt"), "can't be reached",
    ),
    "no endpoint": (
        ("model", "rounded", "--data", "text.txt", "--endpoint-model", "x"), "none is given",
    ),
    "a badge nowhere": (
        ("model", "rounded", "--data", "text.txt", "--badge", "none/b.svg"), "--badge is",
    ),
    "a key without a folder": (
        ("model", "rounded", "--data", "text.txt", "--sign", "key"), "--sign signs",
    ),
    "too little data": (("model", "rounded", "--data", "text.txt", "--length", "2000"), "length"),
    "no onnx file": (("model", "none.onnx", "--data", "text.txt"), "no such ONNX file"),
    "no onnx": (("model", "bad.onnx", "--data", "text.txt"), "onnxruntime can't open"),
    "a task without labels": (
        ("model", "rounded", "--data", "text.txt", "--task", "classification"), "needs labels",
    ),
    "no certificate": (("--check", "model"), "has no certificate.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_named(at: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "onnx" in name:
        pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
        (at / "bad.onnx").write_bytes(b"no program")
    from rankfold.others import endpoint

    monkeypatch.setattr(endpoint, "RETRIES", 0)
    arguments, message = WRONG[name]
    done = certify(*arguments, expect=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_signed_folder(at: Path, tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="pip install cryptography")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from rankfold.certificate.signature import checked_signature

    key = Ed25519PrivateKey.generate()
    private, public = tmp_path / "key.pem", tmp_path / "public.pem"
    pem = serialization.Encoding.PEM
    private.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(pem, form))
    out = tmp_path / "out"
    command = ("model", "rounded", "--data", "text.txt", *WINDOWS, "--out", out)
    certify(*command, "--sign", private)
    assert checked_signature(out, public).holds
    certify(*command, "--overwrite")  # the signature is the folder's own, and goes with it
    assert not checked_signature(out, public).holds


def test_other_certificates_are_no_certificate_of_two(tmp_path: Path) -> None:
    (tmp_path / "certificate.json").write_text('{"format_version": 1}')
    with pytest.raises(InputError, match="no certificate of two given models"):
        read_given(tmp_path)
