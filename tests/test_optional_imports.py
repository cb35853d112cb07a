"""The core works where no extra is installed: proved in a process that can't import them."""

from __future__ import annotations

import subprocess
import sys

OPTIONAL = (
    "transformers",
    "gguf",
    "accelerate",
    "tokenizers",
    "torchvision",
    "timm",
    "PIL",
    "pyarrow",
    "pandas",
    "datasets",
    "matplotlib",
    "IPython",
    "sentence_transformers",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "cryptography",
    "vllm",
)

CORE = f"""
import pathlib, sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())

import torch, rankfold, rankfold.cli.open, rankfold.data.sources
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
x = torch.randn(60, 6)
y = torch.randint(0, 3, (60,))
data = torch.utils.data.TensorDataset(x, y)
result = rankfold.lossless(model, data, size=0.9)
result.save(sys.argv[1])
again = rankfold.load(sys.argv[1], model=nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))
assert torch.equal(again(x), result.model(x))
assert not set(sys.modules) & set({OPTIONAL!r})
for call in (
    lambda: rankfold.cli.open.open_model(sys.argv[2]),
    lambda: rankfold.cli.open.open_model("timm:resnet18,num_classes=10"),
    lambda: rankfold.cli.open.open_model("torchvision:resnet18"),
    lambda: rankfold.data.sources.read_image_folder(sys.argv[2]),
    lambda: rankfold.data.sources.read_records(pathlib.Path(sys.argv[2])),
    lambda: rankfold.export(sys.argv[1], sys.argv[1] + "2", to="onnx", model=model, inputs=(6,)),
):
    try:
        call()
    except rankfold.InputError as error:
        print(error)
"""


def test_core_without_extras(tmp_path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CORE, str(tmp_path / "out"), str(folder)],
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    transformers, timm, torchvision, pillow, arrow, onnx = done.stdout.splitlines()
    assert "this needs timm" in timm and "this needs torchvision" in torchvision
    assert "pip install 'rankfold[vision]'" in timm
    assert "pip install 'rankfold[transformers]'" in transformers
    assert "pip install 'rankfold[images]'" in pillow
    assert "pip install 'rankfold[arrow]'" in arrow
    assert "pip install 'rankfold[onnx]'" in onnx
