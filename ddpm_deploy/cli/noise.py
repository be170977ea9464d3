"""`ddpm-deploy noise`: the forward process on a picture of yours."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ddpm_deploy.cli.common import Seed, note, settings
from ddpm_deploy.errors import DataError

if TYPE_CHECKING:
    from ddpm_deploy.arrays import Pixels

LARGEST = 256
"""Pixels that a picture of the strip has along its longer side when nothing is said."""

SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.45, 0.65, 1.0)
"""Where along the schedule the strip looks when nothing is said; most is lost early."""


def command(
    image: Annotated[Path, typer.Argument(help="Picture to add noise to.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Strip to write; IMAGE-noise.png here.")
    ] = None,
    t: Annotated[
        str | None,
        typer.Option("--t", help="Timesteps, such as 0,50,100; eight of them if left out."),
    ] = None,
    schedule: Annotated[
        str, typer.Option(help="linear, scaled_linear, cosine or sigmoid.")
    ] = "linear",
    timesteps: Annotated[int, typer.Option(min=1, help="Length T of the schedule.")] = 1000,
    engine: Annotated[
        Path | None, typer.Option("--engine", "-e", help="Take the schedule from this engine.")
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(min=1, max=4096, help="Longer side in pixels; at most 256 if left out."),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Draw x_t of a picture at chosen t, side by side: q(x_t | x_0).

    The clean picture comes first. One draw of noise serves every t, so that
    what differs from one to the next is t alone; values beyond black and white
    are cut, as they are in every picture.
    """
    import math

    from ddpm_deploy.images import from_pixels, grid, read_picture, to_pixels, write_png
    from ddpm_deploy.noise import SeededNoise
    from ddpm_deploy.schedule import named_schedule

    path = output or Path(f"{image.stem}-noise.png")
    if path.suffix.lower() != ".png":
        raise DataError(f"{path} is no name for a PNG file.", hint="Let it end in .png")
    if engine is None:
        with settings("See: ddpm-deploy noise --help"):
            used = named_schedule(schedule, timesteps)
    else:
        from ddpm_deploy.engines.base import read_spec

        used = read_spec(engine).schedule
    chosen = _parse(t, used.T)
    clean = _resized(read_picture(image), image_size)
    if path.exists() and image.samefile(path):
        raise DataError(f"{path} is the picture itself.", hint="Name another file with -o.")
    x0 = from_pixels(clean[None])
    eps = SeededNoise(seed, [0], x0.shape[1:])(0)
    noisy = [to_pixels(used.diffuse(x0, at, eps))[0] for at in chosen]
    write_png(path, grid([clean, *noisy], columns=1 + len(noisy)))
    note(f"{used}, {clean.shape[1]}x{clean.shape[0]} pixels; from the left: x_0, then")
    for at in chosen:
        a, snr = used.alpha_bar_at(at), float(used.snr[at])
        decibel = 10 * math.log10(snr) if snr > 0 else -math.inf
        note(f"  t = {at:<5} ᾱ = {a:<11.5g} SNR = {snr:<11.5g} {decibel:+.1f} dB")
    typer.echo(path)


def _parse(text: str | None, length: int) -> list[int]:
    if text is None:
        return sorted({min(round(share * length), length - 1) for share in SHARES})
    try:
        chosen = [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is no list of timesteps such as 0,50,100", param_hint="--t"
        ) from None
    for at in chosen:
        if not 0 <= at < length:
            raise typer.BadParameter(
                f"{at} is none of this schedule's timesteps 0..{length - 1}", param_hint="--t"
            )
    return chosen


def _resized(picture: Pixels, longest: int | None) -> Pixels:
    import numpy as np
    from PIL import Image

    side = max(picture.shape[:2])
    target = min(side, LARGEST) if longest is None else longest
    if target == side:
        return picture
    height, width = (max(1, round(size * target / side)) for size in picture.shape[:2])
    image = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
    resized = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))
    return resized if resized.ndim == 3 else resized[..., None]
