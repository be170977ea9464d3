"""Faults on the way from the last x to pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ddpm_deploy.arrays import Pixels
from ddpm_deploy.images import to_pixels
from ddpm_deploy.verify.cause import Cause
from ddpm_deploy.verify.suspects.evidence import Evidence

SAME = 0.999
"""Share of values in which a fault's pictures are the deployed ones."""


def picture_causes(evidence: Evidence, pixels: tuple[Pixels, Pixels] | None) -> Iterator[Cause]:
    """Yields what explains pictures that differ more than their x does.

    Args:
        evidence: The comparison.
        pixels: The pictures of the reference and of the deployed side.
    """
    last = evidence.pairs[-1] if evidence.pairs else None
    if pixels is None or last is None or last.k != len(evidence.table):
        return
    given, x = pixels[1], last.given.x
    if x.ndim != 4:
        return
    spec = evidence.spec
    plain = _pixels(evidence, x)
    if np.mean(given == plain) >= SAME:
        return  # what differs lies before the pictures
    low, high = spec.value_range
    other = "truncate" if spec.rounding == "nearest" else "nearest"
    suspects: list[tuple[str, str, str, Callable[[], Pixels]]] = [
        (
            "pixel-rounding",
            f"Pixels are made with the rounding {other}; the reference's with {spec.rounding}.",
            f"Round to uint8 with {spec.rounding}.",
            lambda: to_pixels(x, value_range=spec.value_range, rounding=other),  # type: ignore[arg-type]
        ),
        (
            "picture-channel-order",
            "The pictures' channels are in the opposite order (BGR for RGB).",
            "Write pictures as RGB; OpenCV's functions take BGR.",
            lambda: plain[..., ::-1],
        ),
        (
            "picture-transposed",
            "The pictures' height and width are exchanged.",
            "Write pictures as (H, W, C).",
            lambda: plain.swapaxes(1, 2),
        ),
        (
            "picture-value-range",
            f"x is taken to lie in [0, 1] where it is written; it lies in [{low:g}, {high:g}].",
            "Write (x - low) / (high - low) · 255.",
            lambda: to_pixels(x, value_range=(0.0, 1.0), rounding=spec.rounding),
        ),
        (
            "picture-value-range",
            "Pixels wrap around: x was not clipped before it was cast to uint8.",
            "Clip x to its range before the cast.",
            lambda: _wrapped(evidence, x),
        ),
    ]
    for name, says, mend, made in suspects:
        pictures = made()
        if pictures.shape == given.shape and np.mean(pictures == given) >= SAME:
            yield Cause(
                name=name,
                place="pictures",
                says=says,
                evidence=(
                    f"so {np.mean(pictures == given):.2%} of the deployed values are what its own "
                    f"x gives; by the reference's rule {np.mean(plain == given):.2%}",
                ),
                mend=mend,
                certain=True,
            )
            return


def _pixels(evidence: Evidence, x: np.ndarray) -> Pixels:
    spec = evidence.spec
    return to_pixels(x, value_range=spec.value_range, rounding=spec.rounding)


def _wrapped(evidence: Evidence, x: np.ndarray) -> Pixels:
    low, high = evidence.spec.value_range
    scaled = (x - low) / (high - low) * 255
    if evidence.spec.rounding == "nearest":
        scaled = np.rint(scaled)
    return (scaled.astype(np.int64) % 256).astype(np.uint8).transpose(0, 2, 3, 1)
