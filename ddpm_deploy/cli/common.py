"""What several commands share."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddpm_deploy.errors import DDPMDeployError

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from ddpm_deploy.run import Recipe
    from ddpm_deploy.sampling import Table
    from ddpm_deploy.spec import ModelSpec

Threads = Annotated[
    int | None, typer.Option(min=1, max=256, help="CPU threads; the runtime's choice if left out.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]
SamplerName = Annotated[
    str | None, typer.Option(help="ddpm, ddim, dpmpp_2m or dome272; the family's if left out.")
]
Steps = Annotated[
    int | None, typer.Option(min=1, help="Transitions; the family's own, or all, if left out.")
]
Eta = Annotated[
    float | None, typer.Option(help="Share of noise in ddim, 0 to 1; the family's if left out.")
]
SpacingName = Annotated[
    str | None, typer.Option(help="How --steps are chosen: leading, linspace or trailing.")
]
Respacing = Annotated[
    str | None,
    typer.Option(help="Timesteps as OpenAI's timestep_respacing: 250, 10,15,20 or ddim25."),
]
Label = Annotated[
    str | None,
    typer.Option(help="Class: 3, cat, or 0,1,2 in turn, or none; all if left out."),
]
Guidance = Annotated[
    float, typer.Option(help="Classifier-free guidance s in u + s(c - u); 1 is none.")
]
Observe = Annotated[
    list[str] | None,
    typer.Option(
        "--observe",
        metavar="NAME=FILE",
        help="What the network is conditioned on: a .npy of (N, ...) numbers, image i taking row i "
        "mod N. May be repeated.",
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODULE:FACTORY",
        help="The code that makes your own network, which is run: mynet:make.",
    ),
]
SpecFile = Annotated[
    Path | None,
    typer.Option(
        "--spec",
        help="What a checkpoint does not say of itself: a spec.toml, or an engine made from it.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def _seed(value: int) -> int:
    if value >= 1 << 64:  # said here, since a range of 20 digits does not fit the help
        raise typer.BadParameter(f"{value} is not in 0..2^64-1")
    return value


Seed = Annotated[int, typer.Option(min=0, callback=_seed, help="Seed of the noise.")]


@contextmanager
def settings(hint: str = "") -> Iterator[None]:
    """Turns a ValueError about a user's setting into an error of ours.

    Args:
        hint: What to type instead.
    """
    try:
        yield
    except ValueError as error:
        message = str(error)
        raise DDPMDeployError(message[:1].upper() + message[1:] + ".", hint=hint) from error


def parse_labels(text: str | None, spec: ModelSpec) -> tuple[int, ...] | None:
    """Reads `--label`: a class by number or name, a list such as 0,1,2, or `none`.

    Where classes are called by numbers, a number is a name: folders 1 to 10 sort as 1, 10, 2.

    Returns:
        The labels, None where the option was left out.
    """
    if text is None:
        return None
    null = None if spec.label is None else spec.label.null
    if text == "none" and null is not None:
        return (null,)
    names = () if spec.label is None else spec.label.names
    numbered = any(name.isdecimal() for name in names)
    try:
        return tuple(
            names.index(part) if numbered or part in names else int(part)
            for part in map(str.strip, text.split(","))
        )
    except ValueError:
        known = f"; its classes are {', '.join(names)}" if names else ""
        raise typer.BadParameter(
            f"{text!r} is neither a label, nor a list such as 0,1,2"
            + (", nor none" if null is not None else "; this network has no null label")
            + known,
            param_hint="--label",
        ) from None


def recipe_of(
    spec: ModelSpec,
    *,
    seed: int,
    sampler: str | None,
    steps: int | tuple[int, ...] | None,
    eta: float | None,
    spacing: str | None,
    label: str | None,
    guidance: float,
    observe: Sequence[str] | None = None,
    example: bool = False,
    respacing: str | None = None,
) -> Recipe:
    """Makes a recipe of the options that say what loop it is; its table refuses unknown names.

    Args:
        spec: What the network is.
        seed: `--seed`.
        sampler: `--sampler`.
        steps: `--steps`, or the timesteps themselves.
        eta: `--eta`.
        spacing: `--spacing`.
        label: `--label`, as it was typed.
        guidance: `--guidance`.
        observe: The `--observe`s, as they were typed.
        example: Whether observations may be standard normal numbers where none is given, for loops
            that are compared or timed.
        respacing: `--respacing`; ddim and a number also choose that sampler, where none is named.
    """
    from typing import cast

    from ddpm_deploy.respacing import respaced, respaced_sampler
    from ddpm_deploy.run import Recipe
    from ddpm_deploy.sampling import Sampler, Spacing

    if respacing is not None:
        if steps is not None or spacing is not None:
            raise typer.BadParameter(
                "it chooses the timesteps itself; leave --steps, --spacing and --timesteps out",
                param_hint="--respacing",
            )
        with settings("Type --respacing 100, or ddim and a number, such as --respacing ddim25"):
            steps = respaced(spec.schedule.T, respacing)
        sampler = sampler or respaced_sampler(respacing)

    return Recipe(
        seed=seed,
        sampler=cast("Sampler | None", sampler),
        steps=steps,
        eta=eta,
        spacing=cast("Spacing | None", spacing),
        labels=parse_labels(label, spec),
        guidance=guidance,
        observations=parse_observations(observe or (), spec, example=example),
    )


def parse_observations(
    texts: Sequence[str], spec: ModelSpec, *, example: bool
) -> dict[str, tuple[tuple[float, ...], ...]]:
    """Reads the `--observe NAME=FILE.npy`s; the name may be left out where there is one input.

    Args:
        texts: As they were typed.
        spec: What the network is.
        example: As in `recipe_of`.

    Raises:
        DataError: A file is missing or damaged, or its array does not fit.
    """
    from ddpm_deploy.noise import SeededNoise
    from ddpm_deploy.observations import read_observations

    inputs = {condition.name: condition for condition in spec.observations}
    found = {}
    for text in texts:
        name, equals, file = text.partition("=")
        if not equals and len(inputs) == 1:
            name, file = next(iter(inputs)), text
        if name not in inputs:
            raise typer.BadParameter(
                f"{text!r} is not NAME=FILE with NAME one of {', '.join(inputs)}"
                if inputs
                else f"{text!r}: this network takes no observations",
                param_hint="--observe",
            )
        if name in found:
            raise typer.BadParameter(f"{name} is given twice", param_hint="--observe")
        found[name] = read_observations(Path(file), inputs[name])
    if example and (missing := inputs.keys() - found.keys()):
        note(f"note: standard normal numbers stand for {', '.join(sorted(missing))}; or --observe")
        for name in missing:
            drawn = SeededNoise(0, range(8), inputs[name].shape)(0)
            found[name] = tuple(tuple(row) for row in drawn.reshape(len(drawn), -1).tolist())
    return found


def spec_of(path: Path | None) -> ModelSpec | None:
    """Reads `--spec`, what a checkpoint does not say; None where it was left out.

    Raises:
        SpecError: The file says nothing, or is damaged.
        EngineError: As from `read_spec`.
    """
    if path is None:
        return None
    from ddpm_deploy.engines.base import needs, read_spec

    if path.suffix != ".toml":
        return read_spec(path)
    with needs("torch", extra="export"):
        from ddpm_deploy.model.spec_toml import read_spec_toml
    return read_spec_toml(path).spec


def note(text: str) -> None:
    """Prints a line about the work to stderr, above a bar or clock that stands there."""
    # By name, since a bar or clock puts a stream of its own there.
    typer.echo(text, file=sys.stderr, err=True)


def note_untrained(spec: ModelSpec, table: Table) -> None:
    """Says so where a loop ends at a timestep that training never saw (dome272's t = 0)."""
    if table[-1].t < spec.first_timestep:
        note(
            f"note: this network was trained from t = {spec.first_timestep} on, and the loop ends "
            f"at t = {table[-1].t}; --spacing trailing, or its own --sampler {spec.sampler}, does "
            "not"
        )


def print_json(value: Any) -> None:
    """Prints the result to stdout as JSON."""
    typer.echo(json.dumps(value, indent=2))


def print_table(table: RichTable) -> None:
    """Prints a table to stdout, as wide as the terminal, or 80 columns in a pipe."""
    from rich.console import Console

    console = Console(highlight=False)
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():  # rich fills every line up with spaces
        typer.echo(line.rstrip())


def rate(value: float) -> str:
    """Returns so many a second in three digits, and never as a power of ten."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def size(nbytes: int) -> str:
    """Returns bytes in words: `13.3 MB`, of 10^6 bytes."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.1f} {name}"
    return f"{nbytes} bytes"


class Progress:
    """A bar on a terminal's stderr, with speed and time left; silent in a pipe but for the end.

    Args:
        what: What is being done.
        total: How many units it takes.
        unit: What they are called.
    """

    def __init__(self, what: str, total: int, unit: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.what, self.total, self.unit = what, total, unit
        self.done = 0
        self._start = time.perf_counter()
        console = Console(stderr=True)
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            expand=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(what, total=total, speed="")

    def __enter__(self) -> Progress:
        self._bar.start()
        self._start = time.perf_counter()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._bar.stop()
        if kind is None:
            note(f"{self.what}: {self.done} {self.unit} in {self.seconds:.1f} s, {self.speed}")

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    @property
    def speed(self) -> str:
        """Units a second so far, in words."""
        return f"{rate(self.done / max(self.seconds, 1e-9))} {self.unit}/s"

    def advance(self, count: int = 1, extra: str = "") -> None:
        """Counts units that are done; `extra` stands before the speed."""
        self.done += count
        speed = f"{extra}, {self.speed}" if extra else self.speed
        self._bar.update(self._task, advance=count, speed=speed)
