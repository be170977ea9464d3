"""The UNet of OpenAI's improved-diffusion and guided-diffusion, at any width.

Module names are the family's, so that its checkpoints load with `strict=True`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (torch's own convention)

from ddpm_deploy.model.unet import as_tensor

GROUPS = 32
"""Groups of every normalisation in the originals; no file says so."""

Resample = Literal["conv", "block", "pool"]


@dataclass(frozen=True, kw_only=True)
class UNetShape:
    """What the weights show of a network.

    Attributes:
        channels: Of the input.
        out_channels: Of the output.
        model_channels: Width of the timestep's sinusoids, of which the others are multiples.
        widths: Channels at each resolution, the finest first.
        blocks: Residual blocks at each resolution on the way down; one more on the way up.
        attention: Whether each resolution has attention, the finest first.
        resample: How one resolution becomes the next: a convolution, a residual block, or no
            weights at all.
        scale_shift: Whether the timestep scales and shifts what is normalised, or is added.
        classes: Number of classes; 0 for an unconditional network.
    """

    channels: int
    out_channels: int
    model_channels: int
    widths: tuple[int, ...]
    blocks: int
    attention: tuple[bool, ...]
    resample: Resample = "conv"
    scale_shift: bool = True
    classes: int = 0

    @property
    def mult(self) -> tuple[int | float, ...]:
        """The widths as multiples of `model_channels`."""
        ratios = (width / self.model_channels for width in self.widths)
        return tuple(int(ratio) if ratio.is_integer() else ratio for ratio in ratios)

    @property
    def downsampled(self) -> tuple[int, ...]:
        """By how much the image is halved where there is attention, besides the lowest level."""
        return tuple(2**level for level, there in enumerate(self.attention) if there)

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> UNetShape:
        """Reads a network off its weights.

        Args:
            state: A state dict with the family's names.

        Raises:
            KeyError: A weight is missing.
            ValueError: There are blocks of another number than such a network has, or a weight
                holds no numbers.
        """
        down, up = (_indices(state, name) for name in ("input_blocks", "output_blocks"))
        resample, blocks = _resampling(state, down, up)
        levels, rest = divmod(len(up), blocks + 1)
        if rest or max(down) != levels * (blocks + 1) - 1 or max(up) != len(up) - 1:
            raise ValueError(
                f"{len(up)} output blocks and {len(down)} input blocks are no network with "
                f"{blocks} residual blocks a level"
            )
        if empty := next((name for name, value in state.items() if not value.numel()), None):
            raise ValueError(f"{empty} holds no numbers")
        firsts = [1 + level * (blocks + 1) for level in range(levels)]
        middle = "middle_block.0"
        labels = state.get("label_emb.weight")
        return cls(
            channels=int(state["input_blocks.0.0.weight"].shape[1]),
            out_channels=int(state["out.2.weight"].shape[0]),
            model_channels=int(state["time_embed.0.weight"].shape[1]),
            widths=tuple(
                int(state[f"input_blocks.{i}.0.out_layers.3.weight"].shape[0]) for i in firsts
            ),
            blocks=blocks,
            attention=tuple(f"input_blocks.{i}.1.qkv.weight" in state for i in firsts),
            resample=resample,
            scale_shift=(
                state[f"{middle}.emb_layers.1.weight"].shape[0]
                == 2 * state[f"{middle}.out_layers.3.weight"].shape[0]
            ),
            classes=0 if labels is None else int(labels.shape[0]),
        )


def _indices(state: Mapping[str, Tensor], name: str) -> list[int]:
    found = (re.match(rf"{name}\.(\d+)\.", key) for key in state)
    return sorted({int(match[1]) for match in found if match})


def _resampling(
    state: Mapping[str, Tensor], down: list[int], up: list[int]
) -> tuple[Resample, int]:
    """Returns how resolutions change, and how many residual blocks each has."""
    for i in down:
        if f"input_blocks.{i}.0.op.weight" in state:
            return "conv", i - 1
    for i in up:
        for k in (1, 2):
            if f"output_blocks.{i}.{k}.conv.weight" in state:
                return "conv", i
            if f"output_blocks.{i}.{k}.in_layers.0.weight" in state:
                return "block", i
    # Pooling has no weights, so its index is left out on the way down.
    if missing := sorted(set(range(max(down))) - set(down)):
        return "pool", missing[0] - 1
    return "conv", len(up) - 1  # a single resolution


@dataclass(frozen=True, kw_only=True)
class Heads:
    """How attention is split, which no weights show.

    Attributes:
        down: Heads on the way down and in the middle.
        up: Heads on the way up.
        channels: Channels of each head, where that is fixed instead; `down` and `up` then mean
            nothing.
        new_order: What the projection gives is split into queries, keys and values first, and then
            into heads; the legacy order is heads first.
    """

    down: int = 1
    up: int = 1
    channels: int | None = None
    new_order: bool = False

    def of(self, width: int, *, up: bool) -> int:
        """Returns the heads of an attention.

        Raises:
            ValueError: They do not divide its width.
        """
        part = (self.up if up else self.down) if self.channels is None else self.channels
        if part < 1 or width % part:
            what = "heads" if self.channels is None else "channels a head"
            raise ValueError(f"{part} {what} do not divide the {width} channels of an attention")
        return part if self.channels is None else width // part


class OpenAIUNet(nn.Module):
    """ε_θ(x, t) or, with classes, ε_θ(x, t, y); with a learned variance, v behind it.

    Args:
        shape: What the weights show.
        heads: How attention is split.
        steps: T of training, where the network sees t · 1000 / T; None where it sees t.
        zero_label: Adds a row of zeros to the labels, for "no label".

    Raises:
        ValueError: The heads do not divide a width.
    """

    def __init__(
        self,
        shape: UNetShape,
        *,
        heads: Heads,
        steps: int | None = None,
        zero_label: bool = False,
    ) -> None:
        super().__init__()
        self.shape, self.steps, self.zero_label = shape, steps, zero_label
        emb = 4 * shape.model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(shape.model_channels, emb), nn.SiLU(), nn.Linear(emb, emb)
        )
        if shape.classes:
            self.label_emb = nn.Embedding(shape.classes, emb)
        self.input_blocks = nn.ModuleList()
        self.middle_block: nn.Module
        self.output_blocks = nn.ModuleList()
        self._build(shape, heads)
        self.out = nn.Sequential(
            nn.GroupNorm(GROUPS, shape.widths[0]),
            nn.SiLU(),
            nn.Conv2d(shape.widths[0], shape.out_channels, kernel_size=3, padding=1),
        )
        # The originals' own expression: another that is equal on paper moves the output.
        half = shape.model_channels // 2
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32) / half
        self.frequency: Tensor
        self.register_buffer("frequency", torch.exp(exponent), persistent=False)

    def _build(self, shape: UNetShape, heads: Heads) -> None:
        emb, scale_shift = 4 * shape.model_channels, shape.scale_shift
        levels = len(shape.widths)

        def block(channels: int, out: int, size: Literal["same", "half", "double"]) -> nn.Module:
            return _ResBlock(channels, out, emb, scale_shift=scale_shift, size=size)

        def attention(width: int, *, up: bool) -> nn.Module:
            return _Attention(width, heads.of(width, up=up), new_order=heads.new_order)

        width = shape.widths[0]
        skips = [width]
        self.input_blocks.append(_Stage(nn.Conv2d(shape.channels, width, kernel_size=3, padding=1)))
        for level, out in enumerate(shape.widths):
            for _ in range(shape.blocks):
                layers = [block(width, out, "same")]
                width = out
                if shape.attention[level]:
                    layers.append(attention(width, up=False))
                self.input_blocks.append(_Stage(*layers))
                skips.append(width)
            if level < levels - 1:
                match shape.resample:
                    case "block":
                        smaller = block(width, width, "half")
                    case "conv":
                        smaller = _Downsample(width)
                    case _:
                        smaller = nn.AvgPool2d(2)
                self.input_blocks.append(_Stage(smaller))
                skips.append(width)
        self.middle_block = _Stage(
            block(width, width, "same"), attention(width, up=False), block(width, width, "same")
        )
        for level in reversed(range(levels)):
            out = shape.widths[level]
            for i in range(shape.blocks + 1):
                layers = [block(width + skips.pop(), out, "same")]
                width = out
                if shape.attention[level]:
                    layers.append(attention(width, up=True))
                if level and i == shape.blocks:
                    larger = (
                        block(width, width, "double")
                        if shape.resample == "block"
                        else _Upsample(width, conv=shape.resample == "conv")
                    )
                    layers.append(larger)
                self.output_blocks.append(_Stage(*layers))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predicts the noise in x.

        Args:
            x: float32, (N, C, H, W).
            t: int64, (N,), 0 to T-1.
            y: int64, (N,), 0 to `classes` - 1, or `classes` for "no label" where a row of zeros
                was added; None for an unconditional network.

        Returns:
            float32, (N, out_channels, H, W).
        """
        at = t.to(self.frequency.dtype)
        if self.steps is not None:
            at = at * (1000.0 / self.steps)
        angle = at[:, None] * self.frequency
        emb = as_tensor(self.time_embed(torch.cat([angle.cos(), angle.sin()], dim=-1)))
        if y is not None:
            rows = self.label_emb.weight
            if self.zero_label:
                rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
            emb = emb + F.embedding(y, rows)
        h, skips = x, []
        for stage in self.input_blocks:
            h = as_tensor(stage(h, emb))
            skips.append(h)
        h = as_tensor(self.middle_block(h, emb))
        for stage in self.output_blocks:
            h = as_tensor(stage(torch.cat([h, skips.pop()], dim=1), emb))
        return as_tensor(self.out(h))


class _Stage(nn.ModuleList):
    """Layers in a row, of which those that see the embedding are given it."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(layers)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = as_tensor(layer(x, emb) if isinstance(layer, _ResBlock) else layer(x))
        return x


class _Downsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(width, width, kernel_size=3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return as_tensor(self.op(x))


class _Upsample(nn.Module):
    def __init__(self, width: int, *, conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, kernel_size=3, padding=1) if conv else None

    def forward(self, x: Tensor) -> Tensor:
        x = _double(x)
        return x if self.conv is None else as_tensor(self.conv(x))


class _ResBlock(nn.Module):
    def __init__(
        self,
        channels: int,
        out: int,
        emb: int,
        *,
        scale_shift: bool,
        size: Literal["same", "half", "double"],
    ) -> None:
        super().__init__()
        self.scale_shift, self.size = scale_shift, size
        self.in_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, channels),
            nn.SiLU(),
            nn.Conv2d(channels, out, kernel_size=3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, out * (1 + scale_shift)))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, out),
            nn.SiLU(),
            nn.Identity(),  # dropout, of training
            nn.Conv2d(out, out, kernel_size=3, padding=1),
        )
        self.skip_connection = (
            nn.Identity() if channels == out else nn.Conv2d(channels, out, kernel_size=1)
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, activation, conv = self.in_layers
        h = self._resized(as_tensor(activation(norm(x))))
        x = self._resized(x)
        h = as_tensor(conv(h))
        added = as_tensor(self.emb_layers(emb))[:, :, None, None]
        if self.scale_shift:
            scale, shift = added.chunk(2, dim=1)
            h = as_tensor(self.out_layers[0](h)) * (1 + scale) + shift
            h = as_tensor(self.out_layers[1:](h))
        else:
            h = as_tensor(self.out_layers(h + added))
        return as_tensor(self.skip_connection(x)) + h

    def _resized(self, x: Tensor) -> Tensor:
        if self.size == "half":
            return F.avg_pool2d(x, 2)
        return _double(x) if self.size == "double" else x


class _Attention(nn.Module):
    """Attention among all pixels; it never holds their (HW)² matrix."""

    def __init__(self, width: int, heads: int, *, new_order: bool) -> None:
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = nn.GroupNorm(GROUPS, width)
        self.qkv = nn.Conv1d(width, 3 * width, kernel_size=1)
        self.proj_out = nn.Conv1d(width, width, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._split(as_tensor(self.qkv(self.norm(x.flatten(2)))))
        attended = F.scaled_dot_product_attention(q, k, v)
        out = as_tensor(self.proj_out(attended.transpose(2, 3).flatten(1, 2)))
        return x + out.reshape(x.shape)

    def _split(self, qkv: Tensor) -> Iterator[Tensor]:
        """Yields queries, keys and values, (N, heads, pixels, channels of a head) each."""
        width, pixels = qkv.shape[1] // 3, qkv.shape[2]
        each = width // self.heads
        if self.new_order:
            parts = qkv.reshape(-1, 3, self.heads, each, pixels).unbind(1)
        else:
            parts = qkv.reshape(-1, self.heads, 3, each, pixels).unbind(2)
        for part in parts:
            yield part.transpose(2, 3)


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")
