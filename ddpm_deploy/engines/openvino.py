"""OpenVINO: the CPU, in float32, bfloat16 and int8."""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import openvino

from ddpm_deploy.arrays import Array, Samples
from ddpm_deploy.engines.base import Engine
from ddpm_deploy.engines.runtime_cache import RuntimeCache
from ddpm_deploy.errors import EngineError
from ddpm_deploy.fused import METADATA_KEY as STEP_KEY
from ddpm_deploy.fused import check_inputs, is_fused
from ddpm_deploy.onnx_metadata import read_metadata
from ddpm_deploy.precision import METADATA_KEY as PRECISION_KEY
from ddpm_deploy.precision import read_precision
from ddpm_deploy.runtime import METADATA_KEY, RuntimeRecord, read_runtime
from ddpm_deploy.spec import ModelSpec

_KEPT = 2
"""Batch sizes whose networks are kept compiled: a run's own, and that of what is left over."""


def has_bf16() -> bool:
    """Says whether this processor computes in bfloat16; elsewhere OpenVINO takes float32."""
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def processor() -> str:
    """Returns the processor's name, as OpenVINO reads it."""
    return str(openvino.Core().get_property("CPU", "FULL_DEVICE_NAME"))


class OpenVinoEngine(Engine):
    """An ONNX file on the CPU, compiled for each batch size that it is given.

    A batch is cut into as many parts as the engine has streams, which run side by side: each on
    cores of its own, without waiting for the others after every operator.

    Args:
        path: The `.onnx` file: an engine that `build` made for OpenVINO, or a graph.
        threads: CPU threads for one call; one a core when None.
        device: `cpu` or `auto`.
        record: What to run the file as; what it says itself, or float32, when None.
        cache: Whether what is compiled is kept beside the file, for a quicker start.

    Raises:
        EngineError: The device is not there; or the file is damaged, which is seen at the first
            call where a compiled network lies beside it.
        SpecError: The file carries no spec, or one that this release does not read.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        device: str = "auto",
        record: RuntimeRecord | None = None,
        cache: bool = True,
    ) -> None:
        if device not in {"auto", "cpu"}:
            raise EngineError(
                f"The device is {device!r}; OpenVINO runs {path} on the CPU.",
                hint="Type --device cpu, or leave it out.",
            )
        self.path = path
        self._turn = Lock()
        metadata = read_metadata(path)
        self.spec = ModelSpec.from_metadata(metadata, source=str(path))
        said = read_runtime(metadata.get(METADATA_KEY), source=str(path))
        written = read_precision(metadata.get(PRECISION_KEY), source=str(path)).precision
        plain = RuntimeRecord(runtime="openvino", precision=written)
        self.record = record or said or plain
        self._core = openvino.Core()
        if self.record.arithmetic == "bf16" and not has_bf16():
            # OpenVINO would do so too, and not say it.
            wide = "fp32" if self.record.precision == "bf16" else self.record.precision
            self.record = replace(self.record, arithmetic="f32", precision=wide)
        self.precision = self.record.precision
        self.rounds_input = self.record.arithmetic == "bf16"
        self.best_batch = self.record.best_batch
        self.name = f"openvino CPU {self.precision}"
        if is_fused(metadata.get(STEP_KEY), source=str(path)):
            raise EngineError(
                f"{path} has its step fused, which OpenVINO's engine does not run.",
                hint="Build it without --fuse-step.",
            )
        self._threads = threads
        self._compiled: OrderedDict[int, _Compiled] = OrderedDict()
        # What is compiled is kept for an engine that `build` made: its weights are in its own file.
        self._cache_due = cache and said is not None
        self._model: Any = None
        if not RuntimeCache(path, {}).path.is_file():  # or the file would be read in vain
            self._check_network(self._read().inputs)

    def _run(self, feeds: Mapping[str, Array]) -> Samples:
        n = len(feeds["x"])
        with _running(n), self._turn:  # a compiled network has one set of inputs
            return self._for(n).run(feeds)

    def describe(self) -> dict[str, Any]:
        """Returns what identifies the runtime, for reports."""
        computes = {"arithmetic": self.record.arithmetic, "streams": self.record.streams}
        version = openvino.__version__.split("-")[0]
        return {**super().describe(), "runtime": f"openvino {version}", **computes}

    def layer_times(self, n: int, *, calls: int = 5) -> dict[str, tuple[str, float]]:
        """Measures what each layer takes on a batch of n, in one stream.

        Returns:
            Name to its kernel and seconds a call, the mean of `calls`; layers that were fused into
            others are left out.
        """
        settings = {**self._settings(1), "PERF_COUNT": True}
        compiled = _Compiled(self, self._core.compile_model(self._shaped(n), "CPU", settings), n, 1)
        return compiled.layer_times(calls)

    def close(self) -> None:
        """Gives back the compiled networks."""
        self._compiled.clear()
        self._model = None

    def _for(self, n: int) -> _Compiled:
        """Returns the network compiled for a batch of n."""
        found = self._compiled.get(n)
        if found is None:
            while len(self._compiled) >= _KEPT:
                self._compiled.popitem(last=False)
            found = self._compiled[n] = self._compile(n)
        self._compiled.move_to_end(n)
        return found

    def _compile(self, n: int) -> _Compiled:
        streams = max(1, min(self.record.streams, n, self._threads or os.cpu_count() or 1))
        part = -(-n // streams)
        streams = -(-n // part)
        settings = self._settings(streams)
        cache = None
        if self._cache_due:  # the first batch is the one that a later run begins with, too
            cache = RuntimeCache(self.path, self._key(part, settings))
            self._cache_due = False
        blob = cache.read() if cache else None
        compiled = None
        if blob is not None:
            with suppress(Exception):  # a cache is never needed; its errors have no common class
                tensor = openvino.Tensor(np.frombuffer(blob, np.uint8))
                compiled = self._core.import_model(tensor, "CPU", settings)
        if compiled is None:
            compiled = self._core.compile_model(self._shaped(part), "CPU", settings)
            if cache is not None:
                written = io.BytesIO()
                compiled.export_model(written)
                cache.write(written.getvalue())
        self._check_network(compiled.inputs)
        return _Compiled(self, compiled, part, streams)

    def _settings(self, streams: int) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": self.record.arithmetic,
            "NUM_STREAMS": streams,
        }
        if self._threads is not None:
            settings["INFERENCE_NUM_THREADS"] = self._threads
        return settings

    def _key(self, n: int, settings: Mapping[str, Any]) -> dict[str, str]:
        return {
            "engine": self.sha256,
            "runtime": openvino.__version__,
            "device": processor(),
            "abilities": " ".join(self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")),
            "batch": str(n),
            "settings": repr(sorted(settings.items())),
        }

    def _shaped(self, n: int) -> Any:
        """Returns the model for a batch of n."""
        model = self._read().clone()
        shapes = {i.any_name: [n, *list(i.partial_shape)[1:]] for i in model.inputs}
        model.reshape(shapes)
        return model

    def _read(self) -> Any:
        if self._model is None:
            try:
                self._model = self._core.read_model(self.path)
            except Exception as error:  # its errors have no common class
                raise EngineError(
                    f"OpenVINO {openvino.__version__.split('-')[0]} cannot load {self.path}: "
                    f"{_first_line(error)}",
                    hint="Export the network again: ddpm-deploy export CHECKPOINT",
                ) from error
        return self._model

    def _check_network(self, inputs: Any) -> None:
        given = {
            i.any_name: (
                np.dtype(i.element_type.to_dtype()).name,
                tuple(int(d.get_length()) if d.is_static else "N" for d in i.partial_shape),
            )
            for i in inputs
        }
        check_inputs(self.path, self.spec, given, fused=False)


class _Compiled:
    """The network for one batch size: a request for each stream, with its inputs and output."""

    def __init__(self, engine: OpenVinoEngine, compiled: Any, part: int, streams: int) -> None:
        self._requests = [compiled.create_infer_request() for _ in range(streams)]
        self._part = part
        self._shape = engine.spec.output_shape
        # The requests' own memory, which calls fill and read in place.
        self._inputs = [
            {i.any_name: request.get_tensor(i.any_name).data for i in compiled.inputs}
            for request in self._requests
        ]
        self._outputs = [request.get_tensor("out").data for request in self._requests]

    def run(self, feeds: Mapping[str, Array]) -> Samples:
        """Runs a batch; each part of it in a stream."""
        n = len(feeds["x"])
        out = np.empty((n, *self._shape), np.float32)
        parts = [slice(start, min(start + self._part, n)) for start in range(0, n, self._part)]
        for part, request, inputs in zip(parts, self._requests, self._inputs, strict=False):
            for name, memory in inputs.items():
                given = feeds[name][part]
                memory[: len(given)] = given
                memory[len(given) :] = given[:1]  # the last part may have fewer: padding
            request.start_async()
        failed: list[Exception] = []
        for part, request, memory in zip(parts, self._requests, self._outputs, strict=False):
            try:
                request.wait()
            except Exception as error:  # noqa: BLE001  (the others are awaited first)
                failed.append(error)
            out[part] = memory[: part.stop - part.start]
        if failed:
            raise failed[0]
        return out

    def layer_times(self, calls: int) -> dict[str, tuple[str, float]]:
        """Returns what each layer takes on random input."""
        (request,), (inputs,) = self._requests, self._inputs
        rng = np.random.default_rng(0)
        for name, memory in inputs.items():
            memory[:] = rng.standard_normal(memory.shape) if name == "x" else 0
        request.infer()
        times: dict[str, tuple[str, float]] = {}
        for _ in range(calls):
            request.infer()
            for layer in request.profiling_info:
                seconds = layer.real_time.total_seconds() / calls
                if seconds:
                    before = times.get(layer.node_name, ("", 0.0))[1]
                    kind = f"{layer.node_type} {layer.exec_type}"
                    times[layer.node_name] = (kind, before + seconds)
        return times


@contextmanager
def _running(n: int) -> Iterator[None]:
    """Turns what OpenVINO raises on a batch of n into an `EngineError`."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:  # its errors have no common class
        raise EngineError(
            f"OpenVINO failed on a batch of {n}: {_first_line(error)}",
            hint="If it ran out of memory, type a smaller --batch.",
        ) from error


def _first_line(error: Exception) -> str:
    """Returns the first line that is not a place in OpenVINO's own source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith(("Exception from", "Check '"))]
    return (said or lines or [repr(error)])[0]
