"""`ddpm-deploy doctor`: what this machine can do."""

from __future__ import annotations

import typer

from ddpm_deploy.cli.common import Json, print_json, print_table


def command(json: Json = False) -> None:
    """Say what this machine can run, and what is missing. Exits 1 if nothing."""
    from dataclasses import asdict

    from rich.table import Table

    from ddpm_deploy._version import __version__
    from ddpm_deploy.doctor import can_run, findings, machine

    found, here = findings(), machine()
    able = can_run(found)
    if json:
        report = {"ddpm_deploy": __version__, "machine": here, "findings": [*map(asdict, found)]}
        print_json({**report, "can_run": able})
        raise typer.Exit(0 if able else 1)
    typer.echo(f"ddpm-deploy {__version__}, Python {here['python']}, {here['platform']}")
    typer.echo(
        f"{here['cores']} cores, {here['memory'] / 2**30:.1f} GiB memory, "
        f"{here['free_disk'] / 2**30:.1f} GiB free on this disk"
    )
    if here["jetson"]:
        typer.echo(f"Jetson: {here['jetson']}")
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for finding in found:
        mark = "[green]ok[/]" if finding.ok else "[yellow]--[/]"
        table.add_row(mark, finding.what, finding.detail)
    print_table(table)
    for fix in dict.fromkeys(finding.fix for finding in found if finding.fix):
        typer.echo(f"to add: {fix}")
    if not able:
        typer.echo("nothing here can run an engine yet")
    raise typer.Exit(0 if able else 1)
