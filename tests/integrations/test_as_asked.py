"""The invariant: what is opened holds every weight of the files and no other, or is refused."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from hypothesis import given, settings, strategies
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

from rankfold import InputError
from rankfold.artifact.weights_file import load_weights
from rankfold.cli import open as cli_open
from rankfold.cli.open import open_model
from rankfold.integrations.as_asked import as_asked
from rankfold.integrations.gguf import load_gguf
from rankfold.integrations.transformers import load_folder
from tests.small_models import mlp, same_state, seeded, state, tiny_llama
from tests.test_families import FAMILIES
from tests.tiny_language_model import tiny_tokenizer

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def untied() -> nn.Module:
    config = tiny_llama().config
    config.tie_word_embeddings = False
    return seeded(6, lambda: transformers.LlamaForCausalLM(config))


def classifier() -> nn.Module:
    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return seeded(7, lambda: BertForSequenceClassification(config))


MODELS = {"tied": tiny_llama, "untied": untied, "classifier": classifier}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, make in MODELS.items():
        found[name] = tmp_path_factory.mktemp(name)
        make().save_pretrained(found[name])
    return found


def changed(
    folder: Path, target: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    tensors = change(load_file(target / "model.safetensors"))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def without(part: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: t for name, t in tensors.items() if part not in name}


def with_(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {**tensors, name: value}


@pytest.mark.parametrize(
    ("kind", "change", "named"),
    [
        ("classifier", without("classifier"), [r"classifier\.bias: missing"]),
        ("classifier", without("pooler.dense.weight"), ["pooler.dense.weight: missing"]),
        ("classifier", without("LayerNorm.bias"), [r"embeddings\.LayerNorm\.bias: missing"]),
        ("untied", without("layers.1."), [r"model\.layers\.1\.mlp\.up_proj\.weight: missing"]),
        ("untied", without("lm_head"), [r"lm_head\.weight: missing"]),
        ("tied", without("embed_tokens"), ["embed_tokens.weight: missing"]),
        ("tied", with_("lm_head.weight", torch.ones(48, 32)), ["two different matrices"]),
        ("untied", with_("lm_head.weight", torch.ones(45, 32)), [r"\(45, 32\) in the file, \(48"]),
        ("untied", with_("model.norm.weight", torch.ones(31)), [r"\(31,\) in the file, \(32,\)"]),
        (
            "untied",
            with_("model.layers.2.q.weight", torch.ones(2, 2)),
            ["layers.2.q.*not in L"],
        ),
        ("classifier", with_("qa_outputs.weight", torch.ones(2, 2)), ["qa_outputs.weight: not in"]),
        ("untied", with_("module.x", torch.ones(2)), ["module.x: not in Llama"]),
        ("untied", with_("_orig_mod.lm_head.weight", torch.ones(2)), ["one and the same lm_head"]),
        ("untied", lambda _: {}, [r"lm_head\.weight: missing", "and 1 more"]),
    ],
)
def test_what_a_file_lacks_or_has_too_much_is_named(
    kind: str,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    named: list[str],
    folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    folder = changed(folders[kind], tmp_path / "m", change)
    for words in named:
        with pytest.raises(InputError, match=words) as caught:
            open_model(str(folder))
        assert str(folder) in str(caught.value)


@settings(max_examples=15, deadline=None)
@given(data=strategies.data())
def test_any_weights_left_out_are_all_named(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    names = sorted(load_file(folders["untied"] / "model.safetensors"))
    left_out = data.draw(strategies.sets(strategies.sampled_from(names), min_size=1, max_size=9))
    folder = changed(
        folders["untied"],
        tmp_path_factory.getbasetemp() / "left-out",
        lambda tensors: {name: t for name, t in tensors.items() if name not in left_out},
    )
    with pytest.raises(InputError) as caught:
        load_folder(folder)
    assert all(f"{name}: missing" in str(caught.value) for name in left_out)
    assert str(caught.value).count(": missing") == len(left_out)


def wrapped(name: str, places: list[tuple[int, str]]) -> str:
    """The name with wrappers between its parts: ``(after how many parts, wrapper)``."""
    parts = name.split(".")
    for place, wrapper in places:
        parts.insert(min(place, len(parts) - 1), wrapper)
    return ".".join(parts)


PLACES = strategies.lists(
    strategies.tuples(strategies.integers(0, 3), strategies.sampled_from(WRAPPERS)), max_size=3
)


@settings(max_examples=15, deadline=None)
@given(kind=strategies.sampled_from([*MODELS]), places=PLACES, parallel=strategies.booleans())
def test_wrappers_around_a_model_or_its_layers_change_nothing(
    folders: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    places: list[tuple[int, str]],
    parallel: bool,
) -> None:
    front = "module." if parallel else ""
    folder = changed(
        folders[kind],
        tmp_path_factory.getbasetemp() / "wrapped",
        lambda tensors: {front + wrapped(name, places): t for name, t in tensors.items()},
    )
    expected, found = load_folder(folders[kind]), load_folder(folder)
    assert same_state(found, state(expected))
    assert found.config.name_or_path == str(folder)
    if kind != "classifier":
        assert found.generation_config == expected.generation_config
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "own.safetensors")
    if kind != "tied":
        own = load_weights(MODELS[kind](), folder / "own.safetensors")
        assert same_state(own, state(expected))


def test_a_model_with_a_compiled_part_takes_files_with_and_without_it(tmp_path: Path) -> None:
    given, plain = (nn.ModuleDict({"a": nn.ModuleDict({"_orig_mod": mlp()})}), mlp())
    save_file(given.state_dict(), tmp_path / "own.safetensors")
    tensors = {f"a.{name}": tensor for name, tensor in plain.state_dict().items()}
    save_file(tensors, tmp_path / "plain.safetensors")
    for file in ("own", "plain"):
        other = nn.ModuleDict({"a": nn.ModuleDict({"_orig_mod": seeded(9, type(plain))})})
        assert same_state(load_weights(other, tmp_path / f"{file}.safetensors"), state(given))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_opened_as_it_was_saved(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = FAMILIES[name]
    config = getattr(transformers, family.config)(**family.options)
    model = seeded(1, lambda: getattr(transformers, family.model)(config))
    model.save_pretrained(tmp_path)
    capsys.readouterr()
    found = load_folder(tmp_path)
    assert type(found) is type(model)
    assert same_state(found, state(model))
    assert capsys.readouterr().err == ""


def test_what_older_versions_stored_of_what_is_computed(tmp_path: Path) -> None:
    config = transformers.GPTNeoConfig(
        vocab_size=20, hidden_size=16, num_layers=1, num_heads=2, max_position_embeddings=8,
        attention_types=[[["global"], 1]],
    )  # fmt: skip
    model = seeded(1, lambda: transformers.GPTNeoForCausalLM(config))
    model.save_pretrained(tmp_path / "m")
    name = "transformer.h.0.attn.attention.bias"
    mask = dict(model.named_buffers())[name]
    older = changed(tmp_path / "m", tmp_path / "older", with_(name, mask.to(torch.uint8)))
    assert same_state(load_folder(older), state(model))
    other = changed(tmp_path / "m", tmp_path / "other", with_(name, ~mask))
    with pytest.raises(InputError, match=f"{name}: not in GPTNeo"):
        load_folder(other)


def test_a_base_model_under_the_name_of_a_classifier(tmp_path: Path) -> None:
    model = classifier()
    BertModel(model.config).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written["architectures"] = ["BertForSequenceClassification"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(InputError, match=r"classifier\.weight: missing(.|\n)*architectures"):
        load_folder(tmp_path)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("tied", {"model_type": "bert"}, "LlamaForCausalLM is no model of the type bert"),
        ("tied", {"architectures": ["PreTrainedModel"]}, "PreTrainedModel is no model of the type"),
        ("classifier", {"num_labels": 7}, "num_labels=7.*incompatible"),
        ("tied", {"num_hidden_layers": 1}, r"layers\.1\.mlp\.up_proj\.weight: not in"),
        ("tied", {"num_hidden_layers": 3}, r"layers\.2\.mlp\.up_proj\.weight: missing"),
        ("tied", {"vocab_size": 50}, r"\(48, 32\) in the file, \(50, 32\)"),
        ("tied", {"tie_word_embeddings": False}, r"lm_head\.weight: missing"),
    ],
)
def test_a_configuration_of_another_model(
    kind: str, change: dict[str, object], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders[kind], tmp_path / "m")
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, **change}))
    with pytest.raises(InputError, match=message):
        load_folder(folder)


def test_a_folder_without_one_of_its_files(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert same_state(load_folder(tmp_path), state(model))
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.rename(tmp_path / "elsewhere.bin")
    with pytest.raises(InputError, match=f"lacks files(.|\n)*{shard.name}"):
        load_folder(tmp_path)
    shard.write_bytes(b"no tensors")
    with pytest.raises(InputError, match=f"{shard.name} can't be read"):
        load_folder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(InputError, match="no index of weights"):
        load_folder(tmp_path)


def test_warnings_that_change_nothing_are_shown(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("transformers.models")
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    try:
        with as_asked("a folder"):
            logger.warning("`torch_dtype` is deprecated")
        with (
            pytest.raises(InputError, match="open a folder as it is: Some weights were newly init"),
            as_asked("a folder"),
        ):
            logger.warning("Some weights were newly initialized")
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert seen == ["`torch_dtype` is deprecated"]


def test_a_named_model_needs_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_open, "make_named", lambda _: mlp())
    with pytest.raises(InputError, match="random weights; expected --weights"):
        open_model("timm:resnet18")
    assert open_model("timm:resnet18", to_be_filled=True).source == "timm:resnet18"


def _write_gguf(file: Path, left_out: str, rows: int = 0) -> nn.Module:
    """A Llama of one layer as a GGUF file."""
    tokenizer = tiny_tokenizer()
    words = [word for word, _ in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])]
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    model = seeded(8, lambda: transformers.LlamaForCausalLM(config))
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([1] * len(words))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    for name, tensor in model.state_dict().items():
        stem, _, leaf = name.rpartition(".")
        if left_out not in name or not left_out:
            values = tensor.new_zeros(rows, 32) if rows and "lm_head" in name else tensor
            writer.add_tensor(f"{names.get_name(stem)}.{leaf}", values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_a_gguf_file_is_looked_at_likewise(tmp_path: Path) -> None:
    model = _write_gguf(tmp_path / "m.gguf", "")
    found, _ = load_gguf(tmp_path / "m.gguf")
    assert found.state_dict().keys() == model.state_dict().keys()
    for left_out in ("gate_proj", "norm"):
        _write_gguf(tmp_path / "m.gguf", left_out)
        with pytest.raises(InputError, match=f"{left_out}.*weight: missing"):
            load_gguf(tmp_path / "m.gguf")
    _write_gguf(tmp_path / "m.gguf", "", rows=290)
    with pytest.raises(InputError, match=r"\(290, 32\) in the file, \(300, 32\)"):
        load_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("model", "key", "value"),
    [("classifier", "hidden_act", "foo"), ("tied", "hidden_act", "gelu_of_mine")],
)
def test_a_setting_that_transformers_does_not_know_is_named(
    model: str, key: str, value: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders[model], folder := tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(InputError, match=rf"knows no '{value}', which is the {key} in config.json"):
        load_folder(folder)
