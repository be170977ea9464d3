"""What the buffers of lucidrains' GaussianDiffusion say of how it was trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm_deploy import Schedule, cosine, ddpm, linear, sigmoid
from ddpm_deploy.model.lucidrains_schedule import own_schedule, read_prediction, read_schedule
from ddpm_deploy.model.lucidrains_schedule import sigmoid as lucidrains_sigmoid
from tests import golden


def buffers(beta: NDArray[np.float64]) -> dict[str, Tensor]:
    """As GaussianDiffusion makes them: in float64, kept as float32."""
    alpha_bar = np.cumprod(1 - beta)
    made = {"betas": beta, "sqrt_recip_alphas_cumprod": np.sqrt(1 / alpha_bar)}
    return {name: torch.tensor(value).float() for name, value in made.items()}


@pytest.mark.parametrize("schedule", [linear(), cosine(50), linear(100, start=1e-3, end=0.2)])
def test_a_named_schedule_is_known_by_its_rounded_betas(schedule: Schedule) -> None:
    read = read_schedule(buffers(np.asarray(schedule.beta)))
    assert read == schedule
    assert (read.name, dict(read.parameters)) == (schedule.name, dict(schedule.parameters))


def test_the_sigmoid_schedule_is_the_one_that_its_code_made() -> None:
    recorded = np.load(golden.GOLDEN / "lucidrains" / "v2_default" / "buffers.npz")
    schedule = lucidrains_sigmoid(1000)
    for name, values in [
        ("betas", schedule.beta),
        ("alphas_cumprod", schedule.alpha_bar),
        ("sqrt_recip_alphas_cumprod", 1 / np.sqrt(schedule.alpha_bar)),
        ("sqrt_one_minus_alphas_cumprod", np.sqrt(1 - schedule.alpha_bar)),
    ]:
        np.testing.assert_allclose(values, recorded[name], rtol=1.2e-7, atol=0)
    assert read_schedule({name: torch.from_numpy(recorded[name]) for name in recorded}) == schedule
    # The float64 formula is another one: its last beta but one differs by 3e-5 of its value.
    assert abs(sigmoid(1000).beta[-2] / schedule.beta[-2] - 1) > 1e-5


@pytest.mark.parametrize(
    "schedule",
    [
        sigmoid(1000, tau=0.5),
        sigmoid(50, start=-6, end=6),
        sigmoid(1000, start=0, end=3, tau=0.3),
        cosine(200, s=0.03),
        cosine(20, s=0.001),
        linear(300, start=1e-5, end=0.05),
        Schedule(np.append(np.linspace(1e-4, 0.5, 19), 1 - 1e-6)),
    ],
    ids=str,
)
def test_any_other_schedule_is_taken_from_the_buffers_without_losing_a_step(
    schedule: Schedule,
) -> None:
    """One step for x of 3, noise of 3 and every output that is not clipped whole."""
    read = read_schedule(buffers(np.asarray(schedule.beta)))
    assert read.name == "given"
    rng = np.random.default_rng(0)
    for mine, theirs in zip(ddpm(read), ddpm(schedule), strict=True):
        x = rng.uniform(-3, 3, 1000)
        # Outputs for which x_0 lies inside of the clip.
        out = (rng.uniform(-1, 1, 1000) - theirs.x0_from_x * x) / theirs.x0_from_out
        steps = [
            row.x_from_x0 * (row.x0_from_x * x + row.x0_from_out * out).clip(-1, 1)
            + row.x_from_x * x
            + 3 * row.x_from_noise
            for row in (mine, theirs)
        ]
        assert np.abs(steps[0] - steps[1]).max() <= (2e-4 if mine.t < 10 else 1e-5)


def test_a_schedule_that_is_typed_is_the_one_of_its_code() -> None:
    recorded = np.load(golden.GOLDEN / "lucidrains" / "v2_3_selfcond" / "buffers.npz")
    typed = own_schedule(linear(100))  # of ours, it ends at 0.02; theirs is scaled by 1000/T
    np.testing.assert_allclose(typed.beta, recorded["betas"], rtol=1e-7)
    assert own_schedule(sigmoid(1000)) == lucidrains_sigmoid(1000)
    assert own_schedule(linear()) == linear()
    for kept in (cosine(50), linear(100, start=1e-3, end=0.3), own_schedule(linear(100))):
        assert own_schedule(kept) == kept


@pytest.mark.parametrize("gamma", [None, 1, 5, 20])
@pytest.mark.parametrize("length", [10, 50, 250, 1000])
@pytest.mark.parametrize("objective", ["epsilon", "sample", "v_prediction"])
def test_the_objective_follows_from_how_training_weighs_errors(
    objective: str, length: int, gamma: float | None
) -> None:
    """Hang et al. 2023, section 3.4: min(snr, γ), over snr for ε and over snr + 1 for v."""
    schedules = [cosine(length), lucidrains_sigmoid(length)]
    if length >= 20:
        schedules.append(linear(length, start=0.1 / length, end=20 / length))
    for schedule in schedules:
        snr = schedule.alpha_bar / (1 - schedule.alpha_bar)
        weight = snr if gamma is None else np.minimum(snr, gamma)
        by: dict[str, Any] = {"epsilon": snr, "sample": 1.0, "v_prediction": snr + 1}
        buffer = torch.from_numpy(weight / by[objective]).float()
        assert read_prediction(buffer, schedule) == objective


def test_weights_of_no_known_objective_say_nothing() -> None:
    assert read_prediction(torch.linspace(1, 2, 100), cosine(100)) is None
