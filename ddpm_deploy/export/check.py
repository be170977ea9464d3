"""The proof, inside the exporter, that a graph is the same function as its network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ddpm_deploy.arrays import Array
from ddpm_deploy.engines import open_engine
from ddpm_deploy.engines.pytorch import TorchEngine
from ddpm_deploy.errors import ExportError
from ddpm_deploy.noise import SeededNoise
from ddpm_deploy.spec import ModelSpec

TOLERANCE = 2e-5
"""Largest |graph - network| over the largest |network|, float32 on a CPU.

Runtimes differ from PyTorch, and PyTorch from itself with other threads, by up to 5e-6; the
smallest structural mistake known, GELU by tanh, moves the output by 7e-5.
"""

BATCHES = (1, 2, 5)


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """How far the graph is from the network on one batch.

    Attributes:
        batch: Samples in the batch.
        t: Their timesteps.
        relative: max |graph - network| / max |network|.
    """

    batch: int
    t: tuple[int, ...]
    relative: float


def check_graph(path: Path, network: nn.Module, spec: ModelSpec) -> tuple[Deviation, ...]:
    """Compares an ONNX file with its network at several timesteps and batch sizes.

    Args:
        path: The ONNX file.
        network: In evaluation mode, on the CPU.
        spec: What both are.

    Raises:
        ExportError: They differ by more than `TOLERANCE`, or not all batch sizes run.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    reference = TorchEngine(network, spec, path=path, device="cpu")
    last = spec.schedule.T - 1
    first = min(spec.first_timestep, last)
    deviations = []
    with open_engine(path, device="cpu") as engine:
        for batch in BATCHES:
            spread = np.linspace(first, last, max(batch, 3)).astype(np.int64)
            rows = [spread] if batch > 1 else list(spread[:, None])
            for k, t in enumerate(rows):
                t = np.resize(t, batch)  # noqa: PLW2901
                x = SeededNoise(k, range(batch), spec.sample_shape)(0)
                conditions = _conditions(spec, batch)
                wanted = reference(x, t, **conditions)
                given = engine(x, t, **conditions)
                peak = float(np.abs(wanted).max())
                relative = float(np.abs(given - wanted).max()) / (peak or 1.0)
                if not relative <= TOLERANCE:
                    raise ExportError(
                        f"The exported graph is not the trained network: at batch {batch}, t = "
                        f"{t.tolist()}, they differ by {relative:.1e} of the peak {peak:.3g}; "
                        f"at most {TOLERANCE:.0e} is rounding. Nothing was written.",
                        hint="Try --opset 18; if that fails too, please report the network.",
                    )
                deviations.append(
                    Deviation(batch=batch, t=tuple(int(i) for i in t), relative=relative)
                )
    return tuple(deviations)


def _conditions(spec: ModelSpec, batch: int) -> dict[str, Array]:
    values: dict[str, Array] = {}
    for c in spec.conditions:
        if c.classes is not None:
            values[c.name] = np.arange(batch, dtype=c.dtype)[::-1] % c.classes
            # The null label first, where there is one.
            values[c.name][0] = c.classes - 1 if c.null is None else c.null
        else:
            generator = torch.Generator().manual_seed(0)
            values[c.name] = (
                torch.randn(batch, *c.shape, generator=generator).numpy().astype(c.dtype)
            )
    return values
