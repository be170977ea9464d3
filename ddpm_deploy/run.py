"""A run of samples in a folder: written as it goes, continued where it stopped.

Image i depends on the seed and i alone, so a file that is there is never drawn again, and a run
that was killed ends with the same bytes as one that was not.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import platform
import zipfile
from collections.abc import Callable, Container, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from ddpm_deploy import noise as noise_module
from ddpm_deploy._version import __version__
from ddpm_deploy.arrays import Array, Pixels, Samples
from ddpm_deploy.behind import Behind
from ddpm_deploy.engines.base import Engine, Stepper
from ddpm_deploy.errors import DataError, EngineError, EngineInputError, RunError
from ddpm_deploy.files import whole_file, write_text
from ddpm_deploy.fused import denoise_fused, noise_threads
from ddpm_deploy.images import grid, is_picture, read_picture, to_pixels, write_gif, write_png
from ddpm_deploy.noise import Ahead, SeededNoise
from ddpm_deploy.sampling import (
    Predictor,
    Sampler,
    Sampling,
    SelfConditioned,
    Spacing,
    Step,
    Table,
    Transition,
    denoise,
    guided,
    predicted_x0,
    split_variance,
)
from ddpm_deploy.spec import Condition, ModelSpec

GRID_IMAGES = 64
GIF_NAME = "x0.gif"
NPZ_NAME = "samples.npz"
GIF_IMAGES = 16
GIF_FRAMES = 48


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides the images, besides the engine.

    Attributes:
        seed: Of the noise.
        sampler: `ddpm`, `ddim`, `dome272` or `dpmpp_2m`; the family's own when None.
        steps: Transitions, or the timesteps to visit; the family's own, or all, when None.
        eta: Share of noise for `ddim`; the family's own when None.
        spacing: How `steps` are chosen; the family's own when None.
        labels: Class labels, taken in turn: image i gets labels[i mod their number]. None for an
            unconditional network.
        guidance: Scale of classifier-free guidance; 1 is the plain conditional network.
        observations: What the network is conditioned on, by the input's name: rows of numbers in C
            order, taken in turn as labels are.
    """

    seed: int = 0
    sampler: Sampler | None = None
    steps: int | tuple[int, ...] | None = None
    eta: float | None = None
    spacing: Spacing | None = None
    labels: tuple[int, ...] | None = None
    guidance: float = 1.0
    observations: Mapping[str, tuple[tuple[float, ...], ...]] = field(default_factory=dict)

    def loop(self, spec: ModelSpec) -> tuple[Sampler, Sampling]:
        """Returns the loop in full: the family's own, but for what the recipe says."""
        return spec.loop(self.sampler, self.steps, eta=self.eta, spacing=self.spacing)

    def table(self, spec: ModelSpec) -> Table:
        """Tabulates the sampler; errors as in `ModelSpec.table`."""
        return spec.table(self.sampler, self.steps, eta=self.eta, spacing=self.spacing)

    def fused(self, engine: Engine) -> bool:
        """Tells whether the step behind a network is this recipe's.

        Guidance would come before it, and it does not look back at the step before.
        """
        return engine.fused and self.guidance == 1 and not self.looks_back(engine.spec)

    def looks_back(self, spec: ModelSpec) -> bool:
        """Tells whether a step of the loop needs the x_0 of the step before."""
        return spec.self_condition is not None or any(row.x_from_before for row in self.table(spec))

    def conditions(self, engine: Engine, images: Sequence[int]) -> dict[str, Array]:
        """Returns an engine's conditions for some images: labels and observations.

        What the loop gives, the last step's x_0, is not among them.

        Raises:
            EngineInputError: The network does not take these labels, observations or guidance, or
                the guidance is not finite.
        """
        return self.conditions_of(engine.spec, images, called=str(engine.path))

    def conditions_of(
        self, spec: ModelSpec, images: Sequence[int], *, called: str
    ) -> dict[str, Array]:
        """Returns a network's conditions, where no engine of it is open.

        Args:
            spec: What the network is.
            images: Indices of the images.
            called: What to call the network in errors, which are those of `conditions`.
        """
        if not math.isfinite(self.guidance):
            raise EngineInputError(
                f"The guidance is {self.guidance}; it must be finite.",
                hint="Type --guidance 2, or leave it out.",
            )
        if self.guidance != 1 and spec.guidance is not None:
            raise EngineInputError(
                f"{called} has its guidance inside, of scale {spec.guidance:g}.",
                hint="Leave --guidance out, or export without it.",
            )
        observed = {c.name: self._observed(c, images, called) for c in spec.observations}
        if unknown := self.observations.keys() - observed.keys():
            raise EngineInputError(
                f"{called} has no input called {min(unknown)}; it takes "
                f"{', '.join(observed) or 'no observation'}.",
                hint="See its inputs: ddpm-deploy inspect " + called,
            )
        condition = spec.label
        if condition is None:
            if self.labels is not None or self.guidance != 1:
                raise EngineInputError(
                    f"{called} is unconditional: it takes neither labels nor guidance.",
                    hint="Leave --label and --guidance out.",
                )
            return observed
        classes, null = condition.classes or 1, condition.null
        labels = self.labels or default_labels(spec)
        for label in labels:
            if not (0 <= label < classes or label == null):
                raise EngineInputError(
                    f"The label is {label}; this network has labels 0..{classes - 1}"
                    + ("." if null is None else f" and {null} for none."),
                    hint="Type --label 0, a list such as --label 0,1,2, or --label none.",
                )
        y = np.array([labels[i % len(labels)] for i in images], dtype=condition.dtype)
        return {condition.name: y, **observed}

    def _observed(self, condition: Condition, images: Sequence[int], called: str) -> Array:
        """Returns an observation for some images."""
        rows = self.observations.get(condition.name, ())
        if not rows:
            raise EngineInputError(
                f"{called} is conditioned on {condition.name}, {condition.dtype} "
                f"{condition.shape}, and none is given.",
                hint=f"Give a NumPy file with one an image: --observe {condition.name}=FILE.npy",
            )
        if any(len(row) != math.prod(condition.shape) for row in rows):
            raise EngineInputError(
                f"{condition.name} has {len(rows[0])} numbers an image; {called} takes "
                f"{condition.shape}.",
                hint="Give an array (N, " + ", ".join(map(str, condition.shape)) + ").",
            )
        chosen = [rows[i % len(rows)] for i in images]
        return np.array(chosen, dtype=condition.dtype).reshape(len(images), *condition.shape)

    def predictor(self, engine: Engine, images: Sequence[int]) -> Predictor:
        """Binds labels and guidance for some images to an engine.

        Raises:
            EngineInputError: As for `conditions`, or the network has no null label that guidance
                needs.
        """
        conditions = self.conditions(engine, images)
        sees = engine.spec.self_condition
        if sees is None:
            return self._guided(engine, conditions)
        name = sees.name
        return SelfConditioned(
            predict=lambda x, t, before: self._guided(engine, {**conditions, name: before})(x, t)
        )

    def _guided(self, engine: Engine, conditions: Mapping[str, Array]) -> Predictor:
        """Binds conditions and guidance to an engine."""
        if self.guidance == 1 or engine.spec.label is None:
            return partial(engine, **conditions)
        name, null = engine.spec.label.name, engine.spec.label.null
        if null is None:
            raise EngineInputError(
                f"{engine.path} has no null label, so there is nothing to guide away from.",
                hint="Leave --guidance out.",
            )
        y = conditions[name]
        both = {key: np.concatenate([value, value]) for key, value in conditions.items()}
        both[name] = np.concatenate([y, np.full_like(y, null)])
        return guided(partial(engine, **both), self.guidance)


def default_labels(spec: ModelSpec) -> tuple[int, ...]:
    """Returns every class once, the labels of a run that names none; none is no class."""
    if spec.label is None:
        return ()
    return tuple(y for y in range(spec.label.classes or 1) if y != spec.label.null) or (0,)


def sample(engine: Engine, recipe: Recipe, images: Sequence[int]) -> Samples:
    """Draws some images of a run.

    Args:
        engine: The network.
        recipe: What decides the images.
        images: Their indices; image i is the same whatever stands beside it.

    Returns:
        float32, (N, *sample_shape): in the loop's units, [-1, 1] for pictures; where the spec says
        what the numbers mean (`restore`), in their own.

    Raises:
        EngineError: The network gave numbers that are not finite.
        ValueError: The recipe does not fit the network's schedule.
    """
    with Drawing(engine, recipe) as drawing:
        for _ in drawing.steps(images):
            pass
        x = drawing.read()
    return x if engine.spec.restore is None else engine.spec.restore(x)


def drawn(
    engine: Engine,
    predict: Predictor,
    table: Table,
    noise: SeededNoise,
    *,
    x: Samples | None = None,
) -> Generator[Step, None, None]:
    """Runs the loop of `sample`: noise is drawn beside the engine's work, and no step is kept.

    Args:
        engine: The network.
        predict: The same, with its conditions bound.
        table: As for `denoise`.
        noise: As for `denoise`.
        x: As for `denoise`.

    Yields:
        A `Step` after each transition, which holds until the next one is asked for.
    """
    noisy = [k for k, row in enumerate(table, start=1) if row.x_from_noise]
    with Ahead(noise, noisy, threads=noise_threads(engine)) as draw:
        yield from denoise(predict, table, draw, x=x, keep=False)


class Drawing:
    """Draws batches of a recipe, with the step behind the network where it is fused there.

    A context: where the runtime keeps the state, it does so from one batch to the next.

    Args:
        engine: The network.
        recipe: What decides the images.
    """

    def __init__(self, engine: Engine, recipe: Recipe) -> None:
        self._engine, self._recipe = engine, recipe
        self._table = recipe.table(engine.spec)
        self._fused = recipe.fused(engine)
        self._stepper: Stepper | None = None
        self._size = 0
        self._x: Samples | None = None

    def steps(
        self, images: Sequence[int], *, x0_at: Container[int] = ()
    ) -> Iterator[tuple[int, Samples | None]]:
        """Draws some images.

        Args:
            images: Their indices.
            x0_at: The steps of which the predicted x_0 is wanted. Behind a fused step it costs
                another call of the network, so that the images stay the same.

        Yields:
            After each step its number, 1 being the noisiest, and x_0 where it is wanted, which
            holds until the next step is asked for.

        Raises:
            EngineError: The network gave numbers that are not finite; with a fused step that is
                known after the last.
        """
        noise = SeededNoise(self._recipe.seed, images, self._engine.spec.sample_shape)
        if self._fused:
            yield from self._fused_steps(images, noise, x0_at)
            return
        predict = self._recipe.predictor(self._engine, images)
        for step in drawn(self._engine, predict, self._table, noise):
            if not step.finite:
                raise self._not_finite(f" at t = {step.t} (step {step.k})")
            yield step.k, step.x0 if step.k in x0_at else None
            self._x = step.x

    def read(self) -> Samples:
        """Returns the images of the last `steps`: float32, (N, *sample_shape)."""
        if self._x is None:
            raise ValueError("no step was made yet")
        return self._x

    def _fused_steps(
        self, images: Sequence[int], noise: SeededNoise, x0_at: Container[int]
    ) -> Iterator[tuple[int, Samples | None]]:
        predict = self._recipe.predictor(self._engine, images)
        stepper = self._stepper_of(len(images))
        x = noise(0)
        stepper.start(x, self._recipe.conditions(self._engine, images))
        x0 = self._x0(predict, self._table[0], x) if 1 in x0_at else None
        threads = noise_threads(self._engine)
        for k, _ in denoise_fused(stepper, self._table, noise, threads=threads):
            yield k, x0
            follows = k + 1 in x0_at and k < len(self._table)
            x0 = self._x0(predict, self._table[k], stepper.read()) if follows else None
        self._x = stepper.read()
        if not np.isfinite(self._x).all():
            raise self._not_finite("")

    def _x0(self, predict: Predictor, row: Transition, x: Samples) -> Samples:
        out, _ = split_variance(predict(x, np.full(len(x), row.t, dtype=np.int64)), x)
        if not np.isfinite(out).all():
            raise self._not_finite(f" at t = {row.t}")
        return predicted_x0(row, x, out)

    def _stepper_of(self, n: int) -> Stepper:
        if self._stepper is None or self._size != n:
            self.close()
            self._stepper, self._size = self._engine.stepper(n), n
        return self._stepper

    def _not_finite(self, where: str) -> EngineError:
        return EngineError(
            f"{self._engine.name} gave numbers that are not finite{where}.",
            hint=f"See where it begins: ddpm-deploy verify --engine {self._engine.path} "
            "--against CHECKPOINT",
        )

    def close(self) -> None:
        """Gives back what the runtime keeps."""
        if self._stepper is not None:
            self._stepper.close()
            self._stepper = None

    def __enter__(self) -> Drawing:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, kw_only=True)
class Run:
    """Images of one recipe in one folder.

    Args:
        folder: Where images, `grid.png` and `run.json` go.
        engine: The network, opened.
        recipe: What decides the images.
        start: Index of the first image.
        count: How many.
        batch: How many the engine draws at once.
        origin: The command or program that makes the run, for `run.json`.
    """

    folder: Path
    engine: Engine
    recipe: Recipe
    count: int
    start: int = 0
    batch: int = 1
    origin: Sequence[str] = field(default_factory=tuple)

    def path(self, image: int) -> Path:
        """Returns the file of an image: a PNG, or NumPy's format where it is no picture."""
        suffix = ".png" if self.pictures else ".npy"
        return self.folder / f"{image:06d}{suffix}"

    @property
    def pictures(self) -> bool:
        """Tells whether the samples can be pictures."""
        return is_picture(self.engine.spec.sample_shape)

    @property
    def images(self) -> range:
        """The indices of the run's images."""
        return range(self.start, self.start + self.count)

    @property
    def report(self) -> Path:
        """The file that says how the images were made."""
        return self.folder / "run.json"

    def prepare(self, *, overwrite: bool = False) -> None:
        """Claims the folder: for a new run, or to continue the same one.

        Raises:
            RunError: It holds another run, or images that no run made.
            OSError: It cannot be made or written.
        """
        self.recipe.predictor(self.engine, self.images[:1])  # labels are checked before any work
        self.folder.mkdir(parents=True, exist_ok=True)
        if overwrite:
            self._clear()
        identity = self._identity
        if self.report.exists():
            before = _read_report(self.report)
            if differing := _differences(before["identity"], identity):
                raise RunError(
                    f"{self.folder} holds another run: " + "; ".join(differing) + ".",
                    hint="Name another folder with -o, or type --overwrite to draw it anew.",
                )
        elif found := next((p for p in map(self.path, self.images) if p.exists()), None):
            raise RunError(
                f"{self.folder} holds {found.name} but no run.json, so nobody knows what made it.",
                hint="Name another folder with -o, or move its pictures away.",
            )
        self._write_report(identity, finished=False)
        # Of a process that was killed. Once and for this run's images alone: to look for them at
        # every image takes longer the more there are, and removes another process's in the middle.
        for leftover in self.folder.glob(f".*.part{self.path(0).suffix}"):
            number = leftover.name.split(".")[1]
            if number.isdecimal() and int(number) in self.images:
                leftover.unlink(missing_ok=True)

    def missing(self) -> int:
        """Counts the images that are still to draw."""
        return sum(not self.path(image).exists() for image in self.images)

    def blocks(self, *, gif: Path | None = None) -> Iterator[tuple[Sequence[int], list[int]]]:
        """Yields the batches that have work: their images, and those of them that are missing.

        A block is always the same images, also when a run continues, so that an engine whose
        rounding depends on the batch still gives the same bytes.

        Args:
            gif: As in `draw`; while it is not there, the first batch has work.
        """
        for first in range(self.start, self.start + self.count, self.batch):
            block = range(first, min(first + self.batch, self.start + self.count))
            missing = [image for image in block if not self.path(image).exists()]
            if missing or (first == self.start and gif is not None and not gif.exists()):
                yield block, missing

    def draw(
        self, *, gif: Path | None = None, on_step: Callable[[int], None]
    ) -> Generator[Path, None, None]:
        """Draws what is missing, a batch at a time; a batch is written while the next is drawn.

        Args:
            gif: Where to write the predicted x_0 of the first images unfolding, if anywhere.
            on_step: Called after every step with its number, for progress.

        Yields:
            The path of each image after it was written, whole. Closed early, it writes the batches
            that were drawn.

        Raises:
            EngineError: The network gave numbers that are not finite.
            OSError: The folder is full, or cannot be written. What is there stays, and counts.
        """
        rows = len(self.recipe.table(self.engine.spec))
        shown = {round(k) for k in np.linspace(1, rows, min(rows, GIF_FRAMES))}
        with Drawing(self.engine, self.recipe) as drawing, Behind[Path]("writing") as writing:
            for block, missing in self.blocks(gif=gif):
                first = block[0]
                frames: list[Pixels] = []
                wanted = shown if gif is not None and first == self.start else ()
                for k, x0 in drawing.steps(block, x0_at=wanted):
                    on_step(k)
                    yield from writing.done()
                    if x0 is not None:
                        frames.append(grid(list(self._pixels(x0[:GIF_IMAGES]))))
                x = drawing.read()
                yield from writing.rest()  # so that one batch waits in memory, and no more
                for image in missing:
                    writing.begin(partial(self._write, image, x[image - first]))
                if gif is not None and frames:
                    frames.append(grid(list(self._pixels(x[:GIF_IMAGES]))))
                    write_gif(gif, frames)
            yield from writing.rest()

    def finish(self, timing: Mapping[str, float]) -> list[Path]:
        """Writes `grid.png` and the final `run.json`; returns their paths.

        Args:
            timing: What to record of this invocation: seconds, steps per second, and the seconds
                from the start of the process until the first step was done.

        Raises:
            RunError: One of the images in the folder is damaged.
        """
        written = []
        if self.pictures:
            shown = self.images[:GRID_IMAGES]
            sheet = grid([self._read(image) for image in shown])
            write_png(self.folder / "grid.png", sheet)
            written.append(self.folder / "grid.png")
        self._write_report(self._identity, finished=True, timing=timing)
        return [*written, self.report]

    def write_npz(self, path: Path) -> None:
        """Packs the images into one `.npz`, an image at a time.

        `images` is uint8 (N, H, W, C), or float32 (N, *sample_shape) where they are no pictures;
        `labels`, int64 (N,), is there for class-conditional networks; `index`, int64 (N,).
        """
        dtype, item = self._item
        header = {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": (self.count, *item),
        }
        with (
            whole_file(path) as partial_path,
            zipfile.ZipFile(partial_path, "w", zipfile.ZIP_DEFLATED) as archive,
        ):
            with archive.open("images.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_2_0(file, header)
                for image in self.images:
                    file.write(self._read(image).tobytes())
            arrays = {"index": np.array(self.images, dtype=np.int64)}
            if self.labels:
                arrays["labels"] = np.array(
                    [self.labels[i % len(self.labels)] for i in self.images], dtype=np.int64
                )
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w") as file:
                    np.lib.format.write_array(file, array)

    @property
    def labels(self) -> tuple[int, ...]:
        """The labels that the images take in turn; empty for an unconditional network."""
        return self.recipe.labels or default_labels(self.engine.spec)

    def _write(self, image: int, x: Samples) -> Path:
        path = self.path(image)
        if self.pictures:
            write_png(path, self._pixels(x[None])[0])
        else:
            content = io.BytesIO()  # np.save hides a full disk's error code
            restore = self.engine.spec.restore
            np.save(content, x if restore is None else restore(x[None])[0])
            with whole_file(path) as partial_path:
                partial_path.write_bytes(content.getbuffer())
        return path

    @property
    def _item(self) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """Type and shape of an image's array."""
        shape = self.engine.spec.sample_shape
        if self.pictures:
            return np.dtype(np.uint8), (*shape[1:], shape[0])
        return np.dtype(np.float32), tuple(shape)

    def _read(self, image: int) -> np.ndarray[Any, Any]:
        path = self.path(image)
        try:
            if self.pictures:
                array = read_picture(path, channels=self.engine.spec.sample_shape[0])
            else:
                array = np.asarray(np.load(path))
            if (array.dtype, array.shape) != self._item:
                raise ValueError(f"it is {array.dtype} {array.shape}")
        except (DataError, EOFError, ValueError) as error:
            raise RunError(
                f"{path} is not the image that was written there: {str(error).rstrip('.')}.",
                hint="Remove it, and the same command draws it anew.",
            ) from error
        return array

    def _pixels(self, x: Samples) -> Pixels:
        spec = self.engine.spec
        return to_pixels(x, value_range=spec.value_range, rounding=spec.rounding)

    def _clear(self) -> None:
        """Removes the run that the folder holds: what its report names, and nothing else."""
        if not self.report.exists():
            return
        try:
            made = _made(_read_report(self.report))
        except RunError:  # the images that are asked for now are all that is known
            made = self.images
        for image in made:
            for suffix in (".png", ".npy"):
                (self.folder / f"{image:06d}{suffix}").unlink(missing_ok=True)
        for name in ("run.json", "grid.png", GIF_NAME, NPZ_NAME):
            (self.folder / name).unlink(missing_ok=True)

    @cached_property
    def _identity(self) -> dict[str, Any]:
        engine, recipe = self.engine, self.recipe
        sampler, loop = recipe.loop(engine.spec)
        observed = json.dumps(dict(recipe.observations), sort_keys=True)
        return {
            "engine sha256": engine.sha256,
            "runtime": engine.describe()["runtime"],
            "device": engine.name,
            "seed": recipe.seed,
            "sampler": sampler,
            "steps": list(loop.steps)  # as JSON gives it back
            if isinstance(loop.steps, tuple)
            else len(recipe.table(engine.spec)),
            "eta": loop.eta,
            "spacing": loop.spacing,
            "labels": list(self.labels),
            "guidance": recipe.guidance,
            **(
                {"observations": hashlib.sha256(observed.encode()).hexdigest()}
                if recipe.observations
                else {}
            ),
            "noise": noise_module.SCHEME,
        }

    def _write_report(
        self,
        identity: Mapping[str, Any],
        *,
        finished: bool,
        timing: Mapping[str, float] | None = None,
    ) -> None:
        made = self.images
        if self.report.exists():  # of the same run, or `prepare` would have refused
            before = _made(_read_report(self.report))
            made = range(min(before.start, made.start), max(before.stop, made.stop))
        report = {
            "tool": f"ddpm-deploy {__version__}",
            "finished": finished,
            "identity": dict(identity),
            "start": self.start,
            "count": self.count,
            "images": [made.start, made.stop],
            "batch": self.batch,
            "command": list(self.origin),
            "engine": str(self.engine.path),
            "spec": self.engine.spec.to_dict(),
            "machine": {
                "platform": platform.platform(),
                "processor": platform.machine(),
                "python": platform.python_version(),
                "numpy": np.__version__,
            },
            "timing": dict(timing or {}),
        }
        write_text(self.report, json.dumps(report, indent=2) + "\n")


def default_batch(spec: ModelSpec) -> int:
    """Chooses a batch that fits a small machine: 1 at 64x64, 4 at 32x32, 64 at 8x8.

    Attention at full resolution takes memory with the square of the pixels, unless the runtime
    fuses it.
    """
    pixels = math.prod(spec.sample_shape[1:])
    return max(1, min(64, 2**12 // pixels))


def batch_for(engine: Engine) -> int:
    """Returns how many samples an engine should be given at once, if nobody says."""
    return engine.best_batch or default_batch(engine.spec)


def recorded_batch(folder: Path) -> int | None:
    """Returns the batch with which the run in a folder was begun, None where there is no run.

    Going on with it cuts the batches as before, for engines whose rounding depends on them.

    Raises:
        RunError: The folder's `run.json` is damaged.
    """
    report = folder / "run.json"
    return int(_read_report(report)["batch"]) if report.exists() else None


def _read_report(path: Path) -> Mapping[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        sound = isinstance(report["identity"], dict) and int(report["batch"]) >= 1
        sound = sound and len(_made(report)) >= 1
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise _damaged(path, repr(error)) from error
    if not sound:
        raise _damaged(path, "its numbers make no sense")
    return cast("Mapping[str, Any]", report)


def _made(report: Mapping[str, Any]) -> range:
    """The images that a run's invocations were asked for, so far."""
    start, stop = report["images"]
    return range(int(start), int(stop))


def _damaged(path: Path, what: str) -> RunError:
    return RunError(
        f"{path} is damaged ({what}), so the run cannot be continued.",
        hint="Name another folder with -o, or type --overwrite to draw it anew.",
    )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} was {before.get(key)}, is {value}"
        for key, value in now.items()
        if before.get(key) != value
    ]
