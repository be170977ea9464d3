"""What the graph passes ask of an ONNX graph: who makes a tensor, who reads it, how large it is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import helper
from onnx.defs import ONNX_DOMAIN

from ddpm_deploy.errors import ExportError

_BITS = {
    name: bits
    for bits, names in {
        4: "INT4 UINT4 FLOAT4E2M1",
        8: "BOOL INT8 UINT8 FLOAT8E4M3FN FLOAT8E4M3FNUZ FLOAT8E5M2 FLOAT8E5M2FNUZ FLOAT8E8M0",
        16: "INT16 UINT16 FLOAT16 BFLOAT16",
        32: "INT32 UINT32 FLOAT",
        64: "INT64 UINT64 DOUBLE COMPLEX64",
        128: "COMPLEX128",
    }.items()
    for name in names.split()
}

_BITS_OF = {
    number: _BITS[name] for name, number in onnx.TensorProto.DataType.items() if name in _BITS
}

_LARGE = 4096
"""The largest batch that shapes are inferred at.

To ONNX's inference a row of one number a sample, which may be a shape, takes 200 bytes a sample.
"""

_SMALL = 1024
"""Elements up to which shape inference looks into a constant: shapes, axes, sizes."""


@dataclass(frozen=True)
class TensorType:
    """What a tensor holds.

    Attributes:
        elem_type: A value of `onnx.TensorProto.DataType`.
        shape: Its sizes; None where one of them is not known.
    """

    elem_type: int
    shape: tuple[int, ...] | None

    @property
    def bytes(self) -> int | None:
        """Bytes that it takes; None where its shape is not known, or its elements have no size."""
        if self.shape is None or self.elem_type not in _BITS_OF:
            return None
        return (int(np.prod(self.shape, dtype=np.int64)) * element_bits(self.elem_type) + 7) // 8


def element_bits(elem_type: int) -> int:
    """Returns the bits of one element: 4 for the types that are packed two to a byte."""
    return _BITS_OF[elem_type]


def is_op(node: onnx.NodeProto | None, *op_types: str) -> bool:
    """Says whether this is a node, and one of these operators of the ONNX standard."""
    return node is not None and node.op_type in op_types and node.domain in {"", ONNX_DOMAIN}


def producers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """Returns the node that makes each tensor; inputs and initializers have none."""
    return {name: node for node in graph.node for name in node.output if name}


def consumers(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """Returns the nodes that read each tensor, in order.

    A node that reads a tensor twice is there twice; what a subgraph reads, the node that holds it
    reads. What no node reads is missing, the graph's outputs too.
    """
    readers = defaultdict[str, list[onnx.NodeProto]](list)
    for node in graph.node:
        for name in reads(node):
            readers[name].append(node)
    return dict(readers)


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """Yields the tensors that a node reads, those that its subgraphs read among them."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for subgraph in (attribute.g, *attribute.graphs):
            for inner in subgraph.node:
                yield from reads(inner)


def drop_unread(graph: onnx.GraphProto) -> None:
    """Takes away the nodes and the weights that nothing reads, and what was said of them."""
    wanted = {value.name for value in graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted.update(reads(node))
    weights = [tensor for tensor in graph.initializer if tensor.name in wanted]
    types = [value for value in graph.value_info if value.name in wanted]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(weights)
    graph.value_info.extend(types)


def constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Returns the constant tensors by name: initializers, and the values of `Constant` nodes."""
    found = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if is_op(node, "Constant"):
            found.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
    return found


def tensor_types(model: onnx.ModelProto, *, batch: int) -> dict[str, TensorType]:
    """Returns the element type and the shape of every tensor that has been given one.

    The free first axes of the inputs become the batch, and ONNX infers the rest anew; what it
    cannot infer is taken from what the file records. A tensor of neither has the shape None, or is
    missing.

    Args:
        model: Left as it is. Its weights are not read.
        batch: Samples, at least 1. An input whose first axis is a number keeps it.

    Raises:
        ExportError: The shapes contradict each other.
    """
    if batch <= _LARGE:
        return _inferred(model, batch)
    near, far = _inferred(model, _LARGE - 1), _inferred(model, _LARGE)
    return {
        name: replace(kind, shape=_extended(near[name].shape, kind.shape, batch - _LARGE))
        for name, kind in far.items()
    }


def _extended(
    near: tuple[int, ...] | None, far: tuple[int, ...] | None, further: int
) -> tuple[int, ...] | None:
    """Goes on from two batches that follow one another: every size is a line over the batch."""
    if near is None or far is None:
        return None
    return tuple(b + (b - a) * further for a, b in zip(near, far, strict=True))


def _inferred(model: onnx.ModelProto, batch: int) -> dict[str, TensorType]:
    skeleton = _without_weights(model)
    _bind_batch(skeleton.graph, batch)
    recorded = {value.name: _type_of(value) for value in skeleton.graph.value_info}
    del skeleton.graph.value_info[:]
    try:
        graph = onnx.shape_inference.infer_shapes(skeleton, strict_mode=True, data_prop=True).graph
    except onnx.shape_inference.InferenceError as error:
        raise ExportError(
            f"The shapes in this graph contradict each other: {' '.join(str(error).split())[:500]}",
            hint="Write it anew with ddpm-deploy export.",
        ) from error
    types = recorded
    for value in (*graph.input, *graph.output, *graph.value_info):
        inferred = _type_of(value)
        if inferred.shape is not None or value.name not in recorded:
            types[value.name] = inferred
    for name, tensor in constants(model.graph).items():
        types[name] = TensorType(tensor.data_type, tuple(tensor.dims))
    return types


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copies a model; its weights become inputs, so that 2 GiB of them are no hindrance."""
    copy = onnx.ModelProto(ir_version=model.ir_version)
    copy.opset_import.extend(model.opset_import)
    copy.functions.extend(model.functions)
    graph = copy.graph
    graph.name = model.graph.name
    for field in ("node", "input", "output", "value_info"):
        getattr(graph, field).extend(getattr(model.graph, field))
    inputs = {value.name for value in graph.input}
    for tensor in model.graph.initializer:
        if np.prod(tensor.dims, dtype=np.int64) <= _SMALL:
            graph.initializer.append(tensor)
        elif tensor.name not in inputs:
            value = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            graph.input.append(value)
    return copy


def _bind_batch(graph: onnx.GraphProto, batch: int) -> None:
    first = [value.type.tensor_type.shape.dim[:1] for value in graph.input]
    symbols = {dim.dim_param for dims in first for dim in dims if dim.dim_param}
    for dims in first:
        for dim in dims:
            if not dim.HasField("dim_value"):
                dim.dim_value = batch
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in symbols:
                dim.dim_value = batch


def _type_of(value: onnx.ValueInfoProto) -> TensorType:
    tensor = value.type.tensor_type
    dims = tensor.shape.dim
    known = tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in dims)
    return TensorType(tensor.elem_type, tuple(dim.dim_value for dim in dims) if known else None)
