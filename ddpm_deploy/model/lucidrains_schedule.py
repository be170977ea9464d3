"""What the buffers of lucidrains' GaussianDiffusion say: the schedule, and what is predicted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from ddpm_deploy.arrays import Coefficients
from ddpm_deploy.sampling import Prediction
from ddpm_deploy.schedule import Schedule, cosine, linear
from ddpm_deploy.schedule import sigmoid as _sigmoid

_SHORTEST_LINEAR = 20
"""Timesteps; below, its β would be above 1."""


def sigmoid(T: int = 1000) -> Schedule:  # noqa: N803
    """Tabulates lucidrains' sigmoid schedule, whose ends are float32 while the rest is float64.

    So ᾱ ends some 1e-8 beside 0, which changes the last β by 3e-5 of their value.
    """
    u = np.arange(T + 1) / T
    start, end = torch.tensor([-3.0, 3.0]).sigmoid().double().tolist()
    alpha_bar = (end - 1.0 / (1.0 + np.exp(3.0 - 6.0 * u))) / float(np.float32(end - start))
    alpha_bar /= alpha_bar[0]
    return Schedule(np.clip(1.0 - alpha_bar[1:] / alpha_bar[:-1], 1e-12, 0.999), "sigmoid")


def own_schedule(asked: Schedule) -> Schedule:
    """Returns what lucidrains' code means by the name and length of a schedule.

    Args:
        asked: A named one of this package, as it is typed.
    """
    if asked == _sigmoid(asked.T):
        return sigmoid(asked.T)
    if asked == linear(asked.T) and asked.T >= _SHORTEST_LINEAR:
        return _linear(asked.T)
    return asked


def read_schedule(buffers: Mapping[str, Tensor]) -> Schedule:
    """Returns the schedule that the buffers were made from.

    They are float32, made in float64. Where a named schedule rounds to them, it is that one;
    otherwise β is taken from them as exactly as they allow.

    Args:
        buffers: Of one length T, `betas` among them.

    Raises:
        ValueError: The betas are no schedule.
    """
    beta = _double(buffers["betas"])
    for named in _named(len(beta)):
        if np.all(np.abs(named.beta.astype(np.float32) - beta) <= np.spacing(np.float32(beta))):
            return named
    if "sqrt_recip_alphas_cumprod" in buffers:
        # Near 1 the float32 of β leaves few digits of α = ᾱ_t / ᾱ_(t-1), which 1/√ᾱ has.
        root = _double(buffers["sqrt_recip_alphas_cumprod"])
        with np.errstate(all="ignore"):
            alpha = (np.append(1.0, root[:-1]) / root) ** 2
        beta = np.where((beta > 0.5) & (beta < 1) & (alpha > 0), 1.0 - alpha, beta)
    return Schedule(beta)


def read_prediction(loss_weight: Tensor, schedule: Schedule) -> Prediction | None:
    """Returns what the network gives, by how training weighed errors; None where that is unclear.

    Training weighs the error of x_0 by s, the signal-to-noise ratio, possibly capped (Hang et al.
    2023); that of ε by s / snr, that of v by s / (snr + 1).

    Args:
        loss_weight: The buffer of that name.
        schedule: That of training.
    """
    weight, snr = _double(loss_weight), schedule.snr
    there = (snr > 0) & (weight > 0)
    weight, snr = weight[there], snr[there]

    def misfit(s: Coefficients) -> float:
        return float(np.abs(np.log(s / np.minimum(snr, s.max()))).max())

    misfits: dict[Prediction, float] = {
        "epsilon": misfit(weight * snr),
        "sample": misfit(weight),
        "v_prediction": misfit(weight * (snr + 1)),
    }
    best = min(misfits, key=lambda name: misfits[name])
    return best if misfits[best] < 1e-2 else None


def _named(T: int) -> Iterator[Schedule]:  # noqa: N803
    yield sigmoid(T)
    yield cosine(T)
    if T >= _SHORTEST_LINEAR:
        yield _linear(T)


def _linear(T: int) -> Schedule:  # noqa: N803
    scale = 1000 / T
    return linear(T, start=scale * 0.0001, end=scale * 0.02)


def _double(buffer: Tensor) -> Coefficients:
    return buffer.double().numpy()
