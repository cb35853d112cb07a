"""Where the time of a run goes: ``run stages``, the way that speed is judged.

One process takes the unit: one plain forward and backward pass over the same calibration examples,
the median of three. Another runs ``rankfold.prepare`` and ``lossless`` at one size and at a further
one: what the first has left free would be the second's. Each stage that the product tells its user
of is timed: wall, CPU of user and system, peak memory while it ran. What is in no stage (plans,
building, recognising) is one line of its own. Ratios to the unit hardly depend on the machine.

What each size lost is kept with it, example by example: ``stages`` sets two states of the code side
by side, time and memory, and losses as paired differences.
"""

from __future__ import annotations

import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

import rankfold
from benchmarks.field_models import FIELD_MODELS, TASKS, limits_of
from benchmarks.memory import peak_of_anonymous
from benchmarks.rows import append_row
from benchmarks.speed import sibling
from rankfold.certificate.change import Change, paired_change
from rankfold.data.parts import Data
from rankfold.model.evaluation_mode import evaluation_mode
from rankfold.result import Result
from rankfold.search.study import open_inputs
from rankfold.settings import Settings
from rankfold.tasks.evaluation import Evaluation, on_device

Item = TypeVar("Item")
OUTSIDE = "outside stages"
PASSES = 3  # of the unit, of which the median counts


@dataclass(frozen=True)
class StageRow:
    """One stage of one run.

    Attributes:
        model: Of ``FIELD_MODELS``.
        seed: Draws the examples.
        settings: What differs from the defaults.
        calibration: Number of calibration examples.
        what: ``prepare``, ``lossless`` or ``further size, 0.5``.
        stage: As the product calls it, numbers left out; ``all`` for the whole.
        wall: Seconds.
        user: Seconds of CPU.
        system: Seconds of CPU in the system.
        unit: Seconds of CPU of one forward and backward pass over the calibration examples.
        unit_wall: Seconds of that.
        megabytes: Peak of anonymous resident memory while it ran, in 10^6 bytes.
        threads: Of torch.
        commit: Of the code.
    """

    model: str
    seed: int
    settings: str
    calibration: int
    what: str
    stage: str
    wall: float
    user: float
    system: float
    unit: float
    unit_wall: float
    megabytes: float
    threads: int
    commit: str

    @property
    def key(self) -> tuple[object, ...]:
        return (self.model, self.seed, self.settings, self.calibration, self.what, self.commit)

    @property
    def ratio(self) -> float:
        """CPU time in units."""
        return (self.user + self.system) / self.unit


@dataclass(frozen=True)
class LossRow:
    """What one size of such a run lost on held-out data.

    Attributes:
        model: As of ``StageRow``; likewise seed, settings, calibration, commit.
        seed: As said.
        settings: As said.
        calibration: As said.
        size: Share kept of the factorizable layers that was asked for.
        kept: Share kept of the whole model.
        original: Losses of the original, by example.
        factorized: Likewise of the smaller model.
        terms: By example, how much it counts.
        control: Change of the dense model given the same step, None where there is none.
        commit: As said.
    """

    model: str
    seed: int
    settings: str
    calibration: int
    size: float
    kept: float
    original: list[float]
    factorized: list[float]
    terms: list[float]
    control: float | None
    commit: str

    @property
    def key(self) -> tuple[object, ...]:
        return (*self.what, self.commit)

    @property
    def what(self) -> tuple[object, ...]:
        """What was asked for."""
        return (self.model, self.seed, self.settings, self.calibration, self.size)

    def less(self, other: LossRow | None = None) -> Change:
        """The change of the loss, paired by example, from the original or another smaller model."""
        before = self.original if other is None else other.factorized
        terms = torch.tensor(self.terms, dtype=torch.float64)
        losses = (torch.tensor(each, dtype=torch.float64) for each in (before, self.factorized))
        return paired_change(*(Evaluation(each, terms, None) for each in losses))


@dataclass
class Spent:
    """Time and memory that one stage took.

    Attributes:
        wall: Seconds.
        user: Seconds of CPU.
        system: Likewise, in the system.
        megabytes: Peak.
    """

    wall: float = 0.0
    user: float = 0.0
    system: float = 0.0
    megabytes: float = 0.0


@dataclass
class TimedProgress:
    """Charges time to the innermost stage that runs.

    Attributes:
        peak: Its first element is the most memory since it was looked at (``peak_of_anonymous``).
        spent: By stage.
    """

    peak: list[int]
    spent: dict[str, Spent] = field(default_factory=dict)
    _running: list[str] = field(default_factory=lambda: [OUTSIDE])
    _mark: tuple[float, float, float] = field(default_factory=lambda: _clocks())

    def track(self, items: Iterable[Item], stage: str, total: int) -> Iterator[Item]:
        """Yield ``items``; what is done with them belongs to the stage."""
        self.charge()
        self._running.append(re.sub(r" [0-9][0-9.e+-]*,?(?= |$)", "", stage))
        try:
            yield from items
        finally:
            self.charge()
            self._running.pop()

    def charge(self) -> None:
        """Charge the time since the last call to what runs."""
        now = _clocks()
        spent = self.spent.setdefault(self._running[-1], Spent())
        wall, user, system = (new - old for new, old in zip(now, self._mark, strict=True))
        spent.wall += wall
        spent.user += user
        spent.system += system
        spent.megabytes = max(spent.megabytes, self.peak[0] / 1e6)
        self.peak[0] = 0
        self._mark = now


def _clocks() -> tuple[float, float, float]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), used.ru_utime, used.ru_stime


def measure_stages(
    results: Path,
    name: str,
    seed: int,
    sizes: Sequence[float],
    threads: int,
    calibration: int | None = None,
    **settings: Any,
) -> None:
    """Run the product once, print the table of its stages, and append the rows.

    Args:
        results: The field's rows, beside which these are kept.
        name: Of ``FIELD_MODELS``.
        seed: Draws the examples.
        sizes: The size, and further ones.
        threads: Of torch.
        calibration: Number of calibration examples, in place of the model's own.
        settings: What differs from the defaults.
    """
    build, default = FIELD_MODELS[name]
    count = calibration or default
    model, data = build(seed, count)
    chosen = {"task": TASKS.get(name), "seed": seed, **limits_of(data), **settings}
    unit = _unit_in_a_process(name, seed, count, threads)
    rows: list[StageRow] = []

    def timed(what: str, run: Callable[[], Any]) -> Any:
        shown.charge()
        shown.spent.clear()
        made = run()
        shown.charge()
        for stage, spent in [*shown.spent.items(), ("all", _together(shown.spent.values()))]:
            rows.append(
                StageRow(
                    name, seed, _shown(settings), count, what, stage, spent.wall, spent.user,
                    spent.system, unit.user + unit.system, unit.wall, spent.megabytes, threads,
                    _commit(),
                )
            )  # fmt: skip
        return made

    with peak_of_anonymous() as peak:
        shown = TimedProgress(peak)
        prepared = timed("prepare", lambda: rankfold.prepare(model, data, progress=shown, **chosen))
        for place, size in enumerate(sizes):
            what = f"further size, {size:g}" if place else "lossless"
            found = timed(what, partial(prepared.lossless, size, size_of="factorizable"))
            lost = _losses(name, seed, _shown(settings), count, size, found)
            append_row(sibling(results, "stages_losses"), lost)
    for row in rows:
        append_row(sibling(results, "stages"), row)
    print("\n".join(table(rows)), flush=True)


def _losses(name: str, seed: int, settings: str, count: int, size: float, found: Result) -> LossRow:
    evidence = found.document["evidence"]
    return LossRow(
        name, seed, settings, count, size, found.ratio,
        evidence["original_losses"], evidence["factorized_losses"], evidence["terms"],
        found.report["loss"]["control_change"], _commit(),
    )  # fmt: skip


def side_by_side(rows: Sequence[StageRow], losses: Sequence[LossRow]) -> list[str]:
    """Runs of the same thing by different states of the code, one below the other, as Markdown."""
    lines = [
        "| model, examples, settings, seed | commit | part | CPU, passes | memory, MB |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    whole = sorted((row for row in rows if row.stage == "all"), key=lambda one: one.key[:4])
    lines += [
        f"| {row.model}, {row.calibration}, {row.settings}, {row.seed} | {row.commit} | {row.what} "
        f"| {row.ratio:.2f} | {row.megabytes:.0f} |"
        for row in whole
    ]
    lines += [
        "",
        "| model, examples, settings, seed | size | commit | change | control | less the first |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
    ]
    first: dict[tuple[object, ...], LossRow] = {}
    for loss in sorted(losses, key=lambda one: one.what):
        start = first.setdefault((loss.model, loss.seed, loss.calibration, loss.size), loss)
        control = "" if loss.control is None else f"{loss.control:+.4f}"
        beside = "" if start is loss else _plus_minus(loss.less(start))
        lines.append(
            f"| {loss.model}, {loss.calibration}, {loss.settings}, {loss.seed} | {loss.size:g} | "
            f"{loss.commit} | {_plus_minus(loss.less())} | {control} | {beside} |"
        )
    return lines


def _plus_minus(change: Change) -> str:
    return f"{change.mean:+.4f} ± {change.standard_error:.4f}"


def _unit_in_a_process(name: str, seed: int, count: int, threads: int) -> Spent:
    command = [sys.executable, "-m", "benchmarks.stages", name, str(seed), str(count), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return Spent(*map(float, done.stdout.split()[-3:]))


def unit_of(model: nn.Module, data: Data, settings: Settings) -> Spent:
    """One plain forward and backward pass over the calibration examples, the median of three."""
    inputs = open_inputs(model, data, settings)
    part, found = inputs.parts["calibration"], []
    weights = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    for _ in range(PASSES):
        before = _clocks()
        with evaluation_mode(model, trainable=weights), torch.enable_grad():
            for examples in part.batches(settings.batch_size):
                batch = on_device(part.collate(examples), model)
                result = inputs.task.batch_loss(model, batch)
                loss = (result.losses * result.terms).sum()
                torch.autograd.grad(loss, weights, allow_unused=True)
        wall, user, system = (b - a for a, b in zip(before, _clocks(), strict=True))
        found.append(Spent(wall, user, system))
    return sorted(found, key=lambda one: one.user + one.system)[PASSES // 2]


def table(rows: Sequence[StageRow]) -> list[str]:
    """The stages of one run as Markdown, the longest first, with the whole of each part."""
    if not rows:
        return []
    first = rows[0]
    lines = [
        f"{first.model}, {first.calibration} calibration examples, {first.settings}, "
        f"{first.threads} threads, commit {first.commit}. One forward and backward pass over the "
        f"calibration examples: {first.unit:.1f} s of CPU, {first.unit_wall:.1f} s.",
        "",
        "| part | stage | CPU, passes | share | CPU, s | in the system, s | wall, s | memory, MB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    whole = {row.what: row for row in rows if row.stage == "all"}
    for row in sorted(rows, key=lambda one: ([*whole].index(one.what), -one.ratio)):
        share = row.ratio / whole[row.what].ratio
        lines.append(
            f"| {row.what} | {row.stage} | {row.ratio:.2f} | {share:.0%} | "
            f"{row.user + row.system:.1f} | {row.system:.1f} | {row.wall:.1f} | "
            f"{row.megabytes:.0f} |"
        )
    return lines


def _together(parts: Iterable[Spent]) -> Spent:
    whole = Spent()
    for part in parts:
        whole.wall += part.wall
        whole.user += part.user
        whole.system += part.system
        whole.megabytes = max(whole.megabytes, part.megabytes)
    return whole


def _shown(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(settings.items())) or "defaults"


def _commit() -> str:
    """Of the checkout, with a mark where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    folder = Path(__file__).parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main() -> None:
    """Take the unit in this process, whose memory is as users have it; prints its seconds."""
    name, seed, count, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    model, data = FIELD_MODELS[name][0](int(seed), int(count))
    settings = Settings(task=TASKS.get(name), seed=int(seed), **limits_of(data))
    unit = unit_of(model, data, settings)
    print(unit.wall, unit.user, unit.system)


if __name__ == "__main__":
    main()
