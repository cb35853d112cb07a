"""Examples that are not of the user's kind, and what the certificate says of them.

They are measured beside the verdict, or are part of it where the user states a margin for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor

from rankfold.certificate.certify import Certificate, certify
from rankfold.certificate.change import paired_change
from rankfold.certificate.statement import Statement
from rankfold.errors import InputError
from rankfold.files.json_file import finite
from rankfold.tasks.evaluation import Evaluation

Kind: TypeAlias = Literal["own text", "given"]
KINDS: tuple[Kind, ...] = get_args(Kind)
OTHER_TEXT, OTHER_DATA = NAMES = ("text of other kinds", "data of other kinds")


@dataclass(frozen=True)
class Origin:
    """Where the examples come from.

    Attributes:
        kind: ``own text``, which the original has written, or ``given`` by the user.
        seed: Of the own text, or of the choice among those given.
        usage: As of ``Part.usage``.
        digests: Short ones of the examples, to find them again.
        told: What became of the source that they were read from, a line each.
        texts: The own text as token ids, from which anyone can compute its losses again.
    """

    kind: Kind
    seed: int
    usage: Mapping[str, Any]
    digests: Sequence[str]
    told: Sequence[str] = ()
    texts: Sequence[Sequence[int]] | None = None


@dataclass(frozen=True)
class OtherKinds:
    """Losses of both models on examples that are not of the user's kind; None where private.

    Attributes:
        origin: Where they come from; None where there are none.
        missing: Why there are none.
        name: One of ``NAMES``.
        unit: Of the losses.
        original: Of the original model.
        factorized: Of the factorized model, on the same examples.
        statement: What is claimed of them, fixed before; None where they are only measured.
    """

    origin: Origin | None
    missing: str | None
    name: str
    unit: str
    original: Evaluation | None = None
    factorized: Evaluation | None = None
    statement: Statement | None = None

    def certificate(self) -> Certificate | None:
        """What is shown of their loss, where something was stated."""
        if self.statement is None or self.original is None or self.factorized is None:
            return None
        digest = "" if self.origin is None else self.origin.usage["digest"]
        before, after = (replace(one, correct=None) for one in (self.original, self.factorized))
        return certify(before, after, self.statement, unit=self.unit, data_digest=digest)

    def row(self) -> dict[str, Any]:
        """What the report says of them, plain values; numbers that are not finite are None."""
        found: dict[str, Any] = {
            "kind": None, "name": self.name, "missing": self.missing, "unit": self.unit,
        }  # fmt: skip
        if self.origin is None or self.original is None or self.factorized is None:
            return found
        change = paired_change(self.original, self.factorized)
        found |= {
            "kind": self.origin.kind,
            "seed": self.origin.seed,
            **self.origin.usage,
            "told": list(self.origin.told),
            "terms": int(self.original.terms.sum()),
            "original": finite(self.original.mean),
            "factorized": finite(self.factorized.mean),
            "change": finite(change.mean),
            "standard_error": finite(change.standard_error),
            "margin": None,
        }
        certificate = self.certificate()
        if certificate is not None:
            names = ("margin", "confidence", "upper_bound", "lower_bound", "verdict", "needed")
            found |= {name: getattr(certificate, name) for name in names}
        return found

    def as_dict(self, private: bool) -> dict[str, Any]:
        """The row, and what it was computed from, for JSON.

        Args:
            private: Leave out the numbers of single examples of the user's.
        """
        own = self.origin is not None and self.origin.kind == "own text"
        kept = self.original is not None and self.factorized is not None and (own or not private)
        stated = self.statement
        return {
            **self.row(),
            "digests": None if self.origin is None else list(self.origin.digests),
            "texts": None if self.origin is None else self.origin.texts,
            "statement": None if stated is None else asdict(stated),
            "evidence": {
                "terms": _listed(self.original, "terms"),
                "original_losses": _listed(self.original, "losses"),
                "factorized_losses": _listed(self.factorized, "losses"),
            }
            if kept
            else None,
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> OtherKinds:
        """Back from JSON.

        Raises:
            InputError: The kind is none.
        """
        if plain["kind"] is None:
            return cls(None, plain["missing"], plain["name"], plain["unit"])
        if plain["kind"] not in KINDS:
            raise InputError(f"the guard's kind is {plain['kind']!r}; expected {', '.join(KINDS)}.")
        usage = {name: plain[name] for name in USAGE if name in plain}
        more = (plain["digests"], plain["told"], plain["texts"])
        origin = Origin(cast("Kind", plain["kind"]), plain["seed"], usage, *more)
        before = after = None
        if (evidence := plain["evidence"]) is not None:
            terms = _tensor(evidence["terms"])
            before, after = (
                Evaluation(_tensor(evidence[f"{whose}_losses"]), terms, None)
                for whose in ("original", "factorized")
            )
        stated = None if plain["statement"] is None else Statement(**plain["statement"])
        return cls(origin, None, plain["name"], plain["unit"], before, after, stated)


USAGE = (
    "examples", "digest", "given", "left_out", "columns_left_out", "drawn_anew", "source",
)  # fmt: skip


def _listed(found: Evaluation | None, name: str) -> list[float | None]:
    values: Tensor = getattr(found, name)
    return [finite(value) for value in values.tolist()]


def _tensor(values: Sequence[float | None]) -> Tensor:
    return torch.tensor([float("nan") if v is None else v for v in values], dtype=torch.float64)
