"""From a plan to a model: modules, weights, and the control."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from rankfold.forms.curve import Choice
from rankfold.forms.embedding.fit import low_rank_uses
from rankfold.forms.low_rank.form import LOW_RANK
from rankfold.forms.registry import LayerFactors, form_of
from rankfold.machine import processes
from rankfold.machine.at_once import at_once, is_small, work_on
from rankfold.machine.shared_out import shared_out
from rankfold.model.layer_matrix import MatrixLayer
from rankfold.model.replace import with_replaced
from rankfold.search.allocate import RankPlan
from rankfold.search.round import Round


def build(round_: Round, plan: RankPlan) -> nn.Module:
    """A copy of the model with this plan's layers, the dense ones moved by the step."""
    share_factors(round_, plan)
    modules: dict[str, nn.Module] = {}
    weights: dict[str, Tensor] = {}
    offload = round_.study.offload
    for name, choice in plan.items():
        if choice.rank is not None:
            found = replacements(round_, name, choice)
            modules |= {use: offload.in_files(module) for use, module in found.items()}
        elif round_.step and round_.step.eta and name in round_.study.subject.layers:
            moved = round_.moved(name)
            weights[name] = offload.kept(moved) if offload.weights else moved
    return with_replaced(round_.study.subject.base, modules, weights, share=offload.weights)


def look_at(round_: Round, plan: RankPlan) -> nn.Module:
    """A model that computes what a plan's model does, with one weight a layer.

    For Linear layers it is made without choosing pivots, which takes most of building. In half
    precision it is the plan's model itself: rounding factors is another error than rounding
    their product.
    """
    subject = round_.study.subject
    if any(torch.finfo(matrix.weight.dtype).bits < 32 for matrix in subject.matrices.values()):
        return build(round_, plan)
    # Shown: the halves of block forms take a second a layer of SmolLM2, once for each plan.
    made = plan_weights(round_, plan)
    shown = round_.progress.track(made, "weights of the plan", len(plan))
    return with_weights(round_, subject.base, shown)


def control(round_: Round) -> nn.Module | None:
    """The dense model moved by the same steps, None where no step was taken."""
    subject = round_.study.subject
    dense, step = subject.dense, round_.step
    if step and step.eta:
        layers = {n: cast("MatrixLayer", dense.get_submodule(n)) for n in subject.layers}
        moved = ((name, step.moved(name, layer)) for name, layer in layers.items())
        return with_weights(round_, dense, moved)
    return None if dense is subject.model else dense


def with_weights(
    round_: Round, model: nn.Module, weights: Iterable[tuple[str, Tensor]]
) -> nn.Module:
    """A copy of a model with these weights of layers, for passes alone."""
    keep = round_.study.offload.kept
    kept = {name: keep(weight) for name, weight in weights}
    return with_replaced(model, {}, kept, share=True)


def replacements(round_: Round, name: str, choice: Choice) -> Mapping[str, nn.Module]:
    """The modules that a choice of a rank puts in the place of a layer, or of all uses."""
    subject = round_.study.subject
    if name not in subject.embeddings:
        return {name: layer_module(round_, name, choice)}
    if choice.rank is None:
        raise ValueError(f"the choice leaves {name} dense")
    matrix, storage = subject.embeddings[name], round_.settings.form
    return {**low_rank_uses(matrix, round_.spectra[name], choice.rank, storage)}


def layer_module(round_: Round, name: str, choice: Choice) -> nn.Module:
    """The module that a choice of a rank puts in the layer's place."""
    if choice.rank is None:
        raise ValueError(f"the choice leaves {name} dense")
    return layer_factors(round_, name, choice).module(round_.study.subject.layers[name])


def layer_weight(round_: Round, name: str, choice: Choice) -> Tensor:
    """What a choice makes of a matrix, ``(out, in)``, in its dtype."""
    if choice.rank is None:
        return round_.moved(name)
    subject = round_.study.subject
    if name in subject.embeddings:
        like = subject.embeddings[name].weight
        return round_.spectra[name].truncated(choice.rank).to(like.device, like.dtype)
    return layer_factors(round_, name, choice).dense(subject.layers[name])


def plan_weights(round_: Round, plan: RankPlan) -> Iterator[tuple[str, Tensor]]:
    """What a plan makes of all weights, one after the other."""
    matrices = round_.study.subject.matrices
    share_factors(round_, plan)
    made = at_once(
        plan,
        lambda name: layer_weight(round_, name, plan[name]),
        lambda name: is_small(matrices[name].weight),
    )
    return zip(plan, made, strict=True)


def share_factors(round_: Round, plan: RankPlan) -> None:
    """Let each process of a run find the factors of some of a plan's layers, for all of them.

    Those of plain low rank are its spectrum's, which all have.
    """
    if not processes.several():
        return
    layers, storage = round_.study.subject.layers, round_.settings.form
    missing = [
        name
        for name, choice in plan.items()
        if choice.rank is not None
        and name in layers
        and form_of(choice, storage).form is not LOW_RANK
        and _known(round_, name, choice) is None
    ]
    made = shared_out(
        missing,
        lambda name: layer_factors(round_, name, plan[name]),
        small=lambda name: is_small(layers[name].weight),
        cost=lambda name: work_on(layers[name].weight),
        what="weights of the plan",
        keep=round_.study.offload.kept,
    )
    for name, factors in zip(missing, made, strict=True):
        round_.found[name] = _asked(round_, plan[name]), factors


def _asked(round_: Round, choice: Choice) -> object:
    return round_.settings.form, choice.form, choice.ranks


def _known(round_: Round, name: str, choice: Choice) -> LayerFactors | None:
    asked, factors = round_.found.get(name, (None, None))
    return factors if asked == _asked(round_, choice) else None


def layer_factors(round_: Round, name: str, choice: Choice) -> LayerFactors:
    """The factors of a choice of a rank; the last ones of each layer are kept."""
    known = _known(round_, name, choice)
    if known is None:
        form = form_of(choice, round_.settings.form).form
        offers = round_.offers.get(name, ())
        state = next((offer.state for offer in offers if offer.form is form), None)
        keep = partial(round_.keep, name)
        known = form.factors(round_.problem(name), choice, state, keep)
        round_.found[name] = _asked(round_, choice), known
    return known
