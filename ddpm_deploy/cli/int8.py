"""`ddpm-deploy build --int8`: the graph with Q/DQ pairs, which every runtime takes."""

from __future__ import annotations

import re
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ddpm_deploy.cli.common import note, print_json
from ddpm_deploy.errors import EngineBuildError

if TYPE_CHECKING:
    from ddpm_deploy.arrays import Samples
    from ddpm_deploy.export.quantize import Quantised
    from ddpm_deploy.precision import Precision


def parse_budget(text: str | None, precision: Precision | None) -> float | None:
    """Reads `--budget`: decibels for int8, a share of the output's peak for half precision.

    Raises:
        typer.BadParameter: It is neither, or not that of this precision.
    """
    if text is None:
        return None
    decibels = re.fullmatch(r"psnr=(.+)", text.strip())
    if (decibels is not None) != (precision == "int8"):
        right = "psnr=35, in decibels" if precision == "int8" else "a number, such as 5e-3"
        raise typer.BadParameter(
            f"{text!r}: the budget of {precision or 'half precision'} is {right}",
            param_hint="--budget",
        )
    try:
        number = float(decibels[1] if decibels else text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no number", param_hint="--budget") from None
    if not isfinite(number):
        raise typer.BadParameter(f"{text} is not finite", param_hint="--budget")
    if number < 0:
        raise typer.BadParameter(f"{text} is below 0", param_hint="--budget")
    return number


def build_int8(
    graph: Path,
    output: Path | None,
    *,
    runtime: str,
    psnr: float | None,
    data: Samples | None,
    fuse_step: bool,
    threads: int | None,
    device: str,
    force: bool,
    json: bool,
) -> None:
    """Writes `unet.int8.onnx`, and of it the engine of a CPU's runtime where one is named.

    Args:
        graph: The file that `export` wrote, or one with Q/DQ pairs.
        output: Where to; a name beside the graph when None.
        runtime: `onnxruntime` for the graph itself; `openvino`, or `auto` for the faster.
        psnr: The budget in decibels; `quantize.PSNR` when None.
        data: Clean samples to take ranges on; the network's own when None.
        fuse_step: Whether the sampler's step stands behind the network; ONNX Runtime alone.
        threads: CPU threads.
        device: As in `build_for_cpu`.
        force: As in `build_for_cpu`.
        json: Print the result as JSON.
    """
    from ddpm_deploy.cli.cpu import (
        build_for_cpu,
        default_output,
        precision_of,
        refuse_engine,
        runtimes_for,
    )
    from ddpm_deploy.engines.base import check_path, needs

    check_path(graph)
    refuse_engine(graph, runtime=None, precision="int8")
    float32 = precision_of(graph) == "fp32"
    alone = runtime == "onnxruntime"
    place = graph.with_suffix(".int8.onnx") if float32 or alone else graph
    if alone:
        place = output or place
    final = place if alone else output or default_output(graph, runtime, "int8")
    for each in (place, final):
        if each.suffix != ".onnx":
            raise typer.BadParameter(f"{each} must end in .onnx", param_hint="--output")
    if final.resolve() in {graph.resolve(), *(() if alone else (place.resolve(),))} or (
        place is not graph and place.resolve() == graph.resolve()
    ):
        raise EngineBuildError(
            f"The engine would overwrite the graph it is built from, {final}.",
            hint="Name another file with -o.",
        )
    if not alone:
        runtimes_for(runtime, "int8", graph, fuse_step=fuse_step, device=device)
    with needs("onnx", extra="export"):
        from ddpm_deploy.export.fuse_step import fuse_step as fuse
        from ddpm_deploy.export.onnx_file import write_graph
    quantised = _quantise(graph, psnr=psnr, data=data, threads=threads)
    known = quantised.psnr
    if not float32 and psnr is not None and (known is None or known < psnr):
        found = "an unknown distance" if known is None else f"{known:.1f} dB"
        raise EngineBuildError(
            f"{graph} is {found} from float32; {psnr:g} dB are asked for.",
            hint="Start from the float32 graph that export wrote.",
        )
    if place is not graph:
        written = fuse(quantised.model) if fuse_step else quantised.model
        write_graph(written, place)
    _say(quantised, place, graph, alone=alone)
    if alone:
        if json:
            print_json(
                {
                    "path": str(place),
                    "psnr": quantised.psnr if isfinite(quantised.psnr or 0) else None,
                    "error": quantised.error,
                    "groups": dict(quantised.groups),
                    "floats": dict(quantised.floats),
                }
            )
        else:
            typer.echo(place)
        return
    build_for_cpu(
        place,
        final,
        runtime=runtime,
        precision="int8",
        fuse_step=fuse_step,
        threads=threads,
        device=device,
        exact=graph if float32 else None,
        decibels=psnr,
        force=force,
        json=json,
    )


def _quantise(
    graph: Path, *, psnr: float | None, data: Samples | None, threads: int | None
) -> Quantised:
    from ddpm_deploy.export.quantize import PSNR, quantise

    return quantise(
        graph,
        psnr=PSNR if psnr is None else psnr,
        data=data,
        threads=threads,
        on_progress=note,
    )


def _say(quantised: Quantised, place: Path, graph: Path, *, alone: bool) -> None:
    if quantised.floats:
        note(f"back in float32, the worst first: {', '.join(quantised.floats)}")
    if quantised.psnr is not None:
        note(f"its loop's worst image is {quantised.psnr:.1f} dB from float32's")
    if alone:
        note(f"a plan is built of it as it is: ddpm-deploy build {place} --int8 --runtime tensorrt")
        note(f"for an Intel CPU: ddpm-deploy build {graph} --int8 --runtime openvino")
