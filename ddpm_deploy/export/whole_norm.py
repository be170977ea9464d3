"""Group normalisation of a single group, as one normalisation over the whole sample.

    Reshape to (N, 1, -1) -> InstanceNormalization -> Reshape back [-> Mul(scale) [-> Add(bias)]]

is what the exporter makes of `GroupNorm(1, C)`. The reshapes put a sample in a row, for which a
runtime that keeps channels innermost has to move every number twice. `LayerNormalization` over all
axes but the batch is the same function without them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.defs import ONNX_DOMAIN

from ddpm_deploy.arrays import Array
from ddpm_deploy.export.graph import (
    constants,
    consumers,
    drop_unread,
    is_op,
    producers,
    tensor_types,
)

_Follow = Callable[[str], onnx.NodeProto | None]


def merge_single_groups(model: onnx.ModelProto) -> onnx.ModelProto:
    """Writes every group normalisation of a single group as one operator.

    Left alone are those of several groups, those with an intermediate that somebody else reads, and
    those of samples without an axis besides the channels.

    Args:
        model: Not changed. Before opset 17, the first with `LayerNormalization`, it stays.

    Returns:
        The same function; the given graph itself where there is no such normalisation.

    References:
        Wu & He 2018, https://arxiv.org/abs/1803.08494, Eq. 1 and 2 with G = 1.
    """
    if max(o.version for o in model.opset_import if o.domain in {"", ONNX_DOMAIN}) < 17:
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    makers, fixed = producers(graph), constants(graph)
    readers = consumers(graph)
    outputs = {value.name for value in graph.output}
    types = tensor_types(model, batch=2)

    def only_reader(name: str) -> onnx.NodeProto | None:
        found = readers.get(name, [])
        return found[0] if len(found) == 1 and name not in outputs else None

    def numbers(name: str) -> Array | None:
        return numpy_helper.to_array(fixed[name]) if name in fixed else None

    merged: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        if not is_op(node, "InstanceNormalization"):
            continue
        before = makers.get(node.input[0])
        after = only_reader(node.output[0])
        if before is None or not is_op(before, "Reshape") or not is_op(after, "Reshape"):
            continue
        assert after is not None
        x, row = before.input[0], numbers(before.input[1])
        shape = types[x].shape if x in types else None
        if row is None or list(row) != [0, 1, -1] or shape is None or len(shape) < 3:
            continue
        if types[x].elem_type != onnx.TensorProto.FLOAT:
            continue
        back = types[after.output[0]].shape if after.output[0] in types else None
        if back != shape and not (back is None and _is_shape_of(makers.get(after.input[1]), x)):
            continue
        own = numbers(node.input[1]), numbers(node.input[2])
        if own[0] is None or own[1] is None:
            continue
        scale, bias, last = _affine(after, only_reader, numbers, shape=shape)
        column = (shape[1], *[1] * (len(shape) - 2))
        whole_scale = np.broadcast_to(own[0] * scale, column).astype(np.float32)
        whole_bias = np.broadcast_to(own[1] * scale + bias, column).astype(np.float32)
        name = last.output[0]
        for what, array in (("scale", whole_scale), ("bias", whole_bias)):
            graph.initializer.append(numpy_helper.from_array(array.copy(), f"{name}.{what}"))
        merged[name] = helper.make_node(
            "LayerNormalization",
            [x, f"{name}.scale", f"{name}.bias"],
            [name],
            name=f"{name}.whole",
            axis=1,
            epsilon=next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5),
        )
    if not merged:
        return model
    nodes = [merged.get(node.output[0], node) for node in graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    drop_unread(graph)
    return copy


def _is_shape_of(node: onnx.NodeProto | None, x: str) -> bool:
    """Says whether a node gives the whole shape of x."""
    return (
        node is not None
        and is_op(node, "Shape")
        and node.input[0] == x
        and not any(a.name in {"start", "end"} and a.i != 0 for a in node.attribute)
    )


def _affine(
    after: onnx.NodeProto,
    only_reader: _Follow,
    numbers: Callable[[str], Array | None],
    *,
    shape: tuple[int, ...],
) -> tuple[Array, Array, onnx.NodeProto]:
    """Returns what a normalised sample is multiplied with, what is added, and the last node."""
    scale, bias = np.ones(1, np.float32), np.zeros(1, np.float32)
    last = after
    for op in ("Mul", "Add"):
        node = only_reader(last.output[0])
        if node is None or not is_op(node, op):
            break
        other = [numbers(name) for name in node.input if name != last.output[0]]
        # One number a channel: anything else is no scale of a group normalisation.
        if len(other) != 1 or other[0] is None or not _of_channels(other[0], shape):
            break
        if op == "Mul":
            scale = other[0]
        else:
            bias = other[0]
        last = node
    return scale, bias, last


def _of_channels(array: Array, shape: tuple[int, ...]) -> bool:
    """Says whether this is one number, or one a channel, for samples of a shape."""
    column = (shape[1], *[1] * (len(shape) - 2))
    return array.shape == column or (array.size == 1 and array.ndim < len(shape))
