"""`ddpm-deploy nll`: the variational bound of an engine, in bits per dimension."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ddpm_deploy.cli.common import (
    Device,
    Json,
    ModelName,
    Progress,
    Seed,
    SpecFile,
    Threads,
    note,
    print_json,
    print_table,
    settings,
    spec_of,
)
from ddpm_deploy.errors import DataError

if TYPE_CHECKING:
    from ddpm_deploy.arrays import Array
    from ddpm_deploy.bound import Bound
    from ddpm_deploy.data import ImageData
    from ddpm_deploy.spec import Condition, ModelSpec

TIMESTEPS = 100
"""L_t that are evaluated for each image when nothing is said; more change the error little."""


def command(
    data: Annotated[
        str, typer.Option("--data", help="Folder of pictures, .npz file, or the word digits.")
    ],
    engine: Annotated[
        Path, typer.Option("--engine", "-e", help="Engine to measure (.onnx or a checkpoint).")
    ] = Path("unet.onnx"),
    count: Annotated[
        int, typer.Option("--count", "-n", min=1, help="Pictures, evenly spaced in the data.")
    ] = 64,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Pictures at once; by their size if left out.")
    ] = None,
    timesteps: Annotated[
        int | None,
        typer.Option(min=1, help="L_t to evaluate a picture, at most T-1; 100 if left out."),
    ] = None,
    seed: Seed = 0,
    label_free: Annotated[
        bool, typer.Option("--label-free", help="Give the null label, not the data's labels.")
    ] = False,
    model: ModelName = None,
    spec_file: SpecFile = None,
    threads: Threads = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Measure how well a model codes pictures: bits per dimension.

    The bound of Ho et al. 2020, Eq. 5, for 8-bit values: L_T + L_t for every t
    + L_0. Lower is better; 8 is what uniform noise needs. With fewer timesteps
    than T-1 they are drawn at random for each picture, and the bound's mean
    stays the same. A network that never saw t = 0 in training (dome272's) is
    measured there all the same, in L_0.
    """
    import numpy as np

    from ddpm_deploy.arrays import Samples, Timesteps
    from ddpm_deploy.bound import bound, pooled
    from ddpm_deploy.data import open_data
    from ddpm_deploy.engines import open_engine
    from ddpm_deploy.images import is_picture
    from ddpm_deploy.noise import SeededNoise
    from ddpm_deploy.run import batch_for

    with open_engine(
        engine, threads=threads, device=device, spec=spec_of(spec_file), model=model
    ) as opened:
        spec = opened.spec
        if not is_picture(spec.sample_shape):
            raise DataError(f"Samples of {engine} are {spec.sample_shape}: no pictures.")
        channels, height, width = spec.sample_shape
        pictures = open_data(data, image_size=(height, width), channels=channels)
        conditions, conditioned = _conditions(spec, pictures, label_free=label_free)
        if spec.label is not None:
            note(f"labels: {conditioned}")
        if spec.first_timestep > 0:
            note(
                f"this network never saw t < {spec.first_timestep} in training, "
                "so L_0 is what it gives there untrained"
            )
        chosen = pictures.spread(count)
        count = len(chosen)
        batch = batch or min(count, batch_for(opened))
        last = spec.schedule.T - 1
        terms = (min(TIMESTEPS, last) or None) if timesteps is None else timesteps

        def part(indices: Timesteps) -> Bound:
            of_these = {name: values[indices] for name, values in conditions.items()}
            sees = spec.self_condition

            def counted(x: Samples, t: Timesteps) -> Samples:
                last_x0 = {sees.name: np.zeros_like(x)} if sees else {}  # a single step has none
                out = opened(x, t, **of_these, **last_x0)
                progress.advance(len(x))
                return out

            x0 = pictures.load(indices, value_range=spec.value_range)
            draws = SeededNoise(seed, indices.tolist(), spec.sample_shape)
            return bound(counted, spec, x0, draws, timesteps=terms)

        total = count * ((terms or 0) + 1)
        with (
            settings("See: ddpm-deploy nll --help"),
            Progress(f"bound on {opened.name}", total, "evaluations") as progress,
        ):
            found = pooled(part(chosen[i : i + batch]) for i in range(0, count, batch))
        described = opened.describe()
    if json:
        print_json(
            {
                "engine": described,
                "data": {"source": data, "fingerprint": pictures.fingerprint, "of": len(pictures)},
                "pictures": count,
                "seed": seed,
                "timesteps": len(found.steps),
                "labels": conditioned,
                "first_timestep": spec.first_timestep,
                "bits_per_dim": {
                    "total": found.total,
                    "standard_error": found.standard_error if count > 1 else None,
                    "L_T": found.prior,
                    "L_t": float(found.steps.sum()),
                    "L_0": found.decoder,
                },
                "L_t": [
                    {"first": int(first), "last": int(end) - 1, "bits_per_dim": float(bits)}
                    for first, end, bits in zip(
                        found.strata[:-1], found.strata[1:], found.steps, strict=True
                    )
                ],
            }
        )
        return
    _print(found, f"{engine.name} on {count} of {len(pictures)} pictures of {data}", last)


def _print(found: Bound, title: str, last: int) -> None:
    from rich.table import Table

    def name(first: int, end: int) -> str:
        return f"L_{first}" if first == end else f"L_{first} to L_{end}"

    table = Table(title=title, title_justify="left")
    table.add_column("term")
    table.add_column("bits/dim", justify="right")
    table.add_column("share", justify="right")
    rows = [("L_T", found.prior)]
    decade = 1
    while decade <= last:  # by powers of ten of t, where the terms cross from one to the next
        inside = (found.strata[:-1] >= decade) & (found.strata[:-1] < 10 * decade)
        if inside.any():
            end = int(found.strata[1:][inside].max()) - 1
            first = int(found.strata[:-1][inside].min())
            rows.append((name(first, end), float(found.steps[inside].sum())))
        decade *= 10
    rows.append(("L_0", found.decoder))
    for term, bits in rows:
        table.add_row(term, f"{bits:.4f}", f"{bits / found.total:.1%}")
    error = f" ± {found.standard_error:.4f}" if found.images > 1 else ""
    table.add_section()
    table.add_row("total", f"{found.total:.4f}{error}", "")
    print_table(table)


def _conditions(
    spec: ModelSpec, pictures: ImageData, *, label_free: bool
) -> tuple[dict[str, Array], str]:
    """Returns the conditions of every picture by name, and where they come from in words."""
    import numpy as np

    label: Condition | None = spec.label
    others = [c.name for c in spec.conditions if c is not label]
    if others:
        raise DataError(
            f"The network takes {', '.join(others)}, and pictures alone do not say what it is.",
            hint="Measure a network whose only condition is a class label.",
        )
    if label is None:
        if label_free:
            raise DataError(
                "The network is unconditional: it takes no label.", hint="Leave --label-free out."
            )
        return {}, "none"
    own = pictures.labels
    if label_free or own is None:
        if label.null is None:
            raise DataError(
                f"{pictures.source} has no labels, and this network has no null label."
                if own is None
                else "This network has no null label.",
                hint="Sort the pictures into one sub-folder a class."
                if own is None
                else "Leave --label-free out.",
            )
        numbers = np.full(len(pictures), label.null, dtype=label.dtype)
        why = "as asked" if own is not None else f"{pictures.source} has none of its own"
        return {label.name: numbers}, f"the null label {label.null}, {why}"
    most, last = int(own.max()), (label.classes or 1) - 1
    if most > last:
        raise DataError(
            f"{pictures.source} has labels 0..{most}; this network has 0..{last}.",
            hint="Measure with the data that it was trained on"
            + (", or type --label-free." if label.null is not None else "."),
        )
    return {label.name: own.astype(label.dtype)}, f"the data's, 0..{most} of 0..{last}"
