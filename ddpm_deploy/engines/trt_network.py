"""A plan in TensorRT or TensorRT-RTX: everything that touches their programming interface.

The two modules have one interface, most of it the same from TensorRT 10.3 to 11.4 and RTX 1.7;
what not all of them have is asked for with `hasattr`. `tests/engines/test_trt_api.py` compares
every name that is used here with the bindings of each.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from ddpm_deploy.engines.flavour import extra
from ddpm_deploy.engines.plan import PlanRecord, rebuild_hint
from ddpm_deploy.engines.runtime_cache import RuntimeCache
from ddpm_deploy.errors import EngineError

_TO_LESSEN_MEMORY = "If memory ran out, type a smaller --batch."


_ANOTHER_GPU = "compute capabilit"
"""In what both flavours say of a plan that is not for the GPU it is loaded on."""


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """An input or output of a plan.

    Attributes:
        name: Its name.
        dtype: NumPy's name for its dtype.
        shape: Its shape, the batch as -1 where it is free.
        is_input: Whether it is one.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    is_input: bool


class TrtNetwork:
    """A plan, deserialised, with one execution context.

    One context, because each holds the memory of the largest batch.

    Args:
        trt: The module, `tensorrt` or `tensorrt_rtx`.
        plan: The file, whose sidecar was compared with it and with this machine.
        record: The sidecar.
        cache: Where TensorRT-RTX keeps what it compiled for this GPU.

    Attributes:
        tensors: Inputs and outputs by name.
        captures_itself: Whether it makes CUDA graphs of its own, so that nobody else need.

    Raises:
        EngineError: It cannot be deserialised, or there is no memory for it.
    """

    def __init__(
        self, trt: ModuleType, plan: Path, record: PlanRecord, cache: RuntimeCache
    ) -> None:
        self._trt: Any = trt
        self._plan = plan
        self._log = _logger(self._trt)
        self._cache = cache
        self._runtime_cache: Any = None
        self.captures_itself = False
        runtime = self._trt.Runtime(self._log)
        if record.version_compatible:
            # Such a plan brings the runtime that reads it, as host code. Others stay without leave.
            runtime.engine_host_code_allowed = True
        engine = runtime.deserialize_cuda_engine(plan.read_bytes())
        if engine is None:
            said = self._log.last()
            raise EngineError(
                f"{record.runtime} cannot load {plan}: {said}",
                hint=load_hint(said, record, plan),
            )
        self._runtime, self._engine = runtime, engine
        self.tensors = {tensor.name: tensor for tensor in self._tensors()}
        self._context = self._make_context()
        if self._context is None:
            raise EngineError(
                f"{record.runtime} cannot prepare {plan} to run: {self._log.last()}",
                hint=_TO_LESSEN_MEMORY,
            )
        self._profile = 0

    def bind(
        self,
        profile: int,
        shapes: Mapping[str, tuple[int, ...]],
        addresses: Mapping[str, int],
        stream: int,
    ) -> None:
        """Sets the batch and the memory of the calls that follow.

        Args:
            profile: The profile's number.
            shapes: Of every input, the batch included.
            addresses: Of every input and output, on the device.
            stream: A stream that is waited for by the caller before the next call.

        Raises:
            EngineError: The plan does not take these shapes.
        """
        try:
            done = self._set(profile, shapes, addresses, stream)
        except RuntimeError:  # of some failures they return False, of others they raise
            done = False
        if not done:
            raise EngineError(
                f"{self._plan} does not take {shapes}: {self._log.last()}",
                hint="Its sidecar promises other batches; build it again: ddpm-deploy build",
            )

    def enqueue(self, stream: int) -> None:
        """Gives one call to a stream.

        Raises:
            EngineError: The runtime refuses; the message has its words.
        """
        if not self._context.execute_async_v3(stream):
            raise EngineError(
                f"The runtime failed on {self._plan}: {self._log.last()}", hint=_TO_LESSEN_MEMORY
            )

    def keep_compiled(self) -> None:
        """Stores what was compiled so far, for the next start; does nothing where nothing is."""
        if self._runtime_cache is None:
            return
        compiled = self._runtime_cache.serialize()
        if compiled is not None:  # it is where the runtime failed
            self._cache.write(bytes(compiled))

    def close(self) -> None:
        """Gives the memory back; once more does nothing."""
        # Each is destroyed with its last reference, and needs those after it until then.
        self._context = self._runtime_cache = self._engine = self._runtime = None

    def _set(
        self,
        profile: int,
        shapes: Mapping[str, tuple[int, ...]],
        addresses: Mapping[str, int],
        stream: int,
    ) -> bool:
        """Sets what `bind` takes; returns whether the context took it."""
        context = self._context
        if profile != self._profile:
            if not context.set_optimization_profile_async(profile, stream):
                return False
            self._profile = profile
        return (
            all(context.set_input_shape(name, shape) for name, shape in shapes.items())
            and all(context.set_tensor_address(*pair) for pair in addresses.items())
            and not context.infer_shapes()  # the inputs whose shape is still open
        )

    def _tensors(self) -> list[Tensor]:
        engine, trt = self._engine, self._trt
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        return [
            Tensor(
                name=name,
                dtype=_dtypes(trt).get(engine.get_tensor_dtype(name), "unknown"),
                shape=tuple(engine.get_tensor_shape(name)),
                is_input=engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
            )
            for name in names
        ]

    def _make_context(self) -> Any:
        """Makes the context; with RTX's settings where the runtime has them, TensorRT has not."""
        engine, trt = self._engine, self._trt
        if not hasattr(trt, "CudaGraphStrategy"):
            return engine.create_execution_context()
        config = engine.create_runtime_config()
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        # Kernels for a shape are ready before its first call: with LAZY the first steps of a loop
        # run general ones, and could round otherwise than the later steps.
        specialise = trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = specialise.EAGER
        self._runtime_cache = config.create_runtime_cache()
        if blob := self._cache.read():
            self._runtime_cache.deserialize(blob)  # False for another driver's: compiled again
        config.set_runtime_cache(self._runtime_cache)
        self.captures_itself = True
        return engine.create_execution_context(config)


def _dtypes(trt: Any) -> dict[Any, str]:
    """Our names for its dtypes: `trt.nptype` breaks on NumPy 2 in some releases."""
    return {
        trt.DataType.FLOAT: "float32",
        trt.DataType.HALF: "float16",
        trt.DataType.INT32: "int32",
        trt.DataType.INT64: "int64",
        trt.DataType.BOOL: "bool",
    }


@cache
def _logger(trt: Any) -> Any:
    """Makes a logger that keeps the errors, which TensorRT reports nowhere else.

    One for the process: TensorRT registers the first that it is given for all runtimes, and goes on
    calling it when another plan is still open.
    """

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._errors: deque[str] = deque(maxlen=3)

        def log(self, severity: Any, message: str) -> None:
            if severity in {trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR}:
                self._errors.append(message.strip())

        def last(self) -> str:
            """Returns the errors since the last call, the newest three."""
            said = " ".join(self._errors)
            self._errors.clear()
            return said or "it gives no reason."

    return Log()


def load_hint(words: str, record: PlanRecord, plan: Path) -> str:
    """Returns what to do about a plan that does not load, by what the runtime said."""
    if _ANOTHER_GPU in words:
        return (
            f"It is not for this GPU. {rebuild_hint(record, plan)} Or with TensorRT: pip install "
            f"'ddpm-deploy[{extra('tensorrt')}]'"
        )
    return f"{_TO_LESSEN_MEMORY} {rebuild_hint(record, plan)}"
