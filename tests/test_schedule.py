"""Schedules against the papers' formulas and peers; q and its posterior against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import special, stats

from ddpm_deploy import Schedule, cosine, linear, scaled_linear, sigmoid
from ddpm_deploy.schedule import SCHEDULES, named_schedule
from tests.conftest import DATA

ALL = [linear(), scaled_linear(start=0.00085, end=0.012), cosine(4000), sigmoid()]

betas = st.lists(st.floats(1e-6, 0.999), min_size=2, max_size=40).map(np.array)


def exact(schedule: Schedule) -> tuple[NDArray[np.longdouble], NDArray[np.longdouble]]:
    """β, and ᾱ with ᾱ_{-1} = 1 in front, in 64 bits of mantissa."""
    beta = np.asarray(schedule.beta).astype(np.longdouble)
    return beta, np.concatenate([np.ones(1, np.longdouble), np.cumprod(1 - beta)])


def test_linear_is_that_of_the_paper() -> None:
    """Ho et al., section 4: constants increasing linearly from 1e-4 to 0.02, T = 1000."""
    beta = np.asarray(linear().beta)
    assert beta[0] == 1e-4
    assert beta[-1] == 0.02
    assert beta.size == 1000
    np.testing.assert_allclose(np.diff(beta), (0.02 - 1e-4) / 999, rtol=1e-9)
    # "so that L_T ≈ 10^-5 bits per dimension" (section 4) at x_0² = 1.
    a = linear().alpha_bar[-1]
    assert 0.5 * (a - a - math.log1p(-a)) / math.log(2) == pytest.approx(3e-5, rel=0.05)


def test_scaled_linear_has_roots_that_rise_linearly() -> None:
    schedule = scaled_linear(500, start=0.00085, end=0.012)
    roots = torch.linspace(0.00085**0.5, 0.012**0.5, 500, dtype=torch.float64)
    np.testing.assert_allclose(schedule.beta, (roots**2).numpy(), rtol=1e-13)


def test_cosine_is_nichol_and_dhariwal_s_equation_17() -> None:
    def f(t: int) -> float:
        return math.cos((t / 4000 + 0.008) / 1.008 * math.pi / 2) ** 2

    schedule = cosine(4000)
    expected = np.array([f(t + 1) / f(0) for t in range(4000)])
    capped = int(np.argmax(np.asarray(schedule.beta) >= 0.999))
    assert capped >= 3990  # the cap is for the singular end alone
    np.testing.assert_allclose(schedule.alpha_bar[:capped], expected[:capped], rtol=1e-9)
    assert schedule.beta.max() == 0.999


def test_sigmoid_is_jabri_s_algorithm_1() -> None:
    def gamma(t: float, start: float, end: float, tau: float) -> float:
        v_start, v_end = special.expit(start / tau), special.expit(end / tau)
        return float((v_end - special.expit((t * (end - start) + start) / tau)) / (v_end - v_start))

    for curve in [(-3.0, 3.0, 1.0), (0.0, 3.0, 0.3), (-3.0, 3.0, 0.7)]:
        start, end, tau = curve
        schedule = sigmoid(200, start=start, end=end, tau=tau)
        expected = np.array([gamma((t + 1) / 200, *curve) for t in range(200)])
        # The last ᾱ is 0 in the paper; β is capped at 0.999 there.
        np.testing.assert_allclose(schedule.alpha_bar[:-1], expected[:-1], rtol=1e-9)
        assert 0 < schedule.alpha_bar[-1] < 2e-3 * schedule.alpha_bar[-2]


def test_sigmoid_is_that_of_lucidrains() -> None:
    peer = np.load(DATA / "samplers" / "lucidrains.npz")
    # Its sigmoid(3) is float32, 3e-8 off, which the last quotients enlarge 200 times.
    np.testing.assert_allclose(sigmoid().beta, peer["betas"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(sigmoid().alpha_bar, peer["alphas_cumprod"], rtol=0, atol=1e-7)


def test_linear_is_that_of_torch_code() -> None:
    """What dome272 and diffusers compute: float32 linspace and cumprod."""
    beta = torch.linspace(1e-4, 0.02, 1000)
    np.testing.assert_allclose(linear().beta, beta.numpy(), rtol=2e-7)
    # 1,000 float32 factors, each rounded to 6e-8.
    np.testing.assert_allclose(linear().alpha_bar, torch.cumprod(1 - beta, 0).numpy(), rtol=1e-5)


@pytest.mark.parametrize("schedule", ALL, ids=str)
def test_alpha_bar_falls_from_almost_one_to_almost_zero(schedule: Schedule) -> None:
    assert 0.999 < schedule.alpha_bar[0] < 1
    assert 0 < schedule.alpha_bar[-1] < 0.01
    assert np.all(np.diff(schedule.alpha_bar) < 0)
    assert np.all(np.diff(schedule.snr) < 0)
    np.testing.assert_allclose(
        schedule.snr, schedule.alpha_bar / (1 - schedule.alpha_bar), rtol=1e-12
    )


@pytest.mark.parametrize("schedule", ALL, ids=str)
def test_the_posterior_is_the_product_of_two_gaussians(schedule: Schedule) -> None:
    """q(x_s | x_t, x_0) ∝ q(x_t | x_s) q(x_s | x_0): precisions add, means are weighted by them."""
    beta, a = exact(schedule)
    x0, x = np.array([-1.0, 0.3, 1.0, 0.0]), np.array([2.5, -0.1, 1.0, -3.0])
    worst_mean = worst_variance = 0.0
    for t in range(1, schedule.T):
        prior, likelihood = 1 / (1 - a[t]), (1 - beta[t]) / beta[t]
        variance = 1 / (prior + likelihood)
        mean = variance * (prior * np.sqrt(a[t]) * x0 + likelihood * x / np.sqrt(1 - beta[t]))
        found, found_variance = schedule.posterior(x0, x, t)
        worst_mean = max(worst_mean, float(np.abs(found - mean).max()))
        worst_variance = max(worst_variance, abs(found_variance - float(variance)))
    # Coefficients to 1e-12; x_0 and x_t reach 3, so 4 of them.
    assert worst_mean < 4e-12
    assert worst_variance < 1e-12


@pytest.mark.parametrize("schedule", ALL, ids=str)
def test_beta_tilde_and_the_mean_are_equation_7(schedule: Schedule) -> None:
    beta, a = exact(schedule)
    for t in range(schedule.T):
        from_x0, from_x = schedule.posterior_coefficients(t, t - 1)
        assert abs(from_x0 - np.sqrt(a[t]) * beta[t] / (1 - a[t + 1])) < 1e-12
        assert abs(from_x - np.sqrt(1 - beta[t]) * (1 - a[t]) / (1 - a[t + 1])) < 1e-12
        small = (1 - a[t]) / (1 - a[t + 1]) * beta[t]
        assert abs(schedule.posterior_variance(t, t - 1) - small) < 1e-12


@settings(deadline=None)  # the machine may be busy
@given(betas, st.data())
def test_a_stride_s_posterior_is_that_of_the_schedule_with_the_kept_alpha_bars(
    beta: NDArray[np.float64], data: st.DataObject
) -> None:
    schedule = Schedule(beta)
    t = data.draw(st.integers(1, schedule.T - 1))
    s = data.draw(st.integers(0, t - 1))
    _, a = exact(schedule)
    left = a[t + 1] / a[s + 1]
    prior, likelihood = 1 / (1 - a[s + 1]), left / (1 - left)
    # β of 1e-6 leaves 10 digits of 1 - ᾱ.
    assert schedule.beta_between(s, t) == pytest.approx(float(1 - left), rel=1e-8)
    variance = 1 / (prior + likelihood)
    assert schedule.posterior_variance(t, s) == pytest.approx(float(variance), rel=1e-8)
    from_x0, from_x = schedule.posterior_coefficients(t, s)
    assert from_x0 == pytest.approx(float(variance * prior * np.sqrt(a[s + 1])), rel=1e-8)
    assert from_x == pytest.approx(float(variance * likelihood / np.sqrt(left)), rel=1e-8)


@pytest.mark.parametrize("schedule", ALL, ids=str)
def test_the_posterior_of_the_first_step_is_the_clean_image(schedule: Schedule) -> None:
    x0 = np.linspace(-1, 1, 5)
    mean, variance = schedule.posterior(x0, np.full(5, 9.0), 0)
    np.testing.assert_array_equal(mean, x0)
    assert variance == 0


@settings(deadline=None)  # the machine may be busy
@given(betas)
def test_one_jump_has_the_moments_of_single_steps(beta: NDArray[np.float64]) -> None:
    """Exact: the mean's factors multiply; the variance is scaled by α and grows by β."""
    schedule = Schedule(beta)
    zero, one = np.zeros(1), np.ones(1)
    factor, variance = 1.0, 0.0
    for t in range(schedule.T):
        factor *= float(schedule.diffuse_step(one, t, zero)[0])
        scale, fresh = (
            schedule.diffuse_step(one, t, zero)[0],
            schedule.diffuse_step(zero, t, one)[0],
        )
        variance = float(scale) ** 2 * variance + float(fresh) ** 2
        # float32 results: 6e-8 a step.
        assert schedule.diffuse(one, t, zero)[0] == pytest.approx(factor, rel=1e-5, abs=1e-30)
        assert float(schedule.diffuse(zero, t, one)[0]) ** 2 == pytest.approx(variance, rel=1e-5)


def test_steps_and_jump_draw_the_same_distribution() -> None:
    schedule = linear(60, end=0.1)
    generator = np.random.default_rng(0)
    x0 = np.full(20_000, 0.7, np.float32)
    x = x0
    for t in range(60):
        x = schedule.diffuse_step(x, t, generator.standard_normal(x0.shape, np.float32))
    jump = schedule.diffuse(x0, 59, generator.standard_normal(x0.shape, np.float32))
    assert stats.ks_2samp(x, jump).pvalue > 0.01
    a = float(np.prod(1 - np.asarray(schedule.beta)))
    assert stats.kstest(x, stats.norm(0.7 * math.sqrt(a), math.sqrt(1 - a)).cdf).pvalue > 0.01


def test_each_image_may_have_its_own_timestep() -> None:
    schedule = linear()
    generator = np.random.default_rng(1)
    x0, eps = generator.standard_normal((2, 4, 3, 5, 5)).astype(np.float32)
    t = np.array([0, 999, 17, 500])
    together = schedule.diffuse(x0, t, eps)
    assert together.dtype == np.float32
    for i, at in enumerate(t):
        np.testing.assert_array_equal(together[i], schedule.diffuse(x0[i], int(at), eps[i]))
        a = float(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[at])
        wanted = torch.from_numpy(x0[i]) * a**0.5 + torch.from_numpy(eps[i]) * (1 - a) ** 0.5
        np.testing.assert_allclose(together[i], wanted.numpy(), rtol=0, atol=1e-6)


def test_given_betas_are_kept_and_cannot_be_changed() -> None:
    beta = np.array([0.1, 0.2, 0.3])
    schedule = Schedule(beta)
    beta[0] = 0.9
    assert schedule.beta.tolist() == [0.1, 0.2, 0.3]
    with pytest.raises(ValueError, match="read-only"):
        schedule.beta[0] = 0.5
    assert schedule == Schedule([0.1, 0.2, 0.3])  # type: ignore[arg-type]
    assert hash(schedule) == hash(Schedule(np.array([0.1, 0.2, 0.3])))
    assert schedule != Schedule(np.array([0.1, 0.2, 0.4]))
    assert schedule != "linear"
    assert (schedule.name, schedule.T) == ("given", 3)


@pytest.mark.parametrize(
    ("beta", "message"),
    [
        ([0.1, 0.0], r"beta\[1\] is 0.0; every beta lies in \(0, 1\]"),
        ([0.1, 1.5], r"beta\[1\] is 1.5"),
        ([-0.1], r"beta\[0\] is -0.1"),
        ([0.1, math.nan], r"beta\[1\] is nan"),
        ([], r"beta has shape \(0,\)"),
        ([[0.1]], r"beta has shape \(1, 1\)"),
    ],
)
def test_betas_outside_of_zero_to_one_are_refused(beta: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(np.array(beta))


def test_timesteps_outside_of_the_schedule_are_refused() -> None:
    schedule = linear(10)
    x = np.zeros((2, 3), np.float32)
    for t in (-1, 10, np.array([0, 10])):
        with pytest.raises(ValueError, match=r"it must lie in 0\.\.9"):
            schedule.diffuse(x, t, x)
    assert schedule.alpha_bar_at(-1) == 1
    for t in (-2, 10):
        with pytest.raises(ValueError, match=rf"t is {t}; it must lie in -1\.\.9"):
            schedule.alpha_bar_at(t)
    with pytest.raises(ValueError, match="they must agree"):
        schedule.diffuse(x, 0, x[:1])


def test_every_named_schedule_is_made_by_its_name() -> None:
    for name, make in SCHEDULES.items():
        schedule = named_schedule(name, 30)
        assert schedule == make(30)
        assert schedule.name == name
        assert named_schedule(name, 30, **schedule.parameters) == schedule
    with pytest.raises(ValueError, match="no schedule is called 'quadratic'; there are linear"):
        named_schedule("quadratic", 10)
    with pytest.raises(ValueError, match="'linear' does not take"):
        named_schedule("linear", 10, tau=1.0)
    for make in SCHEDULES.values():
        with pytest.raises(ValueError, match="T is 0; it must be at least 1"):
            make(0)
