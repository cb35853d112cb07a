"""Whether tokens are to a model what a task says: known ids, masked padding, none seen before."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rankfold.data.example import example_input
from rankfold.data.parts import Part
from rankfold.errors import InputError
from rankfold.model.evaluation_mode import evaluation_mode
from rankfold.tasks.evaluation import on_device, running
from rankfold.tasks.losses import IGNORED, Task, call, logits_of
from rankfold.tasks.repeated import alike, one_batch, rounding_of, values_of_batch
from rankfold.tasks.supervised import CausalLM, UserLoss, next_labels, tokens_of

IDS, MASK = "input_ids", "attention_mask"
LOOKED_AT = 8  # examples that the model runs on
OF_ENDS = 3  # so often does no text end, or begin: with these tokens it is padded


class _Padding(NamedTuple):
    """Tokens that texts are padded with: ``padding`` itself, and several ``ends`` in a row."""

    padding: int | None
    ends: frozenset[int]

    def run(self, ids: Tensor) -> int:
        """So many tokens of padding stand at the end of ``ids``; below 0 that many at its start."""
        back, front = _run(ids.flip(0)), _run(ids)
        if self._counts(int(ids[-1]), back):
            return back
        return -front if self._counts(int(ids[0]), front) else 0

    def _counts(self, token: int, run: int) -> bool:
        if token in self.ends:
            return run >= OF_ENDS
        return token == self.padding


def _run(ids: Tensor) -> int:
    """How often the first token stands there, one after the other."""
    others = (ids != ids[0]).nonzero()
    return int(others[0]) if len(others) else len(ids)


def check_tokens(model: nn.Module, task: Task, parts: Sequence[Part]) -> None:
    """Refuse ids that the model has no row for, and padding that it would read as text.

    Args:
        model: The original.
        task: Gives the loss.
        parts: Whose examples are looked at, all of them; of those that only a collate function
            understands, one batch.

    Raises:
        InputError: Names the first such part and what was found in it.
    """
    rows, known = _rows(model), _padding(model, task)
    for part in parts:
        found = [*_token_ids(part)]
        for place, ids in found if rows is not None else ():
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= (rows or 0):
                raise InputError(
                    f"{_named(part, place)} has the token id {low if low < 0 else high}, and the "
                    f"model knows the ids 0 to {(rows or 0) - 1} (rows of its embedding). They "
                    "come from the tokenizer of another model, or from one with tokens added: use "
                    "the one that the model was trained with."
                )
        # Nothing is padded where a file was read: what stands there is text.
        if known is not None and part.source is None:
            padded = {place: run for place, ids in found if (run := known.run(ids))}
            if padded and _reads(model, task, part, padded):
                raise _unmasked(part, padded, dict(found))


def _named(part: Part, place: int) -> str:
    return f"example {part.number(place)} of the {part.name.replace('_', '-')} part"


def _unmasked(part: Part, padded: Mapping[int, int], ids: Mapping[int, Tensor]) -> InputError:
    place, run = max(padded.items(), key=lambda item: abs(item[1]))
    token, where = int(ids[place][-1 if run > 0 else 0]), "ends" if run > 0 else "begins"
    return InputError(
        f"{len(padded)} of {len(ids)} examples of the {part.name.replace('_', '-')} part seem to "
        f"be padded: {_named(part, place)} {where} with {abs(run)} times the token {token}. No "
        "attention_mask says so, and padding would count as text. Give examples with input_ids "
        "and attention_mask, 0 where there is padding, as a tokenizer gives them; or ids without "
        "padding. Where these tokens are text, give an attention_mask of ones."
    )


def _token_ids(part: Part) -> Iterator[tuple[int, Tensor]]:
    """The ids of each example without a mask, ``(length,)``, and its number."""
    if part.is_plain:
        for place, example in enumerate(part.examples):
            ids = _unmasked_ids(example_input(example), dimensions=1)
            if ids is not None and len(ids):
                yield place, ids
        return
    examples, batch = one_batch(part)
    rows = _unmasked_ids(batch, dimensions=2)
    if rows is not None and len(rows) == len(examples) and rows.shape[1]:
        places = part.spread_places(LOOKED_AT)
        yield from zip(places, rows, strict=False)


def _unmasked_ids(inputs: Any, dimensions: int) -> Tensor | None:
    """Token ids that stand without a mask, and without images, whose places have ids too."""
    if isinstance(inputs, Mapping):
        if MASK in inputs or any("pixel" in str(name) for name in inputs):
            return None
        inputs = inputs.get(IDS)
    if not torch.is_tensor(inputs) or inputs.dim() != dimensions or inputs.dtype == torch.bool:
        return None
    return None if inputs.is_floating_point() or inputs.is_complex() else inputs


def _reads(model: nn.Module, task: Task, part: Part, padded: Mapping[int, int]) -> bool:
    """Whether the loss of padded examples is another one where a mask hides the padding."""
    if task.agreement or not part.is_plain:
        return True
    places = [*padded][:LOOKED_AT]
    examples = max(part.take(places).batches(), key=len)
    batch = on_device(part.collate(examples), model)
    inputs = batch[0] if isinstance(batch, tuple) else batch
    if isinstance(task, CausalLM) and not (isinstance(batch, Mapping) and "labels" in batch):
        return True  # each token is to be predicted
    ids = inputs[IDS] if isinstance(inputs, Mapping) else inputs
    mask = torch.ones_like(ids)
    for row, example in zip(mask, examples, strict=True):
        place = next(p for p in places if part.examples[p] is example)
        run = padded[place]
        row[slice(-run, None) if run > 0 else slice(-run)] = 0
    named = {**(inputs if isinstance(inputs, Mapping) else {IDS: ids}), MASK: mask}
    masked = (named, *batch[1:]) if isinstance(batch, tuple) else named
    what = f"padded examples of the {part.name.replace('_', '-')} part"
    with evaluation_mode(model), running(batch, what=what):
        read, hidden = (values_of_batch(model, task, given) for given in (batch, masked))
    return not alike(read, hidden, rounding_of(model))


def _rows(model: nn.Module) -> int | None:
    """How many token ids a model of transformers knows, None of any other."""
    embeddings: Any = getattr(model, "get_input_embeddings", None)
    if getattr(model, "config", None) is None or embeddings is None:
        return None
    try:
        found: Any = embeddings()
    except NotImplementedError:  # of images or sounds
        return None
    return found.num_embeddings if type(found) is nn.Embedding else None


def _padding(model: nn.Module, task: Task) -> _Padding | None:
    """The tokens of padding of a model that takes a mask, or is to predict them."""
    if isinstance(task, UserLoss):
        return None  # it knows what counts
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        found = {m.padding_idx for m in model.modules() if isinstance(m, nn.Embedding)} - {None}
        if not isinstance(task, CausalLM) or len(found) != 1:
            return None
        return _Padding(found.pop(), frozenset())
    if not isinstance(task, CausalLM) and MASK not in inspect.signature(model.forward).parameters:
        return None
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    ends: set[int] = set()
    for name in ("bos_token_id", "eos_token_id", "sep_token_id"):
        value = getattr(config, name, None)
        ends.update(v for v in (value if isinstance(value, list) else [value]) if v is not None)
    padding = getattr(config, "pad_token_id", None)
    return _Padding(padding if isinstance(padding, int) else None, frozenset(ends))


def refuse_reading_ahead(model: nn.Module, task: Task, part: Part) -> None:
    """Refuse a language model whose prediction of a token changes with that token or later ones.

    The second half of some texts is replaced: what is predicted in the first half must stay.

    Args:
        model: The original.
        task: Nothing is done but for causal-lm.
        part: A batch of its examples is looked at.

    Raises:
        InputError: As said.
    """
    if not isinstance(task, CausalLM):
        return
    batch = on_device(one_batch(part)[1], model)
    named = isinstance(batch, Mapping)
    ids = batch.get(IDS) if named else batch
    if not torch.is_tensor(ids) or ids.dim() != 2 or ids.shape[1] < 3:
        return
    inputs = {name: value for name, value in batch.items() if name != "labels"} if named else {}
    labels = tokens_of(batch, batch["labels"] if named and "labels" in batch else ids)
    mask = inputs.get(MASK)
    half = ids.shape[1] // 2
    scored = (next_labels(labels, mask) != IGNORED)[:, :half]  # (n, half)

    def predicted(given: Tensor) -> Tensor:
        """What is predicted in the first half, ``(terms, classes)``."""
        with evaluation_mode(model):
            logits = logits_of(call(model, {**inputs, IDS: given}, wrapped=named))
        return logits[:, :half][scored]

    others = torch.cat([ids[:, :half], ids.roll(1, 1)[:, half:]], 1)
    first = predicted(ids)
    try:
        second = predicted(others)
    except Exception:  # images and the like have their own places among the ids
        return
    if not alike([first], [second], rounding_of(model)):
        raise InputError(
            f"{type(model).__name__} is no model for causal-lm as it stands: what it predicts for "
            "a token changes with that token and those behind it, so it has seen what it is to "
            "predict. Where it was trained to look back alone, its configuration has to say so "
            "(is_decoder: true for BERT and its relatives). Else name the task that it was trained "
            "for, such as masked-lm, or teacher."
        )
