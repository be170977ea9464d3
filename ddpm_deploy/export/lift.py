"""Which half-precision part of a graph costs the error: each is put back into float32 and tried."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from ddpm_deploy.arrays import Array, Samples
from ddpm_deploy.engines.base import needs
from ddpm_deploy.export.calibrate import written
from ddpm_deploy.export.graph import is_op
from ddpm_deploy.export.plain import half_tensors
from ddpm_deploy.export.precision import is_statistics
from ddpm_deploy.export.rounding import rounded
from ddpm_deploy.fused import COLUMNS
from ddpm_deploy.parity import relative_error

Calls = Sequence[tuple[Mapping[str, Array], Samples]]
"""Inputs of a network, and the output that its reference gave."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a graph that computes in half precision.

    Attributes:
        name: Which: `conditioning`, what depends on t and labels alone; or `statistics`, such as
            normalisation and softmax.
        tensors: The half-precision tensors that it makes.
    """

    name: str
    tensors: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Lifted:
    """What a part costs.

    Attributes:
        part: The part.
        before: Error of the output, as the graph is.
        after: The same with the part in float32.
    """

    part: Part
    before: float
    after: float


def half_parts(model: onnx.ModelProto) -> list[Part]:
    """Returns the parts of a graph that float32 suits better, as far as they are in half precision.

    Args:
        model: A graph in half precision, by any tool.
    """
    halves = half_tensors(model.graph)
    dependent = {"x"}
    conditioning: set[str] = set()
    statistics: set[str] = set()
    for node in model.graph.node:
        if dependent.intersection(node.input):
            dependent.update(node.output)
            if is_statistics(node) and not is_op(node, "Cast"):
                statistics.update(halves.intersection(node.output))
        else:
            conditioning.update(halves.intersection(node.output))
    parts = {"conditioning": conditioning, "statistics": statistics}
    return [Part(name=name, tensors=frozenset(found)) for name, found in parts.items() if found]


def lift(model: onnx.ModelProto, calls: Calls) -> list[Lifted]:
    """Tries each part in float32, with the graph rounding as half precision does.

    Args:
        model: The graph.
        calls: Inputs, and the output that the reference gave.

    Raises:
        EngineError: The graph cannot be run.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    plain = rounded(model)
    parts = half_parts(model)
    if not parts:
        return []
    before = output_error(plain, calls)
    return [
        Lifted(part=part, before=before, after=output_error(_unrounded(plain, part.tensors), calls))
        for part in parts
    ]


def _unrounded(model: onnx.ModelProto, tensors: Collection[str]) -> onnx.ModelProto:
    """Leaves out the roundings behind some tensors of a graph that `rounded` made."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        if node.output[0] in tensors and node.input and node.input[0].endswith(".rounded"):
            exact = node.input[0].removesuffix(".rounded") + ".exact"
            plain = helper.make_node("Identity", [exact], list(node.output))
            node.CopyFrom(plain)
    return copy


def output_error(model: onnx.ModelProto, calls: Calls) -> float:
    """Returns the largest `relative_error` of a float32 graph's output over some calls.

    Raises:
        EngineError: The graph cannot be run.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    with needs("onnxruntime", extra="cpu"):
        from ddpm_deploy.engines.ort import run_graph  # noqa: PLC0415
    takes = {value.name for value in model.graph.input}
    worst = 0.0
    with written(model) as path:
        for feeds, wanted in calls:
            fed = dict(feeds)
            if "row" in takes:  # a step of zeros, which nobody reads
                fed |= {"row": np.zeros(len(COLUMNS), np.float32), "z": 0 * fed["x"]}
            ((out,),) = run_graph(path, [fed], ["out"])
            given = out[:, : wanted.shape[1]]  # without a learned variance's half
            worst = max(worst, relative_error(given, wanted))
    return worst
