"""A run and its folder: the loop, checkpoints, curves and sample grids.

The folder holds `last.pt`, from which a run goes on; `ckpt.pt`, which one exports; `train.json`,
the settings; `samples/`, a grid now and then; and TensorBoard's files.
"""

from __future__ import annotations

import json
import math
import shlex
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning_fabric import Fabric
from torch.utils.tensorboard import SummaryWriter

from ddpm_deploy._version import __version__
from ddpm_deploy.errors import CheckpointError, RunError, TrainError
from ddpm_deploy.files import whole_file, write_text
from ddpm_deploy.images import grid, to_pixels, write_png
from ddpm_deploy.model.opening import read_content
from ddpm_deploy.train.settings import Settings
from ddpm_deploy.train.trainer import FORMAT, Trainer, TrainStep

LAST, WEIGHTS, SETTINGS, SAMPLES = "last.pt", "ckpt.pt", "train.json", "samples"
"""What a run's folder holds."""

LOG_EVERY = 50
"""Steps whose mean makes one point of the curves."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is.

    Attributes:
        step: Steps done.
        loss: Mean squared error of the latest steps, smoothed over about a hundred.
    """

    step: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended.

    Attributes:
        checkpoint: The file to export.
        step: Steps done.
        loss: As in `Progress`; nan where no step was done.
        signal: Number of the signal that stopped it; None when all steps are done.
    """

    checkpoint: Path
    step: int
    loss: float
    signal: int | None


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """A run as its folder has it.

    Attributes:
        settings: With which it began.
        state: For `Trainer.restore`.
    """

    settings: Settings
    state: dict[str, Any]


def claim(folder: Path, *, overwrite: bool = False) -> None:
    """Makes sure that a new run may write to a folder.

    Args:
        folder: The run's.
        overwrite: Remove the run that is there.

    Raises:
        RunError: It holds a run, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; a run needs a folder.", hint="Type another -o.")
    if not (folder / LAST).exists():
        return
    if not overwrite:
        raise RunError(
            f"{folder} already holds a run.",
            hint="Type --resume to go on with it, --overwrite to remove it, or another -o.",
        )
    for pattern in (LAST, WEIGHTS, SETTINGS, f"{SAMPLES}/step-*.png", "events.out.tfevents.*"):
        for path in folder.glob(pattern):
            path.unlink()


def read_run(folder: Path) -> SavedRun:
    """Reads the run that a folder holds.

    Raises:
        RunError: It holds none.
        CheckpointError: Its checkpoint is damaged, or of a later version.
    """
    path = folder / LAST
    if not path.is_file():
        raise RunError(
            f"{folder} holds no run to go on with: there is no {path}.",
            hint="Leave --resume out to begin one, or give the folder of one with -o.",
        )
    state = read_content(path)
    own = state.get("ddpm_deploy") if isinstance(state, dict) else None
    if not isinstance(own, dict) or "settings" not in own or type(own.get("format")) is not int:
        raise CheckpointError(
            f"{path} was not written by ddpm-deploy train.",
            hint="Only its own runs can go on; begin another with another -o.",
        )
    if own["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {own['format']}; this is ddpm-deploy {__version__}, which reads "
            f"formats up to {FORMAT}.",
            hint="Update ddpm-deploy here: pip install --upgrade ddpm-deploy",
        )
    try:
        settings = Settings.from_dict(json.loads(own["settings"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"The settings in {path} are damaged: {error}.",
            hint="Begin another run with another -o.",
        ) from error
    return SavedRun(settings=settings, state=state)


def save(trainer: Trainer, folder: Path) -> None:
    """Writes both checkpoints, each whole or not at all.

    Raises:
        OSError: The folder cannot be written, or is full.
    """
    for name, content in [(LAST, trainer.state()), (WEIGHTS, trainer.weights())]:
        with whole_file(folder / name) as partial, partial.open("wb") as file:
            try:
                torch.save(content, file)
            except RuntimeError as error:  # its end of the archive hides what the write said
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise


def fit(
    trainer: Trainer, folder: Path, *, watch: Callable[[Progress], None] = lambda _: None
) -> Outcome:
    """Trains until all steps are done, or SIGINT or SIGTERM asks to stop.

    A step that has begun is finished, and the state saved, before a signal stops the run. A second
    signal stops at once.

    Args:
        trainer: New or restored.
        folder: The run's.
        watch: Called after every step, or every tenth on a GPU.

    Raises:
        TrainError: The loss or the gradient is no longer finite, or another process of the run has
            ended; the last checkpoint is kept.
        DataError: A picture cannot be read.
        OSError: The folder cannot be written, or is full.
    """
    settings, fabric = trainer.settings, trainer.fabric
    leader = fabric.global_rank == 0
    # To look at the loss is to wait for a GPU, so that is looked at less often.
    look = 1 if fabric.device.type == "cpu" else 10
    smooth = _Smooth()
    saved = trainer.step
    with _caught_signals() as caught, _together(fabric, folder), ExitStack() as stack:
        # A folder that cannot be written is found out here, before TensorBoard's thread would meet
        # it. A run that goes on saves too: it may have been killed between last.pt and ckpt.pt, and
        # a new --steps counts from here on.
        if leader:
            write_text(folder / SETTINGS, json.dumps(settings.to_dict(), indent=2) + "\n")
            save(trainer, folder)
        curves = stack.enter_context(_curves(folder, trainer.step, on=leader))
        pending: list[TrainStep] = []
        stop = 0
        while trainer.step < settings.steps and not stop:
            pending.append(trainer.advance())
            step = trainer.step
            ends = step == settings.steps
            saves = step % settings.save_every == 0
            draws = settings.sample_every > 0 and step % settings.sample_every == 0
            if not (ends or saves or draws or step % look == 0):
                continue
            losses, stop = _gather(pending, caught, fabric, folder, saved)
            for done, loss in zip(pending, losses, strict=True):
                smooth.add(loss)
                curves.step(done, loss)
            pending = []
            watch(Progress(step=step, loss=smooth.value))
            if leader and (ends or saves or stop):
                save(trainer, folder)
                saved = step
            if leader and (ends or draws) and settings.sample_every:
                _draw(trainer, folder, curves)
        fabric.barrier()
    return Outcome(
        checkpoint=folder / WEIGHTS, step=trainer.step, loss=smooth.value, signal=stop or None
    )


@contextmanager
def _together(fabric: Fabric, folder: Path) -> Iterator[None]:
    """Says so where another process of the run has gone."""
    try:
        yield
    except RuntimeError as error:
        words = str(error).lower()
        if fabric.world_size == 1 or not ("gloo" in words or "nccl" in words):
            raise
        raise TrainError(
            f"Another process of the run has ended, or is out of reach. {folder / LAST} holds the "
            "last save.",
            hint=f"Go on from there: ddpm-deploy train --resume -o {shlex.quote(str(folder))}",
        ) from error


def _gather(
    pending: list[TrainStep], caught: list[int], fabric: Fabric, folder: Path, saved: int
) -> tuple[list[float], int]:
    """Returns the losses of the latest steps over all processes, and the signal that any caught."""
    signals = torch.tensor([float(max(caught, default=0))], device=fabric.device)
    mine = torch.cat(
        [torch.stack([d.loss for d in pending]), torch.stack([d.grad_norm for d in pending])]
    ).float()
    rows = torch.cat([mine, signals])[None]
    if fabric.world_size > 1:
        rows = torch.as_tensor(fabric.all_gather(rows)).reshape(fabric.world_size, -1)
    numbers = rows.cpu().double()
    losses, norms = numbers[:, :-1].mean(0).chunk(2)
    # A gradient scaler finds its scale by overflowing now and then; it skips those steps itself.
    scaled = "scale" in fabric.strategy.precision.state_dict()
    for done, loss, norm in zip(pending, losses.tolist(), norms.tolist(), strict=True):
        if not math.isfinite(loss) or not (scaled or math.isfinite(norm)):
            what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient's norm is {norm}"
            raise TrainError(
                f"Training diverged: the {what} at step {done.step} "
                f"(learning rate {done.lr:g}). {folder / LAST} still holds step {saved}.",
                hint="Begin again with a smaller --lr, a longer --warmup, or --precision 32.",
            )
    return losses.tolist(), int(numbers[:, -1].max())


def _draw(trainer: Trainer, folder: Path, curves: _Curves) -> None:
    spec = trainer.spec
    pixels = to_pixels(trainer.sample(trainer.settings.samples), value_range=spec.value_range)
    classes = spec.label.classes if spec.label else None
    columns = classes if classes and classes <= 16 else None  # a column a class
    sheet = grid(list(pixels), columns=columns)
    write_png(folder / SAMPLES / f"step-{trainer.step:07d}.png", sheet)
    curves.picture(sheet, trainer.step)


class _Smooth:
    """An average that follows the loss."""

    def __init__(self, decay: float = 0.99) -> None:
        self._decay, self._sum, self._weight = decay, 0.0, 0.0

    def add(self, value: float) -> None:
        self._sum = self._decay * self._sum + (1 - self._decay) * value
        self._weight = self._decay * self._weight + (1 - self._decay)

    @property
    def value(self) -> float:
        return self._sum / self._weight if self._weight else math.nan


class _Curves:
    """TensorBoard's files, where a process writes them."""

    def __init__(self, writer: SummaryWriter | None) -> None:
        self._writer = writer
        self._losses: list[float] = []

    def step(self, done: TrainStep, loss: float) -> None:
        if self._writer is None:
            return
        self._losses.append(loss)
        if done.step % LOG_EVERY == 0:
            mean = sum(self._losses) / len(self._losses)
            self._losses = []
            self._writer.add_scalar("loss", mean, done.step)
            self._writer.add_scalar("gradient norm", float(done.grad_norm), done.step)
            self._writer.add_scalar("learning rate", done.lr, done.step)

    def picture(self, sheet: Any, step: int) -> None:
        if self._writer is not None:
            self._writer.add_image("samples", sheet, step, dataformats="HWC")


@contextmanager
def _curves(folder: Path, step: int, *, on: bool) -> Iterator[_Curves]:
    if not on:
        yield _Curves(None)
        return
    # Points after the checkpoint that a killed run went back to would be drawn twice.
    with SummaryWriter(str(folder), purge_step=step + 1 if step else None) as writer:
        yield _Curves(writer)


@contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM; a second one acts as if nobody had caught the first."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def catch(number: int, _: FrameType | None) -> None:
        caught.append(number)
        restore()

    for number in numbers:
        signal.signal(number, catch)
    try:
        yield caught
    finally:
        restore()
