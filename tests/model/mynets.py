"""Networks of a user's own, right and wrong, as `--model` names them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional


class Net(nn.Module):
    """A few layers on pictures, with every kind of condition."""

    def __init__(self, base: int = 4, classes: int = 0, cond: int = 0, channels: int = 1) -> None:
        super().__init__()
        self.inp = nn.Conv2d(channels, base, 3, padding=1)
        self.norm = nn.BatchNorm2d(base)
        self.time = nn.Sequential(nn.Linear(1, base), nn.SiLU(), nn.Linear(base, base))
        self.label = nn.Embedding(classes + 1, base) if classes else None
        self.cond = nn.Linear(cond, base) if cond else None
        self.out = nn.Conv2d(base, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        """Takes t as a number of any kind."""
        h = self.norm(self.inp(x))
        emb = self.time(t.to(torch.float32)[:, None] / 10)
        left = list(conditions)
        if self.label is not None:
            emb = emb + self.label(left.pop(0))
        if self.cond is not None:
            emb = emb + self.cond(left.pop(0))
        return cast("Tensor", self.out(functional.silu(h + emb[:, :, None, None])))


def make(base: int = 4, classes: int = 0, cond: int = 0) -> Net:
    """Makes one."""
    print("building the network")  # as many factories do
    return Net(base, classes, cond)


def make_any(**arguments: Any) -> Net:
    return Net(**arguments)


class Strict(Net):
    """Takes t in float32 and nothing else."""

    def forward(self, x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        assert t.dtype == torch.float32, "t must be float32"
        return super().forward(x, t, *conditions)


class Prefixed(nn.Module):
    """Its own names begin as a wrapper's prefix does."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Net()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return cast("Tensor", self.model(x, t))


class TwoParts(nn.Module):
    """Has a wrapper's word beside another part."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.head = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return cast("Tensor", self.head(self.net(x, t)))


class Branches(Net):
    def forward(self, x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        if x.sum() > 0:
            return super().forward(x, t)
        return -super().forward(x, t)


class FixedBatch(Net):
    def forward(self, x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        return super().forward(x, t) + torch.zeros(2, 1, 1, 1)


class NoOnnx(Net):
    def forward(self, x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        bessel: Tensor = torch.special.bessel_j0(x)
        return super().forward(x, t) + bessel


class Random(Net):
    def forward(self, x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        return functional.dropout(super().forward(x, t), 0.5)


class Pair(Net):
    def forward(self, x: Tensor, t: Tensor, *conditions: Tensor) -> Any:
        return super().forward(x, t), t


class Half(Net):
    def forward(self, x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        return super().forward(x, t).half()


class Fails(Net):
    def forward(self, x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        raise ValueError("the picture must be square of 32")


def breaks() -> nn.Module:
    settings: dict[str, int] = {}
    return Net(settings["base"])


def gives_text() -> str:
    return "a network"


net = nn.Linear(2, 2)
number = 3
