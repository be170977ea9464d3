"""What a network makes of the timestep alone, as a table with a row for each timestep.

    t -> Cast -> sines -> Gemm -> SiLU -> ... -> (N, C)    becomes    Gather(table of (T, C), t)

A loop calls the network with T timesteps at most, so that every product of the timestep's embedding
can be done once, when the engine is built. It is done in float32, whatever the rest computes in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from ddpm_deploy.arrays import Array
from ddpm_deploy.export.graph import (
    TensorType,
    constants,
    consumers,
    drop_unread,
    is_op,
    reads,
    tensor_types,
)

LARGEST_BYTES = 2**26
"""What all tables of a graph may take together."""

_AGREE = 1e-5
"""How far a row alone may be from the same row among T: sums in another order."""

_ROW_BY_ROW = frozenset(
    {"Add", "Cast", "Concat", "Cos", "Div", "Exp", "Gelu", "Gemm", "Identity", "LayerNormalization"}
    | {"LeakyRelu", "MatMul", "Mish", "Mul", "Neg", "Pow", "Relu", "Reshape", "Sigmoid", "Sin"}
    | {"Slice", "Softplus", "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "Unsqueeze"}
)
"""Operators that can give each sample a row of its own; whether they do is tried."""


@dataclass(frozen=True, kw_only=True)
class Tabulated:
    """A graph whose embedding of the timestep is a table.

    Attributes:
        model: The graph; the given one where there is nothing to tabulate.
        tensors: What is read from tables.
        table_bytes: What they take.
    """

    model: onnx.ModelProto
    tensors: tuple[str, ...] = ()
    table_bytes: int = 0


def tabulate_time(model: onnx.ModelProto, timesteps: int) -> Tabulated:
    """Replaces what depends on the input `t` and on nothing else by tables.

    Left alone is a graph without such tensors, one whose tables would be larger than
    `LARGEST_BYTES`, one in which a sample's row depends on the others, and what is no product: a
    table of it would save nothing.

    Args:
        model: A graph with the input `t`, int64, (N,); not changed.
        timesteps: T; the tables have a row for each of 0 to T-1.
    """
    graph = model.graph
    types = [tensor_types(model, batch=n) for n in (2, 3)]
    timed, fixed = _timed(graph, types)
    outputs = {value.name for value in graph.output}
    readers = consumers(graph)
    wanted = [
        name
        for node in graph.node
        for name in node.output
        if name in timed
        and (name in outputs or any(r.output[0] not in timed for r in readers.get(name, [])))
    ]
    products = [n for n in graph.node if n.output[0] in timed and is_op(n, "Gemm", "MatMul")]
    row_bytes = sum(types[0][name].bytes or 0 for name in wanted) // 2
    floats = all(types[0][name].elem_type == onnx.TensorProto.FLOAT for name in wanted)
    if not wanted or not floats or not products or row_bytes * timesteps > LARGEST_BYTES:
        return Tabulated(model=model)
    tables = _tables(model, timed | fixed, wanted, timesteps)
    if tables is None:
        return Tabulated(model=model)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    nodes = [n for n in copy.graph.node if n.output[0] not in timed]
    del copy.graph.node[:]
    for name, table in tables.items():
        copy.graph.initializer.append(numpy_helper.from_array(table, f"{name}.table"))
        copy.graph.node.append(
            helper.make_node("Gather", [f"{name}.table", "t"], [name], name=f"{name}.row", axis=0)
        )
    copy.graph.node.extend(nodes)
    drop_unread(copy.graph)
    size = sum(table.nbytes for table in tables.values())
    return Tabulated(model=copy, tensors=tuple(tables), table_bytes=size)


def _timed(graph: onnx.GraphProto, types: list[dict[str, TensorType]]) -> tuple[set[str], set[str]]:
    """Returns the tensors with a row a sample that depend on `t` alone, and the constant ones."""
    fixed = set(constants(graph))
    timed: set[str] = set()
    for node in graph.node:
        given = list(reads(node))
        if is_op(node, "Constant") or (given and all(name in fixed for name in given)):
            fixed.update(node.output)
            continue
        alone = all(name in timed or name in fixed or name == "t" for name in given)
        rows = all(_has_rows(name, types) for name in node.output)
        # A second operand of a product would be read whole for every row.
        whole = is_op(node, "Gemm", "MatMul") and node.input[1] not in fixed
        if alone and rows and given and is_op(node, *_ROW_BY_ROW) and not whole:
            timed.update(node.output)
    return timed, fixed


def _has_rows(name: str, types: list[dict[str, TensorType]]) -> bool:
    two, three = (each[name].shape if name in each else None for each in types)
    if two is None or three is None:
        return False
    return two[:1] == (2,) and three[:1] == (3,) and two[1:] == three[1:]


def _tables(
    model: onnx.ModelProto, known: set[str], wanted: list[str], timesteps: int
) -> Mapping[str, Array] | None:
    """Runs what depends on `t` alone for all timesteps, and some of them again by themselves.

    Returns:
        The tables by name; None where a row by itself is another than among the others.
    """
    graph = model.graph
    needed = [n for n in graph.node if n.output[0] in known]
    part = helper.make_graph(
        needed,
        "time",
        [helper.make_tensor_value_info("t", onnx.TensorProto.INT64, ["batch"])],
        [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in wanted],
        [t for t in graph.initializer if any(t.name in n.input for n in needed)],
    )
    small = helper.make_model(part, opset_imports=model.opset_import, ir_version=model.ir_version)
    run = ReferenceEvaluator(small).run
    tables = run(None, {"t": np.arange(timesteps, dtype=np.int64)})
    few = np.unique(np.linspace(0, timesteps - 1, 3).astype(np.int64))
    for table, rows in zip(tables, run(None, {"t": few}), strict=True):
        peak = float(np.abs(table).max(initial=0)) or 1.0
        if table.shape[0] != timesteps or not np.abs(table[few] - rows).max() <= _AGREE * peak:
            return None
    return dict(zip(wanted, (np.asarray(t, np.float32) for t in tables), strict=True))
