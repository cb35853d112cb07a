"""What opening the held-out part gave: the models that were tested, and what is known of before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from rankfold.certificate.certify import Certificate
from rankfold.certificate.document import Evidence
from rankfold.certificate.earlier_uses import History
from rankfold.certificate.statement import Statement
from rankfold.data.copies import NearPair
from rankfold.data.parts import Part
from rankfold.tasks.evaluation import Evaluation

SHOWN = 6  # examples that got worst


@dataclass(frozen=True)
class Tested:
    """A model that the held-out part was opened for.

    Attributes:
        model: The model.
        statement: What was stated before.
        evidence: Losses of every example.
        certificate: What follows.
        digest: Of the model's weights.
    """

    model: nn.Module
    statement: Statement
    evidence: Evidence
    certificate: Certificate
    digest: str


class Changed(NamedTuple):
    """A held-out example whose loss became larger.

    Attributes:
        place: Its number in what the user gave.
        change: Of its loss.
        example: The example.
    """

    place: Any
    change: float
    example: Any


def most_changed(part: Part, evidence: Evidence) -> list[Changed]:
    """The examples of a part that got worst, the worst first."""
    changes = evidence.factorized.losses - evidence.original.losses
    worst = torch.argsort(changes, descending=True, stable=True)[:SHOWN].tolist()
    found = [Changed(part.number(n), float(changes[n]), part.examples[n]) for n in worst]
    return [one for one in found if one.change > 0]


@dataclass(frozen=True)
class Opened:
    """One opening of the held-out part.

    Attributes:
        tested: In the order that was fixed before; those after the first that fails are None.
        place: Of the one that stands: the last that holds, or the first.
        usage: Of the held-out part: its examples, their digest, and what is left out.
        original: Digest of the user's model.
        control: Losses of the dense model moved by the same steps, None where none was taken.
        look_alikes: Held-out images that look like one of another part.
        history: Earlier openings of these examples.
        changed: The examples that got worst, to be shown; none of private data.
    """

    tested: Sequence[Tested | None]
    place: int
    usage: Mapping[str, Any]
    original: str
    control: Evaluation | None
    look_alikes: Sequence[NearPair]
    history: History
    changed: Sequence[Changed] = ()

    @property
    def standing(self) -> Tested:
        """The model that stands."""
        tested = self.tested[self.place]
        if tested is None:
            raise ValueError("the model that stands was not tested")
        return tested
