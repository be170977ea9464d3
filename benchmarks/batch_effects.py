"""Does the batch that an image stands in change its bits? python benchmarks/batch_effects.py.

Compares one step's output for the same 64 images in batches of 1 with other batch sizes, for each
engine, and prints the share of numbers that differ and the largest difference over the peak.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from ddpm_deploy import Engine, SeededNoise, open_engine
from ddpm_deploy.arrays import Samples
from ddpm_deploy.export.to_onnx import export_network
from ddpm_deploy.model import load_network

IMAGES = 64


def main() -> None:
    """Prints a line for each engine and batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    demo = Path(__file__).parents[1] / "demo" / "digits.pt"
    parser.add_argument("checkpoint", type=Path, nargs="?", default=demo)
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 3, 4, 8, 16, 64])
    arguments = parser.parse_args()
    loaded = load_network(arguments.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "unet.onnx"
        export_network(loaded.network, loaded.spec, graph)
        for engine in (open_engine(graph), open_engine(arguments.checkpoint)):
            alone = _outputs(engine, 1)
            for batch in arguments.batches:
                difference = np.abs(_outputs(engine, batch) - alone)
                print(
                    f"{engine.name:16} batch {batch:3}: {np.mean(difference > 0):8.3%} differ, "
                    f"at most {difference.max() / np.abs(alone).max():.1e} of the peak"
                )


def _outputs(engine: Engine, batch: int) -> Samples:
    spec = engine.spec
    x = SeededNoise(0, range(IMAGES), spec.sample_shape)(0)
    t = np.linspace(spec.first_timestep, spec.schedule.T - 1, IMAGES).astype(np.int64)
    conditions = {
        c.name: np.arange(IMAGES, dtype=c.dtype) % (c.classes or 1) for c in spec.conditions
    }
    parts = [
        engine(
            x[i : i + batch],
            t[i : i + batch],
            **{name: values[i : i + batch] for name, values in conditions.items()},
        )
        for i in range(0, IMAGES, batch)
    ]
    return np.concatenate(parts)


if __name__ == "__main__":
    main()
