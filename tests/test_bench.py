from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ddpm_deploy import open_engine
from ddpm_deploy.bench import (
    Loop,
    StepTime,
    engine_loop,
    kept,
    measure,
    output_error,
    probe,
)
from ddpm_deploy.engines.pytorch import TorchEngine, torch_loop
from ddpm_deploy.run import Recipe
from tests.support import tiny_network, tiny_spec, write_fused, write_graph


def loop(times: list[float], calls: list[str], name: str) -> Loop:
    """A loop whose every step takes what the list says, and that notes each turn."""

    def run(steps: int) -> Iterator[StepTime]:
        calls.append(f"{name}{steps}")
        for i in range(steps):
            yield StepTime(total=times[i % len(times)], network=times[i % len(times)] / 2)

    return run


def test_median_p90_and_rates_are_those_of_the_steps() -> None:
    loops = {"a": loop([1.0, 2.0, 3.0, 4.0, 10.0], [], "a")}
    (result,) = measure(loops, batch=6, rows={"a": 100}, steps=5, repeat=3, warm_up=1)
    assert (result.name, result.batch, result.steps) == ("a", 6, 15)
    assert result.median == 3.0
    assert result.p90 == np.percentile([1, 2, 3, 4, 10] * 3, 90)
    assert result.steps_per_second == pytest.approx(1 / 3)
    assert result.loop == 3.0 * 100
    assert result.images_per_second == pytest.approx(6 / (3.0 * 100))
    assert result.overhead == 0.5


def test_engines_take_turns_after_each_has_warmed_up() -> None:
    calls: list[str] = []
    loops = {name: loop([1.0], calls, name) for name in ("a", "b")}
    rows = {"a": 10, "b": 10}
    results = list(measure(loops, batch=1, rows=rows, steps=4, repeat=3, warm_up=2))
    assert calls == ["a2", "b2", "a4", "b4", "a4", "b4", "a4", "b4"]
    assert [result.steps for result in results] == [12, 12]


def test_a_loop_that_fails_stops_no_other() -> None:
    def broken(steps: int) -> Iterator[StepTime]:
        yield StepTime(total=1.0, network=1.0)
        if steps == 4:  # not in the warm-up
            raise MemoryError("no room")

    failures: dict[str, Exception] = {}
    loops = {"a": kept(broken, "a", failures), "b": kept(loop([2.0], [], "b"), "b", failures)}
    results = measure(loops, batch=1, rows={"a": 9, "b": 9}, steps=4, repeat=3, warm_up=2)
    assert [(r.name, r.steps) for r in results] == [("a", 1), ("b", 12)]
    assert list(failures) == ["a"]
    assert list(loops["a"](4)) == []  # it is not tried again


def test_a_loop_without_a_step_has_no_figures() -> None:
    results = measure(
        {"a": lambda _: iter(())}, batch=1, rows={"a": 9}, steps=4, repeat=1, warm_up=1
    )
    assert list(results) == []


def test_the_error_of_a_bias_is_the_bias_over_the_peak(tmp_path: Path) -> None:
    spec = tiny_spec(classes=4)
    plain, moved = (
        probe(open_engine(write_graph(tmp_path / f"{b}.onnx", spec, bias=b)), Recipe(), 3)
        for b in (0.0, 0.25)
    )
    peaks = [float(np.abs(out).max()) for out in plain]
    assert len(plain) == 4
    assert output_error(moved, plain) == pytest.approx(0.25 / min(peaks), rel=1e-5)
    assert output_error(plain, plain) == 0


def test_networks_of_other_shapes_have_no_error(tmp_path: Path) -> None:
    small, large = (
        probe(open_engine(write_graph(tmp_path / f"{n}.onnx", tiny_spec(size=n))), Recipe(), 1)
        for n in (8, 16)
    )
    assert output_error(small, large) is None


def test_an_engine_s_loop_is_the_one_that_samples(tmp_path: Path) -> None:
    engine = open_engine(write_graph(tmp_path / "unet.onnx", tiny_spec(classes=4)))
    timed = list(engine_loop(engine, Recipe(), 3)(5))
    assert len(timed) == 5
    for step in timed:
        assert 0 < step.network < step.total
    assert len(list(engine_loop(engine, Recipe(), 3)(100))) == 20  # no more than the whole loop


@pytest.mark.parametrize("classes", [0, 4])
def test_the_torch_loop_steps_as_often(tmp_path: Path, classes: int) -> None:
    network = tiny_network(classes=classes)
    engine = TorchEngine(
        network, tiny_spec(classes=classes), path=tmp_path / "ckpt.pt", device="cpu"
    )
    timed = list(torch_loop(engine, Recipe(), 2)(3))
    assert len(timed) == 3
    assert all(step.total == step.network > 0 for step in timed)


def test_a_fused_engine_s_loop_is_the_fused_one(tmp_path: Path) -> None:
    engine = open_engine(write_fused(tmp_path / "unet.onnx", tiny_spec(classes=4)))
    timed = list(engine_loop(engine, Recipe(), 3)(5))
    assert len(timed) == 5
    assert len(set(timed)) == 1  # a runtime that works later is timed a turn at a time
    assert 0 < timed[0].network < timed[0].total
    assert len(list(engine_loop(engine, Recipe(), 3)(100))) == 20
