"""Several sizes of one model: statistics once, one held-out part, one statement for all verdicts.

All sizes are judged on the same held-out examples. So that the verdicts hold together, each is
given at a higher confidence (Bonferroni): at 1 - (1 - confidence) / sizes. That is fixed before the
held-out part is opened, and each certificate states it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from typing_extensions import Unpack

from rankfold.certificate.asked import DEFAULT_CONFIDENCE, DEFAULT_MARGIN, check_margin
from rankfold.certificate.in_words import sure
from rankfold.compress import Preparation, prepare
from rankfold.errors import InputError, path_of, visible
from rankfold.files.durable import write_whole
from rankfold.files.folder import check_output
from rankfold.files.json_file import read_json
from rankfold.files.listed import MARKS, PAGE_FILE
from rankfold.keywords import Options
from rankfold.report.runs import Row, row_of
from rankfold.report.several import several_page
from rankfold.result import Result, Sweep, check_sizes
from rankfold.settings import SizeOf

SWEEP_FILE = "sweep.json"
MODE = 0o644  # of the files beside the folders


@dataclass(frozen=True)
class SweepStatement:
    """What is claimed of all sizes, fixed before the held-out part is opened.

    Attributes:
        sizes: Largest first.
        size_of: What they are shares of.
        margin: Change of the mean loss up to which a verdict is ``lossless``.
        confidence: That all verdicts hold together.
        each: Confidence of each verdict by itself.
        correction: How ``each`` follows.
    """

    sizes: tuple[float, ...]
    size_of: SizeOf
    margin: float
    confidence: float
    each: float
    correction: str = "Bonferroni"

    def line(self) -> str:
        """The multiplicity, for a person."""
        count = len(self.sizes)
        if count == 1:
            return f"one size, judged with {sure(self.each)} confidence"
        return (
            f"{count} sizes are judged on one held-out part: each with {sure(self.each)} "
            f"confidence, so that all upper bounds hold together with {sure(self.confidence)} "
            f"({self.correction})"
        )


class StatedSweep(Sweep):
    """The results of a sweep, one a size, largest first.

    Attributes:
        statement: What was fixed before the held-out part was opened.
    """

    def __init__(self, statement: SweepStatement, results: Sequence[Result]) -> None:
        """Of ``sweep``."""
        super().__init__(results)
        self.statement = statement

    @property
    def rows(self) -> list[Row]:
        """A row for each size."""
        return [_row(*pair) for pair in zip(self.statement.sizes, self, strict=True)]

    def save(self, folder: str | Path, *, overwrite: bool = False, **options: Any) -> Path:
        """Write a folder for each size, and ``sweep.json`` and ``report.html`` beside them.

        Args:
            folder: New or empty, or an earlier sweep of these sizes with ``overwrite``.
            overwrite: Replace what stands there.
            **options: Of ``Result.save``.

        Raises:
            InputError: The folder can't be written.
        """
        target = SweepFolder(path_of("the folder", folder), self.statement, overwrite)
        target.begin()
        for size, result in zip(self.statement.sizes, self, strict=True):
            result.save(target.of(size), overwrite=overwrite, **options)
            target.add(size, result, page=bool(options.get("page", True)))
        return target.folder


def sweep(
    model: nn.Module,
    data: object,
    *,
    sizes: Sequence[float],
    size_of: SizeOf = "model",
    margin: float = DEFAULT_MARGIN,
    **options: Unpack[Options],
) -> StatedSweep:
    """The best model of each of several sizes, judged together on one held-out part.

    Args:
        model: As of ``lossless``, as are the next and the last three.
        data: Likewise.
        sizes: Shares that are kept, each in (0, 1].
        size_of: What they are shares of.
        margin: Of every verdict.
        **options: ``confidence`` is that of all verdicts together.

    Raises:
        InputError: As of ``lossless``; or a size stands there twice.
    """
    statement = state_sweep(sizes, size_of, margin, options.get("confidence"))
    prepared = prepare_sweep(model, data, statement, options)
    return StatedSweep(statement, tuple(result for _, result in each_size(prepared, statement)))


def state_sweep(
    sizes: Sequence[float], size_of: SizeOf, margin: float, confidence: float | None
) -> SweepStatement:
    """The statement of a sweep.

    Raises:
        InputError: No size, too many, one twice, or one out of its range.
    """
    found = check_sizes(sizes, size_of)
    together = DEFAULT_CONFIDENCE if confidence is None else float(confidence)
    if not 0.5 < together < 1:
        raise InputError(f"the confidence is {together}; expected a number between 0.5 and 1.")
    # Rounded up to four decimals, so that what is stated is what is used.
    each = math.ceil((1 - (1 - together) / len(found)) * 1e4 - 1e-6) / 1e4
    each = max(each, together) if each < 1 else 1 - (1 - together) / len(found)
    ordered = tuple(sorted(found, reverse=True))
    return SweepStatement(ordered, size_of, float(check_margin(margin)), together, each)


def prepare_sweep(
    model: nn.Module, data: object, statement: SweepStatement, options: Options
) -> Preparation:
    """Everything that does not depend on the size; held-out data is not opened."""
    given: Any = {**options, "confidence": statement.each}
    return prepare(model, data, **given)


def each_size(prepared: Preparation, statement: SweepStatement) -> Iterator[tuple[float, Result]]:
    """Each size and its result, largest first, as they are done."""
    for size in statement.sizes:
        yield size, prepared.lossless(size, size_of=statement.size_of, margin=statement.margin)


class SweepFolder:
    """The folder of a sweep: whole after each size."""

    def __init__(self, folder: Path, statement: SweepStatement, overwrite: bool) -> None:
        """Nothing is written yet."""
        self.folder, self.statement, self.overwrite = folder, statement, overwrite
        self._rows: dict[float, Row] = {}

    def of(self, size: float) -> Path:
        """The folder of one size."""
        return self.folder / f"{size:g}"

    def check(self, reads: Sequence[Path] = ()) -> None:
        """Refuse a folder that can't be written, or holds something else, before any work.

        Raises:
            InputError: As said.
        """
        names = [f"{size:g}" for size in self.statement.sizes]
        if len({*names}) < len(names):
            raise InputError("two of the sizes have one name; expected at most 6 digits of each.")
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"{visible(self.folder)} is a file; expected a folder to write to.")
        found = sorted(one.name for one in self.folder.iterdir()) if self.folder.is_dir() else []
        if found and not (self.overwrite and SWEEP_FILE in found) and not self._begun(found):
            raise InputError(
                f"{visible(self.folder)} is not empty; name another folder, or overwrite= an "
                "earlier sweep."
            )
        if more := [visible(name) for name in found if name not in {*names, SWEEP_FILE, PAGE_FILE}]:
            raise InputError(
                f"{visible(self.folder)} holds what this sweep doesn't make: "
                f"{', '.join(more[:5])}. Move it away, or name another folder."
            )
        for size in self.statement.sizes:
            check_output(self.of(size), self.overwrite, MARKS[0], reads=reads)

    def _begun(self, found: Sequence[str]) -> bool:
        """Whether a sweep was interrupted here before its first size was saved."""
        if found != [SWEEP_FILE]:
            return False
        told: Any = read_json(self.folder / SWEEP_FILE)
        return isinstance(told, dict) and "statement" in told and told.get("done") == []

    def begin(self, reads: Sequence[Path] = ()) -> None:
        """Write down the statement, before the held-out part is opened.

        Raises:
            InputError: The folder can't be written.
        """
        self.check(reads)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{visible(self.folder)} can't be made: {error}.") from error
        (self.folder / PAGE_FILE).unlink(missing_ok=True)
        self._write()

    def add(self, size: float, result: Result, *, page: bool) -> None:
        """A size is saved: the list and the page speak of it from now on."""
        self._rows[size] = _row(size, result)
        self._write()
        if page:
            text = several_page(
                [*self._rows.values()],
                title=f"{result.report['certificate']['examples']} held-out examples, "
                f"{len(self._rows)} of {len(self.statement.sizes)} sizes",
                lines=[self.statement.line()],
                links={row.name: f"{row.name}/{PAGE_FILE}" for row in self._rows.values()},
            )
            self._put(PAGE_FILE, text)

    @property
    def done(self) -> list[Row]:
        """Of the sizes that are saved."""
        return [*self._rows.values()]

    def _write(self) -> None:
        told = {
            "format_version": 1,
            "statement": asdict(self.statement),
            "done": [row.as_dict() for row in self._rows.values()],
        }
        self._put(SWEEP_FILE, json.dumps(told, indent=1, allow_nan=False) + "\n")

    def _put(self, name: str, text: str) -> None:
        try:
            write_whole(self.folder / name, [text.encode()], MODE)
        except OSError as error:
            raise InputError(f"{visible(self.folder / name)} can't be written: {error}.") from error


def _row(size: float, result: Result) -> Row:
    return row_of(f"{size:g}", result.report, result.document, result.latency)
