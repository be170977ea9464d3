"""The loop to step through: x_t and x_0 of both sides at some of the timesteps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ddpm_deploy.arrays import Samples
from ddpm_deploy.images import is_picture, to_pixels
from ddpm_deploy.report.charts import Chart, line_chart
from ddpm_deploy.report.pictures import (
    amplifying,
    difference_map,
    png,
    png_map,
    reduction,
)
from ddpm_deploy.report.words import number
from ddpm_deploy.verify.compare import Pair, StepErrors
from ddpm_deploy.verify.trace import chosen_steps
from ddpm_deploy.verify.verification import Verification

FRAMES_SIZE = 1_200_000
"""Characters that the pictures of all frames may take."""

LADDER = ((25, 64), (16, 64), (12, 64), (12, 48), (8, 48), (8, 32), (6, 16))
"""Frames, and pixels of the longer side: tried in turn."""

LINE_FRAMES = 8
"""Frames of samples that are no pictures: a drawing takes more than a picture."""

_QUANTITIES = (("x_t", "x_t"), ("x_0", "x0"))


@dataclass(frozen=True, kw_only=True)
class Strip:
    """Some images beside each other.

    Attributes:
        label: What they are, for those who cannot see them.
        uris: A `data:` address each.
    """

    label: str
    uris: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class FrameRow:
    """One quantity on both sides.

    Attributes:
        name: `x_t` or `x_0`.
        factor: What the difference is multiplied by.
        reference: The reference's.
        deployed: The deployed side's.
        difference: Of the two.
    """

    name: str
    factor: float
    reference: Strip
    deployed: Strip
    difference: Strip


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One timestep.

    Attributes:
        errors: What was measured there.
        says: The timestep and its error, in a line.
        rows: Pictures; empty where samples are none.
        charts: Lines, for samples that are no pictures.
    """

    errors: StepErrors
    says: str
    rows: tuple[FrameRow, ...] = ()
    charts: tuple[Chart, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Frames:
    """The timesteps to step through.

    Attributes:
        frames: The noisiest first; empty where none was kept.
        images: Indices of the images in them.
        reduced: Pixels of a side that became one.
    """

    frames: tuple[Frame, ...]
    images: tuple[int, ...]
    reduced: int = 1


def loop_frames(found: Verification) -> Frames:
    """Returns the kept timesteps: those images that differ most, reduced until they fit."""
    kept = found.comparison.kept
    if not kept:
        return Frames(frames=(), images=())
    picture = is_picture(found.spec.sample_shape)
    count = (4 if max(found.spec.sample_shape) <= 32 else 2) if picture else 1
    chosen = _worst_images(kept[-1], count)
    images = tuple(found.images[i] for i in chosen)
    if not picture:
        pairs = _spread(kept, LINE_FRAMES, found)
        return Frames(frames=tuple(_line_frame(p, chosen[0], found) for p in pairs), images=images)
    frames: tuple[Frame, ...] = ()
    reduced = 1
    for most, side in LADDER:
        reduced = reduction(found.spec.sample_shape[1:], side)
        frames = _picture_frames(_spread(kept, most, found), chosen, reduced, found)
        rows = [row for frame in frames for row in frame.rows]
        strips = [strip for row in rows for strip in (row.reference, row.deployed, row.difference)]
        if sum(len(uri) for strip in strips for uri in strip.uris) <= FRAMES_SIZE:
            break
    return Frames(frames=frames, images=images, reduced=reduced)


def _worst_images(pair: Pair, count: int) -> list[int]:
    difference = np.abs(pair.given.x.astype(np.float64) - pair.wanted.x)
    largest = difference.reshape(len(difference), -1).max(axis=1)
    return sorted(np.argsort(-largest, kind="stable")[:count].tolist())


def _spread(kept: Sequence[Pair], most: int, found: Verification) -> list[Pair]:
    """Returns some of the pairs, evenly spread, the worst among them."""
    at = {i - 1 for i in chosen_steps(len(kept), most - 1)}
    worst = found.comparison.worst_local.k
    return [pair for i, pair in enumerate(kept) if i in at or pair.k == worst]


def _says(errors: StepErrors, found: Verification) -> str:
    return (
        f"t = {errors.t}, step {errors.k} of {found.comparison.lengths[0]}: error of x "
        f"{number(errors.accumulated.x.max)} accumulated, {number(errors.local.x.max)} local"
    )


def _errors(pair: Pair, found: Verification) -> StepErrors:
    return next(step for step in found.comparison.steps if step.k == pair.k)


def _picture_frames(
    pairs: Sequence[Pair], chosen: list[int], reduced: int, found: Verification
) -> tuple[Frame, ...]:
    low, high = found.spec.value_range
    images = ", ".join(str(found.images[i]) for i in chosen)
    frames = []
    for pair in pairs:
        rows = []
        for name, field in _QUANTITIES:
            wanted, given = (getattr(step, field)[chosen] for step in (pair.wanted, pair.given))
            what = f"{name} at t = {pair.wanted.t}, images {images}"
            largest = float(np.abs(given.astype(np.float64) - wanted).max())
            factor = amplifying(largest, high - low)
            maps = difference_map(wanted, given, factor, (low, high))
            rows.append(
                FrameRow(
                    name=name,
                    factor=factor,
                    reference=_strip(f"Reference: {what}", wanted, reduced, (low, high)),
                    deployed=_strip(f"Deployed: {what}", given, reduced, (low, high)),
                    difference=Strip(
                        label=f"Difference of {what}: {number(largest)} at most",
                        uris=tuple(png_map(m, reduced) for m in maps),
                    ),
                )
            )
        errors = _errors(pair, found)
        frames.append(Frame(errors=errors, says=_says(errors, found), rows=tuple(rows)))
    return tuple(frames)


def _strip(label: str, x: Samples, reduced: int, value_range: tuple[float, float]) -> Strip:
    pixels = to_pixels(x, value_range=value_range)
    return Strip(label=label, uris=tuple(png(picture, reduced) for picture in pixels))


def _line_frame(pair: Pair, image: int, found: Verification) -> Frame:
    errors = _errors(pair, found)
    charts = tuple(
        line_chart(
            getattr(pair.wanted, field)[image],
            getattr(pair.given, field)[image],
            name=f"frame-{pair.k}-{field}",
            heading=f"{name} of sample {found.images[image]} at t = {errors.t}",
        )
        for name, field in _QUANTITIES
    )
    return Frame(errors=errors, says=_says(errors, found), charts=charts)
