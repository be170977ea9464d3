"""How far a plan is from the graph it was built of, where the device that runs it is at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ddpm_deploy.engines import open_engine
from ddpm_deploy.engines.base import Engine
from ddpm_deploy.export.calibrate import sampled, small, written
from ddpm_deploy.export.onnx_file import load_graph
from ddpm_deploy.parity import relative_error


def prove(graph: Path, engine: Engine, *, steps: int = 3, images: int = 2) -> float:
    """Returns an engine's error against a graph in ONNX Runtime, on the x_t of a short loop.

    Args:
        graph: The `.onnx` file; its loop gives the x_t.
        engine: Of the same network.
        steps: Timesteps, from the last to the first.
        images: Samples at each.

    Returns:
        The largest max |engine - graph| / max |graph| of the output; infinite where the engine's is
        not finite.

    Raises:
        EngineError: One of them cannot be run.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    with (
        written(small(load_graph(graph), images)) as path,
        open_engine(path, device="cpu") as reference,
    ):
        errors = []
        for call in sampled(reference, steps, images):
            feeds = dict(call.feeds)
            out = engine(feeds.pop("x"), feeds.pop("t"), **feeds)
            errors.append(relative_error(out, call.out))
    return float(np.nan_to_num(np.max(errors), nan=np.inf))
