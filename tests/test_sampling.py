"""Sampler tables and the loop: closed forms, the same lines in torch, and other projects' runs."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ddpm_deploy import (
    Schedule,
    SeededNoise,
    Step,
    Transition,
    cosine,
    ddim,
    ddpm,
    denoise,
    dome272,
    guided,
    linear,
    sigmoid,
    timesteps,
)
from ddpm_deploy.arrays import Samples, Timesteps
from ddpm_deploy.sampling import (
    Prediction,
    Spacing,
    Table,
    Variance,
    log_variance_range,
    split_variance,
)
from ddpm_deploy.solvers import dpmpp_2m
from tests.conftest import DATA, GaussianPredictor

SHAPE = (3, 4, 4)
LINEAR, SIGMOID = linear(), sigmoid()


# --- Strides ---


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [  # what diffusers' set_timesteps(10) gives for 1,000
        ("leading", [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]),
        ("linspace", [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]),
        ("trailing", [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]),
    ],
)
def test_ten_steps_of_a_thousand_are_those_of_diffusers(
    spacing: Spacing, expected: list[int]
) -> None:
    assert timesteps(1000, 10, spacing=spacing) == expected


def test_steps_that_do_not_divide_the_schedule_are_those_of_diffusers() -> None:
    """Its formulas (DDPMScheduler.set_timesteps); numpy rounds halves to even, too."""
    for n in (3, 7, 12, 50, 333, 999, 1000):
        leading = (np.arange(n) * (1000 // n))[::-1]
        linspace = np.linspace(0, 999, n).round()[::-1]
        trailing = np.round(np.arange(1000, 0, -1000 / n)) - 1
        assert timesteps(1000, n, spacing="leading") == leading.tolist()
        assert timesteps(1000, n, spacing="linspace") == linspace.tolist()
        assert timesteps(1000, n, spacing="trailing") == trailing.tolist()


@pytest.mark.parametrize("length", [10, 64, 100, 128, 333, 1000])
def test_timesteps_cut_by_lucidrains_formula_are_those_of_torch(length: int) -> None:
    """Of int(torch.linspace(-1, T-1, n+1)): 30 for (64, 14), where T/n says 31.

    Torch's kernels for processors with AVX2 or AVX-512, and those of Arm, round once after multiply
    and add; its plain ones would cut 173 of 15,502 pairs (T, n) at other numbers.
    """
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("torch runs its plain kernels here")
    for n in range(1, length + 1):
        wanted = torch.linspace(-1, length - 1, steps=n + 1).int().tolist()[1:]
        assert timesteps(length, n, spacing="trailing_floor")[::-1] == wanted


@settings(deadline=None)  # the machine may be busy
@given(st.integers(1, 4000), st.data())
def test_a_stride_has_every_timestep_once_and_descends(steps: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, steps))
    for spacing, first, last in [
        ("leading", None, 0),
        ("linspace", steps - 1, 0 if n > 1 else steps - 1),
        ("trailing", steps - 1, None),
        ("trailing_floor", steps - 1, None),
    ]:
        kept = timesteps(steps, n, spacing=spacing)  # type: ignore[arg-type]
        assert len(kept) == n
        assert all(a > b for a, b in itertools.pairwise(kept))
        assert 0 <= kept[-1] <= kept[0] < steps
        assert first in {None, kept[0]}
        assert last in {None, kept[-1]}
    assert timesteps(steps) == list(range(steps))[::-1]


def test_a_number_of_steps_outside_of_the_schedule_is_refused() -> None:
    for n in (0, 11, -1):
        with pytest.raises(ValueError, match=rf"steps is {n}; this schedule has 1 to 10"):
            timesteps(10, n)
    with pytest.raises(ValueError, match="spacing is 'karras'; there are leading, linspace"):
        timesteps(10, 5, spacing="karras")  # type: ignore[arg-type]


# --- Tables against closed forms ---


@settings(deadline=None)  # the machine may be busy
@given(
    st.sampled_from(["epsilon", "sample", "v_prediction"]),
    st.floats(-1, 1),
    st.floats(-4, 4),
    st.integers(0, 999),
)
def test_the_clean_image_follows_from_every_prediction(
    prediction: Prediction, x0: float, eps: float, t: int
) -> None:
    """Of x_t = √ᾱ x_0 + √(1-ᾱ) ε; v = √ᾱ ε - √(1-ᾱ) x_0 (Salimans & Ho, appendix D)."""
    a = float(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[t])
    x = math.sqrt(a) * x0 + math.sqrt(1 - a) * eps
    out = {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": math.sqrt(a) * eps - math.sqrt(1 - a) * x0,
    }[prediction]
    row = next(r for r in TABLES[prediction] if r.t == t)
    # 1/√ᾱ is 157 at the end: 157 times 4 in float64.
    assert row.x0_from_x * x + row.x0_from_out * out == pytest.approx(x0, rel=1e-10, abs=1e-10)


TABLES: dict[Prediction, Table] = {
    "epsilon": ddpm(LINEAR),
    "sample": ddpm(LINEAR, prediction="sample"),
    "v_prediction": ddpm(LINEAR, prediction="v_prediction"),
}


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_an_epsilon_step_is_algorithm_2(variance: Variance) -> None:
    """x_{t-1} = (x_t - β/√(1-ᾱ) ε)/√α + σ z, of the row's numbers put together."""
    beta = np.asarray(LINEAR.beta)
    alpha_bar = np.cumprod(1 - beta)
    for row in ddpm(LINEAR, variance=variance, clip=None):
        t = row.t
        from_x = row.x_from_x0 * row.x0_from_x + row.x_from_x
        from_eps = row.x_from_x0 * row.x0_from_out + row.x_from_out
        assert from_x == pytest.approx(1 / math.sqrt(1 - beta[t]), rel=1e-10)
        wanted = -beta[t] / math.sqrt(1 - alpha_bar[t]) / math.sqrt(1 - beta[t])
        assert from_eps == pytest.approx(wanted, rel=1e-10)
        if t == 0:
            assert row.x_from_noise == 0
        elif variance == "fixed_large":
            assert row.x_from_noise**2 == pytest.approx(beta[t], rel=1e-12)
        else:
            small = (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * beta[t]
            assert row.x_from_noise**2 == pytest.approx(small, rel=1e-10)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("steps", [None, 50])
@pytest.mark.parametrize("schedule", [LINEAR, cosine(400), SIGMOID], ids=lambda s: s.name)
def test_ddim_with_eta_1_is_ddpm(
    schedule: Schedule, steps: int | None, prediction: Prediction
) -> None:
    """Song et al., section 4.1: the formulas differ and agree to float64's rounding of 1 - ᾱ.

    1 - ᾱ is 4e-5 at the cosine's first step, so 16 digits of ᾱ leave 12 of it, and 5 of them go in
    √ᾱ_s - direction·√ᾱ_t, where both are near 1.
    """
    for a, b in zip(
        ddim(schedule, steps, eta=1.0, prediction=prediction),
        ddpm(schedule, steps, prediction=prediction),
        strict=True,
    ):
        assert (a.t, a.s, a.clip) == (b.t, b.s, b.clip)
        assert (a.x0_from_x, a.x0_from_out) == (b.x0_from_x, b.x0_from_out)
        for name in ("x_from_x0", "x_from_x", "x_from_out", "x_from_noise"):
            assert getattr(a, name) == pytest.approx(getattr(b, name), rel=0, abs=1e-11), name


@settings(deadline=None)  # the machine may be busy
@given(
    st.floats(0, 1),
    st.integers(1, 100),
    st.sampled_from(["leading", "linspace", "trailing"]),
)
def test_ddim_keeps_the_marginals_for_every_eta(eta: float, steps: int, spacing: Spacing) -> None:
    """Song et al., Eq. 7: from the exact x_0, x_s is √ᾱ_s x_0 + √(1-ᾱ_s) of unit noise."""
    a = np.concatenate([np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)), [1.0]])  # a[-1] is 1
    for row in ddim(LINEAR, steps, eta=eta, spacing=spacing):
        from_x0 = row.x_from_x0 + row.x_from_x * math.sqrt(a[row.t])
        variance = row.x_from_x**2 * (1 - a[row.t]) + row.x_from_noise**2
        assert from_x0 == pytest.approx(math.sqrt(a[row.s]), abs=1e-12)
        assert variance == pytest.approx(1 - a[row.s], abs=1e-12)
        small = (1 - a[row.s]) / (1 - a[row.t]) * (1 - a[row.t] / a[row.s])
        assert row.x_from_noise == pytest.approx(eta * math.sqrt(max(small, 0)), abs=1e-9)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned", "learned_range"])
def test_the_last_transition_adds_no_noise(variance: Variance) -> None:
    for steps in (None, 1, 10):
        for spacing in ("leading", "linspace", "trailing"):
            table = ddpm(LINEAR, steps, variance=variance, spacing=spacing)
            assert table[-1].s == -1
            assert table[-1].x_from_noise == 0
            assert (table[-1].x_from_x0, table[-1].x_from_x) == (1, 0)
            assert all(row.x_from_noise > 0 for row in table[:-1])
            assert [row.s for row in table[:-1]] == [row.t for row in table[1:]]
            if variance.startswith("fixed"):
                last = ddim(LINEAR, steps, eta=1.0, spacing=spacing)[-1]
                assert last.x_from_noise == 0


def test_the_dome272_rows_are_its_formula() -> None:
    """x = 1/√α (x - (1-α)/√(1-ᾱ) ε) + √β z for i = T-1 … 1; z = 0 at i = 1; nothing clipped."""
    for schedule in (LINEAR, linear(12)):
        beta = np.linspace(1e-4, 0.02, schedule.T)
        alpha_hat = np.cumprod(1 - beta)
        table = dome272(schedule)
        assert [row.t for row in table] == list(range(1, schedule.T))[::-1]
        for row in table:
            i = row.t
            assert row.s == i - 1
            assert row.clip is None
            assert row.x_from_x0 == 0
            assert row.x_from_x == pytest.approx(1 / math.sqrt(1 - beta[i]), rel=1e-13)
            eps = -beta[i] / math.sqrt(1 - alpha_hat[i]) / math.sqrt(1 - beta[i])
            assert row.x_from_out == pytest.approx(eps, rel=1e-12)
            assert row.x_from_noise == pytest.approx(math.sqrt(beta[i]) if i > 1 else 0, rel=1e-13)
    with pytest.raises(ValueError, match="T must be at least 2"):
        dome272(linear(1))


def test_the_last_learned_variance_range_starts_at_the_neighbour_s() -> None:
    """improved-diffusion's posterior_log_variance_clipped: entry 0 is entry 1."""
    beta = np.asarray(LINEAR.beta)
    a = np.cumprod(1 - beta)
    neighbour = math.log(beta[1] * (1 - a[0]) / (1 - a[1]))
    assert log_variance_range(LINEAR, 0, -1) == pytest.approx((neighbour, math.log(beta[0])))
    assert log_variance_range(LINEAR, 1, 0) == pytest.approx((neighbour, math.log(beta[1])))
    assert log_variance_range(linear(1, start=0.5), 0, -1) == (math.log(0.5), math.log(0.5))


def test_settings_outside_of_their_range_are_refused() -> None:
    for eta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"eta is .*; it must lie in \[0, 1\]"):
            ddim(LINEAR, eta=eta)
    with pytest.raises(ValueError, match="prediction is 'score'; there are epsilon, sample"):
        ddpm(LINEAR, prediction="score")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="variance is 'large'; there are fixed_small"):
        ddpm(LINEAR, variance="large")  # type: ignore[arg-type]
    terminal = Schedule(np.array([0.1, 1.0]))  # zero signal at the end (Lin et al. 2023)
    with pytest.raises(ValueError, match="alpha_bar is 0 at t = 1; ε says nothing"):
        ddpm(terminal)
    assert ddpm(terminal, prediction="v_prediction")[0].x0_from_out == -1


def test_a_table_s_numbers_are_python_floats() -> None:
    """NumPy's float64 scalars would turn float32 images into float64."""
    for table in (
        ddpm(LINEAR, 5),
        ddpm(LINEAR, 5, variance="learned_range"),
        ddim(LINEAR, 5, eta=0.5),
        dome272(LINEAR),
    ):
        for row in table:
            for name in ("x0_from_x", "x0_from_out", "x_from_x0", "x_from_x", "x_from_noise"):
                assert type(getattr(row, name)) is float, name


# --- Gaussian data ---

MEAN, STD = 0.3, 0.4


def law(table: Table, schedule: Schedule) -> tuple[float, float]:
    """Mean and standard deviation that the exact predictor's chain ends with, by its recursion.

    Its ε is affine in x_t, so x_s is too: m ← (p + q) m + r, v ← (p + q)² v + σ².
    """
    a = np.cumprod(1 - np.asarray(schedule.beta))
    mean, variance = 0.0, 1.0
    for row in table:
        k = math.sqrt(1 - a[row.t]) / (a[row.t] * STD**2 + 1 - a[row.t])  # ε = k (x - √ᾱ m)
        out = row.x_from_x0 * row.x0_from_out + row.x_from_out
        factor = row.x_from_x0 * row.x0_from_x + row.x_from_x + out * k
        mean = factor * mean - out * k * math.sqrt(a[row.t]) * MEAN
        variance = factor**2 * variance + row.x_from_noise**2
    return mean, math.sqrt(variance)


@pytest.mark.parametrize(
    ("table", "bias"),
    [  # the chain's own distance from the data, which shrinks with the steps
        pytest.param(ddpm(LINEAR, clip=None), 0.004, id="ddpm, fixed small"),
        pytest.param(ddpm(LINEAR, variance="fixed_large", clip=None), 1e-3, id="ddpm, fixed large"),
        pytest.param(ddim(LINEAR, clip=None), 0.002, id="ddim"),
        pytest.param(ddim(LINEAR, 100, clip=None), 0.015, id="ddim, 100 steps"),
        pytest.param(ddim(LINEAR, eta=0.5, clip=None), 0.0025, id="ddim, eta 0.5"),
        pytest.param(dome272(LINEAR), 1e-3, id="dome272"),
    ],
)
def test_the_exact_predictor_gives_back_the_data_s_mean_and_spread(
    table: Table, bias: float
) -> None:
    n = 48
    noise = SeededNoise(1, range(n), (3, 8, 8))
    *_, last = denoise(GaussianPredictor(LINEAR, mean=MEAN, std=STD), table, noise)
    expected_mean, expected_std = law(table, LINEAR)
    # Independent normals: the mean errs by STD/√size, the deviation by STD/√(2 size). 4 of them.
    size = last.x.size
    assert abs(last.x.mean() - expected_mean) < 4 * STD / math.sqrt(size)
    assert abs(last.x.std() - expected_std) < 4 * STD / math.sqrt(2 * size)
    assert abs(expected_mean - MEAN) < bias
    assert abs(expected_std - STD) < bias


def test_more_steps_bring_the_exact_predictor_nearer_to_the_data() -> None:
    for make in (ddim, ddpm):
        gaps = [abs(law(make(LINEAR, n, clip=None), LINEAR)[1] - STD) for n in (10, 50, 250, 1000)]
        assert all(after < before for before, after in itertools.pairwise(gaps))


# --- The loop ---


def nonlinear(x: Samples, t: Timesteps) -> Samples:
    """Some network: bounded, depends on everything, the same bits for the same bits."""
    across = np.sin(0.01 * t).astype(np.float32).reshape(-1, 1, 1, 1)
    shifted = np.roll(x, 1, axis=-1)
    out: Samples = np.tanh(x) * np.float32(0.7) + np.float32(0.3) * shifted * across
    return out


def torch_loop(
    predict: Callable[[Samples, Timesteps], Samples], table: Table, noise: SeededNoise
) -> Iterator[torch.Tensor]:
    """The loop as torch code has it, on float32 tensors."""
    x = torch.from_numpy(noise(0))
    for k, row in enumerate(table, start=1):
        t = torch.full((len(x),), row.t, dtype=torch.int64)
        out = torch.from_numpy(predict(x.numpy(), t.numpy()))
        x_start = row.x0_from_x * x + row.x0_from_out * out
        if row.clip is not None:
            x_start = torch.clamp(x_start, -row.clip, row.clip)
        x_prev = row.x_from_x0 * x_start + row.x_from_x * x
        if row.x_from_out != 0:
            x_prev = x_prev + row.x_from_out * out
        if row.x_from_noise != 0:
            x_prev = x_prev + row.x_from_noise * torch.from_numpy(noise(k))
        x = x_prev
        yield x


@pytest.mark.parametrize(
    "table",
    [
        pytest.param(ddpm(LINEAR), id="ddpm, fixed small"),
        pytest.param(ddpm(LINEAR, variance="fixed_large", clip=None), id="ddpm, fixed large"),
        pytest.param(ddpm(SIGMOID, prediction="v_prediction"), id="ddpm, v"),
        pytest.param(ddim(LINEAR, eta=0.5), id="ddim, eta 0.5"),
        pytest.param(dome272(LINEAR), id="dome272"),
    ],
)
def test_the_loop_is_the_same_lines_in_torch_bit_for_bit(table: Table) -> None:
    """All of T = 1000: products and sums of float32 are the same IEEE operations in both."""
    noise = SeededNoise(11, range(3), SHAPE)
    ours = denoise(nonlinear, table, noise)
    count = 0
    for step, theirs in zip(ours, torch_loop(nonlinear, table, noise), strict=True):
        assert step.x.dtype == np.float32
        assert step.x.tobytes() == theirs.numpy().tobytes(), f"t = {step.t}"
        count += 1
    assert count == len(table) >= 999


def test_the_loop_asks_for_the_noise_it_needs_and_no_other() -> None:
    asked: list[int] = []

    def noise(k: int) -> Samples:
        asked.append(k)
        return np.ones((2, *SHAPE), np.float32)

    list(denoise(nonlinear, ddpm(LINEAR, 5), noise))
    assert asked == [0, 1, 2, 3, 4]
    asked.clear()
    list(denoise(nonlinear, ddim(LINEAR, 5), noise))
    assert asked == [0]
    asked.clear()
    list(denoise(nonlinear, ddim(LINEAR, 5), noise, x=np.zeros((2, *SHAPE), np.float32)))
    assert asked == []


def test_a_step_says_what_it_did_and_its_arrays_stay() -> None:
    table = ddpm(LINEAR, 6)
    noise = SeededNoise(0, range(2), SHAPE)
    steps: list[Step] = []
    copies: list[list[Samples]] = []
    for step in denoise(nonlinear, table, noise):
        steps.append(step)
        copies.append([a.copy() for a in (step.x_t, step.out, step.x0, step.x)])
    assert [step.k for step in steps] == [1, 2, 3, 4, 5, 6]
    assert [step.t for step in steps] == [row.t for row in table]
    np.testing.assert_array_equal(steps[0].x_t, noise(0))
    for step, kept, row in zip(steps, copies, table, strict=True):
        for now, then in zip((step.x_t, step.out, step.x0, step.x), kept, strict=True):
            np.testing.assert_array_equal(now, then)
            assert now.dtype == np.float32
        t = np.full(2, row.t)
        np.testing.assert_array_equal(step.out, nonlinear(step.x_t, t))
        assert np.abs(step.x0).max() <= 1
        a = float(np.prod(1 - np.linspace(1e-4, 0.02, 1000)[: row.t + 1]))
        x0 = (step.x_t - math.sqrt(1 - a) * step.out.astype(np.float64)) / math.sqrt(a)
        np.testing.assert_allclose(step.x0, np.clip(x0, -1, 1), rtol=0, atol=2e-5)
    np.testing.assert_array_equal(steps[-1].x, steps[-1].x0)  # the last mean is x_0 itself
    for before, after in itertools.pairwise(steps):
        np.testing.assert_array_equal(before.x, after.x_t)


@pytest.mark.parametrize(
    "table",
    [
        pytest.param(ddpm(LINEAR, 9), id="ddpm"),
        pytest.param(ddpm(LINEAR, 9, variance="learned_range"), id="ddpm, learned"),
        pytest.param(ddim(LINEAR, 9, eta=0.5, direction="network"), id="ddim"),
        pytest.param(dpmpp_2m(LINEAR, 9), id="dpmpp_2m, which looks back"),
    ],
)
def test_a_loop_that_keeps_nothing_gives_the_same_bits(table: Table) -> None:
    noise = SeededNoise(2, range(3), SHAPE)
    start = noise(0)
    for step, kept in zip(
        denoise(with_v(0.3), table, noise, x=start, keep=False),
        denoise(with_v(0.3), table, noise, x=start),
        strict=True,
    ):
        for name in ("x_t", "out", "x0", "x"):
            assert getattr(step, name).tobytes() == getattr(kept, name).tobytes(), name
        assert (step.before is None) == (kept.before is None)
        if step.before is not None and kept.before is not None:
            assert step.before.tobytes() == kept.before.tobytes()
    np.testing.assert_array_equal(start, noise(0))  # the caller's


def test_a_loop_that_keeps_nothing_takes_no_memory_after_its_second_step() -> None:
    shape = (4, 3, 64, 64)
    out = np.ones(shape, np.float32)
    loop = denoise(lambda x, t: out, ddpm(LINEAR, 50), lambda k: out, keep=False)
    next(loop), next(loop)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for _ in loop:
            pass
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most - before < out.nbytes / 20  # the timesteps, and Python's own


def test_a_loop_can_start_from_a_given_state() -> None:
    table = ddpm(LINEAR, 8)
    noise = SeededNoise(0, range(2), SHAPE)
    steps = list(denoise(nonlinear, table, noise))
    # Noise is counted from the first transition, so a later start shifts it.
    resumed = list(denoise(nonlinear, table[3:], lambda k: noise(k + 3), x=steps[2].x))
    np.testing.assert_array_equal(resumed[-1].x, steps[-1].x)


def test_the_network_gets_int64_timesteps_one_for_each_image() -> None:
    seen: list[Timesteps] = []

    def predict(x: Samples, t: Timesteps) -> Samples:
        seen.append(t)
        return x

    list(denoise(predict, ddim(LINEAR, 4, spacing="trailing"), SeededNoise(0, range(3), SHAPE)))
    assert [t.tolist() for t in seen] == [[k] * 3 for k in (999, 749, 499, 249)]
    assert all(t.dtype == np.int64 for t in seen)


# --- Learned variances ---


def with_v(value: float | NDArray[np.float32]) -> Callable[[Samples, Timesteps], Samples]:
    return lambda x, t: np.concatenate(
        [nonlinear(x, t), np.broadcast_to(np.float32(value), x.shape)], axis=1
    )


def test_a_learned_range_at_its_ends_is_a_fixed_variance() -> None:
    noise = SeededNoise(0, range(2), SHAPE)
    ranged = ddpm(LINEAR, variance="learned_range")
    for v, variance in [(-1.0, "fixed_small"), (1.0, "fixed_large")]:
        fixed = ddpm(LINEAR, variance=variance)  # type: ignore[arg-type]
        for learned, plain in zip(
            denoise(with_v(v), ranged, noise), denoise(nonlinear, fixed, noise), strict=True
        ):
            # σ by exp in float32, 1e-7 of it a step; the loop forgets old errors as it goes.
            np.testing.assert_allclose(learned.x, plain.x, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(learned.out, nonlinear(learned.x_t, np.zeros(2, np.int64)))


def test_a_learned_variance_is_the_exponential_of_v() -> None:
    table = ddpm(LINEAR, 10, variance="learned")
    v = np.linspace(-12, 1, math.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    draws = SeededNoise(0, range(2), SHAPE)
    for step, row in zip(denoise(with_v(v), table, draws), table, strict=True):
        mean = row.x_from_x0 * step.x0.astype(np.float64) + row.x_from_x * step.x_t
        std = np.exp(v.astype(np.float64) / 2) if row.s >= 0 else 0.0
        np.testing.assert_allclose(step.x, mean + std * draws(step.k), rtol=1e-5, atol=1e-6)


def test_a_learned_variance_is_ignored_where_the_table_has_its_own() -> None:
    noise = SeededNoise(0, range(2), SHAPE)
    for table in (ddpm(LINEAR, 10), ddim(LINEAR, 10, eta=0.5)):
        *_, plain = denoise(nonlinear, table, noise)
        *_, learned = denoise(with_v(3.0), table, noise)
        np.testing.assert_array_equal(learned.x, plain.x)


def test_a_network_without_v_cannot_have_a_learned_variance() -> None:
    table = ddpm(LINEAR, 10, variance="learned")
    with pytest.raises(ValueError, match=r"needs a learned variance; the network gave \(2, 3, 4"):
        list(denoise(nonlinear, table, SeededNoise(0, range(2), SHAPE)))
    out = np.zeros((2, 3, 4, 4), np.float32)
    assert split_variance(out, out)[1] is None


# --- Guidance ---


def test_guidance_is_one_call_of_a_doubled_batch() -> None:
    calls: list[tuple[Samples, Timesteps]] = []
    x = np.random.default_rng(0).standard_normal((3, *SHAPE)).astype(np.float32)
    t = np.array([5, 6, 7])
    conditional, null = 2 * x + 1, x - 4

    def predict(doubled: Samples, doubled_t: Timesteps) -> Samples:
        calls.append((doubled, doubled_t))
        return np.concatenate([2 * doubled[:3] + 1, doubled[3:] - 4])

    for scale in (0.0, 1.0, 3.0):
        found = guided(predict, scale)(x, t)
        wanted = torch.lerp(torch.from_numpy(null), torch.from_numpy(conditional), scale)
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5, atol=1e-5)
        assert found.dtype == np.float32
    assert len(calls) == 3
    np.testing.assert_array_equal(calls[0][0], np.concatenate([x, x]))
    np.testing.assert_array_equal(calls[0][1], [5, 6, 7, 5, 6, 7])


def test_guidance_leaves_a_learned_variance_alone() -> None:
    # As in Nichol et al. 2022 (GLIDE) and Peebles & Xie 2023 (DiT): the prediction alone is guided.
    conditional = np.random.default_rng(0).uniform(-1, 1, (2, 6, 4, 4)).astype(np.float32)
    null = np.random.default_rng(1).uniform(-1, 1, (2, 6, 4, 4)).astype(np.float32)
    x = np.zeros((2, *SHAPE), dtype=np.float32)

    def predict(_: Samples, __: Timesteps) -> Samples:
        return np.concatenate([conditional, null])

    found = guided(predict, 4.0)(x, np.zeros(2, dtype=np.int64))
    wanted = null[:, :3] + 4 * (conditional[:, :3] - null[:, :3])
    np.testing.assert_allclose(found[:, :3], wanted, rtol=1e-6)
    np.testing.assert_array_equal(found[:, 3:], conditional[:, 3:])
    assert found.dtype == np.float32


# --- Other projects' runs, step by step from their own states ---


def peer(project: str, run: str) -> dict[str, NDArray[np.float32]]:
    with np.load(DATA / "samplers" / f"{project}.npz") as file:
        return {k.removeprefix(f"{run}/"): file[k] for k in file.files if k.startswith(f"{run}/")}


def steps_from_the_peer_s_states(
    run: dict[str, NDArray[np.float32]], table: Table
) -> Iterator[tuple[Transition, Step, Samples]]:
    """Feeds every transition the peer's x_t, network output and noise; yields what the peer got."""
    states, outputs = run["states"], run["model_out"]
    assert len(table) == len(outputs) == len(states) - 1
    for k, row in enumerate(table):
        noise = run["noise"][k : k + 1] if row.x_from_noise else states[:1]
        out = outputs[k : k + 1]
        (step,) = denoise(
            lambda x, t, out=out: out,  # type: ignore[misc]
            [row],
            lambda _, noise=noise: noise,  # type: ignore[misc]
            x=states[k : k + 1],
        )
        yield row, step, states[k + 1 : k + 2]


def assert_same(row: Transition, step: Step, theirs: Samples) -> None:
    # The peers compute their coefficients in float32, where 1 - ᾱ has few digits at small t.
    tolerance = 2e-4 if row.t < 10 else 1e-5
    error = float(np.abs(step.x - theirs).max())
    assert error <= tolerance * max(1.0, float(np.abs(theirs).max())), f"t = {row.t}: {error}"


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_ten_ddpm_steps_are_those_of_diffusers(prediction: Prediction) -> None:
    run = peer("diffusers", f"ddpm10_{prediction}")
    table = ddpm(LINEAR, 10, prediction=prediction)
    assert [row.t for row in table] == run["timesteps"].tolist()
    for row, step, theirs in steps_from_the_peer_s_states(run, table):
        assert_same(row, step, theirs)


@pytest.mark.parametrize(("run", "part"), [("first5", slice(5)), ("last10", slice(-10, None))])
def test_the_ends_of_a_thousand_steps_are_those_of_diffusers(run: str, part: slice) -> None:
    recorded = peer("diffusers", f"ddpm1000_{run}_epsilon")
    table = ddpm(LINEAR)[part]
    assert [row.t for row in table] == recorded["timesteps"].tolist()
    for row, step, theirs in steps_from_the_peer_s_states(recorded, table):
        assert_same(row, step, theirs)


@pytest.mark.parametrize(("run", "clip"), [("useclipped", 1.0), ("noclip", None)])
def test_ten_ddim_steps_are_those_of_diffusers(run: str, clip: float | None) -> None:
    """Ours derives ε again from the clipped x_0: its use_clipped_model_output."""
    recorded = peer("diffusers", f"ddim10_epsilon_{run}")
    for row, step, theirs in steps_from_the_peer_s_states(recorded, ddim(LINEAR, 10, clip=clip)):
        assert_same(row, step, theirs)


@pytest.mark.parametrize(
    ("run", "prediction", "eta"),
    [
        ("ddim10_epsilon", "epsilon", 0.0),
        ("ddim10_epsilon_eta0.5", "epsilon", 0.5),
        ("ddim10_sample", "sample", 0.0),
        ("ddim10_v_prediction", "v_prediction", 0.0),
    ],
)
def test_ddim_is_diffusers_where_nothing_is_clipped(
    run: str, prediction: Prediction, eta: float
) -> None:
    """By default it keeps the ε of the unclipped x_0, which is the same where x_0 is inside."""
    compared = 0
    table = ddim(LINEAR, 10, eta=eta, prediction=prediction)
    for row, step, theirs in steps_from_the_peer_s_states(peer("diffusers", run), table):
        inside = np.abs(step.x0) < 1
        compared += int(inside.sum())
        # 4e-5 for `sample`: its ε is a difference of near numbers over a small one, in float32.
        tolerance = 2e-4 if row.t < 10 else 4e-5 if prediction == "sample" else 1e-5
        np.testing.assert_allclose(step.x[inside], theirs[inside], rtol=0, atol=tolerance)
    assert compared > 200


def kept_of_improved_diffusion() -> Schedule:
    """Cosine 4000 respaced to 10: new β of the kept ᾱ (its SpacedDiffusion)."""
    f = np.cos((np.arange(4001) / 4000 + 0.008) / 1.008 * np.pi / 2) ** 2
    alpha_bar = np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], 0.999))
    kept = [0, 444, 889, 1333, 1777, 2222, 2666, 3110, 3555, 3999]
    return Schedule(1 - alpha_bar[kept] / np.concatenate([[1.0], alpha_bar[kept[:-1]]]))


LEARNED_RUNS = [
    pytest.param("ddpm_respaced10", kept_of_improved_diffusion(), slice(None), id="respaced to 10"),
    pytest.param("ddpm_first10", cosine(4000), slice(10), id="first 10 of 4000"),
    pytest.param("ddpm_last10", cosine(4000), slice(-10, None), id="last 10 of 4000"),
]


@pytest.mark.parametrize(("run", "schedule", "part"), LEARNED_RUNS)
def test_a_learned_range_is_that_of_improved_diffusion(
    run: str, schedule: Schedule, part: slice
) -> None:
    recorded = peer("openai", run)
    assert recorded["model_out"].shape[1] == 6
    table = ddpm(schedule, variance="learned_range")[part]
    for row, step, theirs in steps_from_the_peer_s_states(recorded, table):
        assert_same(row, step, theirs)


@pytest.mark.parametrize(("run", "schedule", "part"), LEARNED_RUNS)
def test_a_learned_variance_that_says_what_improved_diffusion_says_gives_its_steps(
    run: str, schedule: Schedule, part: slice
) -> None:
    """`learned` reads log σ² itself, here made of the peer's v by Nichol & Dhariwal's Eq. 15."""
    recorded = peer("openai", run)
    table = ddpm(schedule, variance="learned")[part]
    beta = np.asarray(schedule.beta)
    a = np.cumprod(1 - beta)
    small = np.append(np.nan, beta[1:] * (1 - a[:-1]) / (1 - a[1:]))
    small[0] = small[1]
    log_variance = recorded["model_out"].copy()
    for k, row in enumerate(table):
        f = (log_variance[k, 3:] + 1) / 2
        log_variance[k, 3:] = f * np.log(beta[row.t]) + (1 - f) * np.log(small[row.t])
    run_as_learned = {**recorded, "model_out": log_variance}
    for row, step, theirs in steps_from_the_peer_s_states(run_as_learned, table):
        assert_same(row, step, theirs)


def test_ddim_with_a_learned_variance_is_that_of_improved_diffusion() -> None:
    recorded = peer("openai", "ddim_respaced_ddim10")
    table = ddim(cosine(4000), 10)
    assert [row.t / 4 for row in table] == recorded["timesteps"].tolist()
    for row, step, theirs in steps_from_the_peer_s_states(recorded, table):
        # Its DDIM step divides by √(1/ᾱ - 1) in float32: 1.1e-5 seen at t = 400.
        error = float(np.abs(step.x - theirs).max())
        assert error <= 2e-5 * max(1.0, float(np.abs(theirs).max())), f"t = {row.t}: {error}"


@pytest.mark.parametrize("eta", [0, 0.5])
def test_ddim_is_that_of_lucidrains(eta: float) -> None:
    """It ends at s = -1, and derives ε again from the clipped x_0."""
    recorded = peer("lucidrains", f"ddim10_eta{eta}")
    table = ddim(SIGMOID, 10, eta=eta, prediction="v_prediction", spacing="trailing_floor")
    assert [row.t for row in table] == recorded["timesteps"].tolist()
    for row, step, theirs in steps_from_the_peer_s_states(recorded, table):
        assert_same(row, step, theirs)


@pytest.mark.parametrize(("run", "part"), [("first10", slice(10)), ("last10", slice(-10, None))])
def test_ddpm_is_that_of_lucidrains(run: str, part: slice) -> None:
    recorded = peer("lucidrains", f"ddpm_{run}")
    table = ddpm(SIGMOID, prediction="v_prediction")[part]
    for row, step, theirs in steps_from_the_peer_s_states(recorded, table):
        assert_same(row, step, theirs)
