"""What opening the held-out part gave: the models that were tested, and what is known of before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from rankfold.certificate.certify import Certificate
from rankfold.certificate.document import Evidence
from rankfold.certificate.earlier_uses import History
from rankfold.certificate.statement import Statement
from rankfold.data.copies import NearPair
from rankfold.tasks.evaluation import Evaluation


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
    """

    tested: Sequence[Tested | None]
    place: int
    usage: Mapping[str, Any]
    original: str
    control: Evaluation | None
    look_alikes: Sequence[NearPair]
    history: History

    @property
    def standing(self) -> Tested:
        """The model that stands."""
        tested = self.tested[self.place]
        if tested is None:
            raise ValueError("the model that stands was not tested")
        return tested
