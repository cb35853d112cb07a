"""Two models run over the same batches in step: none goes past a layer before all have come to it.

What a layer should do to inputs that earlier layers have changed can be found from all batches at
once, in one forward pass of either model, and of each batch no more is held than what its pass
holds at that layer. Each pass is a greenlet: it has a stack of its own, in the same thread, and
stops in a hook.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial, reduce
from typing import TypeAlias

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from rankfold.data.parts import Batch
from rankfold.machine.progress import Progress
from rankfold.model.evaluation_mode import evaluation_mode
from rankfold.model.residual_connections import Place, watch

# What both models have at a layer, for each batch: in the first model and in the second.
Pairs: TypeAlias = Sequence[tuple[Tensor, Tensor]]
# A layer's name, its outputs, and what they will be added to (empty where that isn't known): what
# the second model goes on with in place of its outputs, or None to leave them.
Visit: TypeAlias = Callable[[str, Pairs, Pairs], Sequence[Tensor] | None]


def run_in_step(
    first: nn.Module,
    second: nn.Module,
    batches: Sequence[Batch],
    run: Callable[[nn.Module, Batch], object],
    names: Sequence[str],
    streams: Mapping[str, Collection[Place]],
    visit: Visit,
    progress: Progress,
    stage: str,
) -> None:
    """Run both models over all batches, stopping at each layer in the order of ``names``.

    The passes end at the last of these layers: nothing of what comes after it is computed.

    Args:
        first: The model that is followed.
        second: The model whose outputs may be exchanged on the way.
        batches: On the models' device.
        run: A forward pass.
        names: Layers of both models in the order of their calls, each called once in a pass.
        streams: By layer, where the tensors that its outputs will be added to are seen before.
        visit: Is called for each layer that all batches reach in both models, with outputs of the
            same shape; other layers are passed by.
        progress: Shows the layers.
        stage: What it calls them.
    """
    runner = getcurrent()
    waiting: dict[greenlet, tuple[str, Tensor]] = {}
    seen: dict[greenlet, dict[Place, Tensor]] = defaultdict(dict)
    to_come = list(names)

    def wait(name: str, module: nn.Module, args: object, output: Tensor) -> Tensor | None:
        """Stop the pass here, and go on with what comes back."""
        one = getcurrent()
        if name not in to_come or one not in passes:  # called in another order, or by another
            return None
        waiting[one] = name, output
        del output  # not held while others run
        reply: Tensor | None = runner.switch()
        return reply

    def see(place: Place, tensor: Tensor) -> None:
        seen[getcurrent()][place] = tensor

    passes = [
        greenlet(partial(run, model, batch)) for model in (first, second) for batch in batches
    ]
    with ExitStack() as stack:
        for model in (first, second):
            stack.enter_context(evaluation_mode(model))
            for name in names:
                handle = model.get_submodule(name).register_forward_hook(partial(wait, name))
                stack.callback(handle.remove)
            stack.enter_context(watch(model, set().union(*streams.values()), see))
        stack.callback(_end, passes)
        for one in passes:
            one.switch()
        for name in progress.track(names, stage, len(names)):
            here = [one for one in passes if one in waiting and waiting[one][0] == name]
            outputs = [waiting.pop(one)[1] for one in here]
            replies: Sequence[Tensor | None] = [None] * len(here)
            to_come.remove(name)
            added = [_sum_at(streams.get(name, ()), seen[one]) for one in here]
            needed = {place for later in to_come for place in streams.get(later, ())}
            for tensors in seen.values():
                for place in tensors.keys() - needed:
                    del tensors[place]
            if len(here) == len(passes):
                half = len(batches)
                pairs = _in_pairs(outputs, half)
                if all(a.shape == b.shape for a, b in pairs):
                    made = visit(name, pairs, _in_pairs(added, half))
                    replies = replies if made is None else [*replies[:half], *made]
                del pairs
            del outputs, added
            if not to_come:
                return
            for one, reply in zip(here, replies, strict=True):
                one.switch(reply)


def _sum_at(places: Collection[Place], tensors: Mapping[Place, Tensor]) -> Tensor | None:
    """The sum of what a pass has at these places, None where there are none or one is missing."""
    known = [tensors[place] for place in places if place in tensors]
    return reduce(torch.add, known) if known and len(known) == len(places) else None


def _in_pairs(tensors: Sequence[Tensor | None], half: int) -> Pairs:
    """The first model's with the second one's; empty where one is missing."""
    known = [tensor for tensor in tensors if tensor is not None]
    if len(known) < 2 * half:
        return []
    return list(zip(known[:half], known[half:], strict=True))


def _end(passes: Sequence[greenlet]) -> None:
    """Unwind the passes that wait, whether all is done or an error came."""
    for one in passes:
        if one:
            one.throw()
