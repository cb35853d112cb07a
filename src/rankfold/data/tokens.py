"""Texts as a tokenizer writes them for its model's training."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rankfold.data.input_settings import InputSettings
from rankfold.data.padding import Padding
from rankfold.errors import InputError

MASK = "attention_mask"
OTHER_SIDE = (
    "texts are padded on the {side}: on the {own}, the tokenizer's side, padding may change what "
    "the model gives"
)


class Wording(NamedTuple):
    """What a model's folder says is done to a text before it is tokenized.

    Attributes:
        prompt: Written before it.
        lower_case: Whether it is made lower case.
    """

    prompt: str = ""
    lower_case: bool = False

    def __call__(self, text: str) -> str:
        """The text that is tokenized, without spaces around it."""
        worded = f"{self.prompt}{text}".strip()
        return worded.lower() if self.lower_case else worded


class Tokens:
    """What a tokenizer makes of texts: as sources, as targets, or of words; it counts what it cuts.

    Args:
        tokenizer: Of the model.
        length: Most tokens of an example.
        takes: Names that the model's forward takes; what else the tokenizer gives is left out, as
            in the training of transformers. None for any.
        pads: As of ``Padding``.
        side: As of ``Padding``.
        wording: Of sources, None for texts as they are.

    Attributes:
        collate: Makes batches of them.
        notes: What is told of how they are padded.
    """

    def __init__(
        self,
        tokenizer: Any,
        length: int,
        takes: Collection[str] | None = None,
        *,
        pads: bool = True,
        side: str | None = None,
        wording: Wording | None = None,
    ) -> None:
        self.tokenizer, self.length, self.takes = tokenizer, length, takes
        self.wording = wording
        self._cut: set[str] = set()
        # Without a mask the model would read the padding.
        masks = MASK in getattr(tokenizer, "model_input_names", (MASK,))
        self.pads = pads and masks and (takes is None or MASK in takes)
        self.collate = Padding(tokenizer, pads=self.pads, side=side)
        own = getattr(tokenizer, "padding_side", side)
        self.notes = () if side in (None, own) else (OTHER_SIDE.format(own=own, side=side),)
        try:
            self._nothing = self._encoded("an empty text", "")["input_ids"]
        except InputError:
            self._nothing = None

    @property
    def marks(self) -> str:
        """The special tokens that the tokenizer writes around each text, for a message."""
        ids = self._nothing or []
        return " ".join(map(str, self.tokenizer.convert_ids_to_tokens(ids))) if ids else ""

    def source(self, text: str, what: str) -> dict[str, Tensor]:
        """The model's inputs of a text, by name, ``(length,)`` each.

        Args:
            text: The text.
            what: Names it in messages.

        Raises:
            InputError: The tokenizer refuses it.
        """
        worded = text if self.wording is None else self.wording(text)
        return self.inputs(self._within(what, worded))

    def target(self, text: str, what: str) -> Tensor:
        """The ids of a text that the model is to write: tokenizers may write these otherwise."""
        languages = [getattr(self.tokenizer, f"{side}_lang", None) for side in ("src", "tgt")]
        if languages[0] is not None and languages[1] is None:  # it would write the source's own
            raise InputError(
                "the tokenizer names no target language; expected one. Save it in the model's "
                f"folder with src_lang={languages[0]!r} and tgt_lang=, both given to "
                "AutoTokenizer.from_pretrained."
            )
        ids = self._within(what, text_target=text)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)

    @property
    def settings(self) -> InputSettings:
        """What is decided here, to be recorded."""
        if self.wording is None:
            return InputSettings(length=self.length)
        prompt, lower_case = self.wording
        return InputSettings(length=self.length, prompt=prompt, lower_case=lower_case)

    @property
    def cut(self) -> int:
        """Examples of which a text was longer."""
        return len(self._cut)

    def cuts(self, what: str) -> None:
        """Count an example as one that was longer."""
        self._cut.add(what)

    def behind(self) -> Padding:
        """``collate`` that pads behind the text: no token of a language model moves by it."""
        return Padding(self.tokenizer, pads=self.pads, side="right")

    def words(self, words: Sequence[str], what: str) -> Any:
        """The encoding of a text that comes in words; ``word_ids`` says whose an id is."""
        return self._within(what, list(words), is_split_into_words=True)

    def stream(self, text: str, what: str) -> Tensor:
        """``(tokens,)``, the ids of a whole text, without special tokens.

        Raises:
            InputError: The tokenizer refuses it.
        """
        ids = self._encoded(what, text, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)

    def inputs(self, encoding: Any) -> dict[str, Tensor]:
        """What the model takes of an encoding."""
        return {
            name: torch.tensor(values, dtype=torch.int64)
            for name, values in encoding.items()
            if name == "input_ids" or self.takes is None or name in self.takes
        }

    def says_nothing(self, inputs: dict[str, Tensor]) -> bool:
        """Whether the tokenizer writes nothing for a text but what it writes for an empty one."""
        return bool(inputs["input_ids"].tolist() == self._nothing)

    def _within(self, what: str, *text: Any, **more: Any) -> Any:
        found = self._encoded(what, *text, **more)
        if len(found["input_ids"]) <= self.length:
            return found
        self.cuts(what)
        return self._encoded(what, *text, **more, truncation=True, max_length=self.length)

    def _encoded(self, what: str, *text: Any, **more: Any) -> Any:
        try:
            # verbose=False: longer than the model takes is cut here.
            return self.tokenizer(*text, **more, verbose=False)
        # Tokenizers of every library, with language codes, prefixes and bytes, refuse in any way.
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"the tokenizer can't take {what}: {reason}") from error
