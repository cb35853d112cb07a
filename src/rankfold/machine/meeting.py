"""Where the processes of a run meet: in torch's store, in steps that see who has failed or died."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist

from rankfold.errors import InputError
from rankfold.machine.launched import ALONE

ARRIVAL = 300.0  # seconds to wait for processes that have not begun the run
TRANSFER = timedelta(seconds=50)  # of one exchange, once all processes are there
BEAT = 3.0  # seconds between two signs of life
SILENT = 40.0  # seconds without one after which a process on another machine counts as dead
LONGEST_STEP = 0.05  # seconds between two looks, while a process waits
LOOK_FOR_DEAD = 0.5  # seconds between two looks at whether others live


class Meetings:
    """This process' way to the others.

    Attributes:
        rank: Its number.
        size: How many there are.
        host: The machine that it is on.
        group: For exchanges between CPUs, with a limit of its own.
        ours: Whether torch's default group was made here.
    """

    def __init__(self, store: Any, rank: int, size: int, *, ours: bool) -> None:
        self.rank, self.size, self.ours = rank, size, ours
        self.host = socket.gethostname()
        self._store = store
        self._run, self._number = 0, 0
        self._names: list[tuple[str, int]] = []
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._looked = 0.0
        self._fast: dist.ProcessGroup | None = None
        store.set(f"who/{rank}", json.dumps([self.host, os.getpid()]))
        Thread(target=self._beat, name="rankfold-alive", daemon=True).start()
        keys = [f"who/{number}" for number in range(size)]
        self._wait(keys, ARRIVAL)
        names = [tuple(json.loads(one)) for one in store.multi_get(keys)]
        # Of another container on a machine of the same name nobody's number means anything here.
        self._names = [(host, pid if _lives(pid) else 0) for host, pid in names]
        self.group = _group("gloo")

    def group_of_gpus(self) -> dist.ProcessGroup:
        """For exchanges between GPUs; all processes ask for it at once."""
        self._fast = self._fast or _group("nccl")
        return self._fast

    def begin_run(self) -> None:
        """All begin the next run.

        Raises:
            InputError: One doesn't come, has failed or died.
        """
        self._run, self._number = self._run + 1, 0
        self.meet("the start of a run", ARRIVAL)

    def meet(self, what: str, patience: float | None = None) -> None:
        """Wait for all processes.

        Args:
            what: What this one has come for.
            patience: Seconds to wait for living processes, None for as long as they live.

        Raises:
            InputError: One has failed or died, or has come for something else.
        """
        self._number += 1
        place = f"{self._run}/{self._number}"
        self._store.set(f"{place}/{self.rank}", what)
        keys = [f"{place}/{rank}" for rank in range(self.size)]
        self._wait(keys, patience)
        found = [one.decode() for one in self._store.multi_get(keys)]
        if (other := odd_one(found)) is not None:
            raise InputError(
                f"the processes came to different places: process 0 to {found[0]}, process "
                f"{other} to {found[other]}. Expected the same model, data and options "
                "everywhere, on processors of one kind."
            )

    def _wait(self, keys: Sequence[str], patience: float | None) -> None:
        began = time.monotonic()
        try:
            while not self._store.check(list(keys)):
                waited = time.monotonic() - began
                if (trouble := self.trouble()) is not None:
                    raise InputError(trouble)
                if patience is not None and waited > patience:
                    raise InputError(self._missing(keys, patience))
                time.sleep(min(LONGEST_STEP, max(0.0002, waited / 20)))
        except dist.DistError as error:
            raise InputError(self.broken(error)) from error

    def _missing(self, keys: Sequence[str], patience: float) -> str:
        there = [self._store.check([key]) for key in keys]
        absent = ", ".join(str(rank) for rank, one in enumerate(there) if not one)
        return (
            f"of {self.size} processes some didn't come within {patience:.0f} s: {absent}. "
            "Expected each of them to make the same calls; where this process shall work by "
            f"itself, set the environment variable {ALONE}=1."
        )

    def trouble(self) -> str | None:
        """Why another process is not to come any more, in words; None where all may."""
        try:
            if (told := self._told_by_others()) is not None:
                return told
            dead = self._dead()
        except dist.DistError as error:
            return self.broken(error)
        return None if dead is None else self._died(dead)

    def fail(self, error: BaseException) -> None:
        """Tell the others that this run has failed here."""
        self._tell(f"{self._run}/failed", error)

    def leave(self, error: BaseException) -> None:
        """Tell the others that this process ends by an error."""
        self._tell("left", error)

    def _tell(self, key: str, error: BaseException) -> None:
        text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        if isinstance(error, KeyboardInterrupt):
            text = "interrupted"
        told = {"rank": self.rank, "known": isinstance(error, InputError), "text": text}
        with suppress(dist.DistError):
            self._store.compare_set(key, "", json.dumps(told))

    def _told_by_others(self) -> str | None:
        """What another process has said that it ended by, if one has."""
        for key in (f"{self._run}/failed", "left"):
            if self._store.check([key]):
                told = json.loads(self._store.get(key))
                if told["rank"] != self.rank:
                    return self._in_words(told)
        return None

    def _in_words(self, told: dict[str, Any]) -> str:
        if told["known"]:
            return str(told["text"])
        return f"process {told['rank']} of {self.size} has ended: {told['text']}."

    def broken(self, error: BaseException) -> str:
        """An exchange broke off: what is known of the reason."""
        with suppress(dist.DistError, InputError):
            if (told := self._told_by_others()) is not None:
                return told
        time.sleep(0.2)  # what has died is seen a moment after its connections are
        dead = self._dead(at_once=True)
        if dead is not None:
            return self._died(dead)
        first = (str(error).splitlines() or [""])[0]
        return f"one of {self.size} processes, or their launcher, has gone: {first}"

    def _died(self, rank: int) -> str:
        host = self._names[rank][0]
        return (
            f"process {rank} of {self.size} (on {host}) has died: it was killed, or its memory ran "
            "out, or its machine is gone. Nothing was saved; start all of them again."
        )

    def _dead(self, at_once: bool = False) -> int | None:
        """A process that lives no more, None where all do."""
        now = time.monotonic()
        if now - self._looked < LOOK_FOR_DEAD and not at_once:
            return None
        self._looked = now
        for rank, (host, pid) in enumerate(self._names):
            if rank == self.rank:
                continue
            if host == self.host and pid:
                if not _lives(pid):
                    return rank
            elif self._is_silent(rank, now):
                return rank
        return None

    def _is_silent(self, rank: int, now: float) -> bool:
        if not self._store.check([f"alive/{rank}"]):
            return False
        sign = self._store.get(f"alive/{rank}")
        before, since = self._seen.get(rank, (b"", now))
        if sign != before:
            self._seen[rank] = sign, now
            return False
        return now - since > SILENT

    def _beat(self) -> None:
        """Signs of life, for processes on other machines."""
        store, count = self._store.clone(), 0
        with suppress(dist.DistError, RuntimeError):
            while True:
                store.set(f"alive/{self.rank}", str(count))
                time.sleep(BEAT)
                count += 1


def connected() -> Meetings:
    """The way to the other processes: by torch's default group, which is made where there is none.

    Raises:
        InputError: They can't be reached.
    """
    from torch.distributed import distributed_c10d  # not in each build of torch

    ours = not dist.is_initialized()
    if ours:
        if torch.cuda.is_available():
            local = int(os.environ.get("LOCAL_RANK", "0"))
            torch.cuda.set_device(local % torch.cuda.device_count())
        try:
            dist.init_process_group("gloo", timeout=timedelta(seconds=ARRIVAL))
        except (RuntimeError, ValueError) as error:
            first = (str(error).splitlines() or [""])[0]
            raise InputError(
                "the other processes can't be reached: "
                f"{first}. Expected all of them to be started by torchrun or by what sets RANK, "
                f"WORLD_SIZE, MASTER_ADDR and MASTER_PORT as it does; set {ALONE}=1 where this "
                "process shall work by itself."
            ) from error
    store = distributed_c10d.PrefixStore("rankfold", distributed_c10d._get_default_store())
    return Meetings(store, dist.get_rank(), dist.get_world_size(), ours=ours)


def odd_one(found: Sequence[object]) -> int | None:
    """The first process that has another value than process 0; None where all have the same."""
    return next((rank for rank, one in enumerate(found) if one != found[0]), None)


def _group(backend: str) -> dist.ProcessGroup:
    made: Any = dist.new_group(backend=backend, timeout=TRANSFER)
    return made  # type: ignore[no-any-return]


def _lives(pid: int) -> bool:
    """Whether there is a process of this number that has not ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except (OSError, IndexError):  # no Linux
        return True
    return state not in (b"Z", b"X")  # what has ended waits for its parent to ask
