"""Nets for CIFAR-10 that no package has, and the command that trains them: a ResNeXt and a ViT.

    python -m benchmarks.cifar_training resnext --seed 0
    python -m benchmarks.cifar_training vit --seed 0

They learn from the first 40,000 training images only. The other 10,000 (``cifar10_train_4``, the
kept images) are never trained on, so benchmarks can calibrate, select and test on them. No epoch
is picked by them: the last one's weights are kept. One choice was: the ResNeXt's second cycle
of the rate was added when the first had ended at 87.6 % of them, and the log shows both.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cifar10 import PerChannel, cifar10_test, normalised, training_files
from benchmarks.cifar_nets import accuracy_and_loss
from benchmarks.resnext import resnext
from benchmarks.vit import vit
from rankfold.tasks.losses import logits_of

MODELS = Path(__file__).parent / "models"
CHECKPOINTS = Path(__file__).parent / "out"

MEAN: PerChannel = (0.4914, 0.4822, 0.4465)
STD: PerChannel = (0.2470, 0.2435, 0.2616)
KEPT_FILE = 4  # of the five files of training images, the one that no net here is trained on
TRAINING_FILES = (0, 1, 2, 3)
WATCHED = 2_000  # kept images evaluated after each epoch: more would take time from training


class Recipe(NamedTuple):
    """How a net is trained."""

    seed: int
    cycles: tuple[int, ...]  # epochs of each rise and fall of the rate
    peak_rate: float
    weight_decay: float
    optimizer: str  # sgd (Nesterov) or adamw
    batch: int = 128
    warm_up: float = 0.2  # share of a cycle in which the rate rises
    momentum: float = 0.9


class Net(NamedTuple):
    """A net that is trained here: how it is built, untrained, and its recipe."""

    build: Callable[[], nn.Module]
    recipe: Recipe


NETS = {
    "resnext": Net(resnext, Recipe(0, (18, 12), 0.1, 5e-4, optimizer="sgd")),
    "vit": Net(vit, Recipe(0, (20,), 1e-3, 0.05, optimizer="adamw")),
}


def load_trained(name: str, seed: int = 0) -> tuple[nn.Module, PerChannel, PerChannel]:
    """A trained net in float32 and eval mode, with the mean and std of its images.

    Raises:
        FileNotFoundError: No net of this seed has been trained.
    """
    net = NETS[name].build()
    net.load_state_dict(load_file(_weights_file(name, seed)))  # float16, copied into float32
    return net.eval(), MEAN, STD


def kept_images() -> tuple[Tensor, Tensor]:
    """The 10,000 images that no net here is trained on, (n, 3, 32, 32) float32, and labels."""
    images, labels = training_files([KEPT_FILE])
    return normalised(images, MEAN, STD), labels


def training_images() -> tuple[Tensor, Tensor]:
    """The 40,000 images that the nets are trained on, uint8 (n, 3, 32, 32), and labels."""
    return training_files(TRAINING_FILES)


def rate_at(recipe: Recipe, epochs: float) -> float:
    """The learning rate after so many epochs: in each cycle a line up, half a cosine down."""
    *before, last = recipe.cycles
    for cycle in before:
        if epochs < cycle:
            last = cycle
            break
        epochs -= cycle
    progress = epochs / last
    if progress < recipe.warm_up:
        return recipe.peak_rate * max(progress, 1e-3) / recipe.warm_up
    done = (progress - recipe.warm_up) / (1 - recipe.warm_up)
    return recipe.peak_rate * 0.5 * (1 + math.cos(math.pi * done))


def augmented_batches(
    padded: Tensor, labels: Tensor, batch: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in random order: random 32x32 crops of the padded images, half of them flipped.

    Args:
        padded: ``(n, 3, 40, 40)`` uint8.
        labels: ``(n,)``.
        batch: Images a batch; what doesn't fill the last one is left out.
        generator: Draws everything.
    """
    n, channels, side, _ = padded.shape
    crop = side - 8
    order = torch.randperm(n, generator=generator)
    for at in range(0, n - batch + 1, batch):
        rows = order[at : at + batch]
        top, left = torch.randint(0, 9, (2, batch, 1), generator=generator)
        down = top + torch.arange(crop)  # (batch, crop)
        across = left + torch.arange(crop)
        flip = torch.rand(batch, 1, generator=generator) < 0.5
        across = torch.where(flip, across.flip(1), across)
        images = padded[
            rows[:, None, None, None],
            torch.arange(channels)[None, :, None, None],
            down[:, None, :, None],
            across[:, None, None, :],
        ]
        yield (
            normalised(images, MEAN, STD).contiguous(memory_format=torch.channels_last),
            labels[rows],
        )


def start_training(net: Net, recipe: Recipe) -> tuple[nn.Module, torch.optim.Optimizer]:
    """An untrained net and its optimizer; norms and biases are not decayed."""
    torch.manual_seed(recipe.seed)
    started = net.build().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    matrices = [p for p in started.parameters() if p.dim() > 1]
    vectors = [p for p in started.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    rate = rate_at(recipe, 0.0)
    if recipe.optimizer == "adamw":
        return started, torch.optim.AdamW(groups, lr=rate)
    sgd = torch.optim.SGD(groups, lr=rate, momentum=recipe.momentum, nesterov=True)
    return started, sgd


def train(name: str, recipe: Recipe) -> None:
    """Train, a line an epoch in the log, and write weights and log to ``models``.

    It goes on from the last finished epoch if it was interrupted, also when the recipe has since
    been given one more cycle. The order of the images and their crops depend on the seed and the
    epoch alone.
    """
    checkpoint = CHECKPOINTS / f"{name}_seed{recipe.seed}.pt"
    net, optimizer = start_training(NETS[name], recipe)
    first, lines = 0, _header(recipe, net)
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        started = Recipe(**state["recipe"])
        if started != recipe._replace(cycles=recipe.cycles[: len(started.cycles)]):
            raise SystemExit(f"{checkpoint} is of another recipe: {started}; remove it")
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        first, lines = state["epoch"] + 1, state["lines"]
        if started != recipe:
            lines.append(f"goes on with recipe {recipe._asdict()}")
    images, labels = training_images()
    padded = F.pad(images, (4, 4, 4, 4))
    kept, kept_labels = kept_images()
    print("\n".join(lines), flush=True)
    epochs = sum(recipe.cycles)
    for epoch in range(first, epochs):
        began = time.perf_counter()
        loss, right = _epoch(net, optimizer, recipe, epoch, padded, labels)
        kept_right, kept_loss = evaluate(net, kept[:WATCHED], kept_labels[:WATCHED])
        lines.append(
            f"epoch {epoch + 1:>2}/{epochs} training loss {loss:.4f} accuracy {right:.4f} "
            f"kept loss {kept_loss:.4f} accuracy {kept_right:.4f} "
            f"seconds {time.perf_counter() - began:.1f}"
        )
        print(lines[-1], flush=True)
        state = {
            "recipe": recipe._asdict(),
            "net": net.state_dict(),
            "optimizer": optimizer.state_dict(),
            "epoch": epoch,
            "lines": lines,
        }
        CHECKPOINTS.mkdir(parents=True, exist_ok=True)
        unfinished = checkpoint.with_suffix(".tmp")
        torch.save(state, unfinished)
        unfinished.replace(checkpoint)
    _write(name, recipe, net, lines, kept, kept_labels)


def _header(recipe: Recipe, net: nn.Module) -> list[str]:
    return [
        f"recipe {recipe._asdict()}",
        f"parameters {sum(p.numel() for p in net.parameters())}",
        f"torch {torch.__version__}, threads {torch.get_num_threads()}, "
        f"trained on files {TRAINING_FILES}, kept file {KEPT_FILE}",
    ]


def _epoch(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    epoch: int,
    padded: Tensor,
    labels: Tensor,
) -> tuple[float, float]:
    """One pass over the training images: mean loss and accuracy on the way."""
    net.train()
    generator = torch.Generator().manual_seed(recipe.seed * 1_000 + epoch)
    steps = len(labels) // recipe.batch
    loss_sum, right = 0.0, 0
    batches = augmented_batches(padded, labels, recipe.batch, generator)
    for step, (images, answers) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(recipe, epoch + step / steps)
        with torch.autocast("cpu", torch.bfloat16):
            logits = logits_of(net(images))
        loss = F.cross_entropy(logits.float(), answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_sum += loss.item()
        right += int((logits.argmax(1) == answers).sum())
    return loss_sum / steps, right / (steps * recipe.batch)


def evaluate(net: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """The share of images classified correctly, and the mean loss, in bfloat16 arithmetic."""
    net.eval()
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        return accuracy_and_loss(net, images, labels)


def _write(
    name: str,
    recipe: Recipe,
    net: nn.Module,
    lines: list[str],
    kept: Tensor,
    kept_labels: Tensor,
) -> None:
    """Weights as float16, atomically, and the log with what the written net does in float32."""
    tensors = {
        key: tensor.half().contiguous() if tensor.is_floating_point() else tensor
        for key, tensor in net.state_dict().items()
    }
    MODELS.mkdir(parents=True, exist_ok=True)
    target = _weights_file(name, recipe.seed)
    unfinished = target.with_suffix(".tmp")
    save_file(tensors, unfinished, metadata={k: str(v) for k, v in recipe._asdict().items()})
    unfinished.replace(target)
    written, mean, std = load_trained(name, recipe.seed)
    for which, images, labels in (
        ("kept", kept, kept_labels),
        ("test", *cifar10_test(mean, std)),
    ):
        right, loss = accuracy_and_loss(written, images, labels)
        line = f"written net, float32: {len(labels)} {which} images, loss {loss:.4f}"
        lines.append(f"{line} accuracy {right:.4f}")
        print(lines[-1], flush=True)
    log = target.with_suffix(".log")
    unfinished.write_text("\n".join(lines) + "\n", encoding="utf-8")
    unfinished.replace(log)


def _weights_file(name: str, seed: int) -> Path:
    return MODELS / f"{name}_seed{seed}.safetensors"


def main() -> None:
    """Train a net."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("net", choices=NETS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cycles", nargs="+", type=int, help="epochs of each, not the recipe's")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe = NETS[options.net].recipe._replace(seed=options.seed)
    if options.cycles:
        recipe = recipe._replace(cycles=tuple(options.cycles))
    train(options.net, recipe)


if __name__ == "__main__":
    main()
