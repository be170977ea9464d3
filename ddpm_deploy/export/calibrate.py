"""Which operators half precision does not suit, found on the loop's own x_t.

`convert` chooses by rule. Here its choice is tried: the float32 network samples, and on the x_t
that it meets at timesteps from last to first, every tensor's range and the mixed graph's error are
measured. What would overflow, or is too small for the type, goes back to float32; and while the
error is beyond the budget, so does the product that adds most to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ddpm_deploy.arrays import Array, Samples, Timesteps
from ddpm_deploy.engines import open_engine
from ddpm_deploy.engines.base import Engine, needs
from ddpm_deploy.errors import ExportError
from ddpm_deploy.export.attention import split_queries
from ddpm_deploy.export.graph import constants
from ddpm_deploy.export.onnx_file import load_graph, save_graph
from ddpm_deploy.export.precision import (
    LARGEST,
    PRODUCTS,
    Mixed,
    convert,
    half_operators,
    recorded,
)
from ddpm_deploy.export.rounding import rounded
from ddpm_deploy.noise import SeededNoise
from ddpm_deploy.parity import BUDGETS, example_conditions, relative_error
from ddpm_deploy.precision import Half
from ddpm_deploy.sampling import Predictor, SelfConditioned, denoise
from ddpm_deploy.spec import ModelSpec

HEADROOM = 2.0
"""How much larger than measured a value may become before it overflows."""

TRIAL_ATTENTION_BYTES = 2**26
"""What one matrix of attention may take while a graph is tried."""

SMALLEST_PEAK = 2.0**-13
"""Below this, fp16's absolute spacing of 2⁻²⁴ is coarser than its relative 2⁻¹¹."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of the float32 network, as the loop made it.

    Attributes:
        feeds: `x`, `t` and the conditions.
        out: float32, (N, *output_shape): what it gave.
    """

    feeds: Mapping[str, Array]
    out: Samples


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """A mixed graph whose error was measured.

    Attributes:
        mixed: The graph.
        kept: Operators that went back to float32, by the name of their first output: the reason.
        errors: Timestep to max |mixed - float32| / max |float32| of the network's output.
        budget: What was allowed.
    """

    mixed: Mixed
    kept: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[int, float] = field(default_factory=dict)
    budget: float

    @property
    def worst(self) -> float:
        """The largest of the errors."""
        return max(self.errors.values(), default=0.0)


def calibrate(
    graph: Path,
    precision: Half,
    *,
    budget: float | None = None,
    steps: int = 10,
    images: int = 2,
    data: Samples | None = None,
    threads: int | None = None,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Calibrated:
    """Makes a float32 graph mixed, within a budget.

    Args:
        graph: The ONNX file that `export` wrote. One that is mixed already is given back as it is,
            unmeasured.
        precision: `fp16` or `bf16`.
        budget: Largest error of the network's output over its peak; `parity.BUDGETS` when None.
        steps: Timesteps at which it is measured, from the last to the first.
        images: Samples at each; a graph of one batch alone takes that many.
        data: float32, (M, *sample_shape): clean samples, which q carries to x_t (Ho et al. 2020,
            Eq. 4). The network's own samples when None.
        threads: CPU threads; one a core when None.
        on_progress: Told what is being done, in words.

    Raises:
        ExportError: The budget cannot be kept with half of the products in half precision.
        EngineError: The graph cannot be read or run.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    allowed = BUDGETS[precision] if budget is None else budget
    model = load_graph(graph)
    if recorded(model) is not None:
        return Calibrated(mixed=convert(model, precision), budget=allowed)
    if (batch := fixed_batch(model)) is not None:
        images = batch
        data = None if data is None else np.resize(data, (batch, *data.shape[1:]))
    with (
        written(small(model, images)) as path,
        open_engine(path, device="cpu", threads=threads) as engine,
    ):
        on_progress(f"measuring {precision} against float32 on x_t of {steps} timesteps")
        calls = sampled(engine, steps, images) if data is None else noised(engine, data, steps)
    if not all(np.isfinite(call.out).all() for call in calls):
        raise ExportError(
            "The float32 network itself gives numbers that are not finite, so there is nothing to "
            "measure half precision against.",
            hint=f"See where it begins: ddpm-deploy verify --engine {graph} --against CHECKPOINT",
        )
    trial = _Trial(model, precision, calls, threads)
    keep = trial.out_of_range()
    errors = trial.errors(keep)
    free = [name for name in trial.products if name not in keep]
    if trial.products and not free:
        raise ExportError(
            f"Every product of this network leaves the range of {precision}, so nothing would be "
            "in it.",
            hint="Build with --bf16, which reaches as far as float32, or with --fp32.",
        )
    most = len(free) // 2
    while not (worst := max(errors.values())) <= allowed:
        if len(keep) > most or not free:
            raise ExportError(
                f"In {precision} the network's output is {worst:.1e} of its peak away from "
                f"float32, with {len(keep)} operators kept in float32; the budget is "
                f"{allowed:.0e}.",
                hint="Build with --bf16 or --fp32, or allow more: --budget 0.05",
            )
        on_progress(f"error {worst:.1e} is above {allowed:.0e}: looking for where it comes from")
        loudest, alone = trial.loudest(free, keep)
        free.remove(loudest)
        keep[loudest] = f"accuracy: alone it costs {alone:.1e} of the peak"
        errors = trial.errors(keep)
    mixed = convert(model, precision, keep=keep, error=worst)
    return Calibrated(mixed=mixed, kept=keep, errors=errors, budget=allowed)


def sampled(engine: Engine, steps: int, images: int, *, seed: int = 0) -> list[Call]:
    """Returns the calls of a short sampling loop, DDIM over timesteps from last to first."""
    spec = engine.spec
    calls: list[Call] = []

    def kept(feeds: Mapping[str, Array]) -> Samples:
        calls.append(Call(feeds=feeds, out=engine(**feeds)))
        return calls[-1].out

    table = spec.table("ddim", min(steps, spec.schedule.T), spacing="linspace")
    noise = SeededNoise(seed, range(images), spec.sample_shape)
    for _ in denoise(predictor(spec, images, kept), table, noise):
        pass
    return calls


def predictor(
    spec: ModelSpec, images: int, call: Callable[[Mapping[str, Array]], Samples]
) -> Predictor:
    """Returns what `denoise` asks: `call` of x, t and example conditions, x_0' among them."""
    conditions = example_conditions(spec, images)
    sees = spec.self_condition

    def predict(x: Samples, t: Timesteps, before: Samples | None = None) -> Samples:
        given = dict(conditions)
        if sees is not None:
            given[sees.name] = np.zeros_like(x) if before is None else before
        return call({"x": x, "t": t, **given})

    return predict if sees is None else SelfConditioned(predict=predict)


def noised(engine: Engine, data: Samples, steps: int) -> list[Call]:
    """Returns calls on clean samples with noise, at timesteps from last to first."""
    spec = engine.spec
    last = spec.schedule.T - 1
    conditions = example_conditions(spec, len(data))
    noise = SeededNoise(0, range(len(data)), spec.sample_shape)
    calls = []
    for k, t in enumerate(np.linspace(last, 0, min(steps, last + 1)).round().astype(np.int64)):
        timesteps = np.full(len(data), t)
        x = spec.schedule.diffuse(data, timesteps, noise(k))
        out = engine(x, timesteps, **conditions)
        calls.append(Call(feeds={"x": x, "t": timesteps, **conditions}, out=out))
    return calls


class _Trial:
    """The mixed graph, tried on calls of the float32 network."""

    def __init__(
        self,
        model: onnx.ModelProto,
        precision: Half,
        calls: Sequence[Call],
        threads: int | None,
    ) -> None:
        self.model, self.precision, self.calls, self.threads = model, precision, calls, threads
        self.operators = half_operators(model, precision)
        self.products = [o.name for o in self.operators if o.op_type in PRODUCTS]

    def out_of_range(self) -> dict[str, str]:
        """Returns the operators whose half-precision tensors would overflow or underflow."""
        tensors = sorted({name for o in self.operators for name in o.tensors})
        peaks = self._peaks(tensors)
        largest = LARGEST[self.precision]
        found = {}
        for operator in self.operators:
            for name in operator.tensors:
                if not peaks[name] * HEADROOM <= largest:
                    found[operator.name] = (
                        f"range: {peaks[name]:.3g} comes too near to {largest:.3g}"
                    )
                elif self.precision == "fp16" and 0 < peaks[name] < SMALLEST_PEAK:
                    found[operator.name] = f"range: at most {peaks[name]:.1g}, too small for fp16"
        return found

    def errors(self, keep: Mapping[str, str]) -> dict[int, float]:
        """Returns the error by timestep with these operators in float32."""
        model = rounded(convert(self.model, self.precision, keep=keep).model)
        outs = self._run(small(model, len(self.calls[0].out)), ["out"])
        return {
            int(call.feeds["t"][0]): float(np.nan_to_num(relative_error(out, call.out), nan=np.inf))
            for call, (out,) in zip(self.calls, outs, strict=True)
        }

    def loudest(self, free: Sequence[str], keep: Mapping[str, str]) -> tuple[str, float]:
        """Returns the product that, alone in half precision, costs most, and what it costs.

        Halving: of each half of the candidates, the louder one is halved again.
        """
        candidates = list(free)
        cost: float | None = None
        while len(candidates) > 1:
            middle = len(candidates) // 2
            halves = candidates[:middle], candidates[middle:]
            costs = [self._cost_of(half, keep) for half in halves]
            cost = max(costs)
            candidates = halves[costs.index(cost)]
        return candidates[0], self._cost_of(candidates, keep) if cost is None else cost

    def _cost_of(self, alone: Sequence[str], keep: Mapping[str, str]) -> float:
        """Returns the error with these products in half precision and all others in float32."""
        others = {o.name: "tried" for o in self.operators if o.name not in alone}
        return max(self.errors({**others, **keep}).values())

    def _peaks(self, tensors: Sequence[str]) -> dict[str, float]:
        """Returns the largest magnitude of float32 tensors over all calls."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        graph = model.graph
        weights = constants(graph)
        names = []
        for name in tensors:
            if name not in weights:
                names.append(name)
                for kind in ("ReduceMax", "ReduceMin"):
                    output = f"{kind}.{name}"
                    graph.node.append(helper.make_node(kind, [name], [output], keepdims=0))
                    graph.output.append(
                        helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, [])
                    )
        wanted = [f"{kind}.{name}" for name in names for kind in ("ReduceMax", "ReduceMin")]
        runs = np.abs(np.array(self._run(model, wanted), dtype=np.float64)) if wanted else None
        peaks = {
            name: float(np.abs(numpy_helper.to_array(weights[name])).max(initial=0))
            for name in tensors
            if name in weights
        }
        if runs is not None:
            by_tensor = runs.reshape(len(self.calls), len(names), 2).max(axis=(0, 2))
            peaks.update(zip(names, map(float, by_tensor), strict=True))
        return peaks

    def _run(self, model: onnx.ModelProto, outputs: Sequence[str]) -> list[list[Array]]:
        with needs("onnxruntime", extra="cpu"):
            from ddpm_deploy.engines.ort import run_graph  # noqa: PLC0415
        with written(model) as path:
            feeds = [call.feeds for call in self.calls]
            return run_graph(path, feeds, outputs, threads=self.threads)


@contextmanager
def written(model: onnx.ModelProto) -> Iterator[Path]:
    """Gives a file of a model while it is needed."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "graph.onnx"
        save_graph(model, path)
        yield path


def fixed_batch(model: onnx.ModelProto) -> int | None:
    """Returns the only batch that a graph takes; None where it is free."""
    first = [value.type.tensor_type.shape.dim[:1] for value in model.graph.input]
    return next((dim.dim_value for dims in first for dim in dims if dim.dim_value), None)


def small(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """Returns the same function with attention's matrices cut: quicker on a CPU, and smaller."""
    return split_queries(model, batch=batch, limit_bytes=TRIAL_ATTENTION_BYTES).model
