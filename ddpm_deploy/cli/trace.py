"""`ddpm-deploy trace`: records a loop, for a machine that has no PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ddpm_deploy.cli.common import (
    Device,
    Eta,
    Guidance,
    Label,
    ModelName,
    Observe,
    Progress,
    Respacing,
    SamplerName,
    Seed,
    SpacingName,
    SpecFile,
    Steps,
    Threads,
    note_untrained,
    recipe_of,
    settings,
    spec_of,
)
from ddpm_deploy.errors import TraceError

if TYPE_CHECKING:
    from ddpm_deploy.sampling import Step


def _keep(value: str) -> str:
    if value != "all" and not (value.isdecimal() and int(value) >= 2):
        raise typer.BadParameter(f"{value!r} is neither all, nor a number from 2 on")
    return value


def command(
    engine: Annotated[Path, typer.Argument(help="The trained checkpoint, or an engine.")] = Path(
        "ckpt.pt"
    ),
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The file; beside the model if left out."),
    ] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Images to draw.")] = 2,
    keep: Annotated[
        str, typer.Option(callback=_keep, help="Steps to record, evenly spread, or all.")
    ] = "50",
    sampler: SamplerName = None,
    steps: Steps = None,
    eta: Eta = None,
    spacing: SpacingName = None,
    respacing: Respacing = None,
    seed: Seed = 0,
    label: Label = None,
    guidance: Guidance = 1.0,
    observe: Observe = None,
    polygraphy: Annotated[
        Path | None,
        typer.Option(help="Folder: also the network's inputs and outputs for Polygraphy."),
    ] = None,
    trtexec: Annotated[
        Path | None,
        typer.Option(help="Folder: also the same for trtexec, with the commands."),
    ] = None,
    model: ModelName = None,
    spec_file: SpecFile = None,
    threads: Threads = None,
    device: Device = "auto",
) -> None:
    """Record a loop, so that a machine without PyTorch can verify its own.

    The file says what the network is and which noise it was given, and holds
    x_t and the output at some steps.
    """
    from ddpm_deploy.engines import open_engine
    from ddpm_deploy.files import whole_file
    from ddpm_deploy.verify import engine_loop, record, write_trace
    from ddpm_deploy.verify.goldens import (
        check_calls,
        check_folder,
        check_polygraphy,
        write_polygraphy,
        write_trtexec,
    )
    from ddpm_deploy.verify.trace import SUFFIX, loop_steps
    from ddpm_deploy.verify.verification import described

    path = output or engine.with_suffix(SUFFIX)
    if path.suffix != SUFFIX:
        raise TraceError(
            f"The output is {path}; the name of a trace ends in {SUFFIX}.",
            hint=f"Type -o {path.with_suffix(SUFFIX)}",
        )
    with (
        open_engine(
            engine, threads=threads, device=device, spec=spec_of(spec_file), model=model
        ) as opened,
        # Opened before the loop: a place that cannot be written shall not cost the work.
        whole_file(path) as partial,
    ):
        spec = opened.spec
        recipe = recipe_of(
            spec,
            seed=seed,
            sampler=sampler,
            steps=steps,
            eta=eta,
            spacing=spacing,
            label=label,
            guidance=guidance,
            observe=observe,
            example=True,
            respacing=respacing,
        )
        recipe = replace(recipe, sampler=recipe.sampler or spec.sampler)
        if polygraphy or trtexec:
            check_calls(spec, recipe)
        if polygraphy:
            check_polygraphy()
        if trtexec:
            check_folder(trtexec)
        with settings("See: ddpm-deploy trace --help"):
            loop = engine_loop(opened, recipe, range(count))
        note_untrained(spec, loop.table)
        with Progress(f"recording {opened.name}", len(loop.table), "steps") as progress:
            try:
                recorded = record(
                    _advancing(loop_steps(loop), progress),
                    spec=spec,
                    recipe=recipe,
                    images=range(count),
                    keep=None if keep == "all" else int(keep),
                    source=described(opened),
                )
            finally:
                loop.close()
        write_trace(partial, recorded)
        lines: list[object] = [path]
        if polygraphy:
            lines += write_polygraphy(polygraphy, recorded)
        if trtexec:
            lines += write_trtexec(trtexec, recorded)
    for line in lines:
        typer.echo(line)


def _advancing(steps: Iterable[Step], progress: Progress) -> Iterator[Step]:
    """Yields steps as they are made, all of them finite."""
    for step in steps:
        if not step.finite:
            raise TraceError(
                f"The loop gives numbers that are not finite at t = {step.t} (step {step.k}).",
                hint="Was the checkpoint trained to the end? Record another one.",
            )
        progress.advance()
        yield step
