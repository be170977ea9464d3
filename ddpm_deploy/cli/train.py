"""`ddpm-deploy train`: data to a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddpm_deploy.cli.common import Device, Threads, note, settings
from ddpm_deploy.errors import TrainError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ddpm_deploy.data import ImageData
    from ddpm_deploy.train import Progress, Settings

_OPTIONS = "See ddpm-deploy train --help."
_LINE_EVERY = 30.0  # seconds between lines where there is no terminal


def command(
    ctx: typer.Context,
    data: Annotated[
        str,
        typer.Option(
            help="A folder of pictures (sub-folders are classes), an .npz file with images and "
            "perhaps labels, or digits.",
            show_default=False,
        ),
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the run; runs/NAME OF DATA if left out."),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(help="Height and width; an array's own, or 64 for a folder, if left out."),
    ] = None,
    channels: Annotated[
        int | None, typer.Option(help="1 grey, 3 colour; an array's own, or 3 for a folder.")
    ] = None,
    unconditional: Annotated[
        bool, typer.Option("--unconditional", help="Leave the data's labels unused.")
    ] = False,
    width: Annotated[int, typer.Option(help="Channels at full resolution.")] = 64,
    widths: Annotated[
        str, typer.Option(help="Channels of single blocks: 'inc=32 down=64,64,32'.")
    ] = "",
    schedule: Annotated[
        str, typer.Option(help="linear, scaled_linear, cosine or sigmoid.")
    ] = "linear",
    timesteps: Annotated[int, typer.Option(help="T, the length of the schedule.")] = 1000,
    variance: Annotated[
        str, typer.Option(help="Of sampling: fixed_small or fixed_large.")
    ] = "fixed_small",
    batch: Annotated[int, typer.Option(help="Pictures a step, over all devices.")] = 64,
    steps: Annotated[int, typer.Option(help="Steps in all.")] = 100_000,
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 3e-4,
    warmup: Annotated[int, typer.Option(help="Steps until the full learning rate.")] = 200,
    cooldown: Annotated[int, typer.Option(help="Last steps, while the rate falls to 0.")] = 0,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 0.01,
    ema: Annotated[float, typer.Option(help="Decay of the averaged weights.")] = 0.999,
    clip_grad: Annotated[float, typer.Option(help="Norm to clip gradients to; 0: none.")] = 1.0,
    drop_label: Annotated[float, typer.Option(help="Share of labels to hide, for guidance.")] = 0.1,
    flip: Annotated[
        bool | None,
        typer.Option(
            "--flip/--no-flip",
            help="Mirror every second picture; on, but for digits.",
            show_default=False,
        ),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="32, mixed bf16 or 16; auto: mixed on a GPU.")
    ] = "auto",
    device: Device = "auto",
    threads: Threads = None,
    devices: Annotated[
        int, typer.Option(min=1, help="Processes here, one a device; torchrun sets its own.")
    ] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights, order, t and noise.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 1000,
    sample_every: Annotated[int, typer.Option(help="Steps between sample grids; 0: none.")] = 2000,
    samples: Annotated[int, typer.Option(help="Pictures in a grid.")] = 64,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in -o, with its settings.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove the run in -o first.")
    ] = False,
) -> None:
    """Train a diffusion model and write its checkpoint.

    Ctrl-C saves before it stops, and --resume goes on exactly. Curves and
    sample grids: tensorboard --logdir runs
    """
    import shlex

    from ddpm_deploy.engines.base import needs

    with needs("lightning_fabric", extra="train"):
        from ddpm_deploy import train as room
        from ddpm_deploy.data import DIGITS, open_data
        from ddpm_deploy.model import UNetWidths

    if resume and overwrite:
        raise TrainError(
            "--resume goes on with a run and --overwrite removes it.", hint="Type one of them."
        )
    if not data and not resume:
        raise TrainError(
            "There is nothing to learn from: --data is missing.",
            hint="Give a folder of pictures, an .npz file, or the word digits: --data digits",
        )
    if out is None:
        if not data:
            raise TrainError(
                "--resume needs the folder of the run.", hint="Type it: -o runs/NAME --resume"
            )
        out = Path("runs", Path(data).resolve().stem)
    on = room.choose_device(device, threads=threads)

    with settings(_OPTIONS):
        wanted: dict[str, Any] = {
            "data": data,
            "image_size": image_size,
            "channels": channels,
            "unconditional": unconditional,
            "widths": room.parse_widths(widths, UNetWidths.scaled(width)),
            "schedule": schedule,
            "timesteps": timesteps,
            "variance": variance,
            "batch": batch,
            "steps": steps,
            "lr": lr,
            "warmup": warmup,
            "cooldown": cooldown,
            "weight_decay": weight_decay,
            "ema": ema,
            "clip_grad": clip_grad,
            "drop_label": drop_label,
            "flip": flip if flip is not None else data != DIGITS,
            "precision": room.choose_precision(precision, on),
            "seed": seed,
            "save_every": save_every,
            "sample_every": sample_every,
            "samples": samples,
        }
        saved = None
        if resume:
            saved = room.read_run(out)
            typed = {name: wanted[name] for name in wanted if _typed(ctx, name)}
            if _typed(ctx, "width"):
                typed["widths"] = wanted["widths"]
            run = saved.settings.resumed_with(typed)
            room.choose_precision(run.precision, on)  # this machine may not have the run's
        else:
            run = room.Settings(**wanted)

    leader = room.is_leader()
    pictures = open_data(run.data, image_size=run.image_size, channels=run.channels)
    room.check(run, pictures, devices)
    if leader and not resume:  # last, since --overwrite removes what is there
        room.claim(out, overwrite=overwrite)
    if leader:
        _introduce(pictures, run)

    with room.open_fabric(on, run.precision, devices=devices) as fabric:
        trainer = room.Trainer(run, pictures, fabric)
        if saved is not None:
            trainer.restore(saved.state)
        if leader:
            where = f"{fabric.world_size} x {on}" if fabric.world_size > 1 else on
            done = f", from step {trainer.step}" if trainer.step else ""
            note(
                f"{trainer.parameters:,} parameters on {where}, precision {run.precision}: "
                f"steps to {run.steps}{done}, in {out}"
            )
        with _watching(run, trainer.step, on=leader) as watch:
            outcome = room.fit(trainer, out, watch=watch)
    if not leader:
        return
    if outcome.signal is not None:
        again = f"ddpm-deploy train --resume -o {shlex.quote(str(out))}"
        if on != "cpu" and device != "auto":
            again += f" --device {device}"
        if devices > 1:
            again += f" --devices {devices}"
        note(f"stopped at step {outcome.step}, which is saved; go on with:")
        note(f"  {again}")
        raise typer.Exit(128 + outcome.signal)
    typer.echo(outcome.checkpoint)


def _typed(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _introduce(data: ImageData, run: Settings) -> None:
    shape = "x".join(map(str, data.sample_shape))
    classes = f", {len(data.classes)} classes" if data.classes else ", no labels"
    unused = " (unused)" if data.classes and run.unconditional else ""
    note(f"{data.source}: {len(data)} pictures of {shape}{classes}{unused}")
    if data.skipped:
        names = ", ".join(path.name for path in data.skipped[:3])
        more = ", ..." if len(data.skipped) > 3 else ""
        note(f"left out {len(data.skipped)} files that are no pictures: {names}{more}")


@contextmanager
def _watching(run: Settings, start: int, *, on: bool) -> Iterator[Callable[[Progress], None]]:
    """Shows loss, images/s and time left: a bar on a terminal, else a line now and then."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    bar = Bar(
        TextColumn("train"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        expand=True,
        disable=not (on and console.is_terminal),
    )
    task = bar.add_task("train", total=run.steps, completed=start, figures="")
    began = spoke = time.perf_counter()
    latest: Progress | None = None

    def figures(progress: Progress) -> str:
        speed = (progress.step - start) * run.batch / max(time.perf_counter() - began, 1e-9)
        return f"loss {progress.loss:.4f}, {speed:.0f} images/s"

    def watch(progress: Progress) -> None:
        nonlocal spoke, latest
        latest = progress
        bar.update(task, completed=progress.step, figures=figures(progress))
        now = time.perf_counter()
        if on and not console.is_terminal and now - spoke >= _LINE_EVERY:
            spoke = now
            left = (run.steps - progress.step) * (now - began) / (progress.step - start)
            note(f"step {progress.step}/{run.steps}, {figures(progress)}, {_duration(left)} left")

    with bar:
        yield watch
    if on and latest is not None:
        seconds = time.perf_counter() - began
        note(f"step {latest.step}, {figures(latest)}, {_duration(seconds)}")


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
