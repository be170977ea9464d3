"""How far some samples are from others: the measures that `verify` reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from ddpm_deploy.arrays import Array, Pixels, Samples
from ddpm_deploy.parity import relative_error

Measure = Literal["max", "l2", "cosine", "psnr"]

MEASURES: tuple[Measure, ...] = get_args(Measure)

LARGER_IS_BETTER: frozenset[Measure] = frozenset({"cosine", "psnr"})


@dataclass(frozen=True, kw_only=True)
class Errors:
    """The difference between some samples and those wanted.

    Attributes:
        max: max |given - wanted| over max |wanted|, all images together.
        l2: ‖given - wanted‖₂ over ‖wanted‖₂, of the worst image.
        cosine: Cosine between given and wanted, of the worst image; 1 where they are equal.
        psnr: 20 log₁₀ of max |wanted| over the root mean square of the difference, in decibels, of
            the worst image; infinite where they are equal.
    """

    max: float
    l2: float
    cosine: float
    psnr: float

    @classmethod
    def between(cls, given: Samples, wanted: Samples) -> Errors:
        """Measures samples against those wanted, both finite float32 (N, ...)."""
        # Numbers whose squares or products leave float32 are compared too.
        g, w = (x.reshape(len(x), -1).astype(np.float64) for x in (given, wanted))
        difference, length = np.linalg.norm(g - w, axis=1), np.linalg.norm(w, axis=1)
        both = length * np.linalg.norm(g, axis=1)
        dots = np.einsum("ij,ij->i", g, w)
        cosine = np.where(difference == 0, 1.0, dots / np.where(both > 0, both, np.inf))
        peak = np.abs(w).max(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            psnr = 20 * np.log10(peak / (difference / np.sqrt(g.shape[1])))
        return cls(
            max=relative_error(given, wanted),
            l2=float((difference / np.where(length > 0, length, 1.0)).max()),
            cosine=float(np.clip(cosine, -1.0, 1.0).min()),
            psnr=float(np.where(difference == 0, np.inf, psnr).min()),
        )


@dataclass(frozen=True, kw_only=True)
class PictureErrors:
    """The difference between the last step's pictures and those wanted, in 8 bits.

    Attributes:
        psnr: Of each picture 10 log₁₀ (255² / mean square), in decibels; infinite where all agree.
        ssim: Of each picture the structural similarity, see `ssim`; empty where samples have no two
            dimensions.
        equal: Share of values that are equal.
        close: Share of values that differ by at most one level.
        largest: Largest difference of a value.
        bias: Mean of given - wanted, in levels: what makes pictures darker or brighter.
    """

    psnr: tuple[float, ...]
    ssim: tuple[float, ...]
    equal: float
    close: float
    largest: int
    bias: float

    @classmethod
    def between(cls, given: Pixels, wanted: Pixels) -> PictureErrors:
        """Measures pictures against those wanted, both uint8 (N, H, W, C)."""
        signed = given.astype(np.int64) - wanted
        difference = np.abs(signed)
        flat = given.shape[1] == 1
        return cls(
            psnr=tuple(_psnr(image) for image in difference),
            ssim=() if flat else tuple(ssim(g, w) for g, w in zip(given, wanted, strict=True)),
            equal=float(np.mean(difference == 0)),
            close=float(np.mean(difference <= 1)),
            largest=int(difference.max()),
            bias=float(signed.mean()),
        )


def ssim(given: Pixels, wanted: Pixels) -> float:
    """Returns the mean structural similarity of two pictures, 1 where they are equal.

    Args:
        given: uint8, (H, W, C).
        wanted: The same shape. Where a side has fewer than 11 pixels the window is as large as the
            largest odd number of them.

    References:
        Wang et al. 2004, "Image quality assessment: from error visibility to structural
        similarity", Eq. 13, with its Gaussian window of 11 pixels and σ = 1.5, K₁ = 0.01 and
        K₂ = 0.03; the mean over channels.
    """
    size = min(11, *(side - 1 + side % 2 for side in given.shape[:2]))
    window = np.exp(-0.5 * ((np.arange(size) - size // 2) / 1.5) ** 2)
    window /= window.sum()
    x, y = given.astype(np.float64), wanted.astype(np.float64)
    mean_x, mean_y = _windowed(x, window), _windowed(y, window)
    var_x = _windowed(x * x, window) - mean_x**2
    var_y = _windowed(y * y, window) - mean_y**2
    covariance = _windowed(x * y, window) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float(np.mean(likeness / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))))


def _windowed(x: NDArray[np.float64], window: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns weighted means over windows along both sides, where a window fits."""
    for axis in (0, 1):
        x = sliding_window_view(x, len(window), axis=axis) @ window
    return x


def _psnr(difference: Array) -> float:
    mean_square = float(np.mean(difference.astype(np.float64) ** 2))
    return float("inf") if mean_square == 0 else 10 * float(np.log10(255**2 / mean_square))
