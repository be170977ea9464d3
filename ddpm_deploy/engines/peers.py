"""What people would use instead of this package, each as they would write it.

`bench --peers` runs them in turns with our engines. What they have in common is the table of the
sampler: the numbers of its rows, so that all do the same work.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_deploy.arrays import Array, Samples
from ddpm_deploy.bench import Loop, StepTime
from ddpm_deploy.engines.base import Engine, needs
from ddpm_deploy.errors import EngineError
from ddpm_deploy.onnx_metadata import read_metadata
from ddpm_deploy.run import Recipe
from ddpm_deploy.spec import ModelSpec


class PlainOnnxRuntime(Engine):
    """The exported graph in ONNX Runtime's own session, on the CPU.

    Args:
        path: The graph, as `export` wrote it.
        threads: CPU threads.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed.
        SpecError: The file carries no spec.
    """

    def __init__(self, path: Path, *, threads: int) -> None:
        with needs("onnxruntime", extra="cpu"):
            import onnxruntime as ort

        self.path, self.name = path, "onnxruntime plain"
        self.spec = ModelSpec.from_metadata(read_metadata(path), source=str(path))
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def _run(self, feeds: Mapping[str, Array]) -> Samples:
        (out,) = self._session.run(None, dict(feeds))
        return np.asarray(out)

    def close(self) -> None:
        """Gives back the session."""
        self._session = None


class PlainOpenVino(Engine):
    """The exported graph in OpenVINO, as read: shapes dynamic, float32, on the CPU.

    Args:
        path: The graph, as `export` wrote it.
        threads: CPU threads.

    Raises:
        MissingDependencyError: OpenVINO is not installed.
        SpecError: The file carries no spec.
    """

    def __init__(self, path: Path, *, threads: int) -> None:
        with needs("openvino", extra="openvino"):
            import openvino

        self.path, self.name = path, "openvino plain"
        self.spec = ModelSpec.from_metadata(read_metadata(path), source=str(path))
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        core = openvino.Core()
        self._compiled: Any = core.compile_model(core.read_model(path), "CPU", settings)

    def _run(self, feeds: Mapping[str, Array]) -> Samples:
        return np.asarray(self._compiled(dict(feeds))["out"])

    def close(self) -> None:
        """Gives back the network."""
        self._compiled = None


class DiffusersPipeline(Engine):
    """diffusers' own pipeline of a checkpoint folder, on the CPU.

    Args:
        path: The folder, with a `model_index.json`.
        threads: CPU threads of this process.
        spec: What the network is.

    Raises:
        EngineError: It is no such folder.
        MissingDependencyError: diffusers is not installed.
    """

    def __init__(self, path: Path, *, threads: int, spec: ModelSpec) -> None:
        if not (path / "model_index.json").is_file():
            raise EngineError(
                f"{path} is no diffusers pipeline: it has no model_index.json.",
                hint="Give the pipeline's folder: --against FOLDER",
            )
        try:
            import diffusers  # noqa: PLC0415
            import torch
        except ImportError as error:
            raise EngineError(
                f"{error.name} is not installed.", hint="pip install diffusers"
            ) from error

        torch.set_num_threads(threads)
        diffusers.utils.logging.disable_progress_bar()
        self.path, self.name, self.spec = path, "diffusers", spec
        self._torch = torch
        self.pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(
            path, local_files_only=True
        )
        self.pipeline.set_progress_bar_config(disable=True)

    def _run(self, feeds: Mapping[str, Array]) -> Samples:
        x, t = (self._torch.from_numpy(feeds[name]) for name in ("x", "t"))
        with self._torch.inference_mode():
            return np.asarray(self.pipeline.unet(x, t).sample.numpy())


def pipeline_loop(engine: DiffusersPipeline, recipe: Recipe, batch: int) -> Loop:
    """Makes the loop that a call of diffusers' pipeline is; a step is given the call's mean."""
    import torch

    rows = len(recipe.table(engine.spec))

    def run(steps: int) -> Iterator[StepTime]:
        generator = torch.Generator().manual_seed(recipe.seed)
        count = min(steps, rows)
        start = time.perf_counter()
        engine.pipeline(
            batch_size=batch, generator=generator, num_inference_steps=count, output_type="np"
        )
        mean = (time.perf_counter() - start) / count
        yield from [StepTime(total=mean, network=mean)] * count

    return run


def numpy_loop(engine: Engine, recipe: Recipe, batch: int) -> Loop:
    """Makes the loop as people write it in NumPy, with NumPy's own noise."""
    spec = engine.spec
    table = recipe.table(spec)
    given = recipe.conditions(engine, range(batch))
    sees = spec.self_condition
    shape = (batch, *spec.sample_shape)

    def run(steps: int) -> Iterator[StepTime]:
        rng = np.random.default_rng(recipe.seed)
        x = rng.standard_normal(shape, dtype=np.float32)
        before = np.zeros_like(x)
        for row in table[:steps]:
            start = time.perf_counter()
            feeds: dict[str, Array] = {"x": x, "t": np.full(batch, row.t, np.int64), **given}
            if sees is not None:
                feeds[sees.name] = before
            called = time.perf_counter()
            predicted = engine._run(feeds)
            network = time.perf_counter() - called
            out, v = np.split(predicted, [x.shape[1]], axis=1)
            x0 = row.x0_from_x * x + row.x0_from_out * out
            if row.clip is not None:
                x0 = np.clip(x0, -row.clip, row.clip)
            x = row.x_from_x0 * x0 + row.x_from_x * x + row.x_from_out * out
            x += row.x_from_before * before
            before = x0
            if row.x_from_noise:
                noise = rng.standard_normal(shape, dtype=np.float32)
                learned = row.log_std
                std = np.exp(learned[0] + learned[1] * v) if learned else row.x_from_noise
                x = x + std * noise
            yield StepTime(total=time.perf_counter() - start, network=network)

    return run
