"""ONNX Runtime: the CPU, or CUDA with onnxruntime-gpu."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ddpm_deploy.arrays import Array, Samples
from ddpm_deploy.engines.base import Engine, Stepper
from ddpm_deploy.errors import EngineError
from ddpm_deploy.fused import COLUMNS, check_inputs, is_fused, row_of
from ddpm_deploy.fused import METADATA_KEY as STEP_KEY
from ddpm_deploy.precision import METADATA_KEY as PRECISION_KEY
from ddpm_deploy.precision import read_precision
from ddpm_deploy.runtime import METADATA_KEY as RUNTIME_KEY
from ddpm_deploy.runtime import read_runtime
from ddpm_deploy.sampling import Transition
from ddpm_deploy.spec import ModelSpec

_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"
_OPTIONS: dict[str, dict[str, str]] = {
    # float32 is float32, not TF32; and convolutions are chosen by rule, not by a race that another
    # session may decide otherwise.
    _CUDA: {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
}


class OrtEngine(Engine):
    """An ONNX file that `ddpm-deploy export` wrote, in ONNX Runtime.

    Args:
        path: The `.onnx` file.
        threads: CPU threads for one call; one a core when None.
        device: `cpu`, `cuda`, or `auto` for CUDA where this onnxruntime has it.

    Raises:
        EngineError: The file is damaged, or CUDA was asked for and is not there.
        SpecError: The file carries no spec, or one that this release does not read.
    """

    def __init__(self, path: Path, *, threads: int | None = None, device: str = "auto") -> None:
        self.path = path
        providers = _providers(device)
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors only: its warnings are about its own choices
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = ort.InferenceSession(
                str(path), options, providers=[(name, _OPTIONS.get(name, {})) for name in providers]
            )
        except Exception as error:  # ONNX Runtime's errors have no common class
            raise _cannot_load(path, error) from error
        active = self._session.get_providers()[0]
        if active != providers[0]:
            # ONNX Runtime says this on stderr alone and goes on with the CPU.
            raise EngineError(
                f"ONNX Runtime {ort.__version__} could not start {providers[0]} for {path} and "
                f"fell back to {active}.",
                hint="Check the driver and CUDA libraries (ddpm-deploy doctor), or type "
                "--device cpu.",
            )
        self._device = "cuda" if active == _CUDA else "cpu"
        self.on_gpu = self._device == "cuda"
        self.name = f"onnxruntime {self._device.upper()}"
        metadata = self._session.get_modelmeta().custom_metadata_map
        self.spec = ModelSpec.from_metadata(metadata, source=str(path))
        self.fused = is_fused(metadata.get(STEP_KEY), source=str(path))
        said = read_precision(metadata.get(PRECISION_KEY), source=str(path))
        self.precision, self._groups = said.precision, dict(said.groups)
        built = read_runtime(metadata.get(RUNTIME_KEY), source=str(path))
        self.best_batch = built.best_batch if built else None
        given = {i.name: (_dtype(i.type), tuple(i.shape)) for i in self._session.get_inputs()}
        check_inputs(path, self.spec, given, fused=self.fused)

    def _run(self, feeds: Mapping[str, Array]) -> Samples:
        fed = dict(feeds)
        if self.fused:  # a step of zeros, which nobody reads
            fed |= {"row": np.zeros(len(COLUMNS), np.float32), "z": np.zeros_like(fed["x"])}
        with _running(len(fed["x"])):
            (out,) = self._session.run(["out"], fed)
        return np.asarray(out, dtype=np.float32)

    def stepper(self, n: int) -> Stepper:
        """Returns the loop's state for n samples; errors as in `Engine.stepper`."""
        if not self.fused:
            return super().stepper(n)
        return OrtStepper(self, self._session, self._device, n)

    def layer_times(self, n: int, *, calls: int = 5) -> dict[str, tuple[str, float]]:
        """Measures each node as ONNX Runtime fused it, in a session of its own."""
        rng = np.random.default_rng(0)
        spec = self.spec
        feeds: dict[str, Array] = {
            "x": rng.standard_normal((n, *spec.sample_shape), dtype=np.float32),
            "t": np.zeros(n, np.int64),
            **{c.name: np.zeros((n, *c.shape), c.dtype) for c in spec.conditions},
        }
        if self.fused:
            feeds |= {"row": np.zeros(len(COLUMNS), np.float32), "z": np.zeros_like(feeds["x"])}
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self._session.get_session_options().intra_op_num_threads
        options.enable_profiling = True
        with tempfile.TemporaryDirectory() as folder:
            options.profile_file_prefix = str(Path(folder) / "profile")
            providers = [(name, _OPTIONS.get(name, {})) for name in self._session.get_providers()]
            session = ort.InferenceSession(str(self.path), options, providers=providers)
            with _running(n):
                for _ in range(calls + 1):
                    session.run(["out"], feeds)
            profile = Path(session.end_profiling()).read_text(encoding="utf-8")
        return _layers(json.loads(profile), calls)

    def describe(self) -> dict[str, Any]:
        """Returns what identifies the runtime, for reports."""
        groups = {"groups": self._groups} if self._groups else {}
        return {**super().describe(), "runtime": f"onnxruntime {ort.__version__}", **groups}


class OrtStepper(Stepper):
    """The state in tensors on the session's device: two of them, in turns x_t and x_s.

    Args:
        engine: What it steps; its file is fused.
        session: The engine's.
        device: ONNX Runtime's word for where the tensors lie: `cpu` or `cuda`.
        n: Samples.

    Raises:
        EngineError: There is no memory for the tensors.
    """

    def __init__(self, engine: OrtEngine, session: Any, device: str, n: int) -> None:
        self._engine, self._session, self._n = engine, session, n
        spec = engine.spec
        samples = (n, *spec.sample_shape)
        with _running(n):
            self._fed = {
                "t": _tensor((n,), "int64", device),
                "row": _tensor((len(COLUMNS),), "float32", device),
                "z": _tensor(samples, "float32", device),
                **{c.name: _tensor((n, *c.shape), c.dtype, device) for c in spec.conditions},
            }
            first, second = (_tensor(samples, "float32", device) for _ in range(2))
            self._turns = [self._bind(first, second), self._bind(second, first)]
        self._states = [first, second]

    def start(self, x: Samples, conditions: Mapping[str, Array]) -> None:
        """Makes x the state."""
        self._engine.check_start(x, conditions, self._n)
        self._states[0].update_inplace(x)
        for name, value in conditions.items():
            self._fed[name].update_inplace(value)

    def step(self, row: Transition, z: Samples | None) -> None:
        """Takes x_t to x_s, and returns when it is there."""
        self._engine.check_step(row, z, self._n)
        self._fed["t"].update_inplace(np.full(self._n, row.t, np.int64))
        self._fed["row"].update_inplace(row_of(row))
        if z is not None:  # what lies there otherwise is finite, and its factor 0
            self._fed["z"].update_inplace(z)
        with _running(self._n):
            self._session.run_with_iobinding(self._turns[0])
        self._turns.reverse()
        self._states.reverse()

    def read(self) -> Samples:
        """Returns a copy of the state."""
        with _running(self._n):
            return np.array(self._states[0].numpy(), dtype=np.float32)

    def close(self) -> None:
        """Gives back the tensors."""
        self._turns, self._states, self._fed = [], [], {}

    def _bind(self, x_t: Any, x_s: Any) -> Any:
        binding = self._session.io_binding()
        for name, tensor in {"x": x_t, **self._fed}.items():
            binding.bind_ortvalue_input(name, tensor)
        binding.bind_ortvalue_output("x_s", x_s)
        return binding


def _tensor(shape: tuple[int, ...], dtype: str, device: str) -> Any:
    tensor = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.dtype(dtype), device)
    tensor.update_inplace(np.zeros(shape, dtype))
    return tensor


def _layers(profile: Sequence[Mapping[str, Any]], calls: int) -> dict[str, tuple[str, float]]:
    """Reads the events of ONNX Runtime's profile; a node's first run, which warms up, is left out.

    Returns:
        Name to its operator and the median of seconds, which another program's turn does not move.
    """
    taken: dict[str, list[float]] = {}
    kinds: dict[str, str] = {}
    for event in profile:
        name = str(event["name"])
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            node = name.removesuffix("_kernel_time")
            kinds[node] = str(event["args"]["op_name"])
            taken.setdefault(node, []).append(event["dur"] / 1e6)
    found = {}
    for node, times in taken.items():
        each = len(times) // (calls + 1)  # a name may stand for several nodes of a call
        found[node] = kinds[node], float(np.median(times[each:])) * each
    return found


@contextmanager
def _running(n: int) -> Iterator[None]:
    """Turns what ONNX Runtime raises on a batch of n into an `EngineError`."""
    try:
        yield
    except Exception as error:  # its errors have no common class
        raise EngineError(
            f"ONNX Runtime failed on a batch of {n}: {_first_line(error)}",
            hint="If it ran out of memory, type a smaller --batch.",
        ) from error


def optimise(graph: Path, output: Path, *, device: str = "auto") -> None:
    """Writes a graph as ONNX Runtime fuses it, without the layout of one processor.

    Args:
        graph: The `.onnx` file to read.
        output: Where to write; metadata stay as they are.
        device: As in `OrtEngine`.

    Raises:
        EngineError: The graph cannot be loaded.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(output)
    try:
        ort.InferenceSession(str(graph), options, providers=_providers(device))
    except Exception as error:
        raise EngineError(
            f"ONNX Runtime {ort.__version__} cannot optimise {graph}: {_first_line(error)}",
            hint=f"Run the graph itself: ddpm-deploy sample --engine {graph}",
        ) from error


def run_graph(
    graph: Path,
    feeds: Sequence[Mapping[str, Array]],
    outputs: Sequence[str],
    *,
    threads: int | None = None,
    as_written: bool = False,
) -> list[list[Array]]:
    """Runs any ONNX file on the CPU, spec or none, for what it computes inside.

    Args:
        graph: The file.
        feeds: The inputs of each call, by name.
        outputs: Names of the outputs that are wanted.
        threads: As in `OrtEngine`.
        as_written: Whether every node is computed as it stands, none fused or left out.

    Returns:
        For each call the outputs, in the order of their names.

    Raises:
        EngineError: The graph cannot be loaded or run.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    if as_written:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_cpu_mem_arena = False  # which takes powers of two, for calls to come
    try:
        session = ort.InferenceSession(str(graph), options, providers=[_CPU])
        return [session.run(list(outputs), dict(call)) for call in feeds]
    except Exception as error:
        raise EngineError(
            f"ONNX Runtime {ort.__version__} cannot run {graph.name}: {_first_line(error)}",
            hint="Export the network again: ddpm-deploy export CHECKPOINT",
        ) from error


def read_graph(path: Path) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Returns what ONNX Runtime tells of any ONNX file, spec or none.

    Returns:
        Inputs and outputs, each name to type and shape, `float32 (batch, 3, 32, 32)`; and metadata.

    Raises:
        EngineError: It is no graph that ONNX Runtime loads.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(str(path), options, providers=[_CPU])
    except Exception as error:
        raise _cannot_load(path, error) from error

    def described(values: Any) -> dict[str, str]:
        return {
            v.name: f"{_dtype(v.type)} "
            f"({', '.join('?' if size is None else str(size) for size in v.shape)})"
            for v in values
        }

    metadata = dict(session.get_modelmeta().custom_metadata_map)
    return described(session.get_inputs()), described(session.get_outputs()), metadata


def _cannot_load(path: Path, error: Exception) -> EngineError:
    return EngineError(
        f"ONNX Runtime {ort.__version__} cannot load {path}: {_first_line(error)}",
        hint="Export the network again: ddpm-deploy export CHECKPOINT",
    )


def _providers(device: str) -> list[str]:
    available = ort.get_available_providers()
    match device:
        case "cpu":
            return [_CPU]
        case "cuda":
            if _CUDA not in available:
                raise EngineError(
                    f"This onnxruntime ({ort.__version__}) has no CUDA; it has "
                    f"{', '.join(available)}.",
                    hint="pip uninstall onnxruntime; pip install 'ddpm-deploy[gpu]'",
                )
            return [_CUDA, _CPU]
        case "auto":
            return [_CUDA, _CPU] if _CUDA in available else [_CPU]
        case _:
            raise EngineError(f"The device is {device!r}; there are auto, cpu and cuda.")


def _dtype(kind: str) -> str:
    """Returns NumPy's name for an ONNX Runtime type: `float32` for `tensor(float)`."""
    name = kind.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32", "double": "float64"}.get(name, name)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
