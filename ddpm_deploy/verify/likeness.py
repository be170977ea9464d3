"""How like float32's an engine's pictures are after a short loop, and what its output is off by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ddpm_deploy.arrays import Array, Samples, Timesteps
from ddpm_deploy.engines.base import Engine
from ddpm_deploy.images import is_picture, to_pixels
from ddpm_deploy.noise import SeededNoise
from ddpm_deploy.parity import example_conditions
from ddpm_deploy.run import Recipe, sample
from ddpm_deploy.sampling import SelfConditioned, denoise
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.verify.measures import Errors, PictureErrors

STEPS = 50
IMAGES = 2

SHIFT_STEPS = 12
SHIFT_IMAGES = 4
_SHIFT_SEED = 1  # other noise than that of the pictures that are judged


@dataclass(frozen=True, kw_only=True)
class Exact:
    """An engine that others are compared with; opened when it is first asked.

    Attributes:
        opened: Opens it.
    """

    opened: Callable[[], Engine]

    def psnr(self, engine: Engine) -> float:
        """Returns the decibels of the worst sample of an engine's short loop."""
        return psnr(short_loop(engine), self._samples, engine.spec)

    def shift(self, engine: Engine) -> Array:
        """Returns what each channel of an engine's output is too large by, in the mean.

        Over the x_t of a loop of `SHIFT_STEPS` steps, `SHIFT_IMAGES` samples at each. Rounding
        moves a mean a little, always to the same side, and a loop adds that up.

        Returns:
            float64, (output channels,).

        References:
            Nagel et al. 2019, https://arxiv.org/abs/1906.04721, section 4.2.
        """
        means = []
        for x, t, conditions, out in self._calls:
            error = engine(x, t, **conditions) - out
            over = (0, *range(2, error.ndim))
            means.append(error.mean(axis=over, dtype=np.float64))
        return np.asarray(np.mean(means, axis=0))

    @cached_property
    def _samples(self) -> Samples:
        with self.opened() as engine:
            return short_loop(engine)

    @cached_property
    def _calls(self) -> list[tuple[Samples, Timesteps, Mapping[str, Array], Samples]]:
        with self.opened() as engine:
            recipe = _recipe(engine.spec, SHIFT_STEPS, seed=_SHIFT_SEED)
            images = range(SHIFT_IMAGES)
            conditions = recipe.conditions(engine, images)
            noise = SeededNoise(_SHIFT_SEED, images, engine.spec.sample_shape)
            sees = engine.spec.self_condition
            found: list[tuple[Samples, Timesteps, Mapping[str, Array], Samples]] = []

            def kept(x: Samples, t: Timesteps, before: Samples | None = None) -> Samples:
                seen = dict(conditions)
                if sees is not None:
                    seen[sees.name] = np.zeros_like(x) if before is None else before
                found.append((x, t, seen, engine(x, t, **seen)))
                return found[-1][-1]

            predictor = kept if sees is None else SelfConditioned(predict=kept)
            for _ in denoise(predictor, recipe.table(engine.spec), noise):
                pass
            return found


def short_loop(engine: Engine, *, steps: int = STEPS, images: int = IMAGES) -> Samples:
    """Draws a few samples with DDIM, whatever the family's own loop is.

    Args:
        engine: The network.
        steps: Transitions; all T where T is fewer.
        images: How many.

    Returns:
        float32, (images, *sample_shape).

    Raises:
        EngineError: The engine failed.
    """
    return sample(engine, _recipe(engine.spec, steps, seed=0), range(images))


def _recipe(spec: ModelSpec, steps: int, *, seed: int) -> Recipe:
    """Returns a DDIM loop, observing standard normal numbers where the network observes."""
    drawn = example_conditions(spec, SHIFT_IMAGES)
    observed = {
        c.name: tuple(tuple(row) for row in drawn[c.name].reshape(SHIFT_IMAGES, -1).tolist())
        for c in spec.observations
    }
    steps = min(steps, spec.schedule.T)
    return Recipe(sampler="ddim", steps=steps, eta=0.0, seed=seed, observations=observed)


def psnr(given: Samples, wanted: Samples, spec: ModelSpec) -> float:
    """Returns the decibels of the worst sample: of 8-bit values for pictures, else over the peak.

    Infinite where all are equal, and minus infinity where something is not finite.
    """
    if not np.isfinite(given).all():
        return float("-inf")
    if is_picture(spec.sample_shape):
        pixels = [to_pixels(x, value_range=spec.value_range) for x in (given, wanted)]
        return min(PictureErrors.between(*pixels).psnr)
    return Errors.between(given, wanted).psnr
