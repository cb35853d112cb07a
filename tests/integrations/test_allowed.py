"""The invariant: no configuration of a folder makes anything run, be downloaded or be read
elsewhere; what asks for it is refused by file, key and value, what folders usually hold is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import transformers
from hypothesis import given, settings, strategies

import rankfold
from rankfold import ArtifactError, InputError
from rankfold.artifact.manifest import read_manifest
from rankfold.cli.open import open_model
from rankfold.integrations.allowed import ATTENTION, FILES, RULES, check_keys, sealed
from tests.small_models import model_and_artifact

HOSTILE: list[tuple[str, dict[str, Any]]] = [
    *[
        ("config.json", {key: value})
        for key in ("_attn_implementation", "attn_implementation", "_attn_implementation_internal")
        for value in (
            "org/kernel", "org/kernel@main", "org/kernel:attention", "paged|org/kernel",
            {"": "org/kernel"}, {"text_config": "org/kernel"}, ["eager"], "nonsense", "EAGER", 1,
        )
    ],
    ("config.json", {"experts_implementation": "org/kernel"}),
    ("config.json", {"_experts_implementation_internal": "sonicmoe"}),
    ("config.json", {"text_config": {"_attn_implementation": "org/kernel"}}),
    ("config.json", {"per_layer_config": {"0": {"attn_implementation": "org/kernel"}}}),
    ("config.json", {"vision_attn_implementation": "org/kernel"}),
    ("config.json", {"a": [{"b": {"_attn_implementation": "org/kernel"}}]}),
    ("config.json", {"attribute_map": {"size": "_attn_implementation_internal"}, "size": "a/b"}),
    ("config.json", {"__dict__": {"x": 1}}),
    ("config.json", {"__class__": "x"}),
    ("config.json", {"sub_configs_defaults": {}}),
    ("config.json", {"trust_remote_code": True}),
    ("config.json", {"trust_remote_code": 1}),
    ("config.json", {"keypoint_detector_config": {"trust_remote_code": True}}),
    ("config.json", {"use_kernels": True}),
    ("config.json", {"kernel_config": {"kernel_mapping": {"RMSNorm": "org/kernel:RMSNorm"}}}),
    ("config.json", {"kernel_mapping": {"RMSNorm": "org/kernel"}}),
    ("config.json", {"fusion_config": {"patch_embeddings": True}}),
    ("config.json", {"custom_pipelines": {"text": {"impl": "run.Pipe", "pt": ["X"]}}}),
    ("config.json", {"auto_mapping": {"base_model_class": "X", "parent_library": "os"}}),
    ("config.json", {"configuration_files": ["config.4.0.0.json"]}),
    ("config.json", {"transformers_weights": "../other/model.safetensors"}),
    ("config.json", {"transformers_weights": "/tmp/model.safetensors"}),
    ("config.json", {"transformers_weights": "adapter_model.bin"}),
    ("config.json", {"backbone": "org/model"}),
    ("config.json", {"backbone": "hf-hub:org/model"}),
    ("config.json", {"architecture": "local-dir:/tmp"}),
    ("config.json", {"model_args": {"checkpoint_path": "/tmp/weights.pth"}}),
    ("config.json", {"index_path": "index", "passages_path": "passages"}),
    ("config.json", {"tokenizer_class": "RagRetriever"}),
    ("config.json", {"penalty_alpha": 0.6}),
    ("generation_config.json", {"custom_generate": "org/decoding"}),
    ("generation_config.json", {"compile_config": {"backend": "os.system"}}),
    ("generation_config.json", {"dola_layers": "high"}),
    ("generation_config.json", {"num_beam_groups": 2}),
    ("generation_config.json", {"force_words_ids": [[1]]}),
    ("tokenizer_config.json", {"tokenizer_class": "AutoModelForCausalLM"}),
    ("tokenizer_config.json", {"tokenizer_class": "os.Tokenizer"}),
    ("tokenizer_config.json", {"init_inputs": ["/etc/passwd"]}),
    ("tokenizer_config.json", {"gguf_file": "../x.gguf"}),
    ("tokenizer_config.json", {"vocab_file": "/etc/passwd"}),
    ("tokenizer_config.json", {"vocab_file": "../../../../../../../../etc/passwd"}),
    ("tokenizer_config.json", {"mecab_kwargs": {"mecab_dic_dir": "/etc"}}),
    ("tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.json", "../tokenizer.4.json"]}),
    ("tokenizer_config.json", {"chat_template": [{"name": "../../x", "template": ""}]}),
    ("tokenizer_config.json", {"chat_template": {"../x": ""}}),
    ("special_tokens_map.json", {"tokenizer_file": "/etc/passwd"}),
    ("preprocessor_config.json", {"image_processor_type": "pipeline"}),
    ("preprocessor_config.json", {"feature_extractor_type": "RagRetriever"}),
    ("preprocessor_config.json", {"processor_class": "os.system"}),
    ("preprocessor_config.json", {"repo_path": "org/labels"}),
    ("processor_config.json", {"image_processor": {"image_processor_type": "AutoModel"}}),
    ("video_preprocessor_config.json", {"video_processor_type": "Trainer"}),
]  # fmt: skip

USUAL: list[tuple[str, dict[str, Any]]] = [
    *[("config.json", {"_attn_implementation": name}) for name in (None, *ATTENTION)],
    ("config.json", {"attn_implementation": {"": "sdpa", "text_config": "eager"}}),
    ("config.json", {"_attn_implementation_autoset": True}),
    ("config.json", {"experts_implementation": "grouped_mm"}),
    ("config.json", {"trust_remote_code": False, "use_kernels": False}),
    ("config.json", {"_name_or_path": "/home/somebody/model", "conv_kernel": [10, 3], "kernel": 3}),
    ("config.json", {"backbone": "resnet50", "use_pretrained_backbone": True}),
    ("config.json", {"backbone_config": {"model_type": "resnet"}, "architecture": "vit_b.dino_v2"}),
    ("config.json", {"tokenizer_class": "LlamaTokenizerFast", "penalty_alpha": None}),
    ("config.json", {"num_beam_groups": 1, "dola_layers": None, "x": {"__float__": "Infinity"}}),
    ("config.json", {"transformers_weights": "model-00001.safetensors"}),
    ("tokenizer_config.json", {"tokenizer_class": "TokenizersBackend", "init_inputs": []}),
    ("tokenizer_config.json", {"tokenizer_file": "/etc/passwd", "name_or_path": "/etc"}),
    ("tokenizer_config.json", {"vocab_file": "/root/.cache/huggingface/no/such/file"}),
    ("tokenizer_config.json", {"chat_template": "{% for m in messages %}{{ m }}{% endfor %}"}),
    ("tokenizer_config.json", {"chat_template": [{"name": "tool_use", "template": ""}]}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"0": {"__type": "AddedToken"}}}),
    ("special_tokens_map.json", {"unk_token": "<unk>"}),
    ("preprocessor_config.json", {"image_processor_type": "ViTImageProcessorFast"}),
    ("preprocessor_config.json", {"feature_extractor_type": "Wav2Vec2FeatureExtractor"}),
    ("preprocessor_config.json", {"processor_class": "Qwen2_5_VLProcessor"}),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of a model, and an artifact of it."""
    return model_and_artifact(tmp_path_factory.mktemp("folders"))


def put(folder: Path, name: str, keys: dict[str, Any]) -> None:
    file = folder / name
    before = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**before, **keys}))


def opened(kind: str, folder: Path) -> None:
    if kind == "model":
        open_model(str(folder))
    else:
        read_manifest(folder)  # which load, evaluate, verify, inspect and export begin with


@pytest.mark.parametrize("kind", ["model", "artifact"])
@pytest.mark.parametrize(("name", "keys"), HOSTILE)
def test_what_runs_or_is_downloaded_is_refused(
    kind: str, name: str, keys: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders[kind], tmp_path / "it")
    put(tmp_path / "it", name, keys)
    with pytest.raises(InputError) as caught:
        opened(kind, tmp_path / "it")
    message = str(caught.value)
    assert str(tmp_path / "it" / name) in message and "expected" in message
    assert any(key in message for key in keys)
    assert "Take the key out" in message


@pytest.mark.parametrize(("name", "keys"), USUAL)
def test_what_folders_usually_hold_is_allowed(
    name: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    check_keys(keys, tmp_path / name)


@settings(max_examples=60, deadline=None)
@given(
    places=strategies.lists(strategies.sampled_from(["text_config", "x", 0]), max_size=6),
    rule=strategies.sampled_from([k for n, k in HOSTILE if n != "special_tokens_map.json"]),
)
def test_at_any_depth(places: list[Any], rule: dict[str, Any]) -> None:
    value: Any = rule
    for place in places:
        value = [value] if place == 0 else {"model_type": "llama", place: value}
    with pytest.raises(InputError, match="expected"):
        check_keys(value, "folder/config.json")


def test_from_pretrained_of_an_artifact_refuses_a_kernel(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["artifact"], tmp_path / "it")
    for key in ("_attn_implementation", "experts_implementation"):
        shutil.copyfile(folders["artifact"] / "config.json", tmp_path / "it" / "config.json")
        put(tmp_path / "it", "config.json", {key: "org/kernel"})
        for open_it in (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM):
            with pytest.raises(ArtifactError, match="org/kernel"):
                open_it.from_pretrained(tmp_path / "it")


def test_a_folder_that_a_configuration_names_is_not_the_models_own(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "tokenizer_secret.txt").write_text("secret")
    (tmp_path / "victim" / "config.json").write_text("{}")
    for kind in folders:
        shutil.copytree(folders[kind], tmp_path / kind)
        put(tmp_path / kind, "config.json", {"_name_or_path": str(tmp_path / "victim")})
    from rankfold.integrations.transformers import opened_as

    assert opened_as(open_model(str(tmp_path / "model")).model) == str(tmp_path / "model")
    model = rankfold.load(tmp_path / "artifact", as_saved=False)
    assert opened_as(model) == str(tmp_path / "artifact")


def test_while_a_folder_is_opened_no_hub_is_asked_and_no_pickle_read(tmp_path: Path) -> None:
    before = huggingface_hub.constants.HF_HUB_OFFLINE, torch.load
    torch.save({"a": 1}, tmp_path / "a.bin")
    with pytest.raises(KeyError), sealed():
        assert huggingface_hub.constants.is_offline_mode()
        with pytest.raises(InputError, match="pickle"):
            torch.load(tmp_path / "a.bin")
        raise KeyError
    assert (huggingface_hub.constants.HF_HUB_OFFLINE, torch.load) == before


def test_the_rules_are_listed_where_they_are_promised() -> None:
    text = (Path(__file__).parents[2] / "SECURITY.md").read_text(encoding="utf-8")
    for rule in RULES:
        assert rule.expected in text, rule.keys.pattern
    for name in FILES:
        assert name in text
