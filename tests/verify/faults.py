"""Faults that people make between a trained network and a deployed loop, planted one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ddpm_deploy import Engine, Recipe, Schedule, SeededNoise, Step, cosine, linear
from ddpm_deploy.arrays import Array, Coefficients, Samples
from ddpm_deploy.images import to_pixels
from ddpm_deploy.sampling import Transition
from ddpm_deploy.verify import Loop, Trace, engine_loop, record
from ddpm_deploy.verify.compare import Side
from ddpm_deploy.verify.trace import loop_steps


class Wrong(Engine):
    """Another engine, with what it is fed or gives changed."""

    name = "wrong"

    def __init__(
        self,
        good: Engine,
        *,
        x: Callable[[Samples], Samples] = lambda x: x,
        t: Callable[[Array], Array] = lambda t: t,
        y: Callable[[Array], Array] = lambda y: y,
        out: Callable[[Samples, Samples, Array], Samples] = lambda out, x, t: out,
    ) -> None:
        self.good, self.spec, self.path = good, good.spec, good.path
        self._x, self._t, self._y, self._out = x, t, y, out

    def _run(self, feeds: Mapping[str, Any]) -> Samples:
        rest = {name: self._y(feeds[name]) for name in feeds if name not in {"x", "t"}}
        x = np.ascontiguousarray(self._x(feeds["x"]), np.float32)
        t = np.clip(self._t(feeds["t"]), 0, self.spec.schedule.T - 1).astype(np.int64)
        out = self._out(self.good(x, t, **rest), feeds["x"], feeds["t"])
        return np.ascontiguousarray(out, np.float32)


@dataclass(frozen=True, kw_only=True)
class World:
    """What faults are planted in.

    Attributes:
        good: The healthy engine.
        recipe: The loop's.
        images: Indices of the images.
    """

    good: Engine
    recipe: Recipe
    images: range

    def loop(self, **changes: Any) -> Loop:
        """Returns the healthy loop with its predict, table or noise changed."""
        loop = engine_loop(self.good, self.recipe, self.images)
        given = {"predict": loop.predict, "table": loop.table, "noise": loop.noise}
        return Loop(**{**given, **changes}, spec=self.good.spec)

    @property
    def beta(self) -> Coefficients:
        return self.good.spec.schedule.beta

    def table(self, **changes: Any) -> list[Transition]:
        """Returns the healthy table with each row's entries changed."""
        rows = self.recipe.table(self.good.spec)
        return [
            replace(row, **{k: v(row) if callable(v) else v for k, v in changes.items()})
            for row in rows
        ]

    def other_spec(self, **changes: Any) -> Loop:
        """Returns the loop of the same network with another spec's table."""
        return self.loop(table=self.recipe.table(self.good.spec.with_changes(**changes)))

    def trace(self, loop: Loop, **changes: Any) -> Trace:
        """Records a loop, claiming the healthy recipe."""
        steps = [replace(step, t=step.t) for step in loop_steps(loop)]
        return record(steps, spec=self.good.spec, recipe=self.recipe, images=self.images, **changes)


class HalfState(Loop):
    """A loop that keeps x in half precision."""

    rounding: Callable[[Samples], Samples]

    def step(self, k: int, x: Samples, before: Samples | None = None) -> Step:
        step = super().step(k, x, before)
        return replace(step, x=self.rounding(step.x))


def half_state(world: World, rounding: Callable[[Samples], Samples]) -> Loop:
    good = world.loop()
    loop = HalfState(good.predict, good.table, good.noise, spec=good.spec)
    loop.rounding = rounding
    return loop


def to_fp16(x: Samples) -> Samples:
    return x.astype(np.float16).astype(np.float32)


def to_bf16(x: Samples) -> Samples:
    return np.asarray(torch.from_numpy(np.array(x)).bfloat16().float().numpy(), np.float32)


def frozen(world: World) -> Callable[[int], Samples]:
    right = SeededNoise(world.recipe.seed, world.images, world.good.spec.sample_shape)
    return lambda k: right(min(k, 1))


def small_start(world: World) -> Callable[[int], Samples]:
    right = SeededNoise(world.recipe.seed, world.images, world.good.spec.sample_shape)
    return lambda k: right(k) if k else np.float32(0.8) * right(0)


def last_noise(world: World) -> Loop:
    rows = world.table()
    rows[-1] = replace(rows[-1], x_from_noise=rows[-2].x_from_noise)
    return world.loop(table=rows)


def last_noise_of_beta(world: World) -> Loop:
    rows = world.table()
    alpha_bar = world.good.spec.schedule.alpha_bar[rows[-1].t]
    rows[-1] = replace(rows[-1], x_from_noise=float(np.sqrt(1 - alpha_bar)))  # β from t to -1
    return world.loop(table=rows)


def per_batch(world: World) -> Callable[[int], Samples]:
    """Draws a batch's noise from one generator, as `torch.randn` does."""
    shape = (len(world.images), *world.good.spec.sample_shape)

    def draw(k: int) -> Samples:
        return np.random.default_rng((world.recipe.seed, k)).standard_normal(shape, np.float32)

    return draw


def first_right(world: World) -> Callable[[int], Samples]:
    """Gives image i the noise that follows that of image i-1: one counter for the whole batch."""
    right = SeededNoise(world.recipe.seed, world.images[:1], world.good.spec.sample_shape)
    other = SeededNoise(99, range(1, len(world.images)), world.good.spec.sample_shape)
    return lambda k: np.concatenate([right(k), other(k)])


def shared(world: World) -> Callable[[int], Samples]:
    one = SeededNoise(world.recipe.seed, world.images[:1], world.good.spec.sample_shape)
    return lambda k: np.repeat(one(k), len(world.images), axis=0)


def late(world: World) -> Callable[[int], Samples]:
    right = SeededNoise(world.recipe.seed, world.images, world.good.spec.sample_shape)
    return lambda k: right(k and k + 1)


def other_seed(world: World) -> Callable[[int], Samples]:
    return SeededNoise(3, world.images, world.good.spec.sample_shape)


def strided_wrongly(world: World) -> Loop:
    """Goes to s - 1 where the next step begins at s."""
    rows = []
    for row in world.recipe.table(world.good.spec):
        steps = (row.t, row.s - 1) if row.s > 0 else (row.t,)
        rows.append(replace(world.recipe, steps=steps).table(world.good.spec)[0])
    return world.loop(table=rows)


def in_0_to_1(x: Samples) -> Samples:
    return np.asarray((x + 1) / 2, np.float32)


def v_for_epsilon(world: World) -> Engine:
    """Gives v where ε is meant."""
    schedule = world.good.spec.schedule

    def v(out: Samples, x: Samples, t: Array) -> Samples:
        a = np.sqrt(schedule.alpha_bar[t]).reshape(-1, 1, 1, 1)
        s = np.sqrt(1 - a**2)
        return np.asarray(a * out - s * (x - s * out) / a, np.float32)

    return Wrong(world.good, out=v)


def nan_from(world: World, t_bad: int) -> Engine:
    def broken(out: Samples, x: Samples, t: Array) -> Samples:
        bad = (t <= t_bad).reshape(-1, 1, 1, 1)
        return np.where(bad, np.float32(np.nan), out).astype(np.float32)

    return Wrong(world.good, out=broken)


def with_pictures(world: World, **changes: Any) -> Trace:
    """A healthy loop's trace, whose pictures are made otherwise."""
    trace = world.trace(world.loop())
    change = changes.pop("change", lambda pictures: pictures)
    return replace(trace, pictures=change(to_pixels(trace.final, **changes)))


Plant = Callable[[World], Side]

LOOPS: Mapping[str, tuple[str, Callable[[World], Loop]]] = {
    "cosine for linear": ("wrong-schedule", lambda w: w.other_spec(schedule=cosine(1000))),
    "β up to 0.012": (
        "wrong-schedule",
        lambda w: w.other_spec(schedule=linear(1000, start=1e-4, end=0.012)),
    ),
    "β for β̃": ("wrong-variance", lambda w: w.other_spec(variance="fixed_large")),
    "no clip": ("wrong-clip", lambda w: w.other_spec(clip=None)),
    "noise in the last step": ("noise-in-last-step", last_noise),
    "√β z in the last step": ("noise-in-last-step", last_noise_of_beta),
    "no noise": ("no-noise", lambda w: w.loop(table=w.table(x_from_noise=0.0))),
    "stride off by one": ("stride-off-by-one", strided_wrongly),
    "read as v": ("wrong-prediction", lambda w: w.other_spec(prediction="v_prediction")),
    "noise per batch": ("other-noise", lambda w: w.loop(noise=per_batch(w))),
    "noise right for image 0": ("noise-per-batch", lambda w: w.loop(noise=first_right(w))),
    "one noise for all": ("noise-shared-by-images", lambda w: w.loop(noise=shared(w))),
    "noise a step late": ("noise-off-by-one-step", lambda w: w.loop(noise=late(w))),
    "another seed": ("other-noise-seed", lambda w: w.loop(noise=other_seed(w))),
    "fp16 state": ("half-precision-state", lambda w: half_state(w, to_fp16)),
    "bf16 state": ("half-precision-state", lambda w: half_state(w, to_bf16)),
    "σ² for σ": (
        "variance-for-deviation",
        lambda w: w.loop(table=w.table(x_from_noise=lambda row: row.x_from_noise**2)),
    ),
    "σ · 0.9": (
        "noise-scale",
        lambda w: w.loop(table=w.table(x_from_noise=lambda row: 0.9 * row.x_from_noise)),
    ),
    "β of t + 1": (
        "schedule-off-by-one",
        lambda w: w.other_spec(schedule=Schedule(np.append(w.beta[1:], w.beta[-1]), "shifted")),
    ),
    "one z for all steps": ("noise-of-another-step", lambda w: w.loop(noise=frozen(w))),
    "x_T · 0.8": ("noise-scale", lambda w: w.loop(noise=small_start(w))),
    "1 / α for 1 / √α": (
        "sampler",
        lambda w: w.loop(table=w.table(x_from_x=lambda row: row.x_from_x**2)),
    ),
}
"""Faults of a loop around a healthy network, with the cause to be named."""

NETWORKS: Mapping[str, tuple[str, Plant]] = {
    "t + 1": ("timestep-off-by-one", lambda w: Wrong(w.good, t=lambda t: t + 1)),
    "t - 1": ("timestep-off-by-one", lambda w: Wrong(w.good, t=lambda t: t - 1)),
    "T - 1 - t": ("timestep-reversed", lambda w: Wrong(w.good, t=lambda t: 999 - t)),
    "t in bf16": (
        "half-precision-timestep",
        lambda w: Wrong(w.good, t=lambda t: np.array([bf16(int(v)) for v in t])),
    ),
    "t traced as a constant": ("timestep-constant", lambda w: Wrong(w.good, t=lambda t: 0 * t + 1)),
    "the next label": ("swapped-label", lambda w: Wrong(w.good, y=lambda y: (y + 1) % 10)),
    "no label": ("label-ignored", lambda w: Wrong(w.good, y=lambda y: 0 * y + 10)),
    "height and width": (
        "transposed-image",
        lambda w: Wrong(w.good, x=lambda x: x.swapaxes(2, 3)),
    ),
    "x in [0, 1]": ("wrong-value-range", lambda w: Wrong(w.good, x=in_0_to_1)),
    "x in fp16": ("half-precision-input", lambda w: Wrong(w.good, x=to_fp16)),
    "out in bf16": (
        "half-precision-output",
        lambda w: Wrong(w.good, out=lambda out, x, t: to_bf16(out)),
    ),
    "t to the next multiple of 8": (
        "other-timesteps",
        lambda w: Wrong(w.good, t=lambda t: (t + 7) // 8 * 8),
    ),
    "-ε": ("output-sign", lambda w: Wrong(w.good, out=lambda out, x, t: -out)),
    "v for ε": ("wrong-prediction", v_for_epsilon),
    "NaN from t = 400": ("not-finite", lambda w: nan_from(w, 400)),
}
"""Faults of what the network is fed or gives."""

PICTURES: Mapping[str, tuple[str, Plant]] = {
    "truncated": ("pixel-rounding", lambda w: with_pictures(w, rounding="truncate")),
    "x in [0, 1] as pixels": (
        "picture-value-range",
        lambda w: with_pictures(w, value_range=(0.0, 1.0)),
    ),
    "transposed pictures": (
        "picture-transposed",
        lambda w: with_pictures(w, change=lambda p: p.swapaxes(1, 2)),
    ),
}


def bf16(value: int) -> int:
    return int(torch.tensor(float(value)).bfloat16().item())
