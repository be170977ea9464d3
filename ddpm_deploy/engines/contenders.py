"""What `bench` times: our engines and their peers, opened alike and measured side by side."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ddpm_deploy.arrays import Samples
from ddpm_deploy.bench import (
    Loop,
    Measurement,
    engine_loop,
    kept,
    measure,
    output_error,
    probe,
)
from ddpm_deploy.engines.base import Engine, needs, open_engine, read_spec
from ddpm_deploy.errors import DDPMDeployError, EngineError
from ddpm_deploy.fused import METADATA_KEY as STEP_KEY
from ddpm_deploy.onnx_metadata import read_metadata
from ddpm_deploy.precision import METADATA_KEY as PRECISION_KEY
from ddpm_deploy.precision import read_precision
from ddpm_deploy.run import Recipe
from ddpm_deploy.runtime import METADATA_KEY, read_runtime
from ddpm_deploy.spec import ModelSpec

Kind = Literal["engine", "torch", "torch.compile", "onnxruntime", "openvino", "diffusers"]

TORCH_PEERS: tuple[Kind, ...] = ("torch.compile", "diffusers")
GRAPH_PEERS: tuple[Kind, ...] = ("onnxruntime", "openvino")

LABELS: Mapping[Kind, str] = {
    "torch": "torch loop",
    "torch.compile": "torch.compile loop",
    "onnxruntime": "onnxruntime plain",
    "openvino": "openvino plain",
    "diffusers": "diffusers pipeline",
}
"""What a peer is called before it is open."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Something to time.

    Attributes:
        kind: `engine` is one of ours; the others are peers.
        path: Its file: the engine, the checkpoint, or the plain graph; None where there is none.
        label: What tells it from the others until it is open.
        threads: CPU threads; the runtime's choice for an engine when None.
        device: As in `open_engine`; peers without torch run on the CPU.
        model: As in `open_engine`.
    """

    kind: Kind
    path: Path | None
    label: str
    threads: int | None = None
    device: str = "auto"
    model: str | None = None

    def open(self, spec: ModelSpec | None = None) -> Engine:
        """Opens it.

        Args:
            spec: What the network is, for a checkpoint that does not say.

        Raises:
            DDPMDeployError: It cannot run here, and why.
        """
        if self.path is None:
            message, hint = _MISSING[self.kind]
            raise EngineError(message, hint=hint)
        if self.kind == "engine":
            return open_engine(
                self.path, threads=self.threads, device=self.device, spec=spec, model=self.model
            )
        threads = self.threads or len(os.sched_getaffinity(0))
        if self.kind in GRAPH_PEERS:
            from ddpm_deploy.engines.peers import PlainOnnxRuntime, PlainOpenVino  # noqa: PLC0415

            peer = PlainOnnxRuntime if self.kind == "onnxruntime" else PlainOpenVino
            return peer(self.path, threads=threads)
        with needs("torch", extra="export"):
            from ddpm_deploy.engines.pytorch import TorchEngine  # noqa: PLC0415
        if self.kind == "diffusers":
            spec = spec or read_spec(self.path)
            from ddpm_deploy.engines.peers import DiffusersPipeline  # noqa: PLC0415

            return DiffusersPipeline(self.path, threads=threads, spec=spec)
        opened = TorchEngine.open(
            self.path, threads=self.threads, device=self.device, spec=spec, model=self.model
        )
        return opened.compiled() if self.kind == "torch.compile" else opened

    def loop(self, engine: Engine, recipe: Recipe, batch: int) -> Loop:
        """Makes the loop to time: ours for an engine, people's own for a peer.

        Args:
            engine: What `open` gave.
            recipe: What loop it is.
            batch: Images at once.
        """
        makers: dict[Kind, Callable[..., Loop]] = {"engine": engine_loop}
        if self.kind in {"torch", "torch.compile"}:
            from ddpm_deploy.engines.pytorch import torch_loop  # noqa: PLC0415

            makers[self.kind] = torch_loop
        elif self.kind != "engine":
            from ddpm_deploy.engines.peers import numpy_loop, pipeline_loop  # noqa: PLC0415

            makers[self.kind] = pipeline_loop if self.kind == "diffusers" else numpy_loop
        return makers[self.kind](engine, recipe, batch)

    @property
    def words(self) -> set[str]:
        """What it can be chosen by: its runtime, and its precision."""
        if self.kind != "engine":
            return {*LABELS[self.kind].split(), "peer", "fp32"} - {"loop"}
        if self.path is None or self.path.suffix != ".onnx":
            plan = self.path is not None and self.path.suffix == ".plan"
            return {"plan", "tensorrt"} if plan else {"torch", "fp32"}
        try:
            said = read_metadata(self.path)
            record = read_runtime(said.get(METADATA_KEY), source=str(self.path))
            precision = read_precision(said.get(PRECISION_KEY), source=str(self.path)).precision
        except DDPMDeployError:
            return {"onnxruntime"}  # its row will say what is wrong
        return {record.runtime, record.precision} if record else {"onnxruntime", precision}

    @property
    def size(self) -> int | None:
        """Bytes of its files on the disk; None where there are none."""
        if self.path is None or not self.path.exists():
            return None
        files = self.path.rglob("*") if self.path.is_dir() else [self.path]
        return sum(file.stat().st_size for file in files if file.is_file())


_MISSING: Mapping[Kind, tuple[str, str]] = {
    **dict.fromkeys(
        ("torch", *TORCH_PEERS),
        ("It needs the checkpoint.", "Name it: --against ckpt.pt"),
    ),
    **dict.fromkeys(
        GRAPH_PEERS,
        ("It needs the graph as export wrote it.", "Name it, too: --engine unet.onnx"),
    ),
}


def peers(
    against: Path | None,
    engines: Sequence[Path],
    *,
    threads: int,
    device: str = "auto",
    model: str | None = None,
) -> list[Contender]:
    """Returns what people would use instead, but for the loop in PyTorch.

    Args:
        against: The checkpoint.
        engines: Engines, of which the first that is a plain graph is what the others run.
        threads: CPU threads.
        device: Of those in PyTorch.
        model: As in `open_engine`.
    """
    graph = next(filter(is_plain, engines), None)
    return [
        Contender(
            kind=kind,
            path=against if kind in TORCH_PEERS else graph,
            label=LABELS[kind],
            threads=threads,
            device=device,
            model=model,
        )
        for kind in (*TORCH_PEERS, *GRAPH_PEERS)
    ]


def is_plain(path: Path) -> bool:
    """Tells whether a file is a graph as `export` wrote it: for no runtime, of whole float32."""
    if path.suffix != ".onnx" or not path.is_file():
        return False
    try:
        return not {METADATA_KEY, STEP_KEY, PRECISION_KEY} & read_metadata(path).keys()
    except EngineError:
        return False


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A contender that could not be measured.

    Attributes:
        name: What it is called.
        batch: Images at once; None where it could not even be opened.
        reason: Why, in one line.
        hint: What to do; empty where nobody knows.
    """

    name: str
    batch: int | None
    reason: str
    hint: str = ""


def failure(name: str, batch: int | None, error: Exception) -> Failure:
    """Makes a failure of what was raised; of others' errors, the kind and the first line."""
    if isinstance(error, DDPMDeployError):
        return Failure(name=name, batch=batch, reason=str(error), hint=error.hint)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return Failure(name=name, batch=batch, reason=reason)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A contender that is open.

    Attributes:
        name: Of its row: the runtime, the device, and the file where it is an engine.
        contender: What it is.
        engine: As it was opened.
    """

    name: str
    contender: Contender
    engine: Engine

    def length(self, recipe: Recipe) -> int:
        """Returns the steps of a recipe's whole loop."""
        return len(recipe.table(self.engine.spec))


@dataclass(frozen=True, kw_only=True)
class Contest:
    """What came of one batch size.

    Attributes:
        batch: Images at once.
        results: Speeds, in the order of the contenders.
        errors: Of each output against the reference's over its peak, by name; None where the two
            are not one network.
        reference: What the errors are against; empty where nothing ran.
        failures: What did not run.
    """

    batch: int
    results: tuple[Measurement, ...]
    errors: Mapping[str, float | None]
    reference: str
    failures: tuple[Failure, ...] = field(default=())


def spec_of_first(contenders: Sequence[Contender]) -> ModelSpec | None:
    """Returns what the network is, from the first file that says it; None where none does.

    Engines are asked first, since a bare checkpoint does not say; graphs are not loaded.
    """
    for contender in sorted(contenders, key=lambda each: each.kind != "engine"):
        path = contender.path
        if path is None:
            continue
        try:
            if path.suffix == ".onnx":
                return ModelSpec.from_metadata(read_metadata(path), source=str(path))
            if contender.model is None:
                return read_spec(path)
            with contender.open() as engine:
                return engine.spec
        except DDPMDeployError:
            continue  # its row will say what is wrong
    return None


def open_all(
    contenders: Sequence[Contender], *, spec: ModelSpec | None = None
) -> tuple[list[Opened], list[Failure]]:
    """Opens what can be opened; the others' reasons are told, and stop nobody.

    Args:
        contenders: What to open.
        spec: What the network is, for a checkpoint that does not say.
    """
    opened: list[Opened] = []
    failures: list[Failure] = []
    for contender in contenders:
        try:
            engine = contender.open(spec)
        except Exception as error:  # noqa: BLE001, PERF203  (a runtime's errors have no common class)
            failures.append(failure(contender.label, None, error))
        else:
            name = _name(contender, engine)
            opened.append(Opened(name=name, contender=contender, engine=engine))
    return opened, failures


def _name(contender: Contender, engine: Engine) -> str:
    match contender.kind:
        case "engine":
            return f"{engine.name} {contender.label}"
        case "torch" | "torch.compile":
            return f"{engine.name} loop"
        case kind:
            return LABELS[kind]


def contest(
    opened: Sequence[Opened],
    recipe: Recipe,
    *,
    batch: int,
    steps: int,
    repeat: int,
    warm_up: int,
) -> Contest:
    """Measures contenders side by side at one batch size.

    Args:
        opened: What to measure; the reference of the errors is the first in PyTorch, or the first.
        recipe: What loop it is.
        batch: Images at once.
        steps: Steps a turn.
        repeat: Turns each.
        warm_up: As in `measure`.

    Raises:
        ValueError: The recipe does not fit a network's schedule.
    """
    lengths = {each.name: each.length(recipe) for each in opened}
    failed: dict[str, Exception] = {}
    outputs: dict[str, list[Samples]] = {}
    loops: dict[str, Loop] = {}
    for each in opened:
        try:
            outputs[each.name] = probe(each.engine, recipe, batch)
            loop = each.contender.loop(each.engine, recipe, batch)
        except Exception as error:  # noqa: BLE001, PERF203  (as above)
            failed[each.name] = error
        else:
            loops[each.name] = kept(loop, each.name, failed)
    taken = measure(loops, batch=batch, rows=lengths, steps=steps, repeat=repeat, warm_up=warm_up)
    results = tuple(result for result in taken if result.name not in failed)
    there = [each for each in opened if each.name in outputs]
    reference = next((e.name for e in there if e.contender.kind == "torch"), "")
    reference = reference or (results[0].name if results else "")
    errors = {
        result.name: output_error(outputs[result.name], outputs[reference]) for result in results
    }
    return Contest(
        batch=batch,
        results=results,
        errors=errors,
        reference=reference,
        failures=tuple(failure(name, batch, error) for name, error in failed.items()),
    )


def close_all(opened: Sequence[Opened]) -> None:
    """Closes what was opened."""
    for each in opened:
        each.engine.close()


def layers(engine: Engine, batch: int) -> Iterator[tuple[str, str, float]]:
    """Yields what each layer takes, slowest first: its name, its operator, and seconds."""
    times = engine.layer_times(batch)
    for name, (kind, seconds) in sorted(times.items(), key=lambda item: -item[1][1]):
        yield name, kind, seconds
