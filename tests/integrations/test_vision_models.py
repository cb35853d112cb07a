"""Models that timm and torchvision make by name; run by ``make test-vision``.

Neither imports beside the CPU build of torch that the other tests run on, so this needs an
environment of its own, in which transformers is not installed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import rankfold
from rankfold import ArtifactError, InputError
from rankfold.integrations.vision import make_named, parse_named


def importable(name: str) -> bool:
    try:
        __import__(name)
    except Exception:  # beside another build of torch, torchvision fails with a RuntimeError
        return False
    return True


pytestmark = [
    pytest.mark.skipif(
        not (importable("torchvision") and importable("timm")),
        reason="torchvision and timm don't import beside this torch: make test-vision",
    ),
    pytest.mark.filterwarnings("ignore"),  # theirs
]

CLASSES = 4
# Name with options, and the side of its images.
MODELS = {
    "timm:resnext50_32x4d,num_classes=4": 32,
    "timm:efficientnet_lite0,num_classes=4": 32,
    "timm:mobilenetv3_small_050,num_classes=4": 32,
    "timm:convnext_atto,num_classes=4": 32,
    "timm:resnetv2_50x1_bit,num_classes=4": 32,
    "timm:test_nfnet,num_classes=4": 32,
    "timm:vit_tiny_patch16_224,num_classes=4,img_size=32,depth=3": 32,
    "timm:deit_tiny_distilled_patch16_224,num_classes=4,img_size=32,depth=2": 32,
    "timm:swin_tiny_patch4_window7_224,num_classes=4,img_size=56,embed_dim=24": 56,
    "torchvision:resnet18,num_classes=4": 32,
    "torchvision:mobilenet_v2,num_classes=4,width_mult=0.5": 32,
    "torchvision:shufflenet_v2_x0_5,num_classes=4": 32,
    "torchvision:efficientnet_b0,num_classes=4": 32,
    "torchvision:convnext_tiny,num_classes=4": 32,
    "torchvision:vit_b_16,num_classes=4,image_size=32": 32,
    "torchvision:swin_t,num_classes=4": 32,
}
# Of those that come in large sizes only, the first blocks.
INCLUDED = {
    "timm:resnext50_32x4d,num_classes=4": ("layer1.*",),
    "timm:resnetv2_50x1_bit,num_classes=4": ("stages.0.*",),
    "torchvision:convnext_tiny,num_classes=4": ("features.1.*",),
    "torchvision:vit_b_16,num_classes=4,image_size=32": ("encoder.layers.encoder_layer_0.*",),
    "torchvision:swin_t,num_classes=4": ("features.1.*",),
}


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    torch.manual_seed(0)


def made(spec: str) -> nn.Module:
    """The model with weights as after some training: none of its branches is silent."""
    model = make_named(parse_named(spec))
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model


def data(side: int, count: int = 4) -> rankfold.Data:
    def part() -> Any:
        return TensorDataset(torch.randn(count, 3, side, side), torch.randint(CLASSES, (count,)))

    return rankfold.Data(part(), part(), part())


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images)


@pytest.mark.parametrize("spec", MODELS)
def test_factorized_saved_and_made_again_it_computes_the_same(spec: str, tmp_path: Path) -> None:
    side = MODELS[spec]
    model = made(spec)
    result = rankfold.lossless(
        model, data(side), size=0.8, size_of="factorizable", include=INCLUDED.get(spec, ()),
        curvature="empirical", gradient_step=False, interactions=False,
        conv_forms=False,
    )  # fmt: skip
    assert any(layer["rank"] is not None for layer in result.report["layers"])
    folder = result.save(tmp_path / "a", source=spec)
    again = rankfold.load(folder)
    assert type(again) is type(model)
    assert not any(module.training for module in again.modules())
    images = torch.randn(2, 3, side, side)
    assert torch.equal(outputs(again, images), outputs(result.model, images))
    assert not torch.equal(outputs(model, images), outputs(result.model, images))
    # Batch norms are in eval mode: an image's output is its own.
    torch.testing.assert_close(
        outputs(again, images[:1]), outputs(again, images)[:1], atol=1e-4, rtol=1e-4
    )
    stored = json.loads((folder / "rankfold.json").read_text())["model"]["source"]
    assert stored["name"] == spec.split(":")[1].split(",")[0]
    assert f"# {spec}," in (folder / "README.md").read_text()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    spec = "timm:mobilenetv3_small_050,num_classes=4"
    result = rankfold.lossless(make_named(parse_named(spec)), data(32), size=0.9, objective="svd")
    return result.save(tmp_path_factory.mktemp("saved") / "a", source=spec)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"library": "os", "name": "system", "options": {}}, "library 'os' is unknown"),
        ({"library": "timm", "name": "hf-hub:timm/resnet18", "options": {}}, "lists no model"),
        ({"library": "timm", "name": "local-dir:/tmp/x", "options": {}}, "lists no model"),
        ({"library": "timm", "name": "../resnet18", "options": {}}, "lists no model"),
        ({"library": "timm", "name": 3, "options": {}}, "is no text"),
        ({"library": "timm", "name": "resnet18"}, "of library, name and options"),
        ({"library": "timm", "name": "resnet18", "options": {"num_classes": 4}}, "another model"),
        (
            {"library": "timm", "name": "resnet18", "options": {"checkpoint_path": "/tmp/a.pt"}},
            "checkpoint_path",
        ),
        ({"library": "timm", "name": "resnet18", "options": {"pretrained": True}}, "pretrained"),
        ({"library": "torchvision", "name": "resnet18", "options": {"weights": "x"}}, "weights"),
        ({"library": "timm", "name": "resnet18", "options": {"act_layer": {}}}, "act_layer"),
        ({"library": "timm", "name": "resnet18", "options": {"what": 1}}, "can't make"),
        (
            {"library": "timm", "name": "resnet18", "options": {"num_classes": 10**9}},
            "asks for .* numbers",
        ),
        (
            {"library": "timm", "name": "vit_tiny_patch16_224", "options": {"depth": 10**5}},
            "more than .* modules",
        ),
    ],
)
def test_a_folder_that_names_something_else_is_refused(
    source: dict[str, Any], message: str, saved: Path, tmp_path: Path
) -> None:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((saved / "rankfold.json").read_text())
    manifest["model"]["source"] = source
    (tmp_path / "rankfold.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=message):
        rankfold.load(tmp_path, as_saved=False)


def test_a_source_that_makes_another_model_is_refused(tmp_path: Path) -> None:
    model = make_named(parse_named("timm:mobilenetv3_small_050,num_classes=4"))
    result = rankfold.lossless(model, data(32), size=0.9, objective="svd")
    for other in ("timm:mobilenetv3_small_050", "torchvision:resnet18,num_classes=4"):
        with pytest.raises(InputError, match="Name all options"):
            result.save(tmp_path / "a", source=other)
    with pytest.raises(InputError, match="lists no model 'mobilenetv9'"):
        result.save(tmp_path / "a", source="timm:mobilenetv9")
    with pytest.raises(InputError, match="names no model"):
        result.save(tmp_path / "a", source="mobilenet")
    assert not (tmp_path / "a").exists()


def test_the_command_line(tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    spec = "torchvision:resnet18,num_classes=4"
    model = make_named(parse_named(spec))
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    draw = np.random.default_rng(0)
    np.savez(
        tmp_path / "data.npz",
        x=draw.integers(0, 256, (60, 32, 32, 3), dtype=np.uint8),
        y=draw.integers(0, 4, 60),
    )
    scale = ("--mean", ".5,.5,.5", "--std", ".5,.5,.5")

    def command(*arguments: str, expect: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-c", "from rankfold.cli import main; main()", *arguments],
            cwd=tmp_path, capture_output=True, encoding="utf-8",
        )  # fmt: skip
        assert done.returncode == expect, done.stderr
        return done.stdout + done.stderr

    command(
        "lossless", spec, "--weights", "w.safetensors", "--data", "data.npz", *scale,
        "--size", ".8", "--objective", "svd", "--out", "out",
    )  # fmt: skip
    assert "accuracy" in command("evaluate", "out", "--data", "data.npz", *scale)
    command("export", "out", "--to", "dense", "--out", "dense")
    plain = make_named(parse_named(spec))
    plain.load_state_dict(load_file(tmp_path / "dense" / "model.safetensors"))
    images = torch.randn(2, 3, 32, 32)
    found = outputs(rankfold.load(tmp_path / "out"), images)
    torch.testing.assert_close(outputs(plain.eval(), images), found, atol=1e-3, rtol=1e-3)
    verify = ("verify", "out", "--data", "data.npz", *scale, "--model", spec)
    assert "agrees" in command(*verify, "--weights", "w.safetensors")
    said = command("lossless", "timm:nothing", "--data", "data.npz", "--size", ".8", "--out", "b",
                   expect=2)  # fmt: skip
    assert "timm lists no model 'nothing'" in said
