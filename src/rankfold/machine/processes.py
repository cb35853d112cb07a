"""Several processes that do one run together, by collectives of ``torch.distributed``.

All open the same model and the same data. What takes long is shared out, by whole batches and whole
layers, and what comes of it is exchanged: each process goes on with the same values and ends with
the same model. The first one alone writes and speaks.

Before each exchange the processes meet in torch's store. There they wait in short steps, in which
they see whether another one has failed or died, and compare what each has come for. In one process,
and outside of a run (``joined``), everything here is what one process does.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from rankfold.errors import InputError
from rankfold.machine.launched import launched, works_alone
from rankfold.machine.meeting import Meetings, connected, odd_one
from rankfold.machine.packed import flat_bytes, pack, unpack

Item = TypeVar("Item")
Value = TypeVar("Value")

PIECE = 1 << 24  # numbers of a tensor that are exchanged at once


def rank_and_size() -> tuple[int, int]:
    """This process' number, from 0, and how many there are in all."""
    if dist.is_available() and dist.is_initialized() and not works_alone():
        return dist.get_rank(), dist.get_world_size()
    return launched() if dist.is_available() else (0, 1)


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank_and_size()[0] == 0


class _Run:
    """The processes, while they do a run.

    Args:
        meetings: Where they meet.
        device: Of this process' model.
    """

    def __init__(self, meetings: Meetings, device: torch.device) -> None:
        self.meetings = meetings
        self.rank, self.size = meetings.rank, meetings.size
        self.device = device
        self._fast: dist.ProcessGroup | None = None

    def between_gpus(self) -> None:
        """Exchange what lies on GPUs from GPU to GPU, where each process has one of its own."""
        place = cast("int | None", self.device.index)  # torch's own types know no None
        index: int = torch.cuda.current_device() if place is None else place
        found = self.objects((self.meetings.host, index))
        if len(set(found)) == self.size and dist.is_nccl_available():
            self._fast = self.meetings.group_of_gpus()

    def objects(self, value: Value, keep: Callable[[Tensor], Tensor] | None = None) -> list[Value]:
        """What each process has, by its number; see ``gathered``."""
        packed, own = pack(value)
        all_packed: list[Any] = [None] * self.size
        dist.all_gather_object(all_packed, packed, group=self.meetings.group)
        found: list[Value] = []
        for owner, one in enumerate(all_packed):
            tensors = own if owner == self.rank else [m.empty(self.device) for m in one.layouts]
            for tensor in tensors:
                self._broadcast(tensor, owner)
            if keep is not None and owner != self.rank:
                tensors = [keep(tensor) for tensor in tensors]
            found.append(unpack(one, tensors))
        return found

    def _broadcast(self, tensor: Tensor, owner: int) -> None:
        """Send a tensor without gaps from its owner to all others, in place."""
        if tensor.numel() == 0:
            return
        for piece in flat_bytes(tensor).split(PIECE):
            there, group = self._to_send(piece)
            dist.broadcast(there, group=group, group_src=owner)
            if there is not piece and owner != self.rank:
                piece.copy_(there)

    def add_up(self, tensor: Tensor) -> None:
        """The sum over all processes, in the order of their numbers, in place."""
        flat = tensor.view(-1)
        for piece in flat.split(PIECE):
            there, group = self._to_send(piece)
            parts = [torch.empty_like(there) for _ in range(self.size)]
            dist.all_gather(parts, there, group=group)
            total = parts[0]
            for part in parts[1:]:
                total += part
            piece.copy_(total)

    def _to_send(self, piece: Tensor) -> tuple[Tensor, dist.ProcessGroup]:
        """A tensor where it can be sent from, and by whom."""
        if piece.device.type == "cuda" and self._fast is not None:
            return piece, self._fast
        return piece.cpu(), self.meetings.group


_meetings: Meetings | None = None
_run: _Run | None = None


@contextmanager
def joined(device: torch.device | str = "cpu") -> Iterator[None]:
    """Within, all processes that were started together do one run.

    Args:
        device: Of the model.

    Raises:
        InputError: Another process has failed, has died, or does something else.
    """
    global _run
    if _run is not None or rank_and_size()[1] == 1:
        yield
        return
    meetings = start()
    try:
        meetings.begin_run()
        run = _Run(meetings, torch.device(device))
        with _told(meetings):
            if all(run.objects(run.device.type == "cuda")):
                run.between_gpus()
        _run = run
        yield
    except BaseException as error:
        meetings.fail(error)
        raise
    finally:
        _run = None


def start() -> Meetings:
    """Find the other processes, once: what goes wrong from then on, they are told.

    Raises:
        InputError: They don't come.
    """
    global _meetings
    if _meetings is None:
        _meetings = connected()
        atexit.register(_leave)
    return _meetings


def fail(error: BaseException) -> None:
    """Tell the other processes that this one ends by an error, where they are known."""
    if _meetings is not None:
        _meetings.leave(error)


def why_ended() -> str | None:
    """What another process has ended by, where one has; None otherwise."""
    return None if _meetings is None else _meetings.trouble()


def _leave() -> None:
    """The process ends: torch warns where its group was not given back."""
    if _meetings is not None and _meetings.ours and dist.is_initialized():
        with suppress(Exception):
            dist.destroy_process_group()


@contextmanager
def _told(meetings: Meetings) -> Iterator[None]:
    """What torch raises where an exchange breaks off names the reason."""
    try:
        yield
    except dist.DistBackendError as error:
        raise InputError(meetings.broken(error)) from error
    except RuntimeError as error:
        if "gloo" not in str(error).lower():
            raise
        raise InputError(meetings.broken(error)) from error


def several() -> bool:
    """Whether a run is shared."""
    return _run is not None


def rank() -> int:
    """This process' number in the run, 0 where it works alone."""
    return 0 if _run is None else _run.rank


def size() -> int:
    """How many processes do the run."""
    return 1 if _run is None else _run.size


def meet(what: str) -> None:
    """Wait for all; ``what`` must be the same for each.

    Raises:
        InputError: It is not, or another process has failed or died.
    """
    if _run is not None:
        _run.meetings.meet(what)


def mine(items: Sequence[Item]) -> Sequence[Item]:
    """The items that are this process' own: every so manieth."""
    return items if _run is None else items[_run.rank :: _run.size]


def turns(items: Sequence[Item]) -> Sequence[Item | None]:
    """As ``mine``, with None where others have one more: all processes have as many turns."""
    if _run is None:
        return items
    padded = [*items, *[None] * (-len(items) % _run.size)]
    return padded[_run.rank :: _run.size]


def in_order(shares: Sequence[Sequence[Item]]) -> list[Item]:
    """All items, from what each process had of ``mine``."""
    longest = max(map(len, shares))
    return [share[place] for place in range(longest) for share in shares if place < len(share)]


def gathered(
    value: Value, what: str, keep: Callable[[Tensor], Tensor] | None = None
) -> list[Value]:
    """What each process has, by its number.

    Args:
        value: Of this process. Tensors in it come to lie where a process' model is, or on the CPU.
        what: It is.
        keep: What becomes of tensors that came from others.

    Raises:
        InputError: As of ``meet``.
    """
    if _run is None:
        return [value]
    _run.meetings.meet(what)
    with _told(_run.meetings):
        found = _run.objects(value, keep)
    return found


def from_first(make: Callable[[], Value], what: str) -> Value:
    """What the first process makes, for all; errors as of ``meet``."""
    if _run is None:
        return make()
    made: Any = make() if _run.rank == 0 else None
    found: Value = gathered(made, what)[0]
    return found


def agree(what: str, value: str) -> None:
    """Refuse to go on where the processes have different values.

    Raises:
        InputError: Names what differs.
    """
    found = gathered(value, f"comparison: {what}")
    if (other := odd_one(found)) is not None:
        raise InputError(
            f"{what} differs between the processes: {found[0]} in process 0, {found[other]} in "
            f"process {other}. Expected the same everywhere: start all of them with the same "
            "model, data, options and versions, on processors of one kind."
        )


def add_up(tensors: Sequence[Tensor], what: str) -> None:
    """Sum tensors over all processes, in the order of their numbers, in place.

    Errors as of ``meet``.
    """
    if _run is None:
        return
    _run.meetings.meet(what)
    with _told(_run.meetings):
        for tensor in tensors:
            dense = tensor.contiguous()
            _run.add_up(dense)
            if dense is not tensor:
                tensor.copy_(dense)


def owners(costs: Sequence[float]) -> list[int]:
    """Which process does each item, so that all have nearly as much to do.

    Args:
        costs: Of each item.
    """
    loads, found = [0.0] * size(), [0] * len(costs)
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        found[place] = min(range(len(loads)), key=loads.__getitem__)
        loads[found[place]] += costs[place]
    return found
