"""Building a TensorRT plan in a process of its own, and the sidecar that appears with it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from importlib import util
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

import ddpm_deploy
from ddpm_deploy._version import __version__
from ddpm_deploy.engines.build_settings import BuildSettings, refuse_bf16
from ddpm_deploy.engines.device import Device
from ddpm_deploy.engines.flavour import LABELS, Flavour, extra, require
from ddpm_deploy.engines.plan import PlanRecord, read_record, sidecar, this_platform
from ddpm_deploy.errors import (
    DDPMDeployError,
    EngineBuildError,
    EngineError,
    MissingDependencyError,
)
from ddpm_deploy.files import sha256, whole_file
from ddpm_deploy.fused import check_inputs
from ddpm_deploy.spec import ModelSpec

WORKER = ("-m", "ddpm_deploy.engines.trt_worker")
_POLL_SECONDS = 0.2
_LOG_LINES = 6
_QUIETER = {"[W]", "[I]", "[V]", "[!]"}
_OUT_OF_MEMORY = re.compile(r"out.?of.?memory|bad_alloc|MemoryError", re.IGNORECASE)

_DTYPES = {
    **{"FLOAT": "float32", "HALF": "float16", "INT64": "int64", "INT32": "int32"},
    **{"INT8": "int8", "UINT8": "uint8", "BOOL": "bool"},
}
"""TensorRT's words for NumPy's types."""

_KEY = (
    *("graph_sha256", "flavour", "version", "platform", "device", "compute_capabilities"),
    *("profiles", "precision", "fused_step", "hardware_compatible", "version_compatible"),
    *("options", "tool"),
)
"""The fields of a sidecar that decide what a build gives."""


class OutOfMemoryError(EngineBuildError):
    """Memory ran out while a plan was built, or would when it runs; a smaller build may fit."""


class TooLargeError(OutOfMemoryError):
    """A plan would not fit the device's memory; smaller batches may."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The graph as TensorRT is to read it.

    Attributes:
        path: The graph, with its precision in it.
        groups: How many layers compute in what, and why.
        error: Largest error of its output over the peak, as measured; None where it was not.
        memory: Estimated device memory of one call at the largest batch, in bytes; 0 if not known.
    """

    path: Path
    groups: Mapping[str, str] = field(default_factory=dict)
    error: float | None = None
    memory: int = 0


@dataclass(frozen=True, kw_only=True)
class Building:
    """How far a build is.

    Attributes:
        seconds: Since it began.
        last: What the build before took, in seconds; None where there was none.
    """

    seconds: float
    last: float | None


@dataclass(frozen=True, kw_only=True)
class PlanBuilt:
    """A plan that is there now.

    Attributes:
        path: The plan.
        record: What its sidecar says.
        reused: Whether it was there already, since nothing had changed.
        changed: What differs from the plan that was there, by the sidecar's names; empty where
            there was none.
    """

    path: Path
    record: PlanRecord
    reused: bool
    changed: Sequence[str] = ()


def build_plan(
    graph: Path,
    output: Path,
    settings: BuildSettings,
    *,
    spec: ModelSpec,
    prepare: Callable[[BuildSettings], Prepared],
    check: Callable[[Path, PlanRecord], None] = lambda _plan, _record: None,
    weights: Sequence[Path] = (),
    force: bool = False,
    watch: Callable[[Building], None] = lambda _: None,
) -> PlanBuilt:
    """Builds a plan, unless the one that is there came of the same inputs.

    Args:
        graph: The `.onnx` file that `export` wrote.
        output: The plan to write; its sidecar appears with it.
        settings: What to build with.
        spec: What the network is.
        prepare: Makes the graph that TensorRT reads; called when there is something to build.
        check: Called with the plan before it gets its name; what it raises leaves nothing.
        weights: Files that hold weights of the graph besides its own.
        force: Build in any case.
        watch: Called several times a second while the build goes on.

    Raises:
        OutOfMemoryError: Memory ran out.
        TooLargeError: The plan would not fit the device's memory. It was not begun.
        EngineBuildError: TensorRT cannot build it. Nothing was written.
        MissingDependencyError: The runtime is not installed.
    """
    before = _before(output)
    with _Worker(settings.flavour) as worker:
        wanted = _wanted(graph, output, settings, spec, worker)
        wanted = replace(wanted, graph_sha256=sha256(graph, *weights))
        changed = () if before is None else differences(before, wanted)
        if before is not None and not changed and not force:
            return PlanBuilt(path=output, record=before, reused=True)
        # Opened first: a place that cannot be written shall not cost the work.
        with whole_file(output) as plan, whole_file(sidecar(output)) as side:
            prepared = prepare(settings)
            _check_memory(prepared, worker, settings)
            wanted = replace(
                wanted,
                precision_groups=prepared.groups,
                precision_error=prepared.error,
                memory=prepared.memory,
            )
            last = None if before is None else before.seconds
            layers, seconds = worker.build(
                prepared.path, plan, settings, spec=spec, last=last, watch=watch
            )
            record = replace(
                wanted,
                plan_sha256=sha256(plan),
                plan_bytes=plan.stat().st_size,
                layers=layers,
                seconds=round(seconds, 3),
            )
            check(plan, record)
            side.write_text(record.to_json(), encoding="utf-8")
    return PlanBuilt(path=output, record=record, reused=False, changed=changed)


def differences(before: PlanRecord, wanted: PlanRecord) -> tuple[str, ...]:
    """Returns the names of the inputs in which two plans differ."""
    return tuple(
        f.name
        for f in fields(PlanRecord)
        if f.name in _KEY and getattr(before, f.name) != getattr(wanted, f.name)
    )


def _before(output: Path) -> PlanRecord | None:
    try:
        return read_record(output)
    except EngineError:  # none, or one that would not be run either
        return None


def _wanted(
    graph: Path, output: Path, settings: BuildSettings, spec: ModelSpec, worker: _Worker
) -> PlanRecord:
    """Returns the sidecar as far as it is known before the build.

    Raises:
        EngineBuildError: This machine cannot build it.
    """
    worker.check(settings)
    device = worker.device
    capabilities = (device.compute_capability,) if device else settings.compute_capabilities
    return PlanRecord(
        spec=spec,
        plan_sha256="",
        plan_bytes=0,
        graph=graph.name,
        graph_sha256="",
        flavour=settings.flavour,
        version=worker.version,
        platform=this_platform(),
        device=device.name if device else "",
        compute_capabilities=capabilities,
        profiles=settings.profiles,
        precision=settings.precision,
        fused_step=settings.fuse_step,
        hardware_compatible=settings.hardware_compatible,
        version_compatible=settings.version_compatible,
        options=settings.options,
        tool=f"ddpm-deploy {__version__}",
        command=settings.command(graph, output),
    )


def _check_memory(prepared: Prepared, worker: _Worker, settings: BuildSettings) -> None:
    if worker.device is None or prepared.memory <= worker.device.memory:
        return
    largest = max(profile.most for profile in settings.profiles)
    raise TooLargeError(
        f"A batch of {largest} needs about {prepared.memory / 2**30:.1f} GiB; "
        f"{worker.device.name} has {worker.device.memory / 2**30:.1f} GiB.",
        hint="Build for smaller batches, such as --batch 1",
    )


class _Worker:
    """The process that has the runtime loaded, from its greeting to its end.

    Attributes:
        version: Of the runtime.
        device: The GPU that it builds on; None for TensorRT-RTX, which
            builds ahead of time, and where there is none.
        capabilities: Compute capabilities that can be named.

    Raises:
        MissingDependencyError: The runtime, or polygraphy, is not installed.
        EngineBuildError: The process ended before it said anything.
    """

    def __init__(self, flavour: Flavour) -> None:
        require(flavour)
        if util.find_spec("polygraphy") is None:
            raise MissingDependencyError(
                "polygraphy is needed to build a plan, and is not installed.",
                hint=f"pip install 'ddpm-deploy[{extra(flavour)}]'",
            )
        self.flavour = flavour
        self.version = ""
        self.device: Device | None = None
        self.capabilities: tuple[str, ...] = ()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (closed in __exit__)
        self._started = time.perf_counter()
        self._process = subprocess.Popen(  # noqa: S603  (this Python, on a file of this package)
            [sys.executable, *WORKER, flavour],
            # A package that is imported from a folder is found from there alone.
            cwd=Path(ddpm_deploy.__file__).parents[1],
            env={
                **os.environ,
                "POLYGRAPHY_USE_TENSORRT_RTX": str(int(flavour == "tensorrt_rtx")),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            # Ctrl-C reaches this process alone, which then ends that one and all it started.
            start_new_session=True,
        )
        self._said: Queue[str] = Queue()
        Thread(target=self._listen, daemon=True).start()

    def __enter__(self) -> _Worker:
        try:
            ready = self._hear("ready", lambda: None)
        except BaseException:
            self.close()
            raise
        self.version = str(ready["version"])
        self.device = Device(**ready["device"]) if ready["device"] else None
        self.capabilities = tuple(ready["capabilities"])
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process, and all it started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()
        self._log.close()

    def check(self, settings: BuildSettings) -> None:
        """Raises EngineBuildError where this machine or this version cannot build as asked."""
        if self.flavour == "tensorrt" and self.device is None:
            raise EngineBuildError(
                "TensorRT builds on the GPU that the plan is for, and this machine has none.",
                hint="Build on the device. For GeForce and RTX GPUs, TensorRT-RTX builds ahead of "
                "time without one: pip install 'ddpm-deploy[rtx]', then --runtime rtx",
            )
        if self.device and settings.precision == "bf16":
            refuse_bf16([self.device.compute_capability])
        for capability in settings.compute_capabilities:
            if capability not in self.capabilities:
                raise EngineBuildError(
                    f"{LABELS[self.flavour]} {self.version} cannot build for {capability} by name; "
                    f"it knows {', '.join(self.capabilities)}.",
                    hint="Leave --compute-capability out for Ampere and everything later; for a "
                    "Jetson or a data-centre GPU build with TensorRT, on the device.",
                )

    def build(
        self,
        graph: Path,
        plan: Path,
        settings: BuildSettings,
        *,
        spec: ModelSpec,
        last: float | None,
        watch: Callable[[Building], None],
    ) -> tuple[dict[str, int], float]:
        """Writes the plan.

        Returns:
            How many layers there are by type and precision, and the seconds it took.

        Raises:
            OutOfMemoryError: Memory ran out.
            EngineBuildError: The build failed, or its process died.
        """
        self._started = time.perf_counter()

        def look() -> None:
            watch(Building(seconds=self._seconds, last=last))

        look()
        with tempfile.TemporaryDirectory() as folder:
            new = Path(folder) / "timing.cache"
            cache = settings.timing_cache
            self._ask(
                graph=str(graph.resolve()),
                plan=str(plan.resolve()),
                profiles=[str(profile) for profile in settings.profiles],
                compute_capabilities=settings.compute_capabilities,
                workspace=settings.workspace,
                optimization_level=settings.optimization_level,
                timing_cache=str(cache.resolve()) if cache else "",
                new_timing_cache=str(new),
                version_compatible=settings.version_compatible,
                hardware_compatible=settings.hardware_compatible,
            )
            parsed = self._hear("parsed", look)
            given = {
                name: (_DTYPES.get(dtype, dtype), tuple(shape))
                for name, (dtype, shape) in parsed["inputs"].items()
            }
            check_inputs(graph, spec, given, fused=settings.fuse_step)
            seconds = self._hear("built", look)["seconds"]
            if cache is not None and new.is_file():
                with whole_file(cache) as partial:
                    partial.write_bytes(new.read_bytes())
        return parsed["layers"], seconds

    @property
    def _seconds(self) -> float:
        return time.perf_counter() - self._started

    @property
    def _name(self) -> str:
        return f"{LABELS[self.flavour]} {self.version}".strip()

    def _ask(self, **request: Any) -> None:
        assert self._process.stdin
        with suppress(BrokenPipeError):  # it died: what it says, or does not, is heard next
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def _listen(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._said.put(line)
        self._said.put("")

    def _hear(self, kind: str, look: Callable[[], None]) -> dict[str, Any]:
        while True:
            try:
                line = self._said.get(timeout=_POLL_SECONDS)
            except Empty:
                look()
                continue
            if not line:
                raise self._death()
            said: dict[str, Any] = json.loads(line)
            if said["kind"] == "failed":
                raise self._failure(said)
            assert said["kind"] == kind, said
            return said

    def _failure(self, said: Mapping[str, Any]) -> DDPMDeployError:
        message, hint = said["message"], said["hint"]
        if said["missing"]:
            return MissingDependencyError(message, hint=hint)
        if hint:
            return EngineBuildError(message, hint=hint)
        log = self._errors()
        if _OUT_OF_MEMORY.search(f"{message} {log}"):
            return OutOfMemoryError(
                f"{self._name} ran out of memory after {self._seconds:.0f} s: {log or message}"
            )
        if "for Turing" in f"{message} {log}":
            return EngineBuildError(
                f"{self._name} has no float32 matrix products for Turing (7.5), and the timestep's "
                f"path through the network needs them: {log or message}",
                hint="Leave --compute-capability 7.5 out; for a Turing GPU build with TensorRT, on "
                "the machine that has it.",
            )
        return EngineBuildError(
            f"{self._name} could not build the plan: {log or message}",
            hint="Try another precision, or --batch with one number, to see what it cannot do; "
            "the versions here: ddpm-deploy doctor",
        )

    def _death(self) -> EngineBuildError:
        code = self._process.wait()
        after = f"after {self._seconds:.0f} s"
        if code == -signal.SIGKILL:
            return OutOfMemoryError(
                f"The system killed the build {after} (signal 9), as it does when memory runs out."
            )
        log = self._errors()
        how = f"ended with {code}" if code >= 0 else f"died of {signal.Signals(-code).name}"
        return EngineBuildError(
            f"{self._name} {how} {after}" + (f": {log}" if log else ", without a word."),
            hint="Try another version of it, another precision, or --batch with one number; "
            "the versions here: ddpm-deploy doctor",
        )

    def _errors(self) -> str:
        """Returns the last lines that the libraries printed, warnings left out."""
        size = os.fstat(self._log.fileno()).st_size
        text = os.pread(self._log.fileno(), size, 0)  # the other process may still be writing
        lines = [line.strip() for line in text.decode(errors="replace").splitlines()]
        kept = [line.removeprefix("[E] ") for line in lines if line and line[:3] not in _QUIETER]
        return " ".join(kept[-_LOG_LINES:])
