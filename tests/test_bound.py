"""The bound against closed forms for Gaussian data, scipy's quadrature and the paper's formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import special, stats

from ddpm_deploy import ModelSpec, Schedule, SeededNoise, cosine, linear
from ddpm_deploy.arrays import Samples, Timesteps
from ddpm_deploy.bound import Bound, _strata, bound, log_normal_between, pooled
from ddpm_deploy.errors import EngineError
from ddpm_deploy.sampling import Predictor, Variance
from tests.conftest import GaussianPredictor

MEAN, STD = 0.1, 0.2
SHAPE = (3, 8, 8)
LN2 = math.log(2)


def spec(steps: int = 100, *, variance: Variance = "fixed_small") -> ModelSpec:
    """A short schedule that ends in noise, or nearly; nothing is clipped."""
    schedule = linear(steps, end=min(20 / steps, 0.5))
    return ModelSpec(sample_shape=SHAPE, schedule=schedule, variance=variance, clip=None)


def pictures(n: int, *, mean: float = MEAN, std: float = STD, seed: int = 0) -> Samples:
    """8-bit pictures with normal numbers."""
    x = np.random.default_rng(seed).normal(mean, std, (n, *SHAPE))
    level = np.clip(np.rint((x + 1) * 127.5), 0, 255)
    return (level / 127.5 - 1).astype(np.float32)


def perfect(spec: ModelSpec) -> GaussianPredictor:
    return GaussianPredictor(spec.schedule, mean=MEAN, std=STD)


def noise(n: int, seed: int = 0) -> SeededNoise:
    return SeededNoise(seed, range(n), SHAPE)


def with_variance(predict: Predictor, v: float | NDArray[np.float64]) -> Predictor:
    """A network whose second half says `v`: one number, or one for each timestep."""

    def learned(x: Samples, t: Timesteps) -> Samples:
        said = np.asarray(v)[t] if np.ndim(v) else np.full(len(t), v)
        across = said.reshape(-1, *[1] * (x.ndim - 1))
        half = np.broadcast_to(across, x.shape).astype(np.float32)
        return np.concatenate([predict(x, t), half], axis=1)

    return learned


def log_weight(low: NDArray[np.float64], high: NDArray[np.float64]) -> NDArray[np.float64]:
    """log(Φ(high) - Φ(low)) by scipy's log_ndtr, on the left side, where that keeps its digits."""
    right = low + high > 0
    low, high = np.where(right, -high, low), np.where(right, -low, high)
    near, far = special.log_ndtr(high), special.log_ndtr(low)
    return np.asarray(near + np.log(-np.expm1(far - near)))


class Analytic:
    """The bound of the exact predictor on given numbers x_0, in expectation over the noise.

    Ancestral sampling has the mean w·x̂_0 + u·x_t and the true posterior w·x_0 + u·x_t, so the KL
    depends on w (x_0 - x̂_0). The exact predictor is x̂_0 = m + k (x_t - √ᾱ m) with
    k = √ᾱ s² / (ᾱ s² + 1 - ᾱ), so x_0 - x̂_0 = (1 - k√ᾱ)(x_0 - m) - k √(1-ᾱ) ε: normal, with a mean
    A and a standard deviation B that are known for every x_0.
    """

    def __init__(self, spec: ModelSpec, x0: Samples) -> None:
        self.schedule, self.variance = spec.schedule, spec.variance
        self.x0 = x0.astype(np.float64)
        beta = np.asarray(self.schedule.beta)
        self.a = np.cumprod(1 - beta)
        before = np.concatenate([[1.0], self.a[:-1]])
        self.small = beta * (1 - before) / (1 - self.a)
        self.w = np.sqrt(before) * beta / (1 - self.a)
        self.p_variance = self.small.copy() if self.variance == "fixed_small" else beta.copy()
        self.p_variance[0] = self.small[1]
        self.k = np.sqrt(self.a) * STD**2 / (self.a * STD**2 + 1 - self.a)

    def prior(self) -> float:
        a = self.a[-1]
        gap = stats.norm(np.sqrt(a) * self.x0, np.sqrt(1 - a))
        # ∫ q log q/p: minus the entropy of q, plus half of E[x² + log 2π].
        cross = 0.5 * (gap.var() + gap.mean() ** 2 + math.log(2 * math.pi))
        return float(np.mean(cross - gap.entropy())) / LN2

    def step(self, t: int) -> tuple[float, float]:
        """L_t and the standard deviation of its estimate from one draw for every number."""
        ratio = self.small[t] / self.p_variance[t]
        shift = (1 - self.k[t] * np.sqrt(self.a[t])) * (self.x0 - MEAN)
        blur = self.k[t] * np.sqrt(1 - self.a[t])
        scale = self.w[t] ** 2 / (2 * self.p_variance[t])
        mean = 0.5 * (ratio - 1 - np.log(ratio)) + scale * (shift**2 + blur**2)
        # Var (A + Bε)² = 4 A² B² + 2 B⁴.
        variance = scale**2 * (4 * shift**2 * blur**2 + 2 * blur**4)
        return float(mean.mean()) / LN2, math.sqrt(variance.mean() / self.x0.size) / LN2

    def decoder(self) -> tuple[float, float]:
        """L_0 by Gauss-Hermite quadrature over ε, and its estimate's standard deviation."""
        node, weight = np.polynomial.hermite_e.hermegauss(80)
        weight = weight / weight.sum()
        levels, counts = np.unique(np.rint((self.x0 + 1) * 127.5), return_counts=True)
        x0 = (levels / 127.5 - 1)[:, None]
        x = np.sqrt(self.a[0]) * x0 + np.sqrt(1 - self.a[0]) * node
        mean = MEAN + self.k[0] * (x - np.sqrt(self.a[0]) * MEAN)
        std = np.sqrt(self.p_variance[0])
        assert levels.min() > 0
        assert levels.max() < 255
        bits = -log_weight((x0 - 1 / 255 - mean) / std, (x0 + 1 / 255 - mean) / std) / LN2
        first, second = bits @ weight, bits**2 @ weight
        share = counts / counts.sum()
        return float(first @ share), math.sqrt((second - first**2) @ share / counts.sum())


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_the_exact_predictor_has_its_analytic_bound(variance: Variance) -> None:
    model = spec(variance=variance)
    x0 = pictures(24)
    found = bound(perfect(model), model, x0, noise(24))
    analytic = Analytic(model, x0)

    assert found.prior == pytest.approx(analytic.prior(), rel=1e-9)
    assert found.strata.tolist() == list(range(1, 101))
    expected, deviation = np.array([analytic.step(t) for t in range(1, 100)]).T
    # 99 terms: one in 15,000 lies beyond 4 standard deviations, so 4.5 for all of them.
    assert np.all(np.abs(found.steps - expected) < 4.5 * deviation)
    decoder, decoder_deviation = analytic.decoder()
    assert abs(found.decoder - decoder) < 4 * decoder_deviation

    total = analytic.prior() + expected.sum() + decoder
    over = math.sqrt((deviation**2).sum() + decoder_deviation**2)
    assert over < 0.02 * total
    assert abs(found.total - total) < 4 * over
    assert found.total == pytest.approx(found.prior + found.steps.sum() + found.decoder, rel=1e-12)


def test_the_bound_lies_above_the_data_s_own_code_length_and_near_it_with_many_steps() -> None:
    x0 = pictures(16)
    edges = (np.arange(257) - 0.5) / 127.5 - 1
    edges[0], edges[-1] = -np.inf, np.inf
    weights = np.diff(stats.norm(MEAN, STD).cdf(edges))
    entropy = float(-np.log2(weights) @ weights)
    gaps = []
    for steps in (50, 1000):
        model = spec(steps)
        found = bound(perfect(model), model, x0, noise(16))
        gaps.append(found.total - entropy)
    # 3,072 numbers of the data: their mean code length is 1/√(2·3072) nats from the entropy.
    assert gaps[0] > 3 / math.sqrt(2 * x0.size) / LN2
    assert 0 < gaps[1] < 0.2 * gaps[0]


def test_l_t_is_the_prior_s_kl_and_does_not_depend_on_the_network() -> None:
    model = spec()
    x0 = pictures(3)
    a = float(np.prod(1 - np.asarray(model.schedule.beta)))
    kl = 0.5 * (a * x0.astype(np.float64) ** 2 + (1 - a) - 1 - math.log(1 - a))
    for predict in (perfect(model), lambda x, t: 0 * x):
        found = bound(predict, model, x0, noise(3), timesteps=2)
        assert found.prior == pytest.approx(kl.mean() / LN2, rel=1e-9)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned", "learned_range"])
def test_a_step_s_term_is_the_kl_of_two_normals(variance: Variance) -> None:
    """The textbook KL of N(μ̃, β̃) and N(μ_θ, σ²), both means written out in full."""
    model = spec(variance=variance)
    x0 = pictures(2)
    beta = np.asarray(model.schedule.beta)
    a = np.cumprod(1 - beta)
    seen: dict[int, tuple[Samples, Samples]] = {}
    v = np.sin(np.arange(100.0)) - (4 if variance == "learned" else 0)
    learned = variance.startswith("learned")
    predict = with_variance(perfect(model), v) if learned else perfect(model)

    def recording(x: Samples, t: Timesteps) -> Samples:
        out = predict(x, t)
        seen[int(t[0])] = x, out[:, :3]
        return out

    found = bound(recording, model, x0, noise(2))
    for t in (1, 2, 50, 99):
        x, eps = (array.astype(np.float64) for array in seen[t])
        mean = (x - beta[t] / np.sqrt(1 - a[t]) * eps) / np.sqrt(1 - beta[t])  # Algorithm 2
        posterior = (
            np.sqrt(a[t - 1]) * beta[t] * x0 + np.sqrt(1 - beta[t]) * (1 - a[t - 1]) * x
        ) / (1 - a[t])
        small = beta[t] * (1 - a[t - 1]) / (1 - a[t])
        sigma2 = {
            "fixed_small": small,
            "fixed_large": beta[t],
            "learned": np.exp(v[t]),
            "learned_range": beta[t] ** ((v[t] + 1) / 2) * small ** ((1 - v[t]) / 2),
        }[variance]
        kl = 0.5 * (np.log(sigma2 / small) + (small + (posterior - mean) ** 2) / sigma2 - 1)
        # v reaches the bound as float32.
        assert found.steps[t - 1] == pytest.approx(kl.mean() / LN2, rel=1e-6, abs=1e-9)


def test_a_learned_variance_that_says_the_fixed_one_gives_its_bound() -> None:
    x0 = pictures(2)
    small, large = spec(), spec(variance="fixed_large")
    expected = bound(perfect(small), small, x0, noise(2))
    ranged = spec(variance="learned_range")
    found = bound(with_variance(perfect(ranged), -1.0), ranged, x0, noise(2))
    np.testing.assert_allclose(found.steps, expected.steps, rtol=1e-9, atol=1e-12)
    assert found.decoder == pytest.approx(expected.decoder, rel=1e-9)

    learned = spec(variance="learned")
    beta = np.asarray(small.schedule.beta)
    a = np.cumprod(1 - beta)
    log_small = np.log(beta[1:] * (1 - a[:-1]) / (1 - a[1:]))
    log_small = np.concatenate([log_small[:1], log_small])
    found = bound(with_variance(perfect(learned), log_small), learned, x0, noise(2))
    # float32 keeps log β̃ = -9 to 5e-7.
    np.testing.assert_allclose(found.steps, expected.steps, rtol=2e-6, atol=1e-9)
    assert found.decoder == pytest.approx(expected.decoder, rel=2e-6)

    # β at every t but 0, where fixed_large takes β̃ of the neighbour: v = -1 there.
    v = np.ones(100)
    v[0] = -1
    expected = bound(perfect(large), large, x0, noise(2))
    found = bound(with_variance(perfect(ranged), v), ranged, x0, noise(2))
    np.testing.assert_allclose(found.steps, expected.steps, rtol=1e-9, atol=1e-12)
    assert found.decoder == pytest.approx(expected.decoder, rel=1e-9)


def test_the_last_step_interpolates_from_the_neighbour_s_variance_to_beta() -> None:
    """Nichol & Dhariwal's convention: log β̃_0 is replaced by log β̃_1, log β_0 stays."""
    model = spec(variance="learned_range")
    x0 = pictures(2)
    beta = np.asarray(model.schedule.beta)
    a = np.cumprod(1 - beta)
    seen: list[tuple[Samples, Samples]] = []
    predict = with_variance(perfect(model), 0.5)

    def recording(x: Samples, t: Timesteps) -> Samples:
        out = predict(x, t)
        if t[0] == 0:
            seen.append((x, out[:, :3]))
        return out

    found = bound(recording, model, x0, noise(2), timesteps=1)
    x, eps = (array.astype(np.float64) for array in seen[0])
    mean = (x - np.sqrt(beta[0]) * eps) / np.sqrt(1 - beta[0])
    neighbour = beta[1] * (1 - a[0]) / (1 - a[1])
    std = math.sqrt(neighbour**0.25 * beta[0] ** 0.75)
    bits = -np.log2(
        special.ndtr((x0 + 1 / 255 - mean) / std) - special.ndtr((x0 - 1 / 255 - mean) / std)
    )
    assert found.decoder == pytest.approx(bits.mean(), rel=1e-6)


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_every_prediction_type_of_one_network_has_the_same_bound(prediction: str) -> None:
    model = spec()
    exact = perfect(model)
    a = np.asarray(model.schedule.alpha_bar)

    def other(x: Samples, t: Timesteps) -> Samples:
        root = np.sqrt(a[t]).reshape(-1, 1, 1, 1)
        sigma = np.sqrt(1 - a[t]).reshape(-1, 1, 1, 1)
        eps = exact(x, t).astype(np.float64)
        x_0 = (x - sigma * eps) / root
        return (x_0 if prediction == "sample" else root * eps - sigma * x_0).astype(np.float32)

    x0 = pictures(2)
    expected = bound(exact, model, x0, noise(2))
    changed = model.with_changes(prediction=prediction)
    found = bound(other, changed, x0, noise(2))
    # One rounding to float32 of the output, at x_0 - x̂_0 of 1e-2 for small t.
    np.testing.assert_allclose(found.steps, expected.steps, rtol=1e-4)


def test_x_0_is_clipped_as_the_spec_says() -> None:
    x0 = np.ones((2, *SHAPE), np.float32)
    over = lambda x, t: np.full_like(x, 1.5)  # noqa: E731
    free = spec().with_changes(prediction="sample")
    clipped = free.with_changes(clip=1.0)
    found = bound(over, clipped, x0, noise(2))
    # Clipped to 1, which is x_0: no error is left, and L_0 is half of the brightest level's bin.
    np.testing.assert_allclose(found.steps, 0, atol=1e-12)
    std = math.sqrt(free.schedule.posterior_variance(1, 0))
    assert found.decoder == pytest.approx(-stats.norm.logcdf(1 / 255 / std) / LN2, rel=1e-6)
    assert bound(over, free, x0, noise(2)).steps.min() > 0


@pytest.mark.parametrize("mean", [-3.0, -1.0, -0.3, 0.0021, 0.999, 1.5])
@pytest.mark.parametrize("beta", [1e-4, 0.3])
def test_the_decoder_s_probabilities_sum_to_one(mean: float, beta: float) -> None:
    """All 256 values of one number, for means inside, at the edge and far outside of the range."""
    schedule = Schedule(np.full(3, beta))
    model = ModelSpec(sample_shape=(1, 1, 1), schedule=schedule, prediction="sample", clip=None)
    draws = SeededNoise(0, [0], (1, 1, 1))

    def predict(x: Samples, t: Timesteps) -> Samples:
        return np.full_like(x, mean)

    values = (np.arange(256) / 127.5 - 1).astype(np.float32).reshape(256, 1, 1, 1, 1)
    bits = np.array([bound(predict, model, x0, draws).decoder for x0 in values])
    assert np.exp2(-bits).sum() == pytest.approx(1.0, abs=1e-12)


def test_fewer_timesteps_estimate_the_same_bound() -> None:
    model = spec()
    x0 = pictures(48)
    analytic = Analytic(model, x0)
    expected = analytic.prior() + sum(analytic.step(t)[0] for t in range(1, 100))
    expected += analytic.decoder()[0]

    estimates = [
        bound(perfect(model), model, x0, noise(48, seed), timesteps=12) for seed in range(40)
    ]
    totals = np.array([one.total for one in estimates])
    # The mean of 40 estimates is within 4 of its standard errors of the analytic value.
    assert abs(totals.mean() - expected) < 4 * totals.std(ddof=1) / math.sqrt(40)
    # An estimate's own error says how far it is: it holds the images' spread too, which these
    # estimates share, so it is above theirs; 40 estimates give theirs to 1/√80 = 11 %.
    own = float(np.mean([one.standard_error for one in estimates]))
    assert 0 < totals.std(ddof=1) < 1.3 * own
    assert own < 0.02 * expected


@settings(deadline=None)  # the machine may be busy
@given(st.integers(2, 4000), st.data())
def test_the_strata_are_a_partition_of_the_timesteps(steps: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, steps - 1))
    strata = _strata(steps, count)
    assert strata[0] == 1
    assert strata[-1] == steps
    assert len(strata) == count + 1
    assert np.diff(strata).min() >= 1


@pytest.mark.parametrize("timesteps", [1, 5])
def test_every_timestep_of_a_stratum_is_as_likely_as_another(timesteps: int) -> None:
    model = spec(40)
    drawn: list[int] = []

    def recording(x: Samples, t: Timesteps) -> Samples:
        drawn.extend(t.tolist())
        return np.zeros_like(x)

    small = model.with_changes(sample_shape=(1, 1, 1))
    n = 4000
    found = bound(
        recording,
        small,
        np.zeros((n, 1, 1, 1), np.float32),
        SeededNoise(3, range(n), (1, 1, 1)),
        timesteps=timesteps,
    )
    for first, end in zip(found.strata[:-1], found.strata[1:], strict=True):
        counts = np.bincount([t for t in drawn if first <= t < end], minlength=end)[first:]
        assert counts.sum() == n
        if end - first > 1:
            assert stats.chisquare(counts).pvalue > 1e-4


def test_all_timesteps_asked_for_by_number_are_all_timesteps() -> None:
    model = spec(12)
    x0 = pictures(2)
    whole = bound(perfect(model), model, x0, noise(2))
    asked = bound(perfect(model), model, x0, noise(2), timesteps=11)
    np.testing.assert_array_equal(asked.steps, whole.steps)
    assert asked.total == whole.total


def test_batches_pool_to_the_bound_of_all_images() -> None:
    model = spec(20)
    x0 = pictures(9)
    for timesteps in (None, 4):
        whole = bound(perfect(model), model, x0, noise(9), timesteps=timesteps)
        parts = []
        for cut in (slice(6, 9), slice(0, 1), slice(1, 6)):
            draws = SeededNoise(0, range(9)[cut], SHAPE)
            parts.append(bound(perfect(model), model, x0[cut], draws, timesteps=timesteps))
        together = pooled(parts)
        assert together.images == 9
        np.testing.assert_allclose(together.steps, whole.steps, rtol=1e-12)
        assert together.total == pytest.approx(whole.total, rel=1e-12)
        assert together.standard_error == pytest.approx(whole.standard_error, rel=1e-9)


def test_the_standard_error_is_that_of_the_images_totals() -> None:
    model = spec(10)
    x0 = np.concatenate([pictures(3, std=0.1), pictures(3, std=0.5)])
    whole = bound(perfect(model), model, x0, noise(6))
    each = [
        bound(perfect(model), model, x0[i : i + 1], SeededNoise(0, [i], SHAPE)) for i in range(6)
    ]
    assert whole.standard_error == pytest.approx(stats.sem([one.total for one in each]), rel=1e-9)
    assert math.isnan(each[0].standard_error)


def test_no_noise_of_the_bound_is_one_that_a_sampler_draws() -> None:
    model = spec(5)
    seen: list[Samples] = []

    def recording(x: Samples, t: Timesteps) -> Samples:
        seen.append(x)
        return np.zeros_like(x)

    draws = noise(1)
    bound(recording, model, np.zeros((1, *SHAPE), np.float32), draws)
    for x in seen:  # x_0 is nearly 0, so x_t is √(1-ᾱ) ε: the same direction would show
        for k in range(8):
            assert abs(np.corrcoef(x.ravel(), draws(k).ravel())[0, 1]) < 0.4  # 192 numbers: 5.5 σ


def test_images_between_the_levels_are_rounded_first() -> None:
    model = spec(5)
    x0 = pictures(2)
    near = (x0 + np.float32(0.4 / 127.5)).clip(-1, 1)
    assert bound(perfect(model), model, near, noise(2)).total == pytest.approx(
        bound(perfect(model), model, x0, noise(2)).total, rel=1e-6
    )


def test_another_value_range_has_256_levels_too() -> None:
    model = spec(50)
    half = model.with_changes(value_range=(0.0, 1.0))
    x0 = pictures(4)
    exact = GaussianPredictor(model.schedule, mean=(MEAN + 1) / 2, std=STD / 2)
    found = bound(exact, half, ((x0 + 1) / 2).astype(np.float32), noise(4))
    # Half the width at the same noise: harder, yet above the same entropy.
    expected = -np.log2(np.diff(stats.norm(MEAN, STD).cdf([MEAN - 1 / 255, MEAN + 1 / 255])))
    assert found.total > float(expected[0])
    assert np.isfinite(found.total)


def test_a_schedule_of_one_timestep_has_l_0_and_l_t_alone() -> None:
    model = ModelSpec(sample_shape=SHAPE, schedule=Schedule(np.array([0.5])), clip=None)
    found = bound(perfect(model), model, pictures(2), noise(2))
    assert found.steps.size == 0
    assert found.total == pytest.approx(found.prior + found.decoder)


def test_settings_that_make_no_sense_are_refused() -> None:
    model = spec(5)
    x0 = pictures(2)
    for timesteps in (0, 5):
        with pytest.raises(ValueError, match=rf"timesteps is {timesteps}; .* has 1 to 4"):
            bound(perfect(model), model, x0, noise(2), timesteps=timesteps)
    with pytest.raises(ValueError, match="they must agree"):
        bound(perfect(model), model, x0, noise(3))
    learned = spec(5, variance="learned")
    with pytest.raises(ValueError, match="the network gives none"):
        bound(perfect(model), learned, x0, noise(2))
    with pytest.raises(ValueError, match="no bounds"):
        pooled([])
    one = bound(perfect(model), model, x0, noise(2))
    with pytest.raises(ValueError, match="differ in their timesteps"):
        pooled([one, bound(perfect(model), model, x0, noise(2), timesteps=2)])


def test_a_network_that_gives_nan_is_an_error_with_its_timestep() -> None:
    model = spec(8)

    def broken(x: Samples, t: Timesteps) -> Samples:
        return np.where((t == 6)[:, None, None, None], np.nan, x).astype(np.float32)

    with pytest.raises(EngineError, match="output at t = 6 is not finite"):
        bound(broken, model, pictures(2), noise(2))


def test_the_cosine_schedule_has_a_finite_bound_up_to_its_last_step() -> None:
    model = ModelSpec(sample_shape=SHAPE, schedule=cosine(1000), clip=1.0)
    found: Bound = bound(perfect(model), model, pictures(4), noise(4), timesteps=50)
    assert np.isfinite(found.total)


@settings(deadline=None)  # the machine may be busy
@given(
    st.floats(-60, 60),
    st.floats(1e-3, 50),
)
def test_the_normal_s_weight_of_an_interval_equals_scipy_s(low: float, width: float) -> None:
    # At 60 the logarithms are 1,800, each rounded to 2e-13; a width of 1e-3 makes that 4e-12 of
    # their difference.
    expected = log_weight(np.array(low), np.array(low + width))
    assert float(log_normal_between(low, low + width)) == pytest.approx(
        float(expected), rel=1e-11, abs=1e-11
    )


def test_the_normal_s_weight_holds_in_the_far_tails() -> None:
    inf = np.inf
    found = log_normal_between([-inf, -inf, 40.0, -1e8, -inf], [inf, -40.0, inf, -1e7, 9.0])
    expected = [0.0, *special.log_ndtr([-40.0, -40.0, -1e7, 9.0])]
    np.testing.assert_allclose(found, expected, rtol=1e-13)
