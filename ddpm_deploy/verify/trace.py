"""A recorded loop: some of its steps in a file, to compare another machine's loop with.

A device without PyTorch verifies itself against a trace that was recorded beside the checkpoint;
and a loop of one's own, in any language, is verified by writing one. The file is a zip, not
compressed, of NumPy arrays (`numpy.load` reads it too), little-endian, rows first:

    header      uint8: UTF-8 JSON, see `_header`
    states_at   int64 (J,), ascending: numbers of the states that are there; state 0 is x_T, state k
                the result of transition k
    states      float32 (J, N, *sample_shape)
    outputs_at  int64 (K,), ascending: numbers of the transitions that are there, 1 being the
                noisiest; the last of the loop is among them
    outputs     float32 (K, N, *sample_shape): what the network predicted in them
    befores_at  int64 (B,), ascending, and
    befores     float32 (B, N, *sample_shape), where a step looks back at the one before: the x_0 of
                transition k-1, for each transition k above 1 in `outputs_at`
    pictures    uint8 (N, H, W, C), where the loop made some: what it returned at the end
    sha256      uint8 (32,): the SHA-256 of the bytes of the `.npy` files above, in that order

Of transition k the states k-1 and k are there.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from ddpm_deploy._version import __version__
from ddpm_deploy.arrays import Array, Pixels, Samples
from ddpm_deploy.errors import DDPMDeployError, TraceError
from ddpm_deploy.files import whole_file
from ddpm_deploy.noise import SCHEME, SeededNoise
from ddpm_deploy.run import Recipe
from ddpm_deploy.sampling import Step, Table, predicted_x0
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.verify.loops import Loop

FORMAT = 1
"""Version of the file. A reader refuses a later one."""

SUFFIX = ".trace"

REQUIRED = ("header", "states_at", "states", "outputs_at", "outputs")

ARRAYS = (*REQUIRED, "befores_at", "befores", "pictures")
"""The arrays of a file, in the order in which they are hashed."""

_UNREADABLE = (
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    EOFError,
    AttributeError,
    ArithmeticError,
    MemoryError,  # an array that says to be larger than it is
    RuntimeError,  # an encrypted zip, or a nest of JSON without end
    SyntaxError,
    TokenError,
    zipfile.BadZipFile,
)
"""What a file that is no trace makes NumPy, json and zipfile raise."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Some steps of a loop, the last among them.

    Attributes:
        spec: What the network is.
        recipe: Sampler, seed and labels.
        images: Indices of the images.
        steps: Transitions by their number, 1 being the noisiest; the last is there.
        pictures: uint8, (N, H, W, C): what the loop returned, where it makes pictures itself.
        source: What made it: runtime, file, hash, in JSON's types.
    """

    spec: ModelSpec
    recipe: Recipe
    images: tuple[int, ...]
    steps: Mapping[int, Step]
    pictures: Pixels | None = None
    source: Mapping[str, Any] = field(default_factory=dict)

    @property
    def table(self) -> Table:
        """The sampler that its recipe names."""
        return self.recipe.table(self.spec)

    @property
    def final(self) -> Samples:
        """float32, (N, *sample_shape): the last state."""
        return self.steps[max(self.steps)].x


def chosen_steps(count: int, keep: int) -> list[int]:
    """Returns up to `keep` of the transitions 1..count, evenly spread, both ends among them.

    Raises:
        ValueError: `keep` is below 2, which leaves an end out.
    """
    if keep < 2:
        raise ValueError(f"{keep} steps are to be kept; the first and the last always are")
    if keep >= count:
        return list(range(1, count + 1))
    return sorted({1 + round(i * (count - 1) / (keep - 1)) for i in range(keep)})


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
        keep: How many steps stay, evenly spread, at least 2; all when None.
        pictures: uint8, (N, H, W, C), where the loop makes some itself.
        source: What made it.

    Returns:
        The trace; its arrays are copies, so the loop may write to its own again.

    Raises:
        TraceError: The loop did not come to its end, or its arrays have another dtype or shape.
        ValueError: The recipe does not fit the network's schedule, or `keep` is below 2.
    """
    count = len(recipe.table(spec))
    wanted = set(range(1, count + 1) if keep is None else chosen_steps(count, keep))
    shape = (len(images), *spec.sample_shape)
    kept: dict[int, Step] = {}
    last = None
    back = recipe.looks_back(spec)
    for last in steps:
        if last.k in wanted:
            kept[last.k] = _copied(last, shape, back=back)
    if last is None or last.k != count or kept.keys() != wanted:
        raise TraceError(
            f"The loop made {'no step' if last is None else f'its last step as number {last.k}'}; "
            f"this recipe has {count}, each by its number k from 1 on.",
            hint="Record every step that the loop makes, in order.",
        )
    return Trace(
        spec=spec,
        recipe=recipe,
        images=tuple(images),
        steps=kept,
        pictures=pictures,
        source=dict(source or {}),
    )


def _copied(step: Step, shape: tuple[int, ...], *, back: bool) -> Step:
    """Returns a step with arrays of its own."""

    def copy(name: str) -> Samples:
        array = np.array(getattr(step, name))
        if array.dtype != np.float32 or array.shape != shape:
            raise TraceError(
                f"{name} of step {step.k} is {array.dtype} {array.shape}; "
                f"a trace of these images takes float32 {shape}.",
                hint="Give numpy.asarray(x, dtype=numpy.float32), with the images in their order.",
            )
        return array

    before = copy("before") if back and step.k > 1 else None
    return replace(
        step, x_t=copy("x_t"), out=copy("out"), x0=copy("x0"), x=copy("x"), before=before
    )


def loop_steps(loop: Loop) -> Iterable[Step]:
    """Yields the steps of a loop that runs free, from its own x_T."""
    x, before = loop.start(), None
    for k in range(1, len(loop.table) + 1):
        step = loop.step(k, x, before) if loop.looks_back else loop.step(k, x)
        yield step
        x, before = step.x, step.x0


def write_trace(path: Path, trace: Trace) -> None:
    """Writes a trace, whole or not at all; the same trace gives the same bytes.

    Raises:
        OSError: The file cannot be written.
    """
    states = _states(trace)
    arrays: dict[str, Array] = {
        "header": np.frombuffer(json.dumps(_header(trace), sort_keys=True).encode(), np.uint8),
        "states_at": np.array(sorted(states), np.int64),
        "states": np.stack([states[at] for at in sorted(states)]),
        "outputs_at": np.array(sorted(trace.steps), np.int64),
        "outputs": np.stack([trace.steps[k].out for k in sorted(trace.steps)]),
    }
    befores = {k: s.before for k, s in trace.steps.items() if s.before is not None}
    if befores and trace.recipe.looks_back(trace.spec):
        arrays["befores_at"] = np.array(sorted(befores), np.int64)
        arrays["befores"] = np.stack([befores[k] for k in sorted(befores)])
    if trace.pictures is not None:
        arrays["pictures"] = trace.pictures
    files = {name: _npy(arrays[name]) for name in ARRAYS if name in arrays}
    files["sha256"] = _npy(_hash(files))
    with whole_file(path) as partial, zipfile.ZipFile(partial, "w") as file:
        for name, content in files.items():
            file.writestr(zipfile.ZipInfo(f"{name}.npy"), content)  # noise does not compress


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
    content = path.read_bytes()
    try:
        return _trace(path, content)
    except DDPMDeployError:
        raise
    except _UNREADABLE as error:
        raise _damaged(path, str(error) or repr(error)) from error


def _states(trace: Trace) -> dict[int, Samples]:
    states: dict[int, Samples] = {}
    for k, step in trace.steps.items():
        states |= {k - 1: step.x_t, k: step.x}
    return states


def _header(trace: Trace) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "tool": f"ddpm-deploy {__version__}",
        "spec": trace.spec.to_dict(),
        "recipe": asdict(trace.recipe),
        "images": list(trace.images),
        "noise": SCHEME,
        "source": dict(trace.source),
    }


def _npy(array: Array) -> bytes:
    with io.BytesIO() as file:
        np.save(file, array.astype(array.dtype.newbyteorder("<"), copy=False), allow_pickle=False)
        return file.getvalue()


def _hash(files: Mapping[str, bytes]) -> Array:
    digest = hashlib.sha256()
    for name in ARRAYS:
        digest.update(files.get(name, b""))
    return np.frombuffer(digest.digest(), np.uint8)


def _trace(path: Path, content: bytes) -> Trace:
    """Reads a file's bytes; one of `_UNREADABLE` where they are no trace."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        header = json.loads(_array(_file(file, "header")).tobytes().decode())
        if header["format"] > FORMAT:
            raise TraceError(
                f"{path} has format {header['format']}; this release reads up to {FORMAT}.",
                hint="Update ddpm-deploy here: pip install --upgrade ddpm-deploy",
            )
        names = [name for name in ARRAYS if name in REQUIRED or f"{name}.npy" in file.namelist()]
        _check_names(file.namelist(), [f"{name}.npy" for name in (*names, "sha256")])
        files = {name: _file(file, name) for name in names}
        said = _array(_file(file, "sha256"))
    if not np.array_equal(said, _hash(files)):
        raise ValueError("its hash is another than its content's")
    if header["noise"] != SCHEME:
        raise TraceError(
            f"{path} was recorded with the noise {header['noise']}; this release draws {SCHEME}.",
            hint="Record it again: ddpm-deploy trace ckpt.pt",
        )
    spec = ModelSpec.from_dict(header["spec"], source=str(path))
    recipe, images = _recipe(header["recipe"]), _images(header["images"])
    SeededNoise(recipe.seed, images, spec.sample_shape)  # both are in their ranges
    table = recipe.table(spec)
    arrays = {name: _array(files[name]) for name in names}
    shape = (len(images), *spec.sample_shape)
    states = _numbered("states", arrays, shape, range(len(table) + 1))
    outputs = _numbered("outputs", arrays, shape, range(1, len(table) + 1))
    # Without its end a loop would be called the same whatever it came to.
    if len(table) not in outputs:
        raise ValueError(f"output {len(table)}, the last, is missing")
    if missing := sorted({at for k in outputs for at in (k - 1, k)} - states.keys()):
        raise ValueError(f"states {missing} are missing")
    befores: dict[int, Samples] = {}
    if recipe.looks_back(spec):
        if "befores" in arrays:
            befores = _numbered("befores", arrays, shape, range(2, len(table) + 1))
        if missing := sorted(outputs.keys() - {1} - befores.keys()):
            raise ValueError(f"its steps look back, and the x_0 before steps {missing} are missing")
    steps = {}
    for k, out in outputs.items():
        row, x_t = table[k - 1], states[k - 1]
        steps[k] = Step(
            k=k,
            t=row.t,
            x_t=x_t,
            out=out,
            x0=predicted_x0(row, x_t, out),
            x=states[k],
            before=befores.get(k),
        )
    return Trace(
        spec=spec,
        recipe=recipe,
        images=images,
        steps=steps,
        pictures=_pictures(arrays["pictures"], shape) if "pictures" in arrays else None,
        source=dict(header["source"]),
    )


def _check_names(given: Sequence[str], wanted: Sequence[str]) -> None:
    if more := [name for name in given if name not in wanted or given.count(name) > 1]:
        raise ValueError(f"it holds {', '.join(more)}")
    if missing := [name for name in wanted if name not in given]:
        raise ValueError(f"it holds {', '.join(given)}, and not {', '.join(missing)}")


def _file(file: zipfile.ZipFile, name: str) -> bytes:
    """Returns the bytes of one array's file, which are not more than the zip has."""
    info = file.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise ValueError(f"{name} is compressed")
    return file.read(info)


def _array(content: bytes) -> Array:
    array: Array = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    return array


def _numbered(
    what: str, arrays: Mapping[str, Array], shape: tuple[int, ...], allowed: range
) -> dict[int, Samples]:
    """Returns the states or outputs by their number."""
    at, values = arrays[f"{what}_at"], arrays[what]
    if values.dtype != np.float32 or values.shape != (len(at), *shape):
        raise ValueError(f"{what} are {values.dtype} {values.shape}, and should be {shape} each")
    numbers = at.tolist()
    if at.dtype != np.int64 or not set(numbers) <= set(allowed) or numbers != sorted(set(numbers)):
        raise ValueError(f"{what} are numbered {numbers}")
    return dict(zip(numbers, values, strict=True))


def _pictures(pictures: Pixels, shape: tuple[int, ...]) -> Pixels:
    """Checks pictures; samples that are none are one row of grey."""
    count, channels, *sides = shape if len(shape) == 4 else (shape[0], 1, 1, math.prod(shape[1:]))
    wanted = (count, *sides, channels)
    if pictures.dtype != np.uint8 or pictures.shape != wanted:
        raise ValueError(f"pictures are {pictures.dtype} {pictures.shape}, and should be {wanted}")
    return pictures


def _images(data: Sequence[Any]) -> tuple[int, ...]:
    if not data or not all(_whole(i) for i in data):
        raise ValueError(f"its images are {data}")
    return tuple(data)


def _recipe(data: Mapping[str, Any]) -> Recipe:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    fields["observations"] = {
        name: tuple(tuple(map(float, row)) for row in rows)
        for name, rows in dict(fields.get("observations", {})).items()
    }
    recipe = Recipe(**fields)
    steps = recipe.steps if isinstance(recipe.steps, tuple) else (recipe.steps or 1,)
    whole = (recipe.seed, *steps, *(recipe.labels or ()))
    sound = all(_whole(number) for number in whole)
    if not sound or not all(
        math.isfinite(number) for number in (recipe.eta or 0.0, recipe.guidance)
    ):
        raise ValueError(f"its recipe is {dict(data)}")
    return recipe


def _whole(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def _damaged(path: Path, what: str) -> TraceError:
    return TraceError(
        f"{path} is damaged, or no trace ({what.rstrip('.')}).",
        hint="Record it again: ddpm-deploy trace ckpt.pt",
    )
