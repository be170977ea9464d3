from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ddpm_deploy import open_engine
from ddpm_deploy.bench import Loop, StepTime, engine_loop, measure
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
    assert result.images_per_second == pytest.approx(6 / (3.0 * 100))
    assert result.overhead == 0.5


def test_engines_take_turns_after_each_has_warmed_up() -> None:
    calls: list[str] = []
    loops = {name: loop([1.0], calls, name) for name in ("a", "b")}
    rows = {"a": 10, "b": 10}
    results = list(measure(loops, batch=1, rows=rows, steps=4, repeat=3, warm_up=2))
    assert calls == ["a2", "b2", "a4", "b4", "a4", "b4", "a4", "b4"]
    assert [result.steps for result in results] == [12, 12]


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
