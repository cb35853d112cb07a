"""rankfold itself, through its own stages: every objective in both forms.

As ``Preparation.lossless`` does it in one round: the plan is made, made again with measured
interactions (``search.plans.of_size``), and the best on selection data is the result. Held-out
data is left to the common evaluation. ``first-order`` in pairs is the publication that the project
implements (arXiv 2412.06867 as summarised; docs/theory.md, 6). Without conv forms a conv is one
matrix, as in the peers: what is left of the difference is not theirs. ``control`` is the dense
model moved by the step of ``joint``.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from benchmarks.methods.int8 import rounded
from benchmarks.methods.method import AtSize, Compressed, Kind, Method, Study
from rankfold.forms.storage import STORAGES, Storage
from rankfold.objective import OBJECTIVES, ObjectiveName
from rankfold.search.build import control as moved_by_step
from rankfold.search.plans import of_size
from rankfold.search.round import Round, start_round
from rankfold.search.trial import lowest
from rankfold.settings import Settings


def _prepared(
    study: Study, objective: ObjectiveName, form: Storage, conv_forms: bool = True
) -> Round:
    settings = Settings(objective=objective, form=form, seed=study.seed, conv_forms=conv_forms)
    collected = study.without_step if objective == "kronecker" else study.collected
    original = collected.original_losses("selection", settings.batch_size, study.progress)
    return start_round(collected.study, settings, progress=study.progress, original=original)


def compressed(
    study: Study, objective: ObjectiveName, form: Storage, conv_forms: bool = True
) -> AtSize:
    prepared = _prepared(study, objective, form, conv_forms)
    return lambda size: Compressed.of(best_on_selection(prepared, size))


def best_on_selection(prepared: Round, size: float) -> nn.Module:
    return lowest(of_size(prepared, size * prepared.factorizable)).build()


def control(study: Study) -> AtSize:
    moved = moved_by_step(_prepared(study, "joint", "pivoted")) or study.collected.model
    return lambda size: Compressed.of(moved)


def joint_int8(study: Study, form: Storage = "pivoted") -> AtSize:
    prepared = _prepared(study, "joint", form)
    names = list(study.layers)
    return lambda size: rounded(best_on_selection(prepared, size), names)


def _source(objective: ObjectiveName) -> str:
    return f"rankfold; {OBJECTIVES[objective].source}"


METHODS = {
    f"{objective}-{form}": Method(
        f"rankfold {objective}, {form}",
        _source(objective),
        partial(compressed, objective=objective, form=form),
        "ours",
        needs_labels=objective == "first-order",
    )
    for objective in OBJECTIVES
    for form in STORAGES
    if (objective, form) not in (("svd", "pair"), ("first-order", "pair"))
}
METHODS |= {
    f"kronecker-{form}-matrices": Method(
        f"rankfold kronecker, {form}, no conv forms",
        _source("kronecker"),
        partial(compressed, objective="kronecker", form=form, conv_forms=False),
        "ours",
        models="vision",
    )
    for form in STORAGES
}
_PEER: Kind = "peer"
METHODS |= {
    "first-order": Method(
        "first-order (published)",
        "Zhang et al. 2024, arXiv 2412.06867, as summarised",
        partial(compressed, objective="first-order", form="pair"),
        _PEER,
        needs_labels=True,
    ),
    "control": Method(
        "dense, moved by joint's step", "rankfold", control, "ours", sized=False, needs_labels=True
    ),
    "joint-int8": Method("rankfold joint, then int8", "rankfold", joint_int8, "ours"),
    "joint-pair-int8": Method(
        "rankfold joint, pair, then int8", "rankfold", partial(joint_int8, form="pair"), "ours"
    ),
}
