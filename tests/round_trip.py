"""A network saved as its family saves it must come back as itself, in PyTorch and as a graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ddpm_deploy.export.to_onnx import export_network
from ddpm_deploy.model import LoadedNetwork, load_network
from ddpm_deploy.noise import SeededNoise
from ddpm_deploy.parity import TOLERANCE, example_conditions, relative_error


def check_round_trip(
    path: Path, network: nn.Module, *, export: Path | None = None, **said: Any
) -> LoadedNetwork:
    """Loads a checkpoint, and compares it with the network that was saved there.

    Args:
        path: The checkpoint.
        network: The one that was saved, called with (x, t, *conditions), in evaluation mode.
        export: Where to export the loaded one to; the exporter proves its graph in ONNX Runtime.
        **said: As `load_network` takes it.

    Returns:
        What was loaded.
    """
    loaded = load_network(path, **said)
    spec, batch = loaded.spec, 3
    x = torch.from_numpy(SeededNoise(0, range(batch), spec.sample_shape)(0))
    t = torch.from_numpy(np.linspace(0, spec.schedule.T - 1, batch).astype(np.int64))
    conditions = [torch.from_numpy(v) for v in example_conditions(spec, batch).values()]
    with torch.inference_mode():
        wanted, given = network(x, t, *conditions), loaded.network(x, t, *conditions)
    assert given.shape == (batch, *spec.output_shape)
    assert relative_error(given.numpy(), wanted.numpy()) <= TOLERANCE
    if export is not None:
        exported = export_network(loaded.network, spec, export)
        assert max(d.relative for d in exported.deviations) <= TOLERANCE
    return loaded
