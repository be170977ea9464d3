"""How far a deployed loop is from the trained model's, at every timestep.

Two errors: *local*, where both networks are fed the reference's own x_t, is the engine's fault
alone; *accumulated*, where each runs free on the same noise, is what a user sees in the images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np

from ddpm_deploy.arrays import Array, Samples
from ddpm_deploy.engines.base import Engine
from ddpm_deploy.errors import ParityError
from ddpm_deploy.images import to_pixels
from ddpm_deploy.noise import SeededNoise
from ddpm_deploy.parity import BUDGETS, TOLERANCE, relative_error
from ddpm_deploy.precision import Precision
from ddpm_deploy.run import Recipe
from ddpm_deploy.sampling import denoise
from ddpm_deploy.spec import ModelSpec

SAME_MODEL = (
    "sample_shape",
    "schedule",
    "prediction",
    "variance",
    "clip",
    "value_range",
    "rounding",
    "first_timestep",
    "timestep",
    "conditions",
)
"""Fields of the spec in which two engines of one model agree."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What an engine may differ by; the defaults are for float32, `of` has the others.

    Attributes:
        local: Of the network's output, at any timestep, over the reference's peak. Rounding gives
            up to 5e-6 on the networks measured; the smallest structural mistake known 7e-5.
        accumulated: Of x_t, at any timestep, over the reference's peak.
        pixels: Least share of final 8-bit values that differ by at most one level.
    """

    local: float = TOLERANCE
    accumulated: float = 1e-3
    pixels: float = 0.999

    @classmethod
    def of(cls, precision: Precision) -> Budget:
        """Returns what an engine of a precision may differ by.

        Half precision: in 1,000 steps of the demo's network fp16 accumulates 1e-3 of the peak and
        bf16 1e-2; every pixel of the first is within one level, and 99.8 % of the second.
        """
        local = BUDGETS[precision]
        match precision:
            case "fp16":
                return cls(local=local, accumulated=1e-2, pixels=0.99)
            case "bf16":
                return cls(local=local, accumulated=5e-2, pixels=0.95)
            case _:
                return cls(local=local)


@dataclass(frozen=True, kw_only=True)
class StepError:
    """One timestep's errors: max |engine - reference| over max |reference|, all images together.

    Attributes:
        k: 1 for the first transition.
        t: The timestep.
        local_out: Of the network's output, on the reference's x_t.
        local_x0: Of x_0, on the reference's x_t.
        local_x: Of x_s, on the reference's x_t.
        out: Of the network's output, running free.
        x0: Of x_0, running free.
        x: Of x_s, running free.
    """

    k: int
    t: int
    local_out: float
    local_x0: float
    local_x: float
    out: float
    x0: float
    x: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `compare` found.

    Attributes:
        steps: Every transition, noisiest first; stops at the first that is not finite.
        not_finite: The timestep at which the engine's numbers first were not finite, if any.
        psnr: Of each final image in decibels, in 8 bits; infinite where all pixels agree.
        equal_pixels: Share of final 8-bit values that are equal.
        close_pixels: Share that differ by at most one level.
        largest_pixel: Largest difference of a final 8-bit value.
        budget: What was allowed.
    """

    steps: tuple[StepError, ...]
    not_finite: int | None
    psnr: tuple[float, ...]
    equal_pixels: float
    close_pixels: float
    largest_pixel: int
    budget: Budget

    @property
    def worst_local(self) -> StepError:
        """The step whose network output differs most on the reference's own x_t."""
        return max(self.steps, key=lambda step: step.local_out)

    @property
    def worst_accumulated(self) -> StepError:
        """The step after which x differs most, running free."""
        return max(self.steps, key=lambda step: step.x)

    @property
    def failures(self) -> list[str]:
        """What is outside the budget, a line each; empty when the engine is the same model."""
        lines = []
        if self.not_finite is not None:
            lines.append(f"numbers are not finite from t = {self.not_finite} on")
        if self.steps and not self.worst_local.local_out <= self.budget.local:
            lines.append(
                f"local error {self.worst_local.local_out:.1e} at t = {self.worst_local.t}; "
                f"the budget is {self.budget.local:.0e}"
            )
        if self.steps and not self.worst_accumulated.x <= self.budget.accumulated:
            lines.append(
                f"accumulated error {self.worst_accumulated.x:.1e} at t = "
                f"{self.worst_accumulated.t}; the budget is {self.budget.accumulated:.0e}"
            )
        if self.not_finite is None and not self.close_pixels >= self.budget.pixels:
            lines.append(
                f"only {self.close_pixels:.2%} of pixels are within one level; "
                f"the budget is {self.budget.pixels:.2%}"
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON's types; an infinite PSNR becomes null."""
        return {
            "passed": not self.failures,
            "failures": self.failures,
            "budget": asdict(self.budget),
            "not_finite": self.not_finite,
            "psnr": [value if np.isfinite(value) else None for value in self.psnr],
            "equal_pixels": self.equal_pixels,
            "close_pixels": self.close_pixels,
            "largest_pixel": self.largest_pixel,
            "steps": [asdict(step) for step in self.steps],
        }


def differing_fields(reference: ModelSpec, engine: ModelSpec) -> list[str]:
    """Names, with both values, what two specs of one model should agree in and do not."""
    return [
        f"{name}: {_short(getattr(reference, name))} in the reference, "
        f"{_short(getattr(engine, name))} in the engine"
        for name in SAME_MODEL
        if getattr(reference, name) != getattr(engine, name)
    ]


class Verifier:
    """Compares an engine with a reference over a whole loop.

    Iterate over it for a `StepError` a transition, then read `result`.

    Args:
        reference: The trained model, usually a checkpoint in PyTorch.
        engine: The deployed one.
        recipe: Sampler, seed and labels of the loop.
        images: Indices of the images to draw.
        budget: What the engine may differ by.

    Raises:
        ParityError: The two are not the same kind of model, so their loops cannot be compared.
    """

    def __init__(
        self,
        reference: Engine,
        engine: Engine,
        recipe: Recipe,
        images: Sequence[int],
        *,
        budget: Budget | None = None,
    ) -> None:
        if reference.spec.sample_shape != engine.spec.sample_shape:
            raise ParityError(
                f"{reference.path} makes samples of {reference.spec.sample_shape}, "
                f"{engine.path} of {engine.spec.sample_shape}.",
                hint="Give the checkpoint that the engine was exported from.",
            )
        self.budget = budget or Budget()
        self.table = recipe.table(engine.spec)
        self._reference = recipe.predictor(reference, images)
        self._engine = recipe.predictor(engine, images)
        self._spec = engine.spec
        noise = SeededNoise(recipe.seed, images, engine.spec.sample_shape)
        self._noise = lru_cache(maxsize=1)(noise)
        self._steps: list[StepError] = []
        self._not_finite: int | None = None
        self._last: tuple[Samples, Samples] | None = None

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[StepError]:
        free = denoise(self._engine, self.table, self._noise)
        for wanted in denoise(self._reference, self.table, self._noise):
            if not wanted.finite:
                raise ParityError(
                    f"The reference itself gives numbers that are not finite at t = {wanted.t}.",
                    hint="Was the checkpoint trained to the end? Compare another one.",
                )
            k = wanted.k
            local = next(
                denoise(self._engine, [self.table[k - 1]], partial(self._draw, k), x=wanted.x_t)
            )
            given = next(free)
            if not (local.finite and given.finite):
                self._not_finite = wanted.t
                return
            self._last = wanted.x, given.x
            error = StepError(
                k=k,
                t=wanted.t,
                local_out=relative_error(local.out, wanted.out),
                local_x0=relative_error(local.x0, wanted.x0),
                local_x=relative_error(local.x, wanted.x),
                out=relative_error(given.out, wanted.out),
                x0=relative_error(given.x0, wanted.x0),
                x=relative_error(given.x, wanted.x),
            )
            self._steps.append(error)
            yield error

    def _draw(self, k: int, _: int) -> Samples:
        """Draws step k's noise, whatever number a loop of one transition gives it."""
        return self._noise(k)

    @property
    def result(self) -> Comparison:
        """What the iteration found so far."""
        if self._last is None:
            psnr: tuple[float, ...] = ()
            difference = np.full(1, 255)
        else:
            wanted, given = (
                to_pixels(
                    x if x.ndim == 4 else x.reshape(len(x), 1, 1, -1),
                    value_range=self._spec.value_range,
                    rounding=self._spec.rounding,
                ).astype(np.int64)
                for x in self._last
            )
            difference = np.abs(given - wanted)
            psnr = tuple(_psnr(image) for image in difference)
        return Comparison(
            steps=tuple(self._steps),
            not_finite=self._not_finite,
            psnr=psnr,
            equal_pixels=float(np.mean(difference == 0)),
            close_pixels=float(np.mean(difference <= 1)),
            largest_pixel=int(difference.max()),
            budget=self.budget,
        )


def _psnr(difference: Array) -> float:
    mean_square = float(np.mean(difference.astype(np.float64) ** 2))
    return float("inf") if mean_square == 0 else 10 * float(np.log10(255**2 / mean_square))


def _short(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k}={v}" for k, v in value.items())
    return str(value)
