"""`ddpm-deploy build`: an exported network becomes an engine."""

from __future__ import annotations

import functools
from dataclasses import replace
from json import loads
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from ddpm_deploy.cli.common import Device, Json, Threads, note, print_json, settings
from ddpm_deploy.cli.cpu import build_for_cpu, refuse_engine
from ddpm_deploy.cli.int8 import build_int8, parse_budget
from ddpm_deploy.errors import DataError, EngineBuildError

if TYPE_CHECKING:
    from ddpm_deploy.arrays import Samples
    from ddpm_deploy.engines.flavour import Flavour
    from ddpm_deploy.engines.plan import Profile
    from ddpm_deploy.engines.trt_build import Prepared
    from ddpm_deploy.export.prepare import Lowered
    from ddpm_deploy.precision import Precision
    from ddpm_deploy.spec import ModelSpec

CALIBRATION_PICTURES = 8

RUNTIMES = ("auto", "tensorrt", "rtx", "onnxruntime", "openvino")

SMALLEST_BEST = 8
"""A GPU wants some images at once; in a plan their attention takes little memory."""


def command(
    ctx: typer.Context,
    graph: Annotated[Path, typer.Argument(help="ONNX file from `export`.")] = Path("unet.onnx"),
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Engine to write; unet.plan, unet.ort.onnx ..."),
    ] = None,
    fp16: Annotated[bool, typer.Option("--fp16", help="A plan in half precision.")] = False,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="bfloat16: a plan, or for OpenVINO.")
    ] = False,
    fp32: Annotated[bool, typer.Option("--fp32", help="A plan in float32, without TF32.")] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Layers in int8, as many as the budget allows.")
    ] = False,
    runtime: Annotated[
        str | None,
        typer.Option(
            help="tensorrt, rtx (TensorRT-RTX), onnxruntime, openvino, or auto: the fastest of "
            "what is installed for a CPU, measured here."
        ),
    ] = None,
    batch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MIN:OPT:MAX",
            help="Batches a plan takes, fastest at OPT; repeat it for several profiles.",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER|psnr=DB",
            help="Most that half precision may cost, of the output's peak; fp16 5e-3. For int8 the "
            "least PSNR of a loop's images beside float32's; psnr=30.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|FILE|digits",
            help="Pictures to measure a lower precision on; its own samples if left out.",
        ),
    ] = None,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(metavar="8.6", help="rtx: a GPU to build for; repeat it for several."),
    ] = None,
    workspace: Annotated[
        int | None, typer.Option(min=1, max=2**40, help="Most scratch memory of a layer, in MiB.")
    ] = None,
    optimization_level: Annotated[
        int | None, typer.Option(min=0, max=5, help="0 builds fastest, 5 runs fastest.")
    ] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option(help="tensorrt: file that keeps measured timings; next builds are quicker."),
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="tensorrt: later versions run it, too.")
    ] = False,
    hardware_compatible: Annotated[
        bool, typer.Option("--hardware-compatible", help="tensorrt: GPUs from Ampere on run it.")
    ] = False,
    retry_smaller: Annotated[
        bool, typer.Option("--retry-smaller", help="Out of memory: try smaller builds in turn.")
    ] = False,
    keep_graph: Annotated[
        bool, typer.Option("--keep-graph", help="Keep the converted graph: unet.fp16.onnx.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Build or measure again though nothing has changed.")
    ] = False,
    fuse_step: Annotated[
        bool, typer.Option("--fuse-step", help="Put the sampler's step behind the network.")
    ] = False,
    threads: Threads = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Build the engine that a machine runs.

    With --fp16, --bf16, --fp32, --runtime tensorrt or rtx, or -o NAME.plan that
    is a TensorRT plan, of the TensorRT installed; float32 if no precision is
    named. TensorRT builds on the GPU that the plan is for; TensorRT-RTX builds
    ahead of time, with or without a GPU. Else it is an engine for a CPU, of
    ONNX Runtime if no other runtime is named, checked against its graph
    (--threads, --device), and its best batch measured. --int8 writes the
    graph that all of them take, unet.int8.onnx, and a plan if a TensorRT is named
    or there is a GPU for one.
    """
    from ddpm_deploy.engines.base import CHECKPOINT_SUFFIXES

    if graph.suffix in CHECKPOINT_SUFFIXES:
        raise EngineBuildError(
            f"{graph} is a checkpoint; build takes the ONNX file made from it.",
            hint=f"Export it first: ddpm-deploy export {graph} -o unet.onnx",
        )
    if graph.suffix != ".onnx":
        raise EngineBuildError(
            f"{graph} is no ONNX file: its suffix is {graph.suffix!r}.",
            hint="Give the file that export wrote: ddpm-deploy build unet.onnx",
        )
    if runtime not in {None, *RUNTIMES}:
        raise typer.BadParameter(
            f"{runtime!r} is none of {', '.join(RUNTIMES)}", param_hint="--runtime"
        )
    precision = _precision(fp16=fp16, bf16=bf16, fp32=fp32, int8=int8)
    allowed = parse_budget(budget, precision)
    as_plan = (
        runtime in {"tensorrt", "rtx"}
        or (runtime is None and precision is not None and (precision != "int8" or _gpu_builds()))
        or (runtime in {None, "auto"} and output is not None and output.suffix == ".plan")
        or (runtime == "auto" and _gpu_builds())
    )
    _refuse_options(ctx, as_plan=as_plan)
    if precision in {None, "fp32"} and (budget is not None or data is not None):
        raise EngineBuildError(
            "--budget and --data are for half precision and int8, which are measured before the "
            "build.",
            hint="Leave them out, or type --fp16, --bf16 or --int8.",
        )
    if precision == "bf16" and data is not None and not as_plan:
        raise EngineBuildError(
            "OpenVINO takes all of a network in bfloat16: nothing is chosen by --data.",
            hint="Leave --data out.",
        )
    if not as_plan:
        if precision == "int8":
            build_int8(
                graph,
                output,
                runtime=runtime or "onnxruntime",
                psnr=allowed,
                data=None if data is None else _pictures(data, _spec(graph)),
                fuse_step=fuse_step,
                threads=threads,
                device=device,
                force=force,
                json=json,
            )
        elif precision == "fp16" and runtime == "onnxruntime":
            _build_mixed(graph, output, budget=allowed, data=data, fuse=fuse_step, json=json)
        else:
            build_for_cpu(
                graph,
                output,
                runtime="onnxruntime" if runtime is None else runtime,
                precision=precision,
                fuse_step=fuse_step,
                threads=threads,
                device=device,
                budget=allowed,
                force=force,
                json=json,
            )
        return

    refuse_engine(graph, runtime="onnxruntime", precision=None)
    from ddpm_deploy.cli.plan import check_plan, make_plan
    from ddpm_deploy.engines.base import needs
    from ddpm_deploy.engines.build_settings import BuildSettings
    from ddpm_deploy.engines.flavour import extra

    output = output or graph.with_suffix(".plan")
    if output.suffix != ".plan":
        raise typer.BadParameter(f"{output} must end in .plan", param_hint="--output")
    flavour = _choose_flavour(runtime)
    with needs("onnx", extra=extra(flavour)):
        from ddpm_deploy.export.onnx_file import weight_files
        from ddpm_deploy.export.prepare import lower_precision, prepare_graph, read_header

    spec, fused, recorded = read_header(graph)
    chosen = BuildSettings(
        flavour=flavour,
        precision=precision or recorded,
        profiles=_profiles(batch, spec),
        budget=allowed,
        data=data,
        fuse_step=fuse_step or fused,
        compute_capabilities=tuple(dict.fromkeys(compute_capability or ())),
        workspace=workspace,
        optimization_level=optimization_level,
        timing_cache=timing_cache,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
    )
    with TemporaryDirectory() as folder:
        name = f"{graph.stem}.{chosen.precision}.onnx"
        place = output.with_name(name) if keep_graph else Path(folder) / name

        @functools.cache
        def lowered() -> Lowered:
            return lower_precision(
                graph,
                chosen.precision,
                budget=allowed,
                data=_pictures(data, spec),
                on_progress=note,
            )

        @functools.cache
        def prepared(profiles: tuple[Profile, ...]) -> Prepared:
            smaller = replace(chosen, profiles=profiles)
            return prepare_graph(graph, smaller, place, lowered=lowered())

        built = make_plan(
            graph,
            output,
            chosen,
            spec=spec,
            prepare=lambda smaller: prepared(smaller.profiles),
            check=functools.partial(check_plan, graph),
            weights=weight_files(graph),
            force=force,
            retry_smaller=retry_smaller,
        )
        if keep_graph and built.reused and not place.is_file():
            prepared(chosen.profiles)
    if json:
        record = loads(built.record.to_json())
        print_json({"path": str(output), "reused": built.reused, **record})
    else:
        typer.echo(output)


def _precision(*, fp16: bool, bf16: bool, fp32: bool, int8: bool) -> Precision | None:
    named: dict[Precision, bool] = {"fp16": fp16, "bf16": bf16, "fp32": fp32, "int8": int8}
    chosen = [precision for precision, typed in named.items() if typed]
    if len(chosen) > 1:
        raise EngineBuildError(
            f"A plan has one precision, and {' and '.join(f'--{p}' for p in chosen)} are given.",
            hint="Type one of them, and build another plan with -o for the other.",
        )
    return chosen[0] if chosen else None


def _spec(graph: Path) -> ModelSpec:
    from ddpm_deploy.engines.base import needs

    with needs("onnx", extra="export"):
        from ddpm_deploy.export.prepare import read_header
    return read_header(graph).spec


def _refuse_options(ctx: typer.Context, *, as_plan: bool) -> None:
    """Refuses options of the other kind of engine."""
    of_plans = (
        *("batch", "compute_capability", "workspace", "optimization_level", "timing_cache"),
        *("version_compatible", "hardware_compatible", "retry_smaller", "keep_graph"),
    )
    for name in ("threads", "device") if as_plan else of_plans:
        source = ctx.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            option = "--" + name.replace("_", "-")
            raise EngineBuildError(
                f"{option} is for "
                + ("the check of an ONNX Runtime engine." if as_plan else "a TensorRT plan."),
                hint=f"Leave {option} out"
                + ("." if as_plan else ", or name the plan's precision: --fp16 or --fp32"),
            )


def _gpu_builds() -> bool:
    """Says whether there is a GPU here with a TensorRT for it."""
    from ddpm_deploy.capability import rtx_runs_on
    from ddpm_deploy.engines.device import find_device
    from ddpm_deploy.engines.flavour import installed

    device = find_device()
    return device is not None and any(
        flavour == "tensorrt" or rtx_runs_on(device.compute_capability) for flavour in installed()
    )


def _choose_flavour(runtime: str | None) -> Flavour:
    """Returns the TensorRT to build with.

    Where both are installed, it is TensorRT if there is a GPU that it can build on.
    """
    from ddpm_deploy.engines.device import find_device
    from ddpm_deploy.engines.flavour import require, require_any

    if runtime in {"tensorrt", "rtx"}:
        flavour: Flavour = "tensorrt_rtx" if runtime == "rtx" else "tensorrt"
        require(flavour)
        return flavour
    match require_any():
        case [flavour]:
            return flavour
        case _:
            return "tensorrt" if find_device() else "tensorrt_rtx"


def _profiles(texts: list[str] | None, spec: ModelSpec) -> tuple[Profile, ...]:
    """Reads `--batch`; if left out, 1 to 8, or to what `sample` gives a small machine."""
    from ddpm_deploy.engines.plan import Profile
    from ddpm_deploy.run import default_batch

    if not texts:
        best = max(default_batch(spec), SMALLEST_BEST)
        return (Profile(least=1, best=best, most=best),)
    with settings(hint="Type --batch 1:8:32, or one number for a plan of that batch alone."):
        return tuple(Profile.parse(text) for text in dict.fromkeys(texts))


def _pictures(data: str | None, spec: ModelSpec) -> Samples | None:
    """Reads what a lower precision is measured on: a few pictures, in the network's own range."""
    from ddpm_deploy.data import open_data
    from ddpm_deploy.images import is_picture

    if data is None:
        return None
    if not is_picture(spec.sample_shape):
        raise DataError(
            f"The samples of this network are {spec.sample_shape}: no pictures.",
            hint="Leave --data out: half precision is then measured on the network's own samples.",
        )
    channels, height, width = spec.sample_shape
    pictures = open_data(data, image_size=(height, width), channels=channels)
    return pictures.load(pictures.spread(CALIBRATION_PICTURES), value_range=spec.value_range)


def _build_mixed(
    graph: Path,
    output: Path | None,
    *,
    budget: float | None,
    data: str | None,
    fuse: bool,
    json: bool,
) -> None:
    """Writes the graph in half precision, which every runtime reads."""
    from ddpm_deploy.engines.base import needs

    output = output or graph.with_suffix(".fp16.onnx")
    if output.suffix != ".onnx":
        raise typer.BadParameter(f"{output} must end in .onnx", param_hint="--output")
    with needs("onnx", extra="export"):
        from ddpm_deploy.export.fuse_step import fuse_step
        from ddpm_deploy.export.onnx_file import write_graph
        from ddpm_deploy.export.prepare import lower_precision, read_header
    if output.resolve() == graph.resolve():
        raise EngineBuildError(
            f"The engine would overwrite the graph it is built from, {graph}.",
            hint="Name another file: -o unet.fp16.onnx",
        )
    spec = read_header(graph).spec
    lowered = lower_precision(
        graph, "fp16", budget=budget, data=_pictures(data, spec), on_progress=note
    )
    write_graph(fuse_step(lowered.model) if fuse else lowered.model, output)
    if lowered.error is not None:
        note(f"its output is at most {lowered.error:.1e} of its peak from float32's")
    note(
        "ONNX Runtime computes it in half precision on a GPU, and in float32 on a CPU; a plan is "
        f"built of it as it is: ddpm-deploy build {output} --fp16"
    )
    if json:
        print_json({"path": str(output), "groups": lowered.groups, "error": lowered.error})
    else:
        typer.echo(output)
