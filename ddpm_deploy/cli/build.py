"""`ddpm-deploy build`: an exported network becomes an engine."""

from __future__ import annotations

import functools
from dataclasses import asdict, replace
from json import loads
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from ddpm_deploy.cli.common import Device, Json, Threads, note, print_json, settings
from ddpm_deploy.errors import EngineBuildError, MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ddpm_deploy.engines.build_settings import Precision
    from ddpm_deploy.engines.plan import Flavour, Profile
    from ddpm_deploy.engines.trt_build import Prepared
    from ddpm_deploy.spec import ModelSpec


def command(
    ctx: typer.Context,
    graph: Annotated[Path, typer.Argument(help="ONNX file from `export`.")] = Path("unet.onnx"),
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Engine to write; unet.plan or unet.ort.onnx."),
    ] = None,
    fp16: Annotated[bool, typer.Option("--fp16", help="A plan in half precision.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="A plan in bfloat16.")] = False,
    fp32: Annotated[bool, typer.Option("--fp32", help="A plan in float32, without TF32.")] = False,
    runtime: Annotated[
        str, typer.Option(help="auto, tensorrt, rtx (TensorRT-RTX) or onnxruntime.")
    ] = "auto",
    batch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MIN:OPT:MAX",
            help="Batches a plan takes, fastest at OPT; repeat it for several profiles.",
        ),
    ] = None,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(metavar="8.6", help="rtx: a GPU to build for; repeat it for several."),
    ] = None,
    workspace: Annotated[
        int | None, typer.Option(min=1, help="Most scratch memory of a layer, in MiB.")
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
        bool, typer.Option("--force", help="Build a plan again though nothing has changed.")
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
    ahead of time, with or without a GPU. Else it is an ONNX Runtime engine in
    float32, checked against its graph (--threads, --device).
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
    if runtime not in {"auto", "tensorrt", "rtx", "onnxruntime"}:
        raise typer.BadParameter(
            f"{runtime!r} is none of auto, tensorrt, rtx, onnxruntime", param_hint="--runtime"
        )
    precision = _precision(fp16=fp16, bf16=bf16, fp32=fp32)
    as_plan = runtime in {"tensorrt", "rtx"} or (
        runtime == "auto"
        and (precision is not None or (output is not None and output.suffix == ".plan"))
    )
    _refuse_options(ctx, as_plan=as_plan)
    if not as_plan:
        if precision in {"fp16", "bf16"}:
            raise EngineBuildError(
                f"--{precision} is for a TensorRT plan; an ONNX Runtime engine is in float32.",
                hint="Leave --runtime onnxruntime out, or the precision.",
            )
        _build_ort(graph, output, fuse_step=fuse_step, threads=threads, device=device, json=json)
        return

    from ddpm_deploy.cli.plan import make_plan
    from ddpm_deploy.engines.base import needs
    from ddpm_deploy.engines.build_settings import BuildSettings

    output = output or graph.with_suffix(".plan")
    if output.suffix != ".plan":
        raise typer.BadParameter(f"{output} must end in .plan", param_hint="--output")
    flavour = _choose_flavour(runtime)
    with needs("onnx", extra="rtx" if flavour == "tensorrt_rtx" else "tensorrt"):
        from ddpm_deploy.export.prepare import prepare_graph, read_graph

    spec, fused = read_graph(graph)
    chosen = BuildSettings(
        flavour=flavour,
        precision=precision or "fp32",
        profiles=_profiles(batch, spec),
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
        def prepared(profiles: tuple[Profile, ...]) -> Prepared:
            return prepare_graph(graph, replace(chosen, profiles=profiles), place)

        built = make_plan(
            graph,
            output,
            chosen,
            spec=spec,
            prepare=lambda smaller: prepared(smaller.profiles),
            force=force,
            retry_smaller=retry_smaller,
        )
    if json:
        data = {"path": str(output), "reused": built.reused, **loads(built.record.to_json())}
        print_json(data)
    else:
        typer.echo(output)


def _precision(*, fp16: bool, bf16: bool, fp32: bool) -> Precision | None:
    named: dict[Precision, bool] = {"fp16": fp16, "bf16": bf16, "fp32": fp32}
    chosen = [precision for precision, typed in named.items() if typed]
    if len(chosen) > 1:
        raise EngineBuildError(
            f"A plan has one precision, and {' and '.join(f'--{p}' for p in chosen)} are given.",
            hint="Type one of them, and build another plan with -o for the other.",
        )
    return chosen[0] if chosen else None


def _refuse_options(ctx: typer.Context, *, as_plan: bool) -> None:
    """Refuses options of the other kind of engine."""
    of_plans = (
        *("batch", "compute_capability", "workspace", "optimization_level", "timing_cache"),
        *("version_compatible", "hardware_compatible", "retry_smaller", "keep_graph", "force"),
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


def _choose_flavour(runtime: str) -> Flavour:
    """Returns the TensorRT to build with.

    Where both are installed, it is TensorRT if there is a GPU that it can build on.
    """
    from ddpm_deploy.engines.device import find_device
    from ddpm_deploy.engines.flavour import installed, require

    if runtime != "auto":
        flavour: Flavour = "tensorrt_rtx" if runtime == "rtx" else "tensorrt"
        require(flavour)
        return flavour
    match installed():
        case []:
            raise MissingDependencyError(
                "A plan is built by TensorRT, and neither TensorRT nor TensorRT-RTX is installed.",
                hint="For a GeForce or RTX GPU, or to build ahead of time without a GPU:\n"
                "  pip install 'ddpm-deploy[rtx]'\n"
                "for a data-centre GPU, on the machine that has it:\n"
                "  pip install 'ddpm-deploy[tensorrt]'\n"
                "for a Jetson, on the Jetson, whose JetPack brings TensorRT:\n"
                "  python3 -m venv --system-site-packages .venv\n"
                "  .venv/bin/pip install 'ddpm-deploy[tensorrt]'\n"
                "and without any of these: ddpm-deploy build makes an ONNX Runtime engine.",
            )
        case [flavour]:
            return flavour
        case _:
            return "tensorrt" if find_device() else "tensorrt_rtx"


def _profiles(texts: list[str] | None, spec: ModelSpec) -> tuple[Profile, ...]:
    """Reads `--batch`; if left out, batches of 1 to 8 or to what `sample` draws at once."""
    from ddpm_deploy.engines.plan import Profile
    from ddpm_deploy.run import default_batch

    if not texts:
        best = default_batch(spec)
        return (Profile(least=1, best=best, most=max(best, 8)),)
    with settings(hint="Type --batch 1:8:32, or one number for a plan of that batch alone."):
        return tuple(Profile.parse(text) for text in dict.fromkeys(texts))


def _build_ort(
    graph: Path,
    output: Path | None,
    *,
    fuse_step: bool,
    threads: int | None,
    device: str,
    json: bool,
) -> None:
    from ddpm_deploy.engines.base import needs
    from ddpm_deploy.engines.build import build_ort

    output = output or graph.with_suffix(".ort.onnx")
    if output.suffix != ".onnx":
        raise typer.BadParameter(f"{output} must end in .onnx", param_hint="--output")
    rewrite: Callable[[Path, Path], None] | None = None
    if fuse_step:
        with needs("onnx", extra="export"):
            from ddpm_deploy.export.fuse_step import fuse_file
        rewrite = fuse_file
    built = build_ort(graph, output, threads=threads, device=device, rewrite=rewrite)
    apart = f"at most {built.deviation:.1e} of the peak from" if built.deviation else "the same as"
    step = " with its step fused" if fuse_step else ""
    note(
        f"built for {built.runtime} in float32{step} (for a TensorRT plan name its precision: "
        f"--fp16): {apart} {graph}; opens in {built.load_seconds:.2f} s, the graph in "
        f"{built.graph_load_seconds:.2f} s"
    )
    if json:
        print_json({**asdict(built), "path": str(built.path)})
    else:
        typer.echo(built.path)
