"""The step fused behind the network: what such a graph takes, and the loop that feeds it.

A fused graph has two inputs more, `row` and `z`, and one output more, `x_s`: the arithmetic of
`sampling.denoise`, in float32 and in its order, done where the network runs. The state stays there
too, so that a step moves nothing but noise.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.arrays import Samples
from ddpm_deploy.engines.base import Engine, Stepper
from ddpm_deploy.errors import SpecError
from ddpm_deploy.noise import Ahead
from ddpm_deploy.sampling import Table, Transition
from ddpm_deploy.spec import ModelSpec

FORMAT = 1
"""Version of a fused step: its inputs, its output, and the order of `COLUMNS`."""

METADATA_KEY = "ddpm_deploy.step"
"""Key in an ONNX file's `metadata_props` that says that its step is fused."""

COLUMNS = (
    "x0_from_x",
    "x0_from_out",
    "clip",
    "x_from_x0",
    "x_from_x",
    "x_from_out",
    "x_from_noise",
    "log_std_a",
    "log_std_b",
)
"""The numbers of the input `row`, in order.

`clip` is infinite where x_0 is not clipped; σ is x_from_noise · exp(log_std_a + log_std_b · v), and
x_from_noise alone where the network gives no v.
"""


def row_of(transition: Transition) -> NDArray[np.float32]:
    """Returns a transition as a fused graph takes it: float32, (9,), in the order of `COLUMNS`."""
    learned = transition.log_std is not None and transition.x_from_noise != 0
    a, b = transition.log_std if learned and transition.log_std else (0.0, 0.0)
    clip = np.inf if transition.clip is None else transition.clip
    return np.array(
        [
            transition.x0_from_x,
            transition.x0_from_out,
            clip,
            transition.x_from_x0,
            transition.x_from_x,
            transition.x_from_out,
            transition.x_from_noise,
            a,
            b,
        ],
        dtype=np.float32,
    )


Shape: TypeAlias = tuple[int | str, ...]
Inputs: TypeAlias = Mapping[str, tuple[str, Shape]]
"""Name to dtype and shape; the batch is `N`."""


def graph_inputs(spec: ModelSpec, *, fused: bool) -> Inputs:
    """Returns what a network's graph takes, with the step behind it or without."""
    samples: tuple[str, Shape] = ("float32", ("N", *spec.sample_shape))
    inputs: dict[str, tuple[str, Shape]] = {"x": samples, "t": ("int64", ("N",))}
    inputs |= {c.name: (c.dtype, ("N", *c.shape)) for c in spec.conditions}
    if fused:
        inputs |= {"row": ("float32", (len(COLUMNS),)), "z": samples}
    return inputs


def check_inputs(graph: Path, spec: ModelSpec, given: Inputs, *, fused: bool) -> None:
    """Compares a graph's inputs with what its spec says; the batch may be free or a number.

    Raises:
        SpecError: They differ.
    """
    wanted = graph_inputs(spec, fused=fused)
    found = {
        name: (dtype, shape if fused and name == "row" else ("N", *shape[1:]))
        for name, (dtype, shape) in given.items()
    }
    if found != wanted:
        raise SpecError(
            f"{graph} has the inputs {_listed(found)}, but its spec says {_listed(wanted)}.",
            hint="Export the network again: ddpm-deploy export CHECKPOINT",
        )


def _listed(inputs: Inputs) -> str:
    return ", ".join(
        f"{name} {dtype} ({', '.join(map(str, shape))})"
        for name, (dtype, shape) in sorted(inputs.items())
    )


def step_to_json() -> str:
    """Returns what a fused graph carries under `METADATA_KEY`."""
    return json.dumps({"format": FORMAT, "row": COLUMNS}, sort_keys=True)


def is_fused(text: str | None, *, source: str) -> bool:
    """Reads what `step_to_json` wrote; None is what a graph that is not fused carries.

    Args:
        text: The value under `METADATA_KEY`.
        source: What to call the place it came from in errors.

    Raises:
        SpecError: It is another format's, or damaged.
    """
    if text is None:
        return False
    try:
        found = json.loads(text)["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SpecError(
            f"{source} says that its step is fused, but not how ({error!r}).",
            hint="Build it again: ddpm-deploy build unet.onnx --fuse-step",
        ) from error
    if found != FORMAT:
        raise SpecError(
            f"The fused step in {source} has format {found}; this release reads format {FORMAT}.",
            hint="Build it again here: ddpm-deploy build unet.onnx --fuse-step",
        )
    return True


def noise_threads(engine: Engine) -> int:
    """Returns how many threads should draw noise: several where a GPU waits for them.

    One draws some 25 million numbers a second; a large GPU takes a step of 64 images of 32x32 in
    less than the 8 ms of their noise. Beside a network on the CPU one is enough, and none where
    there is a single core.
    """
    cores = os.cpu_count() or 1
    return min(4, cores) if engine.on_gpu else min(1, cores - 1)


def denoise_fused(
    stepper: Stepper, table: Table, noise: Callable[[int], Samples], *, threads: int = 1
) -> Generator[tuple[int, int], None, None]:
    """Runs the reverse process on a stepper that was started with x_T, a step at a time.

    The numbers are those of `denoise`; they stay with the runtime until `stepper.read()`, which may
    be called between steps and after the last.

    Args:
        stepper: Of an engine whose step is fused.
        table: As for `denoise`.
        noise: As for `denoise`; called from other threads.
        threads: How many of them, see `Ahead`.

    Yields:
        (k, t) after each transition, which the runtime may still be working on: k is 1 for the
        first one, t the timestep that the network was called with.
    """
    noisy = [k for k, row in enumerate(table, start=1) if row.x_from_noise]
    with Ahead(noise, noisy, threads=threads) as draw:
        for k, row in enumerate(table, start=1):
            stepper.step(row, draw(k) if row.x_from_noise else None)
            yield k, row.t
