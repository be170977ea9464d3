"""What a user says of a checkpoint, and what was found out about it, as a table."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import typer

from ddpm_deploy.images import is_picture

if TYPE_CHECKING:
    from ddpm_deploy.model.facts import Fact
    from ddpm_deploy.spec import ModelSpec


def parse_size(text: str | None) -> tuple[int, ...] | None:
    """Reads `--image-size`: a side, `height x width`, or a sequence's length."""
    if text is None:
        return None
    parts = text.lower().replace(",", "x").split("x")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts) or len(parts) > 2:
        raise typer.BadParameter(
            f"{text!r} is neither a side, such as 32, nor height x width, such as 16x24",
            param_hint="--image-size",
        )
    return tuple(int(part) for part in parts)


def parse_settings(texts: Sequence[str]) -> dict[str, str]:
    """Reads the `--set NAME=VALUE`s."""
    settings = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise typer.BadParameter(f"{text!r} is not NAME=VALUE", param_hint="--set")
        name = name.strip().replace("-", "_")
        if name in settings:
            raise typer.BadParameter(f"{name} is given twice", param_hint="--set")
        settings[name] = value.strip()
    return settings


def facts_rows(facts: Sequence[Fact]) -> Iterator[tuple[str, str, str, str]]:
    """Yields name, value, source, and what to type to say otherwise, of each fact."""
    for fact in facts:
        source = fact.source.upper() if fact.source == "assumed" else fact.source
        yield fact.name, _in_words(fact.value), source, fact.option


def _in_words(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_in_words, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def loop_in_words(spec: ModelSpec) -> str:
    """Returns the loop that `sample` runs where nothing is typed, in words."""
    loop = spec.sampling
    words = [spec.sampler, f"{len(spec.table())} of {spec.schedule.T} timesteps"]
    if spec.sampler == "ddim":
        words.append(f"eta {loop.eta:g}")
    elif spec.sampler == "ddpm":
        words.append(f"variance {spec.variance}")
    if isinstance(loop.steps, int) and loop.steps < spec.schedule.T:
        words.append(f"spacing {loop.spacing}")
    words.append("x_0 not clipped" if spec.clip is None else f"x_0 clipped to ±{spec.clip:g}")
    if is_picture(spec.sample_shape):
        words.append(f"pixels {'truncated' if spec.rounding == 'truncate' else 'rounded'}")
    elif spec.restore is not None:
        words.append("results in their own units")
    return ", ".join(words)


def print_facts(facts: Sequence[Fact]) -> None:
    """Prints every hyper-parameter with where it is from to stderr; the assumed ones stand out."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not facts:
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("what", "value", "from", "otherwise type"):
        table.add_column(heading, overflow="fold", no_wrap=heading != "value")
    for name, value, source, option in facts_rows(facts):
        style = "bold yellow" if source == "ASSUMED" else ""
        typed = "--set WHAT=..." if option.startswith("--set") else option
        table.add_row(*(Text(part, style=style) for part in (name, value, source, typed)))
    console = Console(file=sys.stderr, highlight=False)
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        typer.echo(line.rstrip(), err=True)
