"""Timing whole steps of the loop, engines side by side.

The engines take turns, so that a machine that grows warm or busy is so for all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ddpm_deploy.arrays import Array, Samples, Timesteps
from ddpm_deploy.engines.base import Engine, Stepper
from ddpm_deploy.fused import denoise_fused, noise_threads
from ddpm_deploy.noise import SeededNoise
from ddpm_deploy.parity import relative_error
from ddpm_deploy.run import Recipe, drawn
from ddpm_deploy.sampling import Predictor, SelfConditioned, Transition

Loop = Callable[[int], Iterator["StepTime"]]
"""Runs so many steps from pure noise and yields each one's time."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """One step's time, in seconds.

    Attributes:
        total: The whole step.
        network: The network's share; the same as `total` where a loop cannot tell.
    """

    total: float
    network: float


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One loop's speed.

    Attributes:
        name: Of the engine.
        batch: Images at once.
        steps: Steps timed, after the warm-up.
        median: Seconds a step.
        p90: Seconds that nine of ten steps stay under.
        loop: Seconds that the sampler's whole loop takes, at the median step.
        images_per_second: Whole loops of the sampler's full length.
        overhead: Median share of a step that is not the network.
    """

    name: str
    batch: int
    steps: int
    median: float
    p90: float
    loop: float
    images_per_second: float
    overhead: float

    @property
    def steps_per_second(self) -> float:
        """Steps of a whole batch a second."""
        return 1.0 / self.median


def engine_loop(engine: Engine, recipe: Recipe, batch: int) -> Loop:
    """Makes the loop that `sample` runs, with a clock in it.

    A fused step may only be noted by the runtime and done later, so each step of a turn is given
    the turn's mean; the network's share is then what the runtime takes for the whole step.
    """
    if recipe.fused(engine):
        return _fused_loop(engine, recipe, batch)
    table = recipe.table(engine.spec)
    predict = recipe.predictor(engine, range(batch))
    noise = SeededNoise(recipe.seed, range(batch), engine.spec.sample_shape)

    def run(steps: int) -> Iterator[StepTime]:
        network = 0.0

        sees = predict if isinstance(predict, SelfConditioned) else None

        def timed(x: Samples, t: Timesteps, before: Samples | None = None) -> Samples:
            nonlocal network
            start = time.perf_counter()
            out = predict(x, t) if sees is None or before is None else sees.predict(x, t, before)
            network = time.perf_counter() - start
            return out

        predictor: Predictor = timed if sees is None else SelfConditioned(predict=timed)
        x = noise(0)
        start = time.perf_counter()
        for _ in drawn(engine, predictor, table[:steps], noise, x=x):
            now = time.perf_counter()
            yield StepTime(total=now - start, network=network)
            start = time.perf_counter()

    return run


def _fused_loop(engine: Engine, recipe: Recipe, batch: int) -> Loop:
    table = recipe.table(engine.spec)
    conditions = recipe.conditions(engine, range(batch))
    noise = SeededNoise(recipe.seed, range(batch), engine.spec.sample_shape)

    def run(steps: int) -> Iterator[StepTime]:
        rows = table[:steps]
        with engine.stepper(batch) as stepper:
            stepper.start(noise(0), conditions)
            timed = _Timed(stepper)
            start = time.perf_counter()
            for _ in denoise_fused(timed, rows, noise, threads=noise_threads(engine)):
                pass
            timed.read()
            total = time.perf_counter() - start
        mean = StepTime(total=total / len(rows), network=timed.seconds / len(rows))
        yield from [mean] * len(rows)

    return run


class _Timed(Stepper):
    """A stepper with a clock that runs while the runtime has the word."""

    def __init__(self, stepper: Stepper) -> None:
        self._stepper = stepper
        self.seconds = 0.0

    def start(self, x: Samples, conditions: Mapping[str, Array]) -> None:
        self._stepper.start(x, conditions)

    def step(self, row: Transition, z: Samples | None) -> None:
        start = time.perf_counter()
        self._stepper.step(row, z)
        self.seconds += time.perf_counter() - start

    def read(self) -> Samples:
        start = time.perf_counter()
        x = self._stepper.read()
        self.seconds += time.perf_counter() - start
        return x

    def close(self) -> None:
        self._stepper.close()


def measure(
    loops: Mapping[str, Loop],
    *,
    batch: int,
    rows: Mapping[str, int],
    steps: int,
    repeat: int,
    warm_up: int,
) -> Iterator[Measurement]:
    """Times loops in turns.

    Args:
        loops: By name.
        batch: Images at once.
        rows: Steps of each sampler's whole loop, by name, for images a second.
        steps: Steps a turn.
        repeat: Turns each.
        warm_up: Steps of each loop that are not counted, before the first turn.

    Yields:
        A `Measurement` each, in the order given, after the last turn; none of a loop that gave no
        step in its turns.
    """
    times: dict[str, list[StepTime]] = {name: [] for name in loops}
    for loop in loops.values():
        for _ in loop(warm_up):
            pass
    for _ in range(repeat):
        for name, loop in loops.items():
            times[name].extend(loop(steps))
    for name, taken in times.items():
        if taken:
            yield _summary(name, taken, batch, rows[name])


def _summary(name: str, taken: Sequence[StepTime], batch: int, rows: int) -> Measurement:
    totals = np.array([step.total for step in taken])
    median = float(np.median(totals))
    return Measurement(
        name=name,
        batch=batch,
        steps=len(taken),
        median=median,
        p90=float(np.percentile(totals, 90)),
        loop=median * rows,
        images_per_second=batch / (median * rows),
        overhead=float(np.median([1.0 - step.network / step.total for step in taken])),
    )


def kept(loop: Loop, name: str, failures: dict[str, Exception]) -> Loop:
    """Makes a loop that does not stop the others: it notes what it fails with, and is over.

    Args:
        loop: The loop.
        name: Its name.
        failures: Where to note it, by name; a loop that stands there makes no more steps.
    """

    def run(steps: int) -> Iterator[StepTime]:
        if name in failures:
            return
        try:
            yield from loop(steps)
        except Exception as error:  # noqa: BLE001  (a runtime's errors have no common class)
            failures[name] = error

    return run


PROBES = 4
"""Timesteps at which outputs are compared."""


def probe(engine: Engine, recipe: Recipe, batch: int) -> list[Samples]:
    """Returns an engine's outputs on one batch of noise, at timesteps from the first to the last.

    Two engines of one network get the same inputs, and their outputs can be compared.

    Args:
        engine: What to ask.
        recipe: Says the noise and the conditions.
        batch: Images at once, the batch that is timed, for which a runtime may have compiled.
    """
    predict = recipe.predictor(engine, range(batch))
    x = SeededNoise(recipe.seed, range(batch), engine.spec.sample_shape)(0)
    first, last = engine.spec.first_timestep, engine.spec.schedule.T - 1
    timesteps = np.linspace(min(first, last), last, PROBES).round().astype(np.int64)
    return [predict(x, np.full(batch, t, np.int64)) for t in timesteps]


def output_error(given: Sequence[Samples], wanted: Sequence[Samples]) -> float | None:
    """Returns the largest `relative_error` of two `probe`s; None where the networks differ."""
    if any(g.shape != w.shape for g, w in zip(given, wanted, strict=True)):
        return None
    return max(relative_error(g, w) for g, w in zip(given, wanted, strict=True))
