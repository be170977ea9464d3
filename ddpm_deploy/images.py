"""Samples in [-1, 1] as pictures, and back.

Pillow is the only package beside NumPy, and is imported where a picture is written or read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from ddpm_deploy.arrays import Pixels, Samples
from ddpm_deploy.errors import DataError
from ddpm_deploy.files import whole_file

CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's mode for each number of channels that a picture can have."""


def is_picture(sample_shape: Sequence[int]) -> bool:
    """Tells whether samples of this shape (C, H, W) can be pictures."""
    return len(sample_shape) == 3 and sample_shape[0] in CHANNELS


def to_pixels(
    x: Samples,
    *,
    value_range: tuple[float, float] = (-1.0, 1.0),
    rounding: Literal["nearest", "truncate"] = "nearest",
) -> Pixels:
    """Turns samples into 8-bit pixels, clamped to the range.

    Args:
        x: float32, (N, C, H, W).
        value_range: What black and white are.
        rounding: `nearest` integer, or `truncate` towards 0, as dome272's code does.

    Returns:
        uint8, (N, H, W, C).
    """
    low, high = value_range
    scaled = (np.clip(x, low, high) - low) / (high - low) * 255
    if rounding == "nearest":
        scaled = np.rint(scaled)
    return scaled.astype(np.uint8).transpose(0, 2, 3, 1)


def from_pixels(pixels: Pixels, *, value_range: tuple[float, float] = (-1.0, 1.0)) -> Samples:
    """Turns 8-bit pixels into samples.

    Args:
        pixels: uint8, (N, H, W, C).
        value_range: What black and white become.

    Returns:
        float32, (N, C, H, W), in `value_range`.
    """
    low, high = value_range
    scaled = pixels.transpose(0, 3, 1, 2).astype(np.float64) / 255 * (high - low) + low
    return np.ascontiguousarray(scaled, dtype=np.float32)


def write_png(path: Path, pixels: Pixels) -> None:
    """Writes one picture as PNG, whole or not at all.

    Args:
        path: Where to.
        pixels: uint8, (H, W, C), C in 1, 3, 4.

    Raises:
        OSError: The folder cannot be written, or is full.
    """
    from PIL import Image  # noqa: PLC0415

    with whole_file(path) as partial:
        Image.fromarray(_squeeze(pixels)).save(partial, format="PNG")


def read_picture(path: Path, *, channels: int | None = None) -> Pixels:
    """Reads a picture of any kind that Pillow knows, turned as its EXIF says, 16 bits as 8.

    Args:
        path: The file.
        channels: 1 for grey, 3 for colour (transparency laid on white), 4; None for 1 or 3,
            whichever the file is.

    Returns:
        uint8, (H, W, C).

    Raises:
        DataError: The file is missing or no picture.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError  # noqa: PLC0415

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode == "F":
                raise ValueError("its numbers are floats, and what white is among them is unknown")
            if image.mode.startswith("I"):  # Pillow's own conversion cuts 16 bits off at 255
                deep = np.clip(np.asarray(image, dtype=np.float64), 0, 65535)
                image = Image.fromarray(np.rint(deep / 257).astype(np.uint8))
            if channels is None:
                channels = 1 if image.mode in {"1", "L", "LA"} else 3
            if channels != 4 and (
                image.mode in {"RGBA", "LA", "PA"} or "transparency" in image.info
            ):
                opaque = Image.new("RGBA", image.size, "white")
                opaque.alpha_composite(image.convert("RGBA"))
                pixels = np.asarray(opaque.convert(CHANNELS[channels]))
            else:
                pixels = np.asarray(image.convert(CHANNELS[channels]))
    except FileNotFoundError as error:
        raise DataError(f"There is no picture {path}.", hint="Check the path.") from error
    except (
        UnidentifiedImageError,
        Image.DecompressionBombError,
        OSError,
        SyntaxError,  # Pillow's word for a PNG with a broken chunk
        ValueError,
    ) as error:
        raise DataError(f"{path} is no picture that can be read: {error}.") from error
    return pixels if pixels.ndim == 3 else pixels[..., None]


def grid(pictures: Sequence[Pixels], *, columns: int | None = None, gap: int = 2) -> Pixels:
    """Lays pictures of one size out in rows, on white; small ones enlarged to about 64 pixels.

    Args:
        pictures: Each uint8, (H, W, C).
        columns: Pictures a row; 8 when None, or the square root of their number if that is more.
        gap: Pixels between them.

    Returns:
        uint8, (rows, columns, C) in pixels.
    """
    columns = columns or min(len(pictures), max(8, math.isqrt(len(pictures) - 1) + 1))
    height, width, channels = pictures[0].shape
    scale = max(1, 64 // max(height, width))
    height, width = height * scale, width * scale
    rows = -(-len(pictures) // columns)
    sheet = np.full(
        (rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, dtype=np.uint8
    )
    for index, picture in enumerate(pictures):
        y = gap + index // columns * (height + gap)
        x = gap + index % columns * (width + gap)
        sheet[y : y + height, x : x + width] = picture.repeat(scale, axis=0).repeat(scale, axis=1)
    return sheet


def write_gif(path: Path, frames: Sequence[Pixels], *, seconds: float = 0.08) -> None:
    """Writes an animation that holds its last frame for two seconds and starts over.

    Args:
        path: Where to.
        frames: Each uint8, (H, W, C), one size.
        seconds: How long a frame shows.

    Raises:
        OSError: The folder cannot be written, or is full.
    """
    from PIL import Image  # noqa: PLC0415

    first, *rest = [Image.fromarray(_squeeze(frame)) for frame in frames]
    durations = [round(1000 * seconds)] * len(rest) + [2000]
    with whole_file(path) as partial:
        first.save(
            partial, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0
        )


def _squeeze(pixels: Pixels) -> Pixels:
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels
