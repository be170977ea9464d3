"""Noise that depends on the seed, the image and the step alone.

Philox is counter-based: any draw can be made without those before it. So an image is the same in
any batch, in any shard of a run, and after any interruption.

References:
    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    Box & Muller 1958, "A note on the generation of random normal deviates".
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.arrays import Samples

SCHEME = "philox4x64-box-muller-1"
"""Names how draws are made; it changes whenever the same key would give other numbers."""

_TOGETHER = 2**14
"""Numbers that are drawn together: their words and what is made of them take 320 KiB."""

_NO_WORDS = np.zeros(2, dtype=np.uint64)


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
        draws: Samples = self.of([step])[0]
        return draws

    def of(self, steps: Sequence[int]) -> Samples:
        """Draws the noise of several steps at once, which takes less time where each is small.

        Args:
            steps: As for a call.

        Returns:
            float32, (len(steps), N, *shape): the same numbers as from a call each.
        """
        count = len(self.images)
        draws = np.empty((len(steps), count, *self.shape), np.float32)
        size = math.prod(self.shape)
        rows = draws.reshape(len(steps) * count, size)
        whole = size + size % 2
        # Some rows at a time, so that what lies between words and numbers stays in the cache.
        group = max(1, min(len(rows), _TOGETHER // whole))
        bits = np.empty((group, whole), np.uint64)
        halves = np.empty((3, group, whole // 2), np.float64)
        words = _Words(self.seed)
        for first in range(0, len(rows), group):
            some = range(first, min(first + group, len(rows)))
            for row in some:
                bits[row - first] = words(self.images[row % count], steps[row // count], whole)
            n = len(some)
            _box_muller(bits[:n], halves[:, :n], rows[first : first + n])
        return draws

    @property
    def together(self) -> int:
        """How many steps are worth drawing at once: one where a step is some thousand numbers."""
        return max(1, _TOGETHER // max(1, len(self.images) * math.prod(self.shape)))


class _Words:
    """The 64-bit words that a seed's draws are made of; used by one thread."""

    def __init__(self, seed: int) -> None:
        self._philox = np.random.Philox(key=_NO_WORDS)
        self._key = [seed, 0]
        self._counter = [0, 0, 0, 0]
        # Python's numbers: NumPy reads them faster out of a list than its own out of an array.
        self._state: Any = {
            "bit_generator": "Philox",
            "state": {"counter": self._counter, "key": self._key},
            "buffer": [0, 0, 0, 0],
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }

    def __call__(self, image: int, step: int, count: int) -> NDArray[np.uint64]:
        # The counter's low words count blocks within a draw, a higher word the steps.
        self._key[1], self._counter[2] = image, step
        self._philox.state = self._state
        return self._philox.random_raw(count)


class Ahead:
    """Noise that is drawn ahead of the loop that asks for it: the same numbers, sooner.

    While a step runs, the noise of the next is drawn in threads; of several steps together where
    each is small. A context: at its end, also after an error or Ctrl-C, what was not asked for is
    dropped and the threads have ended.

    Args:
        noise: Draws for a step number, from any thread; `SeededNoise` does.
        steps: The steps that will be asked for, in order. Others are drawn when they are asked for.
        threads: How many draw at once, each steps of its own; 0 draws in the caller's.
    """

    def __init__(
        self, noise: Callable[[int], Samples], steps: Sequence[int], *, threads: int = 1
    ) -> None:
        self._noise = noise
        size = noise.together if isinstance(noise, SeededNoise) else 1
        self._groups = deque(steps[i : i + size] for i in range(0, len(steps), size))
        self._drawn: dict[int, tuple[int, Future[Sequence[Samples]]]] = {}
        self._pool = ThreadPoolExecutor(threads, "noise") if threads else None
        self._begin(threads)

    def __call__(self, step: int) -> Samples:
        """Gives the noise of one step, as `noise` itself would."""
        if self._pool is None and self._groups and step == self._groups[0][0]:
            self._begin(1)
        if step not in self._drawn:
            return self._noise(step)
        place, future = self._drawn.pop(step)
        if place == 0 and self._pool is not None:
            self._begin(1)
        return future.result()[place]

    def _begin(self, count: int) -> None:
        for _ in range(min(count, len(self._groups))):
            group = self._groups.popleft()
            if self._pool is not None:
                future = self._pool.submit(self._draw, group)
            else:
                future = Future()
                future.set_result(self._draw(group))
            self._drawn |= {step: (place, future) for place, step in enumerate(group)}

    def _draw(self, group: Sequence[int]) -> Sequence[Samples]:
        if isinstance(self._noise, SeededNoise):
            return list(self._noise.of(group))
        return [self._noise(step) for step in group]

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _box_muller(
    bits: NDArray[np.uint64], halves: NDArray[np.float64], normal: NDArray[np.float32]
) -> None:
    """Turns pairs of 64-bit words into pairs of normal numbers, computed in float64.

    NumPy keeps the words of Philox the same for ever, but not what `Generator` makes of them.

    Args:
        bits: (n, an even number of words); lost.
        halves: (3, n, pairs): memory to compute in.
        normal: (n, size): where the numbers go; of an odd size the last one is dropped.
    """
    radius, angle, of_angle = halves
    bits >>= np.uint64(11)
    bits += np.uint64(1)
    numbers = bits.view(np.int64)  # which processors turn into floats faster; none is above 2^53
    np.multiply(numbers[:, 0::2], 2.0**-53, out=radius)  # (0, 1]
    np.log(radius, out=radius)
    radius *= -2.0
    np.sqrt(radius, out=radius)
    np.multiply(numbers[:, 1::2], 2.0**-53, out=angle)
    angle *= 2.0 * math.pi
    for function, given in ((np.cos, normal[:, 0::2]), (np.sin, normal[:, 1::2])):
        function(angle, out=of_angle)
        of_angle *= radius
        given[:] = of_angle[:, : given.shape[1]]
