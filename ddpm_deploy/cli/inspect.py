"""`ddpm-deploy inspect`: what a file says it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ddpm_deploy.cli.common import (
    Json,
    ModelName,
    SpecFile,
    note,
    print_json,
    print_table,
    size,
    spec_of,
)
from ddpm_deploy.cli.describe_checkpoint import loop_in_words, parse_settings, parse_size

if TYPE_CHECKING:
    from ddpm_deploy.spec import Condition, ModelSpec


def command(
    file: Annotated[Path, typer.Argument(help="An engine or a checkpoint.")],
    image_size: Annotated[
        str | None, typer.Option(help="Of a checkpoint that does not say: 32, or 16x24.")
    ] = None,
    said: Annotated[
        list[str] | None,
        typer.Option("--set", help="A fact of a checkpoint that does not say: --set heads=4."),
    ] = None,
    model: ModelName = None,
    spec_file: SpecFile = None,
    json: Json = False,
) -> None:
    """Print what a file is: network, precision, memory, where it runs.

    Nothing is run, and no plan is loaded: its sidecar is read. Of a checkpoint
    the weights are.
    """
    from rich.table import Table
    from rich.text import Text

    from ddpm_deploy.cli.facts import checkpoint_facts, graph_facts, plan_facts
    from ddpm_deploy.engines.base import check_path
    from ddpm_deploy.files import sha256

    check_path(file)
    match file.suffix:
        case ".plan":
            facts = plan_facts(file)
        case ".onnx":
            facts = graph_facts(file)
        case _:
            facts = checkpoint_facts(
                file,
                image_size=parse_size(image_size),
                settings=parse_settings(said or []),
                spec=spec_of(spec_file),
                model=model,
            )
    if file.is_dir():
        nbytes = sum(each.stat().st_size for each in file.rglob("*") if each.is_file())
        digest = facts.spec.checkpoint_sha256 if facts.spec else ""
    else:
        nbytes, digest = file.stat().st_size, sha256(file)
    if facts.missing:
        note(f"note: {facts.missing}")
    if json:
        spec = None if facts.spec is None else facts.spec.to_dict()
        head = {"file": str(file), "bytes": nbytes, "sha256": digest}
        print_json({**head, **facts.data, "spec": spec})
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    rows = [("file", str(file)), ("is", facts.kind), ("size", size(nbytes)), ("sha256", digest)]
    rows += (
        [("spec", "none: no other command takes this file; `ddpm-deploy export` writes one")]
        if facts.spec is None
        else spec_rows(facts.spec)
    )
    before = ""
    for key, value in [*rows, *facts.rows]:
        # As text, so that no bracket in a name is read as markup
        table.add_row(Text("" if key == before else key), Text(value))
        before = key
    print_table(table)
    if facts.command:  # on a line of its own, whole, so that it can be copied
        typer.echo(f"build it again:\n  {facts.command}")


def spec_rows(spec: ModelSpec) -> Iterator[tuple[str, str]]:
    """Yields what a network is, as lines of the table."""
    low, high = spec.value_range
    yield "samples", f"{' x '.join(map(str, spec.sample_shape))}, values {low:g} to {high:g}"
    yield "schedule", str(spec.schedule)
    yield "predicts", f"{spec.prediction}, variance {spec.variance}"
    yield "x_0", "not clipped" if spec.clip is None else f"clipped to ±{spec.clip:g}"
    yield "sampler", f"{loop_in_words(spec)} (its family's own)"
    yield "trained at", f"t = {spec.first_timestep} to {spec.schedule.T - 1}"
    yield "family", spec.family
    yield "checkpoint", spec.checkpoint_sha256 or "not recorded"
    yield "written by", f"ddpm-deploy {spec.tool_version}"
    if spec.weights:
        yield "weights", spec.weights
    if spec.guidance is not None:
        yield "guidance", f"inside the graph, scale {spec.guidance:g}"
    for name, value in spec.network.items():
        yield "facts", f"{name} {value}"
    for condition in spec.conditions:
        yield f"condition {condition.name}", describe(condition)


def describe(condition: Condition) -> str:
    """Returns a condition in words."""
    text = f"{condition.meaning}, {condition.dtype} {condition.shape}"
    if condition.classes is not None:
        text += f", {condition.classes} classes"
    if condition.names != tuple(map(str, range(len(condition.names)))):
        text += " (" + ", ".join(f"{i} {name}" for i, name in enumerate(condition.names)) + ")"
    return text if condition.null is None else f"{text}, {condition.null} for none"
