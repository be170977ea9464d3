"""What each step sees: pictures, labels, timesteps and noise, drawn from (seed, step) alone.

So a resumed run goes on as if it had never stopped, and each of several processes takes its part of
the batch that one process would have had.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import count

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.arrays import Samples, Timesteps
from ddpm_deploy.data import ImageData
from ddpm_deploy.noise import SeededNoise

NOISE_STEP = 1 << 62
"""Step of `SeededNoise` that training draws, so that no noise is one that a sampler starts from."""

_ORDER, _DRAWS = 1, 2
"""Words of the counter that keep the streams of a seed apart; `SeededNoise` has word 0."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One process's part of what a step sees.

    Attributes:
        x0: float32, (n, C, H, W), in [-1, 1].
        t: int64, (n,), uniform over 0 to T-1.
        eps: float32, (n, C, H, W), standard normal.
        y: int64, (n,): labels, the dropped ones replaced by the null label; None without labels.
    """

    x0: Samples
    t: Timesteps
    eps: Samples
    y: NDArray[np.int64] | None


@dataclass(frozen=True, kw_only=True)
class Batches:
    """The batches of a run.

    Attributes:
        data: Where the pictures come from.
        seed: Of every draw.
        batch: Pictures a step, over all processes.
        timesteps: T.
        flip: Mirror every second picture.
        drop_label: Share of labels to hide.
        classes: Number of classes, also the null label; 0 leaves labels out.
        rank: This process, 0 to `world` - 1.
        world: Number of processes; it divides `batch`.
    """

    data: ImageData
    seed: int
    batch: int
    timesteps: int
    flip: bool
    drop_label: float
    classes: int
    rank: int = 0
    world: int = 1

    def at(self, step: int) -> Batch:
        """Draws the batch of one step, the first step being 0.

        Raises:
            DataError: A picture cannot be read.
        """
        share = self.batch // self.world
        mine = slice(self.rank * share, (self.rank + 1) * share)
        first = step * self.batch
        numbers = range(first, first + self.batch)[mine]

        draws = _generator(self.seed, _DRAWS, step)
        t = draws.integers(self.timesteps, size=self.batch)[mine]
        dropped = draws.random(self.batch)[mine] < self.drop_label
        flipped = draws.random(self.batch)[mine] < 0.5

        indices = self._pictures(numbers)
        x0 = self.data.load(indices)
        if self.flip:
            x0[flipped] = x0[flipped, :, :, ::-1]
        y = None
        if self.classes and self.data.labels is not None:
            y = np.where(dropped, self.classes, self.data.labels[indices])
        eps = SeededNoise(self.seed, numbers, self.data.sample_shape)(NOISE_STEP)
        return Batch(x0=x0, t=t, eps=eps, y=y)

    def stream(self, start: int) -> Iterator[Batch]:
        """Draws the batches from step `start` on, each while the one before is used."""
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as worker:
            ahead = worker.submit(self.at, start)
            for step in count(start + 1):
                batch = ahead.result()
                ahead = worker.submit(self.at, step)
                yield batch

    def _pictures(self, numbers: range) -> NDArray[np.int64]:
        """Picks the pictures for samples of the run: every picture once an epoch, shuffled anew."""
        size = len(self.data)
        return np.array(
            [_order(self.seed, n // size, size)[n % size] for n in numbers], dtype=np.int64
        )


def _generator(seed: int, stream: int, number: int) -> np.random.Generator:
    counter = np.array([0, 0, number, stream], dtype=np.uint64)
    key = np.array([seed, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    return _generator(seed, _ORDER, epoch).permutation(size)
