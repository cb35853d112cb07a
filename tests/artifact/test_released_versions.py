"""Folders that released versions have written open for ever, and compute what they did.

Before a version is released, its folders are written, once and never again, by
``python -c "import tests.artifact.test_released_versions as t; t.write()"``.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import rankfold
from rankfold import ArtifactError
from rankfold.artifact.manifest import read_report

FIXTURES = Path(__file__).parents[1] / "fixtures"
VERSIONS = sorted(folder.name for folder in FIXTURES.glob("artifact-*"))


class Own(nn.Module):
    """Convs of several forms, a grouped one, packed attention, a shared weight. Never changed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.grouped = nn.Conv2d(6, 8, 3, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.norm(self.grouped(torch.relu(self.conv(images))))
        tokens = hidden.flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.head(torch.tanh(self.second(torch.tanh(self.first(tokens.mean(1))))))


class Long(nn.Module):
    """A Linear of many outputs and a 1x1 conv of many inputs. Never changed."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(6, 48)
        self.narrow = nn.Conv2d(48, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, values: Tensor) -> Tensor:
        hidden = torch.tanh(self.wide(values))[:, :, None, None]
        return self.head(self.narrow(hidden).flatten(1))


OWN = {"own": Own, "own-in-pairs": Own, "blocks": Long, "conv-blocks": Long}


def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        found: Any = model(inputs)
    return found if torch.is_tensor(found) else found.logits


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("name", VERSIONS)
def test_an_own_class_opens_and_computes_what_it_did(name: str, kind: str) -> None:
    stored = load_file(FIXTURES / name / f"{kind}-outputs.safetensors")
    model = rankfold.load(FIXTURES / name / kind, OWN[kind]())
    torch.testing.assert_close(outputs(model, stored["inputs"]), stored["outputs"])


@pytest.mark.parametrize("name", VERSIONS)
def test_a_transformers_model_opens_and_computes_what_it_did(name: str) -> None:
    stored = load_file(FIXTURES / name / "llama-outputs.safetensors")
    folder = FIXTURES / name / "llama"
    for model in (rankfold.load(folder), AutoModelForCausalLM.from_pretrained(folder)):
        torch.testing.assert_close(outputs(model, stored["inputs"]), stored["outputs"])


@pytest.mark.parametrize("name", VERSIONS)
def test_its_report_can_be_read(name: str) -> None:
    for kind in (*OWN, "llama"):
        manifest = read_report(FIXTURES / name / kind)
        assert manifest["versions"]["rankfold"] == name.removeprefix("artifact-")


def test_there_is_a_folder_of_the_present_version_and_it_holds_every_form() -> None:
    folder = FIXTURES / f"artifact-{version('rankfold')}"
    forms = set()
    for kind in ("own", "own-in-pairs"):
        manifest = json.loads((folder / kind / "rankfold.json").read_text())
        assert manifest["unpacked"] and manifest["model"]["shared_tensors"]
        forms |= {layer["form"] for layer in manifest["layers"]}
    blocks = set()
    for kind in ("blocks", "conv-blocks"):
        manifest = json.loads((folder / kind / "rankfold.json").read_text())
        blocks |= {(layer["kind"], layer["form"]) for layer in manifest["layers"]}
    assert forms >= {"pivoted", "pair", "tucker", "horizontal"}
    wanted = {("Linear", "row-blocks"), ("Linear", "column-blocks"), ("Conv2d", "column-blocks")}
    assert blocks >= wanted


def test_a_folder_of_a_newer_version_says_so(tmp_path: Path) -> None:
    source = FIXTURES / VERSIONS[-1] / "own"
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((source / "rankfold.json").read_text())
    manifest = {"format_version": 7, "what": "ever a newer version writes"} | {
        key: value for key, value in manifest.items() if key == "versions"
    }
    (tmp_path / "rankfold.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"format_version 7.*Install a newer rankfold"):
        rankfold.load(tmp_path, Own())


def write() -> None:
    """Write the folders of the present version."""
    folder = FIXTURES / f"artifact-{version('rankfold')}"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    own = Own().eval()
    images, labels = torch.randn(120, 2, 7, 7), torch.randint(0, 3, (120,))
    examples = torch.utils.data.TensorDataset(images, labels)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    llama = LlamaForCausalLM(config).eval()
    windows = torch.randint(0, 32, (120, 8))
    long, values = Long().eval(), torch.randn(120, 6)
    pairs = torch.utils.data.TensorDataset(values, labels)
    for name, model, data, inputs, size, form in (
        ("own", own, examples, images[:2], 0.75, "pivoted"),
        ("own-in-pairs", own, examples, images[:2], 0.5, "pair"),
        ("blocks", long, pairs, values[:2], 0.55, "pivoted"),
        ("conv-blocks", long, pairs, values[:2], 0.85, "pivoted"),
        ("llama", llama, list(windows), windows[:2], 0.75, "pivoted"),
    ):
        result = rankfold.lossless(model, data, size=size, form=form, private=True)
        result.save(folder / name)
        stored = {"inputs": inputs, "outputs": outputs(result.model, inputs)}
        save_file(stored, folder / f"{name}-outputs.safetensors")
