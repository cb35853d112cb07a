"""Batches of texts of unequal lengths, padded as their tokenizer pads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rankfold.errors import InputError

NO_LABEL = -100  # the label that torch's cross-entropy leaves out
TOKENS_A_BATCH = 512  # padding included


class Padding:
    """Makes batches of mappings with ``input_ids``; what is longest in a batch is its length.

    Inputs are padded by ``tokenizer.pad`` with its ids, on its side if no other is given, as the
    collators of transformers pad them for training; labels of tokens on the same side, by -100.
    Where there is no padding token none is made up: each example is a batch.

    Args:
        tokenizer: Of the model.
        pads: False where padding changes what the model gives, or it doesn't know the token.
        side: Where to pad, None for the tokenizer's side.
    """

    def __init__(self, tokenizer: Any, *, pads: bool = True, side: str | None = None) -> None:
        self.tokenizer, self.side = tokenizer, side
        self.pads = pads and isinstance(getattr(tokenizer, "pad_token_id", None), int)

    def __call__(self, examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """A batch, ``(n, length)`` each.

        Raises:
            InputError: There is no padding token, and lengths differ.
        """
        if not self.pads:
            return self._stacked(examples)
        inputs = [
            {name: value.tolist() for name, value in example.items() if name != "labels"}
            for example in examples
        ]
        padded = self.tokenizer.pad(
            {name: [row[name] for row in inputs] for name in inputs[0]},
            padding_side=self.side,
            return_attention_mask=True,
            return_tensors="pt",
            verbose=False,  # that to pad while encoding is faster
        )
        batch = {name: padded[name] for name in padded}
        if "labels" in examples[0]:
            batch["labels"] = self._labels([example["labels"] for example in examples])
        return batch

    def batches(self, examples: Sequence[Any], size: int | None = None) -> list[list[Any]]:
        """Consecutive examples: ``size`` of them, or so many as are ``TOKENS_A_BATCH`` tokens.

        One, where there is no padding token.
        """
        batches: list[list[Any]] = []
        longest = 0
        for example in examples:
            length = max(value.numel() for value in example.values())  # targets count, too
            longest = max(longest, length)
            most = (size or max(1, TOKENS_A_BATCH // longest)) if self.pads else 1
            if not batches or len(batches[-1]) >= most:
                batches.append([])
                longest = length
            batches[-1].append(example)
        return batches

    @staticmethod
    def _stacked(examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        try:
            return {name: torch.stack([e[name] for e in examples]) for name in examples[0]}
        except RuntimeError as error:
            raise InputError(
                f"{len(examples)} examples of unequal lengths can't be one batch: the tokenizer "
                "has no padding token that the model knows. Use batch_size=1."
            ) from error

    def _labels(self, rows: Sequence[Tensor]) -> Tensor:
        if rows[0].dim() == 0:
            return torch.stack(list(rows))
        left = (self.side or self.tokenizer.padding_side) == "left"
        longest = max(len(row) for row in rows)
        gaps = [longest - len(row) for row in rows]
        return torch.stack(
            [
                torch.nn.functional.pad(row, (gap, 0) if left else (0, gap), value=NO_LABEL)
                for row, gap in zip(rows, gaps, strict=True)
            ]
        )
