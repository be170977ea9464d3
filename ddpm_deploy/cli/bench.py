"""`ddpm-deploy bench`: engines side by side with the torch loop."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddpm_deploy.cli.common import (
    Device,
    Json,
    ModelName,
    Observe,
    Respacing,
    Seed,
    Threads,
    note,
    print_json,
    print_table,
    rate,
    recipe_of,
    settings,
)


def command(
    engine: Annotated[
        list[Path] | None, typer.Option("--engine", "-e", help="Engine to time; may be repeated.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", help="Checkpoint for the loop in PyTorch.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at once.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Steps a turn.")] = 20,
    repeat: Annotated[int, typer.Option(min=1, help="Turns each; the engines take turns.")] = 5,
    warm_up: Annotated[int, typer.Option(min=1, help="Steps before the clock starts.")] = 5,
    respacing: Respacing = None,
    seed: Seed = 0,
    observe: Observe = None,
    model: ModelName = None,
    threads: Threads = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Time steps of the sampling loop, each engine side by side.

    steps/s counts steps of the whole batch; images/s is for the family's own
    sampler over all its steps, or those of --respacing. Ratios are to the torch
    loop, or the first row.
    """
    from dataclasses import asdict

    from rich.table import Table

    from ddpm_deploy._version import __version__
    from ddpm_deploy.bench import Loop, engine_loop, measure
    from ddpm_deploy.doctor import machine
    from ddpm_deploy.engines import Engine, open_engine
    from ddpm_deploy.engines.base import check_path, is_checkpoint, needs
    from ddpm_deploy.errors import EngineError

    if against is not None:
        check_path(against)
        if not is_checkpoint(against):
            raise EngineError(
                f"{against} is no checkpoint, so it has no loop in PyTorch.",
                hint=f"Time it as an engine: --engine {against}",
            )
    paths = list(dict.fromkeys(engine or [Path("unet.onnx")]))
    opened: list[Engine] = [open_engine(path, threads=threads, device=device) for path in paths]
    loops: dict[str, Loop] = {}
    hint = "Time engines of one schedule, or leave --respacing out."
    rows: dict[str, int] = {}
    spec = opened[0].spec
    recipe = recipe_of(
        spec,
        seed=seed,
        sampler=None,
        steps=None,
        eta=None,
        spacing=None,
        label=None,
        guidance=1.0,
        observe=observe,
        example=True,
        respacing=respacing,
    )
    if against is not None:
        with needs("torch", extra="export"):
            from ddpm_deploy.engines.pytorch import TorchEngine, torch_loop
        reference = TorchEngine.open(
            against, threads=threads, device=device, spec=spec, model=model
        )
        name = f"{reference.name} loop"
        with settings(hint):
            loops[name] = torch_loop(reference, recipe, batch)
            rows[name] = len(recipe.table(reference.spec))
    alike = len({path.name for path in paths}) < len(paths)
    for each in opened:
        name = f"{each.name} {each.path if alike else each.path.name}"
        with settings(hint):
            loops[name] = engine_loop(each, recipe, batch)
            rows[name] = len(recipe.table(each.spec))
    shortest = min(steps, *rows.values())
    note(f"timing at batch {batch}: {len(loops)} x {repeat} turns of {shortest} steps")
    results = [*measure(loops, batch=batch, rows=rows, steps=steps, repeat=repeat, warm_up=warm_up)]
    for each in opened:
        each.close()
    base = results[0].median
    if json:
        print_json(
            {
                "tool": f"ddpm-deploy {__version__}",
                "machine": machine(),
                "threads": threads,
                "results": [
                    {
                        **asdict(r),
                        "steps_per_second": r.steps_per_second,
                        "ratio": base / r.median,
                    }
                    for r in results
                ],
            }
        )
        return
    lengths = " or ".join(map(str, dict.fromkeys(rows.values())))
    table = Table(title=f"batch {batch}, {lengths} steps an image", title_justify="left")
    table.add_column("loop", overflow="fold")
    for name in ("step ms", "p90", "steps/s", "images/s", "loop's own", "ratio"):
        table.add_column(name, justify="right")
    for r in results:
        table.add_row(
            r.name,
            f"{1000 * r.median:.2f}",
            f"{1000 * r.p90:.2f}",
            rate(r.steps_per_second),
            rate(r.images_per_second),
            "" if r.overhead == 0 else f"{r.overhead:.1%}",
            f"{base / r.median:.2f}",
        )
    print_table(table)
