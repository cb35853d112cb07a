"""What only the run could see: times, memory, and the held-out examples that changed most.

None of it decides a result or follows from one. It lies in a file of its own, ``seen.json``, that
no digest and no certificate speaks of: ``rankfold.json`` and the weights stay the same byte for
byte from run to run. The page is made of it too.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from rankfold.certificate.opened import Changed, Opened
from rankfold.certificate.schema import NotNegative
from rankfold.data.example import example_input
from rankfold.errors import visible
from rankfold.files.checked import Count, Fields, Number, check
from rankfold.files.json_file import read_json
from rankfold.machine import processes
from rankfold.machine.device import device_of
from rankfold.machine.timing import Stage, Watch
from rankfold.machine.weights import as_in_file
from rankfold.model.kept import KeptModel
from rankfold.report.latency import Latency, measured_latency
from rankfold.search.trial import Trial

SEEN_FILE = "seen.json"
LONGEST_TEXT = 400  # characters of an example that are shown
THUMBNAIL = 96  # pixels of the longer side of an image


@dataclass(frozen=True)
class Seen:
    """What a run saw.

    Attributes:
        stages: Seconds and memory of each, empty where the run measured no times.
        latency: Of original and result, None where the run measured no times.
        changed: The held-out examples that got worst; none of private data.
    """

    stages: tuple[Stage, ...] = ()
    latency: Latency | None = None
    changed: tuple[Changed, ...] = field(default=(), repr=False)

    def as_dict(self, tokenizer: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Plain values for JSON.

        Args:
            tokenizer: Makes texts of tokens; None where there is none.
            inputs: ``input_settings`` of the report: how images were prepared.
        """
        return {
            "stages": [asdict(stage) for stage in self.stages],
            "latency": self.latency,
            "examples": [_shown(one, tokenizer, inputs) for one in self.changed],
        }


class Run:
    """A run: the model that it keeps as it was, and the watch of all that it does."""

    def __init__(self, model: nn.Module, keep: Callable[[Tensor], Tensor], watch: Watch) -> None:
        """Keep the model as ``KeptModel`` does; ``watch`` is the progress of all that runs it."""
        self.watch = watch
        self._device = device_of(model)
        self._kept = KeptModel(model, keep, as_in_file)
        self._prepared: list[Stage] = []

    def prepared(self) -> Self:
        """The same, once what is there before a size is chosen: each result counts that too."""
        self._prepared = [*map(replace, self.watch.stages)]
        return self

    @contextmanager
    def as_it_was(self) -> Iterator[None]:
        """As of ``KeptModel``; what earlier uses of the preparation took is not counted.

        Of several processes, all do what is within.
        """
        self.watch.stages[:] = map(replace, self._prepared)
        with processes.joined(self._device), self._kept.as_it_was():
            yield


def seen_by(watch: Watch, chosen: Trial, opened: Opened) -> Seen:
    """What a run saw, once its held-out part is opened: both models are timed here."""
    if not watch.timing or processes.rank() > 0:  # those of one process don't disturb each other
        return Seen(changed=tuple(opened.changed))
    study = chosen.round.study
    latency = measured_latency(
        study.subject.unpacked.given,
        opened.standing.model,
        study.task,
        study.parts["calibration"],
        chosen.round.settings.form,
    )
    return Seen(tuple(map(replace, watch.stages)), latency, tuple(opened.changed))


class _Row(Fields):
    batch: Count
    original: NotNegative
    factorized: NotNegative
    ratio: NotNegative
    original_quartiles: tuple[NotNegative, NotNegative]
    factorized_quartiles: tuple[NotNegative, NotNegative]
    ratio_quartiles: tuple[NotNegative, NotNegative]
    rounds: Count


class _Latency(Fields):
    device: str
    threads: Count
    what: str
    rows: list[_Row]
    missing: str | None
    pairs: list[_Row] | None


class _Stage(Fields):
    name: str
    seconds: NotNegative
    megabytes: NotNegative | None


class _Example(Fields):
    place: str
    change: Number
    label: str | None
    text: str | None
    image: str | None

    def __post_init__(self) -> None:
        """An image is a picture in the file itself, and nothing that leads elsewhere."""
        if self.image is not None and not self.image.startswith("data:image/png;base64,"):
            raise ValueError("expected an image as data:image/png;base64")


class SeenFields(Fields):
    """The whole of ``seen.json``."""

    stages: list[_Stage]
    latency: _Latency | None
    examples: list[_Example]


def read_seen(folder: Path) -> dict[str, Any] | None:
    """``seen.json`` of an artifact, None where there is none.

    Raises:
        InputError: No JSON, or with a field of the wrong kind.
    """
    file = folder / SEEN_FILE
    if not file.is_file():
        return None
    found: Any = read_json(file)
    check(found, SeenFields, file)
    return dict(found)


def seen_text(seen: Mapping[str, Any]) -> str:
    """The content of ``seen.json``."""
    return json.dumps(seen, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _shown(one: Changed, tokenizer: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """An example as far as it can be shown: its text, its picture, its label."""
    values = _values(one.example)
    text = image = None
    if values is not None and not values.is_floating_point() and values.dim() == 1:
        text = _text(values, tokenizer)
    elif values is not None and values.dim() == 3 and values.shape[0] in (1, 3):
        image = _image(values, inputs)
    return {
        "place": str(one.place),
        "change": one.change,
        "label": _label(one.example),
        "text": text,
        "image": image,
    }


def _values(example: Any) -> Tensor | None:
    """What the model sees first of an example."""
    given: Any = example_input(example)
    if isinstance(given, Mapping):
        given = next((given[key] for key in ("input_ids", "pixel_values") if key in given), None)
    return given if torch.is_tensor(given) else None


def _label(example: Any) -> str | None:
    label: Any = None
    if isinstance(example, tuple) and len(example) == 2:
        label = example[1]
    elif isinstance(example, Mapping):
        label = example.get("labels", example.get("label"))
    return f"{label.item():g}" if torch.is_tensor(label) and label.numel() == 1 else None


def _text(tokens: Tensor, tokenizer: Any) -> str | None:
    if tokenizer is None or not hasattr(tokenizer, "decode"):
        return None
    try:
        text = str(tokenizer.decode(tokens.tolist(), skip_special_tokens=True))
    except Exception:  # a tokenizer of the user's own; the text is beside the result
        return None
    text = visible(" ".join(text.split()))
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}…"


def _image(values: Tensor, inputs: Mapping[str, Any]) -> str | None:
    """A small PNG, where pillow is installed; as the data had it, where that is known."""
    try:
        from PIL import Image
    except ImportError:
        return None
    pixels = values.detach().cpu().double()
    mean, std = inputs.get("mean"), inputs.get("std")
    if mean and std:
        pixels = pixels * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    elif pixels.min() < 0 or pixels.max() > 1:
        pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()).clamp(min=1e-12)
    array = (255 * pixels.clamp(0, 1)).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    picture.save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
