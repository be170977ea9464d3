"""`ddpm-deploy inspect`: what a file says it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ddpm_deploy.cli.common import Json, print_json, print_table

if TYPE_CHECKING:
    from ddpm_deploy.spec import Condition


def command(
    file: Annotated[Path, typer.Argument(help="An engine or a checkpoint.")],
    json: Json = False,
) -> None:
    """Print what a network is: shapes, schedule, conditions, origin."""
    from rich.table import Table

    from ddpm_deploy.engines import open_engine
    from ddpm_deploy.files import sha256

    with open_engine(file, device="cpu") as engine:
        spec = engine.spec
        data = {
            "file": str(file),
            "sha256": sha256(file),
            "engine": engine.name,
            "fused": engine.fused,
            **spec.to_dict(),
        }
    if json:
        print_json(data)
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows = {
        "file": file,
        "sha256": data["sha256"],
        "engine": engine.name,
        "step": "fused behind the network" if engine.fused else "in NumPy",
        "samples": " x ".join(map(str, spec.sample_shape))
        + f", values {spec.value_range[0]:g} to {spec.value_range[1]:g}",
        "schedule": spec.schedule,
        "predicts": f"{spec.prediction}, variance {spec.variance}",
        "x_0": "not clipped" if spec.clip is None else f"clipped to ±{spec.clip:g}",
        "sampler": f"{spec.sampler} (its family's own), pixels rounded: {spec.rounding}",
        "trained at": f"t = {spec.first_timestep} to {spec.schedule.T - 1}",
        "family": spec.family,
        "checkpoint": spec.checkpoint_sha256 or "not recorded",
        "written by": f"ddpm-deploy {spec.tool_version}",
    }
    for condition in spec.conditions:
        rows[f"condition {condition.name}"] = describe(condition)
    for key, value in rows.items():
        table.add_row(key, str(value))
    print_table(table)


def describe(condition: Condition) -> str:
    """Returns a condition in words."""
    text = f"{condition.meaning}, {condition.dtype} {condition.shape}"
    if condition.classes is not None:
        text += f", {condition.classes} classes"
    if condition.names != tuple(map(str, range(len(condition.names)))):
        text += " (" + ", ".join(f"{i} {name}" for i, name in enumerate(condition.names)) + ")"
    return text if condition.null is None else f"{text}, {condition.null} for none"
