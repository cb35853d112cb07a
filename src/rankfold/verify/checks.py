"""What a verification is made of: checks, each with its outcome, and lines for a person."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from rankfold.certificate.certify import Certificate
from rankfold.certificate.in_words import sure
from rankfold.certificate.shown import listed_html
from rankfold.errors import visible

Outcome: TypeAlias = Literal["agrees", "differs", "not checked"]

NAMED = 5  # examples or fields that a message names


@dataclass(frozen=True)
class Check:
    """One thing that was compared.

    Attributes:
        what: What it is.
        outcome: ``agrees``, ``differs`` or ``not checked``.
        detail: What differs, or what to give for the check.
    """

    what: str
    outcome: Outcome
    detail: str = ""


@dataclass(frozen=True)
class Verification:
    """All checks of one artifact.

    Attributes:
        checks: In the order in which they were made.
        certificate: Recomputed from fresh losses, or None where that could not be done.
    """

    checks: tuple[Check, ...]
    certificate: Certificate | None

    @property
    def holds(self) -> bool:
        """Whether nothing differs."""
        return all(check.outcome != "differs" for check in self.checks)

    def __repr__(self) -> str:
        differ = [check.what for check in self.checks if check.outcome == "differs"]
        said = f"differs: {', '.join(differ[:NAMED])}" if differ else "agrees"
        return f"<Verification of {len(self.checks)} checks: {visible(said)}>"

    def _repr_html_(self) -> str:
        told = [": ".join(filter(None, (one.outcome, one.detail))) for one in self.checks]
        rows = {check.what: words for check, words in zip(self.checks, told, strict=True)}
        return listed_html("Verification", rows)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "agrees": self.holds,
            "checks": [asdict(check) for check in self.checks],
            "certificate": None if self.certificate is None else self.certificate.as_dict(),
        }


def outcome(same: bool) -> Outcome:
    """Of a comparison."""
    return "agrees" if same else "differs"


def found_in(what: str, problems: list[str]) -> Check:
    """A check that differs where there are problems; the first ones are named."""
    return Check(what, outcome(not problems), "; ".join(problems[:NAMED]))


def verification_lines(found: Verification, print_line: Callable[[str], None]) -> None:
    """One line a check, and what follows."""
    for check in found.checks:
        print_line(
            f"{check.outcome:<12} {check.what}" + (f": {check.detail}" if check.detail else "")
        )
    if found.certificate is not None:
        c = found.certificate
        print_line(
            f"recomputed: {c.verdict}; change {c.change:+.6f}, at most {c.upper_bound:+.6f} with "
            f"{sure(c.confidence)} confidence (margin {c.margin:g} {c.unit}, {c.examples} examples)"
        )
    print_line(
        "the certificate agrees with all that was checked"
        if found.holds
        else "the certificate does NOT agree"
    )
