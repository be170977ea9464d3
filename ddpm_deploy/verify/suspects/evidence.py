"""The numbers of a comparison, taken apart by where a fault can lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ddpm_deploy.arrays import Samples
from ddpm_deploy.engines.base import Engine
from ddpm_deploy.parity import TOLERANCE, relative_error
from ddpm_deploy.run import Recipe
from ddpm_deploy.sampling import (
    Predictor,
    Table,
    Transition,
    predicted,
    predicted_x0,
    split_variance,
)
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.verify.compare import Comparison, Pair, Side
from ddpm_deploy.verify.loops import Loop, Noise
from ddpm_deploy.verify.trace import Trace

MATCH = 0.02
"""A fault explains an error where it leaves less than this share of it, or of the peak."""

ARITHMETIC = TOLERANCE
"""What float32 may make of a step's sums, of the peak."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """A comparison, and both its sides, which can be asked more.

    Attributes:
        comparison: What was found.
        reference: The reference, as it was given.
        engine: The deployed side, as it was given.
        loops: Both as they ran.
        recipe: Sampler, seed and labels.
        images: Indices of the images.
        noise: The recipe's.
    """

    comparison: Comparison
    reference: Side
    engine: Side
    loops: tuple[Loop | Trace, Loop | Trace]
    recipe: Recipe
    images: Sequence[int]
    noise: Noise

    @property
    def spec(self) -> ModelSpec:
        """The reference's."""
        return self.reference.spec

    @property
    def table(self) -> Table:
        """The reference's."""
        return self.loops[0].table

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The transitions whose numbers were kept, noisiest first."""
        return self.comparison.kept

    def row(self, pair: Pair) -> Transition:
        """Returns the reference's row of a transition."""
        return self.table[pair.k - 1]

    @cached_property
    def network_errors(self) -> dict[int, float]:
        """Local error of the output, by transition, of the kept ones."""
        return {p.k: relative_error(p.local_given.out, p.local_wanted.out) for p in self.pairs}

    @cached_property
    def network_is_off(self) -> bool:
        """Tells whether the network itself differs, by more than its budget or rounding."""
        return any(self.network_errors[p.k] > self.allowed(p) for p in self.pairs)

    def allowed(self, pair: Pair) -> float:
        """Returns what the output may be off by in a transition."""
        return self.comparison.allowed(pair.wanted.t)

    def left_by_a_fault(self, error: float, allowed: float) -> float:
        """Returns what a fault may leave of an error, to explain it: never more than a third."""
        return min(max(allowed, MATCH * min(error, 1.0)), error / 3)

    def gone(self, left: float, error: float, allowed: float) -> bool:
        """Tells whether so little is left of an error that a fault is its cause for certain."""
        return left <= min(max(allowed, TOLERANCE), error / 10)

    @cached_property
    def worst(self) -> list[Pair]:
        """The kept transitions whose output is most beyond what it may be, the worst first."""
        return sorted(self.pairs, key=lambda p: -self.network_errors[p.k] / self.allowed(p))

    def step_error(self, pair: Pair, row: Transition) -> float:
        """Returns how far the deployed step is from a row's, given its own output.

        Infinite where the row takes a learned variance that nobody can be asked for.
        """
        wanted = self.result(pair, row)
        return float("inf") if wanted is None else relative_error(pair.local_given.x, wanted)

    def result(self, pair: Pair, row: Transition, *, noise: bool = True) -> Samples | None:
        """Returns what a row makes of the deployed network's output: float32, (N, *sample_shape).

        Args:
            pair: The transition.
            row: What to do.
            noise: Whether the recipe's noise is added.
        """
        step = pair.local_given
        x0 = predicted_x0(row, step.x_t, step.out)
        mean: Samples = row.x_from_x0 * x0 + row.x_from_x * step.x_t + row.x_from_out * step.out
        if row.x_from_before and step.before is not None:
            mean = mean + row.x_from_before * step.before
        if not (noise and row.x_from_noise):
            return mean
        std = self._std(pair, row)
        if std is None:
            return None
        return np.asarray(mean + std * self.noise(pair.k), np.float32)

    def _std(self, pair: Pair, row: Transition) -> float | Samples | None:
        """Returns σ of a row, from the network's own v where the variance is learned."""
        if row.log_std is None:
            return row.x_from_noise
        v = self._learned(pair)
        if v is None:
            return None
        return np.asarray(np.exp(row.log_std[0] + row.log_std[1] * v), np.float32)

    def _learned(self, pair: Pair) -> Samples | None:
        """Returns what the network says of the variance, the deployed one where it can be asked."""
        if pair.k not in self._variances:
            live = [loop for loop in reversed(self.loops) if isinstance(loop, Loop)]
            step = pair.local_given
            given = predicted(live[0].predict, step.x_t, step.t, step.before)
            _, v = split_variance(given, step.x_t)
            self._variances[pair.k] = v
        return self._variances[pair.k]

    @cached_property
    def _variances(self) -> dict[int, Samples | None]:
        return {}

    @cached_property
    def step_errors(self) -> dict[int, float]:
        """How far the deployed step is from the reference's row, by transition."""
        return {p.k: self.step_error(p, self.row(p)) for p in self.pairs}

    @cached_property
    def step_is_off(self) -> bool:
        """Tells whether the sampler's arithmetic or its noise differs."""
        return max(self.step_errors.values(), default=0.0) > ARITHMETIC

    @cached_property
    def experiment(self) -> Experiment | None:
        """Returns the network to try faults on: the reference, or else the deployed one."""
        for side, loop, inverse in zip(
            (self.reference, self.engine), self.loops, (False, True), strict=True
        ):
            if isinstance(loop, Loop):
                return Experiment(self, side, loop, inverse=inverse)
        return None


Change = Callable[[Samples], Samples]


class Experiment:
    """A network that faults are tried on.

    With the reference, a fault is planted, and must give what the deployed side gave. Where the
    reference is a trace, the deployed network is asked, and must give what the reference did once
    the fault is undone.

    Args:
        evidence: The comparison.
        side: Whose network.
        loop: Its loop.
        inverse: Whether it is the deployed side's.
    """

    def __init__(self, evidence: Evidence, side: Side, loop: Loop, *, inverse: bool) -> None:
        self._evidence, self._loop, self.inverse = evidence, loop, inverse
        self.engine = side if isinstance(side, Engine) else None
        self.spec = loop.spec
        # A few steps and two images tell a fault, in a fraction of the loop's time.
        self._pairs = self._spread()

    def _spread(self) -> list[Pair]:
        worst = self._evidence.worst
        chosen = {worst[0].k: worst[0]} if worst else {}
        by_t = sorted(worst[: max(3, len(worst) // 2)], key=lambda p: p.k)
        for pair in by_t[:: max(1, len(by_t) // 2)][:3]:
            chosen.setdefault(pair.k, pair)
        return list(chosen.values())

    @property
    def pairs(self) -> list[Pair]:
        """The transitions tried, the worst first."""
        return self._pairs

    def target(self, pair: Pair) -> Samples:
        """Returns what the network should give once the fault is planted, or undone."""
        return (pair.local_wanted if self.inverse else pair.local_given).out

    def base(self) -> float:
        """Returns the error that a fault is to explain, the largest of the transitions tried."""
        return max(self._evidence.network_errors[pair.k] for pair in self._pairs)

    def timestep(self, pair: Pair) -> int:
        """Returns the timestep that the loop called the network with."""
        return (pair.local_given if self.inverse else pair.local_wanted).t

    def error(
        self,
        *,
        x: Change | None = None,
        t: Callable[[int], int] | None = None,
        out: Change | None = None,
    ) -> float:
        """Returns the largest error that is left with a fault; infinite where it explains nothing.

        It must explain each transition that is outside, and spoil none that is inside.

        Args:
            x: What the fault does to the input.
            t: What it does to the timestep.
            out: What it does to the output.
        """
        worst, explained = 0.0, 0
        for pair in self._pairs:
            wanted_t = self.timestep(pair)
            changed_t = t(wanted_t) if t else wanted_t
            if not 0 <= changed_t < self.spec.schedule.T:
                continue  # the loop's ends have no neighbour
            given = self.call(pair, changed_t, x=x)
            left = relative_error(out(given) if out else given, self.target(pair))
            error = self._evidence.network_errors[pair.k]
            allowed = self._evidence.allowed(pair)
            off = error > allowed
            if left > (self._evidence.left_by_a_fault(error, allowed) if off else allowed):
                return float("inf")
            explained += off
            worst = max(worst, left)
        return worst if explained else float("inf")

    def call(
        self,
        pair: Pair,
        t: int,
        *,
        x: Change | None = None,
        predict: Predictor | None = None,
    ) -> Samples:
        """Runs the network on a transition's x_t, without a learned variance's half."""
        x_t = pair.local_given.x_t
        given = np.ascontiguousarray(x(x_t) if x else x_t, dtype=np.float32)
        values = predicted(predict or self._loop.predict, given, t, pair.local_given.before)
        return split_variance(values, given)[0]

    def explains(self, error: float) -> bool:
        """Tells whether so small an error is left that the fault explains the rest."""
        return error <= self._evidence.left_by_a_fault(self.base(), self.allowed())

    def gone(self, error: float) -> bool:
        """Tells whether so small an error is left that nothing else is wrong."""
        return self._evidence.gone(error, self.base(), self.allowed())

    def allowed(self) -> float:
        """Returns what the output may be off by, the most of the transitions tried."""
        return max(self._evidence.allowed(pair) for pair in self._pairs)
