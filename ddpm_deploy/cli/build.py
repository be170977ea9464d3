"""`ddpm-deploy build`: an exported network becomes an engine for this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddpm_deploy.cli.common import Device, Json, Threads, note, print_json
from ddpm_deploy.errors import EngineBuildError


def command(
    graph: Annotated[Path, typer.Argument(help="ONNX file from `export`.")] = Path("unet.onnx"),
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Engine to write; unet.ort.onnx.")
    ] = None,
    fp16: Annotated[
        bool, typer.Option("--fp16", help="A TensorRT plan in half precision.")
    ] = False,
    fuse_step: Annotated[
        bool, typer.Option("--fuse-step", help="Put the sampler's step behind the network.")
    ] = False,
    threads: Threads = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Build the engine that this machine runs, checked against its graph.

    Without TensorRT that is an ONNX Runtime engine in float32.
    """
    from collections.abc import Callable
    from dataclasses import asdict

    from ddpm_deploy.engines.base import CHECKPOINT_SUFFIXES, needs
    from ddpm_deploy.engines.build import build_ort

    if fp16 or (output is not None and output.suffix == ".plan"):
        what = "--fp16 needs" if fp16 else f"{output} is the name of"
        raise EngineBuildError(
            f"{what} a TensorRT plan, which this release does not build yet.",
            hint="Build an ONNX Runtime engine in float32 instead: ddpm-deploy build "
            f"{graph}, then ddpm-deploy sample --engine {graph.with_suffix('.ort.onnx')}",
        )
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
        f"built for {built.runtime} in float32{step} (this release has no TensorRT): {apart} "
        f"{graph}; "
        f"opens in {built.load_seconds:.2f} s, the graph in {built.graph_load_seconds:.2f} s"
    )
    if json:
        print_json({**asdict(built), "path": str(built.path)})
    else:
        typer.echo(built.path)
