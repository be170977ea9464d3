"""What a training run is: every number that decides which network comes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

from ddpm_deploy.errors import TrainError
from ddpm_deploy.model.checkpoint import OWN_FAMILY
from ddpm_deploy.model.family import label_condition
from ddpm_deploy.model.unet import UNetWidths
from ddpm_deploy.sampling import Variance
from ddpm_deploy.schedule import SCHEDULES, named_schedule
from ddpm_deploy.spec import ModelSpec

Precision = Literal["32", "bf16", "16"]

FREE = frozenset({"data", "steps", "save_every", "sample_every", "samples"})
"""Settings that a resumed run may change: they decide how long it goes on and what it shows."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a run.

    Attributes:
        data: A folder, an `.npz` file or `digits`, see `ddpm_deploy.data.open_data`.
        image_size: Height and width in pixels; the data's own when None.
        channels: 1 for grey, 3 for colour; the data's own when None.
        unconditional: Leave the data's labels unused.
        widths: Of the network.
        schedule: A key of `ddpm_deploy.schedule.SCHEDULES`.
        timesteps: T.
        variance: What the sampler shall use: `fixed_small` β̃ or `fixed_large` β.
        batch: Pictures a step, over all processes together.
        lr: Learning rate of AdamW, after the warm-up.
        warmup: First steps, over which the learning rate rises to `lr`.
        cooldown: Last steps, over which it falls to 0.
        weight_decay: Of AdamW.
        ema: Decay of the averaged weights, in [0, 1).
        clip_grad: Norm that the gradient is clipped to; 0 leaves it.
        drop_label: Share of labels that training hides, for guidance.
        flip: Mirror every second picture.
        precision: `32`, or mixed `bf16` or `16`.
        seed: Of the weights, the order of the pictures, t, and the noise.
        steps: Steps in all.
        save_every: Steps between checkpoints.
        sample_every: Steps between sample grids; 0 draws none.
        samples: Pictures in a grid.

    Raises:
        ValueError: A setting is outside its range.
    """

    data: str
    image_size: int | None = None
    channels: int | None = None
    unconditional: bool = False
    widths: UNetWidths = field(default_factory=UNetWidths)
    schedule: str = "linear"
    timesteps: int = 1000
    variance: Variance = "fixed_small"
    batch: int = 64
    lr: float = 3e-4
    warmup: int = 200
    cooldown: int = 0
    weight_decay: float = 0.01
    ema: float = 0.999
    clip_grad: float = 1.0
    drop_label: float = 0.1
    flip: bool = True
    precision: Precision = "32"
    seed: int = 0
    steps: int = 100_000
    save_every: int = 1000
    sample_every: int = 2000
    samples: int = 64

    def __post_init__(self) -> None:
        for name, right, wanted in [
            ("schedule", self.schedule in SCHEDULES, "one of " + ", ".join(SCHEDULES)),
            ("variance", self.variance in {"fixed_small", "fixed_large"}, "fixed_small or _large"),
            ("precision", self.precision in get_args(Precision), "32, bf16 or 16"),
            *((n, getattr(self, n) >= 1, "at least 1") for n in ("timesteps", "batch", "steps")),
            *((n, getattr(self, n) >= 1, "at least 1") for n in ("save_every", "samples")),
            *(
                (n, getattr(self, n) >= 0, "0 or more")
                for n in ("warmup", "cooldown", "sample_every")
            ),
            *((n, getattr(self, n) >= 0, "0 or more") for n in ("weight_decay", "clip_grad")),
            ("lr", self.lr > 0, "above 0"),
            ("ema", 0 <= self.ema < 1, "in [0, 1)"),
            ("drop_label", 0 <= self.drop_label <= 1, "in [0, 1]"),
            ("seed", 0 <= self.seed < 1 << 63, "in 0..2^63-1"),
        ]:
            if not right:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {wanted}")

    def spec(self, sample_shape: tuple[int, int, int], classes: Sequence[str]) -> ModelSpec:
        """Returns what the trained network is.

        Args:
            sample_shape: (C, H, W) of the data.
            classes: What the data's classes are called; none make an unconditional network.
        """
        return ModelSpec(
            sample_shape=sample_shape,
            schedule=named_schedule(self.schedule, self.timesteps),
            variance=self.variance,
            conditions=(label_condition(len(classes), classes),) if classes else (),
            family=OWN_FAMILY,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as JSON's types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Settings:
        """Reads what `to_dict` gave.

        Raises:
            ValueError: A setting is unknown or outside its range.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(data.keys() - known):
            raise ValueError(f"the settings {', '.join(unknown)} are unknown to this release")
        widths: dict[str, Any] = {
            block: tuple(channels) if isinstance(channels, list) else channels
            for block, channels in data["widths"].items()
        }
        return cls(**{**data, "widths": UNetWidths(**widths)})

    def resumed_with(self, changes: Mapping[str, Any]) -> Settings:
        """Returns the settings with which a run goes on.

        Args:
            changes: The settings that were typed again, by name.

        Raises:
            TrainError: One of them would make it another run.
            ValueError: One of them is outside its range.
        """
        # The number of steps decides where the cool-down begins.
        free = FREE - {"steps"} if self.cooldown else FREE
        changed = [
            f"{option(name)} was {show(getattr(self, name))}, not {show(value)}"
            for name, value in changes.items()
            if name not in free and value != getattr(self, name)
        ]
        if changed:
            raise TrainError(
                "The run cannot go on with other settings than it began with: "
                f"{'; '.join(changed)}.",
                hint="Leave them out to go on, or begin another run with another -o.",
            )
        return replace(self, **{name: changes[name] for name in FREE & changes.keys()})


def parse_widths(text: str, base: UNetWidths) -> UNetWidths:
    """Reads widths as they are typed: `inc=32 down=64,64,32 bottom=32,32`.

    Args:
        text: Blocks and their channels; `up_middle` and `time` too.
        base: Gives those that are not named.

    Raises:
        ValueError: A block is unknown, or has the wrong number of channels.
    """
    wanted = asdict(base)
    for part in text.split():
        name, _, numbers = part.partition("=")
        if name not in wanted:
            raise ValueError(f"{name!r} is no block; the blocks are {', '.join(wanted)}")
        try:
            channels = tuple(int(number) for number in numbers.split(","))
        except ValueError as error:
            raise ValueError(f"{part!r} does not read BLOCK=CHANNELS,CHANNELS") from error
        counts = {1} if isinstance(wanted[name], int) else {2, 3} if name == "bottom" else {3}
        if len(channels) not in counts or min(channels) < 1:
            count = " or ".join(map(str, sorted(counts)))
            raise ValueError(f"{part!r} must give {count} positive number(s)")
        wanted[name] = channels[0] if isinstance(wanted[name], int) else channels
    widths = UNetWidths(**wanted)
    for name, channels in [("down", widths.down), ("up", widths.up)]:
        if any(width % 4 for width in channels):
            raise ValueError(f"{name} is {show(channels)}; 4 attention heads must divide each")
    if widths.time % 2:
        raise ValueError(f"time is {widths.time}; it must be even, half sines and half cosines")
    return widths


def option(name: str) -> str:
    """Returns a setting's name as it is typed."""
    return "--" + name.replace("_", "-")


def show(value: object) -> str:
    """Returns a setting's value as it is typed."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, UNetWidths):
        return "'" + " ".join(f"{k}={show(v)}" for k, v in asdict(value).items()) + "'"
    return str(value)
