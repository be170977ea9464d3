"""Building an engine from an exported network: the best that this machine can run."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from ddpm_deploy.engines.base import Engine, needs, open_engine
from ddpm_deploy.errors import EngineBuildError
from ddpm_deploy.files import whole_file
from ddpm_deploy.fused import denoise_fused
from ddpm_deploy.noise import SeededNoise
from ddpm_deploy.parity import BUDGETS, example_conditions, relative_error
from ddpm_deploy.runtime import RuntimeRecord
from ddpm_deploy.sampling import denoise

Write = Callable[[RuntimeRecord, Path], None]
"""Writes an engine's file: the graph for its runtime, and what it says of itself."""

Tune = Callable[[Engine, RuntimeRecord], RuntimeRecord]
"""Adds to a record what was measured of its engine."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """An engine that gives what its graph gives.

    Attributes:
        path: The engine's file.
        runtime: What it is for: `onnxruntime 1.32.0 CPU`.
        record: What it says of itself.
        deviation: max |engine - graph| / max |graph| over the batches compared.
        load_seconds: Time to open the engine, and `graph_load_seconds` the graph.
        graph_load_seconds: Time to open the graph it was built from.
        seconds: How long the build took, check included.
    """

    path: Path
    runtime: str
    record: RuntimeRecord
    deviation: float
    load_seconds: float
    graph_load_seconds: float
    seconds: float


def build_engine(
    graph: Path,
    output: Path,
    record: RuntimeRecord,
    *,
    write: Write | None,
    tune: Tune | None = None,
    budget: float | None = None,
    threads: int | None = None,
    device: str = "auto",
) -> Built:
    """Builds an engine for ONNX Runtime or OpenVINO.

    For ONNX Runtime its own fusions are done ahead, those that hold on every machine; the layout
    for one processor is still chosen when the engine is opened. OpenVINO keeps what it compiled for
    this processor beside the engine, when it is first run.

    Args:
        graph: An `.onnx` file that `export` wrote.
        output: Where to, ending in `.onnx`; overwritten.
        record: For which runtime, and in what precision.
        write: Writes the engine's file: the same function as the graph, perhaps with a fused step,
            which is compared with NumPy's. None takes the graph as it is, for ONNX Runtime alone.
        tune: Returns the record with what was measured of an engine, such as its best batch.
        budget: Largest error over the output's peak; the precision's own when None.
        threads: CPU threads of the check.
        device: `cpu`, `cuda` or `auto`.

    Raises:
        EngineBuildError: The engine is not the same function as the graph.
        EngineError: The graph cannot be loaded.
        SpecError: It carries no spec.
        MissingDependencyError: The runtime is not installed.
    """
    start = time.perf_counter()
    if output.resolve() == graph.resolve():
        raise EngineBuildError(
            f"The engine would overwrite the graph it is built from, {graph}.",
            hint="Name another file with -o.",
        )
    source, graph_seconds = _open(graph, threads, device)
    with source, whole_file(output) as partial:
        _write(graph, partial, record, write, device)
        built, built_seconds = _open_built(partial, record, threads, device)
        with built:
            deviation = _check(source, built, graph, budget)
            description = built.describe()
            name = built.name
            if tune is not None:
                record = replace(tune(built, record), error=deviation)
        if tune is not None:
            _write(graph, partial, record, write, device)
    return Built(
        path=output,
        runtime=f"{description['runtime']} {name.split()[1]}",
        record=record,
        deviation=deviation,
        load_seconds=built_seconds,
        graph_load_seconds=graph_seconds,
        seconds=time.perf_counter() - start,
    )


def _write(
    graph: Path, output: Path, record: RuntimeRecord, write: Write | None, device: str
) -> None:
    """Writes the engine; for ONNX Runtime, as it is after its own fusions."""
    if record.runtime == "openvino":
        assert write is not None, "OpenVINO's engine says that it is one"
        write(record, output)
        return
    with needs("onnxruntime", extra="cpu"):
        from ddpm_deploy.engines.ort import optimise  # noqa: PLC0415
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "written.onnx"
        if write is not None:
            write(record, written)
        optimise(graph if write is None else written, output, device=device)


def _check(source: Engine, built: Engine, graph: Path, budget: float | None) -> float:
    """Returns how far an engine is from its graph.

    Raises:
        EngineBuildError: Further than its precision explains.
    """
    errors = _errors(source, built)
    if built.fused:
        errors += _step_errors(built)
    deviation = float(np.max(errors))  # NaN where one is; Python's max would lose it
    most = BUDGETS[built.precision] if budget is None else budget
    if not deviation <= most:
        what = "rounding" if budget is None else "allowed"
        raise EngineBuildError(
            f"The engine is not the graph it was built from: they differ by {deviation:.1e} "
            f"of the peak; at most {most:.0e} is {what}. Nothing was written.",
            hint=f"Run the graph itself: ddpm-deploy sample --engine {graph}",
        )
    return deviation


def _open(path: Path, threads: int | None, device: str) -> tuple[Engine, float]:
    start = time.perf_counter()
    engine = open_engine(path, threads=threads, device=device)
    return engine, time.perf_counter() - start


def _open_built(
    path: Path, record: RuntimeRecord, threads: int | None, device: str
) -> tuple[Engine, float]:
    """Opens what is being built, and leaves nothing beside it."""
    if record.runtime != "openvino":
        return _open(path, threads, device)
    with needs("openvino", extra="openvino"):
        from ddpm_deploy.engines.openvino import OpenVinoEngine  # noqa: PLC0415
    start = time.perf_counter()
    engine = OpenVinoEngine(path, threads=threads, device=device, cache=False)
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
