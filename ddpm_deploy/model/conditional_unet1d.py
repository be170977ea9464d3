"""The one-dimensional UNet that Diffusion Policy draws action sequences with.

Module names are those of real-stanford/diffusion_policy, so that its checkpoints load with
`strict=True`; `lerobot.py` renames those of huggingface/lerobot, which computes the same.

References:
    Chi et al. 2023, https://arxiv.org/abs/2303.04137, section 3 and appendix.
    Perez et al. 2017, https://arxiv.org/abs/1709.07871 (FiLM).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

GROUPS = 8
"""Groups of each norm, by default; those of the last block are always as many."""


@dataclass(frozen=True, kw_only=True)
class UNet1DWidths:
    """What the shapes of the weights say.

    Attributes:
        actions: Numbers in one action.
        down: Channels of each level, the longest sequence first.
        step: Of the timestep's embedding; even, at least 4.
        condition: Numbers in the condition beside it; 0 for none.
        kernel: Of the convolutions; odd.
        scale: Whether the condition scales the channels of a block, besides shifting them.
    """

    actions: int
    down: tuple[int, ...]
    step: int
    condition: int
    kernel: int
    scale: bool

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> UNet1DWidths:
        """Reads the widths off the weights.

        Args:
            state: A state dict with the names of this network.

        Raises:
            KeyError: A weight is missing.
            ValueError: No such network has these shapes.
        """
        first = state["down_modules.0.0.blocks.0.block.0.weight"]
        film = state["down_modules.0.0.cond_encoder.1.weight"]
        step = int(state["diffusion_step_encoder.1.weight"].shape[1])
        down: list[int] = []
        while (name := f"down_modules.{len(down)}.0.blocks.0.block.0.weight") in state:
            down.append(int(state[name].shape[0]))
        widths = cls(
            actions=int(first.shape[1]),
            down=tuple(down),
            step=step,
            condition=int(film.shape[1]) - step,
            kernel=int(first.shape[2]),
            scale=int(film.shape[0]) == 2 * down[0],
        )
        if widths.step < 4 or widths.step % 2 or widths.condition < 0 or widths.kernel % 2 == 0:
            raise ValueError(f"its shapes say {widths}, which is no such network")
        return widths

    @property
    def multiple(self) -> int:
        """What the length of a sequence must be a multiple of."""
        return 1 << (len(self.down) - 1)


class ConditionalUNet1D(nn.Module):
    """A prediction for (x, t, c), x being a sequence of actions and c a vector of observations.

    Args:
        widths: Of its layers.
        groups: Of its norms, but for the last; no weight says so.

    Raises:
        ValueError: The groups do not divide the channels.
    """

    def __init__(self, widths: UNet1DWidths, *, groups: int = GROUPS) -> None:
        super().__init__()
        w = self.widths = widths
        self.groups = groups
        self.diffusion_step_encoder = nn.Sequential(
            _Sinusoids(w.step),
            nn.Linear(w.step, 4 * w.step),
            nn.Mish(),
            nn.Linear(4 * w.step, w.step),
        )

        def block(before: int, after: int) -> _ResidualBlock:
            return _ResidualBlock(
                before,
                after,
                condition=w.step + w.condition,
                kernel=w.kernel,
                groups=groups,
                scale=w.scale,
            )

        self.down_modules = nn.ModuleList()
        for before, after in zip((w.actions, *w.down), w.down, strict=False):
            deepest = len(self.down_modules) == len(w.down) - 1
            self.down_modules.append(
                nn.ModuleList(
                    [
                        block(before, after),
                        block(after, after),
                        nn.Identity() if deepest else _Shorter(after),
                    ]
                )
            )
        self.mid_modules = nn.ModuleList([block(w.down[-1], w.down[-1]) for _ in range(2)])
        self.up_modules = nn.ModuleList(
            nn.ModuleList([block(2 * deep, shallow), block(shallow, shallow), _Longer(shallow)])
            for shallow, deep in reversed(list(zip(w.down, w.down[1:], strict=False)))
        )
        # The original leaves this block at its default, whatever the others have.
        self.final_conv = nn.Sequential(
            _ConvBlock(w.down[0], w.down[0], w.kernel, GROUPS), nn.Conv1d(w.down[0], w.actions, 1)
        )

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Predicts for a sequence of actions.

        Args:
            x: float32, (N, L, actions).
            t: int64, (N,).
            condition: float32, (N, condition), as it was in training: normalised; None for a
                network without one.

        Returns:
            float32, (N, L, actions).
        """
        feature = self.diffusion_step_encoder(t)
        if condition is not None:
            feature = torch.cat([feature, condition], dim=1)
        x = x.transpose(1, 2)
        skips: list[Tensor] = []
        for first, second, shorter in _triples(self.down_modules):
            x = second(first(x, feature), feature)
            skips.append(x)
            x = shorter(x)
        for middle in self.mid_modules:
            x = middle(x, feature)
        for first, second, longer in _triples(self.up_modules):
            x = torch.cat([x, skips.pop()], dim=1)
            x = longer(second(first(x, feature), feature))
        out: Tensor = self.final_conv(x)
        return out.transpose(1, 2)


def _triples(levels: nn.ModuleList) -> list[tuple[nn.Module, nn.Module, nn.Module]]:
    return [cast("tuple[nn.Module, nn.Module, nn.Module]", tuple(level)) for level in levels]  # type: ignore[arg-type]


class _Sinusoids(nn.Module):
    """The timestep's embedding: sines, then cosines, at falling frequencies."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # The original's own expression, with the logarithm as a double: another that is equal on
        # paper moves the output by 1e-5.
        half = width // 2
        self.frequency: Tensor
        self.register_buffer(
            "frequency",
            torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1))),
            persistent=False,
        )

    def forward(self, t: Tensor) -> Tensor:
        angle = t.float()[:, None] * self.frequency[None, :]
        return torch.cat([angle.sin(), angle.cos()], dim=1)


class _ConvBlock(nn.Module):
    def __init__(self, before: int, after: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv1d(before, after, kernel, padding=kernel // 2),
            nn.GroupNorm(groups, after),
            nn.Mish(),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x)
        return out


class _ResidualBlock(nn.Module):
    """Two convolutions, the channels between them scaled and shifted by the condition."""

    def __init__(
        self, before: int, after: int, *, condition: int, kernel: int, groups: int, scale: bool
    ) -> None:
        super().__init__()
        self.scale = scale
        self.blocks = nn.ModuleList(
            [_ConvBlock(before, after, kernel, groups), _ConvBlock(after, after, kernel, groups)]
        )
        self.cond_encoder = nn.Sequential(
            nn.Mish(), nn.Linear(condition, 2 * after if scale else after)
        )
        self.residual_conv = nn.Identity() if before == after else nn.Conv1d(before, after, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        first, second = self.blocks
        out: Tensor = first(x)
        film: Tensor = self.cond_encoder(condition).unsqueeze(-1)
        if self.scale:
            scale, shift = film.chunk(2, dim=1)
            out = scale * out + shift
        else:
            out = out + film
        after: Tensor = second(out) + self.residual_conv(x)
        return after


class _Shorter(nn.Module):
    """Halves the length."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class _Longer(nn.Module):
    """Doubles the length."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose1d(channels, channels, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out
