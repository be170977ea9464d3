"""`ddpm-deploy verify`: is the deployed loop the trained model?"""

from __future__ import annotations

import json as json_module
import sys
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
    Progress,
    SamplerName,
    Seed,
    SpacingName,
    Steps,
    Threads,
    note,
    note_untrained,
    parse_labels,
    print_json,
    print_table,
    settings,
)

if TYPE_CHECKING:
    from ddpm_deploy.verify.verification import Verification

ROWS = 12
"""Timesteps that the table shows; --json has all of them."""

_PARTS = ("out", "x0", "x")


def command(
    engine: Annotated[Path, typer.Option("--engine", "-e", help="The deployed engine.")] = Path(
        "unet.onnx"
    ),
    against: Annotated[
        Path, typer.Option("--against", help="The trained checkpoint, or another engine.")
    ] = Path("ckpt.pt"),
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Images to draw.")] = 4,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the whole report here, as JSON.")
    ] = None,
    sampler: SamplerName = None,
    steps: Steps = None,
    eta: Eta = 0.0,
    spacing: SpacingName = "leading",
    seed: Seed = 0,
    label: Label = None,
    guidance: Guidance = 1.0,
    local: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Budget: output error on the reference's x_t, of the peak; 2e-5, fp16 5e-3, "
            "bf16 4e-2.",
        ),
    ] = None,
    accumulated: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Budget: error of x_t when both run free, of the peak; 1e-3, fp16 1e-2, "
            "bf16 5e-2.",
        ),
    ] = None,
    pixels: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Budget: least share of pixels within one level of 255; 0.999, fp16 0.99, "
            "bf16 0.95.",
        ),
    ] = None,
    threads: Threads = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Compare a deployed loop with the trained model, step by step.

    Local error: both networks are fed the reference's own x_t. Accumulated
    error: each runs free on the same noise. Exits 1 outside the budget.
    """
    from typing import cast

    from ddpm_deploy.engines import open_engine
    from ddpm_deploy.files import whole_file
    from ddpm_deploy.run import Recipe
    from ddpm_deploy.sampling import Sampler, Spacing
    from ddpm_deploy.verify import Budget, StepErrors, Verifier
    from ddpm_deploy.verify.verification import verify

    with (
        open_engine(engine, threads=threads, device=device) as deployed,
        open_engine(against, threads=threads, device=device, spec=deployed.spec) as reference,
        # Opened before the loop: a place that cannot be written shall not cost the work.
        nullcontext() if output is None else whole_file(output) as partial,
    ):
        recipe = Recipe(
            seed=seed,
            sampler=cast("Sampler | None", sampler),
            steps=steps,
            eta=eta,
            spacing=cast("Spacing", spacing),
            labels=parse_labels(label, deployed.spec),
            guidance=guidance,
        )
        budget = Budget.of(deployed.precision).changed(
            local=local, accumulated=accumulated, pixels=pixels
        )
        with ExitStack() as stack:
            progress: Progress | None = None

            def start(verifier: Verifier) -> None:
                nonlocal progress
                note_untrained(deployed.spec, verifier.table)
                what = f"{deployed.name} against {reference.name}"
                progress = stack.enter_context(Progress(what, len(verifier), "steps"))

            def advance(_: StepErrors) -> None:
                if progress is not None:
                    progress.advance()

            with settings("See: ddpm-deploy verify --help"):
                found = verify(
                    deployed,
                    reference,
                    recipe,
                    range(count),
                    budget=budget,
                    command=sys.argv,
                    on_start=start,
                    on_step=advance,
                )
        report = found.to_dict()
        if partial is not None:
            partial.write_text(json_module.dumps(report, indent=2) + "\n", encoding="utf-8")
    if output is not None:
        note(f"report: {output}")
    if json:
        print_json(report)
    else:
        _print(found)
    raise typer.Exit(0 if found.passed else 1)


def _print(found: Verification) -> None:
    from rich.table import Table

    result, steps = found.comparison, found.comparison.steps
    what = f"{found.engine['name']} against {found.reference['name']}"
    typer.echo(f"{what}, {len(found.images)} images, {found.sampled.says}")
    table = Table(title="largest error over the reference's peak", title_justify="left")
    for name in ("t", "local ε", "local x_0", "local x", "free ε", "free x_0", "free x"):
        table.add_column(name, justify="right")
    shown = sorted({round(i * (len(steps) - 1) / (ROWS - 1)) for i in range(ROWS)}) if steps else []
    for i in shown:
        step = steps[i]
        parts = [getattr(side, name) for side in (step.local, step.accumulated) for name in _PARTS]
        table.add_row(str(step.t), *(f"{part.max:.1e}" for part in parts))
    print_table(table)
    for check in result.checks:
        typer.echo(f"{'ok' if check.passed else 'outside'}: {check.says}")
    if result.pictures is not None:
        worst = min(result.pictures.psnr)
        psnr = "identical" if worst == float("inf") else f"{worst:.1f} dB at worst"
        typer.echo(f"images: {result.pictures.equal:.3%} of pixels equal, PSNR {psnr}")
    if found.same_checkpoint is False:
        typer.echo("note: the engine was exported from another checkpoint file than this one")
    typer.echo("verdict: " + ("the same model" if found.passed else "NOT the same model"))
