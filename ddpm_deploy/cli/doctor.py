"""`ddpm-deploy doctor`: what this machine can do."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer

from ddpm_deploy.cli.common import Json, print_json, print_table

if TYPE_CHECKING:
    from ddpm_deploy.doctor import Finding, Report


def command(json: Json = False) -> None:
    """Say what this machine can run, what is missing, and what is wrong.

    Exits 1 if no engine can run here, or something is wrong.
    """
    from ddpm_deploy._version import __version__
    from ddpm_deploy.doctor import examine

    report = examine()
    if json:
        print_json({"ddpm_deploy": __version__, **report.as_json()})
    else:
        typer.echo(f"ddpm-deploy {__version__}")
        _print(report)
    raise typer.Exit(0 if report.ok else 1)


def _print(report: Report) -> None:
    from rich.table import Table

    for line in _about(report.machine):
        typer.echo(line)
    typer.echo()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for package in report.packages:
        if package.version:
            table.add_row(package.name, package.version, package.detail)
    print_table(table)
    _echo("not installed: " + ", ".join(p.name for p in report.packages if not p.version))
    typer.echo()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for each in report.commands:
        mark = "[green]ok[/]" if each.ok else "[yellow]--[/]"
        table.add_row(mark, each.command, each.detail.replace("[", r"\["))
    print_table(table)
    fixes: dict[str, list[str]] = {}
    for each in report.commands:
        if each.fix:
            fixes.setdefault(each.fix, []).append(each.command)
    for fix, commands in fixes.items():
        _echo(f"to add {', '.join(commands)}:")
        _echo_command(fix)
    typer.echo()
    for finding in report.findings:
        _print_finding(finding)
    if not report.can_run:
        typer.echo("nothing here can run an engine yet")
    elif not report.findings:
        typer.echo("nothing is wrong")


def _about(machine: dict[str, Any]) -> Iterator[str]:
    """Yields the machine in lines."""
    yield f"Python {machine['python']}, {machine['platform']}"
    memory = _size(machine["memory"])
    if machine["memory_available"] is not None:
        memory += f" ({_size(machine['memory_available'])} free)"
    yield f"{machine['cores']} cores, memory {memory}, disk {_size(machine['free_disk'])} free"
    if jetson := machine["jetson"]:
        yield jetson["model"] or "NVIDIA Jetson"
        yield f"JetPack {jetson['jetpack']} (Jetson Linux {jetson['l4t']})"
    for gpu in machine["gpus"]:
        shared = " shared with the CPU" if gpu["integrated"] else ""
        yield (
            f"GPU {gpu['name']}, compute capability {gpu['compute_capability']}, "
            f"{_size(gpu['memory'])}{shared}"
        )
    if not machine["gpus"]:
        yield f"no NVIDIA GPU: {machine['cuda_error'] or 'CUDA finds none'}"
    if machine["cuda"]:
        yield f"driver {machine['driver'] or 'of unknown version'}, runs CUDA {machine['cuda']}"


def _print_finding(finding: Finding) -> None:
    _echo(f"wrong: {finding.what}", indent="  ")
    if finding.is_command:
        _echo_command(finding.fix)
    else:
        _echo(f"  {finding.fix}", indent="  ")


def _echo(text: str, indent: str = "  ") -> None:
    lines = textwrap.wrap(
        text, 80, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    for line in lines:
        typer.echo(line)


def _echo_command(line: str) -> None:
    r"""Prints a command to be copied; a long one goes on after `&&` or `\`."""
    commands = [line] if len(line) <= 76 else line.split(" && ")
    wrapped = (
        textwrap.wrap(each, 70, break_long_words=False, break_on_hyphens=False) for each in commands
    )
    typer.echo("    " + " &&\n    ".join(" \\\n      ".join(parts) for parts in wrapped))


def _size(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"
