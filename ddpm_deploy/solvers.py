"""Solvers of the reverse process's differential equation, as tables.

They write a sample as x = α(x_0 + σ ε), α² = 1 / (1 + σ²), and step in λ = -log σ, half the
logarithm of the signal-to-noise ratio.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

import numpy as np

from ddpm_deploy.arrays import Coefficients
from ddpm_deploy.sampling import (
    FinalSigma,
    FirstOrderEnd,
    Prediction,
    Spacing,
    Transition,
    timesteps,
)
from ddpm_deploy.schedule import Schedule

LEAST_ALPHA_BAR = 2.0**-24
"""Stands in for ᾱ = 0, at which σ is infinite: diffusers' number."""

FEW = 15
"""Below this many transitions the last is of first order, where `few` says so."""


def dpmpp_2m(
    schedule: Schedule,
    steps: int | Sequence[int] | None = None,
    *,
    prediction: Prediction = "epsilon",
    order: int = 2,
    spacing: Spacing = "leading",
    offset: int = 0,
    karras: bool = False,
    final_sigma: FinalSigma = "zero",
    first_order_end: FirstOrderEnd = "few",
) -> list[Transition]:
    """Tabulates DPM-Solver++(2M), the multistep solver of second order, by the midpoint.

    x_0 is never clipped. The first transition is of first order, which is DDIM.

    Args:
        schedule: The schedule the network was trained with.
        steps: Transitions, 1 to T-1; T-1 when None. Or the timesteps to visit.
        prediction: As in `ddpm`.
        order: 1 or 2.
        spacing: How `steps` are chosen. `leading` and `linspace` choose one more, and leave the
            last out, since the solver ends where that would start.
        offset: Added to the timesteps of `leading` spacing.
        karras: Whether σ is spaced evenly in σ^(1/7); t is then the nearest timestep, and may be
            there twice.
        final_sigma: It ends at σ = `zero`, or at that of timestep 0 (`least`).
        first_order_end: Whether the last transition is of first order: `always`, `never`, or where
            there are `few`, less than `FEW`. To σ = 0 it always is.

    Returns:
        The transitions in sampling order, noisiest first.

    Raises:
        ValueError: `steps` is outside 1..T-1, or a setting is none of its kind.

    References:
        Lu et al. 2022, https://arxiv.org/abs/2211.01095, Algorithm 2.
        Karras et al. 2022, https://arxiv.org/abs/2206.00364, Eq. 5.
    """
    for name, value, allowed in [
        ("order", order, (1, 2)),
        ("final_sigma", final_sigma, get_args(FinalSigma)),
        ("first_order_end", first_order_end, get_args(FirstOrderEnd)),
    ]:
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; there are {', '.join(map(str, allowed))}")
    every = _sigma(schedule.alpha_bar)
    if karras:
        if isinstance(steps, Sequence):
            raise ValueError("the sigmas of Karras et al. choose their own timesteps")
        every = _rounded_sigma(schedule)
        visited, sigmas = _karras(every, _count(schedule, steps), cut=_is_cosine(schedule))
    else:
        visited = _visited(schedule, steps, spacing, offset)
        sigmas = [float(every[t]) for t in visited]
    n, to_zero = len(visited), final_sigma == "zero"
    sigmas.append(0.0 if to_zero else float(every[0]))
    early = first_order_end == "always" or (first_order_end == "few" and n < FEW)
    table = []
    for k, t in enumerate(visited):
        sigma, following = sigmas[k], sigmas[k + 1]
        alpha_t, alpha_s = _alpha(sigma), _alpha(following)
        # Eq. 9 for h = λ_s - λ_t: α_s(1 - e^-h).
        from_x0 = alpha_s * (1.0 - following / sigma)
        back = 0.0
        if order == 2 and k > 0 and not (k == n - 1 and (to_zero or early)):
            h, h_before = math.log(sigma / following), math.log(sigmas[k - 1] / sigma)
            back = from_x0 * h / (2.0 * h_before)
        x0_from_x, x0_from_out = _x0(sigma, prediction)
        table.append(
            Transition(
                t=t,
                s=visited[k + 1] if k + 1 < n else -1 if to_zero else 0,
                x0_from_x=x0_from_x,
                x0_from_out=x0_from_out,
                clip=None,
                x_from_x0=from_x0 + back,
                x_from_x=following * alpha_s / (sigma * alpha_t),
                x_from_before=-back,
            )
        )
    return table


def _visited(
    schedule: Schedule, steps: int | Sequence[int] | None, spacing: Spacing, offset: int
) -> list[int]:
    if isinstance(steps, Sequence):
        return timesteps(schedule.T, steps)
    n = _count(schedule, steps)
    if spacing == "trailing":
        return timesteps(schedule.T, n, spacing=spacing)
    return timesteps(schedule.T, n + 1, spacing=spacing, offset=offset)[:-1]


def _count(schedule: Schedule, steps: int | None) -> int:
    most = schedule.T - 1
    n = most if steps is None else steps
    if not 1 <= n <= most:
        raise ValueError(f"steps is {steps}; dpmpp_2m has 1 to {most} of them in this schedule")
    return n


def _sigma(alpha_bar: Coefficients) -> Coefficients:
    alpha_bar = np.where(alpha_bar > 0, alpha_bar, np.asarray(LEAST_ALPHA_BAR, alpha_bar.dtype))
    sigma: Coefficients = np.sqrt((1 - alpha_bar) / alpha_bar)
    return sigma


def _alpha(sigma: float) -> float:
    return 1.0 / math.sqrt(1.0 + sigma**2)


def _x0(sigma: float, prediction: Prediction) -> tuple[float, float]:
    alpha = _alpha(sigma)
    match prediction:
        case "epsilon":
            return 1.0 / alpha, -sigma
        case "sample":
            return 0.0, 1.0
        case "v_prediction":
            return alpha, -sigma * alpha
        case _:
            raise ValueError(
                f"prediction is {prediction!r}; there are {', '.join(get_args(Prediction))}"
            )


def _rounded_sigma(schedule: Schedule) -> Coefficients:
    """Returns σ as diffusers has it: of float32 numbers, so that its least has four digits."""
    alpha = 1 - schedule.beta.astype(np.float32)
    return _sigma(np.cumprod(alpha, dtype=np.float64).astype(np.float32))


def _is_cosine(schedule: Schedule) -> bool:
    return schedule.name.startswith("cosine")


def _karras(every: Coefficients, n: int, *, cut: bool) -> tuple[list[int], list[float]]:
    """Returns the timesteps and the σ that lie evenly in σ^(1/7), the largest first.

    Args:
        every: σ of each timestep.
        n: How many.
        cut: Timesteps are cut to whole numbers rather than rounded, as diffusers does where the
            schedule is cosine.
    """
    rho = 7.0
    low, high = (float(every[end]) ** (1 / rho) for end in (0, -1))
    sigmas = (high + np.linspace(0, 1, n) * (low - high)) ** rho
    log_every, logs = np.log(every), np.log(sigmas)
    below = np.searchsorted(log_every, logs, side="right") - 1
    below = np.clip(below, 0, len(every) - 2)
    start, end = log_every[below], log_every[below + 1]
    share = np.clip((start - logs) / (start - end), 0, 1)
    t = (1 - share) * below + share * (below + 1)
    return [int(each) for each in (t if cut else t.round())], sigmas.tolist()
