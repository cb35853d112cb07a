"""How the command line reads DATA: what its options say, and what an artifact records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rankfold.data.input_settings import InputSettings
from rankfold.data.parts import USUAL_LIMITS, Limits

# Options that belong to some kinds of source, and to no others.
READING = (
    "mean", "std", "image_size", "length", "text_column", "label_column", "target_column",
    "tokens_column", "tags_column", "skip_broken",
)  # fmt: skip


@dataclass(frozen=True)
class DataOptions:
    """How to read DATA.

    Attributes:
        mean: Per channel, for images and arrays, or None.
        std: Likewise.
        image_size: Side that images of a folder are resized and cropped to, or None. What is None
            is as the model's folder says, or timm, if one does.
        length: Tokens a window of text, or None for 512 or what the model takes.
        seed: Seeds the split.
        task: One of ``rankfold.tasks.TASKS``, or None to go by what the model is made for.
        text_column: Column of the text in records, None for ``text``.
        label_column: Column of the label, None for ``label``.
        target_column: Column of the target text, None for ``target``.
        tokens_column: Column of the tokens of token classification, None for ``tokens``.
        tags_column: Column of their labels, None for ``tags``.
        own_windows: Windows that the model writes where DATA is ``self``, for each of the parts.
        skip_broken: Leave out files of a folder that can't be read, and name them on stderr.
        limits: Most examples of each part: a stream that is split is read no further than that.
        recorded: What the artifact that is opened was made with.
        asked: Names of what the user gave where ``recorded`` gave more, else None.
    """

    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    image_size: int | None = None
    length: int | None = None
    seed: int = 0
    task: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    target_column: str | None = None
    tokens_column: str | None = None
    tags_column: str | None = None
    own_windows: tuple[int, int, int] = (64, 16, 64)
    skip_broken: bool = False
    limits: Limits = USUAL_LIMITS
    recorded: InputSettings = field(default_factory=InputSettings)
    asked: frozenset[str] | None = None

    def given(self) -> frozenset[str]:
        """Names of the options for reading data that the user gave."""
        if self.asked is not None:
            return self.asked
        return frozenset(name for name in READING if getattr(self, name) not in (None, False))
