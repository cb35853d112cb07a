"""Damages of a saved folder, each drawn under its number, so that it can be made again.

``damaged(FOLDER, number, COPY)`` copies a folder and damages the copy.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 1.5, -0.0, 1e308, 10**9, 2**63, -(10**30), "", "a", "..",
    "../../etc/passwd", "/etc/passwd", "\0", "\ud800", "torch.float16", "torch.float64", [], {},
    [[]], [1], ["a"], {"a": 1}, {"": ""}, [None], "head", "head.weight", "model", "nan",
]  # fmt: skip


class Bomb:
    """A pickle that leaves a trace where it is opened."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


# Damages of bytes


def _flip(data: bytearray, draw: random.Random) -> None:
    for _ in range(draw.choice((1, 1, 1, 5, 50))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def _truncate(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data)) :]


def _extend(data: bytearray, draw: random.Random) -> None:
    data += draw.randbytes(draw.randrange(1, 100))


def _cut(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data))
    del data[start : start + draw.randrange(1, 60)]


def _move(data: bytearray, draw: random.Random) -> None:
    start, to = draw.randrange(len(data)), draw.randrange(len(data))
    piece = data[start : start + 16]
    data[to : to + len(piece)] = piece


def _noise(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data))
    piece = draw.choice((b"\xff\xfe", b"\0\0\0\0", b"NaN", b"-Infinity", b"{", b"9" * 5000, b'"'))
    data[start : start + len(piece)] = piece


BYTES = (_flip, _truncate, _extend, _cut, _move, _noise)


def damage_bytes(file: Path, draw: random.Random) -> str:
    data = bytearray(file.read_bytes())
    change = draw.choice(BYTES)
    change(data, draw)
    file.write_bytes(data)
    return f"{change.__name__} of {file.name}"


# Damages of the folder


def damage_files(folder: Path, draw: random.Random, name: str | None = None) -> str:
    """Put something else in the place of the file of this name, or of any."""
    file = draw.choice([f for f in sorted(folder.iterdir()) if name in (None, f.name)])
    other = draw.choice([f for f in sorted(folder.iterdir()) if f.is_file()])
    kind = draw.choice(
        ("missing", "renamed", "swapped", "folder", "pickle", "outside", "loop", "pipe", "huge",
         "self", "empty", "deep", "dangling")
    )  # fmt: skip
    content = file.read_bytes()
    file.unlink()
    if kind == "renamed":
        (folder / draw.choice(("a", "pytorch_model.bin", f"{file.name}.old"))).write_bytes(content)
    elif kind == "swapped" and other != file:
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif kind == "folder":
        file.mkdir()
    elif kind == "pickle":
        file.write_bytes(pickle.dumps(Bomb()))
    elif kind == "outside":
        file.symlink_to("/etc/passwd")
    elif kind == "loop":
        file.symlink_to(file)
    elif kind == "dangling":
        file.symlink_to(folder / ".." / "nowhere")
    elif kind == "self":
        (folder / "kept").write_bytes(content)  # as a download's cache does
        file.symlink_to(folder / "kept")
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "huge":
        file.touch()
        os.truncate(file, 1 << 42)
    elif kind == "empty":
        file.touch()
    elif kind == "deep":
        file.write_text(draw.choice(('{"layers": ', "[")) * draw.choice((2_000, 200_000)))
    return f"{kind} {file.name}"


# Damages of JSON


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in list(parts):
        yield (*path, key)
        if isinstance(part, dict | list):
            yield from _places(part, (*path, key))


def _twice(value: Any, path: tuple[Any, ...], other: Any) -> str:
    """JSON in which the field at this path stands twice, first with another value."""
    if isinstance(value, dict):
        parts = []
        for key, part in value.items():
            inner = path[1:] if path and path[0] == key else ()
            if path[:1] == (key,) and len(path) == 1:
                parts.append(f"{json.dumps(key)}: {json.dumps(other)}")
            parts.append(f"{json.dumps(key)}: {_twice(part, inner, other)}")
        return "{" + ", ".join(parts) + "}"
    if isinstance(value, list):
        texts = [
            _twice(part, path[1:] if path[:1] == (index,) else (), other)
            for index, part in enumerate(value)
        ]
        return "[" + ", ".join(texts) + "]"
    return json.dumps(value)


def damage_json(
    file: Path, draw: random.Random, within: str | None = None, fields: tuple[str, ...] = ()
) -> str:
    """Change one field.

    Args:
        file: The file.
        draw: Draws.
        within: The object to damage, None for the whole.
        fields: The fields of that object to draw from, none for all.
    """
    whole = json.loads(file.read_text())
    value = whole if within is None else whole[within]
    start = draw.choice(fields or tuple(value))
    inside = list(_places(value[start])) if isinstance(value[start], dict | list) else []
    path = (start, *draw.choice([(), *inside]))
    owner = value
    for key in path[:-1]:
        owner = owner[key]
    kind = draw.choice(("value", "value", "value", "gone", "neighbour", "twice", "name"))
    told = f"{kind} {'.'.join(map(str, path))} of {file.name}"
    if kind == "twice":
        outer = path if within is None else (within, *path)
        file.write_text(_twice(whole, outer, draw.choice(VALUES)))
        return told
    if kind == "gone":
        del owner[path[-1]]
    elif kind == "name" and isinstance(owner, dict):
        name = draw.choice(("", "a", "..", "__class__", f"{path[-1]} "))
        owner[name] = owner.pop(path[-1])
    elif kind == "neighbour" and isinstance(owner, list):
        owner.insert(path[-1], draw.choice(owner))
    elif kind == "neighbour" and isinstance(owner[path[-1]], int | float):
        owner[path[-1]] += draw.choice((-1, 1))
    else:
        owner[path[-1]] = draw.choice(VALUES)
        told += f" = {owner[path[-1]]!r}"
    file.write_text(json.dumps(whole))
    return told


# Damages of safetensors: the header is JSON, too


def damage_header(file: Path, draw: random.Random) -> str:
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    name = draw.choice([key for key in header if key != "__metadata__"])
    kind = draw.choice(("shape", "dtype", "data_offsets", "name", "length", "more"))
    entry = header[name]
    if kind == "shape":
        entry["shape"] = draw.choice(([-1], [2**62, 4], [0], [], [10**12], entry["shape"][::-1]))
    elif kind == "dtype":
        entry["dtype"] = draw.choice(("F64", "F16", "I32", "I64", "U8", "Q4", 3))
    elif kind == "data_offsets":
        entry["data_offsets"] = draw.choice(([0, 2**60], [5, 3], [0, 0], [-4, 4], [2**63, 2**63]))
    elif kind == "name":
        header[draw.choice(("../a", "", "head.weight", f"{name}x"))] = header.pop(name)
    elif kind == "more":
        header[draw.choice(("a", "../a"))] = dict(entry)
    text = json.dumps(header).encode()
    length = len(text) if kind != "length" else draw.choice((0, 3, 2**40, 2**63 - 1, 2**64 - 1))
    file.write_bytes(
        struct.pack("<Q", length) + text + data[8 + struct.unpack("<Q", data[:8])[0] :]
    )
    return f"{kind} of {name} in {file.name}"


def damage_tensors(file: Path, draw: random.Random) -> str:
    tensors = load_file(file)
    name, other = draw.sample(sorted(tensors), 2)
    same = [n for n in sorted(tensors) if n != name and tensors[n].shape == tensors[name].shape]
    kind = draw.choice(("swapped", "swapped", "gone", "cut", "nan", "zeros", "dtype", "extra"))
    tensor = tensors[name]
    if kind == "swapped":
        other = draw.choice(same) if same else other
        tensors[name], tensors[other] = tensors[other], tensor
    elif kind == "gone":
        del tensors[name]
    elif kind == "cut":
        tensors[name] = tensor[:-1] if tensor.dim() else tensor.view(1)
    elif kind == "nan":
        tensors[name] = torch.full_like(tensor, float("nan") if tensor.is_floating_point() else -7)
    elif kind == "zeros":
        tensors[name] = tensor + 1
    elif kind == "dtype":
        tensors[name] = tensor.to(draw.choice((torch.float16, torch.int64, torch.float64)))
    else:
        tensors["../extra"] = torch.zeros(2)
    save_file(tensors, file, metadata={"format": "pt"})
    return f"{kind} {name} of {file.name}"


STRUCTURE = ("format_version", "model", "unpacked", "layers", "digest")


def damaged(source: Path, number: int, target: Path) -> str:
    """Copy a folder and damage the copy as the number says.

    Returns:
        What was done.
    """
    draw = random.Random(number)
    shutil.copytree(source, target)
    weights, manifest = target / "model.safetensors", target / "rankfold.json"
    ways: list[Callable[[], str]] = [
        lambda: damage_json(manifest, draw, fields=STRUCTURE),
        lambda: damage_json(manifest, draw, fields=STRUCTURE),
        lambda: damage_json(manifest, draw),
        lambda: damage_header(weights, draw),
        lambda: damage_tensors(weights, draw),
        lambda: damage_bytes(weights, draw),
        lambda: damage_bytes(manifest, draw),
        lambda: damage_files(target, draw),
    ]
    config = target / "config.json"
    if config.exists():
        ways += [
            lambda: damage_json(config, draw, "quantization_config"),
            lambda: damage_json(config, draw),
            lambda: damage_bytes(config, draw),
        ]
    return draw.choice(ways)()


def damaged_for_transformers(source: Path, number: int, target: Path) -> str:
    """The same, but only what rankfold and not transformers itself has to answer for."""
    draw = random.Random(number)
    shutil.copytree(source, target)
    weights, config = target / "model.safetensors", target / "config.json"
    ways: list[Callable[[], str]] = [
        lambda: damage_json(config, draw, "quantization_config", STRUCTURE),
        lambda: damage_json(config, draw, "quantization_config", STRUCTURE),
        lambda: damage_header(weights, draw),
        lambda: damage_tensors(weights, draw),
        lambda: damage_bytes(weights, draw),
        lambda: damage_files(target, draw, weights.name),
    ]
    return draw.choice(ways)()
