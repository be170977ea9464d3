"""`ddpm-deploy build` for a CPU: ONNX Runtime, OpenVINO, or the faster of both."""

from __future__ import annotations

import functools
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ddpm_deploy.cli.common import note, print_json
from ddpm_deploy.errors import DDPMDeployError, EngineBuildError

if TYPE_CHECKING:
    from ddpm_deploy.engines.base import Engine
    from ddpm_deploy.engines.build import Built, Tune, Write
    from ddpm_deploy.precision import Precision
    from ddpm_deploy.runtime import Arithmetic, Runtime, RuntimeRecord

LONGEST = 4.0
"""Seconds that the calls of one batch may take while the best batch is looked for."""

_SUFFIX = {"onnxruntime": "ort", "openvino": "ov", "auto": "cpu"}


def build_for_cpu(
    graph: Path,
    output: Path | None,
    *,
    runtime: str,
    precision: Precision,
    fuse_step: bool = False,
    threads: int | None = None,
    device: str = "auto",
    budget: float | None = None,
    force: bool = False,
    json: bool = False,
) -> None:
    """Builds an engine, and says what it is.

    Args:
        graph: The file that `export` wrote; with Q/DQ pairs where the precision is int8.
        output: Where to; a name beside the graph when None.
        runtime: `onnxruntime`, `openvino`, or `auto` for the faster of those that are installed.
        precision: Of the engine.
        fuse_step: Whether the sampler's step stands behind the network; ONNX Runtime alone.
        threads: CPU threads, for the check and what is measured.
        device: As in `open_engine`.
        budget: Largest error over the output's peak; the precision's own when None.
        force: Measure and build again though nothing has changed.
        json: Print the result as JSON.
    """
    from ddpm_deploy.engines.base import needs
    from ddpm_deploy.engines.tune import installed_runtimes

    name = _SUFFIX[runtime] if precision == "fp32" else f"{precision}.{_SUFFIX[runtime]}"
    output = output or graph.with_suffix(f".{name}.onnx")
    if output.suffix != ".onnx":
        raise typer.BadParameter(f"{output} must end in .onnx", param_hint="--output")
    wanted = _runtimes(runtime, precision, installed_runtimes())
    if fuse_step and wanted != ["onnxruntime"]:
        raise EngineBuildError(
            "OpenVINO's engine has no fused step: its loop runs in NumPy.",
            hint="Leave --fuse-step out, or type --runtime onnxruntime.",
        )
    if "openvino" in wanted:
        with needs("openvino", extra="openvino"):
            import openvino  # noqa: F401  (say so before the work)
    measured = None if force or runtime != "auto" else _measured_before(graph, output)
    if measured is not None:
        note(f"measured here before for {graph}: {_times(measured)}; --force measures again")
        if json:
            print_json({"path": str(output), "reused": True, "record": asdict(measured)})
        else:
            typer.echo(output)
        return
    built = _build(
        graph,
        output,
        wanted,
        precision,
        budget=budget,
        fuse_step=fuse_step,
        threads=threads,
        device=device,
    )
    _say(graph, built, fused=fuse_step)
    if json:
        print_json({**asdict(built), "path": str(built.path), "reused": False})
    else:
        typer.echo(built.path)


def _runtimes(runtime: str, precision: Precision, there: list[Runtime]) -> list[Runtime]:
    """Returns what to build for: one runtime, or all that are installed and have the precision."""
    if precision == "fp16":
        raise EngineBuildError(
            "No runtime here computes in half precision on a CPU; they widen it to float32.",
            hint="Type --bf16 or --int8 with --runtime openvino; or build a plan: --fp16",
        )
    if precision == "bf16" and runtime == "onnxruntime":
        raise EngineBuildError(
            "ONNX Runtime has no convolution in bfloat16.",
            hint="Type --runtime openvino; or build a plan: --bf16 --runtime tensorrt, or rtx",
        )
    named: dict[str, Runtime] = {"onnxruntime": "onnxruntime", "openvino": "openvino"}
    if runtime in named:
        return [named[runtime]]
    able: list[Runtime] = ["openvino"] if precision == "bf16" else ["onnxruntime", "openvino"]
    return [each for each in able if each in there] or able[:1]


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


def _build(
    graph: Path,
    output: Path,
    wanted: list[Runtime],
    precision: Precision,
    *,
    budget: float | None,
    fuse_step: bool,
    threads: int | None,
    device: str,
) -> Built:
    """Builds for each runtime, and keeps the faster engine."""
    from tempfile import TemporaryDirectory

    from ddpm_deploy.engines import open_engine
    from ddpm_deploy.engines.base import check_path
    from ddpm_deploy.engines.build import build_engine
    from ddpm_deploy.engines.race import race, winner
    from ddpm_deploy.engines.tune import this_machine
    from ddpm_deploy.files import sha256
    from ddpm_deploy.runtime import RuntimeRecord

    check_path(graph)
    digest, machine = sha256(graph), this_machine()
    records = {
        runtime: RuntimeRecord(
            runtime=runtime,
            precision=precision,
            arithmetic=_arithmetic(precision, runtime),
            graph_sha256=digest,
            machine=machine,
        )
        for runtime in wanted
    }

    def build(record: RuntimeRecord, place: Path, *, tuned: bool = False) -> Built:
        write = _writer(graph, record.runtime, fuse=fuse_step)
        tune = None if tuned or write is None else _tuner(threads, device)
        return build_engine(
            graph,
            place,
            record,
            write=write,
            tune=tune,
            budget=budget,
            threads=threads,
            device=device,
        )

    if len(wanted) == 1:
        return build(records[wanted[0]], output)
    with TemporaryDirectory() as folder:
        made: dict[str, Built] = {}
        for runtime, record in records.items():
            note(f"building and measuring for {runtime}")
            made[runtime] = build(record, Path(folder) / f"{runtime}.onnx")
        batch = max(each.record.best_batch or 1 for each in made.values())
        engines: dict[str, Engine] = {
            name: open_engine(each.path, threads=threads) for name, each in made.items()
        }
        seconds = race(engines, batch)
        for engine in engines.values():
            engine.close()
    best = made[winner(seconds)]
    taken = {name: 1000 * each / batch for name, each in seconds.items()}
    kept = replace(best.record, milliseconds=taken)
    return build(kept, output, tuned=True)


def _writer(graph: Path, runtime: Runtime, *, fuse: bool) -> Write | None:
    """Returns what writes an engine; None where the graph is taken as it is, for want of onnx."""
    try:
        from ddpm_deploy.export.lower import lower_graph, write_engine
    except ImportError:
        if runtime == "onnxruntime" and not fuse:
            note(
                "note: without the package onnx the graph is taken as it is, and attention is "
                "slower (pip install onnx)"
            )
            return None
        from ddpm_deploy.engines.base import needs

        with needs("onnx", extra="openvino" if runtime == "openvino" else "export"):
            raise

    @functools.cache
    def lowered() -> object:
        return lower_graph(graph, runtime, fuse=fuse)

    def write(record: RuntimeRecord, output: Path) -> None:
        write_engine(lowered(), record, output)  # type: ignore[arg-type]

    return write


def _tuner(threads: int | None, device: str) -> Tune:
    """Returns what measures an engine: its batch and, for OpenVINO, its streams."""

    def tune(engine: Engine, record: RuntimeRecord) -> RuntimeRecord:
        from ddpm_deploy.tuning import best_batch

        batch = best_batch(engine, longest=LONGEST)
        record = replace(record, best_batch=batch)
        if record.runtime != "openvino":
            return record
        from ddpm_deploy.engines.openvino import OpenVinoEngine
        from ddpm_deploy.engines.tune import tune_streams

        def reopen(other: RuntimeRecord) -> Engine:
            return OpenVinoEngine(
                engine.path, threads=threads, device=device, record=other, cache=False
            )

        return tune_streams(record, reopen, batch=batch, cores=threads)

    return tune


def _measured_before(graph: Path, output: Path) -> RuntimeRecord | None:
    """Returns what an engine says that was measured here for the same graph; None for any other."""
    from ddpm_deploy.engines.tune import still_holds, this_machine
    from ddpm_deploy.files import sha256
    from ddpm_deploy.onnx_metadata import read_metadata
    from ddpm_deploy.runtime import METADATA_KEY, read_runtime

    if not output.is_file() or not graph.is_file():
        return None
    with suppress(DDPMDeployError):  # whatever is there is overwritten
        record = read_runtime(read_metadata(output).get(METADATA_KEY), source=str(output))
        if record is not None and still_holds(record, sha256(graph), this_machine()):
            return record
    return None


def _times(record: RuntimeRecord) -> str:
    times = ", ".join(f"{name} {each:.2f} ms" for name, each in record.milliseconds.items())
    return f"{times} an image" if times else f"{record.runtime} alone"


def _say(graph: Path, built: Built, *, fused: bool) -> None:
    record = built.record
    if record.milliseconds:
        note(f"{record.runtime} is the faster here: {_times(record)}")
    apart = f"at most {built.deviation:.1e} of the peak from" if built.deviation else "the same as"
    step = " with its step fused" if fused else ""
    precision = {"fp32": "float32", "bf16": "bfloat16"}.get(record.precision, record.precision)
    plan = " (for a TensorRT plan name its precision: --fp16)" if precision == "float32" else ""
    note(
        f"built for {built.runtime} in {precision}{step}{plan}: {apart} {graph}; opens in "
        f"{built.load_seconds:.2f} s, the graph in {built.graph_load_seconds:.2f} s"
    )
