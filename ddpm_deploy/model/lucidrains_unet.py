"""The UNet of lucidrains/denoising-diffusion-pytorch, for pictures or sequences, of any release.

Module names are those that its code has had since release 1.8. Two things are simpler here, and
exact: its space-to-depth with a 1x1 convolution behind is one strided convolution, and weights that
its early releases standardise at every call are standardised when they are read.
`model.lucidrains.own_weights` turns a file's tensors into these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (torch's own convention)

from ddpm_deploy.model.unet import as_tensor


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """One attention.

    Attributes:
        full: Whether every position sees every other; or else it is linear in their number.
        heads: Their number.
        width: Channels of one head.
        memory: Learned keys and values that stand before those of the positions.
    """

    full: bool
    heads: int
    width: int
    memory: int = 0


@dataclass(frozen=True, kw_only=True)
class UnetShape:
    """What the weights show, and what the release that trained them computes.

    Attributes:
        channels: Of the samples.
        out_channels: Of the output.
        dim: Width of the timestep's sinusoid; a quarter of its embedding.
        widths: Channels of the first convolution, and behind each level.
        attention: Of each level.
        middle: Of the middle.
        axes: 2 for pictures, 1 for sequences.
        self_condition: Whether the last step's x_0 is an input.
        groups: Of the blocks' GroupNorm; 0 where they have RMSNorm.
        layer_norm: Whether the attentions' norm is LayerNorm; or else it is RMSNorm.
        mean_values: Whether linear attention divides its values by the number of positions.
        cosine: Whether full attention takes queries and keys as directions.
        stride_kernel: Of the convolutions that halve the sides.
        theta: Longest period of the sinusoid, over 2π.
    """

    channels: int
    out_channels: int
    dim: int
    widths: tuple[int, ...]
    attention: tuple[AttentionShape, ...]
    middle: AttentionShape
    axes: int = 2
    self_condition: bool = False
    groups: int = 0
    layer_norm: bool = False
    mean_values: bool = False
    cosine: bool = False
    stride_kernel: int = 2
    theta: float = 10000

    def conv(self, channels: int, out: int, kernel: int, *, bias: bool = True) -> nn.Module:
        """Returns a convolution that keeps the sides."""
        kind = nn.Conv2d if self.axes == 2 else nn.Conv1d
        return kind(channels, out, kernel, padding=kernel // 2, bias=bias)

    def halve(self, channels: int, out: int) -> nn.Module:
        """Returns a convolution that halves the sides."""
        kind = nn.Conv2d if self.axes == 2 else nn.Conv1d
        padding = (self.stride_kernel - 2) // 2
        return kind(channels, out, self.stride_kernel, stride=2, padding=padding)


class LucidrainsUnet(nn.Module):
    """The output for (x, t), or for (x, t, self_cond).

    Args:
        shape: What it is.
    """

    def __init__(self, shape: UnetShape) -> None:
        super().__init__()
        self.shape = s = shape
        first, last = s.widths[0], s.widths[-1]
        levels = list(zip(pairwise(s.widths), s.attention, strict=True))
        self.init_conv = s.conv(s.channels * (2 if s.self_condition else 1), first, 7)
        self.time_mlp = nn.Sequential(
            _Sinusoid(s.dim, s.theta),
            nn.Linear(s.dim, 4 * s.dim),
            nn.GELU(),
            nn.Linear(4 * s.dim, 4 * s.dim),
        )
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for (width, out), attention in levels[:-1]:
            self.downs.append(_Down(s, width, attention, s.halve(width, out)))
        for (width, out), attention in levels[-1:]:
            self.downs.append(_Down(s, width, attention, s.conv(width, out, 3)))
        self.mid_block1 = _Block(s, last, last)
        self.mid_attn = _Attention(s, last, s.middle)
        self.mid_block2 = _Block(s, last, last)
        for (width, out), attention in levels[:0:-1]:
            double = nn.Sequential(nn.Upsample(scale_factor=2), s.conv(out, width, 3))
            self.ups.append(_Up(s, width, out, attention, double))
        for (width, out), attention in levels[:1]:
            self.ups.append(_Up(s, width, out, attention, s.conv(out, width, 3)))
        self.final_res_block = _Block(s, 2 * first, first)
        self.final_conv = s.conv(first, s.out_channels, 1)

    def forward(self, x: Tensor, t: Tensor, self_cond: Tensor | None = None) -> Tensor:
        """Predicts what training asked for.

        Args:
            x: float32, (N, channels, H, W) or (N, channels, L); 2 to the power of the number of
                levels, less one, divides the sides.
            t: int64, (N,), 0 to T-1.
            self_cond: float32, the shape of x: the last step's x_0; zeros when None. For networks
                that see it.

        Returns:
            float32, (N, out_channels, *sides).
        """
        if self.shape.self_condition:
            x = torch.cat([torch.zeros_like(x) if self_cond is None else self_cond, x], dim=1)
        first = x = self.init_conv(x)
        time = self.time_mlp(t)
        skips: list[Tensor] = []
        for down in self.downs:
            x, *kept = down(x, time)
            skips += kept
        x = self.mid_block2(self.mid_attn(self.mid_block1(x, time)), time)
        for up in self.ups:
            x = up(x, skips.pop(), skips.pop(), time)
        x = self.final_res_block(torch.cat([x, first], dim=1), time)
        return as_tensor(self.final_conv(x))


class _Sinusoid(nn.Module):
    def __init__(self, dim: int, theta: float) -> None:
        super().__init__()
        half = dim // 2
        # The original's own expression: another that is equal on paper moves the output by 1e-5.
        frequency = torch.exp(torch.arange(half) * -(math.log(theta) / (half - 1)))
        self.frequency: Tensor
        self.register_buffer("frequency", frequency, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angle = t.to(self.frequency.dtype)[:, None] * self.frequency
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


class _Down(nn.ModuleList):
    """Two blocks, attention, and a convolution that halves the sides, or at last keeps them."""

    def __init__(
        self, shape: UnetShape, width: int, attention: AttentionShape, resample: nn.Module
    ) -> None:
        blocks = [_Block(shape, width, width) for _ in range(2)]
        super().__init__([*blocks, _Attention(shape, width, attention), resample])

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        block1, block2, attention, resample = self
        first = block1(x, time)
        second = attention(block2(first, time))
        return resample(second), first, second


class _Up(nn.ModuleList):
    """Two blocks with a skip each, attention, and a convolution of twice the sides, or the same."""

    def __init__(
        self,
        shape: UnetShape,
        skip: int,
        width: int,
        attention: AttentionShape,
        resample: nn.Module,
    ) -> None:
        blocks = [_Block(shape, width + skip, width) for _ in range(2)]
        super().__init__([*blocks, _Attention(shape, width, attention), resample])

    def forward(self, x: Tensor, skip1: Tensor, skip2: Tensor, time: Tensor) -> Tensor:
        block1, block2, attention, resample = self
        x = block1(torch.cat([x, skip1], dim=1), time)
        x = block2(torch.cat([x, skip2], dim=1), time)
        return as_tensor(resample(attention(x)))


class _Block(nn.Module):
    """Two normed convolutions, the first scaled and shifted by the timestep, around a shortcut."""

    def __init__(self, shape: UnetShape, channels: int, out: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(4 * shape.dim, 2 * out))
        self.block1 = _Normed(shape, channels, out)
        self.block2 = _Normed(shape, out, out)
        self.res_conv = shape.conv(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.mlp(time).unflatten(1, (-1, *(1,) * (x.ndim - 2))).chunk(2, dim=1)
        h = F.silu(self.block1(x) * (scale + 1) + shift)
        return F.silu(self.block2(h)) + as_tensor(self.res_conv(x))


class _Normed(nn.Module):
    def __init__(self, shape: UnetShape, channels: int, out: int) -> None:
        super().__init__()
        self.proj = shape.conv(channels, out, 3)
        self.norm = nn.GroupNorm(shape.groups, out) if shape.groups else _RMSNorm(shape, out)

    def forward(self, x: Tensor) -> Tensor:
        return as_tensor(self.norm(self.proj(x)))


class _RMSNorm(nn.Module):
    def __init__(self, shape: UnetShape, channels: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, channels, *(1,) * shape.axes))

    def forward(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp(min=1e-12)
        return as_tensor(x / length * (self.g * math.sqrt(x.shape[1])))


class _LayerNorm(nn.Module):
    """Over the channels of each position, without a bias."""

    def __init__(self, shape: UnetShape, channels: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, channels, *(1,) * shape.axes))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(dim=1, keepdim=True)
        variance = centred.square().mean(dim=1, keepdim=True)
        return centred * (variance + 1e-5).rsqrt() * self.g


class _Attention(nn.Module):
    """Attention on normed positions, added to them."""

    def __init__(self, shape: UnetShape, channels: int, attention: AttentionShape) -> None:
        super().__init__()
        self.attention = a = attention
        self.mean_values, self.cosine = shape.mean_values, shape.cosine
        norm = _LayerNorm if shape.layer_norm else _RMSNorm
        inner = a.heads * a.width
        self.norm = norm(shape, channels)
        self.to_qkv = shape.conv(channels, 3 * inner, 1, bias=False)
        out = shape.conv(inner, channels, 1)
        self.to_out = out if a.full else nn.Sequential(out, norm(shape, channels))
        if a.memory:
            last = (a.memory, a.width) if a.full else (a.width, a.memory)
            self.mem_kv = nn.Parameter(torch.zeros(2, a.heads, *last))

    def forward(self, x: Tensor) -> Tensor:
        # Each (N, heads, width, positions).
        q, k, v = (
            part.flatten(2).unflatten(1, (self.attention.heads, -1))
            for part in self.to_qkv(self.norm(x)).chunk(3, dim=1)
        )
        h = self._full(q, k, v) if self.attention.full else self._linear(q, k, v)
        return x + as_tensor(self.to_out(h.reshape(x.shape[0], -1, *x.shape[2:])))

    def _full(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = None
        if self.cosine:  # of the positions' directions, not of the channels' as was meant
            q, k, scale = F.normalize(q, dim=-1), F.normalize(k, dim=-1), 10.0
        q, k, v = (part.transpose(-1, -2) for part in (q, k, v))
        k, v = self._remember(k, v, dim=-2)
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(-1, -2)

    def _linear(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.mean_values:
            v = v / v.shape[-1]
        k, v = self._remember(k, v, dim=-1)
        q = q.softmax(dim=-2) * self.attention.width**-0.5
        context = v @ k.softmax(dim=-1).transpose(-1, -2)
        return context @ q

    def _remember(self, k: Tensor, v: Tensor, *, dim: int) -> tuple[Tensor, Tensor]:
        """Puts the learned keys and values before those of the positions."""
        if not self.attention.memory:
            return k, v
        keys, values = (part.expand(k.shape[0], -1, -1, -1) for part in self.mem_kv)
        return torch.cat([keys, k], dim=dim), torch.cat([values, v], dim=dim)
