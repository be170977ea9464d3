"""`ddpm-deploy build` for a CPU: ONNX Runtime, OpenVINO, or the faster of both."""

from __future__ import annotations

import functools
from contextlib import suppress
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ddpm_deploy.cli.common import note, print_json
from ddpm_deploy.errors import DDPMDeployError, EngineBuildError

if TYPE_CHECKING:
    from ddpm_deploy.engines.build import Built, Write
    from ddpm_deploy.precision import Precision
    from ddpm_deploy.runtime import Arithmetic, Runtime, RuntimeRecord

_SUFFIX = {"onnxruntime": "ort", "openvino": "ov", "auto": "cpu"}


def build_for_cpu(
    graph: Path,
    output: Path | None,
    *,
    runtime: str,
    precision: Precision | None,
    fuse_step: bool = False,
    threads: int | None = None,
    device: str = "auto",
    budget: float | None = None,
    exact: Path | None = None,
    decibels: float | None = None,
    force: bool = False,
    json: bool = False,
) -> None:
    """Builds an engine, and says what it is.

    Args:
        graph: The file that `export` wrote; with Q/DQ pairs where the precision is int8.
        output: Where to; a name beside the graph when None.
        runtime: `onnxruntime`, `openvino`, or `auto` for the faster of those that are installed.
        precision: Of the engine; the graph's when None.
        fuse_step: Whether the sampler's step stands behind the network; ONNX Runtime alone.
        threads: CPU threads, for the check and what is measured.
        device: As in `open_engine`.
        budget: Largest error over the output's peak; the precision's own when None.
        exact: The float32 graph that a lower precision is compared with; `graph` when None and it
            is in float32; else nothing is compared.
        decibels: The least that the worst of these pictures may have.
        force: Measure and build again though nothing has changed.
        json: Print the result as JSON.

    Raises:
        DDPMDeployError: As from `build_fastest`; or no runtime has the precision.
    """
    from ddpm_deploy.engines import open_engine
    from ddpm_deploy.engines.base import check_path
    from ddpm_deploy.engines.tune import build_fastest, still_holds
    from ddpm_deploy.verify.likeness import Exact

    check_path(graph)
    refuse_engine(graph, runtime=runtime, precision=precision)
    own = precision_of(graph)
    precision = precision or own
    if own not in {"fp32", precision}:
        raise EngineBuildError(
            f"{graph} is in {own} already; {precision} cannot be made of it.",
            hint="Start from the graph that export wrote.",
        )
    if exact is None and own == "fp32":
        exact = graph
    output = output or default_output(graph, runtime, precision)
    if output.suffix != ".onnx":
        raise typer.BadParameter(f"{output} must end in .onnx", param_hint="--output")
    wanted = runtimes_for(runtime, precision, graph, fuse_step=fuse_step, device=device)
    allowed = budget if decibels is None else decibels
    records = _records(graph, wanted, precision, fuse_step, threads, allowed, device)
    before = None if force or runtime != "auto" else _recorded(output)
    if before is not None and still_holds(before, records[0], wanted):
        note(f"measured here before for {graph}: {_times(before)}; --force measures again")
        if json:
            print_json({"path": str(output), "reused": True, "record": asdict(before)})
        else:
            typer.echo(output)
        return
    judge = None
    if precision != "fp32" and exact is not None:
        opened = functools.partial(open_engine, exact, threads=threads, device=device)
        judge = Exact(opened=opened)
    built = build_fastest(
        graph,
        output,
        records,
        writer=lambda runtime: _writer(graph, runtime, fuse=fuse_step),
        budget=budget,
        judge=judge,
        decibels=decibels,
        device=device,
        on_progress=note,
    )
    _say(graph, built)
    if json:
        print_json({**asdict(built), "path": str(built.path), "reused": False})
    else:
        typer.echo(built.path)


def default_output(graph: Path, runtime: str, precision: Precision) -> Path:
    """Returns what an engine is called where nobody says: `unet.bf16.ov.onnx`."""
    name = _SUFFIX[runtime] if precision == "fp32" else f"{precision}.{_SUFFIX[runtime]}"
    return graph.with_suffix(f".{name}.onnx")


def refuse_engine(graph: Path, *, runtime: str | None, precision: Precision | None) -> None:
    """Refuses a graph that is an engine; one of ONNX Runtime in float32 may be built again.

    Raises:
        EngineBuildError: It was built for a runtime.
    """
    record = _recorded(graph)
    if record is None:
        return
    again = record.runtime == runtime == "onnxruntime" and record.precision == "fp32"
    if not again or precision not in {None, "fp32"}:
        raise EngineBuildError(
            f"{graph} is an engine already, for {record.runtime}.",
            hint="Build from the graph that export wrote: ddpm-deploy build unet.onnx",
        )


def runtimes_for(
    runtime: str, precision: Precision, graph: Path, *, fuse_step: bool, device: str
) -> list[Runtime]:
    """Returns what to build for: one runtime, or all that are installed and have the precision.

    Raises:
        EngineBuildError: There is none that does what is asked.
        MissingDependencyError: OpenVINO is named, and is not installed.
    """
    from ddpm_deploy.engines.base import installed_runtimes, needs
    from ddpm_deploy.fused import METADATA_KEY
    from ddpm_deploy.onnx_metadata import read_metadata

    there = installed_runtimes()
    fuse_step = fuse_step or METADATA_KEY in read_metadata(graph)
    if precision == "fp16" and runtime != "onnxruntime":
        raise EngineBuildError(
            "No runtime here computes in half precision on a CPU; they widen it to float32.",
            hint="Type --bf16 or --int8 with --runtime openvino; or build a plan: --fp16",
        )
    if precision == "bf16" and runtime == "onnxruntime":
        raise EngineBuildError(
            "ONNX Runtime has no convolution in bfloat16.",
            hint="Type --runtime openvino; or build a plan: --bf16 --runtime tensorrt, or rtx",
        )
    if fuse_step and runtime == "openvino":
        raise EngineBuildError(
            "OpenVINO's engine has no fused step: its loop runs in NumPy.",
            hint="Start from the graph that export wrote, without --fuse-step; or type --runtime "
            "onnxruntime.",
        )
    if device == "cuda" and runtime == "openvino":
        raise EngineBuildError(
            "OpenVINO's engine runs on the CPU, and --device is cuda.",
            hint="Leave --device out, or type --runtime onnxruntime.",
        )
    if runtime == "openvino":
        with needs("openvino", extra="openvino"):
            import openvino  # noqa: F401  (say so before the work)
    named: dict[str, Runtime] = {"onnxruntime": "onnxruntime", "openvino": "openvino"}
    if runtime in named:
        return [named[runtime]]
    able: list[Runtime] = ["openvino"] if precision == "bf16" else ["onnxruntime", "openvino"]
    if fuse_step or device == "cuda":
        able = ["onnxruntime"]
    return [each for each in able if each in there] or able[:1]


def _records(
    graph: Path,
    wanted: list[Runtime],
    precision: Precision,
    fuse_step: bool,
    threads: int | None,
    budget: float | None,
    device: str,
) -> list[RuntimeRecord]:
    """Returns what each engine would say of itself, before anything is measured."""
    from ddpm_deploy.doctor import read_system
    from ddpm_deploy.engines.tune import this_machine
    from ddpm_deploy.files import sha256
    from ddpm_deploy.runtime import RuntimeRecord

    files = [graph]
    if find_spec("onnx") is not None:
        from ddpm_deploy.export.onnx_file import weight_files

        files += weight_files(graph)
    digest, machine = sha256(*files), this_machine(read_system(runtimes=()).cpu)
    machine["device"] = device
    return [
        RuntimeRecord(
            runtime=runtime,
            precision=precision,
            arithmetic=_arithmetic(precision, runtime),
            fused=fuse_step,
            threads=threads,
            budget=budget,
            graph_sha256=digest,
            machine=machine,
        )
        for runtime in wanted
    ]


def _arithmetic(precision: Precision, runtime: Runtime) -> Arithmetic:
    """Returns what OpenVINO computes in where no Q/DQ pair says int8."""
    if runtime == "onnxruntime" or precision == "fp32":
        return "f32"
    from ddpm_deploy.engines.openvino import has_bf16, processor

    if has_bf16():
        return "bf16"
    if precision == "bf16":
        raise EngineBuildError(
            f"This processor ({processor()}) has no bfloat16: OpenVINO would compute in float32.",
            hint="Leave --bf16 out, or type --int8.",
        )
    return "f32"


def _writer(graph: Path, runtime: Runtime, *, fuse: bool) -> Write | None:
    """Returns what writes an engine; None where the graph is taken as it is, for want of onnx."""
    from ddpm_deploy.engines.base import needs

    if find_spec("onnx") is None and runtime == "onnxruntime" and not fuse:
        note(
            "note: without the package onnx the graph is taken as it is, and attention is slower "
            "(pip install onnx)"
        )
        return None
    with needs("onnx", extra="openvino" if runtime == "openvino" else "export"):
        from ddpm_deploy.export.lower import Graph, lower_graph, write_engine

    @functools.cache
    def lowered() -> Graph:
        return lower_graph(graph, runtime, fuse=fuse)

    def write(record: RuntimeRecord, output: Path) -> None:
        write_engine(lowered(), record, output)

    return write


def precision_of(graph: Path) -> Precision:
    """Returns what a graph says that it is in."""
    from ddpm_deploy.onnx_metadata import read_metadata
    from ddpm_deploy.precision import METADATA_KEY, read_precision

    return read_precision(read_metadata(graph).get(METADATA_KEY), source=str(graph)).precision


def _recorded(output: Path) -> RuntimeRecord | None:
    """Returns what an engine says of itself; None where there is none, whatever else there is."""
    from ddpm_deploy.onnx_metadata import read_metadata
    from ddpm_deploy.runtime import METADATA_KEY, read_runtime

    with suppress(DDPMDeployError):
        return read_runtime(read_metadata(output).get(METADATA_KEY), source=str(output))
    return None


def _times(record: RuntimeRecord) -> str:
    times = ", ".join(f"{name} {each:.2f} ms" for name, each in record.milliseconds.items())
    return f"{times} an image" if times else f"{record.runtime} alone"


def _say(graph: Path, built: Built) -> None:
    record = built.record
    if record.milliseconds:
        note(f"{record.runtime} is the fastest here: {_times(record)}")
    apart = f"at most {built.deviation:.1e} of the peak from" if built.deviation else "the same as"
    step = " with its step fused" if record.fused else ""
    precision = {"fp32": "float32", "bf16": "bfloat16"}.get(record.precision, record.precision)
    float32 = precision == "float32" and record.runtime == "onnxruntime" and not record.milliseconds
    plan = " (for a TensorRT plan name its precision: --fp16)" if float32 else ""
    note(
        f"built for {built.runtime} in {precision}{step}{plan}: {apart} {graph}; opens in "
        f"{built.load_seconds:.2f} s, the graph in {built.graph_load_seconds:.2f} s"
    )
