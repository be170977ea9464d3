"""A recorded loop in the forms that other tools read: the network's inputs and outputs.

Each recorded step is one call of the network: x, float32; t, int64, as TensorRT from 10.0 on takes
it; the conditions; and the output `out`. Nothing of the sampler is in them.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ddpm_deploy.arrays import Array, Samples
from ddpm_deploy.engines.base import needs
from ddpm_deploy.errors import TraceError
from ddpm_deploy.files import whole_file
from ddpm_deploy.parity import TOLERANCE
from ddpm_deploy.run import Recipe
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.verify.trace import Trace

OUTPUT = "out"
"""The name of a graph's output."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of the network.

    Attributes:
        k: The transition that made it.
        feeds: Its inputs by name.
        out: float32, (N, *sample_shape): what it gave.
    """

    k: int
    feeds: dict[str, Array]
    out: Samples


def check_calls(spec: ModelSpec, recipe: Recipe) -> None:
    """Tells before a loop whether its steps will each be one call of the network.

    Raises:
        TraceError: They will not.
    """
    if recipe.guidance != 1:
        raise TraceError(
            f"With guidance {recipe.guidance:g} an output is made of two calls of the network, and "
            "other tools make one.",
            hint="Record it without --guidance.",
        )
    if spec.output_shape != spec.sample_shape:
        raise TraceError(
            f"This network gives its variance beside its prediction, {spec.output_shape} for "
            f"{spec.sample_shape}, and a trace keeps the prediction alone.",
            hint="Compare with the trace itself: ddpm-deploy verify",
        )
    if others := [c.name for c in spec.conditions if c != spec.label]:
        raise TraceError(
            f"This network also takes {', '.join(others)}, which a trace does not keep.",
            hint="Compare with the trace itself: ddpm-deploy verify",
        )


def check_polygraphy() -> None:
    """Tells before a loop whether Polygraphy is here.

    Raises:
        MissingDependencyError: It is not installed.
    """
    with needs("polygraphy", extra="tensorrt"):
        import polygraphy  # noqa: F401


def check_folder(folder: Path) -> None:
    """Tells before a loop whether trtexec can be told of files in a folder.

    Raises:
        TraceError: Its name has a character that trtexec splits at.
    """
    if wrong := sorted(set(str(folder)) & set(",:'")):
        raise TraceError(
            f"trtexec splits its options at {' '.join(wrong)}, which is in {folder}.",
            hint="Name another folder: --trtexec goldens",
        )


def calls(trace: Trace) -> Iterator[Call]:
    """Yields the recorded calls of the network, the noisiest first.

    Raises:
        TraceError: As from `check_calls`, or an output is not finite.
    """
    check_calls(trace.spec, trace.recipe)
    conditions = trace.recipe.conditions_of(trace.spec, trace.images, called="This network")
    for k, step in sorted(trace.steps.items()):
        if not np.isfinite(step.out).all():
            raise TraceError(
                f"The recorded output of step {k} (t = {step.t}) is not finite.",
                hint="Record a loop that comes to its end: ddpm-deploy trace ckpt.pt",
            )
        t = np.full(len(step.x_t), step.t, dtype=np.int64)
        yield Call(k=k, feeds={"x": step.x_t, "t": t, **conditions}, out=step.out)


def write_polygraphy(folder: Path, trace: Trace) -> list[Path]:
    """Writes what `polygraphy run --load-inputs inputs.json --load-outputs outputs.json` reads.

    One iteration for each recorded step, in order. Both files appear, or neither.

    Returns:
        The two files, inputs first.

    Raises:
        TraceError: As from `calls`.
        MissingDependencyError: Polygraphy is not installed.
        OSError: A file cannot be written.
    """
    with needs("polygraphy", extra="tensorrt"):
        from polygraphy.comparator import RunResults
        from polygraphy.json import to_json

    made = list(calls(trace))
    results = RunResults()
    results.add([{OUTPUT: call.out} for call in made], runner_name="ddpm-deploy")
    paths = [folder / "inputs.json", folder / "outputs.json"]
    with whole_file(paths[0]) as inputs, whole_file(paths[1]) as outputs:
        inputs.write_text(to_json([call.feeds for call in made]), encoding="utf-8")
        outputs.write_text(to_json(results), encoding="utf-8")
    return paths


def write_trtexec(
    folder: Path, trace: Trace, *, plan: str = "unet.plan", tolerance: float = TOLERANCE
) -> list[str]:
    """Writes a folder for each recorded step, of raw files as `trtexec --loadInputs` reads them.

    `x.bin`, `t.bin` and the conditions are the inputs, `out.bin` the output, little-endian;
    `out.json` is the output in the form of `--exportOutput`, which itself has six digits.

    Args:
        folder: Where to.
        trace: The recorded loop.
        plan: The file to name in the commands; it must take as many samples as the trace has.
        tolerance: Largest difference, of the largest output.

    Returns:
        Two commands for a POSIX shell. The first exports each step's output, to `got.json` beside
        what it should be; any trtexec can. The second, of trtexec 11.1 and later, compares all
        steps, and exits with 1 where one is outside the tolerance.

    Raises:
        TraceError: As from `calls` and `check_folder`.
        OSError: A file cannot be written; then none appears.

    References:
        https://github.com/NVIDIA/TensorRT, samples/common/sampleOptions.cpp: `--loadInputs`,
        `--loadRefOutputs`, `--refPair`; sampleReporting.cpp, `exportJSONOutput`.
    """
    check_folder(folder)
    made = list(calls(trace))
    with ExitStack() as stack:
        for call in made:
            place = folder / _step(call)
            for name, array in {**call.feeds, OUTPUT: call.out}.items():
                little = array.astype(array.dtype.newbyteorder("<"), copy=False)
                stack.enter_context(whole_file(place / f"{name}.bin")).write_bytes(little.tobytes())
            text = json.dumps([_exported(call.out)]) + "\n"
            stack.enter_context(whole_file(place / "out.json")).write_text(text, encoding="utf-8")
    return [_export_command(folder, made, plan), _compare_command(folder, made, plan, tolerance)]


def _step(call: Call) -> str:
    return f"step{call.k:04d}"


def _exported(out: Samples) -> dict[str, object]:
    """Returns an output as trtexec's `exportJSONOutput` writes it."""
    # The shortest text that reads back as the same float32.
    values = [float(np.format_float_scientific(value)) for value in out.ravel()]
    return {"name": OUTPUT, "dimensions": "x".join(map(str, out.shape)), "values": values}


def _export_command(folder: Path, made: list[Call], plan: str) -> str:
    inputs = ",".join(f"{name}:$step/{name}.bin" for name in made[0].feeds)
    steps = shlex.join(str(folder / _step(call)) for call in made)
    return (
        f"for step in {steps}; do {shlex.join(_common(made[0], plan))} "
        f'"--loadInputs={inputs}" "--exportOutput=$step/got.json" || break; done'
    )


def _compare_command(folder: Path, made: list[Call], plan: str, tolerance: float) -> str:
    words = _common(made[0], plan)
    for i, call in enumerate(made):
        place = folder / _step(call)
        inputs = ",".join(f"{name}:{place / name}.bin" for name in call.feeds)
        pair = [f"--loadInputs={inputs}", f"--loadRefOutputs={OUTPUT}:{place / OUTPUT}.bin"]
        words += [f"--refPair={i}", *pair] if len(made) > 1 else pair
    largest = max(float(np.abs(call.out).max()) for call in made)
    words += ["--accuracyAlgorithm=lInf", f"--accuracyThreshold={tolerance * largest:.6g}"]
    return shlex.join(words)


def _common(call: Call, plan: str) -> list[str]:
    shapes = ",".join(f"{name}:{'x'.join(map(str, a.shape))}" for name, a in call.feeds.items())
    # Not to be timed, so once is enough.
    once = ["--iterations=1", "--warmUp=0", "--duration=0", "--avgRuns=1"]
    return ["trtexec", f"--loadEngine={plan}", f"--shapes={shapes}", *once]
