"""One step of Algorithm 1 and everything that it changes (Ho et al. 2020)."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from ddpm_deploy.arrays import Samples, Timesteps
from ddpm_deploy.data import ImageData
from ddpm_deploy.errors import DataError, TrainError
from ddpm_deploy.model.unet import UNet
from ddpm_deploy.noise import SeededNoise
from ddpm_deploy.sampling import denoise
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.train.batches import Batch, Batches
from ddpm_deploy.train.loss import EpsilonLoss
from ddpm_deploy.train.settings import Settings

FORMAT = 1
"""Version of the checkpoints' form. A reader refuses a later one."""

FIRST = "inc.double_conv.0.weight"
"""The weights that see x first, without a bias and before a GroupNorm."""

FIRST_SCALE = math.sqrt(3 * 1e-5)
"""How much smaller than PyTorch's default `FIRST` begins, and how much slower it moves.

A GroupNorm takes the size of x_t away, so the network could not tell a noise that is 10 % larger
from one that is not; of 64 pixels many are, and DDIM never mends the error. With this scale the
variance that the norm divides by is about its own ε of 1e-5, and the size stays visible. (The
default's variance is 1/3 where x_t has 1.)
"""


@dataclass(frozen=True, kw_only=True)
class TrainStep:
    """What one step did.

    Attributes:
        step: How many steps are done.
        loss: This process's mean squared error, a scalar on the device.
        grad_norm: Norm of the gradient before clipping, a scalar on the device.
        lr: The learning rate used.
    """

    step: int
    loss: Tensor
    grad_norm: Tensor
    lr: float


class Trainer:
    """A network on its way: weights, their average, the optimizer, and the number of steps done.

    Args:
        settings: What the run is.
        data: What it learns.
        fabric: Where it runs; launched.

    Raises:
        DataError: The data do not fit the network or the batch.
        TrainError: The processes cannot share the batch.
    """

    def __init__(self, settings: Settings, data: ImageData, fabric: Fabric) -> None:
        check(settings, data, fabric.world_size)
        self.settings, self.data, self.fabric = settings, data, fabric
        classes = 0 if settings.unconditional else len(data.classes)
        names = data.classes if classes else ()
        self.spec: ModelSpec = settings.spec(data.sample_shape, names)
        self.step = 0

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            network = new_network(data.sample_shape[0], classes, settings)
        network = network.to(fabric.device)
        self._plain = network
        self._average = copy.deepcopy(network).eval().requires_grad_(False)
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [p for n, p in network.named_parameters() if n != FIRST], "scale": 1.0},
                {"params": [network.get_parameter(FIRST)], "scale": FIRST_SCALE},
            ],
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            # The fused form unscales for itself, which forbids clipping under a gradient scaler.
            fused=settings.precision != "16",
        )
        self._network, self._wrapped_optimizer = fabric.setup(network, self._optimizer)
        self._loss = EpsilonLoss(self.spec.schedule, fabric.device)
        self._batches = Batches(
            data=data,
            seed=settings.seed,
            batch=settings.batch,
            timesteps=settings.timesteps,
            flip=settings.flip,
            drop_label=settings.drop_label,
            classes=classes,
            rank=fabric.global_rank,
            world=fabric.world_size,
        )
        self._stream: Iterator[Batch] | None = None

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(p.numel() for p in self._plain.parameters())

    def advance(self) -> TrainStep:
        """Does one step (Ho et al. 2020, Algorithm 1).

        Raises:
            DataError: A picture cannot be read.
            TrainError: The device's memory is too small.
        """
        if self._stream is None:
            self._stream = self._batches.stream(self.step)
        batch = next(self._stream)
        try:
            return self._advance(batch)
        except RuntimeError as error:
            if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
                raise
            raise TrainError(
                f"{self.fabric.device} has too little memory for {len(batch.x0)} pictures of "
                f"{'x'.join(map(str, self.spec.sample_shape))}.",
                hint=f"Type a smaller batch: --batch {max(1, self.settings.batch // 2)}",
            ) from error

    def _advance(self, batch: Batch) -> TrainStep:
        settings = self.settings
        rise = (self.step + 1) / (settings.warmup + 1)
        fall = (settings.steps - self.step) / (settings.cooldown + 1)
        lr = settings.lr * min(1.0, rise, fall)
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        x0, t, eps = (self._to_device(a) for a in (batch.x0, batch.t, batch.eps))
        y = None if batch.y is None else self._to_device(batch.y)

        self._wrapped_optimizer.zero_grad()
        loss = self._loss(self._network, x0, t, eps, y)
        self.fabric.backward(loss)
        norm = self.fabric.clip_gradients(
            self._network,
            self._wrapped_optimizer,
            max_norm=settings.clip_grad or float("inf"),
            error_if_nonfinite=False,
        )
        self._wrapped_optimizer.step()
        self.step += 1
        self._follow()
        return TrainStep(
            step=self.step, loss=loss.detach(), grad_norm=torch.as_tensor(norm).detach(), lr=lr
        )

    def _follow(self) -> None:
        """Moves the average towards the weights; a young average forgets its start soon."""
        decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self._average.parameters()), list(self._plain.parameters()), 1.0 - decay
            )

    def _to_device(self, array: Any) -> Tensor:
        return torch.from_numpy(array).to(self.fabric.device, non_blocking=True)

    def sample(self, count: int, *, steps: int = 50) -> Samples:
        """Draws from the averaged network with DDIM, the labels in turn.

        Args:
            count: Pictures.
            steps: Transitions, at most T.

        Returns:
            float32, (count, C, H, W), in [-1, 1].
        """
        label = self.spec.label
        y = None
        if label is not None and label.classes:
            y = torch.arange(count, device=self.fabric.device) % label.classes

        def predict(x: Samples, t: Timesteps) -> Samples:
            with torch.inference_mode():
                given = (self._to_device(x), self._to_device(t))
                out = self._average(*given) if y is None else self._average(*given, y)
            drawn: Samples = out.cpu().numpy()
            return drawn

        table = self.spec.table("ddim", min(steps, self.spec.schedule.T), spacing="trailing")
        noise = SeededNoise(self.settings.seed, range(count), self.spec.sample_shape)
        *_, last = denoise(predict, table, noise)
        return np.clip(last.x, -1.0, 1.0)

    def state(self) -> dict[str, Any]:
        """Returns all that `restore` needs: tensors, numbers and strings.

        There is no state of a random generator among them: every draw comes from (seed, step).
        """
        return {
            "ddpm_deploy": self._identity(),
            "model": self._plain.state_dict(),
            "ema": self._average.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
            "step": self.step,
        }

    def weights(self) -> dict[str, Any]:
        """Returns what one exports: the spec and the averaged weights."""
        return {"ddpm_deploy": self._identity(), "ema": self._average.state_dict()}

    def _identity(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "spec": self.spec.to_json(),
            "settings": json.dumps(self.settings.to_dict(), sort_keys=True),
            "data": self.data.fingerprint,
            "classes": list(self.data.classes),
            "step": self.step,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes up where `state` was.

        Raises:
            TrainError: The state is not this network's, or has more steps than the run is to have.
        """
        if state["ddpm_deploy"].get("data") != self.data.fingerprint:
            raise TrainError(
                f"{self.data.source} does not hold the pictures that the run began with.",
                hint="Give the same --data, or begin another run with another -o.",
            )
        try:
            self._plain.load_state_dict(state["model"], strict=True)
            self._average.load_state_dict(state["ema"], strict=True)
            self._optimizer.load_state_dict(state["optimizer"])
            self.fabric.strategy.precision.load_state_dict(state["precision"])
            self.step = int(state["step"])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise TrainError(
                f"The checkpoint does not fit the run: {' '.join(str(error).split())}",
                hint="Begin another run with another -o.",
            ) from error
        if not 0 <= self.step <= self.settings.steps:
            raise TrainError(
                f"The run has done {self.step} steps, and --steps is {self.settings.steps}.",
                hint="Leave --steps out, or type more than are done.",
            )
        self._stream = None


def new_network(channels: int, classes: int, settings: Settings) -> UNet:
    """Makes a network whose first step of training has not been done."""
    network = UNet(channels, classes=classes, widths=settings.widths)
    with torch.no_grad():
        network.get_parameter(FIRST).mul_(FIRST_SCALE)
    return network


def check(settings: Settings, data: ImageData, world: int) -> None:
    """Refuses data and settings that cannot go together.

    Raises:
        DataError: The data do not fit the network or the batch.
        TrainError: The processes cannot share the batch.
    """
    _, height, width = data.sample_shape
    if height % 8 or width % 8:
        near = max(8, round(min(height, width) / 8) * 8)
        raise DataError(
            f"The pictures of {data.source} are {height}x{width}; this network halves them three "
            "times, so 8 must divide both.",
            hint=f"Type a size that it divides: --image-size {near}",
        )
    if settings.batch > len(data):
        raise DataError(
            f"A batch of {settings.batch} needs as many pictures; {data.source} has {len(data)}.",
            hint=f"Type a smaller batch: --batch {len(data)}",
        )
    if settings.batch % world:
        raise TrainError(
            f"A batch of {settings.batch} cannot be shared by {world} processes.",
            hint=f"Type a multiple of {world}: --batch {-(-settings.batch // world) * world}",
        )
