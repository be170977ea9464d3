"""Samplers as tables of numbers, and the one loop that reads them.

A row of a table takes x_t to x_s:

    x_0 = x0_from_x · x_t + x0_from_out · out          then clipped to [-clip, clip]
    x_s = x_from_x0 · x_0 + x_from_x · x_t + x_from_out · out + x_from_before · x_0' + σ · z

`out` is what the network gives for (x_t, t); x_0' is the last step's x_0; σ is `x_from_noise`, or a
function of the network's second half where the variance is learned. Tables are float64 data made
before the loop; their numbers are Python floats, so float32 images stay float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np

from ddpm_deploy.arrays import Samples, Timesteps
from ddpm_deploy.schedule import Schedule

Prediction = Literal["epsilon", "sample", "v_prediction"]
Variance = Literal["fixed_small", "fixed_large", "learned", "learned_range"]
Spacing = Literal["leading", "linspace", "trailing", "trailing_floor"]
Sampler = Literal["ddpm", "ddim", "dome272", "dpmpp_2m"]
FinalSigma = Literal["zero", "least"]
FirstOrderEnd = Literal["always", "few", "never"]

SAMPLERS: tuple[str, ...] = get_args(Sampler)
PREDICTIONS: tuple[str, ...] = get_args(Prediction)

Predictor: TypeAlias = Callable[[Samples, Timesteps], Samples]
"""A network with its conditions bound: (x, t) to its output, float32 to float32."""


@dataclass(frozen=True, kw_only=True)
class SelfConditioned:
    """A predictor that also sees the last step's x_0; `denoise` gives it.

    Called with (x, t) alone it sees zeros, as at the first step.

    Attributes:
        predict: From (x, t, x_0') to the output, all float32.

    References:
        Chen et al. 2022, https://arxiv.org/abs/2208.04202, section 2.2.
    """

    predict: Callable[[Samples, Timesteps, Samples], Samples]

    def __call__(self, x: Samples, t: Timesteps) -> Samples:
        """Returns the output where nothing was predicted yet."""
        return self.predict(x, t, np.zeros_like(x))


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a loop goes, besides its sampler: what `ModelSpec` keeps of a family's own.

    Attributes:
        steps: Transitions to keep; all when None. Or the timesteps to visit.
        eta: Share of noise for `ddim`, 0 to 1.
        spacing: How `steps` are chosen, see `timesteps`.
        offset: Added to the timesteps of `leading` spacing.
        direction: ε of `ddim` is derived from the `clipped` x_0, or is the `network`'s own.
        previous: x_s of `ddim` lies at the `next` timestep visited, or a whole `stride` T // steps
            below t.
        final: Past the last timestep lies the `clean` image, or, for `ddim`, what ᾱ of the `first`
            timestep says.
        noise_at_end: Whether `ddpm` adds noise at its last transition, too, where that is above 0.
        order: Of `dpmpp_2m`: 1, or 2, which looks back.
        karras: Whether `dpmpp_2m` spaces its σ as Karras et al. do, and not its timesteps.
        final_sigma: `dpmpp_2m` ends at σ = `zero`, the clean image, or at the schedule's `least`.
        first_order_end: Whether the last transition of `dpmpp_2m` is of first order: `always`,
            `never`, or where there are `few`, less than 15. To σ = 0 it always is.
    """

    steps: int | tuple[int, ...] | None = None
    eta: float = 0.0
    spacing: Spacing = "leading"
    offset: int = 0
    direction: Literal["clipped", "network"] = "clipped"
    previous: Literal["next", "stride"] = "next"
    final: Literal["clean", "first"] = "clean"
    noise_at_end: bool = False
    order: int = 2
    karras: bool = False
    final_sigma: FinalSigma = "zero"
    first_order_end: FirstOrderEnd = "few"


@dataclass(frozen=True, kw_only=True)
class Transition:
    """One row of a sampler: the numbers that take x_t to x_s.

    Attributes:
        t: Timestep that the network is called with, 0 to T-1.
        s: Timestep of the result, below t; -1 is the clean image.
        x0_from_x: Factor of x_t in x_0.
        x0_from_out: Factor of the network's output in x_0.
        clip: x_0 is clipped to [-clip, clip]; None leaves it.
        x_from_x0: Factor of the clipped x_0 in x_s.
        x_from_x: Factor of x_t in x_s.
        x_from_out: Factor of the network's output in x_s.
        x_from_before: Factor in x_s of the last step's x_0, for solvers that look back; 0 at the
            first transition.
        x_from_noise: Standard deviation σ of the fresh noise; 0 draws none. Where the variance is
            learned, 1 or 0: whether noise is added.
        log_std: (a, b) where log σ = a + b·v, v being the second half of the network's output
            channels; None where the variance is fixed, whatever the network gives.
    """

    t: int
    s: int
    x0_from_x: float
    x0_from_out: float
    clip: float | None
    x_from_x0: float
    x_from_x: float
    x_from_out: float = 0.0
    x_from_before: float = 0.0
    x_from_noise: float = 0.0
    log_std: tuple[float, float] | None = None


Table = Sequence[Transition]


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one transition did.

    Attributes:
        k: 1 for the first transition (the noisiest), then 2, and so on.
        t: Timestep of `x_t`.
        x_t: float32, (N, *sample_shape): what the network was given.
        out: float32, (N, *sample_shape): what it predicted, without v where that is learned.
        x0: float32, (N, *sample_shape): the clean images that this implies, clipped.
        x: float32, (N, *sample_shape): the result x_s; after the last step, the images.
        before: float32, (N, *sample_shape): the last step's x_0; None at the first step.
    """

    k: int
    t: int
    x_t: Samples
    out: Samples
    x0: Samples
    x: Samples
    before: Samples | None = None

    @property
    def finite(self) -> bool:
        """Tells whether all its numbers are; clipping makes a picture of an infinite output."""
        return bool(np.isfinite(self.x).all() and np.isfinite(self.out).all())


def timesteps(
    T: int,  # noqa: N803
    steps: int | Sequence[int] | None = None,
    *,
    spacing: Spacing = "leading",
    offset: int = 0,
) -> list[int]:
    """Chooses the timesteps that a shorter loop visits.

    Args:
        T: Length of the training schedule.
        steps: How many to keep, 1 to T; all when None. Or the timesteps themselves, in any order.
        spacing: `leading` counts whole strides from 0, `linspace` spreads evenly over 0..T-1 with
            both ends, `trailing` counts down from T-1 in strides of T/steps and rounds,
            `trailing_floor` cuts the fractions off, as lucidrains' code does in float32.
        offset: Added to the timesteps of `leading` spacing.

    Returns:
        The timesteps in sampling order, noisiest first, each once.

    Raises:
        ValueError: `steps` is outside 1..T, a timestep is outside 0..T-1 or there twice, or
            `spacing` is unknown.

    References:
        Lin et al. 2023, https://arxiv.org/abs/2305.08891, Table 2.
    """
    if isinstance(steps, Sequence):
        chosen = sorted(steps, reverse=True)
        if not chosen or chosen[0] >= T or chosen[-1] < 0 or len(set(chosen)) < len(chosen):
            raise ValueError(
                f"the timesteps are {chosen}; each of 0..{T - 1} may be there once, and one must"
            )
        return chosen
    n = T if steps is None else steps
    if not 1 <= n <= T:
        raise ValueError(f"steps is {steps}; this schedule has 1 to {T}")
    match spacing:
        case "leading":
            ascending = [k * (T // n) + offset for k in range(n)]
            if not 0 <= offset <= T - 1 - (n - 1) * (T // n):
                raise ValueError(f"{n} steps with offset {offset} leave 0..{T - 1}")
        case "linspace":
            # NumPy's own sums, as diffusers has them: other roundings differ where t lies halfway.
            evenly = np.linspace(0, T - 1, n).round() if n > 1 else [T - 1]
            ascending = [int(t) for t in evenly]
        case "trailing":
            descending = np.arange(T, 0, -T / n)[:n]  # its rounding may leave one too many
            ascending = [int(t) - 1 for t in np.round(descending)][::-1]
        case "trailing_floor":
            ascending = _cut(T, n)
        case _:
            raise ValueError(f"spacing is {spacing!r}; there are {', '.join(get_args(Spacing))}")
    return ascending[::-1]


def ddpm(
    schedule: Schedule,
    steps: int | Sequence[int] | None = None,
    *,
    prediction: Prediction = "epsilon",
    variance: Variance = "fixed_small",
    clip: float | None = 1.0,
    spacing: Spacing = "leading",
    offset: int = 0,
    noise_at_end: bool = False,
) -> list[Transition]:
    """Tabulates ancestral sampling.

    Args:
        schedule: The schedule the network was trained with.
        steps: Transitions to keep, 1 to T; all T when None. Or the timesteps to visit.
        prediction: What the network gives: ε, x_0, or v = √ᾱ ε - √(1-ᾱ) x_0.
        variance: σ² is β̃ (`fixed_small`), β (`fixed_large`), the exponential of v (`learned`), or
            lies between the two on a logarithmic scale at (v+1)/2 (`learned_range`).
        clip: x_0 is clipped to [-clip, clip]; None leaves it.
        spacing: How `steps` are chosen, see `timesteps`.
        offset: Added to the timesteps of `leading` spacing.
        noise_at_end: Whether the last transition adds noise, too, where it is not from t = 0: β's,
            or what `learned_range` makes of it with 1e-20 in place of β̃, which is 0.

    Returns:
        The transitions in sampling order, noisiest first. The last one adds no noise.

    Raises:
        ValueError: `steps` is outside 1..T, or a name is unknown.

    References:
        Ho et al. 2020, https://arxiv.org/abs/2006.11239, Algorithm 2, Eq. 7 and section 3.2.
        Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672, Eq. 15 and 19.
    """
    table = []
    for t, s in _pairs(timesteps(schedule.T, steps, spacing=spacing, offset=offset)):
        from_x0, from_x = schedule.posterior_coefficients(t, s)
        std, log_std = _noise(schedule, t, s, variance)
        if s < 0 and not (noise_at_end and t > 0):
            std = 0.0
        elif s < 0 and variance == "learned_range":
            log_std = _log_std(math.log(1e-20), math.log(schedule.beta_between(s, t)))
        x0_from_x, x0_from_out = _x0(schedule, t, prediction)
        table.append(
            Transition(
                t=t,
                s=s,
                x0_from_x=x0_from_x,
                x0_from_out=x0_from_out,
                clip=clip,
                x_from_x0=from_x0,
                x_from_x=from_x,
                x_from_noise=std,
                log_std=log_std,
            )
        )
    return table


def ddim(
    schedule: Schedule,
    steps: int | Sequence[int] | None = None,
    *,
    eta: float = 0.0,
    prediction: Prediction = "epsilon",
    clip: float | None = 1.0,
    spacing: Spacing = "leading",
    offset: int = 0,
    direction: Literal["clipped", "network"] = "clipped",
    previous: Literal["next", "stride"] = "next",
    final: Literal["clean", "first"] = "clean",
) -> list[Transition]:
    """Tabulates DDIM sampling.

    ε is derived again from the clipped x_0, so that x_s stays on the path that x_0 implies; or it
    is the network's own.

    Args:
        schedule: The schedule the network was trained with.
        steps: Transitions to keep, 1 to T; all T when None. Or the timesteps to visit.
        eta: Share of DDPM's noise, in [0, 1]; 0 is deterministic, 1 is DDPM with β̃.
        prediction: As in `ddpm`.
        clip: As in `ddpm`.
        spacing: As in `ddpm`.
        offset: As in `ddpm`.
        direction: ε is derived from the `clipped` x_0, or is the `network`'s.
        previous: x_s lies at the `next` timestep visited, or a `stride` T // steps below t.
        final: Past the last timestep lies the `clean` image, ᾱ = 1, or what ᾱ_0 says (`first`).

    Returns:
        The transitions in sampling order, noisiest first. The last one adds no noise.

    Raises:
        ValueError: `steps` is outside 1..T, `eta` outside [0, 1], or a name is unknown.

    References:
        Song et al. 2021, https://arxiv.org/abs/2010.02502, Eq. 12 and 16.
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta is {eta}; it must lie in [0, 1]")
    table = []
    visited = timesteps(schedule.T, steps, spacing=spacing, offset=offset)
    # Timesteps that were named have no stride between them.
    strides = previous == "stride" and not isinstance(steps, Sequence)
    for t, following in _pairs(visited):
        s = max(t - schedule.T // len(visited), -1) if strides else following
        a_t = schedule.alpha_bar_at(t)
        a_s = schedule.alpha_bar_at(0 if s < 0 and final == "first" else s)
        variance = (
            schedule.posterior_variance(t, s)
            if s >= 0 or final == "clean"
            else (1.0 - a_s) / (1.0 - a_t) * (1.0 - a_t / a_s)
        )
        sigma = eta * math.sqrt(max(variance, 0.0))
        # At eta = 1 rounding makes this -1e-17 on the last step, so it is clamped at 0.
        from_eps = math.sqrt(max(1.0 - a_s - sigma**2, 0.0))
        x0_from_x, x0_from_out = _x0(schedule, t, prediction)
        if direction == "network":
            eps_from_x0, eps_from_x, eps_from_out = 0.0, *_eps(schedule, t, prediction)
        else:
            noise = math.sqrt(1.0 - a_t)
            eps_from_x0, eps_from_x, eps_from_out = -math.sqrt(a_t) / noise, 1.0 / noise, 0.0
        table.append(
            Transition(
                t=t,
                s=s,
                x0_from_x=x0_from_x,
                x0_from_out=x0_from_out,
                clip=clip,
                x_from_x0=math.sqrt(a_s) + from_eps * eps_from_x0,
                x_from_x=from_eps * eps_from_x,
                x_from_out=from_eps * eps_from_out,
                x_from_noise=sigma,
            )
        )
    return table


def dome272(schedule: Schedule) -> list[Transition]:
    """Tabulates the loop of dome272/Diffusion-Models-pytorch.

    It runs i = T-1 … 1 and never 0, with σ = √β and no clipping, and adds no noise at i = 1:
    x ← (x - β_i / √(1-ᾱ_i) · ε) / √α_i + √β_i · z. Its network predicts ε.

    Returns:
        The T-1 transitions in sampling order; the last result is x at timestep 0.

    Raises:
        ValueError: The schedule has a single timestep, so there is no transition.
    """
    if schedule.T < 2:
        raise ValueError("the dome272 loop runs from T-1 to 1, so T must be at least 2; it is 1")
    table = []
    for t in range(schedule.T - 1, 0, -1):
        beta, alpha, a_t = schedule.beta[t], schedule.alpha[t], schedule.alpha_bar[t]
        x0_from_x, x0_from_out = _x0(schedule, t, "epsilon")
        table.append(
            Transition(
                t=t,
                s=t - 1,
                x0_from_x=x0_from_x,
                x0_from_out=x0_from_out,
                clip=None,
                x_from_x0=0.0,
                x_from_x=1.0 / math.sqrt(alpha),
                x_from_out=-float(beta) / math.sqrt((1.0 - a_t) * alpha),
                x_from_noise=math.sqrt(beta) if t > 1 else 0.0,
            )
        )
    return table


def denoise(
    predict: Predictor,
    table: Table,
    noise: Callable[[int], Samples],
    *,
    x: Samples | None = None,
    before: Samples | None = None,
    keep: bool = True,
) -> Iterator[Step]:
    """Runs the reverse process, a step at a time: the only loop (Ho et al. 2020, Algorithm 2).

    Args:
        predict: The network with its conditions bound; called once a transition.
        table: From `ddpm`, `ddim` or `dome272`.
        noise: Draws for a step number, as `SeededNoise` does: 0 for x_T, k for transition k. It is
            not called for transitions that add none.
        x: Start from here instead of `noise(0)`.
        before: The x_0 of the step before the first of these, where there was one.
        keep: Whether a step's arrays are its own to keep; the loop never writes to them again. If
            not, they hold until the next step is asked for, and the loop takes no new memory.

    Yields:
        A `Step` after each transition.
    """
    if x is None:
        x = noise(0)
    memory = _Memory(keep=keep)
    for k, row in enumerate(table, start=1):
        out, v = split_variance(predicted(predict, x, row.t, before), x)
        x0, mean, spare = memory.of_step(x, out)
        predicted_x0(row, x, out, into=x0, spare=spare)
        np.multiply(x0, row.x_from_x0, out=mean)
        mean += np.multiply(x, row.x_from_x, out=spare)
        if row.x_from_out:
            mean += np.multiply(out, row.x_from_out, out=spare)
        if row.x_from_before:
            if before is None:
                raise ValueError(f"the step at t = {row.t} needs the x_0 of the step before")
            mean += np.multiply(before, row.x_from_before, out=spare)
        if row.x_from_noise:
            if row.log_std is None:
                mean += np.multiply(noise(k), row.x_from_noise, out=spare)
            elif v is not None:
                np.multiply(v, row.log_std[1], out=spare)
                spare += row.log_std[0]
                np.exp(spare, out=spare)
                spare *= noise(k)
                mean += spare
            else:
                raise ValueError(
                    f"the table needs a learned variance; the network gave {out.shape}"
                )
        yield Step(k=k, t=row.t, x_t=x, out=out, x0=x0, x=mean, before=before)
        x, before = mean, x0


class _Memory:
    """Where a loop puts what its steps compute.

    Args:
        keep: Whether each step has arrays of its own, but for the spare one; if not, two steps take
            turns, since one still reads what the one before it wrote.
    """

    def __init__(self, *, keep: bool) -> None:
        self._keep = keep
        self._spare: Samples | None = None
        self._turns: list[tuple[Samples, Samples]] = []

    def of_step(self, x: Samples, out: Samples) -> tuple[Samples, Samples, Samples]:
        """Returns arrays for x_0, for x_s, and for what lies between."""
        if self._spare is None:
            self._spare = _like(x, out)
        if self._keep:
            return _like(x, out), _like(x, out), self._spare
        if len(self._turns) < 2:
            self._turns.append((_like(x, out), _like(x, out)))
        else:
            self._turns.reverse()
        return *self._turns[-1], self._spare


def _like(x: Samples, out: Samples) -> Samples:
    return np.empty(x.shape, np.result_type(x, out))


def predicted(predict: Predictor, x: Samples, t: int, before: Samples | None) -> Samples:
    """Calls a network at one timestep.

    Args:
        predict: The network with its conditions bound.
        x: float32, (N, *sample_shape).
        t: The timestep.
        before: The last step's x_0, for a network that sees it; zeros when None.
    """
    at = np.full(len(x), t, dtype=np.int64)
    if isinstance(predict, SelfConditioned) and before is not None:
        return predict.predict(x, at, before)
    return predict(x, at)


def looks_back(predict: Predictor, table: Table) -> bool:
    """Tells whether a step of a loop needs the x_0 of the step before."""
    return isinstance(predict, SelfConditioned) or any(row.x_from_before for row in table)


def predicted_x0(
    row: Transition,
    x: Samples,
    out: Samples,
    *,
    into: Samples | None = None,
    spare: Samples | None = None,
) -> Samples:
    """Returns the clean images that a network's output implies, clipped; shapes as in `Step`.

    Args:
        row: The step.
        x: What the network was given.
        out: What it gave.
        into: Where to put them, and where to compute; new memory when None.
        spare: As `into`.
    """
    x0: Samples = np.multiply(x, row.x0_from_x, out=into)
    x0 += np.multiply(out, row.x0_from_out, out=spare)
    if row.clip is not None:
        np.clip(x0, -row.clip, row.clip, out=x0)
    return x0


def split_variance(out: Samples, x: Samples) -> tuple[Samples, Samples | None]:
    """Splits a network's output into its prediction and v, which is None where none is learned.

    Args:
        out: float32, (N, C, ...) or, with a learned variance, (N, 2C, ...).
        x: float32, (N, C, ...): what the network was given.
    """
    if out.shape[1] == 2 * x.shape[1]:
        prediction, v = np.split(out, 2, axis=1)
        return prediction, v
    return out, None


def guided(predict: Predictor, scale: float) -> Predictor:
    """Binds classifier-free guidance to a predictor of doubled batches.

    Args:
        predict: Called with 2N samples; its conditions are the wanted ones for the first N and the
            null ones for the last N.
        scale: s in out = u + s·(c - u): 0 ignores the condition, 1 is the conditional network,
            above 1 exaggerates. Ho & Salimans' w is s - 1.

    Returns:
        A predictor of N samples that makes one call a step. A learned variance stays that of the
        wanted condition: it lies in a range, and guidance would leave it.

    References:
        Ho & Salimans 2022, https://arxiv.org/abs/2207.12598, Eq. 6.
    """

    def predict_guided(x: Samples, t: Timesteps) -> Samples:
        conditional, null = np.split(predict(np.concatenate([x, x]), np.concatenate([t, t])), 2)
        (wanted, v), (plain, _) = split_variance(conditional, x), split_variance(null, x)
        out = plain + scale * (wanted - plain)
        return out if v is None else np.concatenate([out, v], axis=1)

    return predict_guided


def _cut(T: int, n: int) -> list[int]:  # noqa: N803
    """Returns int(linspace(-1, T-1, n+1)) without its first number, -1, as torch computes it.

    Torch's numbers are float32, from the nearer end, with one rounding after multiply and add: the
    exact quotient cuts to another number where its own falls below a whole one.
    """
    step = float(np.float32(T) / np.float32(n))
    low = np.arange(1, n + 1)
    near_end = low >= (n + 1) // 2
    exact = np.where(near_end, T - 1 - step * (n - low), -1 + step * low)
    return [int(t) for t in exact.astype(np.float32)]


def _pairs(descending: list[int]) -> Iterator[tuple[int, int]]:
    return zip(descending, [*descending[1:], -1], strict=True)


def _x0(schedule: Schedule, t: int, prediction: Prediction) -> tuple[float, float]:
    a = schedule.alpha_bar_at(t)
    match prediction:
        case "epsilon":  # Ho et al. 2020, Eq. 15
            if a == 0:
                raise ValueError(f"alpha_bar is 0 at t = {t}; ε says nothing about x_0 there")
            return 1.0 / math.sqrt(a), -math.sqrt((1.0 - a) / a)
        case "sample":
            return 0.0, 1.0
        case "v_prediction":  # Salimans & Ho 2022, https://arxiv.org/abs/2202.00512, appendix D
            return math.sqrt(a), -math.sqrt(1.0 - a)
        case _:
            raise ValueError(
                f"prediction is {prediction!r}; there are {', '.join(get_args(Prediction))}"
            )


def _eps(schedule: Schedule, t: int, prediction: Prediction) -> tuple[float, float]:
    """Returns the factors of x_t and of the output in the network's own ε."""
    a = schedule.alpha_bar_at(t)
    match prediction:
        case "epsilon":
            return 0.0, 1.0
        case "sample":
            return 1.0 / math.sqrt(1.0 - a), -math.sqrt(a / (1.0 - a))
        case _:  # v = √ᾱ ε - √(1-ᾱ) x_0
            return math.sqrt(1.0 - a), math.sqrt(a)


def _noise(
    schedule: Schedule, t: int, s: int, variance: Variance
) -> tuple[float, tuple[float, float] | None]:
    """Returns x_from_noise and log_std of an ancestral transition."""
    match variance:
        case "fixed_small":
            std, log_std = math.sqrt(schedule.posterior_variance(t, s)), None
        case "fixed_large":
            std, log_std = math.sqrt(schedule.beta_between(s, t)), None
        case "learned":
            std, log_std = 1.0, (0.0, 0.5)
        case "learned_range":
            std, log_std = 1.0, _log_std(*log_variance_range(schedule, t, s))
        case _:
            raise ValueError(f"variance is {variance!r}; there are {', '.join(get_args(Variance))}")
    return std, log_std


def _log_std(low: float, high: float) -> tuple[float, float]:
    """Returns (a, b) of log σ² = f·high + (1-f)·low, f = (v+1)/2 (Nichol & Dhariwal, Eq. 15)."""
    return (high + low) / 4, (high - low) / 4


def log_variance_range(schedule: Schedule, t: int, s: int) -> tuple[float, float]:
    """Returns log β̃ and log β between s and t, natural logarithms.

    β̃ is 0 at the last transition; its neighbour's stands in, as in Ho et al.'s published code, or
    β itself where the schedule has a single step.
    """
    high = math.log(schedule.beta_between(s, t))
    if s >= 0:
        return math.log(schedule.posterior_variance(t, s)), high
    if t + 1 < schedule.T:
        return math.log(schedule.posterior_variance(t + 1, t)), high
    return high, high
