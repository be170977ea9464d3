"""The U-Net that diffusers calls UNet2DModel; older DDPM ports have it under other names.

Module names are diffusers' own, so that its checkpoints load with `strict=True`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (torch's own convention)

from ddpm_deploy.model.unet import as_tensor

Resample = Literal["conv", "resnet"]

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
    "gelu": F.gelu,
    "relu": F.relu,
}


@dataclass(frozen=True, kw_only=True)
class Block:
    """What a level of the U-Net is made of.

    Attributes:
        attention: Whether attention follows every residual block.
        resample: How it gets to the next level: a convolution, or a residual block.
    """

    attention: bool = False
    resample: Resample = "conv"


@dataclass(frozen=True, kw_only=True)
class UNet2DSettings:
    """The hyper-parameters of the network.

    Attributes:
        channels: Of the images.
        out_channels: Of the output.
        widths: Channels of each level, the finest first.
        layers: Residual blocks of a level on the way down; one more on the way up.
        down: The levels on the way down, the finest first.
        up: The levels on the way up, the coarsest first.
        classes: Number of classes; 0 makes an unconditional network.
        first: Channels before the first level; as many as that has when 0.
        time: Width of the timestep embedding; four times `first` when 0.
        head_dim: Channels of an attention head; all channels in one when None.
        groups: Of every group normalisation but the middle attention's.
        middle_groups: Of the middle attention's; None leaves it out.
        eps: Of every group normalisation.
        padding: Of the convolutions that go down; 0 pads at the right and the bottom alone.
        activation: One of `ACTIVATIONS`.
        scale_shift: Whether the embedding scales and shifts, rather than being added.
        middle: Whether there is a middle between down and up.
        middle_attention: Whether it attends.
        middle_scale: What its residual sums are divided by.
        center: Whether x becomes 2x - 1 first.
        cosine_first: Whether the timestep's cosines come before its sines.
    """

    channels: int
    out_channels: int
    widths: tuple[int, ...]
    layers: int
    down: tuple[Block, ...]
    up: tuple[Block, ...]
    classes: int = 0
    first: int = 0
    time: int = 0
    head_dim: int | None = 8
    groups: int = 32
    middle_groups: int | None = 32
    eps: float = 1e-5
    padding: int = 1
    activation: str = "silu"
    scale_shift: bool = False
    middle: bool = True
    middle_attention: bool = True
    middle_scale: float = 1.0
    center: bool = False
    cosine_first: bool = True


def timestep_frequencies(width: int, shift: float) -> Tensor:
    """Returns diffusers' frequencies of the timestep embedding, float32, (width // 2,).

    By its own expression: another that is equal on paper moves the output by 1e-6.
    """
    half = width // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32)
    return torch.exp(exponent / (half - shift))


class UNet2D(nn.Module):
    """The network's function of x and t or, with classes, of x, t and y.

    Args:
        settings: Its hyper-parameters.
        frequencies: Of the timestep embedding: float32, (first // 2,).

    Raises:
        ValueError: The settings make no network.
    """

    def __init__(self, settings: UNet2DSettings, frequencies: Tensor) -> None:
        super().__init__()
        s = self.settings = settings
        if not len(s.widths) == len(s.down) == len(s.up):
            raise ValueError(
                f"there are {len(s.widths)} widths for {len(s.down)} levels down and {len(s.up)} up"
            )
        if s.activation not in ACTIVATIONS:
            raise ValueError(f"act_fn is {s.activation}; there are {', '.join(ACTIVATIONS)}")
        first, levels = s.first or s.widths[0], len(s.widths)
        time = s.time or 4 * first
        self.conv_in = nn.Conv2d(s.channels, first, kernel_size=3, padding=1)
        self.time_embedding = nn.ModuleDict(
            {"linear_1": nn.Linear(first, time), "linear_2": nn.Linear(time, time)}
        )
        if s.classes:
            self.class_embedding = nn.Embedding(s.classes, time)
        self.down_blocks = nn.ModuleList()
        before = first
        skips = [first]
        for level, (block, width) in enumerate(zip(s.down, s.widths, strict=True)):
            further: _Direction = "" if level == levels - 1 else "down"
            inputs = [before] + [width] * (s.layers - 1)
            self.down_blocks.append(
                _Level(s, block, inputs=inputs, width=width, time=time, direction=further)
            )
            skips += [width] * (s.layers + bool(further))
            before = width
        if s.middle:
            self.mid_block = _Middle(s, before, time)
        self.up_blocks = nn.ModuleList()
        for level, (block, width) in enumerate(zip(s.up, reversed(s.widths), strict=True)):
            inputs = []
            for _ in range(s.layers + 1):
                inputs.append(before + skips.pop())
                before = width
            further = "" if level == levels - 1 else "up"
            self.up_blocks.append(
                _Level(s, block, inputs=inputs, width=width, time=time, direction=further)
            )
        self.conv_norm_out = nn.GroupNorm(s.groups, before, eps=s.eps)
        self.conv_out = nn.Conv2d(before, s.out_channels, kernel_size=3, padding=1)
        self.frequencies: Tensor
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predicts from x.

        Args:
            x: float32, (N, C, H, W); 2^(levels - 1) divides H and W.
            t: int64, (N,), 0 to T-1.
            y: int64, (N,), 0 to `classes` - 1; None for an unconditional network.

        Returns:
            float32, (N, out_channels, H, W).
        """
        emb = self._embedding(t)
        if y is not None:
            emb = emb + self.class_embedding(y)
        if self.settings.center:
            x = 2 * x - 1.0
        h = as_tensor(self.conv_in(x))
        skips = [h]
        for block in self.down_blocks:
            h = _level(block).go_down(h, emb, skips)
        if self.settings.middle:
            h = as_tensor(self.mid_block(h, emb))
        for block in self.up_blocks:
            h = _level(block).go_up(h, emb, skips)
        return as_tensor(self.conv_out(F.silu(self.conv_norm_out(h))))

    def _embedding(self, t: Tensor) -> Tensor:
        angle = t.to(self.frequencies.dtype)[:, None] * self.frequencies
        waves = [angle.sin(), angle.cos()]
        emb = torch.cat(waves[::-1] if self.settings.cosine_first else waves, dim=-1)
        if self.conv_in.out_channels % 2:
            emb = F.pad(emb, (0, 1))
        emb = F.silu(self.time_embedding["linear_1"](emb))
        return as_tensor(self.time_embedding["linear_2"](emb))


_Direction = Literal["", "down", "up"]


class _Level(nn.Module):
    downsamplers: nn.ModuleList
    upsamplers: nn.ModuleList

    def __init__(
        self,
        settings: UNet2DSettings,
        block: Block,
        *,
        inputs: list[int],
        width: int,
        time: int,
        direction: _Direction,
    ) -> None:
        super().__init__()
        s = settings
        self.resnets = nn.ModuleList(_Residual(s, channels, width, time) for channels in inputs)
        if block.attention:
            self.attentions = nn.ModuleList(_Attention(s, width, s.groups) for _ in inputs)
        self.attends = block.attention
        resampler: nn.Module | None = None
        if direction and block.resample == "resnet":
            resampler = _Residual(s, width, width, time, resample=direction)
        elif direction:
            resampler = _Down(width, s.padding) if direction == "down" else _Up(width)
        self.resamples, self.embeds = resampler is not None, block.resample == "resnet"
        if resampler is not None:
            name = "downsamplers" if direction == "down" else "upsamplers"
            self.add_module(name, nn.ModuleList([resampler]))

    def go_down(self, h: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        for number in range(len(self.resnets)):
            h = self._layer(number, h, emb)
            skips.append(h)
        if self.resamples:
            h = self._resampled(self.downsamplers[0], h, emb)
            skips.append(h)
        return h

    def go_up(self, h: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        for number in range(len(self.resnets)):
            h = self._layer(number, torch.cat([h, skips.pop()], dim=1), emb)
        if self.resamples:
            h = self._resampled(self.upsamplers[0], h, emb)
        return h

    def _resampled(self, resampler: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
        return as_tensor(resampler(h, emb) if self.embeds else resampler(h))

    def _layer(self, number: int, h: Tensor, emb: Tensor) -> Tensor:
        h = as_tensor(self.resnets[number](h, emb))
        return as_tensor(self.attentions[number](h)) if self.attends else h


class _Middle(nn.Module):
    def __init__(self, settings: UNet2DSettings, width: int, time: int) -> None:
        super().__init__()
        s = settings
        self.resnets = nn.ModuleList(
            _Residual(s, width, width, time, scale=s.middle_scale) for _ in range(2)
        )
        self.attends = s.middle_attention
        if s.middle_attention:
            attention = _Attention(s, width, s.middle_groups, scale=s.middle_scale)
            self.attentions = nn.ModuleList([attention])

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        h = as_tensor(self.resnets[0](h, emb))
        if self.attends:
            h = as_tensor(self.attentions[0](h))
        return as_tensor(self.resnets[1](h, emb))


class _Residual(nn.Module):
    def __init__(
        self,
        settings: UNet2DSettings,
        channels: int,
        width: int,
        time: int,
        *,
        scale: float = 1.0,
        resample: _Direction = "",
    ) -> None:
        super().__init__()
        s = settings
        self.activation = ACTIVATIONS[s.activation]
        self.scale_shift, self.scale, self.resample = s.scale_shift, scale, resample
        self.norm1 = nn.GroupNorm(s.groups, channels, eps=s.eps)
        self.conv1 = nn.Conv2d(channels, width, kernel_size=3, padding=1)
        self.time_emb_proj = nn.Linear(time, 2 * width if s.scale_shift else width)
        self.norm2 = nn.GroupNorm(s.groups, width, eps=s.eps)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1)
        self.shortcut = channels != width
        if self.shortcut:
            self.conv_shortcut = nn.Conv2d(channels, width, kernel_size=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.activation(self.norm1(x))
        if self.resample == "down":
            x, h = F.avg_pool2d(x, 2), F.avg_pool2d(h, 2)
        elif self.resample == "up":
            x, h = _doubled(x), _doubled(h)
        h = self.conv1(h)
        shift = self.time_emb_proj(self.activation(emb))[:, :, None, None]
        if self.scale_shift:
            scale, shift = shift.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + shift)
        h = self.conv2(self.activation(h))
        if self.shortcut:
            x = self.conv_shortcut(x)
        h = as_tensor(x + h)
        return h / self.scale if self.scale != 1 else h


class _Attention(nn.Module):
    def __init__(
        self, settings: UNet2DSettings, width: int, groups: int | None, *, scale: float = 1.0
    ) -> None:
        super().__init__()
        head = settings.head_dim or width
        if head > width:
            raise ValueError(f"attention_head_dim is {head}; attention has {width} channels")
        self.heads, self.head, self.scale = width // head, head, scale
        self.normalises = groups is not None
        inner = self.heads * head  # less than the width where the heads do not fill it
        if groups is not None:
            self.group_norm = nn.GroupNorm(groups, width, eps=settings.eps)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, inner) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(inner, width)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        if self.normalises:
            tokens = self.group_norm(tokens)
        tokens = tokens.transpose(1, 2)
        q, k, v = (
            part(tokens).reshape(x.shape[0], -1, self.heads, self.head).transpose(1, 2)
            for part in (self.to_q, self.to_k, self.to_v)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out = as_tensor(self.to_out[0](attended)).transpose(1, 2).reshape(x.shape) + x
        return out / self.scale if self.scale != 1 else out


class _Down(nn.Module):
    def __init__(self, width: int, padding: int) -> None:
        super().__init__()
        self.uneven = padding == 0
        self.conv = nn.Conv2d(width, width, kernel_size=3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return as_tensor(self.conv(F.pad(x, (0, 1, 0, 1)) if self.uneven else x))


class _Up(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return as_tensor(self.conv(_doubled(x)))


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def _level(block: nn.Module) -> _Level:
    """Tells the type checker what a list of levels holds."""
    return block  # type: ignore[return-value]
