"""TensorRT plans as engines: TensorRT and TensorRT-RTX, one code path."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_deploy.arrays import Array, Samples
from ddpm_deploy.engines import flavour
from ddpm_deploy.engines.base import Engine, Stepper
from ddpm_deploy.engines.batches import Cut, cut
from ddpm_deploy.engines.cuda import Cuda
from ddpm_deploy.engines.device_stepper import DeviceStepper
from ddpm_deploy.engines.launch import Binding, Call, Graphs, Launch, Network
from ddpm_deploy.engines.match import check_device, check_version
from ddpm_deploy.engines.plan import PlanRecord, rebuild_hint
from ddpm_deploy.engines.runtime_cache import RuntimeCache
from ddpm_deploy.engines.trt_network import Tensor, TrtNetwork
from ddpm_deploy.errors import EngineError
from ddpm_deploy.fused import COLUMNS


class TrtEngine(Engine):
    """A plan on a GPU.

    A batch that no profile takes is cut in equal parts, or padded. One step is one launch: copies
    and network are one CUDA graph, from the second call of a batch on. TensorRT-RTX makes the
    network's graph itself.

    Args:
        path: The plan.
        record: Its sidecar.
        cuda: The device.
        network: The plan, loaded.
        graphs: Whether to use CUDA graphs; `describe` says why not where they are not.

    Raises:
        EngineError: The plan's inputs are not those that its sidecar says.
    """

    def __init__(
        self,
        path: Path,
        record: PlanRecord,
        cuda: Cuda,
        network: Network,
        *,
        graphs: bool = True,
    ) -> None:
        self.path, self.record, self.spec = path, record, record.spec
        self.name = f"{flavour.LABELS[record.flavour]} GPU"
        self.fused, self.on_gpu = record.fused_step, True
        self.precision = record.precision
        self.best_batch = max(profile.best for profile in record.profiles)
        _check_tensors(network.tensors, record, path)
        off = "" if graphs else "not wanted"
        self._graphs = Graphs("the runtime makes its own" if network.captures_itself else off)
        self._cuda, self._network = cuda, network
        # A fused step copies its state and noise to what the network reads. From host to host that
        # would wait for the step before it, so there the network has memory of its own.
        self._shared = cuda.device.integrated and not self.fused
        self._stream = cuda.stream()
        self._binding: Binding | None = None
        self._call: Call | None = None

    @classmethod
    def open(
        cls, path: Path, record: PlanRecord, *, device: str = "auto", graphs: bool = True
    ) -> TrtEngine:
        """Opens a plan on the first GPU.

        Args:
            path: The plan.
            record: Its sidecar, from `checked_record`.
            device: `cuda`, or `auto`, which is the same here.
            graphs: As above.

        Raises:
            EngineError: There is no GPU, no memory, or the plan cannot be loaded.
            PlanMismatchError: The plan is for another GPU or version.
            MissingDependencyError: The runtime cannot be loaded.
        """
        if device not in {"auto", "cuda"}:
            raise EngineError(
                f"The device is {device!r}; a plan runs on a GPU alone, and {path} is one.",
                hint=f"Run its graph on the CPU: --engine {record.graph}",
            )
        try:
            cuda = Cuda.open()
        except EngineError as error:
            raise EngineError(
                f"{path} does not run here. {error}",
                hint=f"{error.hint}\nOr run its graph on the CPU: --engine {record.graph}",
            ) from error
        check_device(path, record, cuda.device.name, cuda.device.compute_capability)
        trt = flavour.load(record.flavour)
        check_version(path, record, trt.__version__)
        key = {
            "plan": record.plan_sha256,
            "version": trt.__version__,
            "device": cuda.device.name,
            "driver": cuda.device.driver,
        }
        network = TrtNetwork(trt, path, record, RuntimeCache(path, key))
        return cls(path, record, cuda, network, graphs=graphs)

    def stepper(self, n: int) -> Stepper:
        """Returns the loop's state for n samples, on the device; errors as in `Engine.stepper`."""
        if not self.fused:
            return super().stepper(n)
        return DeviceStepper(self, cut(n, self.record), self._bind, self._graphs)

    def network_seconds(self, batch: int, *, repeat: int = 50) -> float:
        """Measures the network alone: calls in a row on the device, nothing copied between them.

        Args:
            batch: Samples, in as many parts as the profiles want.
            repeat: Times that it is taken the mean of, after two that are not counted.

        Returns:
            Seconds for the whole batch.
        """
        at = cut(batch, self.record)
        binding = self._bind(at)
        launch = Launch(
            self._cuda, self._stream, lambda: self._network.enqueue(self._stream), self._graphs
        )
        parts = len(list(at.slices()))
        try:
            for _ in range(2):
                launch()
            self._cuda.synchronise(binding.stream)
            start = time.perf_counter()
            for _ in range(repeat * parts):
                launch()
            self._cuda.synchronise(binding.stream)
            return (time.perf_counter() - start) / repeat
        finally:
            launch.close()

    def describe(self) -> dict[str, Any]:
        """Returns what identifies the runtime, for reports."""
        device = self._cuda.device
        return {
            **super().describe(),
            "runtime": self.record.runtime,
            "device": device.name,
            "compute_capability": device.compute_capability,
            "driver": device.driver,
            "precision": self.record.precision,
            "groups": dict(self.record.precision_groups),
            "profiles": [str(profile) for profile in self.record.profiles],
            "fused_step": self.fused,
            "zero_copy": self._shared,
            "cuda_graph": f"off: {self._graphs.off}" if self._graphs.off else "on",
        }

    def close(self) -> None:
        """Gives memory and stream back; once more does nothing."""
        if self._stream:
            self._release()
            self._network.close()
            self._cuda.close_stream(self._stream)
            self._stream = 0

    def _run(self, feeds: Mapping[str, Array]) -> Samples:
        samples = len(feeds["x"])
        at = cut(samples, self.record)
        binding = self._bind(at)
        first = self._call is None
        if self._call is None:
            self._call = Call(binding, feeds, self._graphs)
        out = np.empty((samples, *self.spec.output_shape), dtype=np.float32)
        for part in at.slices():
            out[part] = self._call(feeds, part)
        if first:
            self._network.keep_compiled()
        return out

    def _bind(self, at: Cut) -> Binding:
        """Returns the network bound at a cut: as it is, or anew where the batch is another."""
        bound = self._binding
        if bound is None or (bound.batch, bound.profile) != (at.batch, at.profile):
            self._release()
            bound = self._binding = Binding(
                self._cuda, self._network, self._stream, at, shared=self._shared
            )
        return bound

    def _release(self) -> None:
        """Gives back what belongs to the batch of before, once the device is done with it."""
        self._cuda.settle(self._stream)
        if self._call is not None:
            self._call.close()
            self._call = None
        if self._binding is not None:
            self._network.keep_compiled()
            self._binding.close()
            self._binding = None


def _check_tensors(tensors: Mapping[str, Tensor], record: PlanRecord, path: Path) -> None:
    """Compares a plan's inputs and outputs with what its sidecar says.

    Raises:
        EngineError: They differ.
    """
    wanted = {tensor.name: tensor for tensor in _promised(record)}
    given = {
        name: _comparable(tensor, wanted[name]) if name in wanted else tensor
        for name, tensor in tensors.items()
    }
    if given != wanted:
        raise EngineError(
            f"{path} has {_listed(given)}; its sidecar says {_listed(wanted)}.",
            hint=rebuild_hint(record, path),
        )


def _promised(record: PlanRecord) -> list[Tensor]:
    spec = record.spec

    def tensor(name: str, dtype: str, shape: tuple[int, ...], *, is_input: bool = True) -> Tensor:
        return Tensor(name=name, dtype=dtype, shape=shape, is_input=is_input)

    tensors = [tensor("x", "float32", (-1, *spec.sample_shape)), tensor("t", "int64", (-1,))]
    tensors += [tensor(c.name, c.dtype, (-1, *c.shape)) for c in spec.conditions]
    tensors += [tensor("out", "float32", (-1, *spec.output_shape), is_input=False)]
    if record.fused_step:
        tensors += [
            tensor("row", "float32", (len(COLUMNS),)),
            tensor("z", "float32", (-1, *spec.sample_shape)),
            tensor("x_s", "float32", (-1, *spec.sample_shape), is_input=False),
        ]
    return tensors


def _comparable(tensor: Tensor, wanted: Tensor) -> Tensor:
    """Returns a tensor as its sidecar would write it: any batch, and indices of any size."""
    shape = tensor.shape
    if wanted.shape[:1] == (-1,):
        shape = (-1, *shape[1:])
    narrow = (tensor.dtype, wanted.dtype) == ("int32", "int64")  # indices and labels are small
    return replace(tensor, shape=shape, dtype=wanted.dtype if narrow else tensor.dtype)


def _listed(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(
        f"{'' if tensor.is_input else 'output '}{name} {tensor.dtype} {tensor.shape}"
        for name, tensor in sorted(tensors.items())
    )
