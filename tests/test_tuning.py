"""The choice of a batch, on engines whose time and memory are computed and not measured."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from ddpm_deploy import Engine, open_engine
from ddpm_deploy.arrays import Array, Samples
from ddpm_deploy.errors import EngineError
from ddpm_deploy.tuning import (
    BatchTime,
    available_memory,
    best_batch,
    expected_memory,
    resident_memory,
)
from tests.support import conditioned_spec, tiny_spec, write_conditioned, write_graph

MIB = 2**20


class Computed(Engine):
    """An engine on a machine of its own, whose clock and memory move when it is called.

    Args:
        seconds: What a call of a batch takes.
        memory: Bytes that are held after it.
    """

    name = "computed"

    def __init__(self, seconds: Callable[[int], float], memory: Callable[[int], int]) -> None:
        self.spec, self.path = tiny_spec(), Path("computed.onnx")
        self._seconds, self._memory = seconds, memory
        self.now, self.held = 0.0, 100 * MIB
        self.called: list[int] = []

    def _run(self, feeds: Mapping[str, Array]) -> Samples:
        n = len(feeds["x"])
        self.called.append(n)
        self.now += self._seconds(n)
        self.held = max(self.held, 100 * MIB + self._memory(n))
        return np.zeros_like(feeds["x"])

    def best(self, memory_limit: int = 1000 * MIB, **settings: float) -> int:
        return best_batch(
            self,
            memory_limit=memory_limit,
            clock=lambda: self.now,
            resident=lambda: self.held,
            **settings,  # type: ignore[arg-type]
        )


def an_image(n: int) -> int:
    return 10 * MIB * n


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        (lambda n: 0.010 * n, 1),  # full at one: more gives nothing
        (lambda n: 0.010 + 0.0001 * n, 64),  # a call's own cost, shared by all
        (lambda n: 0.010 * max(n, 4), 4),  # full at four
        (lambda n: 0.010 * max(n, 4) * (0.98 if n == 16 else 1), 4),  # 2 % are not worth 16
        (lambda n: 0.010 * max(n, 4) * (0.9 if n == 16 else 1), 16),  # 10 % are
        (lambda n: 0.010 * n * (2 if n > 8 else 1) * (1 if n > 1 else 3), 2),
    ],
)
def test_the_smallest_batch_within_three_percent_of_the_best_is_taken(
    seconds: Callable[[int], float], best: int
) -> None:
    assert Computed(seconds, an_image).best() == best


@pytest.mark.parametrize(("limit", "best"), [(5, 1), (10, 1), (39, 2), (40, 4), (639, 32)])
def test_no_batch_is_tried_that_the_memory_does_not_hold(limit: int, best: int) -> None:
    engine = Computed(lambda n: 0.010 + 0.0001 * n, an_image)
    assert engine.best(limit * MIB) == best
    assert max(engine.called) == best


def test_memory_that_grows_faster_than_expected_counts_when_it_is_seen() -> None:
    engine = Computed(lambda n: 0.010 + 0.0001 * n, lambda n: 10 * MIB * n * (n if n > 4 else 1))
    assert engine.best(200 * MIB) == 4
    assert max(engine.called) == 8


def test_what_a_batch_costs_besides_its_images_is_not_counted_twice() -> None:
    tried = [
        BatchTime(batch=1, seconds=1, memory=130 * MIB),
        BatchTime(batch=2, seconds=1, memory=160 * MIB),
    ]
    assert expected_memory(tried[:1], 2) == 260 * MIB  # of one, nothing tells them apart
    assert expected_memory(tried, 4) == 220 * MIB


def test_the_search_ends_where_more_images_are_slower() -> None:
    engine = Computed(lambda n: 0.010 * n * n, an_image)
    assert engine.best() == 1
    assert max(engine.called) == 4


def test_the_search_ends_before_calls_that_would_take_too_long() -> None:
    engine = Computed(lambda n: 0.5 * n + 0.5, an_image)
    assert engine.best(longest=10) == 2  # 4 calls of 1.5 s; of 4 images 4 of 3 s
    assert engine.now < 11


def test_a_batch_that_runs_out_of_memory_ends_the_search() -> None:
    class Small(Computed):
        def _run(self, feeds: Mapping[str, Array]) -> Samples:
            if len(feeds["x"]) > 8:
                raise EngineError("ran out of memory")
            return super()._run(feeds)

    assert Small(lambda n: 0.010 + 0.0001 * n, lambda _: 0).best() == 8


def test_a_network_that_runs_no_batch_is_an_error() -> None:
    class Broken(Computed):
        def _run(self, feeds: Mapping[str, Array]) -> Samples:
            raise EngineError(f"no kernel for {len(feeds)} inputs")

    with pytest.raises(EngineError, match="no kernel for 2 inputs"):
        Broken(lambda _: 0.0, an_image).best()


def test_each_measurement_is_told() -> None:
    told: list[BatchTime] = []
    engine = Computed(lambda n: 0.010 * max(n, 2), an_image)
    limit, clock = 1000 * MIB, lambda: engine.now
    chosen = best_batch(
        engine,
        memory_limit=limit,
        largest=4,
        on_progress=told.append,
        clock=clock,
        resident=lambda: engine.held,
    )
    assert chosen == 2
    assert [(e.batch, e.memory // MIB) for e in told] == [(1, 10), (2, 20), (4, 40)]
    assert [e.images_per_second for e in told] == pytest.approx([50, 100, 100])


@pytest.mark.parametrize("classes", [0, 3])
def test_a_real_engine_has_a_best_batch(tmp_path: Path, classes: int) -> None:
    with open_engine(write_graph(tmp_path / "unet.onnx", tiny_spec(classes=classes))) as engine:
        assert best_batch(engine, largest=8) in {1, 2, 4, 8}
    spec = conditioned_spec()
    with open_engine(write_conditioned(tmp_path / "policy.onnx", spec)) as engine:
        assert best_batch(engine, largest=2, memory_limit=2**30) in {1, 2}


def test_what_is_available_is_the_least_of_the_machine_s_and_the_container_s(
    tmp_path: Path,
) -> None:
    assert available_memory(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    assert available_memory(tmp_path) == 4000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("500000\n")
    assert available_memory(tmp_path) == 4000 * 1024
    (group / "memory.max").write_text("1500000\n")
    assert available_memory(tmp_path) == 1_000_000


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux has this file")
def test_the_memory_that_is_held_grows_with_what_is_written() -> None:
    before = resident_memory()
    written = np.ones(64 * MIB, dtype=np.uint8)  # above what malloc keeps for itself
    assert before + written.nbytes // 2 < resident_memory()
    assert before > os.sysconf("SC_PAGE_SIZE")
