"""Networks in PyTorch and the checkpoint families they come from."""

from __future__ import annotations

from ddpm_deploy.model.checkpoint import LoadedNetwork, load_network
from ddpm_deploy.model.unet import UNet, UNetWidths

__all__ = ["LoadedNetwork", "UNet", "UNetWidths", "load_network"]
