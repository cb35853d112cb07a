"""A one-dimensional CNN on a folder of wav files: which of four chirps is heard?

    python -m examples.speech_cnn

Writes the wav files, trains the network for some seconds, factorizes its Conv1d layers, saves the
result and opens it again.
"""

from __future__ import annotations

import math
import tempfile
import wave
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import rankfold
from rankfold.data.sources import read_wav_folder

RATE, LENGTH = 4000, 1000


class SpeechCNN(nn.Module):
    """Three strided convs over the samples, a mean over time, one Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv1d(1, 24, 16, stride=4), nn.ReLU(),
            nn.Conv1d(24, 48, 8, stride=4), nn.ReLU(),
            nn.Conv1d(48, 48, 8, stride=2), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(48, 4)

    def forward(self, sounds: Tensor) -> Tensor:
        """``(n, 1, samples)`` to logits ``(n, 4)``."""
        logits: Tensor = self.head(self.convs(sounds).mean(-1))
        return logits


def write_sounds(folder: Path, count: int) -> None:
    """Chirps that rise or fall, fast or slowly, with noise; the class is the folder's name."""
    generator = torch.Generator().manual_seed(0)
    time = torch.arange(LENGTH) / RATE
    for place in range(count):
        kind = place % 4
        start, phase, noise = torch.rand(3, generator=generator).tolist()
        slope = (-2000, -600, 600, 2000)[kind]
        pitch = (1300 if slope < 0 else 400) + 200 * start
        sound = torch.sin(2 * math.pi * (pitch * time + slope / 2 * time**2 + phase))
        sound += (0.3 + 0.7 * noise) * torch.randn(LENGTH, generator=generator)
        samples = (sound / sound.abs().max() * 32767).to(torch.int16)
        (folder / str(kind)).mkdir(parents=True, exist_ok=True)
        with wave.open(str(folder / str(kind) / f"{place}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(RATE)
            file.writeframes(samples.numpy().tobytes())


def trained(examples: list[tuple[Tensor, int]], steps: int) -> SpeechCNN:
    """The network after some steps of Adam."""
    torch.manual_seed(0)
    model = SpeechCNN()
    sounds = torch.stack([sound for sound, _ in examples])
    labels = torch.tensor([label for _, label in examples])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        rows = torch.randint(len(sounds), (64,))
        optimizer.zero_grad()
        functional.cross_entropy(model(sounds[rows]), labels[rows]).backward()
        optimizer.step()
    return model.eval()


def main(count: int = 1600, steps: int = 300) -> rankfold.Result:
    """Run everything in a folder that is removed at the end."""
    with tempfile.TemporaryDirectory() as scratch:
        write_sounds(Path(scratch) / "wav", count)
        examples = list(read_wav_folder(Path(scratch) / "wav"))
        mixed = [examples[i] for i in torch.randperm(len(examples)).tolist()]
        model = trained(mixed[: count // 2], steps)
        result = rankfold.lossless(model, mixed[count // 2 :], size=0.5, margin=0.05)
        folder = result.save(Path(scratch) / "out")
        again = rankfold.load(folder, model=SpeechCNN())
        same = torch.equal(again(mixed[0][0][None]), result.model(mixed[0][0][None]))
    certificate, accuracy = result.certificate, result.report["accuracy"]
    print(
        f"kept {result.ratio:.3f} of the parameters; accuracy {accuracy['original']:.3f} -> "
        f"{accuracy['factorized']:.3f}; {certificate.verdict}, change at most "
        f"{certificate.upper_bound:+.4f}; reloaded the same: {same}"
    )
    return result


if __name__ == "__main__":
    main()
