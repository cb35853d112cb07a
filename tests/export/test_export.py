"""Exports, opened in processes that can't import rankfold."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

import rankfold
from rankfold import InputError
from rankfold.cli.export_inputs import open_inputs
from rankfold.export.dense import packed
from rankfold.model.unpack import unpack
from tests.cases import normal
from tests.command_line import make_project
from tests.command_line import rankfold as command
from tests.new_process import in_a_new_process
from tests.small_models import (
    VOCABULARY,
    SmallCNN,
    image_data,
    images,
    seeded,
    tiny_llama,
    token_data,
    trained_cnn,
)
from tests.tiny_language_model import tiny_tokenizer

ROOT = Path(__file__).parents[2]
HIDDEN = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "rankfold":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
import torch
from safetensors.torch import load_file, save_file
inputs = load_file("inputs.safetensors")["inputs"]
"""
SAVE = """
with torch.no_grad():
    output = model.eval()(inputs)
output = output if torch.is_tensor(output) else output.logits
save_file({"output": output}, "output.safetensors")
"""
STOCK = "from transformers import AutoModelForCausalLM\n"
STOCK += "model = AutoModelForCausalLM.from_pretrained('.')\n"
CNN = """
from torch import nn
class SmallCNN(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False), nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
        self.head = nn.Linear(8 * width, 5)
    def forward(self, images):
        return self.head(self.features(images).flatten(1))
"""
IDS = torch.arange(20).view(1, 20)


def without_rankfold(folder: Path, code: str, inputs: Tensor) -> Tensor:
    """What a process that can't import rankfold computes with the model that ``code`` opens."""
    save_file({"inputs": inputs}, folder / "inputs.safetensors")
    done = in_a_new_process(HIDDEN + code + SAVE, cwd=folder)
    assert "newly initialized" not in done.stderr and "MISSING" not in done.stderr
    return load_file(folder / "output.safetensors")["output"]


def snippet(folder: Path) -> str:
    """The code that the README of an export says opens it."""
    found = re.search(r"```python\n(.*)```", (folder / "README.md").read_text(), re.DOTALL)
    assert found
    return found[1]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


def outputs(model: Any, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(inputs)
    return output if torch.is_tensor(output) else output.logits


def gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64,
        initializer_range=0.2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return seeded(1, lambda: GPT2LMHeadModel(config)).eval()


def mixtral() -> PreTrainedModel:
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2,
        initializer_range=0.2,
    )  # fmt: skip
    return seeded(2, lambda: MixtralForCausalLM(config)).eval()


MODELS = {"llama": tiny_llama, "gpt2": gpt2, "mixtral": mixtral}


@pytest.mark.parametrize("name", MODELS)
def test_stock_transformers_opens_the_dense_form(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    result = rankfold.lossless(model, token_data(), size=0.7)
    folder = result.save(tmp_path / "a", tokenizer=tiny_tokenizer())
    done = rankfold.export(folder, tmp_path / "dense", to="dense")
    found = without_rankfold(done.folder, STOCK, IDS)
    close(found, outputs(result.model, IDS))
    assert done.parameters == sum(p.numel() for p in model.parameters())
    assert done.factorized_parameters == result.report["factorized"]["parameters"]
    assert done.bytes == (done.folder / "model.safetensors").stat().st_size
    assert AutoTokenizer.from_pretrained(done.folder)("the") == tiny_tokenizer()("the")
    model.save_pretrained(tmp_path / "original")
    names = [load_file(tmp_path / f / "model.safetensors").keys() for f in ("dense", "original")]
    assert names[0] == names[1]
    config = json.loads((done.folder / "config.json").read_text())
    assert "quantization_config" not in config and "transformers_weights" not in config


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_readme_of_pairs_opens_them(name: str, tmp_path: Path) -> None:
    result = rankfold.lossless(MODELS[name](), token_data(), size=0.7)
    folder = result.save(tmp_path / "a")
    done = rankfold.export(folder, tmp_path / "pairs", to="pairs")
    close(without_rankfold(done.folder, snippet(done.folder), IDS), outputs(result.model, IDS))
    assert done.parameters >= done.factorized_parameters  # identity rows are written out
    with pytest.raises(ValueError, match=r"README\.md opens it"):
        type(result.model).from_pretrained(done.folder)


def test_pairs_of_pairs_are_as_large(tmp_path: Path) -> None:
    result = rankfold.lossless(tiny_llama(), token_data(), size=0.7, form="pair")
    done = rankfold.export(result.save(tmp_path / "a"), tmp_path / "pairs", to="pairs")
    assert done.parameters == done.factorized_parameters


def test_packed_experts_have_no_pairs(tmp_path: Path) -> None:
    folder = rankfold.lossless(mixtral(), token_data(), size=0.7).save(tmp_path / "a")
    with pytest.raises(InputError, match=r'mlp\.experts is made of several.*to="dense"'):
        rankfold.export(folder, tmp_path / "pairs", to="pairs")
    assert not (tmp_path / "pairs").exists()


@pytest.mark.parametrize("form", ["pair", "pivoted"])
def test_an_own_class_in_both_forms(form: str, tmp_path: Path) -> None:
    result = rankfold.lossless(trained_cnn(), image_data(40), size=0.5, form=form)
    folder = result.save(tmp_path / "a")
    pixels = images(6, seed=31).tensors[0]
    expected = outputs(result.model, pixels)
    own = SmallCNN()
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    for to in ("dense", "pairs"):
        rankfold.export(folder, tmp_path / to, to=to, model=own)
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.state_dict().items())
    dense = CNN + "model = SmallCNN()\nmodel.load_state_dict(load_file('model.safetensors'))\n"
    close(without_rankfold(tmp_path / "dense", dense, pixels), expected)
    close(without_rankfold(tmp_path / "pairs", CNN + snippet(tmp_path / "pairs"), pixels), expected)


def test_low_precision_rounds_the_product_once(tmp_path: Path) -> None:
    result = rankfold.lossless(tiny_llama(torch.bfloat16), token_data(), size=0.7)
    done = rankfold.export(result.save(tmp_path / "a"), tmp_path / "dense", to="dense")
    tensors = load_file(done.folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    name, module = next(
        (n, m) for n, m in result.model.named_modules() if isinstance(m, rankfold.LowRankLinear)
    )
    exact = module.full_left().double() @ module.right.double()
    assert torch.equal(tensors[f"{name}.weight"], exact.to(torch.bfloat16))


class Packed(nn.Module):
    """Attention, groups and a conv along one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.along = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, values: Tensor) -> Tensor:
        hidden = self.along(values).transpose(1, 2)
        return self.head(self.attention(hidden, hidden, hidden)[0].mean(1))


def test_unpacked_tensors_go_back_to_where_they_were() -> None:
    original = seeded(4, Packed).half()
    unpacked = unpack(original)
    assert unpacked.names
    tensors = unpacked.model.state_dict()
    back = packed(tensors, seeded(5, Packed), unpacked.names, "here")
    assert back.keys() == original.state_dict().keys()
    for name, tensor in original.state_dict().items():
        assert torch.equal(back[name], tensor), name


class Computed(nn.Module):
    """Weights that are computed from others, as those of wav2vec2's positions are."""

    def __init__(self) -> None:
        super().__init__()
        normed = nn.utils.parametrizations.weight_norm
        self.positions = normed(nn.Conv1d(8, 8, 3, padding=1, groups=2), dim=2)
        self.inner = normed(nn.Linear(8, 12))
        self.head = nn.Linear(12, 3)

    def forward(self, values: Tensor) -> Tensor:
        return self.head(self.inner(self.positions(values).transpose(1, 2)).relu().mean(1))


def test_computed_weights_are_given_back_to_what_computes_them(tmp_path: Path) -> None:
    model = seeded(4, Computed)
    data = [(x, i % 3) for i, x in enumerate(normal(5, 80, 8, 10).float())]
    result = rankfold.lossless(model, data, size=0.7)
    result.save(tmp_path / "out")
    rankfold.export(tmp_path / "out", tmp_path / "dense", to="dense", model=seeded(6, Computed))
    opened = seeded(7, Computed).eval()
    opened.load_state_dict(load_file(tmp_path / "dense" / "model.safetensors"))
    values = normal(8, 4, 8, 10).float()
    torch.testing.assert_close(opened(values), result.model(values), rtol=1e-4, atol=1e-5)


def test_a_weight_that_can_not_be_computed_again_is_refused_by_name() -> None:
    normed = nn.utils.parametrizations
    for layer in (normed.spectral_norm(nn.Linear(6, 5)), normed.orthogonal(nn.Linear(6, 6))):
        original = nn.Sequential(layer)
        unpacked = unpack(original)
        tensors = {name: 3 * tensor for name, tensor in unpacked.model.state_dict().items()}
        with pytest.raises(InputError, match=r"the weight of 0 is computed.*can't be undone"):
            packed(tensors, original, unpacked.names, "here")


# The command


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_project(tmp_path_factory.mktemp("project"))
    own = ("net.py:net", "--weights", "net.safetensors", "--data", "data.npz")
    command("lossless", *own, "--size", "0.6", "--out", "out", cwd=folder)
    return folder


@pytest.mark.parametrize("to", ["dense", "pairs"])
def test_the_command_writes_prints_and_overwrites(project: Path, tmp_path: Path, to: str) -> None:
    export = ("export", project / "out", "--to", to, "--model", "net.py:net", "--out")
    done = command(*export, tmp_path / "new", cwd=project)
    size = sum(file.stat().st_size for file in (tmp_path / "new").glob("*.safetensors"))
    assert f"{size:,} bytes" in done.stdout and f"saved: {tmp_path / 'new'}" in done.stdout
    again = command(*export, tmp_path / "new", cwd=project, expect=2)
    assert "--overwrite" in again.stderr
    told = json.loads(
        command(*export, tmp_path / "new", "--overwrite", "--json", cwd=project).stdout
    )
    assert told["bytes"] == size and told["to"] == to
    kept = command(*export, project / "out", "--overwrite", cwd=project, expect=2)
    assert "not overwritten" in kept.stderr
    assert (project / "out" / "rankfold.json").is_file()


def test_the_command_writes_programs(project: Path, tmp_path: Path) -> None:
    export = ("export", project / "out", "--model", "net.py:net", "--out", tmp_path / "new")
    done = command(*export, "--to", "onnx", "--input-shape", "1x8x8", cwd=project)
    size = (tmp_path / "new" / "model.onnx").stat().st_size
    assert f"{size:,} bytes" in done.stdout and "of any length: batch\n" in done.stdout
    assert re.search(r"largest relative difference from the model: \d\.\de-0[67]", done.stdout)
    assert not done.stderr
    with (project / "net.py").open("a") as code:
        code.write("\n\ndef batch():\n    return {'x': torch.randn(2, 1, 8, 8)}\n")
    pt2 = (*export, "--to", "pt2", "--overwrite")
    told = command(*pt2, "--inputs", "net.py:batch", "--json", cwd=project).stdout
    assert json.loads(told)["dynamic"] == ["batch"] and json.loads(told)["difference"] < 1e-5
    assert [f.name for f in sorted((tmp_path / "new").iterdir())] == ["export.json", "model.pt2"]
    recorded = command(*pt2, "--json", cwd=project).stdout  # the shape of the data it was made with
    assert json.loads(recorded)["dynamic"] == ["batch"]


@pytest.mark.parametrize(
    ("shape", "spec", "message"),
    [
        ("3x8", "net.py:batch", "say the same"),
        ("3,8", None, "'3,8'; expected numbers with x"),
        (None, "net.py", "--inputs is net.py; expected file.py:function"),
        (None, "os:getcwd", "gave a str; expected a batch"),
    ],
)
def test_inputs_that_mean_nothing(shape: str | None, spec: str | None, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        open_inputs(shape, spec)


def test_the_command_names_what_is_wrong(project: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "x")
    unknown = command("export", "out", "--to", "onyx", *out, cwd=project, expect=2)
    assert "expected dense, pairs, onnx, pt2" in unknown.stderr
    needs = command("export", "out", "--to", "dense", *out, cwd=project, expect=2)
    assert "--model" in needs.stderr
    missing = command("export", "none", "--to", "dense", *out, cwd=project, expect=2)
    assert "no rankfold artifact" in missing.stderr
    assert not (tmp_path / "x").exists()


def test_one_message_says_all_that_a_class_of_ones_own_needs(artifacts_of_own: Path) -> None:
    """Which class of which file, that no weights are needed, and for a trace the inputs too."""
    for to in ("dense", "onnx"):
        with pytest.raises(InputError) as raised:
            rankfold.export(artifacts_of_own, artifacts_of_own.parent / "never", to=to)
        said = str(raised.value)
        assert "pass an instance of it by model=" in said and "needs no training" in said
        assert ("Give inputs=" in said) == (to == "onnx")
        assert not (artifacts_of_own.parent / "never").exists()


@pytest.fixture(scope="module")
def artifacts_of_own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = rankfold.lossless(trained_cnn(), image_data(40), size=0.8, effort="fast")
    return result.save(tmp_path_factory.mktemp("own") / "a")
