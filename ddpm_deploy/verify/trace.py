"""A trace: some steps of a loop in a file, to compare another machine's loop with.

A device without PyTorch verifies itself against a trace that was recorded beside the checkpoint;
and a loop of one's own, in any language, is verified by writing one. The file is a zip of NumPy
arrays:

    header      uint8: UTF-8 JSON, see `_header`
    states_at   int64 (J,): numbers of the states that are there; state 0 is x_T, state k the
                result of transition k
    states      float32 (J, N, *sample_shape)
    outputs_at  int64 (K,): numbers of the transitions that are there, 1 being the noisiest
    outputs     float32 (K, N, *sample_shape): what the network predicted in them
    pictures    uint8 (N, H, W, C), where the loop made some: what it returned at the end

Of transition k the states k-1 and k are there, and of the loop the last state.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_deploy._version import __version__
from ddpm_deploy.arrays import Array, Pixels, Samples
from ddpm_deploy.errors import DDPMDeployError, TraceError
from ddpm_deploy.files import whole_file
from ddpm_deploy.noise import SCHEME
from ddpm_deploy.run import Recipe
from ddpm_deploy.sampling import Step, Table, predicted_x0
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.verify.loops import Loop

FORMAT = 1
"""Version of the file. A reader refuses a later one."""

SUFFIX = ".trace"


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Some steps of a loop, and where it ended.

    Attributes:
        spec: What the network is.
        recipe: Sampler, seed and labels.
        images: Indices of the images.
        steps: Transitions by their number, 1 being the noisiest.
        final: float32, (N, *sample_shape): the last state.
        pictures: uint8, (N, H, W, C): what the loop returned, where it makes pictures itself.
        source: What made it: runtime, file, hash, in JSON's types.
    """

    spec: ModelSpec
    recipe: Recipe
    images: tuple[int, ...]
    steps: Mapping[int, Step]
    final: Samples
    pictures: Pixels | None = None
    source: Mapping[str, Any] = field(default_factory=dict)

    @property
    def table(self) -> Table:
        """The sampler that its recipe names."""
        return self.recipe.table(self.spec)


def chosen_steps(count: int, keep: int) -> list[int]:
    """Returns up to `keep` of the transitions 1..count, evenly spread, both ends among them."""
    if keep >= count:
        return list(range(1, count + 1))
    return sorted({1 + round(i * (count - 1) / max(keep - 1, 1)) for i in range(keep)})


def record(
    steps: Iterable[Step],
    *,
    spec: ModelSpec,
    recipe: Recipe,
    images: Sequence[int],
    keep: int | None = None,
    pictures: Pixels | None = None,
    source: Mapping[str, Any] | None = None,
) -> Trace:
    """Makes a trace of a loop's steps, as `denoise` yields them or a loop of one's own does.

    Args:
        steps: All of them, in order, by their number `k`.
        spec: What the network is.
        recipe: What the loop was told.
        images: Indices of the images.
        keep: How many steps stay, evenly spread; all when None.
        pictures: uint8, (N, H, W, C), where the loop makes some itself.
        source: What made it.

    Raises:
        TraceError: There is no step.
    """
    count = len(recipe.table(spec))
    wanted = set(chosen_steps(count, keep or count))
    kept: dict[int, Step] = {}
    last = None
    for last in steps:
        if last.k in wanted:
            kept[last.k] = last
    if last is None:
        raise TraceError("The loop made no step, so there is nothing to record.")
    return Trace(
        spec=spec,
        recipe=recipe,
        images=tuple(images),
        steps=kept,
        final=last.x,
        pictures=pictures,
        source=dict(source or {}),
    )


def loop_steps(loop: Loop) -> Iterable[Step]:
    """Yields the steps of a loop that runs free, from its own x_T."""
    x = loop.start()
    for k in range(1, len(loop.table) + 1):
        step = loop.step(k, x)
        yield step
        x = step.x


def write_trace(path: Path, trace: Trace) -> None:
    """Writes a trace, whole or not at all.

    Raises:
        OSError: The file cannot be written.
    """
    states = _states(trace)
    arrays: dict[str, Array] = {
        "states_at": np.array(sorted(states), np.int64),
        "states": np.stack([states[at] for at in sorted(states)]),
        "outputs_at": np.array(sorted(trace.steps), np.int64),
        "outputs": np.stack([trace.steps[k].out for k in sorted(trace.steps)]),
    }
    if trace.pictures is not None:
        arrays["pictures"] = trace.pictures
    header = json.dumps(_header(trace, arrays), sort_keys=True).encode()
    with whole_file(path) as partial, partial.open("wb") as file:
        named: dict[str, Any] = {"header": np.frombuffer(header, np.uint8), **arrays}
        np.savez_compressed(file, **named)


def read_trace(path: Path) -> Trace:
    """Reads what `write_trace` wrote, and compares its hash.

    Raises:
        TraceError: The file is missing, damaged, or of a later version.
        SpecError: The spec in it is.
    """
    if not path.is_file():
        raise TraceError(
            f"There is no trace {path}.",
            hint=f"Record it beside the checkpoint: ddpm-deploy trace ckpt.pt -o {path}",
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(arrays.pop("header").tobytes().decode())
        if header["format"] > FORMAT:
            raise TraceError(
                f"{path} has format {header['format']}; this release reads up to {FORMAT}.",
                hint="Update ddpm-deploy here: pip install --upgrade ddpm-deploy",
            )
        return _trace(path, header, arrays)
    except DDPMDeployError:
        raise
    except (
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        EOFError,
        AttributeError,
        OverflowError,
        RecursionError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise _damaged(path, str(error) or repr(error)) from error


def _states(trace: Trace) -> dict[int, Samples]:
    states = {len(trace.table): trace.final}
    for k, step in trace.steps.items():
        states |= {k - 1: step.x_t, k: step.x}
    return states


def _header(trace: Trace, arrays: Mapping[str, Array]) -> dict[str, Any]:
    header = {
        "format": FORMAT,
        "tool": f"ddpm-deploy {__version__}",
        "spec": trace.spec.to_dict(),
        "recipe": asdict(trace.recipe),
        "images": list(trace.images),
        "noise": SCHEME,
        "source": dict(trace.source),
    }
    return {**header, "sha256": _hash(header, arrays)}


def _hash(header: Mapping[str, Any], arrays: Mapping[str, Array]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _trace(path: Path, header: dict[str, Any], arrays: dict[str, Array]) -> Trace:
    if header.pop("sha256") != _hash(header, arrays):
        raise _damaged(path, "its hash is another than its content's")
    if header["noise"] != SCHEME:
        raise TraceError(
            f"{path} was recorded with the noise {header['noise']}; this release draws {SCHEME}.",
            hint="Record it again: ddpm-deploy trace ckpt.pt",
        )
    spec = ModelSpec.from_dict(header["spec"], source=str(path))
    recipe = _recipe(header["recipe"])
    table = recipe.table(spec)
    images = tuple(int(i) for i in header["images"])
    samples = (len(images), *spec.sample_shape)
    for name in ("states", "outputs"):
        at, values = arrays[f"{name}_at"], arrays[name]
        if values.dtype != np.float32 or values.shape != (len(at), *samples):
            raise _damaged(path, f"{name} are {values.dtype} {values.shape}")
    states = dict(zip(arrays["states_at"].tolist(), arrays["states"], strict=True))
    steps = {}
    for k, out in zip(arrays["outputs_at"].tolist(), arrays["outputs"], strict=True):
        row, x_t = table[k - 1], states[k - 1]
        x0 = predicted_x0(row, x_t, out)
        steps[k] = Step(k=k, t=row.t, x_t=x_t, out=out, x0=x0, x=states[k])
    return Trace(
        spec=spec,
        recipe=recipe,
        images=images,
        steps=steps,
        final=states[len(table)],
        pictures=arrays.get("pictures"),
        source=header["source"],
    )


def _recipe(data: Mapping[str, Any]) -> Recipe:
    """Reads a recipe; ValueError or TypeError where it is none."""
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    return Recipe(**fields)


def _damaged(path: Path, what: str) -> TraceError:
    return TraceError(
        f"{path} is damaged ({what}).",
        hint="Record it again: ddpm-deploy trace ckpt.pt",
    )
