"""A cause that is said for certain is the right one: a wrong one is worse than none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ddpm_deploy import Recipe, SeededNoise, open_engine
from ddpm_deploy.arrays import Array, Samples
from ddpm_deploy.verify import Budget, Loop
from ddpm_deploy.verify.compare import Side
from ddpm_deploy.verify.verification import Verification, verify
from tests.support import tiny_spec, write_graph
from tests.verify.faults import World, Wrong

FULL = Recipe(sampler="ddpm")
SHORT = Recipe(sampler="ddim", steps=5)
ONE = Recipe(sampler="ddim", steps=1)
LAST = 19


@pytest.fixture
def world(tmp_path: Path) -> Callable[[Recipe], World]:
    """A labelled network of 20 timesteps, whose full loop takes a moment."""
    path = write_graph(tmp_path / "unet.onnx", tiny_spec(classes=4))
    return lambda recipe: World(good=open_engine(path), recipe=recipe, images=range(3))


def found(side: Side, world: World, budget: Budget | None = None) -> Verification:
    verified = verify(side, world.good, world.recipe, world.images, budget=budget)
    assert not verified.passed
    return verified


def certain(verified: Verification) -> list[str]:
    return [cause.name for cause in verified.causes if cause.certain]


def right(world: World) -> SeededNoise:
    return SeededNoise(world.recipe.seed, world.images, world.good.spec.sample_shape)


def uniform(world: World) -> Loop:
    shape = (len(world.images), *world.good.spec.sample_shape)

    def draw(k: int) -> Samples:
        noise = np.random.default_rng(k).uniform(-(3**0.5), 3**0.5, shape)
        return right(world)(k) if k == 0 else noise.astype(np.float32)

    return world.loop(noise=draw)


def one_image(world: World) -> Loop:
    other = SeededNoise(77, world.images, world.good.spec.sample_shape)
    return world.loop(noise=lambda k: np.concatenate([right(world)(k)[:2], other(k)[2:]]))


def one_row(world: World) -> Loop:
    rows = world.table()
    rows[10] = replace(rows[10], x_from_x0=1.2 * rows[10].x_from_x0)
    return world.loop(table=rows)


LOOPS: dict[str, Callable[[World], Loop]] = {
    "uniform noise": uniform,
    "noise cut at 2 σ": lambda w: w.loop(noise=lambda k: np.clip(right(w)(k), -2, 2)),
    "noise in fp16": lambda w: w.loop(
        noise=lambda k: right(w)(k).astype(np.float16).astype(np.float32)
    ),
    "noise of one image": one_image,
    "x_t · 1.001": lambda w: w.loop(table=w.table(x_from_x=lambda row: 1.001 * row.x_from_x)),
    "one row": one_row,
    "clip at 0.9": lambda w: w.other_spec(clip=0.9),
}
"""Faults of a loop that no suspect is."""


@pytest.mark.parametrize("fault", LOOPS)
def test_an_unknown_fault_of_a_loop_is_not_called_another(
    world: Callable[[Recipe], World], fault: str
) -> None:
    # Over all timesteps no step can end one above the next: that suspect has no rows.
    planted = world(FULL)
    causes = found(LOOPS[fault](planted), planted).causes
    assert causes
    assert not any(cause.certain for cause in causes)


def test_noise_of_one_image_is_not_called_that_of_the_batch(
    world: Callable[[Recipe], World],
) -> None:
    planted = world(SHORT)
    assert [c.name for c in found(one_image(planted), planted).causes] == ["other-noise"]


@pytest.mark.parametrize("k", [0, 5])
def test_noise_that_is_missing_is_not_called_shared(
    world: Callable[[Recipe], World], k: int
) -> None:
    planted = world(FULL)
    loop = planted.loop(noise=lambda at: right(planted)(at) * np.float32(at != k))
    assert certain(found(loop, planted)) == ["no-noise"]


def test_a_loop_that_starts_late_is_not_called_a_shifted_timestep(
    world: Callable[[Recipe], World],
) -> None:
    planted = world(FULL)
    causes = found(planted.loop(table=planted.table()[1:]), planted).causes
    assert [cause.name for cause in causes] == ["other-timesteps"]


Out = Callable[[Samples, Samples, Array], Samples]


def noisy(size: float, t_bad: int | None = None) -> Out:
    """Adds the same noise to each output, or to that at one timestep."""

    def out(out: Samples, x: Samples, t: Array) -> Samples:
        error = np.random.default_rng(0).standard_normal(out.shape) * size
        here = 1.0 if t_bad is None else (t == t_bad).reshape(-1, 1, 1, 1)
        return np.asarray(out + error * here, np.float32)

    return out


@pytest.mark.parametrize("t_bad", [0, 7, LAST])
def test_an_error_at_one_timestep_is_not_called_a_shift(
    world: Callable[[Recipe], World], t_bad: int
) -> None:
    # t-1 is not there at t = 0, nor t+1 at the other end; elsewhere a shift would do harm.
    planted = world(FULL)
    assert certain(found(Wrong(planted.good, out=noisy(0.3, t_bad)), planted)) == []


@pytest.mark.parametrize("size", [1e-3, 3e-3, 1e-2, 3e-2, 1e-1])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16", "int8"])
def test_noise_beyond_a_wide_budget_is_not_called_a_fault_of_the_input(
    world: Callable[[Recipe], World], size: float, precision: str
) -> None:
    planted = world(FULL)
    verified = verify(
        Wrong(planted.good, out=noisy(size)),
        planted.good,
        planted.recipe,
        planted.images,
        budget=Budget.of(precision),  # type: ignore[arg-type]
    )
    assert certain(verified) == []


@pytest.mark.parametrize("scale", [1.001, 30.0, 1e30])
def test_a_scaled_output_is_called_that_in_a_single_step(
    world: Callable[[Recipe], World], scale: float
) -> None:
    # At t = 0 v is nearly ε, and all of x is clipped to ±1, which fp16 has too.
    planted = world(ONE)
    wrong = Wrong(planted.good, out=lambda out, x, t: out * np.float32(scale))
    assert certain(found(wrong, planted)) == ["output-scale"]


def test_what_leaves_a_seventh_of_an_error_is_likely_where_the_budget_is_wide(
    world: Callable[[Recipe], World],
) -> None:
    planted = world(FULL)
    wrong = Wrong(planted.good, x=lambda x: x[..., ::-1], out=noisy(0.15))
    causes = found(wrong, planted, Budget.of("int8")).causes
    assert [(cause.name, cause.certain) for cause in causes] == [("flipped-image", False)]


def test_a_fault_that_leaves_another_one_is_not_certain(
    world: Callable[[Recipe], World],
) -> None:
    planted = world(FULL)
    wrong = Wrong(planted.good, t=lambda t: t + 1, x=lambda x: x[..., ::-1])
    assert certain(found(wrong, planted)) == []
