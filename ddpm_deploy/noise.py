"""Noise that depends on the seed, the image and the step alone.

Philox is counter-based: any draw can be made without those before it. So an image is the same in
any batch, in any shard of a run, and after any interruption.

References:
    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    Box & Muller 1958, "A note on the generation of random normal deviates".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.arrays import Samples

SCHEME = "philox4x64-box-muller-1"
"""Names how draws are made; it changes whenever the same key would give other numbers."""


class SeededNoise:
    """Standard normal draws for some of the images of a run.

    Args:
        seed: 0 to 2⁶⁴-1.
        images: Indices of the images, each 0 to 2⁶⁴-1.
        shape: Shape of one image.

    Raises:
        ValueError: `seed` or an index is outside its range.

    Example:
        `SeededNoise(7, range(16), (3, 32, 32))(0)` is x_T, float32 (16, 3, 32, 32); `(k)` is the
        noise of the k-th transition, the noisiest being the first.

    Several threads may draw from it at once.
    """

    def __init__(self, seed: int, images: Sequence[int], shape: Sequence[int]) -> None:
        for what, number in [("seed", seed), *(("image index", i) for i in images)]:
            if not 0 <= number < 1 << 64:
                raise ValueError(f"the {what} is {number}; it must lie in 0..2^64-1")
        self.seed = seed
        self.images = images
        self.shape = tuple(shape)

    def __call__(self, step: int) -> Samples:
        """Draws the noise of one step.

        Args:
            step: 0 for x_T, k >= 1 for the k-th transition.

        Returns:
            float32, (N, *shape), standard normal, finite.
        """
        draws = np.empty((len(self.images), *self.shape), dtype=np.float32)
        size = math.prod(self.shape)
        philox = np.random.Philox(key=np.zeros(2, dtype=np.uint64))  # its state is this call's own
        for row, image in enumerate(self.images):
            bits = self._bits(philox, image, step, size + size % 2)
            draws[row] = _box_muller(bits)[:size].reshape(self.shape)
        return draws

    def _bits(
        self, philox: np.random.Philox, image: int, step: int, count: int
    ) -> NDArray[np.uint64]:
        # The counter's low words count blocks within a draw, a higher word the steps.
        philox.state = {
            "bit_generator": "Philox",
            "state": {
                "counter": np.array([0, 0, step, 0], dtype=np.uint64),
                "key": np.array([self.seed, image], dtype=np.uint64),
            },
            "buffer": np.zeros(4, dtype=np.uint64),
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }
        return philox.random_raw(count)


class Ahead:
    """Noise that is drawn in threads, ahead of the loop that asks for it: the same numbers, sooner.

    While step k runs, the noise of the next steps is drawn. A context: at its end, also after an
    error or Ctrl-C, what was not asked for is dropped and the threads have ended.

    Args:
        noise: Draws for a step number, from any thread; `SeededNoise` does.
        steps: The steps that will be asked for, in order. Others are drawn when they are asked for.
        threads: How many draw at once, each a step of its own; 0 draws in the caller's.
    """

    def __init__(
        self, noise: Callable[[int], Samples], steps: Sequence[int], *, threads: int = 1
    ) -> None:
        self._noise = noise
        self._steps = iter(steps)
        self._drawn: dict[int, Future[Samples]] = {}
        self._pool = ThreadPoolExecutor(threads, "noise") if threads else None
        self._begin(threads)

    def __call__(self, step: int) -> Samples:
        """Gives the noise of one step, as `noise` itself would."""
        future = self._drawn.pop(step, None)
        if future is None:
            return self._noise(step)
        self._begin(1)
        return future.result()

    def _begin(self, count: int) -> None:
        if self._pool is not None:
            for step in islice(self._steps, count):
                self._drawn[step] = self._pool.submit(self._noise, step)

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _box_muller(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Turns an even number of 64-bit words into as many normal numbers.

    NumPy keeps the words of Philox the same for ever, but not what `Generator` makes of them.
    """
    uniform = ((bits >> np.uint64(11)) + np.uint64(1)).astype(np.float64) * 2.0**-53  # (0, 1]
    radius = np.sqrt(-2.0 * np.log(uniform[0::2]))
    angle = 2.0 * math.pi * uniform[1::2]
    normal = np.empty_like(uniform)
    normal[0::2] = radius * np.cos(angle)
    normal[1::2] = radius * np.sin(angle)
    return normal
