"""The forward process: how much noise each timestep adds, and what that implies in closed form.

Index t runs from 0 (least noise) to T-1; the paper's t is ours + 1. Where a second index s appears
it lies before t in diffusion time, and s = -1 is the clean image, ᾱ = 1.

References:
    Ho et al. 2020, https://arxiv.org/abs/2006.11239, section 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ddpm_deploy.arrays import Coefficients, Samples, Timesteps


@dataclass(frozen=True, eq=False)
class Schedule:
    """The variances β of the forward process and the products that the equations use.

    Args:
        beta: float64, (T,), each in (0, 1].
        name: Where β came from: a key of `SCHEDULES`, or `given`.
        parameters: The arguments that made it, besides T.

    Raises:
        ValueError: `beta` is not a list of numbers in (0, 1].
    """

    beta: Coefficients
    name: str = "given"
    parameters: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        beta = np.array(self.beta, dtype=np.float64)
        if beta.ndim != 1 or beta.size == 0:
            raise ValueError(f"beta has shape {beta.shape}; it must be (T,) with T >= 1")
        if not (np.all(beta > 0) and np.all(beta <= 1)):
            bad = int(np.flatnonzero(~((beta > 0) & (beta <= 1)))[0])
            raise ValueError(f"beta[{bad}] is {beta[bad]}; every beta lies in (0, 1]")
        beta.setflags(write=False)
        object.__setattr__(self, "beta", beta)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and np.array_equal(self.beta, other.beta)

    def __str__(self) -> str:
        settings = ", ".join(f"{key} {value:g}" for key, value in self.parameters.items())
        return f"{self.name}{f' ({settings})' if settings else ''}, T = {self.T}"

    def __hash__(self) -> int:
        return hash(self.beta.tobytes())

    @property
    def T(self) -> int:  # noqa: N802  (the paper's letter)
        """The number of timesteps."""
        return int(self.beta.size)

    @cached_property
    def alpha(self) -> Coefficients:
        """float64, (T,): α = 1 - β."""
        return 1.0 - self.beta

    @cached_property
    def alpha_bar(self) -> Coefficients:
        """float64, (T,): ᾱ_t, the product of α_0 to α_t; falls from about 1 to about 0."""
        return np.cumprod(self.alpha, dtype=np.float64)

    @cached_property
    def snr(self) -> Coefficients:
        """float64, (T,): the signal-to-noise ratio ᾱ / (1 - ᾱ) (Kingma et al. 2021, Eq. 2)."""
        return self.alpha_bar / (1.0 - self.alpha_bar)

    def alpha_bar_at(self, t: int) -> float:
        """Returns ᾱ_t as a float; 1 for t = -1, the clean image.

        Raises:
            ValueError: `t` is outside -1..T-1.
        """
        if not -1 <= t < self.T:
            raise ValueError(f"t is {t}; it must lie in -1..{self.T - 1}")
        return 1.0 if t < 0 else float(self.alpha_bar[t])

    def beta_between(self, s: int, t: int) -> float:
        """Returns the variance that the forward process adds from s to t: 1 - ᾱ_t / ᾱ_s.

        For neighbours this is β_t itself, without the rounding of the quotient.
        """
        if s == t - 1:
            return float(self.beta[t])
        return 1.0 - self.alpha_bar_at(t) / self.alpha_bar_at(s)

    def posterior_variance(self, t: int, s: int) -> float:
        """Returns β̃, the variance of q(x_s | x_t, x_0); 0 when s = -1 (Ho et al. 2020, Eq. 7)."""
        a_s, a_t = self.alpha_bar_at(s), self.alpha_bar_at(t)
        return (1.0 - a_s) / (1.0 - a_t) * self.beta_between(s, t)

    def posterior_coefficients(self, t: int, s: int) -> tuple[float, float]:
        """Returns the factors of x_0 and of x_t in the mean of q(x_s | x_t, x_0) (Eq. 7).

        For s = -1 they are 1 and 0, without the rounding of the quotient.
        """
        if s < 0:
            return 1.0, 0.0
        a_s, a_t = self.alpha_bar_at(s), self.alpha_bar_at(t)
        # Not 1 - β, which has no digits left where a long stride makes β almost 1.
        alpha = float(self.alpha[t]) if s == t - 1 else a_t / a_s
        from_x0 = math.sqrt(a_s) * self.beta_between(s, t) / (1.0 - a_t)
        from_x = math.sqrt(alpha) * (1.0 - a_s) / (1.0 - a_t)
        return from_x0, from_x

    def diffuse(self, x0: ArrayLike, t: int | Timesteps, noise: ArrayLike) -> Samples:
        """Draws x_t from q(x_t | x_0) in one jump: √ᾱ_t x_0 + √(1-ᾱ_t) ε (Ho et al. 2020, Eq. 4).

        Args:
            x0: float32, (N, ...), in [-1, 1].
            t: One timestep, or int64 (N,) with one an image.
            noise: float32, the shape of `x0`, standard normal.

        Returns:
            float32, the shape of `x0`.
        """
        index = self._index(t)
        return _mix(x0, np.sqrt(self.alpha_bar[index]), noise, np.sqrt(1.0 - self.alpha_bar[index]))

    def diffuse_step(self, x: ArrayLike, t: int | Timesteps, noise: ArrayLike) -> Samples:
        """Draws x_t from q(x_t | x_{t-1}): √(1-β_t) x_{t-1} + √β_t ε (Ho et al. 2020, Eq. 2).

        Shapes and dtypes as in `diffuse`.
        """
        index = self._index(t)
        return _mix(x, np.sqrt(self.alpha[index]), noise, np.sqrt(self.beta[index]))

    def posterior(self, x0: ArrayLike, x_t: ArrayLike, t: int) -> tuple[NDArray[np.float64], float]:
        """Returns mean and variance of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, Eq. 6 and 7).

        Args:
            x0: The clean images, any shape.
            x_t: The noisy ones, the same shape.
            t: The timestep of `x_t`.

        Returns:
            float64 mean in the shape of `x0`, and the variance β̃_t; at t = 0 that is (x0, 0).
        """
        from_x0, from_x = self.posterior_coefficients(t, t - 1)
        x0, x_t = np.asarray(x0, dtype=np.float64), np.asarray(x_t, dtype=np.float64)
        return from_x0 * x0 + from_x * x_t, self.posterior_variance(t, t - 1)

    def _index(self, t: int | Timesteps) -> NDArray[np.int64]:
        index = np.asarray(t, dtype=np.int64)
        if index.size and (index.min() < 0 or index.max() >= self.T):
            raise ValueError(f"t is {t}; it must lie in 0..{self.T - 1}")
        return index


def _mix(
    a: ArrayLike, weight_a: NDArray[np.float64], b: ArrayLike, weight_b: NDArray[np.float64]
) -> Samples:
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        raise ValueError(f"the images are {a.shape} and the noise is {b.shape}; they must agree")
    shape = (-1,) + (1,) * (a.ndim - 1) if weight_a.ndim else ()
    mixed: NDArray[np.float64] = weight_a.reshape(shape) * a + weight_b.reshape(shape) * b
    return mixed.astype(np.float32)


def linear(T: int = 1000, *, start: float = 1e-4, end: float = 0.02) -> Schedule:  # noqa: N803
    """Tabulates β rising linearly from `start` to `end` (Ho et al. 2020, section 4)."""
    return Schedule(np.linspace(start, end, _steps(T)), "linear", {"start": start, "end": end})


def scaled_linear(T: int = 1000, *, start: float = 1e-4, end: float = 0.02) -> Schedule:  # noqa: N803
    """Tabulates β whose square root rises linearly (Rombach et al. 2022)."""
    root = np.linspace(math.sqrt(start), math.sqrt(end), _steps(T))
    return Schedule(root**2, "scaled_linear", {"start": start, "end": end})


def cosine(T: int = 1000, *, s: float = 0.008, max_beta: float = 0.999) -> Schedule:  # noqa: N803
    """Tabulates ᾱ falling as cos² ((t/T + s) / (1 + s) · π/2).

    References:
        Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672, Eq. 17.
    """
    u = np.arange(_steps(T) + 1) / T
    return _from_alpha_bar(
        np.cos((u + s) / (1 + s) * math.pi / 2) ** 2, "cosine", {"s": s, "max_beta": max_beta}
    )


def sigmoid(
    T: int = 1000,  # noqa: N803
    *,
    start: float = -3.0,
    end: float = 3.0,
    tau: float = 1.0,
    max_beta: float = 0.999,
) -> Schedule:
    """Tabulates ᾱ falling as a sigmoid between `start` and `end`, with temperature `tau`.

    References:
        Jabri et al. 2022, https://arxiv.org/abs/2212.11972, Algorithm 1.
    """
    u = np.arange(_steps(T) + 1) / T
    alpha_bar = 1.0 / (1.0 + np.exp((u * (end - start) + start) / tau))
    alpha_bar = (alpha_bar - alpha_bar[-1]) / (alpha_bar[0] - alpha_bar[-1])
    return _from_alpha_bar(
        alpha_bar, "sigmoid", {"start": start, "end": end, "tau": tau, "max_beta": max_beta}
    )


SCHEDULES: Mapping[str, Callable[..., Schedule]] = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "cosine": cosine,
    "sigmoid": sigmoid,
}
"""The named schedules; `Schedule(beta)` takes any other."""


def named_schedule(name: str, T: int, **parameters: Any) -> Schedule:  # noqa: N803
    """Tabulates the schedule called `name` over T timesteps.

    Raises:
        ValueError: No schedule has that name, or it does not take those parameters.
    """
    if name not in SCHEDULES:
        raise ValueError(f"no schedule is called {name!r}; there are {', '.join(SCHEDULES)}")
    try:
        return SCHEDULES[name](T, **parameters)
    except TypeError as error:
        raise ValueError(f"schedule {name!r} does not take {parameters}") from error


def _steps(T: int) -> int:  # noqa: N803
    if T < 1:
        raise ValueError(f"T is {T}; it must be at least 1")
    return T


def _from_alpha_bar(
    alpha_bar: Coefficients, name: str, parameters: Mapping[str, float]
) -> Schedule:
    # The last quotient is 0/0 or 0 by design, so β is capped: Nichol & Dhariwal 2021, section 3.2.
    beta = np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], parameters["max_beta"])
    return Schedule(beta, name, parameters)
