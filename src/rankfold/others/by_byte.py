"""Losses of a language model in nats per byte of text: they compare models of any tokenizer.

Both models read the same text, each by its own tokenizer and after its own start token, so that
each byte is predicted by both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rankfold.data.parts import Batch, Part
from rankfold.errors import InputError, visible
from rankfold.integrations.lengths import most_tokens
from rankfold.machine.progress import Progress
from rankfold.model.evaluation_mode import evaluation_mode
from rankfold.others.source import Identity
from rankfold.tasks.evaluation import Evaluation, on_device, running
from rankfold.tasks.losses import call, exact, logits_of

BROKEN = "\N{REPLACEMENT CHARACTER}"  # where a window begins or ends within a character
LOOKED_AT = 64  # examples that two tokenizers are compared on


def same_tokens(tokenizer: Any, other: Any, part: Part) -> bool:
    """Whether two tokenizers have one vocabulary and read the texts of a part alike."""
    if tokenizer.get_vocab() != other.get_vocab():
        return False
    texts = [text_of(one, tokenizer) for one in part.examples[:LOOKED_AT]]
    return all(_encoded(tokenizer, text) == _encoded(other, text) for text in texts)


def text_of(example: object, tokenizer: Any) -> str:
    """The text of a window of tokens, without broken characters at its ends.

    Raises:
        InputError: The example is no window of tokens, or has no text.
    """
    if not torch.is_tensor(example) or example.dim() != 1 or example.is_floating_point():
        raise InputError(
            "the two models have different tokenizers, which are compared on plain text alone, in "
            "nats per byte; the data give examples of another kind. Give a text file, or two "
            "models with one tokenizer."
        )
    text: str = tokenizer.decode(
        example.tolist(), clean_up_tokenization_spaces=False, skip_special_tokens=True
    )
    text = text.strip(BROKEN)
    if not text:
        raise InputError("an example has no text without its special tokens; leave it out.")
    return text


def _encoded(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return found


class OfBytes:
    """Losses of one model on texts that another tokenizer has cut into windows."""

    task = "causal-lm"
    unit = "nats per byte"

    def __init__(self, identity: Identity, model: nn.Module, own: Any, reader: Any) -> None:
        """Read texts with the tokenizer ``own`` that the tokenizer ``reader`` has cut.

        Raises:
            InputError: The tokenizer has no token that a text can start with.
        """
        self.identity, self._model, self._own, self._reader = identity, model, own, reader
        found = own.bos_token_id if own.bos_token_id is not None else own.eos_token_id
        if not isinstance(found, int):
            raise InputError(
                f"the tokenizer of {visible(identity.name)} has no start token and no end token; "
                "two models with different tokenizers are compared after one. Set bos_token in "
                "its tokenizer_config.json."
            )
        self._start: int = found

    def check(self, part: Part) -> None:
        """Run one example.

        Raises:
            InputError: The model can't run on it.
        """
        self._nats(part.examples[0])

    def losses(self, part: Part, progress: Progress, stage: str, *, finite: bool) -> Evaluation:
        """Nats of each text by its UTF-8 bytes, which are its terms.

        Raises:
            InputError: A loss is not finite (with ``finite``), or a text is too long.
        """
        means, terms = [], []
        with evaluation_mode(self._model):
            for example in progress.track(part.examples, stage, len(part.examples)):
                count = len(text_of(example, self._reader).encode())
                means.append(self._nats(example) / count)
                terms.append(float(count))
        losses = torch.tensor(means, dtype=torch.float64)
        if finite and not bool(losses.isfinite().all()):
            place = int((~losses.isfinite()).nonzero()[0])
            raise InputError(
                f"the loss of {visible(self.identity.name)} on example {part.number(place)} is "
                f"{float(losses[place])}; expected a finite number. Leave the example out, or the "
                "model is damaged."
            )
        return Evaluation(losses, torch.tensor(terms, dtype=torch.float64), None)

    def _nats(self, example: object) -> float:
        ids = _encoded(self._own, text_of(example, self._reader))
        longest = most_tokens(self._model)
        if longest is not None and len(ids) + 1 > longest:
            raise InputError(
                f"a text has {len(ids) + 1} tokens for {visible(self.identity.name)}, which takes "
                f"{longest}. Give shorter windows with length=."
            )
        batch: Batch = on_device(torch.tensor([[self._start, *ids]]), self._model)
        with torch.no_grad(), running(batch, what="a text"):
            logits = logits_of(call(self._model, {"input_ids": batch}, wrapped=False))
        return _nats_of(logits[0, :-1], torch.tensor(ids, device=logits.device))


def _nats_of(logits: Tensor, ids: Tensor) -> float:
    """Of the tokens ``(length,)``, given logits ``(length, words)`` before each."""
    log = exact(logits).log_softmax(-1).gather(1, ids[:, None])
    return -float(log.double().sum())
