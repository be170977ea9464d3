"""Pictures inside a page: as PNG in `data:` addresses, reduced until they fit."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ddpm_deploy.arrays import Pixels, Samples
from ddpm_deploy.images import CHANNELS
from ddpm_deploy.report.words import decibels
from ddpm_deploy.verify.verification import Verification

PAIRS = 8
"""Pictures of the last step that are shown: the worst."""

PAIRS_SIZE = 900_000
"""Characters that they may take."""

SIDES = (256, 192, 128, 96, 64, 48, 32, 16)
"""Pixels of the longer side, tried in turn."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture on the page.

    Attributes:
        uri: `data:image/png;base64,...`.
        alt: What matters in it.
    """

    uri: str
    alt: str


@dataclass(frozen=True, kw_only=True)
class PicturePair:
    """One picture of the last step on both sides.

    Attributes:
        index: Of the image.
        reference: The reference's.
        deployed: The deployed side's.
        difference: Of the two, amplified.
        psnr: In words.
        ssim: Structural similarity; None where it is not known.
        equal: Share of values that are equal.
        largest: Largest difference of a value, in levels of 255.
    """

    index: int
    reference: Picture
    deployed: Picture
    difference: Picture
    psnr: str
    ssim: float | None
    equal: float
    largest: int


@dataclass(frozen=True, kw_only=True)
class PicturePairs:
    """The pictures of the last step.

    Attributes:
        pairs: The worst, by index.
        of: How many were drawn.
        factor: What the differences are multiplied by.
        reduced: Pixels of a side that became one.
    """

    pairs: tuple[PicturePair, ...]
    of: int
    factor: float
    reduced: int


def picture_pairs(found: Verification) -> PicturePairs | None:
    """Returns the last pictures of both sides with their differences; None where there are none."""
    errors = found.comparison.pictures
    if found.pixels is None or errors is None:
        return None
    wanted, given = found.pixels
    worst = sorted(sorted(range(len(wanted)), key=lambda i: errors.psnr[i])[:PAIRS])
    differences = np.abs(wanted.astype(np.int16) - given)[worst]
    factor = amplifying(float(differences.max()), 255)
    maps = np.clip(differences * factor, 0, 255).astype(np.uint8)
    shown = [(wanted[i], given[i], opaque(m)) for i, m in zip(worst, maps, strict=True)]
    reduced = 1
    encoded: list[tuple[str, str, str]] = []
    for side in SIDES:
        reduced = reduction(wanted.shape[1:3], side)
        encoded = [(png(w, reduced), png(g, reduced), png_map(m, reduced)) for w, g, m in shown]
        if sum(len(uri) for uris in encoded for uri in uris) <= PAIRS_SIZE:
            break
    pairs = []
    for i, difference, uris in zip(worst, differences, encoded, strict=True):
        index, largest = found.images[i], int(difference.max())
        equal, psnr = float(np.mean(difference == 0)), decibels(errors.psnr[i])
        said = f"PSNR {psnr}, {equal:.2%} of values equal"
        pairs.append(
            PicturePair(
                index=index,
                reference=Picture(uri=uris[0], alt=f"Image {index} by the reference"),
                deployed=Picture(uri=uris[1], alt=f"Image {index} deployed: {said}"),
                difference=Picture(
                    uri=uris[2],
                    alt=f"Difference of image {index}: {largest} of 255 levels at most"
                    if largest
                    else f"No difference in image {index}",
                ),
                psnr=psnr,
                ssim=errors.ssim[i] if errors.ssim else None,
                equal=equal,
                largest=largest,
            )
        )
    return PicturePairs(pairs=tuple(pairs), of=len(wanted), factor=factor, reduced=reduced)


def amplifying(largest: float, full: float) -> float:
    """Returns what shows a difference: the largest of 1, 2, 5, 10 … 1000 that stays in `full`."""
    series = [m * 10**e for e in (2, 1, 0) for m in (5, 2, 1)]
    if largest == 0:
        return 1
    return next((f for f in (1000, *series) if f * largest <= full), 1)


def reduction(shape: Sequence[int], side: int) -> int:
    """Returns how many pixels of a side must become one, so that the longer has `side` at most."""
    return max(1, math.ceil(max(shape) / side))


def png(pixels: Pixels, reduced: int = 1) -> str:
    """Returns a picture as a `data:` address.

    Args:
        pixels: uint8, (H, W, C).
        reduced: Pixels of a side that become one, their mean.
    """
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    if reduced > 1:
        image = image.reduce(reduced)
    return _uri(image)


def png_map(pixels: Pixels, reduced: int = 1) -> str:
    """Returns a map of differences likewise; of pixels that become one the largest stays."""
    height, width, channels = pixels.shape
    rows, columns = -(-height // reduced), -(-width // reduced)
    padded = np.zeros((rows * reduced, columns * reduced, channels), np.uint8)
    padded[:height, :width] = pixels
    blocks = padded.reshape(rows, reduced, columns, reduced, channels)
    return png(blocks.max(axis=(1, 3)))


def opaque(difference: Pixels) -> Pixels:
    """Returns a map without the fourth channel, in which no difference would be transparent.

    What differs in the fourth channel alone shows as grey.
    """
    if difference.shape[-1] < 4:
        return difference
    return np.maximum(difference[..., :3], difference[..., 3:])


def difference_map(
    wanted: Samples, given: Samples, factor: float, value_range: tuple[float, float]
) -> Pixels:
    """Returns |given - wanted| · factor as pixels: white is the whole value range.

    Args:
        wanted: float32, (N, C, H, W).
        given: The same shape.
        factor: What the difference is multiplied by.
        value_range: What black and white are in the samples.
    """
    low, high = value_range
    scaled = np.abs(given.astype(np.float64) - wanted) * (255 * factor / (high - low))
    pixels = np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)
    return opaque(pixels.transpose(0, 2, 3, 1))


def _uri(image: Image.Image) -> str:
    assert image.mode in CHANNELS.values(), "of one, three or four channels"
    data = io.BytesIO()
    image.save(data, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
