"""`ddpm-deploy verify`: is the deployed loop the trained model?"""

from __future__ import annotations

import json as json_module
from contextlib import nullcontext
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
    from ddpm_deploy.spec import ModelSpec

ROWS = 12
"""Timesteps that the table shows; --json has all of them."""


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
    from dataclasses import replace
    from typing import cast

    from ddpm_deploy._version import __version__
    from ddpm_deploy.engines import open_engine
    from ddpm_deploy.files import sha256, whole_file
    from ddpm_deploy.run import Recipe
    from ddpm_deploy.sampling import Sampler, Spacing
    from ddpm_deploy.verify import Budget, Verifier, differing_fields

    with (
        open_engine(engine, threads=threads, device=device) as deployed,
        open_engine(against, threads=threads, device=device, spec=deployed.spec) as reference,
        # Opened before the loop: a place that cannot be written shall not cost the work.
        nullcontext() if output is None else whole_file(output) as partial,
    ):
        spec = deployed.spec
        differences = differing_fields(reference.spec, spec)
        recipe = Recipe(
            seed=seed,
            sampler=cast("Sampler | None", sampler),
            steps=steps,
            eta=eta,
            spacing=cast("Spacing", spacing),
            labels=parse_labels(label, spec),
            guidance=guidance,
        )
        given = {"local": local, "accumulated": accumulated, "pixels": pixels}
        budget = replace(
            Budget.of(deployed.precision),
            **{name: value for name, value in given.items() if value is not None},
        )
        with settings("See: ddpm-deploy verify --help"):
            verifier = Verifier(reference, deployed, recipe, range(count), budget=budget)
        note_untrained(spec, verifier.table)
        what = f"{deployed.name} against {reference.name}"
        with Progress(what, len(verifier), "steps") as progress:
            for _ in verifier:
                progress.advance()
        result = verifier.result
        failures = [f"the specs differ in {line}" for line in differences] + result.failures
        report = {
            "tool": f"ddpm-deploy {__version__}",
            "engine": {**deployed.describe(), "sha256": sha256(engine)},
            "reference": {**reference.describe(), "sha256": sha256(against)},
            "same_checkpoint": _same_checkpoint(reference.spec, spec),
            "seed": seed,
            "images": count,
            "sampler": sampler or spec.sampler,
            "labels": list(recipe.labels or ()),
            "guidance": guidance,
            "seconds": progress.seconds,
            **result.to_dict(),
            "passed": not failures,
            "failures": failures,
        }
        if partial is not None:
            partial.write_text(json_module.dumps(report, indent=2) + "\n", encoding="utf-8")
    if output is not None:
        note(f"report: {output}")
    if json:
        print_json(report)
    else:
        _print(report, what)
    raise typer.Exit(1 if failures else 0)


def _same_checkpoint(reference: ModelSpec, engine: ModelSpec) -> bool | None:
    """Tells whether both come from one file; None where one of them does not say."""
    hashes = reference.checkpoint_sha256, engine.checkpoint_sha256
    return hashes[0] == hashes[1] if all(hashes) else None


def _print(report: dict[str, object], what: str) -> None:
    from typing import Any, cast

    from rich.table import Table

    data = cast("dict[str, Any]", report)
    steps = data["steps"]
    typer.echo(f"{what}, {data['images']} images, {len(steps)} steps")
    table = Table(title="largest error over the reference's peak", title_justify="left")
    for name in ("t", "local ε", "local x_0", "local x", "free ε", "free x_0", "free x"):
        table.add_column(name, justify="right")
    shown = sorted({round(i * (len(steps) - 1) / (ROWS - 1)) for i in range(ROWS)}) if steps else []
    for i in shown:
        step = steps[i]
        keys = ("local_out", "local_x0", "local_x", "out", "x0", "x")
        table.add_row(str(step["t"]), *(f"{step[key]:.1e}" for key in keys))
    print_table(table)
    if steps:
        worst = max(steps, key=lambda step: step["local_out"])
        drift = max(steps, key=lambda step: step["x"])
        budget = data["budget"]
        typer.echo(
            f"local ε: at most {worst['local_out']:.1e}, at t = {worst['t']} "
            f"(budget {budget['local']:.0e})"
        )
        typer.echo(
            f"free x (accumulated): at most {drift['x']:.1e}, at t = {drift['t']} "
            f"(budget {budget['accumulated']:.0e})"
        )
        finite = [value for value in data["psnr"] if value is not None]
        worst_psnr = f"{min(finite):.1f} dB at worst" if finite else "identical"
        typer.echo(
            f"images: {data['equal_pixels']:.3%} of pixels equal, {data['close_pixels']:.3%} "
            f"within one level, PSNR {worst_psnr}"
        )
    if data["same_checkpoint"] is False:
        typer.echo("note: the engine was exported from another checkpoint file than this one")
    for line in data["failures"]:
        typer.echo(f"outside: {line}")
    typer.echo("verdict: " + ("the same model" if data["passed"] else "NOT the same model"))
