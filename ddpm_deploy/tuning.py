"""The batch at which an engine draws most images a second, measured within a memory limit."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ddpm_deploy.engines.base import Engine
from ddpm_deploy.errors import EngineError
from ddpm_deploy.noise import SeededNoise
from ddpm_deploy.parity import example_conditions

LARGEST = 64
"""The largest batch that is tried: where a processor is not full by then, it is not by its size."""

LONGEST = 20.0
"""Seconds that the calls of one batch may take: a larger one could only save a share of a step."""

_CALLS = 3
_ALIKE = 0.03
_UNKNOWN_LIMIT = 2**30


@dataclass(frozen=True, kw_only=True)
class BatchTime:
    """What was measured of one batch.

    Attributes:
        batch: Images at once.
        seconds: The fastest of its calls.
        memory: Bytes that the process has grown by since before the first batch.
    """

    batch: int
    seconds: float
    memory: int

    @property
    def images_per_second(self) -> float:
        """Steps of one image a second."""
        return self.batch / self.seconds


def best_batch(
    engine: Engine,
    *,
    memory_limit: int | None = None,
    largest: int = LARGEST,
    longest: float = LONGEST,
    on_progress: Callable[[BatchTime], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    resident: Callable[[], int] | None = None,
) -> int:
    """Measures powers of two and returns the batch with most images a second.

    A batch is not tried where what the smaller ones took says that it would need more memory than
    there is, or too long; nor after two that were slower by the image than one before.

    Args:
        engine: The network.
        memory_limit: Bytes that the process may grow by; half of what is available when None.
        largest: The largest batch to try.
        longest: Seconds that the calls of a batch may take.
        on_progress: Called with each measurement.
        clock: Seconds, from any start.
        resident: Bytes that the process holds; what the system says when None.

    Returns:
        The smallest batch whose images a second are within 3 % of the best: more images at once
        take more memory, and the first comes later.

    Raises:
        EngineError: The network does not run a batch of one.
    """
    limit = memory_limit if memory_limit is not None else _half_of_what_is_available()
    held = resident if resident is not None else resident_memory
    before = held()
    tried: list[BatchTime] = []
    batch = 1
    while batch <= largest and _is_worth_trying(batch, tried, limit, longest):
        try:
            seconds = _seconds(engine, batch, clock)
        except (EngineError, MemoryError):
            if not tried:
                raise
            break  # no memory for so many
        tried.append(BatchTime(batch=batch, seconds=seconds, memory=max(0, held() - before)))
        if on_progress is not None:
            on_progress(tried[-1])
        batch *= 2
    fits = [each for each in tried if each.memory <= limit] or tried[:1]
    best = max(each.images_per_second for each in fits)
    return next(e.batch for e in fits if e.images_per_second >= (1 - _ALIKE) * best)


def expected_memory(tried: list[BatchTime], batch: int) -> int:
    """Returns the bytes that a batch will take, by the line through the last two measured."""
    last = tried[-1]
    if len(tried) == 1:
        return last.memory * batch // last.batch
    earlier = tried[-2]
    an_image = max(0, last.memory - earlier.memory) / (last.batch - earlier.batch)
    return int(last.memory + an_image * (batch - last.batch))


def _is_worth_trying(batch: int, tried: list[BatchTime], limit: int, longest: float) -> bool:
    if not tried:
        return True
    if expected_memory(tried, batch) > limit:
        return False
    last = tried[-1]
    if (1 + _CALLS) * last.seconds * batch / last.batch > longest:
        return False
    best = max(each.images_per_second for each in tried)
    return any(each.images_per_second >= (1 - _ALIKE) * best for each in tried[-2:])


def _seconds(engine: Engine, batch: int, clock: Callable[[], float]) -> float:
    """Returns the fastest of a few calls, after one that is not counted."""
    spec = engine.spec
    x = SeededNoise(0, range(batch), spec.sample_shape)(0)
    t = np.full(batch, spec.schedule.T // 2, dtype=np.int64)
    conditions = example_conditions(spec, batch)
    engine(x, t, **conditions)
    taken = []
    for _ in range(_CALLS):
        start = clock()
        engine(x, t, **conditions)
        taken.append(clock() - start)
    return max(min(taken), 1e-9)


def _half_of_what_is_available() -> int:
    available = available_memory()
    return _UNKNOWN_LIMIT if available is None else available // 2


def available_memory(root: Path = Path("/")) -> int | None:
    """Returns the bytes that a process may take now; None where the system does not say.

    Of what Linux has and what the process's control group may have, as in a container, the least.
    """
    limits = []
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    if found:
        limits.append(int(found.group(1)) * 1024)
    group = root / "sys/fs/cgroup"
    most, used = _read(group / "memory.max").strip(), _read(group / "memory.current").strip()
    if most.isdecimal() and used.isdecimal():
        # Pages of files that nobody reads now are counted, and given back when they are wanted.
        idle = re.search(r"^inactive_file (\d+)", _read(group / "memory.stat"), re.MULTILINE)
        free = int(most) - int(used) + (int(idle.group(1)) if idle else 0)
        limits.append(max(0, free))
    return min(limits, default=None)


def resident_memory() -> int:
    """Returns the bytes of memory that this process holds; 0 where the system does not say."""
    pages = _read(Path("/proc/self/statm")).split()
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if len(pages) > 1 else 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
