"""What a certificate says of examples of other kinds, computed again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from rankfold.certificate.openings_file import SHORT
from rankfold.certificate.other_kinds import OtherKinds
from rankfold.data.given import up_to
from rankfold.data.parts import Collate, Part, as_part
from rankfold.tasks.evaluation import Evaluation

NAMED = 5  # examples that a message names


@dataclass(frozen=True)
class Afresh:
    """What came of it.

    Attributes:
        outcome: ``agrees``, ``differs`` or ``not checked``.
        detail: What differs, or what to give.
        found: With fresh losses where there are some, else as the certificate has it.
    """

    outcome: Literal["agrees", "differs", "not checked"]
    detail: str
    found: OtherKinds


def guard_afresh(
    plain: Mapping[str, Any],
    stated: OtherKinds,
    given: object,
    collate: Collate | None,
    losses: Callable[[nn.Module, Part], Evaluation],
    models: tuple[nn.Module | None, nn.Module],
    tolerance: float,
) -> Afresh:
    """Evaluate both models on the examples of other kinds, and compare.

    Args:
        plain: What the certificate says of them.
        stated: The same, read.
        given: Data among which the user's examples are, or None; the own text is kept.
        collate: As it was given for the certificate.
        losses: Of a model on examples.
        models: The original, or None, and the factorized one.
        tolerance: Of a loss, relative to 1 + it.
    """
    if plain["kind"] is None:
        return Afresh("not checked", str(plain["missing"]), stated)
    if plain["texts"] is not None:
        part = as_part("guard", [torch.tensor(ids) for ids in plain["texts"]])
    elif given is None:
        return Afresh("not checked", "give the data that it was measured on: guard=", stated)
    else:
        offered = as_part("guard", up_to(given, None), collate)
        places = {digest[:SHORT]: place for place, digest in enumerate(offered.digests)}
        absent = [n for n, digest in enumerate(plain["digests"]) if digest not in places]
        if absent:
            listed = ", ".join(map(str, absent[:NAMED])) + ", ..." * (len(absent) > NAMED)
            detail = f"{len(absent)} of {len(plain['digests'])} examples are not in the data given"
            return Afresh("differs", f"{detail} (numbers, from 0: {listed})", stated)
        part = offered.take([places[digest] for digest in plain["digests"]])
    if part.digest != plain["digest"]:
        return Afresh("differs", "it is of other examples than their digest", stated)
    original, model = models
    before = stated.original if original is None else losses(original, part)
    if before is None:
        return Afresh(
            "not checked", "single losses are private: give the original: original=", stated
        )
    found = replace(stated, original=before, factorized=losses(model, part))
    problems = [
        f"{name}: {plain[name]} stated, {value} found"
        for name, value in found.row().items()
        if name in ("original", "factorized", "change") and not _near(plain[name], value, tolerance)
    ]
    return Afresh("differs" if problems else "agrees", "; ".join(problems), found)


def _near(stated: Any, found: Any, tolerance: float) -> bool:
    if stated is None or found is None:
        return stated is found
    return math.isclose(stated, found, rel_tol=0, abs_tol=tolerance * (1 + abs(found)))
