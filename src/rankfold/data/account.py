"""What became of a source: how many examples it gave, how long, of which classes, and what not.

An account ends with the examples that were read. Which of them a run uses, and why not the others,
is counted from there on by ``GivenExamples.left_out`` and ``Part.usage``: nothing is in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median_low
from typing import Any

from rankfold.data.input_settings import InputSettings
from rankfold.errors import InputError, visible

NAMED = 5  # places that a line names
KEPT = 100  # places that the report keeps
SHOWN_CLASSES = 12
WRITTEN = "text that the model writes"  # the source of what no file holds


@dataclass(frozen=True)
class ClassCount:
    """Which class a value of the source became.

    Attributes:
        value: As the source writes it.
        number: Of the class.
        name: The model's name of the class, or None where it has none.
        count: How often the value stands there.
    """

    value: str
    number: int
    name: str | None
    count: int

    def __str__(self) -> str:
        """For one line of many."""
        name = "" if self.name is None else f" {self.name!r}"
        return f"{self.value!r} is class {self.number}{name} ({self.count})"


@dataclass(frozen=True)
class Account:
    """What became of a source: each of its units is an example, or left out for a reason.

    Attributes:
        source: The file or folder.
        unit: What one example is made of: ``record``, ``line``, ``image``.
        given: Units in the source.
        used: Examples.
        left_out: For each reason which units, by number from 0 or by name.
        lengths: Fewest, median and most tokens of an example; None where it isn't made of tokens.
        most: Tokens that an example may have at most; None where it isn't made of tokens.
        cut: Examples that were longer: what is behind isn't used.
        classes: Which value became which class.
        notes: Whatever else was decided, a sentence each.
        inputs: What of it changes the model's inputs.
    """

    source: str
    unit: str
    given: int
    used: int
    left_out: Mapping[str, Sequence[int | str]] = field(default_factory=dict)
    lengths: tuple[int, int, int] | None = None
    most: int | None = None
    cut: int = 0
    classes: Sequence[ClassCount] = ()
    notes: Sequence[str] = ()
    inputs: InputSettings = field(default_factory=InputSettings)

    def lines(self) -> list[str]:
        """The same for a person."""
        found = [self._first_line()]
        for reason, places in self.left_out.items():
            listed = ", ".join(visible(place) for place in places[:NAMED])
            listed += ", ..." * (len(places) > NAMED)
            listed = f"numbers from 0: {listed}" if isinstance(places[0], int) else listed
            found.append(f"left out, {reason}: {_counted(len(places), self.unit)} ({listed})")
        if self.cut:
            found.append(
                f"cut at {self.most} tokens: {_counted(self.cut, 'example')}; what is behind isn't "
                "used; ask for a length up to what the model takes"
            )
        if self.classes:
            shown = "; ".join(map(str, self.classes[:SHOWN_CLASSES]))
            more = len(self.classes) - SHOWN_CLASSES
            found.append(f"labels: {shown}" + (f"; and {more} more" if more > 0 else ""))
        return [*found, *self.notes]

    def _first_line(self) -> str:
        used = "" if self.used == self.given else f", {self.used:,} of them used"
        given = f"{visible(self.source)}: {_counted(self.given, self.unit)}"
        line = f"{given}{used}; each is one example"
        if self.lengths is None:
            return line
        fewest, middle, most = self.lengths
        if fewest == most:
            return f"{line} of {most} tokens"
        return f"{line} of {fewest} to {most} tokens (median {middle})"

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON, with the name of the source and not where it lies, and the lines."""
        named = replace(self, source=Path(self.source).name)
        found = asdict(named) | {"told": named.lines()}
        found["left_out"] = {
            reason: {"count": len(places), "first": list(places[:KEPT])}
            for reason, places in self.left_out.items()
        }
        found["input_settings"] = self.inputs.as_dict()
        return found | {name: list(found[name]) for name in ("classes", "notes")}


class ReadExamples(list[Any]):
    """Examples that were read from a source.

    Attributes:
        account: What became of the source.
        collate: Makes batches of them; None where they can be stacked.
    """

    def __init__(self, examples: Sequence[Any], account: Account, collate: Any = None) -> None:
        super().__init__(examples)
        self.account, self.collate = account, collate


def refuse_two_meanings(accounts: Sequence[Account]) -> None:
    """Refuse sources in which one label is two classes, as in folders that lack some of them.

    Raises:
        InputError: Names the label and both sources.
    """
    meant: dict[str, tuple[int, str]] = {}
    for account in accounts:
        for found in account.classes:
            number, source = meant.setdefault(found.value, (found.number, account.source))
            if number != found.number:
                raise InputError(
                    f"the label {found.value!r} is class {number} in {source}, and class "
                    f"{found.number} in {account.source}. Give both the same labels, or the model "
                    "names of its classes."
                )


def recorded(report: Mapping[str, Any]) -> list[Account]:
    """The sources of a report, as far as their classes go; what is no such entry is left out."""
    entries = report.get("sources")
    found: list[Account] = []
    for entry in entries if isinstance(entries, list) else []:
        listed = entry.get("classes") if isinstance(entry, dict) else None
        classes = [
            ClassCount(c["value"], c["number"], None, 0)
            for c in (listed if isinstance(listed, list) else [])
            if isinstance(c, dict)
            and isinstance(c.get("value"), str)
            and isinstance(c.get("number"), int)
        ]
        if classes:
            source = f"{entry.get('source')}, of which the model was made"
            found.append(Account(source, "example", 0, 0, classes=classes))
    return found


def spread_of(lengths: Sequence[int]) -> tuple[int, int, int] | None:
    """Fewest, median and most, None of nothing."""
    return (min(lengths), median_low(lengths), max(lengths)) if lengths else None


def _counted(count: int, unit: str) -> str:
    return f"{count:,} {unit}" + ("" if count == 1 else "s")
