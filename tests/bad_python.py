"""What the functions refuse: the call, and what the message must say.

A call gets a model that must be as it was when the call is over, and a folder with the artifact
``made`` in it. A message names the input, what was expected or what to do; the fragments of a row
are those.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from rankfold import (
    Data,
    Metric,
    Settings,
    compact,
    export,
    load,
    lossless,
    prepare,
    register_source,
    verify,
)
from rankfold.errors import InputError
from tests.small_models import SmallMLP, pairs, seeded, tiny_llama, token_windows

GOOD = pairs(48)
VALUES = torch.stack([value for value, _ in GOOD])
LABELS = [label for _, label in GOOD]


class Row(NamedTuple):
    """One bad call.

    Attributes:
        call: Of a good model and a folder.
        fragments: Of the message.
        error: What is raised.
    """

    call: Callable[[nn.Module, Path], object]
    fragments: list[str]
    error: type[Exception] = InputError


def _data(data: object, *fragments: str, **keywords: Any) -> Row:
    return Row(lambda model, _: lossless(model, data, **{"size": 0.5, **keywords}), [*fragments])


def _with(*fragments: str, **keywords: Any) -> Row:
    return _data(GOOD, *fragments, **keywords)


def _model(make: Callable[[], object], *fragments: str, **keywords: Any) -> Row:
    def call(_: nn.Module, __: Path) -> object:
        return lossless(cast("nn.Module", make()), GOOD, **{"size": 0.5, **keywords})

    return Row(call, [*fragments])


def _token_model(data: object, *fragments: str, **keywords: Any) -> Row:
    return Row(lambda _, __: lossless(tiny_llama(), data, size=0.5, **keywords), [*fragments])


def _call(call: Callable[[nn.Module, Path], object], *fragments: str) -> Row:
    return Row(call, [*fragments])


def _labelled(labels: list[Any]) -> list[tuple[Tensor, Any]]:
    return list(zip(VALUES, labels, strict=True))


def _changed(place: int, value: object) -> list[Any]:
    data: list[Any] = [*GOOD]
    data[place] = value
    return data


def _per_example(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Lengthless(Dataset[Any]):
    def __getitem__(self, place: int) -> Any:
        return GOOD[place]


class Failing(Dataset[Any]):
    def __len__(self) -> int:
        return 48

    def __getitem__(self, place: int) -> Any:
        if place == 7:
            raise OSError("the disk is gone")
        return GOOD[place]


class Short(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from GOOD[:5]


class Ending(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from GOOD[:20]
        raise KeyError("no more")


class Locked(SmallMLP):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class NoForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)


class Drawing(SmallMLP):
    def forward(self, values: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(values), 0.5)


class Remembering(SmallMLP):
    def forward(self, values: Tensor) -> Tensor:
        return super().forward(values).detach()


def _filled(value: float) -> nn.Module:
    model = seeded(3, SmallMLP)
    with torch.no_grad():
        model.second.weight[0, 0] = value
    return model


def _half_meta() -> nn.Module:
    model = seeded(3, SmallMLP)
    model.second = nn.Linear(10, 10, bias=False, device="meta")
    return model


def _mixed() -> nn.Module:
    model = seeded(3, SmallMLP)
    model.second = model.second.double()
    return model


SIZES: list[tuple[object, str]] = [
    (0, "at most 1"),
    (-0.5, "at most 1"),
    (60, "at most 1"),
    (float("nan"), "at most 1"),
    ("half", "number"),
    (None, "number"),
    (True, "number"),
    ([0.5], "number"),
]


def _sized(size: Any) -> Callable[[nn.Module, Path], object]:
    return lambda model, _: lossless(model, GOOD, size=size)


def _of_keyword(name: str, value: Any, *fragments: str) -> Row:
    return _with(name, *fragments, **{name: value})


SETTINGS: dict[str, Row] = {
    **{f"size {size!r}": _call(_sized(size), "the size is", told) for size, told in SIZES},
    "size of": _of_keyword("size_of", "layers", "'layers'", "model, factorizable"),
    "margin": _of_keyword("margin", -1.0, "-1.0", "0 or more"),
    "margin in words": _of_keyword("margin", "small", "'small'", "number"),
    "margin None": _of_keyword("margin", None, "None", "number"),
    "compact margin": _call(
        lambda m, _: compact(m, GOOD, margin=cast("Any", "wide")), "margin", "'wide'", "number"
    ),
    "task": _of_keyword("task", "clasification", "Did you mean classification?"),
    "task of a number": _of_keyword("task", 3, "3", "classification"),
    "task and loss": _with(
        "both loss=", "'classification'", task="classification", loss=_per_example
    ),
    "effort": _of_keyword("effort", "quick", "'quick'", "fast, standard, thorough"),
    "effort None": _of_keyword("effort", None, "None", "fast"),
    "objective": _of_keyword("objective", "magic", "'magic'", "joint"),
    "objective of a list": _of_keyword("objective", ["joint"], "['joint']", "joint"),
    "form": _of_keyword("form", "tucker", "'tucker'", "pivoted"),
    "cost": _of_keyword("cost", "seconds", "'seconds'", "flops"),
    "conv forms": _of_keyword("conv_forms", "no", "'no'", "True or False"),
    "embeddings": _of_keyword("embeddings", 1, "1", "True or False"),
    "curvature": _of_keyword("curvature", "flat", "'flat'", "sampled"),
    "damping": _of_keyword("damping", -1, "-1", "0 or more, or auto"),
    "damping infinite": _of_keyword("damping", float("inf"), "inf", "finite"),
    "damping True": _of_keyword("damping", True, "True", "number"),
    "step estimator": _of_keyword("step_estimator", "guess", "'guess'", "cross-validated"),
    "step groups": _of_keyword("step_groups", 0, "0", "1 or more"),
    "self share": _of_keyword("self_share", 1.0, "1.0", "0 and 0.9"),
    "self share of a net": _of_keyword("self_share", 0.5, "only causal language models"),
    "rounds": _of_keyword("rounds", 0, "0", "1 or more"),
    "rounds in parts": _of_keyword("rounds", 1.5, "1.5", "whole number"),
    "seed": _of_keyword("seed", "x", "'x'", "whole number"),
    "seed below 0": _of_keyword("seed", -1, "-1", "whole number, 0 to"),
    "seed too large": _of_keyword("seed", 1 << 63, "9223372036854775808", "whole number, 0 to"),
    "certified a text": _call(
        lambda m, _: compact(m, GOOD, certified=cast("Any", "no")), "certified", "True or False"
    ),
    "limit": _of_keyword("limit", 3, "3", "at least 4"),
    "limit True": _of_keyword("limit", True, "True", "whole number"),
    "include a text": _of_keyword("include", "first", "'first'", "list of patterns"),
    "include nothing": _with("'fc*'", "matches no layer", "first", include=["fc*"]),
    "include numbers": _of_keyword("include", [1], "[1]", "list of patterns"),
    "exclude all": _of_keyword("exclude", ["*"], "exclude"),
    "confidence": _of_keyword("confidence", 95, "95", "between 0.5 and 1"),
    "test": _of_keyword("test", "z", "'z'", "bounded, t, betting"),
    "largest change": _of_keyword("largest_change", 0, "0", "above 0"),
    "accuracy margin": _with("accuracy", "-0.1", accuracy_margin=-0.1),
    "accuracy of a regression": _data(
        _labelled([torch.rand(5)] * 48),
        "accuracy_margin is 0.5",
        "regression",
        "leave",
        accuracy_margin=0.5,
    ),
    "private": _of_keyword("private", "yes", "'yes'", "True or False"),
    "batch size": _of_keyword("batch_size", 0, "0", "1 or more"),
    "settings alone": _call(lambda _, __: Settings(rounds=0), "rounds is 0", "1 or more"),
    "prepare": _call(lambda m, _: prepare(m, GOOD, limit=1), "limit is 1", "at least 4"),
    "offload folder": _with("offload folder nowhere is no folder", offload_folder="nowhere"),
    "offload number": _of_keyword("offload_folder", 3, "3", "folder"),
    "memory": _of_keyword("memory", "8", "'8'", "8GB or 900MB"),
    "memory too small": _with("memory is 0.00 MB", "or more", memory="1KB"),
    "blocks": _of_keyword("blocks", 3, "3", "a list of names"),
    "no such block": _with("no module 'layers'", "names of its modules", blocks=["layers"]),
    "progress": _of_keyword("progress", "yes", "'yes'", "TerminalProgress"),
    "typo": Row(
        lambda m, _: lossless(m, GOOD, size=0.5, **cast("Any", {"sise": 1})),
        ["no keyword sise", "expected some of"],
        TypeError,
    ),
    "typo of a setting": Row(
        lambda m, _: prepare(m, GOOD, **cast("Any", {"effrot": "fast"})),
        ["no keyword effrot", "effort"],
        TypeError,
    ),
    "no size": Row(lambda m, _: cast("Any", lossless)(m, GOOD), ["size"], TypeError),
}

DATA: dict[str, Row] = {
    "None": _data(None, "NoneType", "expected a data set"),
    "a number": _data(7, "int", "expected a data set"),
    "a text": _data("self", "str", "expected a data set"),
    "a path": _data(Path("data.npz"), "Path", "expected a data set"),
    "a set": _data({1, 2, 3}, "set", "expected a data set"),
    "a function": _data(lambda: GOOD, "function", "expected a data set"),
    "a model": _data(nn.Linear(2, 2), "Linear", "expected a data set"),
    "empty": _data([], "0", "too few"),
    "an empty stream": _data(iter([]), "0", "too few"),
    "few": _data(GOOD[:9], "9", "too few"),
    "a short stream": _data(Short(), "5", "too few"),
    "a stream that fails": _data(Ending(), "example 20", "no more"),
    "a generator that fails": _data(
        (GOOD[number] if number < 20 else [][0] for number in range(48)), "example 20", "IndexError"
    ),
    "a set that fails": _data(Failing(), "example 7", "the disk is gone"),
    "no length": _data(Lengthless(), "Lengthless", "__len__"),
    "arrays": _data([VALUES, torch.tensor(LABELS)], "2 arrays", "(X, y)"),
    "NumPy arrays": _data([VALUES.numpy(), np.array(LABELS)], "2 arrays", "(X, y)"),
    "a 0-d tensor": _data(torch.tensor(3.0), "single number", "expected a data set"),
    "unlabelled": _data(list(VALUES), "float32", "label"),
    "unequal columns": _data({"x": VALUES, "labels": LABELS[:5]}, "x: 48", "labels: 5"),
    "a column of one": _data({"x": VALUES, "labels": 3}, "'labels'", "expected columns"),
    "sets in a mapping": _data({"train": GOOD, "test": GOOD}, "several data sets", "calibration="),
    "an empty mapping": _data({}, "mapping", "expected a data set"),
    "label too large": _data(_labelled([*LABELS[:-1], 9]), "label 9", "expected 0..4"),
    "negative label": _data(_labelled([-2, *LABELS[1:]]), "label -2", "expected 0..4"),
    "float labels": _data(
        _labelled([label + 0.5 for label in LABELS]),
        "label",
        "regression",
        task="classification",
    ),
    "words as labels": _data(_labelled(["cat", "dog"] * 24), "label"),
    "labels None": _data(_labelled([None] * 48), "None"),
    "NaN": _data(_changed(5, (VALUES[5] * torch.nan, 1)), "nan", "example 5"),
    "infinite": _data(_changed(5, (VALUES[5] / 0, 1)), "example 5"),
    "a NaN label": _data([(value, torch.full((5,), torch.nan)) for value in VALUES], "nan"),
    "another shape": _data(_changed(9, (torch.zeros(7), 1)), "can't run on the data", "(1, 7)"),
    "another type": _data(_changed(9, "nine"), "9", "str"),
    "a hole": _data(_changed(9, None), "None"),
    "another length": _data(_changed(9, (*GOOD[9], 1)), "9"),
    "other keys": _data(
        [{"values": v, "labels": y} for v, y in GOOD[:-1]] + [{"value": VALUES[0], "labels": 1}],
        "values",
        "value",
    ),
    "unknown keys": _data([{"x": v, "labels": y} for v, y in GOOD], "x"),
    "wrong width": _data([(torch.randn(4), y) for y in LABELS], "can't run on the data", "4"),
    "complex": _data([(v * 1j, y) for v, y in GOOD], "complex"),
    "objects": _data([(object(), y) for y in LABELS], "object"),
    "texts": _data([("a text", y) for y in LABELS], "str"),
    "all alike": _data([GOOD[0]] * 48, "1 different"),
    "a loader of nothing": _data(DataLoader(GOOD[:0]), "0"),
    "a loader that drops": _data(DataLoader(GOOD, batch_size=100, drop_last=True), "0"),
    "a loader of scalars": _data(
        DataLoader(TensorDataset(torch.arange(48)), batch_size=None), "batch_size"
    ),
    "a collate that fails": _data(
        DataLoader(GOOD, batch_size=8, collate_fn=lambda batch: batch[0].nothing), "nothing"
    ),
    "a collate of None": _data(
        DataLoader(GOOD, batch_size=8, collate_fn=lambda batch: None), "None"
    ),
    "a collate that draws": _data(
        DataLoader(
            GOOD,
            batch_size=8,
            collate_fn=lambda batch: (torch.randn(len(batch), 6), torch.zeros(len(batch)).long()),
        ),
        "draws at random",
        "draw once",
    ),
    "a part that is none": _call(
        lambda m, _: lossless(m, Data(GOOD, GOOD, cast("Any", None)), size=0.5), "NoneType"
    ),
    "a part too small": _call(lambda _, __: Data(GOOD, GOOD[:2], GOOD), "selection", "2"),
    "parts that share": _call(
        lambda m, _: lossless(m, Data(GOOD, pairs(48, 1), GOOD), size=0.5), "share 48 examples"
    ),
    "groups": _call(
        lambda _, __: Data(GOOD, pairs(48, 1), pairs(48, 2), groups=[1, 2]), "groups", "48"
    ),
    "groups of a number": _call(
        lambda _, __: Data(GOOD, pairs(48, 1), pairs(48, 2), groups=cast("Any", 3)), "groups"
    ),
    "overwrite in words": _call(
        lambda _, f: export(f / "made", f / "out", to="dense", overwrite=cast("Any", "no")),
        "overwrite is 'no'",
        "True or False",
    ),
    "a norm of the batch": _model(
        lambda: nn.Sequential(
            nn.Flatten(),
            nn.Linear(GOOD[0][0].numel(), 8),
            nn.BatchNorm1d(8, track_running_stats=False),
            nn.Linear(8, 3),
        ),
        "BatchNorm1d",
        "no running statistics",
    ),
    "a collate that is none": _call(
        lambda m, _: lossless(
            m, Data(GOOD, pairs(48, 1), pairs(48, 2), collate=cast("Any", "stack")), size=0.5
        ),
        "collate",
    ),
    "tokens of floats": _token_model(list(torch.rand(48, 8)), "float32", "token ids"),
    "tokens out of range": _token_model(
        [w + 40 for w in token_windows(48)], "the token id", "knows the ids 0 to 47"
    ),
    "tokens below 0": _token_model([w - 40 for w in token_windows(48)], "the token id -"),
    "padding without a mask": _token_model(
        [torch.cat([w[:8], torch.full((4,), 2)]) for w in token_windows(48)],
        "seem to be padded",
        "4 times the token",
        "attention_mask",
    ),
    "pairs for tokens": _token_model(GOOD, "float32", task="causal-lm"),
    "windows of one token": _token_model(token_windows(48, length=1), "label"),
    "all masked": _token_model(
        [{"input_ids": w, "labels": torch.full_like(w, -100)} for w in token_windows(48)], "-100"
    ),
    "mapping without ids": _token_model(
        [{"tokens": w} for w in token_windows(48)], "tokens", "input_ids"
    ),
}

MODELS: dict[str, Row] = {
    "None": _model(lambda: None, "the model is None", "nn.Module"),
    "a text": _model(lambda: "resnet18", "the model is 'resnet18'", "nn.Module"),
    "a class": _model(lambda: SmallMLP, "the class SmallMLP", "an instance"),
    "weights": _model(lambda: seeded(3, SmallMLP).state_dict(), "OrderedDict", "nn.Module"),
    "a function": _model(lambda: _per_example, "function", "nn.Module"),
    "no layer": _model(lambda: nn.Sequential(nn.Flatten(), nn.ReLU()), "no layer to factorize"),
    "no forward": _model(NoForward, "NoForward", "forward"),
    "on meta": _model(lambda: seeded(3, SmallMLP).to("meta"), "meta", "weights"),
    "half on meta": _model(_half_meta, "second", "meta"),
    "a lock": _model(Locked, "lock", "can't be copied"),
    "NaN": _model(lambda: _filled(torch.nan), "second.weight", "NaN"),
    "infinite": _model(lambda: _filled(torch.inf), "second.weight", "inf"),
    "mixed types": _model(_mixed, "can't run on the data", "float != double"),
    "draws": _model(lambda: seeded(3, Drawing), "gives two outputs for one input", "dropout"),
    "no gradient": _model(lambda: seeded(3, Remembering), "gradient"),
    "one logit": _model(lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 1)), "one logit"),
    "lazy": _model(lambda: nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 5)), "Lazy", "0"),
    "too small": _model(lambda: seeded(3, SmallMLP), "too small", "larger size", size=1e-3),
}

LOSSES: dict[str, Row] = {
    "not callable": _with("loss is 'cross_entropy'", "function", loss="cross_entropy"),
    "a number": _with(
        "returned ()", "one value per example", loss=lambda m, b: _per_example(m, b).mean()
    ),
    "a float": _with("float", "one value per example", loss=lambda m, b: 0.5),
    "two axes": _with("(", "one value per example", loss=lambda m, b: m(b[0])),
    "too few": _with(
        "10 examples, and 1 losses", "expected one", loss=lambda m, b: _per_example(m, b)[:1]
    ),
    "whole numbers": _with("int64", loss=lambda m, b: m(b[0]).argmax(1)),
    "raises": _with("loss", "ZeroDivisionError", loss=lambda m, b: 1 / 0),
    "no arguments": _with("loss", "argument", loss=lambda: 1),
    "NaN": _with("nan", "example", loss=lambda m, b: _per_example(m, b) * torch.nan),
    "metrics alone": _with("metrics", "list", metrics=Metric("hits", _per_example)),
    "metrics of functions": _with("metrics", "Metric", metrics=[_per_example]),
    "metric out of range": _with(
        "hits", "0 to 1", metrics=[Metric("hits", lambda m, b: _per_example(m, b) + 5)]
    ),
    "metric of a mean": _with(
        "hits",
        "one value per example",
        metrics=[Metric("hits", lambda m, b: _per_example(m, b).mean())],
    ),
    "metric that raises": _with(
        "hits", "ZeroDivisionError", metrics=[Metric("hits", lambda m, b: 1 / 0)]
    ),
    "metric margin": _with(
        "hits", "-1", metrics=[Metric("hits", lambda m, b: b[1] * 0.1, margin=-1)]
    ),
    "metric that draws": _with(
        "hits", "random", metrics=[Metric("hits", lambda m, b: torch.rand(len(b[1])))]
    ),
    "metrics of one name": _with("hits", metrics=[Metric("hits", lambda m, b: b[1] * 0.1)] * 2),
}

FOLDERS: dict[str, Row] = {
    "load nothing": _call(lambda _, f: load(f / "no"), "no", "artifact"),
    "load None": _call(lambda _, __: load(cast("Any", None)), "the folder is None", "path"),
    "load a number": _call(lambda _, __: load(cast("Any", 3)), "the folder is 3", "path"),
    "load without a model": _call(lambda _, f: load(f / "made"), "SmallMLP", "model="),
    "load into a text": _call(
        lambda _, f: load(f / "made", cast("Any", "SmallMLP")),
        "the model is 'SmallMLP'",
        "nn.Module",
    ),
    "load into another": _call(lambda _, f: load(f / "made", nn.Linear(2, 2)), "made", "Linear"),
    "load into wider": _call(lambda _, f: load(f / "made", SmallMLP(11)), "made", "last"),
    "verify nothing": _call(lambda m, f: verify(f / "no", m, GOOD), "no", "artifact"),
    "verify another": _call(lambda _, f: verify(f / "made", cast("Any", 3), GOOD), "is 3", "nn"),
    "verify no data": _call(lambda m, f: verify(f / "made", m, None), "NoneType", "data set"),
    "verify other data": _call(
        lambda m, f: verify(f / "made", m, pairs(48, 9)), "none of the certificate's"
    ),
    "export form": _call(
        lambda m, f: export(f / "made", f / "out", to="tflite", model=m), "'tflite'", "onnx"
    ),
    "export None": _call(
        lambda m, f: export(f / "made", f / "out", to=cast("Any", None), model=m), "None", "onnx"
    ),
    "export nothing": _call(lambda m, f: export(f / "no", f / "out", to="dense", model=m), "no"),
    "export without a model": _call(
        lambda _, f: export(f / "made", f / "out", to="dense"), "SmallMLP", "model="
    ),
    "export a text": _call(
        lambda _, f: export(f / "made", f / "out", to="dense", model=cast("Any", "m")), "'m'", "nn"
    ),
    "export to a full folder": _call(
        lambda m, f: export(f / "made", f / "made", to="dense", model=m), "made", "overwrite"
    ),
    "export dtype": _call(
        lambda m, f: export(f / "made", f / "out", to="pt2", model=m, dtype="int8"), "'int8'"
    ),
    "export inputs": _call(
        lambda m, f: export(f / "made", f / "out", to="pt2", model=m, inputs=cast("Any", "all")),
        "inputs",
    ),
    "export inputs too many": _call(
        lambda m, f: export(f / "made", f / "out", to="pt2", model=m, inputs={"x": VALUES}), "x"
    ),
    "suffix": _call(lambda _, __: register_source("h5", lambda path: GOOD), "'h5'", "its dot"),
    "own suffix": _call(lambda _, __: register_source(".csv", lambda path: GOOD), ".csv"),
    "suffix of a number": _call(
        lambda _, __: register_source(cast("Any", 5), lambda path: GOOD), "5", "its dot"
    ),
    "reader": _call(
        lambda _, __: register_source(".h5x", cast("Any", "read")), ".h5x", "function of a path"
    ),
}

BAD = {
    f"{table}: {name}": row
    for table, rows in {
        "settings": SETTINGS,
        "data": DATA,
        "models": MODELS,
        "losses": LOSSES,
        "folders": FOLDERS,
    }.items()
    for name, row in rows.items()
}
