"""How often is a certificate wrong? Simulated worlds whose truth is known, and one real one.

    python -m benchmarks.coverage run            # simulated worlds, about 10 minutes on one core
    python -m benchmarks.coverage real           # ResNet-20 on the CIFAR-10 test images at hand
    python -m benchmarks.coverage table

``run`` and ``real`` append JSON lines to ``benchmarks/out/coverage.jsonl``; what is there already
is not simulated again. In every world the true mean change lies exactly at the margin, so each
"lossless" is false: its rate must be 5 % or less. Power is the rate of "lossless" where the true
change is 2.5 standard errors better than the margin.

Tests:

* ``bounded``: the default, its range from the selection examples; wrong where the mean of the
  changes cut at that range (what the certificate claims) is above its bound;
* ``bounded, whole mean``: the same bound, wrong where the mean of the uncut changes is above it,
  which no finite sample can exclude (Bahadur and Savage 1956);
* ``bounded, stated``: the range is the world's own largest change, stated by the user;
* ``betting, stated``: betting with that range (``bounds.BettingTest``);
* ``t``: the plain paired t test;
* ``hall``: t with Hall's (1992) correction for skewness;
* ``bootstrap-t``: the studentized bootstrap;
* ``bernstein, stated``: Maurer and Pontil's (2009) empirical Bernstein bound.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from benchmarks.documents import markdown
from benchmarks.rows import append_row, read_rows
from rankfold.certificate.bounds import Array, BettingTest, mean_p_value, share_bound
from rankfold.certificate.statement import REACH

RESULTS = Path(__file__).parent / "out" / "coverage.jsonl"
ALPHA = 0.05
REPETITIONS = 10_000
SLOW_REPETITIONS = 2_000  # of the tests that can't be computed for all samples at once
SIZES = ((16, 8), (32, 32), (128, 32))  # held-out and selection units
TRUTH = 2_000_000  # draws that a world's true mean is taken from
SHIFT = 2.5  # standard errors below the margin, for the power
PLANS = 50

Draw = Callable[[np.random.Generator, tuple[int, ...]], Array]


@dataclass(frozen=True)
class World:
    """A distribution of one unit's change.

    Attributes:
        draw: Values of a shape.
        largest: The largest value there can be, or None where there is none.
        plans: Candidates of which the best on selection data is tested; all are as good.
    """

    draw: Draw
    largest: float | None
    plans: int = 1


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.normal(0.0, 0.03, shape)


def _rare(share: float, size: float) -> Draw:
    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        rare: Array = (rng.random(shape) < share).astype(np.float64)
        return _normal(rng, shape) + size * rare

    return draw


def _sequences(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Means of 64 tokens whose changes follow an AR(1) of .8 with heavy-tailed noise."""
    noise = 0.02 * rng.standard_t(4, (*shape, 64)).astype(np.float32)
    out = noise.copy()
    for token in range(1, 64):
        out[..., token] += 0.8 * out[..., token - 1]
    mean: Array = out.mean(-1).astype(np.float64)
    return mean


def _accuracy(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """1 where only the original is right (4 %), -1 where only the other one is (3 %)."""
    u = rng.random(shape)
    return np.where(u < 0.04, 1.0, 0.0) - np.where(u > 0.97, 1.0, 0.0)


WORLDS: dict[str, World] = {
    "normal": World(_normal, None),
    "heavy tails (t, 3 df)": World(lambda r, s: 0.02 * r.standard_t(3, s), None),
    "skewed (lognormal)": World(lambda r, s: 0.02 * r.lognormal(0.0, 1.0, s), None),
    "skewed the other way": World(lambda r, s: -0.02 * r.lognormal(0.0, 1.0, s), 0.0),
    "correlated tokens": World(_sequences, None),
    "0 or 1": World(lambda r, s: np.where(r.random(s) < 0.05, 1.0, 0.0), 1.0),
    "accuracy": World(_accuracy, 1.0),
    "rare large losses (5 %)": World(_rare(0.05, 0.3), None),
    "very rare losses (1 %)": World(_rare(0.01, 1.0), None),
    "best of 50 plans": World(_normal, None, plans=PLANS),
    "best of 50, rare losses": World(_rare(0.05, 0.3), None, plans=PLANS),
}
for _name in ("rare large losses (5 %)", "very rare losses (1 %)", "best of 50, rare losses"):
    # The noise of these worlds is far below .2: a user who knows the size of a loss states it so.
    _world = WORLDS[_name]
    WORLDS[_name] = World(_world.draw, 1.2 if "1 %" in _name else 0.5, _world.plans)


@dataclass(frozen=True)
class Row:
    """Rates of one test in one world."""

    world: str
    units: int
    selection: int
    test: str
    repetitions: int
    false: int
    powerful: int
    width: float | None  # median distance of the bound from the mean, in t's

    @property
    def key(self) -> tuple[str, int, str]:
        return (self.world, self.units, self.test)

    @property
    def rate(self) -> float:
        return self.false / self.repetitions

    @property
    def exceeds(self) -> bool:
        """Whether the rate is above 5 % beyond the luck of the simulation, at 99 %."""
        return bool(stats.binom.sf(self.false - 1, self.repetitions, ALPHA) < 0.01)

    @property
    def most(self) -> float:
        """Upper 99 % bound of the rate (Clopper and Pearson)."""
        return share_bound(self.false, self.repetitions, 0.99)


@cache
def _truth(name: str) -> tuple[Array, Array]:
    """Sorted draws of a world and their running sums."""
    rng = np.random.default_rng(0)
    pieces = [WORLDS[name].draw(rng, (TRUTH // 20,)) for _ in range(20)]
    values = np.sort(np.concatenate(pieces))
    return values, np.concatenate([[0.0], np.cumsum(values)])


def true_mean(name: str) -> float:
    """The world's mean change."""
    return float(_truth(name)[0].mean())


def cut_means(name: str, highest: Array) -> Array:
    """Means of the changes cut at each of some values."""
    values, sums = _truth(name)
    place = np.searchsorted(values, highest)
    return (sums[place] + (len(values) - place) * highest) / len(values)


def samples(
    name: str, units: int, selection: int, repetitions: int, seed: int
) -> tuple[Array, Array]:
    """``(repetitions, units)`` held-out changes and ``(repetitions, selection)`` of selection.

    With several plans, the selection changes are those of the plan whose mean is lowest there.
    """
    world, rng = WORLDS[name], np.random.default_rng([seed, units])
    x = world.draw(rng, (repetitions, units))
    if world.plans == 1:
        return x, world.draw(rng, (repetitions, selection))
    chosen = np.empty((repetitions, selection))
    for start in range(0, repetitions, 500):
        several = world.draw(rng, (min(500, repetitions - start), world.plans, selection))
        best = several.mean(2).argmin(1)
        chosen[start : start + 500] = several[np.arange(len(best)), best]
    return x, chosen


def stated_range(selection: Array, units: int, margin: float) -> Array:
    """The range of the default test, as ``certificate.statement.state`` makes it."""
    reach = REACH * units ** (1 / 3) * selection.std(1, ddof=1)
    highest: Array = np.maximum(selection.mean(1) + reach, selection.max(1))
    return np.maximum(highest, margin)


def bounded_refutes(x: Array, mean: Array | float, highest: Array | float) -> NDArray[np.bool_]:
    """Whether the bounded test refutes "the mean is ``mean`` or more"."""
    top = np.maximum(highest, x.max(1))
    means = np.broadcast_to(mean, len(x))
    found = [
        mean_p_value(part, np.ones_like(part), means[s], top[s], 1.0)
        for s in _slices(len(x))
        for part in (x[s],)
    ]
    refuted: NDArray[np.bool_] = np.concatenate(found) <= ALPHA
    return refuted


def _slices(count: int, step: int = 500) -> Iterator[slice]:
    for start in range(0, count, step):
        yield slice(start, start + step)


def t_refutes(x: Array, mean: float, hall: bool = False) -> NDArray[np.bool_]:
    """Student's t, or with Hall's transformation."""
    n = x.shape[1]
    spread = np.maximum(x.std(1, ddof=1), 1e-12)
    t = (x.mean(1) - mean) / spread * math.sqrt(n)
    if hall:
        a = ((x - x.mean(1, keepdims=True)) ** 3).mean(1) / spread**3 / math.sqrt(n)
        s = np.clip(t, -1e6, 1e6)
        t = s + a * s**2 / 3 + a**2 * s**3 / 27 + a / 6
    refuted: NDArray[np.bool_] = stats.t.cdf(t, n - 1) <= ALPHA
    return refuted


def bootstrap_t_refutes(x: Array, mean: float, seed: int, draws: int = 499) -> NDArray[np.bool_]:
    """The studentized bootstrap."""
    rng = np.random.default_rng(seed)
    n = x.shape[1]
    refuted = np.empty(len(x), dtype=bool)
    for row, values in enumerate(x):
        again = values[rng.integers(0, n, (draws, n))]
        spread = np.maximum(again.std(1, ddof=1), 1e-12)
        t = (again.mean(1) - values.mean()) / spread
        error = max(float(values.std(ddof=1)), 1e-12)
        refuted[row] = values.mean() - float(np.quantile(t, ALPHA)) * error < mean
    return refuted


def bernstein_refutes(x: Array, mean: float, largest: float, least: float) -> NDArray[np.bool_]:
    """Maurer and Pontil's bound: it needs both ends of the range."""
    n, log = x.shape[1], math.log(2 / ALPHA)
    width = largest - least
    bound = x.mean(1) + np.sqrt(2 * x.var(1, ddof=1) * log / n) + 7 * width * log / (3 * (n - 1))
    refuted: NDArray[np.bool_] = bound < mean
    return refuted


def betting_refutes(x: Array, mean: float, largest: float, selection: Array) -> NDArray[np.bool_]:
    """Betting, its first bets from the selection examples."""
    refuted = np.empty(len(x), dtype=bool)
    for row, values in enumerate(x):
        chosen = selection[row]
        test = BettingTest(
            np.array([mean]), largest, 1.0, float(chosen.mean()), float(chosen.std(ddof=1))
        )
        test.add(values, np.ones_like(values))
        refuted[row] = test.wealth[0] >= math.log(1 / ALPHA)
    return refuted


def widths(x: Array, highest: Array, count: int = 100) -> float:
    """Median distance of the bounded bound from the mean, in those of the t bound."""
    from rankfold.certificate.bounds import bounded_bound

    n = x.shape[1]
    ratios = []
    for values, top in zip(x[:count], highest[:count], strict=True):
        t = float(stats.t.ppf(1 - ALPHA, n - 1)) * float(values.std(ddof=1)) / math.sqrt(n)
        if t > 0:
            bound = bounded_bound(values, np.ones(n), 1 - ALPHA, float(top))
            ratios.append((bound - values.mean()) / t)
    return float(np.median(ratios))


def simulate(
    name: str, units: int, selection: int, done: set[tuple[str, int, str]]
) -> Iterator[Row]:
    """All tests of one world and size that are not done yet."""
    world, mean = WORLDS[name], true_mean(name)
    deviation = float(_truth(name)[0].std())
    shift = SHIFT * deviation / math.sqrt(units)
    x, chosen = samples(name, units, selection, REPETITIONS, seed=1)
    highest = stated_range(chosen, units, mean)

    def row(
        test: str,
        false: NDArray[np.bool_],
        powerful: NDArray[np.bool_],
        width: float | None = None,
    ) -> Row:
        return Row(
            name, units, selection, test, len(false), int(false.sum()), int(powerful.sum()), width
        )

    def wanted(test: str) -> bool:
        return (name, units, test) not in done

    # Where the true change is better by `shift`, so is the change on selection data.
    better = stated_range(chosen - shift, units, mean)
    if wanted("bounded"):
        power = bounded_refutes(x - shift, mean, better)
        false = bounded_refutes(x, cut_means(name, highest), highest)
        yield row("bounded", false, power, widths(x, highest))
        yield row("bounded, whole mean", bounded_refutes(x, mean, highest), power)
    if world.largest is not None and wanted("bounded, stated"):
        top = world.largest
        false = bounded_refutes(x, mean, top)
        yield row("bounded, stated", false, bounded_refutes(x - shift, mean, top))
        least = float(_truth(name)[0].min())
        false = bernstein_refutes(x, mean, top, least)
        yield row(
            "bernstein, stated", false, bernstein_refutes(x - shift, mean, top, least - shift)
        )
    few = slice(0, SLOW_REPETITIONS)
    if world.largest is not None and wanted("betting, stated"):
        top = world.largest
        false = betting_refutes(x[few], mean, top, chosen[few])
        power = betting_refutes(x[few] - shift, mean, top, chosen[few] - shift)
        yield row("betting, stated", false, power)
    if wanted("t"):
        yield row("t", t_refutes(x, mean), t_refutes(x - shift, mean), 1.0)
    if wanted("hall"):
        yield row("hall", t_refutes(x, mean, hall=True), t_refutes(x - shift, mean, hall=True))
    if wanted("bootstrap-t"):
        false = bootstrap_t_refutes(x[few], mean, seed=2)
        yield row("bootstrap-t", false, bootstrap_t_refutes(x[few] - shift, mean, seed=2))


REAL = "ResNet-20 at {size:g}, {units} of 1,000 test images"
REAL_CERTIFICATES = 200


def real(sizes: Sequence[float], done: set[tuple[str, int, str]]) -> Iterator[Row]:
    """Certificates from small samples of images, of a model whose true change all of them give.

    The 1,000 test images are the population here: units are drawn from it with replacement, so the
    true change is their mean exactly. The margin is that true change: each "lossless" is false.
    """
    import torch
    from torch.utils.data import TensorDataset

    from benchmarks.cifar10 import cifar10_test, cifar10_train
    from benchmarks.cifar_nets import load_cifar_net
    from benchmarks.observed import observe
    from rankfold.data.parts import Data
    from rankfold.search.build import build
    from rankfold.search.round import start_round
    from rankfold.settings import Settings

    model, mean_, std = load_cifar_net("akamaster_resnet20")
    images, labels = cifar10_test(mean_, std)
    training, answers = cifar10_train(2300, 0, mean_, std)
    parts = (
        TensorDataset(training[:2000], answers[:2000]),
        TensorDataset(training[2000:], answers[2000:]),
        TensorDataset(images, labels),
    )
    settings = Settings(gradient_step=False)
    observed = observe(model, Data(*parts), settings)  # type: ignore[arg-type]
    prepared = start_round(observed.study, settings)
    original = observed.original_losses("held_out")
    for size in sizes:
        built = build(prepared, prepared.plan(size * prepared.factorizable))
        changed = observed.losses(built, "held_out", f"size {size:g}")
        population = (changed.losses - original.losses).numpy()
        accuracy = None
        if original.correct is not None and changed.correct is not None:
            accuracy = (original.correct - changed.correct).numpy()
        print(
            f"size {size:g}: true change {population.mean():+.4f}, deviation "
            f"{population.std():.3f}, largest {population.max():+.2f}"
            + ("" if accuracy is None else f", accuracy lost {accuracy.mean():+.4f}"),
            flush=True,
        )
        for units in (64, 200):
            yield from _real_rows(REAL.format(size=size, units=units), population, units, done)
    del torch


def _real_rows(
    name: str, population: Array, units: int, done: set[tuple[str, int, str]]
) -> Iterator[Row]:
    if (name, units, "bounded") in done:
        return
    rng = np.random.default_rng(units)
    mean = float(population.mean())
    shift = SHIFT * float(population.std()) / math.sqrt(units)
    x = population[rng.integers(0, len(population), (REAL_CERTIFICATES, units))]
    chosen = population[rng.integers(0, len(population), (REAL_CERTIFICATES, units))]
    highest = stated_range(chosen, units, mean)
    cut = np.array([np.minimum(population, top).mean() for top in highest])
    better = stated_range(chosen - shift, units, mean)
    power = bounded_refutes(x - shift, mean, better)

    def row(
        test: str, false: NDArray[np.bool_], powerful: NDArray[np.bool_], width: float | None
    ) -> Row:
        counts = (int(false.sum()), int(powerful.sum()))
        return Row(name, units, units, test, REAL_CERTIFICATES, *counts, width)

    yield row("bounded", bounded_refutes(x, cut, highest), power, widths(x, highest))
    yield row("bounded, whole mean", bounded_refutes(x, mean, highest), power, None)
    yield row("t", t_refutes(x, mean), t_refutes(x - shift, mean), 1.0)


def keep(rows: Iterator[Row], file: Path, done: set[tuple[str, int, str]]) -> None:
    """Append each row as it comes."""
    for row in rows:
        if row.key in done:
            continue
        done.add(row.key)
        append_row(file, row)
        print(f"{row.world}, {row.units} units, {row.test}: {row.rate:.2%}", flush=True)


def table(rows: Sequence[Row]) -> list[str]:
    """As Markdown: rate of false "lossless", its upper 99 % bound, power, width in t's."""
    tests = list(dict.fromkeys(row.test for row in rows))
    lines = []
    for units in dict.fromkeys(row.units for row in rows):
        mine = {(row.world, row.test): row for row in rows if row.units == units}
        worlds = dict.fromkeys(row.world for row in rows if row.units == units)
        cells = [[world, *(_cell(mine.get((world, test))) for test in tests)] for world in worlds]
        lines += [f"\n{units} units\n", markdown(["world", *tests], cells).rstrip()]
    return lines


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    mark = "**" if row.exceeds else ""
    width = f", {row.width:.2f} t" if row.width is not None and row.test != "t" else ""
    return (
        f"{mark}{row.rate:.1%}{mark} (≤ {row.most:.1%}); power {row.powerful / row.repetitions:.0%}"
        + width
    )


def verdict(rows: Sequence[Row]) -> list[str]:
    """The claims in words, from the rows."""
    default = [row for row in rows if row.test == "bounded"]
    worst = max(default, key=lambda row: row.most)
    exceeded = [
        f"{row.world} ({row.units}: {row.rate:.0%})"
        for row in rows
        if row.test == "t" and row.exceeds
    ]
    whole = [
        f"{row.world} ({row.units}: {row.rate:.0%})"
        for row in rows
        if row.test == "bounded, whole mean" and row.rate > ALPHA
    ]
    return [
        f"default test: highest rate {worst.rate:.2%}, upper 99 % bound {worst.most:.2%} "
        f"({worst.world}, {worst.units} units)",
        "plain t exceeds 5 % (at 99 % confidence) in: " + (", ".join(exceeded) or "none"),
        "the default's bound is below the whole, uncut mean in more than 5 % in: "
        + (", ".join(whole) or "none"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--worlds", nargs="+", choices=[*WORLDS], default=[*WORLDS])
    of_real = commands.add_parser("real")
    of_real.add_argument("--sizes", nargs="+", type=float, default=[0.8, 0.5])
    for command in (run, of_real, commands.add_parser("table")):
        command.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    done = {row.key for row in read_rows(options.results, Row)}
    if options.command == "run":
        for units, selection in SIZES:
            for name in options.worlds:
                keep(simulate(name, units, selection, done), options.results, done)
    elif options.command == "real":
        keep(real(options.sizes, done), options.results, done)
    rows = read_rows(options.results, Row)
    print("\n".join([*table(rows), "", *verdict(rows)]))


if __name__ == "__main__":
    main()
