"""An image classifier on a folder of class folders of PNG files, trained here in some seconds.

    python -m examples.image_folder

The pictures are discs, squares, crosses and stripes. The reader, the split and the certificate are
those of ``rankfold lossless MODEL --data FOLDER``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import nn
from torch.nn import functional

import rankfold
from rankfold.data.sources import read_image_folder

SIDE = 24
SHAPES = ("cross", "disc", "square", "stripes")


def network() -> nn.Sequential:
    """A small CNN with a grouped conv, as ResNeXt has them."""
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(24, 48, 3, padding=1, groups=4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(48, 48, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(48, len(SHAPES)),
    )  # fmt: skip


def write_images(folder: Path, count: int) -> None:
    """Shapes of random place, size and colours under noise; the class is the folder's name."""
    torch.manual_seed(0)
    for place in range(count):
        kind = SHAPES[place % len(SHAPES)]
        back, front = (tuple(torch.randint(256, (3,)).tolist()) for _ in range(2))
        image = Image.new("RGB", (SIDE, SIDE), back)
        draw = ImageDraw.Draw(image)
        size = int(torch.randint(8, 15, ()))
        x, y = torch.randint(1, SIDE - size, (2,)).tolist()
        box, middle = (x, y, x + size, y + size), size // 2
        if kind == "disc":
            draw.ellipse(box, fill=front)
        elif kind == "square":
            draw.rectangle(box, fill=front)
        elif kind == "cross":
            draw.line((x, y + middle, x + size, y + middle), front, 3)
            draw.line((x + middle, y, x + middle, y + size), front, 3)
        else:
            for offset in range(0, size, 4):
                draw.line((x, y + offset, x + size, y + offset), front, 2)
        (folder / kind).mkdir(parents=True, exist_ok=True)
        image.save(folder / kind / f"{place}.png")


def main(count: int = 1600, steps: int = 300) -> rankfold.Result:
    """Run everything in a folder that is removed at the end."""
    with tempfile.TemporaryDirectory() as scratch:
        write_images(Path(scratch), count)
        images = read_image_folder(Path(scratch), [0.5], [0.5], SIDE)
        examples = [images[i] for i in torch.randperm(len(images)).tolist()]
        values = torch.stack([image for image, _ in examples])
        labels = torch.tensor([label for _, label in examples])
        model, half = network(), count // 2
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(steps):
            rows = torch.randint(half, (64,))
            optimizer.zero_grad()
            functional.cross_entropy(model(values[rows]), labels[rows]).backward()
            optimizer.step()
        result = rankfold.lossless(model.eval(), examples[half:], size=0.6, margin=0.05)
    certificate, accuracy = result.certificate, result.report["accuracy"]
    print(
        f"kept {result.ratio:.3f} of the parameters; accuracy {accuracy['original']:.3f} -> "
        f"{accuracy['factorized']:.3f}; {certificate.verdict}, change at most "
        f"{certificate.upper_bound:+.4f}"
    )
    return result


if __name__ == "__main__":
    main()
