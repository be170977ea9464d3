"""How like another engine's an engine's pictures are, in decibels, after a short loop."""

from __future__ import annotations

import numpy as np

from ddpm_deploy.arrays import Samples
from ddpm_deploy.engines.base import Engine
from ddpm_deploy.images import is_picture, to_pixels
from ddpm_deploy.run import Recipe, sample
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.verify.measures import Errors, PictureErrors

STEPS = 50
IMAGES = 2


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
    steps = min(steps, engine.spec.schedule.T)
    return sample(engine, Recipe(sampler="ddim", steps=steps, eta=0.0), range(images))


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
