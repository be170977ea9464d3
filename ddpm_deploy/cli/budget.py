"""`ddpm-deploy budget`: what may a deployed loop differ by?"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    print_table,
    recipe_of,
    settings,
    spec_of,
)
from ddpm_deploy.errors import DDPMDeployError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ddpm_deploy.engines.base import Engine
    from ddpm_deploy.run import Recipe
    from ddpm_deploy.verify.budget import Arithmetic
    from ddpm_deploy.verify.expect import Expectation


def command(
    network: Annotated[
        Path, typer.Argument(help="The trained checkpoint, or a float32 engine of it.")
    ] = Path("ckpt.pt"),
    precision: Annotated[
        str,
        typer.Option(help="What the deployed engine computes in: fp32, tf32, fp16, bf16, int8."),
    ] = "fp32",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the budget here, as TOML.")
    ] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Images to draw.")] = 4,
    factor: Annotated[
        float | None,
        typer.Option(help="What is allowed, in times the expected errors; 4 if left out."),
    ] = None,
    timesteps: Annotated[
        int | None,
        typer.Option(min=1, help="So many timesteps, drawn over the schedule, for a quick look."),
    ] = None,
    sampler: SamplerName = None,
    steps: Steps = None,
    eta: Eta = None,
    spacing: SpacingName = None,
    respacing: Respacing = None,
    seed: Seed = 0,
    label: Label = None,
    guidance: Guidance = 1.0,
    observe: Observe = None,
    model: ModelName = None,
    spec_file: SpecFile = None,
    threads: Threads = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Say what a deployed loop may differ by, for verify --budget.

    Runs the float32 network's loop, measures what rounding does inside of the
    network and what the loop makes of it, and prints what each precision
    should err by. verify holds an engine to the file.
    """
    from ddpm_deploy.engines import open_engine
    from ddpm_deploy.files import whole_file
    from ddpm_deploy.verify.budget import ARITHMETICS
    from ddpm_deploy.verify.expect import FACTOR, expected
    from ddpm_deploy.verify.loops import engine_loop
    from ddpm_deploy.verify.sampled import drawn_steps

    if precision not in ARITHMETICS:
        raise typer.BadParameter(
            f"{precision!r} is none of {', '.join(ARITHMETICS)}", param_hint="--precision"
        )
    if timesteps is not None and steps is not None:
        raise typer.BadParameter("it and --steps both choose timesteps", param_hint="--timesteps")
    factor = FACTOR if factor is None else factor
    if not 1 <= factor < float("inf"):
        raise typer.BadParameter(f"{factor} is not at least 1 and finite", param_hint="--factor")
    with (
        open_engine(
            network, threads=threads, device=device, spec=spec_of(spec_file), model=model
        ) as engine,
        # Opened before the loop: a place that cannot be written shall not cost the work.
        nullcontext() if output is None else whole_file(output) as partial,
        ExitStack() as stack,
    ):
        _check_float32(engine)
        recipe = recipe_of(
            engine.spec,
            seed=seed,
            sampler=sampler,
            steps=steps if timesteps is None else drawn_steps(engine.spec, timesteps, seed=seed),
            eta=eta,
            spacing=spacing,
            label=label,
            guidance=guidance,
            observe=observe,
            example=True,
            respacing=respacing,
        )
        with settings("See: ddpm-deploy budget --help"):
            loop = engine_loop(engine, recipe, range(count))
            note_untrained(engine.spec, loop.table)
            progress = stack.enter_context(
                Progress(f"rounding on {engine.name}", len(loop.table), "steps")
            )
            found = expected(
                loop, recipe, range(count), factor=factor, on_step=lambda _: progress.advance()
            )
        chosen = found[precision]
        budget = chosen.budget()
        if partial is not None:
            partial.write_text(
                budget.to_toml(comment=_origin(engine, recipe, count, chosen)), encoding="utf-8"
            )
    if output is not None:
        note(f"budget for {precision}: {output}")
    if json:
        print_json(
            {
                "precision": precision,
                "budget": budget.to_dict(),
                "expected": {name: e.to_dict() for name, e in found.items()},
            }
        )
    else:
        _print(found)
        if output is None:
            note("to keep the budget of one: --precision fp16 -o budget.toml")


def _check_float32(engine: Engine) -> None:
    if engine.precision != "fp32":
        raise DDPMDeployError(
            f"{engine.path} computes in {engine.precision}; what rounding does is measured on the "
            "float32 network.",
            hint="Give the checkpoint, or the engine before --fp16: ddpm-deploy budget ckpt.pt",
        )


def _origin(engine: Engine, recipe: Recipe, count: int, chosen: Expectation) -> str:
    """Returns what a budget was derived from, for the head of its file."""
    from dataclasses import fields

    from ddpm_deploy import Recipe
    from ddpm_deploy._version import __version__

    told = {f.name: getattr(recipe, f.name) for f in fields(Recipe)}
    sampler, loop = recipe.loop(engine.spec)
    told |= {"sampler": sampler, "steps": loop.steps, "eta": loop.eta, "spacing": loop.spacing}
    told["observations"] = ", ".join(recipe.observations) or None
    if isinstance(recipe.steps, tuple):
        told["steps"] = f"{len(recipe.steps)} timesteps, drawn over the schedule"
    said = ", ".join(f"{name} {value}" for name, value in told.items() if value is not None)
    return "\n".join(
        [
            f"What a loop in {chosen.arithmetic} may differ by. docs/parity.md has the derivation.",
            f"network: {Path(engine.path).name}, SHA-256 {engine.sha256}",
            f"loop: {said}; {count} images",
            f"expected at worst: local error of the output {chosen.worst('local', 'out'):.1e}, "
            f"accumulated error of x {chosen.worst('accumulated', 'x'):.1e}",
            _amplification(chosen),
            f"allowed: {chosen.factor:g} times what is expected",
            f"tool: ddpm-deploy {__version__}",
        ]
    )


def _amplification(expected: Expectation) -> str:
    factor = expected.amplification
    said = "none, since no step errs" if factor is None else f"{factor:.3g}"
    return f"amplification from local to accumulated x: {said}"


def _print(found: Mapping[Arithmetic, Expectation]) -> None:
    from rich.table import Table

    some = next(iter(found.values()))
    table = Table(
        title="expected errors over the reference's peak, the worst timestep", title_justify="left"
    )
    for name in ("precision", "local out", "free out", "free x", "within a level", "PSNR, worst"):
        table.add_column(name, justify="right")
    for arithmetic, e in found.items():
        table.add_row(
            arithmetic,
            f"{e.worst('local', 'out'):.1e}",
            f"{e.worst('accumulated', 'out'):.1e}",
            f"{e.worst('accumulated', 'x'):.1e}",
            f"{e.pictures.close:.2%}",
            "identical" if e.pictures.largest == 0 else f"{min(e.pictures.psnr):.1f} dB",
        )
    print_table(table)
    typer.echo(_amplification(some))
    typer.echo(f"a budget allows {some.factor:g} times the errors")
