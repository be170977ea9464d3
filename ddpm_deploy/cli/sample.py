"""`ddpm-deploy sample`: images from an engine."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from ddpm_deploy.cli.common import (
    Device,
    Eta,
    Guidance,
    Json,
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
    note,
    note_untrained,
    print_json,
    recipe_of,
    settings,
    spec_of,
)
from ddpm_deploy.errors import DDPMDeployError


def command(
    engine: Annotated[Path, typer.Option("--engine", "-e", help="Engine to sample with.")] = Path(
        "unet.onnx"
    ),
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Images to draw.")] = 8,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.")] = Path(
        "samples"
    ),
    sampler: SamplerName = None,
    steps: Steps = None,
    eta: Eta = None,
    spacing: SpacingName = None,
    respacing: Respacing = None,
    seed: Seed = 0,
    start: Annotated[int, typer.Option(min=0, help="Index of the first image, for shards.")] = 0,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images at once; by the image size if left out.")
    ] = None,
    label: Label = None,
    guidance: Guidance = 1.0,
    observe: Observe = None,
    model: ModelName = None,
    spec_file: SpecFile = None,
    gif: Annotated[
        bool, typer.Option("--gif", help="Also x0.gif: predicted x_0 unfolding.")
    ] = False,
    npz: Annotated[bool, typer.Option("--npz", help="Also samples.npz: all images.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Draw anew what the folder holds.")
    ] = False,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Build a plan again that is not for this machine.")
    ] = False,
    threads: Threads = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Draw images from an engine, and continue a run that was stopped.

    Image i depends on the seed and i alone. The folder takes 000000.png,
    000001.png, ..., grid.png, and run.json with all that reproduces them.
    """
    from ddpm_deploy.cli.rebuild import open_or_rebuild
    from ddpm_deploy.noise import SeededNoise
    from ddpm_deploy.process import seconds_since_start
    from ddpm_deploy.run import GIF_NAME, NPZ_NAME, Run, batch_for, recorded_batch

    with open_or_rebuild(
        engine,
        rebuild=rebuild,
        threads=threads,
        device=device,
        spec=spec_of(spec_file),
        model=model,
    ) as opened:
        recipe = recipe_of(
            opened.spec,
            seed=seed,
            sampler=sampler,
            steps=steps,
            eta=eta,
            spacing=spacing,
            label=label,
            guidance=guidance,
            observe=observe,
            respacing=respacing,
        )
        with settings("See: ddpm-deploy sample --help"):
            table = recipe.table(opened.spec)
            SeededNoise(seed, [start + count - 1], opened.spec.sample_shape)  # the last index fits
        note_untrained(opened.spec, table)
        rows = len(table)
        run = Run(
            folder=output,
            engine=opened,
            recipe=recipe,
            start=start,
            count=count,
            batch=batch or (None if overwrite else recorded_batch(output)) or batch_for(opened),
            origin=["ddpm-deploy", *sys.argv[1:]],
        )
        if gif and not run.pictures:
            raise DDPMDeployError("These samples are no pictures, so there is no --gif.")
        run.prepare(overwrite=overwrite)
        missing = run.missing()
        if missing < count:
            note(f"{output} holds {count - missing} of {count} images; {missing} to draw")
        gif_path = output / GIF_NAME if gif else None
        blocks = sum(1 for _ in run.blocks(gif=gif_path))
        drawn = 0
        first_step: float | None = None

        def left() -> int:
            return missing - drawn

        try:
            with (
                Progress(f"sampling on {opened.name}", rows * blocks, "steps") as progress,
                closing(run.draw(gif=gif_path, on_step=lambda _: advance())) as paths_drawn,
            ):

                def advance() -> None:
                    nonlocal first_step
                    if first_step is None:
                        first_step = seconds_since_start()
                    progress.advance(extra=f"{count - left()} of {count} images")

                for _ in paths_drawn:
                    drawn += 1
                seconds = progress.seconds
        except (KeyboardInterrupt, OSError) as error:
            there = count - run.missing()  # one may have been written and not yet counted
            note(f"{there} of {count} images are in {output}; the same command continues")
            if isinstance(error, OSError):
                raise
            raise typer.Exit(130) from error
        paths = run.finish(
            {
                "seconds": seconds,
                "images drawn": drawn,
                "steps per second": rows * blocks / max(seconds, 1e-9),
                **({} if first_step is None else {"seconds to the first step": first_step}),
            }
        )
        if gif_path:
            paths.append(gif_path)
        if npz:
            run.write_npz(output / NPZ_NAME)
            paths.append(output / NPZ_NAME)
        if json:
            print_json(
                {
                    "folder": str(output),
                    "images": [str(run.path(i)) for i in run.images],
                    "files": [str(path) for path in paths],
                    "drawn": drawn,
                    "seconds": seconds,
                    "steps": rows,
                    "batch": run.batch,
                    "engine": opened.describe(),
                }
            )
        else:
            for image in run.images:
                typer.echo(run.path(image))
            for path in paths:
                typer.echo(path)
