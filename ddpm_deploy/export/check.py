"""The proof, inside the exporter, that a graph is the same function as its network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from ddpm_deploy.engines import open_engine
from ddpm_deploy.engines.pytorch import TorchEngine
from ddpm_deploy.errors import ExportError
from ddpm_deploy.noise import SeededNoise
from ddpm_deploy.parity import TOLERANCE, example_conditions, relative_error
from ddpm_deploy.spec import ModelSpec

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
                conditions = example_conditions(spec, batch)
                wanted = reference(x, t, **conditions)
                if not np.isfinite(wanted).all():
                    raise ExportError(
                        f"The network itself gives numbers that are not finite, t = {t.tolist()}.",
                        hint="Is one of the facts wrong, such as an eps or the number of groups?",
                    )
                given = engine(x, t, **conditions)
                relative = relative_error(given, wanted)
                if not relative <= TOLERANCE:
                    raise ExportError(
                        f"The exported graph is not the trained network: at batch {batch}, t = "
                        f"{t.tolist()}, they differ by {relative:.1e} of the peak "
                        f"{np.abs(wanted).max():.3g}; "
                        f"at most {TOLERANCE:.0e} is rounding. Nothing was written.",
                        hint="Try --opset 18; if that fails too, please report the network.",
                    )
                deviations.append(
                    Deviation(batch=batch, t=tuple(int(i) for i in t), relative=relative)
                )
    return tuple(deviations)
