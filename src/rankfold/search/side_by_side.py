"""Two models run over the same batches in step: none goes past a layer before all have come to it.

What a layer should do to inputs that earlier layers have changed can be found from all batches at
once, in one forward pass of either model, and of each batch no more is held than what its pass
holds at that layer. Each pass is a greenlet: it has a stack of its own, in the same thread, and
stops in a hook.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, reduce
from typing import TypeAlias

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rankfold.data.parts import Batch
from rankfold.machine import processes
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
    passes = _Passes(names, streams, len(batches))
    with ExitStack() as stack:
        for model in (first, second):
            stack.enter_context(evaluation_mode(model))
            stack.enter_context(passes.attached(model))
        stack.callback(passes.end)
        passes.begin([partial(run, m, batch) for m in (first, second) for batch in batches])
        for name in progress.track(names, stage, len(names)):
            here, replies = passes.stop(name, visit)
            if not passes.to_come:
                return
            for one, reply in zip(here, replies, strict=True):
                one.switch(reply)


class _Passes:
    """The passes of both models over all batches, and what they have where they wait.

    Args:
        names: Layers that they stop at, in order.
        streams: By layer, where the tensors that its outputs will be added to are seen before.
        batches: Their number; the first model's passes come first.

    Attributes:
        to_come: Layers that no pass has gone past.
    """

    def __init__(
        self, names: Sequence[str], streams: Mapping[str, Collection[Place]], batches: int
    ):
        self.to_come = list(names)
        self._streams = streams
        self._batches = batches
        self._runner = getcurrent()
        self._passes: list[greenlet] = []
        self._waiting: dict[greenlet, tuple[str, Tensor]] = {}
        self._seen: dict[greenlet, dict[Place, Tensor]] = defaultdict(dict)
        self._hooks: dict[str, list[RemovableHandle]] = defaultdict(list)

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Hooks on a model, and off again whatever happens."""
        with ExitStack() as stack:
            for name in self.to_come:
                hook = partial(self._wait, name)
                # Before hooks of the user's: it is the layer's own output that is exchanged.
                handle = model.get_submodule(name).register_forward_hook(hook, prepend=True)
                self._hooks[name].append(handle)
                stack.callback(handle.remove)
            stack.enter_context(watch(model, set().union(*self._streams.values()), self._see))
            yield

    def begin(self, runs: Sequence[Callable[[], object]]) -> None:
        """Let all passes go to the first layer that they call."""
        self._passes = [greenlet(run) for run in runs]
        for one in self._passes:
            one.switch()

    def end(self) -> None:
        """Unwind the passes that wait, whether all is done or an error came."""
        for one in self._passes:
            if one:
                one.throw()

    def stop(self, name: str, visit: Visit) -> tuple[Sequence[greenlet], Sequence[Tensor | None]]:
        """The passes that wait at the next layer, and what each goes on with.

        What is held of the layer ends with this call, before any pass goes on.
        """
        here = [one for one in self._passes if one in self._waiting and self._at(one) == name]
        outputs = [self._waiting.pop(one)[1] for one in here]
        self.to_come.remove(name)
        for handle in self._hooks.pop(name):  # so that a copy of the layer has none
            handle.remove()
        added = [_sum_at(self._streams.get(name, ()), self._seen[one]) for one in here]
        self._forget()
        complete = len(here) == len(self._passes)
        pairs = _in_pairs(outputs, self._batches) if complete else []
        fits = complete and all(a.shape == b.shape for a, b in pairs)
        if all(processes.gathered(fits, f"passes at {name}")):
            made = visit(name, pairs, _in_pairs(added, self._batches))
            if made is not None:
                return here, [*[None] * self._batches, *made]
        return here, [None] * len(here)

    def _at(self, one: greenlet) -> str:
        return self._waiting[one][0]

    def _wait(self, name: str, module: nn.Module, args: object, output: Tensor) -> Tensor | None:
        """Stop the pass here, and go on with what comes back."""
        one = getcurrent()
        # Called in another order, or by another.
        if name not in self.to_come or one not in self._passes:
            return None
        self._waiting[one] = name, output
        del output  # not held while others run
        reply: Tensor | None = self._runner.switch()
        return reply

    def _see(self, place: Place, tensor: Tensor) -> None:
        self._seen[getcurrent()][place] = tensor

    def _forget(self) -> None:
        """Let go of what no layer that is still to come is added to."""
        needed = {place for later in self.to_come for place in self._streams.get(later, ())}
        for tensors in self._seen.values():
            for place in tensors.keys() - needed:
                del tensors[place]


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
