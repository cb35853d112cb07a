"""What reaches a real small model of each family is what its own library makes for training.

Everything goes the product's way: a folder is opened as MODEL, a file as DATA, and the model is
evaluated. What the model was called with is compared with transformers' own tokenizer, collator or
processor on the same records.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from scipy.io import wavfile
from torch import Tensor, nn

from rankfold.cli.data_options import DataOptions
from rankfold.cli.open import OpenedModel, open_examples, open_model
from rankfold.data.parts import Part, as_part
from rankfold.integrations.transformers import pooling_of, task_hint
from rankfold.model.find_layers import find_layers
from rankfold.model.unpack import unpack
from rankfold.statistics.recorder import collect_statistics
from rankfold.tasks import evaluation
from rankfold.tasks.recognise import recognise_task
from tests.integrations.small_families import (
    CLASSES,
    IMAGES,
    SOUNDS,
    TEXT,
    save_other_model,
    save_text_model,
)

LENGTH = 40
TEXTS = [f"the {'bad ' * (n % 3)}film was {'good ' * (n % 2)}{'abcdefg'[n]}" for n in range(7)]
TEXTS.append("the film was bad and the other one was not that good and so on and on")
ANSWERS = [f"was {'good ' * (n % 3)}{'abcdefgh'[n]}" for n in range(8)]
LABELS = [CLASSES[n % 3] for n in range(8)]
Features = list[dict[str, Any]]


class Reached:
    """Batches with their labels, and what the model and its decoder were called with for each."""

    def __init__(self, opened: OpenedModel, part: Part, task: str | None) -> None:
        self.batches: list[Any] = []
        self.calls: list[dict[str, Any]] = []
        self.decoded: list[dict[str, Any]] = []
        model, hint = opened.model, task_hint(opened.model)
        loss = recognise_task(part, None, task, [model], hint, lambda: pooling_of(model))
        batch_loss = loss.batch_loss

        def told(called: nn.Module, batch: Any) -> Any:
            self.batches.append(batch)
            return batch_loss(called, batch)

        def called(to: list[dict[str, Any]]) -> Callable[..., None]:
            return lambda _module, _given, named: to.append(dict(named))

        hooks = [model.register_forward_pre_hook(called(self.calls), with_kwargs=True)]
        if hint == "seq2seq":
            decoder: Any = model.get_decoder()
            hooks.append(decoder.register_forward_pre_hook(called(self.decoded), with_kwargs=True))
        loss.batch_loss = told  # type: ignore[method-assign]
        evaluation.evaluate(model, loss, part)
        for hook in hooks:
            hook.remove()


def _rows_by_name(calls: list[dict[str, Any]]) -> Counter[Any]:
    """What each example of some calls is, by name, without what its mask hides."""
    found: Counter[Any] = Counter()
    for call in calls:
        named = {key: value for key, value in call.items() if torch.is_tensor(value)}
        mask = named.get("attention_mask")
        for row in range(len(next(iter(named.values())))):
            shown = {}
            for key, value in named.items():
                one = value[row]
                hidden = mask is not None and value.shape == mask.shape
                shown[key] = (one[mask[row] != 0] if hidden else one).tolist()
            found[json.dumps(shown, sort_keys=True)] += 1
    return found


def _calibrated(opened: OpenedModel, part: Part, task: str | None) -> list[dict[str, Any]]:
    """What the model is called with while its statistics are collected."""
    model, calls = unpack(opened.model).model, []
    hint = task_hint(opened.model)
    loss = recognise_task(part, None, task, [model], hint, lambda: pooling_of(opened.model))

    def called(_module: nn.Module, _given: Any, named: dict[str, Any]) -> None:
        calls.append(dict(named))

    hook = model.register_forward_pre_hook(called, with_kwargs=True)
    curvature = None if loss.agreement else "empirical"
    layers = find_layers(model)[0]
    collect_statistics(model, loss, part, layers, curvature=curvature, shrinkage=False)
    hook.remove()
    return calls


def _jsonl(folder: Path, **columns: Any) -> Path:
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    (folder / "x.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder / "x.jsonl"


def _lines(folder: Path) -> Path:
    (folder / "x.txt").write_text("\n".join(TEXTS) + "\n")
    return folder / "x.txt"


def _cut(tokenizer: Any, *text: Any, **more: Any) -> dict[str, Any]:
    return dict(tokenizer(*text, truncation=True, max_length=LENGTH, **more))


def _classes(tokenizer: Any, model: Any, folder: Path) -> tuple[Path, Features, Any]:
    numbers = [model.config.label2id[label] for label in LABELS]
    features = [{**_cut(tokenizer, t), "labels": n} for t, n in zip(TEXTS, numbers, strict=True)]
    return _jsonl(folder, text=TEXTS, label=LABELS), features, tf.DataCollatorWithPadding(tokenizer)


def _embeddings(tokenizer: Any, _: Any, folder: Path) -> tuple[Path, Features, Any]:
    features = [_cut(tokenizer, text) for text in TEXTS]
    return _jsonl(folder, text=TEXTS), features, tf.DataCollatorWithPadding(tokenizer)


def _tags(tokenizer: Any, _: Any, folder: Path) -> tuple[Path, Features, Any]:
    words = [text.split() for text in TEXTS]
    tags = [[CLASSES[len(word) % 3] for word in row] for row in words]
    features = []
    for row, theirs in zip(words, tags, strict=True):
        made = tokenizer(row, is_split_into_words=True, truncation=True, max_length=LENGTH)
        ids = made.word_ids()
        first = [w is not None and w not in ids[:n] for n, w in enumerate(ids)]
        labels = [
            CLASSES.index(theirs[w]) if new else -100 for w, new in zip(ids, first, strict=True)
        ]
        features.append({**made, "labels": labels})
    collator = tf.DataCollatorForTokenClassification(tokenizer)
    return _jsonl(folder, tokens=words, tags=tags), features, collator


def _targets(tokenizer: Any, model: Any, folder: Path) -> tuple[Path, Features, Any]:
    pairs = list(zip(TEXTS, ANSWERS, strict=True))
    features = [_cut(tokenizer, text, text_target=answer) for text, answer in pairs]
    collator = tf.DataCollatorForSeq2Seq(tokenizer, model=model)
    return _jsonl(folder, text=TEXTS, target=ANSWERS), features, collator


def _texts(tokenizer: Any, _: Any, folder: Path) -> tuple[Path, Features, Any]:
    """As a language model is trained: what is predicted is the text."""
    features = [_cut(tokenizer, text) for text in TEXTS]
    return _jsonl(folder, text=TEXTS), [{**f, "labels": f["input_ids"]} for f in features], None


def _windows(tokenizer: Any, _: Any, folder: Path) -> tuple[Path, Features, Any]:
    """As ``run_clm`` of transformers cuts a text, but for the marks of its ends."""
    ids = tokenizer("\n".join(TEXTS) + "\n", add_special_tokens=False)["input_ids"]
    rows = [ids[n : n + LENGTH] for n in range(0, len(ids) - LENGTH + 1, LENGTH)]
    features = [{"input_ids": row, "attention_mask": [1] * LENGTH, "labels": row} for row in rows]
    return _lines(folder), features, None


def _chats(tokenizer: Any, _: Any, folder: Path) -> tuple[Path, Features, Any]:
    chats = [
        [{"role": "user", "content": text[:12]}, {"role": "assistant", "content": answer}]
        for text, answer in zip(TEXTS, ANSWERS, strict=True)
    ]
    features = []
    for chat in chats:
        made = tokenizer.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        spoken = zip(made["input_ids"], made["assistant_masks"], strict=True)
        labels = [i if said else -100 for i, said in spoken]
        kept = {name: made[name] for name in ("input_ids", "attention_mask")}
        features.append({**kept, "labels": labels})
    # Of input_ids and labels alike, as in supervised fine-tuning.
    return _jsonl(folder, messages=chats), features, tf.DataCollatorForSeq2Seq(tokenizer)


def _hidden(tokenizer: Any, _: Any, folder: Path) -> tuple[Path, Features, Any]:
    return (
        _lines(folder),
        [_cut(tokenizer, t) for t in TEXTS],
        tf.DataCollatorWithPadding(tokenizer),
    )


KINDS: dict[str, tuple[Callable[..., tuple[Path, Features, Any]], str | None]] = {
    "classes": (_classes, None),
    "embeddings": (_embeddings, None),
    "tags": (_tags, "token-classification"),
    "hidden": (_hidden, "masked-lm"),
    "targets": (_targets, None),
    "texts": (_texts, None),
    "windows": (_windows, None),
    "chats": (_chats, None),
}
CASES = [(name, *task) for name, family in TEXT.items() for task in family.tasks]


def _ids(row: Tensor, mask: Tensor | None) -> tuple[int, ...]:
    return tuple((row if mask is None else row[mask != 0]).tolist())


def _shown(batch: Any, key: str) -> list[tuple[int, ...]]:
    """The tokens of each text of a batch, without padding and as they are where none is hidden."""
    named = batch if isinstance(batch, Mapping) else {"input_ids": batch}
    ids, labels = named["input_ids"], named.get("labels")
    if key == "hidden":
        assert bool((ids[labels != -100] == ids[labels != -100][0]).all())  # the mask token
        ids = torch.where(labels == -100, ids, labels)
    masks = named.get("attention_mask", [None] * len(ids))
    return [_ids(row, mask) for row, mask in zip(ids, masks, strict=True)]


def _collated(features: Features, collator: Any) -> dict[str, Tensor]:
    if collator is None or len(features) == 1:
        one = {name: torch.tensor([f[name] for f in features]) for name in features[0]}
        padded = collator is not None and collator.tokenizer.pad_token_id is not None
        return dict(collator([dict(features[0])])) if padded else one
    return dict(collator([dict(feature) for feature in features]))


def _compare(name: str, ours: Any, theirs: Tensor) -> None:
    if ours is None:  # where nothing is padded, no mask and a mask of ones are the same
        assert name == "attention_mask" and bool((theirs == 1).all()), name
        return
    assert ours.dtype == theirs.dtype, name
    assert torch.equal(ours, theirs), (name, ours, theirs)


@pytest.mark.parametrize(("name", "ending", "kind"), CASES, ids=lambda value: str(value))
def test_texts_reach_the_model_as_in_training(
    name: str, ending: str, kind: str, tmp_path: Path
) -> None:
    opened = open_model(str(save_text_model(tmp_path / "model", TEXT[name], ending)))
    tokenizer = tf.AutoTokenizer.from_pretrained(str(tmp_path / "model"))
    make, task = KINDS[kind]
    file, features, collator = make(tokenizer, opened.model, tmp_path)
    found: Any = open_examples(str(file), opened, DataOptions(task=task, length=LENGTH))
    account = found.account
    assert account.given == account.used + sum(map(len, account.left_out.values()))
    reached = Reached(opened, as_part("part", found, getattr(found, "collate", None)), task)
    side = getattr(found.collate, "side", None) or tokenizer.padding_side
    if side != tokenizer.padding_side and kind != "chats":
        assert any(f"padded on the {side}" in note for note in account.notes)
    tokenizer.padding_side = side
    marked = any("tokenizer writes around" in note for note in account.notes)
    assert marked == (kind == "windows" and tokenizer("")["input_ids"] != [])
    waiting = {tuple(feature["input_ids"]): feature for feature in features}
    assert len(waiting) == len(features) == len(found)
    forward = opened.model.forward.__code__.co_varnames
    for place, (batch, call) in enumerate(zip(reached.batches, reached.calls, strict=True)):
        theirs = _collated([waiting.pop(ids) for ids in _shown(batch, kind)], collator)
        if kind == "hidden":
            shown = torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])
            assert torch.equal(shown, theirs.pop("input_ids"))
            special = torch.tensor(tokenizer.all_special_ids)
            assert not torch.isin(batch["labels"], special).any()
        labels, decoder = theirs.pop("labels", None), theirs.pop("decoder_input_ids", None)
        if labels is not None and kind not in ("texts", "windows"):
            _compare("labels", batch["labels"], labels)
        for key, values in theirs.items():
            if key in forward:
                _compare(key, call.get(key), values)
        extra = {k for k in call if k not in theirs and k not in ("return_dict", "use_cache")}
        assert extra <= {"labels", "input_ids"}
        if decoder is not None:
            _compare("decoder_input_ids", reached.decoded[place]["input_ids"], decoder)
    assert not waiting
    calibrated = _calibrated(opened, as_part("calibration", found), task)
    assert _rows_by_name(calibrated) == _rows_by_name(reached.calls)


def _images(folder: Path) -> list[tuple[Any, int]]:
    found = []
    for place in range(6):
        pixels = np.random.default_rng(place).integers(0, 256, (20 + place, 24, 3))
        file = folder / CLASSES[place % 3] / f"{place}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(file)
        found.append((file, place % 3))
    return sorted(found)


@pytest.mark.parametrize("name", IMAGES)
def test_images_reach_the_model_as_its_processor_makes_them(name: str, tmp_path: Path) -> None:
    opened = open_model(str(save_other_model(tmp_path / "model", IMAGES[name])))
    files = _images(tmp_path / "images")
    found: Any = open_examples(str(tmp_path / "images"), opened, DataOptions())
    reached = Reached(opened, as_part("part", found), None)
    processor = tf.AutoImageProcessor.from_pretrained(str(tmp_path / "model"))
    shown = [Image.open(file) for file, _ in files]
    theirs = processor(images=shown, return_tensors="pt")  # all at once, as in training
    for key, values in theirs.items():
        _compare(key, torch.cat([call[key] for call in reached.calls]), values)
    assert {*theirs} == {key for call in reached.calls for key in call}
    if "Classification" in IMAGES[name][0]:
        labels = torch.cat([batch["labels"] for batch in reached.batches])
        _compare("labels", labels, torch.tensor([label for _, label in files]))


@pytest.mark.parametrize("name", SOUNDS)
def test_sounds_reach_the_model_as_its_extractor_makes_them(name: str, tmp_path: Path) -> None:
    opened = open_model(str(save_other_model(tmp_path / "model", SOUNDS[name])))
    extractor = tf.AutoFeatureExtractor.from_pretrained(str(tmp_path / "model"))
    sounds = {}
    for place in range(6):
        samples = np.random.default_rng(place).normal(size=900 + 70 * (place % 2)) * 3000
        file = tmp_path / "sounds" / CLASSES[place % 3] / f"{place}.wav"
        file.parent.mkdir(parents=True, exist_ok=True)
        wavfile.write(file, extractor.sampling_rate, samples.astype(np.int16))
        sounds[file] = samples.astype(np.int16).astype(np.float32) / 2**15
    found: Any = open_examples(str(tmp_path / "sounds"), opened, DataOptions())
    reached = Reached(opened, as_part("part", found), None)
    theirs = [
        (extractor(sounds[file], sampling_rate=extractor.sampling_rate, return_tensors="pt"), label)
        for file in sorted(sounds)
        for label in [CLASSES.index(file.parent.name)]
    ]
    waiting = list(range(len(theirs)))
    for batch, call in zip(reached.batches, reached.calls, strict=True):
        for row, label in enumerate(batch["labels"].tolist()):
            same = [
                n for n in waiting
                if theirs[n][1] == label and all(
                    torch.equal(call[key][row], values[0]) for key, values in theirs[n][0].items()
                    if call[key][row].shape == values[0].shape
                )
            ]  # fmt: skip
            assert same, f"no sound of class {label} is what reached the model"
            waiting.remove(same[0])
    assert not waiting
