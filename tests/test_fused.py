from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from ddpm_deploy import Transition, ddim, linear, open_engine
from ddpm_deploy.arrays import Array, Samples
from ddpm_deploy.engines.base import Stepper
from ddpm_deploy.errors import SpecError
from ddpm_deploy.fused import COLUMNS, denoise_fused, is_fused, noise_threads, row_of, step_to_json
from tests.support import tiny_spec, write_graph

ROW = Transition(
    t=4,
    s=3,
    x0_from_x=1.5,
    x0_from_out=-0.25,
    clip=1.0,
    x_from_x0=0.5,
    x_from_x=0.75,
    x_from_out=-2.0,
    x_from_noise=0.125,
)


def test_a_row_has_its_numbers_in_the_documented_order() -> None:
    row = row_of(ROW)
    assert row.dtype == np.float32
    assert row.tolist() == [1.5, -0.25, 1.0, 0.5, 0.75, -2.0, 0.125, 0.0, 0.0]
    assert len(COLUMNS) == len(row)


def test_a_row_without_clipping_has_infinite_bounds() -> None:
    unclipped = Transition(
        t=0, s=-1, x0_from_x=1, x0_from_out=0, clip=None, x_from_x0=1, x_from_x=0
    )
    assert math.isinf(row_of(unclipped)[2])


@pytest.mark.parametrize(("noise", "expected"), [(1.0, [1.0, -3.5, 0.5]), (0.0, [0.0, 0.0, 0.0])])
def test_a_learned_variance_stands_in_the_row_where_noise_is_added(
    noise: float, expected: list[float]
) -> None:
    learned = replace(ROW, x_from_noise=noise, log_std=(-3.5, 0.5))
    assert row_of(learned)[-3:].tolist() == expected


def test_a_graph_says_whether_it_is_fused() -> None:
    assert is_fused(step_to_json(), source="unet.onnx")
    assert not is_fused(None, source="unet.onnx")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"format": 2}',
            r"The fused step in unet\.onnx has format 2; this release reads format 1",
        ),
        ("{}", r"unet\.onnx says that its step is fused, but not how \(KeyError\('format'\)\)"),
        ("fused", r"unet\.onnx says that its step is fused, but not how"),
        ("[]", r"unet\.onnx says that its step is fused, but not how"),
    ],
)
def test_a_step_of_another_format_is_refused(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        is_fused(text, source="unet.onnx")


class Adding(Stepper):
    """Adds the noise to its state, and notes the timesteps."""

    def __init__(self) -> None:
        self.x = np.zeros((1, 2), dtype=np.float32)
        self.steps: list[tuple[int, bool]] = []

    def start(self, x: Samples, conditions: Mapping[str, Array]) -> None:
        self.x = x

    def step(self, row: Transition, z: Samples | None) -> None:
        self.steps.append((row.t, z is not None))
        if z is not None:
            self.x = self.x + z

    def read(self) -> Samples:
        return self.x

    def close(self) -> None:
        pass


def _constant(k: int) -> Samples:
    return np.full((1, 2), k, dtype=np.float32)


TABLE = ddim(linear(20), 5, eta=0.5)


@pytest.mark.parametrize("threads", [0, 1, 3, 8])
def test_every_step_gets_its_own_noise_and_the_last_none(threads: int) -> None:
    stepper = Adding()
    visited = list(denoise_fused(stepper, TABLE, _constant, threads=threads))
    assert visited == [(1, 16), (2, 12), (3, 8), (4, 4), (5, 0)]
    assert stepper.steps == [(16, True), (12, True), (8, True), (4, True), (0, False)]
    assert stepper.read().tolist() == [[1 + 2 + 3 + 4] * 2]


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_loop_that_is_left_early_leaves_no_thread(after: int) -> None:
    before = threading.active_count()
    loop = denoise_fused(Adding(), TABLE, _constant)
    assert len(list(islice(loop, after))) == after
    loop.close()
    assert threading.active_count() == before


def test_an_error_in_the_loop_leaves_no_thread() -> None:
    class Failing(Adding):
        def step(self, row: Transition, z: Samples | None) -> None:
            if row.t == 8:
                raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        list(denoise_fused(Failing(), TABLE, _constant))
    assert threading.active_count() == before


def test_more_threads_draw_noise_for_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    with open_engine(write_graph(tmp_path / "unet.onnx", tiny_spec())) as engine:
        assert noise_threads(engine) == 1
        engine.on_gpu = True
        assert noise_threads(engine) == 4
        monkeypatch.setattr("os.cpu_count", lambda: 1)
        assert noise_threads(engine) == 1
        engine.on_gpu = False
        assert noise_threads(engine) == 0
