"""int8 within a budget in decibels: ranges from the model's own loop, the worst layers in float32.

A product of two int8 numbers is exact; what is lost is lost when an input is rounded to 255 levels.
How far an input reaches changes with t, so its range is taken on the x_t of a whole sampling loop.
Then the quantised network samples, beside float32 on the same noise, and while the pictures are
further apart than the budget allows, the layers that cost most alone go back to float32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from ddpm_deploy.arrays import Array, Samples
from ddpm_deploy.engines import open_engine
from ddpm_deploy.engines.base import needs
from ddpm_deploy.errors import ExportError
from ddpm_deploy.export.calibrate import (
    Call,
    fixed_batch,
    noised,
    predictor,
    sampled,
    small,
    written,
)
from ddpm_deploy.export.onnx_file import load_graph, metadata
from ddpm_deploy.export.precision import PRODUCTS, float_by_rule, recorded
from ddpm_deploy.export.qdq import (
    NO_WEIGHTS,
    add_pairs,
    int8_products,
    quantisable,
    shift_output,
    without_pairs,
)
from ddpm_deploy.export.ranges import Magnitudes, best_range
from ddpm_deploy.fused import METADATA_KEY as FUSED_KEY
from ddpm_deploy.noise import SeededNoise
from ddpm_deploy.parity import relative_error
from ddpm_deploy.precision import ALIKE, METADATA_KEY, LoopRecord, PrecisionRecord, read_precision
from ddpm_deploy.sampling import denoise
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.verify.likeness import psnr

PSNR = 30.0
"""Decibels that are asked for where nobody says: less than a step of 8 bits in 8 on average."""

LOOP_STEPS = 50
LOOP_IMAGES = 2
BUCKETS = 12
BUCKET_IMAGES = 4

_CALIBRATION_SEED = 1
_LOOP_SEED = 0  # another noise than the one that the ranges were taken on

_TRIED = slice(1, None, 3)
"""Of the buckets: those on which one layer is tried alone."""

TOO_MUCH = "accuracy: int8 costs too much of the budget here"


@dataclass(frozen=True, kw_only=True)
class Quantised:
    """A graph in int8 that keeps a budget.

    Attributes:
        model: The graph, with `PrecisionRecord` in its metadata.
        psnr: Of the worst image of the loop, in decibels; infinite where all agree, None where the
            graph was int8 already and does not say.
        groups: How many products compute in what and why: the reason, then counts.
        floats: Layers that went back to float32, the worst first: first output to the error of the
            network's output, root mean square over that of the output, with this layer alone in
            int8.
        error: max |int8 - float32| / max |float32| of the output, at the worst bucket.
    """

    model: onnx.ModelProto
    psnr: float | None
    groups: Mapping[str, str]
    floats: Mapping[str, float] = field(default_factory=dict)
    error: float | None = None


def quantise(
    graph: Path,
    *,
    psnr: float = PSNR,
    data: Samples | None = None,
    steps: int = LOOP_STEPS,
    images: int = LOOP_IMAGES,
    threads: int | None = None,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Quantised:
    """Makes a float32 graph int8, within a budget.

    Args:
        graph: The ONNX file that `export` wrote. One that is int8 already is given back as it is.
        psnr: Decibels that the loop's worst image must have against float32's on the same noise:
            of pictures in 8 bits, of other samples over their peak.
        data: float32, (M, *sample_shape): clean samples, which q carries to the x_t that ranges are
            taken on (Ho et al. 2020, Eq. 4). The network's own samples when None.
        steps: Transitions of the DDIM loop that the budget is held to; all T where T is fewer.
        images: Samples of that loop; a graph of one batch alone takes that many.
        threads: CPU threads; one a core when None.
        on_progress: Told what is being done, in words.

    Raises:
        ExportError: The budget cannot be kept with half of the layers in int8; there is no layer
            that int8 suits; the graph is in half precision, or its step is fused.
        EngineError: The graph cannot be read or run.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    model = load_graph(graph)
    if (before := recorded(model)) is not None:
        if before.precision != "int8":
            raise ExportError(
                f"{graph} is in {before.precision} already; int8 cannot be made of it.",
                hint="Start from the float32 graph that export wrote.",
            )
        said = read_precision(metadata(model).get(METADATA_KEY), source=str(graph))
        known = said.loop.psnr if said.loop else None
        return Quantised(model=model, psnr=known, groups=said.groups, error=said.error)
    if FUSED_KEY in metadata(model):
        raise ExportError(
            f"{graph} is in float32 with its step fused, and the step stays in float32.",
            hint="Start from the graph that export wrote: --int8 --fuse-step",
        )
    layers = quantisable(model)
    if not layers:
        raise ExportError(
            "This network has no layer that int8 suits: none with constant weights between its "
            "first and its last.",
            hint="Build it in half precision or float32: --fp16, --bf16 or --fp32.",
        )
    batch = fixed_batch(model)
    images = batch or images
    calls = _calls(model, data, batch or BUCKET_IMAGES, threads, on_progress)
    limits = _ranges(model, calls, layers, threads)
    search = _Search(
        model=model,
        pairs=add_pairs(model, limits),
        calls=calls,
        budget=psnr,
        steps=steps,
        images=images,
        fixed=batch is not None,
        threads=threads,
        on_progress=on_progress,
    )
    floats = search.floats()
    found = search.found
    source = (
        f"{BUCKETS} timesteps of its own DDIM loop, {len(calls[0].out)} images, seed "
        f"{_CALIBRATION_SEED}"
        if data is None
        else f"{len(data)} pictures with noise, at {BUCKETS} timesteps"
    )
    record = PrecisionRecord(
        precision="int8",
        groups=_groups(model, int8_products(found.model), floats),
        error=found.error,
        loop=LoopRecord(
            psnr=min(found.psnr, ALIKE),
            budget=psnr,
            sampler="ddim",
            steps=search.steps,
            images=images,
            seed=_LOOP_SEED,
            calibration=source,
        ),
    )
    helper.set_model_props(found.model, {**metadata(model), METADATA_KEY: record.to_json()})
    onnx.checker.check_model(found.model, full_check=found.model.ByteSize() < 2**31)
    return Quantised(
        model=found.model,
        psnr=found.psnr,
        groups=record.groups,
        floats=floats,
        error=found.error,
    )


def _calls(
    model: onnx.ModelProto,
    data: Samples | None,
    images: int,
    threads: int | None,
    on_progress: Callable[[str], None],
) -> list[Call]:
    """Returns calls of the float32 network at timesteps from last to first."""
    with (
        written(small(model, images)) as path,
        open_engine(path, device="cpu", threads=threads) as engine,
    ):
        on_progress(f"taking the ranges of int8 on x_t of {BUCKETS} timesteps")
        if data is not None:
            data = np.resize(data, (images, *data.shape[1:])) if fixed_batch(model) else data
            calls = noised(engine, data, BUCKETS)
        else:
            calls = sampled(engine, BUCKETS, images, seed=_CALIBRATION_SEED)
    if not all(np.isfinite(call.out).all() for call in calls):
        raise ExportError(
            "The float32 network itself gives numbers that are not finite, so there is nothing to "
            "measure int8 against.",
            hint="See where it begins: ddpm-deploy verify --engine unet.onnx --against CHECKPOINT",
        )
    return calls


def _ranges(
    model: onnx.ModelProto, calls: Sequence[Call], layers: Mapping[str, str], threads: int | None
) -> dict[str, float]:
    """Returns the range of each layer's input."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    inputs = sorted(set(layers.values()))
    have = {value.name for value in copy.graph.output}
    copy.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        for name in inputs
        if name not in have
    )
    counted: dict[str, list[Magnitudes]] = {name: [] for name in inputs}
    with written(copy) as path:
        for call in calls:  # one at a time: a large network's tensors fill gigabytes
            (tensors,) = _run(path, [call], inputs, threads)
            for name, tensor in zip(inputs, tensors, strict=True):
                counted[name].append(Magnitudes.of(tensor))
    best = {name: best_range(parts) for name, parts in counted.items()}
    return {layer: best[name] for layer, name in layers.items()}


@dataclass(frozen=True, kw_only=True)
class _Tried:
    """A quantised graph and how far it is from float32: of the worst image, of the output."""

    model: onnx.ModelProto
    psnr: float
    error: float


@dataclass(kw_only=True)
class _Search:
    """Looks for the layers that must stay float32, and as few of them as will do."""

    model: onnx.ModelProto
    pairs: onnx.ModelProto
    calls: Sequence[Call]
    budget: float
    steps: int
    images: int
    fixed: bool
    threads: int | None
    on_progress: Callable[[str], None]
    tried: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        said = metadata(self.model)
        self.spec = ModelSpec.from_metadata(said, source="This graph")
        self.steps = min(self.steps, self.spec.schedule.T)
        self.layers = int8_products(self.pairs)
        self.wanted = self._loop(self.model)

    def floats(self) -> dict[str, float]:
        """Returns the layers that go back to float32, the worst first.

        Layers are ranked by what they cost alone. How many of the worst go back is found by
        doubling, then by halving between the last number that failed and the first that held.
        """
        if self._holds([], 0):
            return {}
        self.on_progress(f"trying {len(self.layers)} layers, each alone in int8")
        costs = {layer: self._cost(layer) for layer in self.layers}
        ranked = sorted(costs, key=lambda layer: -costs[layer])
        most = len(ranked) // 2
        failed, held = 0, 1
        while held <= most and not self._holds(ranked, held):
            failed = held
            held = held * 2 if held == most else min(held * 2, most)
        if held > most:
            count, psnr = max(self.tried.items(), key=lambda tried: tried[1])
            raise ExportError(
                f"In int8 the loop's worst image is {psnr:.1f} dB from float32's, with {count} of "
                f"{len(ranked)} layers kept in float32; the budget is {self.budget:g} dB.",
                hint=_hint(psnr),
            )
        while held - failed > 1:
            middle = (held + failed) // 2
            held, failed = (middle, failed) if self._holds(ranked, middle) else (held, middle)
        return {layer: costs[layer] for layer in ranked[:held]}

    def _holds(self, ranked: Sequence[str], count: int) -> bool:
        """Says whether the loop keeps the budget with so many of the worst in float32."""
        graph = without_pairs(self.pairs, self.model, ranked[:count])
        outs = self._outs(graph, self.calls)
        errors = [given - call.out for given, call in zip(outs, self.calls, strict=True)]
        over = tuple(i for i in range(errors[0].ndim) if i != 1)
        shift = np.mean([error.mean(axis=over, dtype=np.float64) for error in errors], axis=0)
        graph = shift_output(graph, shift)
        moved = shift.astype(np.float32).reshape(1, -1, *[1] * (errors[0].ndim - 2))
        error = max(
            relative_error(given - moved, call.out)
            for given, call in zip(outs, self.calls, strict=True)
        )
        psnr = self._psnr(self._loop(graph))
        self.tried[count] = psnr
        if psnr >= self.budget:
            self.found = _Tried(model=graph, psnr=psnr, error=error)
        self.on_progress(
            f"{len(self.layers) - count} of {len(self.layers)} layers in int8: {psnr:.1f} dB from "
            f"float32 after {self.steps} steps; {self.budget:g} are asked for"
        )
        return psnr >= self.budget

    def _cost(self, layer: str) -> float:
        """Returns the error of the output with one layer alone in int8."""
        others = [other for other in self.layers if other != layer]
        graph = without_pairs(self.pairs, self.model, others)
        images = None if self.fixed else self.images
        calls = [
            Call(
                feeds={name: value[:images] for name, value in call.feeds.items()},
                out=call.out[:images],
            )
            for call in self.calls[_TRIED]
        ]
        squares = [
            float(np.mean((given - call.out) ** 2) / max(float(np.mean(call.out**2)), 1e-30))
            for given, call in zip(self._outs(graph, calls), calls, strict=True)
        ]
        return float(np.sqrt(np.mean(squares)))

    def _outs(self, model: onnx.ModelProto, calls: Sequence[Call]) -> list[Samples]:
        with written(small(model, len(calls[0].out))) as path:
            return [out for (out,) in _run(path, calls, ["out"], self.threads)]

    def _loop(self, model: onnx.ModelProto) -> Samples:
        """Returns the samples of the loop that the budget is held to."""
        table = self.spec.table("ddim", self.steps)
        noise = SeededNoise(_LOOP_SEED, range(self.images), self.spec.sample_shape)
        with (
            written(small(model, self.images)) as path,
            open_engine(path, device="cpu", threads=self.threads) as engine,
        ):

            def call(feeds: Mapping[str, Array]) -> Samples:
                return engine(**feeds)

            for step in denoise(predictor(self.spec, self.images, call), table, noise):
                x = step.x
        return x

    def _psnr(self, given: Samples) -> float:
        """Returns the decibels of the worst image."""
        return psnr(given, self.wanted, self.spec)


def _run(
    path: Path, calls: Sequence[Call], outputs: Sequence[str], threads: int | None
) -> list[list[Array]]:
    with needs("onnxruntime", extra="cpu"):
        from ddpm_deploy.engines.ort import run_graph  # noqa: PLC0415
    return run_graph(path, [call.feeds for call in calls], outputs, threads=threads)


def _hint(psnr: float) -> str:
    """Says what to type where int8 gets no further than these decibels."""
    if psnr < 1:
        return "Build it with --fp16, --bf16 or --fp32."
    return f"Allow more: --int8 --budget psnr={int(psnr)}; or build it with --fp16 or --bf16."


def _groups(
    model: onnx.ModelProto, quantised: Collection[str], floats: Collection[str]
) -> dict[str, str]:
    """Counts the products by what they compute in, and why."""
    by_rule = float_by_rule(model)
    counts: dict[str, Counter[str]] = {}
    for node in model.graph.node:
        if node.op_type not in PRODUCTS:
            continue
        name = node.output[0]
        if name in quantised:
            group = "int8"
        elif name in floats:
            group = f"float32, {TOO_MUCH}"
        else:
            group = f"float32, {by_rule.get(name, NO_WEIGHTS)}"
        counts.setdefault(group, Counter())[node.op_type] += 1
    return {
        group: ", ".join(f"{n} {kind}" for kind, n in sorted(counted.items()))
        for group, counted in sorted(counts.items())
    }
