"""What every engine is, and the door that opens one by its file's suffix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import numpy as np

from ddpm_deploy.arrays import Array, Samples, Timesteps
from ddpm_deploy.errors import EngineError, EngineInputError, MissingDependencyError
from ddpm_deploy.files import sha256
from ddpm_deploy.onnx_metadata import read_metadata
from ddpm_deploy.precision import Precision
from ddpm_deploy.runtime import METADATA_KEY, Runtime, read_runtime
from ddpm_deploy.sampling import Transition
from ddpm_deploy.spec import ModelSpec

CHECKPOINT_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".pt2")


class Engine(ABC):
    """A network, opened: `engine(x, t, **conditions) -> out`.

    A subclass sets `spec`, `name` and `path` when it opens its file, and fills in `_run`.

    Attributes:
        spec: What the network is.
        name: The runtime and device, for tables: `onnxruntime CPU`.
        path: The file it came from.
        fused: Whether the sampler's step is fused behind the network, so that it has a `stepper`.
        precision: What most of it computes in: `fp32`, `fp16`, `bf16` or `int8`.
        best_batch: The batch that it was built to be fastest at; None where it was not built so.
        rounds_input: Whether the network reads x in bfloat16.
        on_gpu: Whether it runs on a GPU, which leaves the host's cores to draw noise.
    """

    spec: ModelSpec
    name: str
    path: Path
    fused: bool = False
    precision: Precision = "fp32"
    best_batch: int | None = None
    rounds_input: bool = False
    on_gpu: bool = False
    _sha256: str | None = None

    def __call__(self, x: Samples, t: Timesteps, **conditions: Array) -> Samples:
        """Runs the network once.

        Args:
            x: float32, (N, *sample_shape), N >= 1.
            t: int64, (N,), each 0 to T-1.
            **conditions: One array for each of `spec.conditions`, (N, *shape) of its dtype.

        Returns:
            float32, (N, *output_shape); the caller's to keep.

        Raises:
            EngineInputError: An array has the wrong dtype, shape or range, or a condition is
                missing or unknown.
            EngineError: The runtime failed, or gave another shape.
        """
        n = self.check(x, t, conditions)
        out = self._run({"x": x, "t": t, **conditions})
        if out.shape != (n, *self.spec.output_shape):
            raise EngineError(
                f"{self.path} gives {out.shape}; its spec says {(n, *self.spec.output_shape)}.",
                hint="Export the network again: ddpm-deploy export CHECKPOINT",
            )
        return out

    @property
    def sha256(self) -> str:
        """The hash of its file, computed once; of a folder's files, the checkpoint's."""
        if self._sha256 is None:
            is_file = self.path.is_file()
            self._sha256 = sha256(self.path) if is_file else self.spec.checkpoint_sha256
        return self._sha256

    def stepper(self, n: int) -> Stepper:
        """Returns the loop's state for n samples, kept where the runtime computes.

        Args:
            n: Samples at once, at least 1.

        Raises:
            EngineError: The step is not fused behind this network, or the runtime failed.
        """
        raise EngineError(
            f"{self.path} has no fused step, so {n} samples cannot stay with its runtime.",
            hint="Build one: ddpm-deploy build unet.onnx --fuse-step",
        )

    def check(self, x: Samples, t: Timesteps, conditions: Mapping[str, Array]) -> int:
        """Returns the number of samples of what `__call__` takes; errors as there."""
        n = self._check("x", x, "float32", self.spec.sample_shape, None)
        self._check("t", t, "int64", (), n)
        if t.min() < 0 or t.max() >= self.spec.schedule.T:
            raise self._outside(int(t.min()), int(t.max()))
        wanted = {c.name: c for c in self.spec.conditions}
        if wanted.keys() != conditions.keys():
            raise EngineInputError(
                f"The conditions given are {_names(conditions)}; "
                f"this engine takes {_names(wanted)}.",
                hint="Give each by its name: engine(x, t, y=labels)",
            )
        for name, condition in wanted.items():
            value = conditions[name]
            self._check(name, value, condition.dtype, condition.shape, n)
            if condition.classes is not None:
                known = (value >= 0) & (value < condition.classes)
                if condition.null is not None:
                    known |= value == condition.null
                if not known.all():
                    none = "" if condition.null is None else f", and {condition.null} for none"
                    raise EngineInputError(
                        f"{name} is {value.min()}..{value.max()}; "
                        f"this network has labels 0..{condition.classes - 1}{none}.",
                        hint="Give int64 labels of the classes that the network was trained with.",
                    )
        return n

    def check_start(self, x: Samples, conditions: Mapping[str, Array], n: int) -> None:
        """Checks what a stepper of n samples starts with.

        Raises:
            EngineInputError: An array does not fit, or a condition is missing or unknown.
        """
        self._check("x", x, "float32", self.spec.sample_shape, n)
        self.check(x, np.zeros(n, dtype=np.int64), conditions)

    def check_step(self, row: Transition, z: Samples | None, n: int) -> None:
        """Checks what a stepper of n samples is given for a step.

        Raises:
            EngineInputError: The timestep is not the network's, `z` has another shape or is
                missing, or the row takes a learned variance that the network does not give.
        """
        if not 0 <= row.t < self.spec.schedule.T:
            raise self._outside(row.t, row.t)
        if z is not None:
            self._check("z", z, "float32", self.spec.sample_shape, n)
        elif row.x_from_noise:
            raise EngineInputError(
                f"The step at t = {row.t} adds noise, and z is None.",
                hint="Draw it: z = noise(k), with SeededNoise.",
            )
        if row.log_std is not None and self.spec.output_shape == self.spec.sample_shape:
            raise EngineInputError(
                f"The table needs a learned variance; {self.path} gives none.",
                hint="Make the table from engine.spec.",
            )

    @abstractmethod
    def _run(self, feeds: Mapping[str, Array]) -> Samples:
        """Runs the network on checked arrays, by input name."""

    def describe(self) -> dict[str, Any]:
        """Returns what identifies the runtime, for reports: JSON's types."""
        return {"name": self.name, "path": str(self.path)}

    def weights(self) -> Mapping[str, Array]:
        """Returns its numbers by the checkpoint's names; empty where the runtime keeps them."""
        return {}

    def layer_times(self, n: int, *, calls: int = 5) -> Mapping[str, tuple[str, float]]:  # noqa: ARG002
        """Measures what each layer takes on a batch of n: name to its operator and seconds a call.

        Args:
            n: Samples, at least 1.
            calls: Calls to take the mean of.

        Returns:
            Layers that run alone; empty where the runtime does not tell.
        """
        return {}

    def close(self) -> None:  # noqa: B027  (most have nothing to give back)
        """Gives back what the runtime holds; the engine cannot be called afterwards."""

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _outside(self, least: int, most: int) -> EngineInputError:
        return EngineInputError(
            f"t is {least}..{most}; this network has timesteps 0..{self.spec.schedule.T - 1}.",
            hint="Make the table from engine.spec: its schedule is the network's own.",
        )

    def _check(
        self, name: str, value: Array, dtype: str, shape: tuple[int, ...], n: int | None
    ) -> int:
        fits = (
            isinstance(value, np.ndarray)
            and value.dtype == dtype
            and value.ndim == 1 + len(shape)
            and value.shape[1:] == shape
            and value.shape[0] >= 1
            and n in {None, value.shape[0]}
        )
        if not fits:
            given = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value)
            wanted = ", ".join(["N" if n is None else str(n), *map(str, shape)])
            comma = "" if shape else ","
            raise EngineInputError(
                f"{name} is {given}; this engine takes {dtype} ({wanted}{comma}).",
                hint="Check that the engine was exported for these samples.",
            )
        return int(value.shape[0])


class Stepper(ABC):
    """The loop's state for a batch, kept where the runtime computes: x goes in once, out once.

    `Engine.stepper` makes one. It is used by one thread, and before its engine is closed.
    """

    @abstractmethod
    def start(self, x: Samples, conditions: Mapping[str, Array]) -> None:
        """Makes x the state; may be called again for another batch of the same size.

        Args:
            x: float32, (N, *sample_shape).
            conditions: By name, as for `Engine.__call__`.

        Raises:
            EngineInputError: An array does not fit.
        """

    @abstractmethod
    def step(self, row: Transition, z: Samples | None) -> None:
        """Takes x_t to x_s; the runtime may only note it, and work later.

        Args:
            row: What to do.
            z: float32, (N, *sample_shape): noise, not written to, and copied or used up before this
                returns; None where the row adds none.

        Raises:
            EngineInputError: The row or `z` does not fit.
            EngineError: The runtime failed.
        """

    @abstractmethod
    def read(self) -> Samples:
        """Waits for what was begun; returns the state: float32, (N, *sample_shape), a copy.

        Raises:
            EngineError: The runtime failed.
        """

    @abstractmethod
    def close(self) -> None:
        """Gives back what it holds; it cannot be used afterwards. Once more does nothing."""

    def __enter__(self) -> Stepper:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_engine(
    path: str | Path,
    *,
    threads: int | None = None,
    device: str = "auto",
    spec: ModelSpec | None = None,
    model: str | None = None,
) -> Engine:
    """Opens a network by its file's suffix.

    Args:
        path: `.onnx` for the runtime that it was built for, a graph for ONNX Runtime or, where that
            is not installed, OpenVINO; `.plan` for TensorRT; a checkpoint (`.pt`, `.pth`, `.ckpt`,
            a family's folder) or a program (`.pt2`) for PyTorch, the reference.
        threads: CPU threads for one call; the runtime's own choice when None.
        device: `cpu`, `cuda`, or `auto` for CUDA where the runtime has it.
        spec: What the network is, for a checkpoint that does not say; ignored for other files.
        model: `package.module:factory`, for the checkpoint of a network of the user's own; ignored
            for other files.

    Raises:
        EngineError: The file is missing, damaged or of an unknown kind, or the device is not there.
        PlanMismatchError: The plan is for another machine, or another version of its runtime.
        SpecError: The file carries no spec that this release reads.
        CheckpointError: The checkpoint is not a network that this release knows.
        MissingDependencyError: The runtime is not installed.
    """
    path = Path(path)
    check_path(path)
    match path.suffix:
        case ".onnx":
            return _open_onnx(path, threads=threads, device=device)
        case ".plan":
            from ddpm_deploy.engines.flavour import extra  # noqa: PLC0415
            from ddpm_deploy.engines.match import checked_record  # noqa: PLC0415

            record = checked_record(path)  # before anything that runs it is imported
            with needs("cuda-bindings", extra=extra(record.flavour)):
                from ddpm_deploy.engines.trt import TrtEngine  # noqa: PLC0415
            return TrtEngine.open(path, record, device=device)
        case _:
            with needs("torch", extra="export"):
                from ddpm_deploy.engines.pytorch import TorchEngine  # noqa: PLC0415
            return TorchEngine.open(path, threads=threads, device=device, spec=spec, model=model)


def installed_runtimes() -> list[Runtime]:
    """Returns the runtimes for a CPU that are there, without importing them."""
    return [name for name in get_args(Runtime) if find_spec(name) is not None]


def _open_onnx(path: Path, *, threads: int | None, device: str) -> Engine:
    record = read_runtime(read_metadata(path).get(METADATA_KEY), source=str(path))
    alone = installed_runtimes() == ["openvino"]
    runtime = record.runtime if record else "openvino" if alone else "onnxruntime"
    if runtime == "openvino":
        with needs("openvino", extra="openvino"):
            from ddpm_deploy.engines.openvino import OpenVinoEngine  # noqa: PLC0415
        return OpenVinoEngine(path, threads=threads, device=device)
    with needs("onnxruntime", extra="cpu"):
        from ddpm_deploy.engines.ort import OrtEngine  # noqa: PLC0415
    return OrtEngine(path, threads=threads, device=device)


def is_checkpoint(path: Path) -> bool:
    """Tells whether PyTorch opens a path: by its suffix, or as a folder that holds such files."""
    if not path.is_dir():
        return path.suffix in CHECKPOINT_SUFFIXES
    names = [each.name for each in (*path.glob("*"), *path.glob("*/*"))]
    return bool({"model_index.json", "config.json"} & {*names}) or any(
        name.endswith(CHECKPOINT_SUFFIXES) for name in names
    )


def check_path(path: Path) -> None:
    """Raises EngineError where a path is no engine's; whether a plan is there its sidecar says."""
    if path.is_dir():
        if is_checkpoint(path):
            return
        raise EngineError(
            f"{path} is a folder; an engine is a file.",
            hint="Give the path of the file in it.",
        )
    if path.suffix not in {".onnx", ".plan", *CHECKPOINT_SUFFIXES}:
        raise EngineError(
            f"{path} is not an engine: its suffix is {path.suffix!r}.",
            hint="Engines end in .onnx, .plan or, for PyTorch, .pt, .pth or .ckpt.",
        )
    if path.suffix != ".plan" and not path.is_file():
        raise EngineError(
            f"There is no file {path}.",
            hint="Give the path of your trained checkpoint."
            if path.suffix in CHECKPOINT_SUFFIXES
            else "Make it first: ddpm-deploy export CHECKPOINT -o unet.onnx",
        )


def read_spec(path: str | Path) -> ModelSpec:
    """Returns what a network is, on any machine that can read its file.

    A graph and a plan are not loaded: the one's metadata and the other's sidecar say it, wherever
    the file was made for.

    Args:
        path: As for `open_engine`.

    Raises:
        EngineError: The file is missing, damaged or of an unknown kind.
        SpecError: As from `open_engine`, and the other errors too.
    """
    path = Path(path)
    check_path(path)
    if path.suffix == ".plan":
        from ddpm_deploy.engines.plan import read_record  # noqa: PLC0415

        return read_record(path).spec
    if path.suffix == ".onnx":
        return ModelSpec.from_metadata(read_metadata(path), source=str(path))
    with open_engine(path, device="cpu") as engine:
        return engine.spec


@contextmanager
def needs(package: str, *, extra: str) -> Iterator[None]:
    """Turns a missing package into an error that names the extra to install.

    Args:
        package: The package that the code inside imports.
        extra: The extra of ddpm-deploy that brings it.

    Raises:
        MissingDependencyError: The import inside failed for want of a package.
    """
    try:
        yield
    except ImportError as error:
        missing = error.name or package
        raise MissingDependencyError(
            f"{package} is needed here, and {missing} is not installed ({error}).",
            hint=f"pip install 'ddpm-deploy[{extra}]'",
        ) from error


def _names(of: Mapping[str, object]) -> str:
    return ", ".join(of) if of else "none"
