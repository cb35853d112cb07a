"""The loss that is reported is the truth: images, sounds, tables, Python, agreement, certificate.

As in ``test_truth``: each example alone, without padding, in plain torch and transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
import transformers as hf
from PIL import Image
from pyarrow import parquet
from scipy.io import wavfile
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import rankfold
from rankfold.cli.data_options import DataOptions
from rankfold.cli.open import OpenedModel, evaluate_examples, open_examples
from rankfold.data.account import ReadExamples
from rankfold.data.given import as_examples
from rankfold.data.parts import as_part
from rankfold.integrations.transformers import task_hint
from rankfold.machine.progress import SilentProgress
from rankfold.tasks.evaluation import evaluate
from rankfold.tasks.recognise import recognise_task
from tests.small_models import SmallCNN, SmallMLP, seeded, tiny_llama
from tests.tasks.test_truth import (
    CASES,
    DTYPES,
    LABELS,
    SMALL,
    TEXTS,
    VALUES,
    Answer,
    Case,
    loss_and_accuracy,
    next_words,
    of_transformers,
    opened_of,
    table,
)

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
NAMES = ("fox", "ant", "cow")  # of classes 0, 1 and 2: not in the order of the letters
PIXELS = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3)).astype(np.uint8)
ROWS = np.random.default_rng(1).normal(size=(9, 6)).round(3).astype(np.float32)
SOUNDS = [np.random.default_rng(n).normal(size=300 + 40 * (n % 3)) * 3000 for n in range(9)]
COLUMNS = {f"c{n}": ROWS[:, n].tolist() for n in range(6)}


def _type_of(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _array(pixels: Any, **more: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        np.savez(folder / "x.npz", x=pixels, y=np.array(LABELS), **more)
        return folder / "x.npz"

    return write


def _folders(suffix: str, names: Sequence[str]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        for place, (pixels, label) in enumerate(zip(PIXELS, LABELS, strict=True)):
            below = folder / "images" / names[label]
            below.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(below / f"{place}{suffix}")
        return folder / "images"

    return write


def _pictures(folder: Path) -> Path:
    """As ``datasets`` keeps them: files in a column."""
    held = []
    for place, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(folder / f"{place}.png")
        held.append({"bytes": (folder / f"{place}.png").read_bytes(), "path": f"{place}.png"})
    rows = pyarrow.table({"image": held, "label": [NAMES[label] for label in LABELS]})
    parquet.write_table(rows, folder / "x.parquet")
    return folder / "x.parquet"


def _scaled(model: nn.Module, pixels: np.ndarray) -> Tensor:
    image = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    image = (image - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    return image[None].to(_type_of(model))


def arrays(opened: OpenedModel, _: Path) -> Iterator[Answer]:
    for pixels, label in zip(PIXELS, LABELS, strict=True):
        yield opened.model(_scaled(opened.model, pixels)), torch.tensor([label])


def files(opened: OpenedModel, source: Path) -> Iterator[Answer]:
    """Classes of the model's own are numbered by the sorted names of the folders."""
    found = sorted(source.rglob("*.*"))
    names = sorted({file.parent.name for file in found})
    for file in found:
        pixels, label = np.array(Image.open(file)), names.index(file.parent.name)
        yield opened.model(_scaled(opened.model, pixels)), torch.tensor([label])


def processed(opened: OpenedModel, source: Path) -> Iterator[Answer]:
    shown = list(zip(map(Image.fromarray, PIXELS), LABELS, strict=True))
    if source.is_dir():
        found = sorted(source.rglob("*.*"))
        shown = [(Image.open(file), NAMES.index(file.parent.name)) for file in found]
    processor = hf.AutoImageProcessor.from_pretrained(str(opened.folder))
    for image, label in shown:
        pixels = processor(images=image, return_tensors="pt")["pixel_values"]
        logits = opened.model(pixel_values=pixels.to(_type_of(opened.model))).logits
        yield logits, torch.tensor([label])


def _sounds(folder: Path) -> Path:
    for place, (sound, label) in enumerate(zip(SOUNDS, LABELS, strict=True)):
        below = folder / "sounds" / NAMES[label]
        below.mkdir(parents=True, exist_ok=True)
        wavfile.write(below / f"{place}.wav", 8000, sound.astype(np.int16))
    return folder / "sounds"


def heard(opened: OpenedModel, source: Path) -> Iterator[Answer]:
    extractor = hf.AutoFeatureExtractor.from_pretrained(str(opened.folder))
    for file in sorted(source.rglob("*.wav")):
        samples = wavfile.read(file)[1].astype(np.float32) / 2**15
        inputs = extractor(samples, sampling_rate=8000, return_tensors="pt")
        values = inputs["input_values"].to(_type_of(opened.model))
        more = {name: mask for name, mask in inputs.items() if name != "input_values"}
        logits = opened.model(input_values=values, **more).logits
        yield logits, torch.tensor([NAMES.index(file.parent.name)])


def rows(opened: OpenedModel, _: Path) -> Iterator[Answer]:
    for row, label in zip(ROWS, LABELS, strict=True):
        inputs = torch.tensor(row)[None].to(_type_of(opened.model))
        yield opened.model(inputs), torch.tensor([label])


def row_values(opened: OpenedModel, _: Path) -> Iterator[Answer]:
    for row, value in zip(ROWS, VALUES, strict=True):
        inputs = torch.tensor(row)[None].to(_type_of(opened.model))
        yield opened.model(inputs)[0], torch.tensor([value])


def cnn() -> nn.Module:
    return seeded(1, SmallCNN)


def mlp() -> nn.Module:
    return seeded(3, SmallMLP)


def line() -> nn.Module:
    return seeded(3, lambda: nn.Linear(6, 1))


def _vit() -> nn.Module:
    options: dict[str, Any] = {**SMALL, "image_size": 16, "patch_size": 8}
    options |= {"id2label": dict(enumerate(NAMES)), "label2id": {n: i for i, n in enumerate(NAMES)}}
    del options["max_position_embeddings"]
    return seeded(0, lambda: hf.ViTForImageClassification(hf.ViTConfig(**options)))


def _listener() -> nn.Module:
    config = hf.Wav2Vec2Config(
        vocab_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, conv_dim=[8, 8], conv_kernel=[10, 3], conv_stride=[5, 2],
        num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        classifier_proj_size=8, initializer_range=0.5,
        id2label=dict(enumerate(NAMES)), label2id={n: i for i, n in enumerate(NAMES)},
    )  # fmt: skip
    return seeded(0, lambda: hf.Wav2Vec2ForSequenceClassification(config))


SCALED = {"mean": MEAN, "std": STD}
PREPARED: dict[str, Any] = {
    "vit": hf.ViTImageProcessor(
        size={"height": 16, "width": 16}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]
    ),
    "listener": hf.Wav2Vec2FeatureExtractor(sampling_rate=8000, return_attention_mask=True),
}
FILES = (
    Case("cnn-npz", cnn, _array(PIXELS), arrays, options=SCALED),
    Case("cnn-folders", cnn, _folders(".png", NAMES), files, options={**SCALED, "image_size": 8}),
    Case("cnn-jpeg", cnn, _folders(".jpg", "bca"), files, options={**SCALED, "image_size": 8}),
    Case("vit-folders", _vit, _folders(".png", NAMES), processed),
    Case("vit-npz", _vit, _array(PIXELS), processed),
    Case("vit-parquet", _vit, _pictures, processed),
    Case("listener-wav", _listener, _sounds, heard),
    Case("mlp-csv", mlp, table(".csv", **COLUMNS, label=LABELS), rows),
    Case("mlp-npz", mlp, _array(ROWS), rows),
    Case("line-tsv", line, table(".tsv", **COLUMNS, label=VALUES), row_values, task="regression"),
)


@DTYPES
@pytest.mark.parametrize("case", FILES, ids=lambda case: case.name)
def test_files_without_text(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    model, file = case.model().to(dtype).eval(), case.write(tmp_path)
    folder = None
    if (prepared := PREPARED.get(case.name.split("-")[0])) is not None:
        folder = tmp_path / "model"
        prepared.save_pretrained(folder)
    opened = OpenedModel(model, None, folder)
    with torch.no_grad():
        answers = [*case.truth(opened, file)]
    _compare(opened, answers, _read(case, opened, file), case.task)


def _read(case: Case, opened: OpenedModel, file: Path) -> Any:
    return open_examples(str(file), opened, DataOptions(task=case.task, **case.options))


def _compare(
    opened: OpenedModel,
    answers: Sequence[Answer],
    examples: Any,
    task: str | None = None,
    alone: bool = True,
) -> None:
    """Whether ``alone``, a batch of one holds no padding: its rounding is that of the truth."""
    loss, accuracy = loss_and_accuracy(answers)
    half = _type_of(opened.model) == torch.bfloat16
    for size in (1, None):
        found = evaluate_examples(
            opened, examples, limit=None, batch_size=size, progress=SilentProgress(), name=task
        )
        assert found["examples"] == len(answers)
        rounding = 1e-2 if half and not (alone and size) else 1e-5
        assert found["loss"]["mean"] == pytest.approx(loss, rel=rounding), size
        if not half:
            assert found["accuracy"] == pytest.approx(accuracy), size


IDS = [torch.randint(3, 48, (4 + n % 5,), generator=torch.Generator().manual_seed(n)).tolist()
       for n in range(9)]  # fmt: skip


def _padded(examples: Sequence[dict[str, Any]], left: bool = False) -> dict[str, Tensor]:
    """A user's own function: token 0 is padding, -100 no label."""
    longest = max(len(example["input_ids"]) for example in examples)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": []}
    for example in examples:
        gap = [0] * (longest - len(example["input_ids"]))
        for name, values in (
            ("input_ids", example["input_ids"]), ("attention_mask", [1] * len(example["input_ids"]))
        ):  # fmt: skip
            batch[name].append([*gap, *values] if left else [*values, *gap])
    return {name: torch.tensor(values) for name, values in batch.items()}


def _padded_left(examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    return _padded(examples, left=True)


class _Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from ({"input_ids": torch.tensor(ids)} for ids in IDS)


def _prepadded() -> list[dict[str, Tensor]]:
    batch = _padded([{"input_ids": ids} for ids in IDS], left=True)
    return [{name: values[n] for name, values in batch.items()} for n in range(len(IDS))]


TOKENS: dict[str, Callable[[], Any]] = {
    "tensors": lambda: [torch.tensor(ids) for ids in IDS],
    "lists": lambda: [{"input_ids": ids} for ids in IDS],
    "arrays": lambda: [{"input_ids": np.array(ids)} for ids in IDS],
    "columns": lambda: {"input_ids": IDS},
    "stream": _Stream,
    "loader": lambda: DataLoader([{"input_ids": i} for i in IDS], 4, collate_fn=_padded),
    "loader-left": lambda: DataLoader([{"input_ids": i} for i in IDS], 4, collate_fn=_padded_left),
    "padded-before": _prepadded,
    "shuffled": lambda: DataLoader(
        [{"input_ids": i} for i in IDS], 2, shuffle=True, collate_fn=_padded
    ),
}


@DTYPES
@pytest.mark.parametrize("given", TOKENS, ids=str)
def test_tokens_from_python(given: str, dtype: torch.dtype) -> None:
    """Padded by the user on either side, in a batch or before, or not at all."""
    opened = OpenedModel(tiny_llama(dtype), None, None)
    with torch.no_grad():
        answers = [next_words(opened, ids, ids) for ids in IDS]
    examples = as_examples(TOKENS[given]())
    _compare(opened, answers, examples, alone=given != "padded-before")


PAIRS: dict[str, Callable[[], Any]] = {
    "list": lambda: list(zip(torch.tensor(ROWS), LABELS, strict=True)),
    "arrays": lambda: list(zip(ROWS, LABELS, strict=True)),
    "data-set": lambda: TensorDataset(torch.tensor(ROWS), torch.tensor(LABELS)),
    "loader": lambda: DataLoader(TensorDataset(torch.tensor(ROWS), torch.tensor(LABELS)), 4),
    "batches": lambda: DataLoader(
        [(torch.tensor(ROWS[n : n + 3]), torch.tensor(LABELS[n : n + 3])) for n in (0, 3, 6)],
        batch_size=None,
    ),
}


@DTYPES
@pytest.mark.parametrize("given", PAIRS, ids=str)
def test_pairs_from_python(given: str, dtype: torch.dtype) -> None:
    opened = OpenedModel(mlp().to(dtype).eval(), None, None)
    with torch.no_grad():
        answers = [*rows(opened, Path())]
    _compare(opened, answers, as_examples(PAIRS[given]()))


def test_text_that_the_model_writes() -> None:
    opened = OpenedModel(tiny_llama(), None, None)
    options = DataOptions(length=12, own_windows=(6, 6, 6))
    windows = open_examples("self", opened, options)
    with torch.no_grad():
        answers = [next_words(opened, ids.tolist(), ids.tolist()) for ids in windows]
    _compare(opened, answers, windows)


def _moved(model: nn.Module) -> nn.Module:
    """Another model of the same kind, not far from it."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def _distances(
    case: Case, texts: Any, original: nn.Module, other: nn.Module
) -> tuple[list[float], list[int]]:
    """Of each text alone: mean distance, and number of terms."""
    losses, terms = [], []
    for text in texts:
        inputs = dict(opened_of(case, torch.float32).tokenizer(text, return_tensors="pt"))
        ours, theirs = (model(**inputs) for model in (original, other))
        if case.task == "embedding":
            units = [
                functional.normalize(out.last_hidden_state[0].float().mean(0), dim=0)
                for out in (ours, theirs)
            ]
            losses.append(float((units[0] - units[1]).square().sum()))
            terms.append(1)
            continue
        logs = [out.logits[0].float().log_softmax(-1) for out in (ours, theirs)]
        each = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
        losses.append(float(each.mean()))
        terms.append(each.numel())
    return losses, terms


AGREEING = tuple(
    Case(
        f"{family}-{task}{side and '-' + side}",
        of_transformers(kind, config, family, **SMALL, **more),
        lambda folder: folder, lambda *_: iter(()), family, task, side,
    )
    for family, kind, config, task, side, more in (
        ("bert", "BertModel", "BertConfig", "embedding", "", {"pad_token_id": 0}),
        ("bert", "BertModel", "BertConfig", "embedding", "left", {"pad_token_id": 0}),
        ("mpnet", "MPNetModel", "MPNetConfig", "embedding", "", {"pad_token_id": 7}),
        ("bert", "BertForSequenceClassification", "BertConfig", "teacher", "left",
         {"pad_token_id": 0}),
        ("bert", "BertForMaskedLM", "BertConfig", "teacher", "", {"pad_token_id": 0}),
        ("llama with padding", "LlamaForCausalLM", "LlamaConfig", "teacher", "left",
         {"pad_token_id": 3}),
    )
)  # fmt: skip


@DTYPES
@pytest.mark.parametrize("case", AGREEING, ids=lambda case: case.name)
def test_agreement_is_the_distance_of_each_text_alone(
    case: Case, dtype: torch.dtype, tmp_path: Path
) -> None:
    opened = opened_of(case, dtype)
    other = _moved(case.model()).to(dtype).eval()
    (tmp_path / "x.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in TEXTS))
    part = as_part("held_out", _read(case, opened, tmp_path / "x.jsonl"))
    hint = task_hint(opened.model)
    task = recognise_task(part, None, case.task, [opened.model], hint)
    with torch.no_grad():
        losses, terms = _distances(case, TEXTS, opened.model, other)
    for size in (1, None):
        assert evaluate(opened.model, task, part, batch_size=size).mean == 0
        found = evaluate(other, task, part, batch_size=size)
        half = dtype == torch.bfloat16
        rounding = 1e-4 if not half else 1e-3 if size == 1 else 0.2
        assert found.losses.tolist() == pytest.approx(losses, rel=rounding, abs=1e-6)
        assert found.terms.tolist() == terms


CERTIFIED = ("gpt2-txt", "llama-chats-padded", "bert-masked", "bert-classes-left", "bert-tags",
             "t5-targets", "bert-values")  # fmt: skip


@DTYPES
@pytest.mark.parametrize("name", CERTIFIED, ids=str)
def test_the_certificate_holds_the_truth_of_each_example(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Through ``lossless``: the losses of the original that its verdict is computed from."""
    case = next(case for case in CASES if case.name == name)
    opened, file = opened_of(case, dtype), case.write(tmp_path)
    options = DataOptions(length=case.length, task=case.task, **case.options)
    examples = open_examples(str(file), opened, options)
    with torch.no_grad():
        answers = [*case.truth(opened, file)]
    others = [ReadExamples(_shuffled(examples, seed), examples.account, examples.collate)
              for seed in (1, 2)]  # fmt: skip
    made = rankfold.lossless(
        opened.model, rankfold.Data(*others, examples), size=0.99, size_of="factorizable",
        task=case.task, objective="svd", effort="fast", batch_size=1 + 7 * (dtype == torch.float32),
    )  # fmt: skip
    losses, accuracy = zip(*(loss_and_accuracy([answer]) for answer in answers), strict=True)
    evidence = made.document["evidence"]
    assert evidence["original_losses"] == pytest.approx(list(losses), rel=1e-4)
    assert evidence["terms"] == [len(labels) for _, labels in answers]
    loss, share = loss_and_accuracy(answers)
    assert made.report["loss"]["original"] == pytest.approx(loss, rel=1e-4)
    assert made.report["accuracy"]["original"] == pytest.approx(share)
    if share is not None:
        assert evidence["original_correct"] == pytest.approx(list(accuracy))


def _shuffled(examples: Sequence[Any], seed: int) -> list[Any]:
    """Other texts of the same words, for the parts that are not tested."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for example in examples:
        named = isinstance(example, dict)
        ids = example["input_ids"] if named else example
        ids = ids[torch.randperm(len(ids), generator=generator)]
        found.append({**example, "input_ids": ids} if named else ids)
    return found
