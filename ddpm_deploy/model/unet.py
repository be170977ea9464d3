"""The UNet of dome272/Diffusion-Models-pytorch, at any width and any image size that 8 divides.

Module names are the family's, so that its checkpoints load with `strict=True`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (torch's own convention)

HEADS = 4
"""Attention heads everywhere in the original; no file says so."""


@dataclass(frozen=True, kw_only=True)
class UNetWidths:
    """Channels of each block.

    Attributes:
        inc: Of the first block.
        down: Of the three blocks on the way down.
        bottom: Of the blocks at the lowest resolution; three, or two in forks that leave one out.
        up: Of the three blocks on the way up.
        up_middle: Inside the second convolution pair of each block on the way up.
        time: Of the timestep embedding.
    """

    inc: int = 64
    down: tuple[int, int, int] = (128, 256, 256)
    bottom: tuple[int, ...] = (512, 512, 256)
    up: tuple[int, int, int] = (128, 64, 64)
    up_middle: tuple[int, int, int] = (256, 128, 64)
    time: int = 256

    @classmethod
    def scaled(cls, base: int) -> UNetWidths:
        """Gives the original's proportions with `base` channels at full resolution; 64 is its own.

        Raises:
            ValueError: `base` is not a positive multiple of 4, the number of heads.
        """
        if base < HEADS or base % HEADS:
            raise ValueError(f"the base width is {base}; it must be a positive multiple of {HEADS}")
        b = base
        return cls(
            inc=b,
            down=(2 * b, 4 * b, 4 * b),
            bottom=(8 * b, 8 * b, 4 * b),
            up=(2 * b, b, b),
            up_middle=(4 * b, 2 * b, b),
        )

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> UNetWidths:
        """Reads the widths off the weights.

        Args:
            state: A state dict with the family's names.

        Raises:
            KeyError: A weight is missing.
        """

        def out(block: str) -> int:
            return int(state[f"{block}.double_conv.3.weight"].shape[0])

        def triple(*numbers: int) -> tuple[int, int, int]:
            first, second, third = numbers
            return first, second, third

        present = [b for b in ("bot1", "bot2", "bot3") if f"{b}.double_conv.3.weight" in state]
        return cls(
            inc=out("inc"),
            down=triple(*(out(f"down{i}.maxpool_conv.2") for i in (1, 2, 3))),
            bottom=tuple(out(b) for b in present),
            up=triple(*(out(f"up{i}.conv.1") for i in (1, 2, 3))),
            up_middle=triple(
                *(int(state[f"up{i}.conv.1.double_conv.0.weight"].shape[0]) for i in (1, 2, 3))
            ),
            time=int(state["down1.emb_layer.1.weight"].shape[1]),
        )


class UNet(nn.Module):
    """ε_θ(x, t) or, with classes, ε_θ(x, t, y).

    Args:
        channels: Of the images.
        classes: Number of classes; 0 makes an unconditional network.
        widths: Channels of each block; the original's when left out.
        out_channels: Of the output; `channels` when None.
        heads: Of every attention.
    """

    def __init__(
        self,
        channels: int = 3,
        *,
        classes: int = 0,
        widths: UNetWidths | None = None,
        out_channels: int | None = None,
        heads: int = HEADS,
    ) -> None:
        super().__init__()
        w = self.widths = widths or UNetWidths()
        self.channels = channels
        self.classes = classes
        self.inc = _DoubleConv(channels, w.inc)
        self.down1 = _Down(w.inc, w.down[0], w.time)
        self.sa1 = _SelfAttention(w.down[0], heads)
        self.down2 = _Down(w.down[0], w.down[1], w.time)
        self.sa2 = _SelfAttention(w.down[1], heads)
        self.down3 = _Down(w.down[1], w.down[2], w.time)
        self.sa3 = _SelfAttention(w.down[2], heads)
        names = ("bot1", "bot2", "bot3") if len(w.bottom) == 3 else ("bot1", "bot3")
        self._bottom = names
        before = w.down[2]
        for name, width in zip(names, w.bottom, strict=True):
            setattr(self, name, _DoubleConv(before, width))
            before = width
        self.up1 = _Up(before + w.down[1], w.up[0], w.up_middle[0], w.time)
        self.sa4 = _SelfAttention(w.up[0], heads)
        self.up2 = _Up(w.up[0] + w.down[0], w.up[1], w.up_middle[1], w.time)
        self.sa5 = _SelfAttention(w.up[1], heads)
        self.up3 = _Up(w.up[1] + w.inc, w.up[2], w.up_middle[2], w.time)
        self.sa6 = _SelfAttention(w.up[2], heads)
        self.outc = nn.Conv2d(w.up[2], out_channels or channels, kernel_size=1)
        if classes:
            self.label_emb = nn.Embedding(classes, w.time)
        # The original's own expression: another that is equal on paper moves the output by 1e-5.
        exponent = torch.arange(0, w.time, 2).float() / w.time
        self.frequency: Tensor
        self.register_buffer("frequency", 1.0 / (10000**exponent), persistent=False)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predicts the noise in x.

        Args:
            x: float32, (N, C, H, W); 8 divides H and W.
            t: int64, (N,), 0 to T-1.
            y: int64, (N,), 0 to `classes` - 1, or `classes` for "no label"; None for an
                unconditional network, and for no label at all.

        Returns:
            float32, (N, out_channels, H, W).
        """
        angle = t.to(self.frequency.dtype)[:, None] * self.frequency
        emb = torch.cat([angle.sin(), angle.cos()], dim=-1)
        if y is not None:
            # "No label" adds nothing, as the original does when it is called without labels.
            rows = torch.cat(
                [self.label_emb.weight, self.label_emb.weight.new_zeros(1, len(emb[0]))]
            )
            emb = emb + F.embedding(y, rows)

        x1 = self.inc(x)
        x2 = self.sa1(self.down1(x1, emb))
        x3 = self.sa2(self.down2(x2, emb))
        h = self.sa3(self.down3(x3, emb))
        for name in self._bottom:
            h = as_tensor(getattr(self, name)(h))
        h = self.sa4(self.up1(h, x3, emb))
        h = self.sa5(self.up2(h, x2, emb))
        h = self.sa6(self.up3(h, x1, emb))
        return as_tensor(self.outc(h))


class _DoubleConv(nn.Module):
    def __init__(
        self, channels: int, out: int, middle: int | None = None, *, residual: bool = False
    ) -> None:
        super().__init__()
        middle = middle or out
        self.residual = residual
        self.double_conv = nn.Sequential(
            nn.Conv2d(channels, middle, kernel_size=3, padding=1, bias=False),
            nn.GroupNorm(1, middle),
            nn.GELU(),
            nn.Conv2d(middle, out, kernel_size=3, padding=1, bias=False),
            nn.GroupNorm(1, out),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = as_tensor(self.double_conv(x))
        return F.gelu(x + h) if self.residual else h


class _Embedded(nn.Module):
    """Adds the embedding of timestep and label to every pixel."""

    def __init__(self, out: int, time: int) -> None:
        super().__init__()
        self.emb_layer = nn.Sequential(nn.SiLU(), nn.Linear(time, out))

    def add(self, h: Tensor, emb: Tensor) -> Tensor:
        return h + as_tensor(self.emb_layer(emb))[:, :, None, None]


class _Down(_Embedded):
    def __init__(self, channels: int, out: int, time: int) -> None:
        super().__init__(out, time)
        self.maxpool_conv = nn.Sequential(
            nn.MaxPool2d(2),
            _DoubleConv(channels, channels, residual=True),
            _DoubleConv(channels, out),
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.add(self.maxpool_conv(x), emb)


class _Up(_Embedded):
    def __init__(self, channels: int, out: int, middle: int, time: int) -> None:
        super().__init__(out, time)
        self.conv = nn.Sequential(
            _DoubleConv(channels, channels, residual=True), _DoubleConv(channels, out, middle)
        )

    def forward(self, x: Tensor, skip: Tensor, emb: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        return self.add(self.conv(torch.cat([skip, x], dim=1)), emb)


class _SelfAttention(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.mha = _Attention(channels, heads)
        self.ln = nn.LayerNorm([channels])
        self.ff_self = nn.Sequential(
            nn.LayerNorm([channels]),
            nn.Linear(channels, channels),
            nn.GELU(),
            nn.Linear(channels, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        tokens = x.flatten(2).transpose(1, 2)
        attended = self.mha(self.ln(tokens)) + tokens
        out = attended + self.ff_self(attended)
        return as_tensor(out.transpose(1, 2).reshape(x.shape[0], -1, height, width))


class _Attention(nn.Module):
    """Multi-head attention with the parameters of `nn.MultiheadAttention`.

    It never holds the (HW)² matrix: that is 268 MB an image at 64x64, most of the step.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels do not split into {heads} heads")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        projected = F.linear(tokens, self.in_proj_weight, self.in_proj_bias)
        q, k, v = (
            part.reshape(*part.shape[:2], self.heads, -1).transpose(1, 2)
            for part in projected.chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v)
        return as_tensor(self.out_proj(attended.transpose(1, 2).flatten(2)))


def as_tensor(value: Tensor) -> Tensor:
    """Tells the type checker what calling a module gives."""
    return value
