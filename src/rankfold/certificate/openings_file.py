"""The file that holds the record of openings: checked lines, appended under a lock and synced.

A line is 16 digits of the SHA-256 of what follows in it, and one of two objects: the examples of a
part that was opened (once for all openings of it), or an opening. What is damaged is counted by
line and stays where it is, all else is read. Earlier versions wrote openings with all examples in
each line and no digest: they are read too, and written anew with the next opening.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rankfold.files.durable import sync_folder, write_whole

SHORT = 16  # hexadecimal digits of an example's digest that are kept
_CHECK = 16  # hexadecimal digits of a line's digest that stand before it
LARGEST = 1 << 30  # bytes; of a hundred thousand openings it is a tenth of this
PATIENCE = 60.0  # seconds to wait for another process that reads and writes


@dataclass(frozen=True)
class Opening:
    """One certificate that held-out examples were used for.

    Attributes:
        original: Digest of the original model's weights.
        models: Digests of the models that were tested, in order.
        examples: Short digests of the held-out examples.
        verdict: Of the last one that counts.
        seed: Of the run.
    """

    original: str
    models: tuple[str, ...]
    examples: tuple[str, ...]
    verdict: str
    seed: int


@dataclass
class Found:
    """What a file says.

    Attributes:
        openings: In their order, of the original that was asked for.
        damaged: Numbers, from 1, of lines that say nothing that can be read.
        lines: How many there are.
        parts: Those whose examples are in the file: digests of the original and of the part.
        earlier: Whether an earlier version has written some of it.
        ends: Whether the last line ends.
    """

    openings: list[Opening] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)
    lines: int = 0
    parts: set[tuple[str, str]] = field(default_factory=set)
    earlier: bool = False
    ends: bool = True


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Keep other processes out of the file; its folder is made.

    Raises:
        OSError: No lock can be made there, or another process doesn't give it free.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{file}.lock", timeout=PATIENCE)
    try:
        lock.acquire()
    except Timeout:
        raise OSError(f"another process has locked it for {PATIENCE:g} s") from None
    except NotImplementedError as error:
        raise OSError(f"its file system has no locks: {error}") from None
    try:
        yield
    finally:
        lock.release()


def read(file: Path, original: str | None = None) -> Found:
    """Everything that a file says of one original, or of all; nothing where there is no file.

    Raises:
        OSError: It can't be read.
    """
    found = Found()
    examples: dict[tuple[str, str], tuple[str, ...]] = {}
    for number, line in enumerate(_lines(file), 1):
        found.lines, found.ends = number, line.endswith(b"\n")
        if not line.strip():
            continue
        try:
            entry, earlier = _parsed(line)
            found.earlier |= earlier
            opening = _opening(entry, entry["examples"]) if earlier else None
            if original not in (None, entry["original"]):
                continue
            if opening is not None:
                found.openings.append(opening)
                continue
            part = entry["original"], entry["part"]
            if "examples" in entry:
                examples[part] = _unpacked(entry["examples"])
            else:
                found.openings.append(_opening(entry, examples[part]))
        except (ValueError, KeyError, TypeError, RecursionError):
            found.damaged.append(number)
    found.parts = set(examples)
    return found


def append(file: Path, opening: Opening, found: Found, *, alone: bool) -> None:
    """Write an opening behind what is there, to the disk.

    A last line that was cut is ended first. What can't be written whole is taken back.

    Args:
        file: Where to.
        opening: What.
        found: What is there.
        alone: Whether the lock is held: what is there is only then written anew or taken back.

    Raises:
        OSError: It can't be written.
    """
    if found.earlier and alone:
        with suppress(OSError):  # it stays as it is, and can be read
            _write_anew(file)
    data = b"".join(_written([opening], {*found.parts}))
    new = not file.exists()
    place = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(place).st_size
        try:
            _write(place, data if found.ends else b"\n" + data)
            os.fsync(place)
        except OSError:
            if alone:
                os.ftruncate(place, size)
            raise
    finally:
        os.close(place)
    if new:
        sync_folder(file.parent)


def _lines(file: Path) -> Iterator[bytes]:
    try:
        status = file.stat()
    except FileNotFoundError:
        return
    if not stat.S_ISREG(status.st_mode):  # a pipe or device would never end
        raise OSError("it is no file")
    if status.st_size > LARGEST:
        raise OSError(f"it has {status.st_size:,} bytes; expected at most {LARGEST:,}")
    with file.open("rb") as lines:
        yield from lines


def _parsed(line: bytes) -> tuple[dict[str, Any], bool]:
    """The object in a line, and whether an earlier version has written it.

    Raises:
        ValueError: It is damaged.
    """
    earlier = line.startswith(b"{")
    text = line.removesuffix(b"\n")
    if not earlier:
        check, _, text = text.partition(b" ")
        if check != _digest(text).encode():
            raise ValueError("a line is not what its digest was made of")
    entry = json.loads(text)
    if not isinstance(entry, dict):
        raise ValueError("a line is no object")
    return entry, earlier


def _opening(entry: dict[str, Any], examples: Iterable[str]) -> Opening:
    texts = (*entry["models"], *examples, entry["original"], entry["verdict"])
    if not all(isinstance(text, str) for text in texts) or not isinstance(entry["seed"], int):
        raise TypeError("a field of a line has another type")
    _packed(examples)
    return Opening(
        entry["original"], tuple(entry["models"]), tuple(examples), entry["verdict"], entry["seed"]
    )


def _written(openings: Iterable[Opening], known: set[tuple[str, str]]) -> Iterator[bytes]:
    """Lines of openings, with those of parts that are not known yet."""
    for one in openings:
        packed = _packed(one.examples)
        part = hashlib.sha256(packed.encode()).hexdigest()[: 2 * SHORT]
        if (one.original, part) not in known:
            known.add((one.original, part))
            yield _line({"original": one.original, "part": part, "examples": packed})
        yield _line(
            {
                "original": one.original,
                "models": list(one.models),
                "part": part,
                "verdict": one.verdict,
                "seed": one.seed,
            }
        )


def _write_anew(file: Path) -> None:
    """Write lines of earlier versions as this one does; all others stay, damaged ones too."""

    def lines() -> Iterator[bytes]:
        known: set[tuple[str, str]] = set()
        for line in _lines(file):
            try:
                entry, earlier = _parsed(line)
                opening = _opening(entry, entry["examples"]) if earlier else None
            except (ValueError, KeyError, TypeError, RecursionError):
                opening = None
            if opening is None:
                yield line.removesuffix(b"\n") + b"\n"
            else:
                yield from _written([opening], known)

    real = file.resolve()
    write_whole(real, lines(), stat.S_IMODE(real.stat().st_mode))


def _line(entry: dict[str, Any]) -> bytes:
    text = json.dumps(entry, separators=(",", ":")).encode()
    return f"{_digest(text)} ".encode() + text + b"\n"


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:_CHECK]


def _packed(examples: Iterable[str]) -> str:
    """Short digests as one text, eight bytes each."""
    found = [bytes.fromhex(example) for example in examples]
    if any(len(one) != SHORT // 2 for one in found):
        raise ValueError(f"an example's digest has not {SHORT} digits")
    return base64.b64encode(b"".join(found)).decode()


def _unpacked(text: str) -> tuple[str, ...]:
    digits = base64.b64decode(text, validate=True).hex()
    return tuple(digits[start : start + SHORT] for start in range(0, len(digits), SHORT))


def _write(place: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(place, rest) :]
