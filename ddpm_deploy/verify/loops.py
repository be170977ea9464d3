"""A loop that can do any of its steps from any x: what `verify` compares.

The usual loop goes through its table once. To tell an engine's own error from what has accumulated,
step k is done again from the other side's x_t.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from ddpm_deploy.arrays import Array, Samples
from ddpm_deploy.engines.base import Engine, Stepper
from ddpm_deploy.noise import SeededNoise
from ddpm_deploy.run import Recipe
from ddpm_deploy.sampling import (
    Predictor,
    Step,
    Table,
    denoise,
    looks_back,
    predicted_x0,
    split_variance,
)
from ddpm_deploy.spec import ModelSpec

Noise = Callable[[int], Samples]


class Loop:
    """A network, a table and noise.

    Args:
        predict: The network with its conditions bound.
        table: The sampler.
        noise: Draws for a step number, see `denoise`.
        spec: What the network is.
    """

    def __init__(self, predict: Predictor, table: Table, noise: Noise, *, spec: ModelSpec) -> None:
        self.predict, self.table, self.noise, self.spec = predict, table, noise, spec

    def start(self) -> Samples:
        """Draws x_T."""
        return self.noise(0)

    @property
    def looks_back(self) -> bool:
        """Tells whether a step needs the x_0 of the step before."""
        return looks_back(self.predict, self.table)

    def step(self, k: int, x: Samples, before: Samples | None = None) -> Step:
        """Does transition k.

        Args:
            k: 1 being the noisiest.
            x: float32, (N, *sample_shape): x_t.
            before: The x_0 of the step before, likewise, for a loop that looks back.
        """
        row = [self.table[k - 1]]
        steps = denoise(self.predict, row, lambda _: self.noise(k), x=x, before=before)
        return replace(next(steps), k=k)

    def close(self) -> None:
        """Gives back what the runtime keeps; another step takes it again."""


class FusedLoop(Loop):
    """A loop whose step is fused behind the network: x_s is what the runtime makes of it.

    Args:
        engine: Of a fused graph.
        conditions: Its conditions, by name.
        predict: The engine with them.
        table: As in `Loop`.
        noise: As in `Loop`.
    """

    def __init__(
        self,
        engine: Engine,
        conditions: Mapping[str, Array],
        predict: Predictor,
        table: Table,
        noise: Noise,
    ) -> None:
        super().__init__(predict, table, noise, spec=engine.spec)
        self._engine, self._conditions = engine, conditions
        self._stepper: Stepper | None = None

    def step(self, k: int, x: Samples, before: Samples | None = None) -> Step:  # noqa: ARG002
        """Does transition k in the runtime; out and x_0 come from a call of the network."""
        row = self.table[k - 1]
        out, _ = split_variance(self.predict(x, np.full(len(x), row.t, dtype=np.int64)), x)
        stepper = self._stepper = self._stepper or self._engine.stepper(len(x))
        stepper.start(x, self._conditions)
        stepper.step(row, self.noise(k) if row.x_from_noise else None)
        x0 = predicted_x0(row, x, out)
        return Step(k=k, t=row.t, x_t=x, out=out, x0=x0, x=stepper.read())

    def close(self) -> None:
        """Gives back the state that the runtime keeps."""
        if self._stepper is not None:
            self._stepper.close()
            self._stepper = None


def engine_loop(
    engine: Engine, recipe: Recipe, images: Sequence[int], *, noise: Noise | None = None
) -> Loop:
    """Returns an engine's loop as `sample` runs it, for some images of a recipe.

    Args:
        engine: The network.
        recipe: Sampler, seed and labels.
        images: Indices of the images.
        noise: Drawn elsewhere already; the recipe's own when None.

    Raises:
        EngineInputError: The network does not take these labels or guidance.
        ValueError: The recipe does not fit the network's schedule.
    """
    table = recipe.table(engine.spec)
    predict = recipe.predictor(engine, images)
    noise = noise or shared_noise(recipe, images, engine.spec)
    if recipe.fused(engine):
        return FusedLoop(engine, recipe.conditions(engine, images), predict, table, noise)
    return Loop(predict, table, noise, spec=engine.spec)


def shared_noise(recipe: Recipe, images: Sequence[int], spec: ModelSpec) -> Noise:
    """Returns a recipe's noise, which draws a step once for all who ask for it one after another.

    Nobody may write to what it gives.
    """
    return lru_cache(maxsize=1)(SeededNoise(recipe.seed, images, spec.sample_shape))
