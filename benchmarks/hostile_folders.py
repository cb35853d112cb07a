"""Folders as a stranger would make them: what each asks for would run, be downloaded or be read."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ESCAPES = "n\x1b[31m\x07\x9b5m\u202e\u2066\u200b\u2028[b]<b>\nFORGED"
Make = Callable[[Path, Path], None]  # of a folder to change, and of one outside with secrets


@dataclass(frozen=True)
class Case:
    """A hostile folder.

    Attributes:
        name: What it does.
        kind: model or artifact: what is changed.
        make: Changes it.
    """

    name: str
    kind: str
    make: Make


class Canary:
    """A pickle that writes a file where it is opened."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def canary_of(outside: Path) -> Path:
    """The file that is there once code of a folder ran."""
    return outside / "canary"


def code(outside: Path) -> str:
    """Python that leaves the canary, whatever is asked of it."""
    return f"""
from pathlib import Path
Path({str(canary_of(outside))!r}).touch()
def __getattr__(name):
    return type(name, (), {{"from_pretrained": classmethod(lambda *a, **k: None)}})
"""


def keys(name: str, wanted: dict[str, Any]) -> Make:
    """Put keys into a file of JSON; OUTSIDE in a text is the folder outside."""

    def make(folder: Path, outside: Path) -> None:
        file = folder / name
        before = json.loads(file.read_text()) if file.is_file() else {}
        text = json.dumps(wanted).replace("OUTSIDE", str(outside))
        file.write_text(json.dumps({**before, **json.loads(text)}))

    return make


def _with_code(name: str, wanted: dict[str, Any]) -> Make:
    def make(folder: Path, outside: Path) -> None:
        for file in ("run.py", "custom_generate/generate.py", "configuration_x.py", "setup.py"):
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text(code(outside))
        keys(name, wanted)(folder, outside)

    return make


CONFIG: list[dict[str, Any]] = [
    {key: value}
    for key in ("_attn_implementation", "attn_implementation", "_attn_implementation_internal")
    for value in (
        "org/kernel", "org/kernel@v1", "org/kernel:f", "paged|org/kernel", {"": "org/kernel"},
        "kernels-community/flash-attn2",
    )
]  # fmt: skip
CONFIG += [
    {"text_config": {"_attn_implementation": "org/kernel"}},
    {"per_layer_config": {"0": {"_attn_implementation": "org/kernel"}}},
    {"attribute_map": {"x": "_attn_implementation_internal"}, "x": "org/kernel"},
    {"__dict__": {"_attn_implementation_internal": "org/kernel"}},
    {"experts_implementation": "org/kernel"}, {"_experts_implementation_internal": "deepgemm"},
    {"kernel_config": {"kernel_mapping": {"RMSNorm": "org/kernel:RMSNorm"}}, "use_kernels": True},
    {"fusion_config": {"rms": True}}, {"trust_remote_code": True},
    {"quantization_config": {"quant_method": "fp_quant"}},
    {"quantization_config": {"quant_method": "finegrained_fp8", "modules_to_not_convert": []}},
    {"quantization_config": {"quant_method": "rankfold", "layers": "x"}},
    {"configuration_files": ["../outside/config.4.0.0.json"]},
    {"transformers_weights": "../outside/model.safetensors"},
    {"transformers_weights": "OUTSIDE/model.safetensors"},
    {"transformers_weights": "adapter_model.bin"},
    {"_name_or_path": "OUTSIDE"}, {"name_or_path": "OUTSIDE"},
    {"backbone": "org/model", "model_type": "detr"},
    {"architecture": "hf-hub:org/model", "model_type": "timm_wrapper"},
    {"architecture": "local-dir:OUTSIDE", "model_type": "timm_wrapper"},
    {"model_args": {"checkpoint_path": "OUTSIDE/pickle.bin"}},
    {"model_type": "rag", "index_path": "OUTSIDE", "passages_path": "OUTSIDE/pickle.bin"},
    {"model_type": "lightglue", "keypoint_detector_config": {"trust_remote_code": True}},
    {"model_type": "../../run"}, {"model_type": "run"}, {"architectures": ["os.system"]},
    {"architectures": ["run.Model"]}, {"architectures": ["pipeline"]}, {"dtype": "load"},
    {"dtype": "hub.load"}, {"hidden_act": "os.system"}, {"tokenizer_class": "RagRetriever"},
]  # fmt: skip
TOKENIZER: list[dict[str, Any]] = [
    {"auto_map": {"AutoTokenizer": ["run.Tokenizer", "run.Tokenizer"]}},
    {"auto_map": {"AutoTokenizer": ["org/repo--run.T", None]}, "tokenizer_class": "T"},
    {"auto_map": ["run.Tokenizer", None]}, {"auto_map": "run.Tokenizer"},
    {"tokenizer_class": "RagRetriever"}, {"tokenizer_class": "AutoModelForCausalLM"},
    {"tokenizer_class": "run.Tokenizer"}, {"init_inputs": ["OUTSIDE/secret.txt"]},
    {"gguf_file": "../outside/secret.txt"}, {"vocab_file": "OUTSIDE/secret.txt"},
    {"merges_file": "OUTSIDE/secret.txt"}, {"vocab": "OUTSIDE/secret.txt"},
    {"fast_tokenizer_files": ["../outside/tokenizer.9.json"]},
    {"tokenizer_file": "OUTSIDE/secret.txt"},
    {"chat_template": {"../../../outside/canary": "x"}},
    {"chat_template": [{"name": "../../../outside/canary", "template": "x"}]},
    {"chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}"},
    {"mecab_kwargs": {"mecab_dic_dir": "OUTSIDE"}, "tokenizer_class": "BertJapaneseTokenizer"},
]  # fmt: skip
PREPROCESSOR: list[dict[str, Any]] = [
    {"image_processor_type": "RagRetriever"}, {"image_processor_type": "run.Processor"},
    {"auto_map": {"AutoImageProcessor": "run.P"}}, {"feature_extractor_type": "AutoModel"},
    {"repo_path": "OUTSIDE", "class_info_file": "secret.txt"}, {"processor_class": "os.system"},
]  # fmt: skip
GENERATION: list[dict[str, Any]] = [
    {"custom_generate": "org/repo"}, {"penalty_alpha": 0.6, "top_k": 4}, {"dola_layers": "high"},
    {"num_beam_groups": 2, "num_beams": 4}, {"compile_config": {"backend": "run"}},
    {"force_words_ids": [[1]]}, {"constraints": ["x"]},
]  # fmt: skip


def _adapter(folder: Path, outside: Path) -> None:
    wanted: dict[str, Any] = {"peft_type": "LORA", "base_model_name_or_path": str(outside)}
    wanted |= {"auto_mapping": {"base_model_class": "X", "parent_library": "run"}}
    (folder / "adapter_config.json").write_text(json.dumps(wanted))
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Canary(canary_of(outside))))


def _pickled(name: str, *, alone: bool = False, zipped: bool = False) -> Make:
    def make(folder: Path, outside: Path) -> None:
        content = pickle.dumps(Canary(canary_of(outside)))
        if zipped:  # as torch.save writes it
            packed = io.BytesIO()
            with zipfile.ZipFile(packed, "w") as archive:
                archive.writestr("archive/data.pkl", content)
                archive.writestr("archive/version", "3")
            content = packed.getvalue()
        if alone:
            (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(content)

    return make


def _linked(name: str, to: str = "secret.txt") -> Make:
    def make(folder: Path, outside: Path) -> None:
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        place.symlink_to(outside / to if to else outside)

    return make


def _fifo(name: str) -> Make:
    def make(folder: Path, outside: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


def _index(shard: str) -> Make:
    def make(folder: Path, outside: Path) -> None:
        (folder / "model.safetensors").unlink()
        shard_named = shard.replace("OUTSIDE", str(outside))
        index = {"metadata": {}, "weight_map": {"model.norm.weight": shard_named}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return make


def _modules(entries: list[dict[str, str]], *, around: bool = False) -> Make:
    def make(folder: Path, outside: Path) -> None:
        where = folder.parent if around else folder
        wanted = [{"path": folder.name if around else "", "type": OWN + "Transformer"}, *entries]
        (where / "modules.json").write_text(json.dumps(wanted))
        (folder / "run.py").write_text(code(outside))

    return make


OWN = "sentence_transformers.models."
MODULES = [
    [{"path": "1_Pooling", "type": "run.Pooling"}], [{"path": "1", "type": "os.system"}],
    [{"path": "../outside", "type": OWN + "Pooling"}],
    [{"path": "/etc", "type": OWN + "Pooling"}], [{"path": "..", "type": OWN + "Dense"}],
]  # fmt: skip


def _header(text: str) -> Make:
    """A safetensors file whose header says this."""

    def make(folder: Path, outside: Path) -> None:
        said = text.encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(said)) + said)

    return make


def _renamed(name: str) -> Make:
    """All names of a file of JSON, and its texts, become hostile ones in turn."""

    def make(folder: Path, outside: Path) -> None:
        def hostile(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: hostile(one) for key, one in value.items()}
            if isinstance(value, list):
                return [hostile(one) for one in value]
            return ESCAPES if isinstance(value, str) and value not in KEPT else value

        if (folder / name).is_file():
            written = hostile(json.loads((folder / name).read_text()))
            (folder / name).write_text(json.dumps(written))

    return make


KEPT = ("transformers", "LlamaForCausalLM", "llama", "rankfold", "pair", "pivoted")


def _whole_folder(folder: Path, outside: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(outside, target_is_directory=True)


def table() -> list[Case]:
    """All cases."""
    return [*_of_keys(), *_of_files()]


def _of_keys() -> Iterator[Case]:
    for kind in ("model", "artifact"):
        for wanted in CONFIG:
            yield Case(f"config.json {wanted}", kind, _with_code("config.json", wanted))
        for wanted in TOKENIZER:
            make = _with_code("tokenizer_config.json", wanted)
            yield Case(f"tokenizer_config.json {wanted}", kind, make)
        for wanted in PREPROCESSOR:
            make = _with_code("preprocessor_config.json", wanted)
            yield Case(f"preprocessor_config.json {wanted}", kind, make)
        for wanted in GENERATION:
            make = _with_code("generation_config.json", wanted)
            yield Case(f"generation_config.json {wanted}", kind, make)
        for named in ("vocab_file", "tokenizer_file", "merges_file"):
            make = keys("special_tokens_map.json", {named: "OUTSIDE/secret.txt"})
            yield Case(f"special_tokens_map.json {named}", kind, make)
        auto = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoModel"), "run.X")
        for more in ({}, {"model_type": "run"}, {"architectures": ["X"]}):
            make = _with_code("config.json", {"auto_map": auto, **more})
            yield Case(f"config.json auto_map {more}", kind, make)


def _of_files() -> Iterator[Case]:
    for kind in ("model", "artifact"):
        yield Case("adapter of a base elsewhere", kind, _adapter)
        for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "spk_dict.pt"):
            yield Case(f"pickle {name}", kind, _pickled(name))
        yield Case("weights are a pickle", kind, _pickled("pytorch_model.bin", alone=True))
        yield Case("weights are a zip", kind, _pickled("m.bin", alone=True, zipped=True))
        yield Case("safetensors is a pickle", kind, _pickled("model.safetensors"))
        yield Case("safetensors is a zip", kind, _pickled("model.safetensors", zipped=True))
        for name in ("tokenizer_x.txt", "tokenizer.json", "chat_template.jinja", "vocab.txt",
                     "additional_chat_templates/x.jinja", "special_tokens_map.json"):  # fmt: skip
            yield Case(f"link {name}", kind, _linked(name))
        for name in ("config.json", "tokenizer_config.json", "generation_config.json",
                     "model.safetensors", "tokenizer_y"):  # fmt: skip
            yield Case(f"pipe {name}", kind, _fifo(name))
        for shard in ("../outside/model.safetensors", "OUTSIDE/model.safetensors", "/dev/zero"):
            yield Case(f"index {shard}", kind, _index(shard))
        for entries in MODULES:
            yield Case(f"modules.json {entries}", kind, _modules(entries))
        for said in ('{"a":', "{}", "[]", '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,9]}}'):
            yield Case(f"header {said}", kind, _header(said))
        for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
            yield Case(f"escapes in {name}", kind, _renamed(name))
    yield Case("folder is a link", "artifact", _whole_folder)
    pooling = [{"path": "1_Pooling", "type": OWN + "Pooling"}]
    yield Case("modules.json around", "artifact", _modules(pooling, around=True))
    for name in ("certificate.json", "certificate.txt", "README.md", "config.json",
                 "model.safetensors", "rankfold.json", "1_Pooling/config.json"):  # fmt: skip
        yield Case(f"link {name}", "artifact", _linked(name))
    yield Case("link to a folder", "artifact", _linked("more", ""))
    for name in ("rankfold.json", "certificate.json"):
        yield Case(f"escapes in {name}", "artifact", _renamed(name))
        yield Case(f"pipe {name}", "artifact", _fifo(name))
    source = {"library": "timm", "name": "x", "options": {"checkpoint_path": "OUTSIDE/pickle.bin"}}
    model = {"kind": "module", "class": "os.system", "source": source, "shared_tensors": {}}
    model |= {"computed_buffers": {}}
    yield Case(
        "rankfold.json names a checkpoint", "artifact", keys("rankfold.json", {"model": model})
    )
