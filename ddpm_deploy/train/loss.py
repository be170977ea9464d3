"""The objective: the noise that was added, guessed (Ho et al. 2020, Eq. 14)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (torch's own convention)

from ddpm_deploy.schedule import Schedule


class EpsilonLoss:
    """E ‖ε - ε_θ(√ᾱ_t x_0 + √(1-ᾱ_t) ε, t)‖², the mean over every number of a batch.

    Args:
        schedule: The forward process.
        device: Where the batches are.
    """

    def __init__(self, schedule: Schedule, device: torch.device) -> None:
        alpha_bar = torch.from_numpy(schedule.alpha_bar.copy())
        self._signal = alpha_bar.sqrt().float().to(device)
        self._noise = (1.0 - alpha_bar).sqrt().float().to(device)

    def __call__(
        self, network: Callable[..., Tensor], x0: Tensor, t: Tensor, eps: Tensor, y: Tensor | None
    ) -> Tensor:
        """Returns the loss, float32, a scalar.

        Args:
            network: Called with (x_t, t) or (x_t, t, y).
            x0: float32, (N, C, H, W), in [-1, 1].
            t: int64, (N,), 0 to T-1.
            eps: float32, the shape of `x0`, standard normal.
            y: int64, (N,), or None.
        """
        a = self._signal[t][:, None, None, None]
        b = self._noise[t][:, None, None, None]
        x_t = a * x0 + b * eps
        out = network(x_t, t) if y is None else network(x_t, t, y)
        return F.mse_loss(out.float(), eps)
