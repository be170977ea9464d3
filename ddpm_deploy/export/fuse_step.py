"""The sampler's step behind the network, in one graph: `x_s` from x, t, a row of numbers and noise.

A small network on a fast device is done before its output is copied and the host has computed the
step. Fused, a step is one call of the runtime.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ddpm_deploy.errors import ExportError
from ddpm_deploy.export.onnx_file import load_graph, metadata, save_graph
from ddpm_deploy.fused import COLUMNS, METADATA_KEY, is_fused, step_to_json
from ddpm_deploy.spec import ModelSpec

_PREFIX = "ddpm_deploy_step_"
"""Begins the name of every tensor that the step adds inside the graph."""


def fuse_step(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns a graph that takes the sampler's step, too.

    It has the inputs and the output `out` of `model`, and besides

    - input `row`, float32, `(9,)`: a `Transition` as `ddpm_deploy.fused.row_of` gives it,
    - input `z`, float32, `(N, *sample_shape)`: standard normal noise,
    - output `x_s`, float32, `(N, *sample_shape)`: what `denoise` gives for x, `row` and `z`.

    Where `out` is not finite, neither is `x_s`, although x_0 is clipped: 0 · ∞ is not a number. A
    graph that is fused already is returned as it is.

    Args:
        model: As `ddpm-deploy export` wrote it, at any precision; left as it is.

    Raises:
        ExportError: It is no graph from x and t to `out` in float32, or one of the names is taken.
        SpecError: It carries no spec that this release reads.
    """
    properties = metadata(model)
    if is_fused(properties.get(METADATA_KEY), source="this graph"):
        return model
    spec = ModelSpec.from_metadata(properties, source="This graph")
    if spec.self_condition is not None:
        raise ExportError(
            "This network sees the x_0 of the step before, which a fused step does not keep.",
            hint="Leave --fuse-step out: every step runs in NumPy.",
        )
    x = _check(model.graph)
    fused = onnx.ModelProto()
    fused.CopyFrom(model)
    fused.metadata_props.add(key=METADATA_KEY, value=step_to_json())
    graph = fused.graph
    shape = [dim.dim_param or dim.dim_value for dim in x.type.tensor_type.shape.dim]
    row = helper.make_tensor_value_info("row", TensorProto.FLOAT, [len(COLUMNS)])
    graph.input.extend([row, helper.make_tensor_value_info("z", TensorProto.FLOAT, shape)])
    graph.output.append(helper.make_tensor_value_info("x_s", TensorProto.FLOAT, shape))
    channels = spec.sample_shape[0]
    learned = spec.output_shape != spec.sample_shape
    _add_constant(graph, "one_each", [1] * len(COLUMNS))
    if learned:
        _add_constant(graph, "halves", [channels, channels])
    graph.node.extend(_nodes(learned=learned))
    return fused


def fuse_file(graph: Path, output: Path) -> None:
    """Writes the fused form of an ONNX file.

    Args:
        graph: The file to read, with its external data.
        output: Where to write.

    Raises:
        EngineError: The file is no ONNX.
        ExportError: As in `fuse_step`.
        SpecError: As in `fuse_step`.
    """
    save_graph(fuse_step(load_graph(graph)), output)


def _check(graph: onnx.GraphProto) -> onnx.ValueInfoProto:
    """Returns the input x of a graph that the step can follow."""
    inputs = {value.name: value for value in graph.input}
    outputs = {value.name: value.type.tensor_type.elem_type for value in graph.output}
    if outputs != {"out": TensorProto.FLOAT} or "x" not in inputs:
        given = ", ".join(f"{n} ({TensorProto.DataType.Name(e)})" for n, e in outputs.items())
        raise ExportError(
            f"This graph goes from {', '.join(inputs)} to {given}; the step follows a graph from x "
            "and t to out (FLOAT).",
            hint="Give the file that ddpm-deploy export wrote.",
        )
    made = {name for node in graph.node for name in node.output}
    names = made | inputs.keys() | {tensor.name for tensor in graph.initializer}
    taken = sorted(n for n in names if n in {"row", "z", "x_s"} or n.startswith(_PREFIX))
    if taken:
        raise ExportError(
            f"This graph has a tensor called {taken[0]}, a name that the fused step needs.",
            hint="Sample with the graph as it is: without --fuse-step, every step runs in NumPy.",
        )
    x: onnx.ValueInfoProto = inputs["x"]
    return x


def _nodes(*, learned: bool) -> Iterator[onnx.NodeProto]:
    """Yields the lines of `denoise` as nodes: the same operations in the same order."""
    yield _node("Split", ["row", "one_each"], COLUMNS, axis=0)
    out = "out"
    if learned:
        out = "prediction"
        yield _node("Split", ["out", "halves"], ["prediction", "v"], axis=1)
    # x_0, clipped. Max and Min, since TensorRT's Clip wants constant bounds.
    yield _node("Mul", ["x0_from_x", "x"], ["x0_of_x"])
    yield _node("Mul", ["x0_from_out", out], ["x0_of_out"])
    yield _node("Add", ["x0_of_x", "x0_of_out"], ["x0_free"])
    yield _node("Neg", ["clip"], ["least"])
    yield _node("Max", ["x0_free", "least"], ["x0_above"])
    yield _node("Min", ["x0_above", "clip"], ["x0"])
    # The mean of x_s.
    yield _node("Mul", ["x_from_x0", "x0"], ["x_of_x0"])
    yield _node("Mul", ["x_from_x", "x"], ["x_of_x"])
    yield _node("Add", ["x_of_x0", "x_of_x"], ["x_of_both"])
    yield _node("Mul", ["x_from_out", out], ["x_of_out"])
    yield _node("Add", ["x_of_both", "x_of_out"], ["mean"])
    # The noise.
    sigma = "x_from_noise"
    if learned:
        sigma = "sigma"
        yield _node("Mul", ["log_std_b", "v"], ["log_std_of_v"])
        yield _node("Add", ["log_std_a", "log_std_of_v"], ["log_std"])
        yield _node("Exp", ["log_std"], ["std"])
        yield _node("Mul", ["x_from_noise", "std"], ["sigma"])
    yield _node("Mul", [sigma, "z"], ["x_of_z"])
    yield _node("Add", ["mean", "x_of_z"], ["x_s"])


def _node(
    op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any
) -> onnx.NodeProto:
    return helper.make_node(op, [*map(_name, inputs)], [*map(_name, outputs)], **attributes)


def _name(name: str) -> str:
    return name if name in {"x", "out", "row", "z", "x_s"} else _PREFIX + name


def _add_constant(graph: onnx.GraphProto, name: str, value: list[int]) -> None:
    array = np.array(value, dtype=np.int64)
    graph.initializer.append(numpy_helper.from_array(array, _name(name)))
