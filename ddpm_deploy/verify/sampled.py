"""Some of the timesteps instead of all, and what that leaves unseen."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ddpm_deploy.run import Recipe
from ddpm_deploy.spec import ModelSpec

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """How much of a schedule was looked at.

    Attributes:
        seen: Timesteps compared.
        of: Timesteps of the schedule.
        drawn: Whether they are a draw of `drawn_steps`, rather than those that the sampler visits.
        recorded: Whether they are those of the loop's that a trace holds.
    """

    seen: int
    of: int
    drawn: bool = False
    recorded: bool = False

    @property
    def share(self) -> float | None:
        """The smallest share of timesteps that a fault must touch to be met with 95 % confidence.

        K independent draws miss a share p with probability (1-p)^K, and a draw in each of K equal
        parts misses no oftener, since a product of K factors is largest where they are equal. None
        where the timesteps were not drawn.
        """
        if not self.drawn or self.seen >= self.of:
            return None
        draws = self.seen - 1  # T-1 is no draw
        return float(1 - (1 - CONFIDENCE) ** (1 / draws)) if draws else 1.0

    @property
    def says(self) -> str:
        """What was looked at, in words."""
        if self.seen >= self.of:
            return f"all {self.of} timesteps"
        if self.share is None:
            which = "the trace holds" if self.recorded else "the loop visits"
            return f"{self.seen} of {self.of} timesteps, those that {which}"
        return (
            f"{self.seen} of {self.of} timesteps; a fault at {self.share:.1%} of them or more is "
            f"met with {CONFIDENCE:.0%} confidence"
        )


def looked_at(seen: int, recipe: Recipe, spec: ModelSpec, *, recorded: bool = False) -> Sampled:
    """Returns how much of a schedule a comparison looked at.

    Args:
        seen: Timesteps compared. A trace may have fewer than its loop.
        recipe: What was compared.
        spec: What the network is.
        recorded: Whether a trace decided which.
    """
    return Sampled(
        seen=seen,
        of=spec.schedule.T,
        drawn=seen > 0 and recipe.steps == drawn_steps(spec, seen, seed=recipe.seed),
        recorded=recorded and seen < len(recipe.table(spec)),
    )


def drawn_steps(spec: ModelSpec, count: int, *, seed: int) -> tuple[int, ...]:
    """Draws timesteps of a network, of those that it was trained at; as `stratified` does."""
    return stratified(spec.schedule.T, count, seed=seed, first=spec.first_timestep)


def stratified(T: int, count: int, *, seed: int, first: int = 0) -> tuple[int, ...]:  # noqa: N803
    """Draws timesteps: T-1, where a loop starts, and one at random from each of equal parts.

    Args:
        T: Length of the schedule.
        count: How many; all from T on.
        seed: Of the choice, 0 to 2⁶⁴-1.
        first: The least timestep; those below are left out.

    Returns:
        The timesteps, the noisiest first.

    Raises:
        ValueError: `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"the number of timesteps is {count}; it must be at least 1")
    if count >= T - first:
        return tuple(range(T - 1, first - 1, -1))
    parts = count - 1
    edges = [first + i * (T - 1 - first) // max(parts, 1) for i in range(parts + 1)]
    draw = np.random.Generator(np.random.Philox(key=seed))
    chosen = [int(draw.integers(low, high)) for low, high in pairwise(edges)]
    return (T - 1, *reversed(chosen))
