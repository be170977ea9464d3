"""Building an engine from an exported network: the best that this machine can run."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ddpm_deploy.engines.base import Engine, needs, open_engine
from ddpm_deploy.errors import EngineBuildError
from ddpm_deploy.files import whole_file
from ddpm_deploy.fused import denoise_fused
from ddpm_deploy.noise import SeededNoise
from ddpm_deploy.parity import TOLERANCE, example_conditions, relative_error
from ddpm_deploy.sampling import denoise


@dataclass(frozen=True, kw_only=True)
class Built:
    """An engine that gives what its graph gives.

    Attributes:
        path: The engine's file.
        runtime: What it is for: `onnxruntime 1.32.0 CPU`.
        deviation: max |engine - graph| / max |graph| over the batches compared.
        load_seconds: Time to open the engine, and `graph_load_seconds` the graph.
        graph_load_seconds: Time to open the graph it was built from.
        seconds: How long the build took, check included.
    """

    path: Path
    runtime: str
    deviation: float
    load_seconds: float
    graph_load_seconds: float
    seconds: float


def build_ort(
    graph: Path,
    output: Path,
    *,
    threads: int | None = None,
    device: str = "auto",
    rewrite: Callable[[Path, Path], None] | None = None,
) -> Built:
    """Builds an ONNX Runtime engine: the graph with ONNX Runtime's own fusions done ahead.

    The fusions are those that hold on every machine; the layout for one processor is still chosen
    when the engine is opened.

    Args:
        graph: An `.onnx` file that `export` wrote.
        output: Where to, ending in `.onnx`; overwritten.
        threads: CPU threads of the check.
        device: `cpu`, `cuda` or `auto`.
        rewrite: Writes, from the graph's file, the one to build from instead: the same function,
            perhaps with a fused step, which is compared with NumPy's.

    Raises:
        EngineBuildError: The engine is not the same function as the graph.
        EngineError: The graph cannot be loaded.
        SpecError: It carries no spec.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    start = time.perf_counter()
    if output.resolve() == graph.resolve():
        raise EngineBuildError(
            f"The engine would overwrite the graph it is built from, {graph}.",
            hint="Name another file: -o unet.ort.onnx",
        )
    source, graph_seconds = _open(graph, threads, device)
    with needs("onnxruntime", extra="cpu"):
        from ddpm_deploy.engines.ort import optimise  # noqa: PLC0415
    with source, whole_file(output) as partial:
        with tempfile.TemporaryDirectory() as folder:
            rewritten = Path(folder) / "rewritten.onnx"
            if rewrite is not None:
                rewrite(graph, rewritten)
            optimise(graph if rewrite is None else rewritten, partial, device=device)
        built, built_seconds = _open(partial, threads, device)
        with built:
            errors = _errors(source, built)
            if built.fused:
                errors += _step_errors(built)
        deviation = float(np.max(errors))  # NaN where one is; Python's max would lose it
        if not deviation <= TOLERANCE:
            raise EngineBuildError(
                f"The engine is not the graph it was built from: they differ by {deviation:.1e} "
                f"of the peak; at most {TOLERANCE:.0e} is rounding. Nothing was written.",
                hint=f"Run the graph itself: ddpm-deploy sample --engine {graph}",
            )
    return Built(
        path=output,
        runtime=f"{built.describe()['runtime']} {built.name.split()[-1]}",
        deviation=deviation,
        load_seconds=built_seconds,
        graph_load_seconds=graph_seconds,
        seconds=time.perf_counter() - start,
    )


def _open(path: Path, threads: int | None, device: str) -> tuple[Engine, float]:
    start = time.perf_counter()
    engine = open_engine(path, threads=threads, device=device)
    return engine, time.perf_counter() - start


def _errors(graph: Engine, engine: Engine) -> list[float]:
    """Returns the errors of an engine's output, for two batches over all timesteps."""
    spec = graph.spec
    errors = []
    for batch in (1, 3):
        x = SeededNoise(0, range(batch), spec.sample_shape)(0)
        t = np.linspace(spec.first_timestep, spec.schedule.T - 1, batch).astype(np.int64)
        conditions = example_conditions(spec, batch)
        wanted = graph(x, t, **conditions)
        errors.append(relative_error(engine(x, t, **conditions), wanted))
    return errors


def _step_errors(engine: Engine, batch: int = 2) -> list[float]:
    """Returns the errors of the fused step for rows of two samplers, on the engine's own `out`."""
    spec = engine.spec
    noise = SeededNoise(0, range(batch), spec.sample_shape)
    conditions = example_conditions(spec, batch)
    predict = partial(engine, **conditions)
    tables = [spec.table()]
    if spec.sampler != "ddim":
        tables.append(spec.table("ddim", min(50, spec.schedule.T), eta=0.5))
    errors = []
    with engine.stepper(batch) as stepper:
        for table in tables:
            for i in {0, len(table) // 2, len(table) - 1}:
                rows = table[i : i + 1]
                stepper.start(noise(0), conditions)
                for _ in denoise_fused(stepper, rows, noise):
                    pass
                (step,) = denoise(predict, rows, noise)
                errors.append(relative_error(stepper.read(), step.x))
    return errors
