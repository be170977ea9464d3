"""Classifier-free guidance inside the network: one doubled batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ddpm_deploy.errors import CheckpointError
from ddpm_deploy.spec import ModelSpec


class Guided(nn.Module):
    """u + s·(c - u), c and u being a network's outputs with its label and without one.

    Args:
        network: Called with (x, t, *conditions).
        spec: What it is; it has a null label.
        scale: s: 1 is the conditional network, above 1 exaggerates.

    Raises:
        CheckpointError: The network has no label, or none that means "no label".

    References:
        Ho & Salimans 2022, https://arxiv.org/abs/2207.12598, Eq. 6.
    """

    def __init__(self, network: nn.Module, spec: ModelSpec, scale: float) -> None:
        super().__init__()
        label = spec.label
        if label is None or label.null is None:
            raise CheckpointError(
                "This network has no label, so there is nothing to guide towards."
                if label is None
                else "This network has no label that means none, so there is nothing to guide "
                "away from.",
                hint="Leave --guidance out."
                if label is None
                else "Name the class that it was trained with for none: --set null_label=10",
            )
        self.network = network
        self.scale = scale
        self.channels = spec.sample_shape[0]
        self.null = label.null
        self.place = [condition.name for condition in spec.conditions].index(label.name)

    def forward(self, x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        """Returns the guided output; arguments as the network's own."""
        doubled = [torch.cat([condition, condition]) for condition in conditions]
        y = conditions[self.place]
        doubled[self.place] = torch.cat([y, torch.full_like(y, self.null)])
        out: Tensor = self.network(torch.cat([x, x]), torch.cat([t, t]), *doubled)
        # Not chunk, whose lengths the exporter wants to know.
        wanted, plain = out.reshape(2, -1, *out.shape[1:]).unbind(0)
        if wanted.shape[1] == self.channels:
            return plain + self.scale * (wanted - plain)
        # A learned variance stays that of the wanted label: guidance would leave its range.
        variance = wanted[:, self.channels :]
        wanted, plain = wanted[:, : self.channels], plain[:, : self.channels]
        return torch.cat([plain + self.scale * (wanted - plain), variance], dim=1)
