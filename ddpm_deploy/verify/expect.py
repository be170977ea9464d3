"""What a loop should err by in an arithmetic, from measurements of its float32 network alone.

A network is asked twice: once for x_t, once where a few numbers of x_t are moved to their float32
neighbours. The two outputs differ by what rounding does inside of this network at this timestep, in
float32; another arithmetic does the same, larger by its unit roundoff. Noise of that size is then
added to the network's output, and what the loop makes of it is measured as any engine is.
docs/parity.md has the derivation, and what came of it beside real engines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ddpm_deploy.arrays import Array, Samples, Timesteps
from ddpm_deploy.run import Recipe
from ddpm_deploy.sampling import Predictor, SelfConditioned
from ddpm_deploy.schedule import Schedule
from ddpm_deploy.verify.budget import (
    ARITHMETICS,
    UNIT_ROUNDOFF,
    Arithmetic,
    Budget,
    ErrorKind,
    Limit,
    Quantity,
)
from ddpm_deploy.verify.compare import Comparison, StepErrors, Verifier, final_pixels, plain
from ddpm_deploy.verify.loops import Loop
from ddpm_deploy.verify.measures import PictureErrors

SHARE: Mapping[Arithmetic, float] = {
    "fp32": 2.0,
    "tf32": 0.4,
    "fp16": 0.3,
    "bf16": 0.3,
    "int8": 8.0,
}
"""Root mean square of an output's error over the unit roundoff times κ, see `rounding_gain`.

Measured by benchmarks/expected_errors.py. float32 rounds its sums too, and two runtimes in their
own order; TF32 and half precision sum in float32; int8 takes its range from the largest number.
"""

PERSISTENT = 1 / 3
"""Part of the error that is the same at every step, as a rounded weight's is; the rest is new."""

FACTOR = 4.0
"""How many times the expected errors a budget allows.

SHARE holds within a factor of two, and the maximum of a few numbers varies by as much. Where all of
an error persists, it accumulates to 1 / PERSISTENT = 3 times what is expected. Half precision that
is coarser, bf16 for fp16, errs 8 times as much, and stays outside.
"""

LEAST = 16 * UNIT_ROUNDOFF["fp32"]
"""No limit is below: the loop's own float32 numbers differ by as much."""

RANGES = 6
"""Parts of the schedule that have limits of their own."""

_PROBED: Arithmetic = "fp16"
"""Whose errors are measured: large beside float32's own, small beside the samples."""

_MOVED = 8
"""One number in so many is moved, so that the movement itself stays small beside the rounding."""

_NOISE_SEED = 0x726F756E64

_LIMITED: tuple[tuple[ErrorKind, Quantity], ...] = (
    ("local", "out"),
    ("local", "x0"),
    ("local", "x"),
    ("accumulated", "x0"),
    ("accumulated", "x"),
)
"""The errors that a derived budget limits, each by its maximum."""


@dataclass(frozen=True, kw_only=True)
class RangeErrors:
    """The errors expected over a range of timesteps, each the largest `max` of `Errors`.

    Attributes:
        first: Least timestep.
        last: Largest timestep.
        errors: By error and quantity.
    """

    first: int
    last: int
    errors: Mapping[tuple[ErrorKind, Quantity], float]


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What a loop should err by in an arithmetic.

    Attributes:
        arithmetic: Which.
        ranges: Parts of the schedule, from t = 0 on.
        pictures: Errors of the final pictures.
        allowed: The same where x errs more by the safety factor.
        factor: The safety factor.
    """

    arithmetic: Arithmetic
    ranges: tuple[RangeErrors, ...]
    pictures: PictureErrors
    allowed: PictureErrors
    factor: float

    def worst(self, error: ErrorKind, quantity: Quantity) -> float:
        """Returns the largest error expected at any timestep."""
        return max(part.errors[error, quantity] for part in self.ranges)

    @property
    def amplification(self) -> float | None:
        """The largest accumulated error of x over the largest local one; None without the latter.

        A network whose last layer is still 0 has none.
        """
        local = self.worst("local", "x")
        return self.worst("accumulated", "x") / local if local > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON's types; an infinite PSNR becomes null."""
        ranges = [
            {
                "from": part.first,
                "to": part.last,
                **{f"{error}/{quantity}": v for (error, quantity), v in part.errors.items()},
            }
            for part in self.ranges
        ]
        return plain(
            {
                "ranges": ranges,
                "amplification": self.amplification,
                "pictures": asdict(self.pictures),
                "factor": self.factor,
            }
        )

    def budget(self) -> Budget:
        """Returns the budget of an engine in this arithmetic: the errors times the factor."""
        limits = tuple(
            Limit(
                error=error,
                quantity=quantity,
                bound=_readable(max(part.errors[error, quantity] * self.factor, LEAST)),
                first=part.first,
                last=None if part is self.ranges[-1] else part.last,
            )
            for error, quantity in _LIMITED
            for part in self.ranges
        )
        # A float at the edge between two levels falls either way: no budget asks for more than
        # float32's default does, nor for more than the PSNR of one level everywhere. A mean
        # difference cancels in one draw of the noise and not in the next, so its default stands.
        exact, usual = Budget(), Budget.of(self.arithmetic)
        return Budget(
            limits=limits,
            pixels=min(round(self.allowed.close, 4), exact.pixels),
            equal=min(round(self.allowed.equal, 4), exact.equal),
            bias=max(_readable(abs(self.allowed.bias)), usual.bias),
            psnr=round(min(*self.allowed.psnr, 20 * math.log10(255)), 1),
        )


def rounding_gain(predict: Predictor, x: Samples, t: Timesteps, out: Samples) -> float:
    """Returns κ, what this network makes of roundings at this timestep.

    The root mean square of what its output moves by when one number in eight of x becomes its
    float32 neighbour, over float32's unit roundoff. Not less than the output's own root mean
    square: nothing rounds less than its result once.

    Args:
        predict: A network in float32.
        x: float32, (N, *sample_shape).
        t: int64, (N,).
        out: What it gives for them.
    """
    draw = _drawn(int(t[0]), 1)
    towards = np.where(draw.random(x.shape) < 0.5, np.float32(-np.inf), np.float32(np.inf))
    moved = np.where(draw.random(x.shape) < 1 / _MOVED, np.nextafter(x, towards), x)
    return max(_rms(predict(moved, t) - out) / UNIT_ROUNDOFF["fp32"], _rms(out))


def disturbed(loop: Loop, level: float, *, persistent: float = PERSISTENT) -> Loop:
    """Returns a loop whose network errs at every step as one in a coarser arithmetic would.

    Args:
        loop: In float32.
        level: Root mean square of the error, over κ.
        persistent: Part of the error that is the same at every step, 0 to 1; the squares of it and
            of the part that is new at each step add up to 1.
    """
    fresh = float(np.sqrt(1 - persistent**2))

    def erring(network: Predictor) -> Predictor:
        def predict(x: Samples, t: Timesteps) -> Samples:
            out = network(x, t)
            same = _drawn(0, 2).standard_normal(out.shape)
            new = _drawn(int(t[0]), 3).standard_normal(out.shape)
            size = level * rounding_gain(network, x, t, out)
            return (out + size * (persistent * same + fresh * new)).astype(np.float32)

        return predict

    network = loop.predict
    predict = erring(network)
    if isinstance(network, SelfConditioned):
        sees = network.predict
        predict = SelfConditioned(
            predict=lambda x, t, before: erring(lambda x, t: sees(x, t, before))(x, t)
        )
    return Loop(predict, loop.table, loop.noise, spec=loop.spec)


def expected(
    loop: Loop,
    recipe: Recipe,
    images: Sequence[int],
    *,
    factor: float = FACTOR,
    ranges: int = RANGES,
    on_start: Callable[[int], None] = lambda _: None,
    on_step: Callable[[StepErrors], None] = lambda _: None,
) -> dict[Arithmetic, Expectation]:
    """Returns what each arithmetic should err by in a loop.

    The network is called five times a step. The loop's errors are measured at one size, fp16's, and
    scaled: they are proportional to it until clipping ends them.

    Args:
        loop: Of the network in float32, see `engine_loop`.
        recipe: What it was made for.
        images: Indices of its images.
        factor: What budgets allow, in times the expected errors; above 0.
        ranges: Parts of the schedule, at most, equal in log signal-to-noise ratio.
        on_start: Told of the number of steps.
        on_step: Told of each step.

    Raises:
        ParityError: The network gives numbers that are not finite.
    """
    probed = _level(_PROBED)
    verifier = Verifier(loop, disturbed(loop, probed), recipe, images, budget=Budget(limits=()))
    on_start(len(verifier))
    for step in verifier:
        on_step(step)
    result = verifier.result
    parts = split(loop.spec.schedule, [step.t for step in result.steps], ranges)
    return {
        arithmetic: _expectation(
            arithmetic, result, loop, parts, scale=_level(arithmetic) / probed, factor=factor
        )
        for arithmetic in ARITHMETICS
    }


def split(schedule: Schedule, visited: Iterable[int], count: int) -> list[tuple[int, int]]:
    """Splits timesteps into ranges equal in log signal-to-noise ratio, log(ᾱ / (1-ᾱ)).

    Errors change with it by orders of magnitude: x_0's by √((1-ᾱ)/ᾱ) times the output's.

    Returns:
        The least and the largest timestep of each range in which some are visited, from 0 on;
        together they are the whole schedule.
    """
    tiny = np.finfo(np.float64).tiny
    alpha_bar = np.clip(np.asarray(schedule.alpha_bar, dtype=np.float64), tiny, None)
    # A schedule that ends at ᾱ = 0 has -inf there, which would leave one range for all the rest.
    log_snr = np.clip(np.log(alpha_bar) - np.log(np.maximum(1 - alpha_bar, tiny)), -12, 12)
    ts = sorted(visited)
    edges = np.linspace(log_snr[ts[0]], log_snr[ts[-1]], count + 1)[1:-1]
    of = {t: int(np.sum(log_snr[t] <= edges)) for t in ts}
    firsts = [0, *(t for before, t in pairwise(ts) if of[t] != of[before])]
    return list(zip(firsts, [*(first - 1 for first in firsts[1:]), schedule.T - 1], strict=True))


def _expectation(
    arithmetic: Arithmetic,
    result: Comparison,
    loop: Loop,
    parts: Sequence[tuple[int, int]],
    *,
    scale: float,
    factor: float,
) -> Expectation:
    clipped = all(row.clip is not None for row in loop.table)
    pictures, allowed = (_pictures(result, loop, scale * by) for by in (1.0, factor))
    return Expectation(
        arithmetic=arithmetic,
        ranges=tuple(_range(result, first, last, scale, clipped=clipped) for first, last in parts),
        pictures=pictures,
        allowed=allowed,
        factor=factor,
    )


def _range(
    result: Comparison, first: int, last: int, scale: float, *, clipped: bool
) -> RangeErrors:
    steps = [step for step in result.steps if first <= step.t <= last]
    kinds: tuple[ErrorKind, ...] = ("local", "accumulated")
    quantities: tuple[Quantity, ...] = ("out", "x0", "x")
    errors = {
        (error, quantity): scale
        * max(getattr(getattr(step, error), quantity).max for step in steps)
        for error in kinds
        for quantity in quantities
    }
    if clipped:  # to an interval of twice its peak
        errors |= {key: min(error, 2.0) for key, error in errors.items() if key[1] == "x0"}
    return RangeErrors(first=first, last=last, errors=errors)


def _pictures(result: Comparison, loop: Loop, scale: float) -> PictureErrors:
    """Returns the errors of the last pictures when x errs `scale` times as it did."""
    last = result.kept[-1]
    given = last.wanted.x + np.float32(scale) * (last.given.x - last.wanted.x)
    return PictureErrors.between(final_pixels(given, loop), final_pixels(last.wanted.x, loop))


def _level(arithmetic: Arithmetic) -> float:
    return SHARE[arithmetic] * UNIT_ROUNDOFF[arithmetic]


def _readable(bound: float) -> float:
    return float(f"{bound:.2e}")


def _rms(x: Array) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def _drawn(t: int, stream: int) -> np.random.Generator:
    """Returns numbers for a timestep that are the same at each call."""
    return np.random.Generator(np.random.Philox(key=[_NOISE_SEED + stream, t]))
