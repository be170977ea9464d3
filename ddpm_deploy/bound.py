"""The variational bound: how many bits a model needs for a picture, with no second network.

    L = L_T + L_{T-1} + … + L_0                                          (Ho et al. 2020, Eq. 5)

L_T says how far x_T is from pure noise, L_t how far the network's step from x_t is from the true
posterior, L_0 how well the last step names the 8-bit value of every number. Lower is better, and
no model can go below the entropy of the data. Everything is in bits per dimension, sums in float64.

The model is ancestral sampling over all T timesteps with the spec's variance and clipping, whatever
sampler draws its pictures.

References:
    Ho et al. 2020, https://arxiv.org/abs/2006.11239, Eq. 5, 6, 7 and 13.
    Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ddpm_deploy.arrays import Coefficients, Samples, Timesteps
from ddpm_deploy.errors import EngineError
from ddpm_deploy.noise import SeededNoise
from ddpm_deploy.sampling import Predictor, Variance, ddpm, log_variance_range, split_variance
from ddpm_deploy.schedule import Schedule
from ddpm_deploy.spec import ModelSpec

LEVELS = 256
"""Values that a number of an 8-bit picture can have."""

FIRST_STEP = 1 << 63
"""Timestep t draws step FIRST_STEP + t, so that no noise is one that a sampler drew."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Bound:
    """The terms of the bound in bits per dimension, means over images.

    Attributes:
        images: How many there were.
        prior: L_T, the same whatever the network does.
        strata: int64, (K+1,): term k stands for the timesteps strata[k] to strata[k+1] - 1. With
            all timesteps that is 1, 2, … T: one a term.
        steps: float64, (K,): L_t summed over each stratum.
        decoder: L_0.
        spread: Sum over images of their totals' squared distance from `total`.
    """

    images: int
    prior: float
    strata: Timesteps
    steps: Coefficients
    decoder: float
    spread: float

    @property
    def total(self) -> float:
        """The bound: L_T + the sum of L_t + L_0."""
        return self.prior + float(self.steps.sum()) + self.decoder

    @property
    def standard_error(self) -> float:
        """Standard error of `total` as an estimate for all images; NaN for a single image.

        It holds the noise's share and, with fewer timesteps, that of their choice.
        """
        if self.images < 2:
            return math.nan
        return math.sqrt(self.spread / (self.images - 1) / self.images)


def bound(
    predict: Predictor,
    spec: ModelSpec,
    x0: Samples,
    noise: SeededNoise,
    *,
    timesteps: int | None = None,
) -> Bound:
    """Estimates the variational bound of some images, one draw of noise a timestep.

    An image's terms depend on the seed and its index alone, so batches can be cut anywhere and put
    together with `pooled`. Memory is a few batches of images.

    A network with `first_timestep` 1 never saw t = 0 in training; its L_0 is what it gives there
    all the same.

    Args:
        predict: The network with its conditions bound; called once a term, each image with a
            timestep of its own.
        spec: What the network is.
        x0: float32, (N, *sample_shape), in `spec.value_range`; rounded to its 256 levels first.
        noise: Holds the seed and the index of each image.
        timesteps: How many L_t to evaluate an image, 1 to T-1; all when None. With fewer, t is
            drawn from as many strata and weighted by their sizes, which has the same mean. The
            strata are short where t is small, for there L_t is large. L_T and L_0 are always
            evaluated.

    Raises:
        ValueError: `timesteps` is outside 1..T-1, the shapes disagree, or the network gives no
            variance where the spec says that it is learned.
        EngineError: The network's output is not finite.

    References:
        Ho et al. 2020, https://arxiv.org/abs/2006.11239, Eq. 5.
    """
    if len(x0) == 0 or x0.shape != (len(noise.images), *noise.shape):
        raise ValueError(
            f"x0 is {x0.shape} and the noise is for {(len(noise.images), *noise.shape)}; "
            "they must agree, with at least one image"
        )
    model = _Model(spec)
    strata = _strata(spec.schedule.T, timesteps)
    level = np.rint((x0.astype(np.float64) - model.low) / model.width)
    level = np.clip(level, 0, LEVELS - 1)
    clean = model.low + level * model.width

    # Var of x_T is 1 - ᾱ, its mean √ᾱ x_0: the KL to N(0, 1).
    a = spec.schedule.alpha_bar_at(spec.schedule.T - 1)
    prior = _mean(0.5 * (a * clean**2 - a - math.log1p(-a)))
    steps = np.empty((len(strata) - 1, len(x0)))
    for k, (t, size) in enumerate(_chosen(noise, strata)):
        x0_hat, log_variance = model(predict, clean, t, noise)
        steps[k] = size * _mean(model.divergence(clean, x0_hat, log_variance, t))
    t = np.zeros(len(x0), dtype=np.int64)
    mean, log_variance = model(predict, clean, t, noise)  # at t = 0 the mean of p is x_0 itself
    decoder = _mean(-_log_probability(level, mean, log_variance, model.low, model.width))

    totals = prior + steps.sum(axis=0) + decoder
    return Bound(
        images=len(x0),
        prior=float(prior.mean()),
        strata=strata,
        steps=steps.mean(axis=1),
        decoder=float(decoder.mean()),
        spread=float(((totals - totals.mean()) ** 2).sum()),
    )


def pooled(bounds: Iterable[Bound]) -> Bound:
    """Puts batches of images together, as if they had been one.

    Raises:
        ValueError: There are none, or they differ in their timesteps.
    """
    whole: Bound | None = None
    for part in bounds:
        whole = part if whole is None else _pool(whole, part)
    if whole is None:
        raise ValueError("there are no bounds to pool")
    return whole


def _pool(a: Bound, b: Bound) -> Bound:
    if not np.array_equal(a.strata, b.strata):
        raise ValueError("the bounds differ in their timesteps")
    n = a.images + b.images
    share = b.images / n
    return Bound(
        images=n,
        prior=a.prior + share * (b.prior - a.prior),
        strata=a.strata,
        steps=a.steps + share * (b.steps - a.steps),
        decoder=a.decoder + share * (b.decoder - a.decoder),
        # Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance", Eq. 1.5.
        spread=a.spread + b.spread + a.images * share * (b.total - a.total) ** 2,
    )


class _Model:
    """p(x_{t-1} | x_t) of a spec: its numbers as arrays over t."""

    def __init__(self, spec: ModelSpec) -> None:
        schedule = spec.schedule
        rows = ddpm(schedule, prediction=spec.prediction, variance=spec.variance, clip=spec.clip)
        self.schedule: Schedule = schedule
        self.variance: Variance = spec.variance
        self.clip = spec.clip
        self.x0_from_x = np.array([row.x0_from_x for row in rows[::-1]])
        self.x0_from_out = np.array([row.x0_from_out for row in rows[::-1]])
        self.mean_from_x0 = np.array([row.x_from_x0 for row in rows[::-1]])
        ranges = [log_variance_range(schedule, t, t - 1) for t in range(schedule.T)]
        self.log_small, self.log_large = np.array(ranges).T
        self.low = spec.value_range[0]
        self.width = (spec.value_range[1] - spec.value_range[0]) / (LEVELS - 1)

    def __call__(
        self, predict: Predictor, clean: Coefficients, t: Timesteps, noise: SeededNoise
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Returns x_0 as the network sees it at one draw of x_t, and log σ² of its step."""
        eps = np.concatenate(
            [
                SeededNoise(noise.seed, [image], noise.shape)(FIRST_STEP + int(at))
                for image, at in zip(noise.images, t, strict=True)
            ]
        )
        x = self.schedule.diffuse(clean, t, eps)
        given = predict(x, t)
        if not np.isfinite(given).all():
            bad = int(t[np.flatnonzero(~np.isfinite(given).reshape(len(t), -1).all(axis=1))[0]])
            raise EngineError(
                f"The network's output at t = {bad} is not finite.",
                hint="Find the step with: ddpm-deploy verify",
            )
        out, v = split_variance(given, x)
        across = (-1,) + (1,) * (x.ndim - 1)
        x0: NDArray[np.float64] = self.x0_from_x[t].reshape(across) * x
        x0 = x0 + self.x0_from_out[t].reshape(across) * out
        if self.clip is not None:
            x0 = np.clip(x0, -self.clip, self.clip)
        return x0, self._log_variance(t, v, across)

    def _log_variance(
        self, t: Timesteps, v: Samples | None, across: tuple[int, ...]
    ) -> NDArray[np.float64]:
        low: NDArray[np.float64] = self.log_small[t].reshape(across)
        high: NDArray[np.float64] = self.log_large[t].reshape(across)
        if self.variance == "fixed_small":
            return low
        if self.variance == "fixed_large":
            # At t = 0 Ho et al.'s published code takes the neighbour's β̃ here too.
            return np.where(t.reshape(across) == 0, low, high)
        if v is None:
            raise ValueError("the spec has a learned variance and the network gives none")
        learned = v.astype(np.float64)
        if self.variance == "learned_range":  # Nichol & Dhariwal 2021, Eq. 15
            learned = low + (learned + 1) / 2 * (high - low)
        return learned

    def divergence(
        self,
        clean: Coefficients,
        x0_hat: NDArray[np.float64],
        log_variance: NDArray[np.float64],
        t: Timesteps,
    ) -> NDArray[np.float64]:
        """Returns KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) of each number, in nats.

        Both means take x_t alike, so they differ by the factor of x_0 times its error.
        """
        across = (-1,) + (1,) * (clean.ndim - 1)
        log_true = self.log_small[t].reshape(across)
        error = self.mean_from_x0[t].reshape(across) * (clean - x0_hat)
        ratio = log_true - log_variance
        nats: NDArray[np.float64] = np.exp(ratio) - 1.0 - ratio + error**2 * np.exp(-log_variance)
        return 0.5 * nats


def _strata(T: int, count: int | None) -> Timesteps:  # noqa: N803
    """Cuts 1..T-1 into `count` runs, single timesteps first and then growing geometrically."""
    whole = T - 1
    if count is None:
        count = whole
    elif not 1 <= count <= whole:
        raise ValueError(
            f"timesteps is {count}; this schedule has 1 to {whole} between L_0 and L_T"
        )
    k = np.arange(count + 1)
    # T^(k/K) is convex, so where it lies above 1 + k it grows by at least 1 a step.
    growth = np.floor(np.power(float(T), k / max(count, 1)) + 1e-9)
    return np.maximum(1 + k, growth.astype(np.int64))


def _chosen(noise: SeededNoise, strata: Timesteps) -> Iterable[tuple[Timesteps, int]]:
    """Draws one timestep for each image in each stratum, and gives the stratum's size with them."""
    # The counter's highest word is 0 in every draw of noise, so 1 keeps these apart.
    words = np.array(
        [
            np.random.Philox(
                counter=np.array([0, 0, 0, 1], dtype=np.uint64),
                key=np.array([noise.seed, image], dtype=np.uint64),
            ).random_raw(len(strata) - 1)
            for image in noise.images
        ]
    )
    uniform = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53  # [0, 1)
    for k, (first, end) in enumerate(pairwise(strata)):
        size = int(end - first)
        yield first + (uniform[:, k] * size).astype(np.int64), size


def _mean(nats: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the mean over each image's numbers, in bits."""
    means: NDArray[np.float64] = nats.reshape(len(nats), -1).mean(axis=1) / math.log(2)
    return means


def _log_probability(
    level: NDArray[np.float64],
    mean: NDArray[np.float64],
    log_variance: NDArray[np.float64],
    low: float,
    width: float,
) -> NDArray[np.float64]:
    """Returns the logarithm of N(mean, σ²)'s weight between the neighbours' midpoints.

    The first and the last level take everything beyond them (Ho et al. 2020, Eq. 13).
    """
    scale = np.exp(-0.5 * log_variance)
    below = np.where(level == 0, -np.inf, (low + (level - 0.5) * width - mean) * scale)
    above = np.where(level == LEVELS - 1, np.inf, (low + (level + 0.5) * width - mean) * scale)
    return log_normal_between(below, above)


def log_normal_between(low: ArrayLike, high: ArrayLike) -> NDArray[np.float64]:
    """Returns log(Φ(high) - Φ(low)), the standard normal's weight of an interval.

    An interval on one side of 0 is reflected to the right, where Q(x) = 1 - Φ(x) =
    ½ exp(-x²/2) erfcx(x/√2) keeps its digits as far out as float64 goes: log Q(1e100) is finite.

    Args:
        low: Any shape; -inf is allowed.
        high: Broadcastable with `low`, and above it; +inf is allowed.

    Returns:
        float64; to 1e-13 of its value, or of 1 where that is more, for intervals wider than 1e-3.
    """
    low, high = np.broadcast_arrays(np.asarray(low, np.float64), np.asarray(high, np.float64))
    left = high <= 0
    near, far = np.where(left, -high, low), np.where(left, -low, high)
    beyond = near >= 0
    a, b = np.where(beyond, near, 0.0), np.where(beyond, far, np.inf)
    # exp(a²/2) (Q(a) - Q(b)), with the squares' difference taken as a product.
    decay = np.where(np.isinf(b), 0.0, np.exp(-0.5 * (b - a) * np.minimum(a + b, 1e300)))
    tail = np.log(0.5 * (_erfcx(a / math.sqrt(2)) - decay * _erfcx(b / math.sqrt(2))))
    around = np.log1p(-np.where(beyond, 0.5, _upper(-near) + _upper(far)))
    return np.where(beyond, tail - 0.5 * a * a, around)


def _upper(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns Q(x) = 1 - Φ(x) for x >= 0; for others 0."""
    x = np.minimum(np.maximum(x, 0.0), 40.0)  # Q(40) is below the least float64
    return 0.5 * np.exp(-0.5 * x * x) * _erfcx(x / math.sqrt(2))


def _erfcx(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns exp(x²) erfc(x) for x >= 0, to 2e-15 of its value; 0 for +inf.

    (1 + 2x) exp(x²) erfc(x) is smooth in (x - 3.75) / (x + 3.75) over the whole half-line, so one
    Chebyshev series serves it all.

    References:
        Shepherd & Laframboise 1981, "Chebyshev approximation of (1 + 2x) exp(x²) erfc x in
        0 ≤ x < ∞", Mathematics of Computation 36.
    """
    u = 1.0 - 7.5 / (x + 3.75)
    return np.asarray(np.polynomial.chebyshev.chebval(u, _SERIES)) / (1.0 + 2.0 * x)


# From the function's values at 64 Chebyshev nodes in 50 digits; the next is below 3e-18.
_SERIES = (
    1.1775789345674017541,
    -0.0045900545806464773309,
    -0.084249133366517915584,
    0.059209939998191890498,
    -0.026658668435305752277,
    0.0090749976707052650939,
    -0.0024131635404176081909,
    0.00049077583652580863229,
    -0.000069169733025012063671,
    4.1390279860730101675e-6,
    7.7403830661984906686e-7,
    -2.1886401049234395661e-7,
    1.0764999465670910377e-8,
    4.5219598112182868979e-9,
    -7.7544002088313511065e-10,
    -6.3180883408866844944e-11,
    2.8687950109306698981e-11,
    1.945586854577734723e-13,
    -9.6546967484334389059e-13,
    3.2525481481487398415e-14,
    3.3478119482068053878e-14,
    -1.8645628804193131015e-15,
    -1.2507950530688647085e-15,
    7.418235256624043463e-17,
    5.0681489047961113168e-17,
)
