"""Faults inside an exported graph, planted by editing its file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ddpm_deploy.arrays import Array

Edit = Callable[[onnx.ModelProto], None]


def nodes(model: onnx.ModelProto, op_type: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == op_type]


def set_attribute(node: onnx.NodeProto, name: str, value: Any) -> None:
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def weight(name: str, change: Callable[[Array], Array]) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        (tensor,) = [t for t in model.graph.initializer if t.name == name]
        array = change(numpy_helper.to_array(tensor).copy()).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))

    return edit


def gelu_by_tanh(model: onnx.ModelProto) -> None:
    for node in nodes(model, "Gelu"):
        set_attribute(node, "approximate", "tanh")


def epsilon(model: onnx.ModelProto) -> None:
    for node in nodes(model, "InstanceNormalization"):
        set_attribute(node, "epsilon", 1e-3)


def nearest(model: onnx.ModelProto) -> None:
    for node in nodes(model, "Resize"):
        set_attribute(node, "mode", "nearest")


def swap_q_and_k(model: onnx.ModelProto) -> None:
    """Exchanges the blocks of each in-projection's weights."""
    for node in nodes(model, "Split"):
        names = list(node.output)
        if len(names) == 3:
            node.output[0], node.output[1] = names[1], names[0]
            return
    _swap_in_weights(model)


def _swap_in_weights(model: onnx.ModelProto) -> None:
    tensors = {t.name: t for t in model.graph.initializer}
    found = [n for n in tensors if n.endswith("in_proj_bias")]
    assert found, "this export writes attention otherwise"
    for name in found:
        array = numpy_helper.to_array(tensors[name]).copy()
        c = len(array) // 3
        array = np.concatenate([array[c : 2 * c], array[:c], array[2 * c :]])
        tensors[name].CopyFrom(numpy_helper.from_array(array, name))
        for node in model.graph.node:
            if name in node.input:
                _swap_columns(model, tensors, node, c)


def _swap_columns(
    model: onnx.ModelProto, tensors: Mapping[str, onnx.TensorProto], add: onnx.NodeProto, c: int
) -> None:
    makers = {out: node for node in model.graph.node for out in node.output}
    for source in add.input:
        product = makers.get(source)
        if product is None or product.op_type != "MatMul":
            continue
        tensor = tensors[product.input[1]]
        w = numpy_helper.to_array(tensor).copy()
        w = np.concatenate([w[:, c : 2 * c], w[:, :c], w[:, 2 * c :]], axis=1)
        tensor.CopyFrom(numpy_helper.from_array(w, tensor.name))


def half_embedding(model: onnx.ModelProto) -> None:
    """Computes the angles of t's embedding in fp16."""
    for node in [*nodes(model, "Sin"), *nodes(model, "Cos")]:
        angle = node.input[0]
        low, back = f"{angle}.half.{node.output[0]}", f"{angle}.back.{node.output[0]}"
        node.input[0] = back
        casts = [
            helper.make_node("Cast", [angle], [low], to=TensorProto.FLOAT16),
            helper.make_node("Cast", [low], [back], to=TensorProto.FLOAT),
        ]
        at = list(model.graph.node).index(node)
        for i, cast in enumerate(casts):
            model.graph.node.insert(at + i, cast)


def half_weights(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor).astype(np.float16).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def nudge(model: onnx.ModelProto) -> None:
    """Moves every weight a little, as the online weights are beside their average."""
    draw = np.random.default_rng(0)
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if tensor.data_type == TensorProto.FLOAT and array.size >= 8:
            noise = 0.01 * array.std() * draw.standard_normal(array.shape)
            moved = (array + noise).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(moved, tensor.name))


def tail(array: Array) -> Array:
    flat = array.reshape(-1)
    flat[flat.size // 2 :] = 0
    return flat.reshape(array.shape)


KERNEL = "down1.maxpool_conv.1.double_conv.0.weight"
LAST = "outc.weight"
BIAS = "outc.bias"
LINEAR = "down1.emb_layer.1.bias"

GRAPHS: Mapping[str, tuple[str, Edit]] = {
    "GELU by tanh": ("gelu", gelu_by_tanh),
    "another epsilon": ("epsilon", epsilon),
    "nearest for bilinear": ("resize", nearest),
    "q and k exchanged": ("q-k-swapped", swap_q_and_k),
    "a kernel transposed": (
        "weight-transposed",
        weight(KERNEL, lambda w: w.transpose(0, 1, 3, 2)),
    ),
    "a weight truncated": ("weight-truncated", weight(KERNEL, tail)),
    "a bias missing": ("bias-missing", weight(BIAS, lambda b: 0 * b)),
    "another bias missing": ("bias-missing", weight(LINEAR, lambda b: 0 * b)),
    "a weight scaled": ("weight-scaled", weight(LAST, lambda w: 1.01 * w)),
    "angles in fp16": ("half-precision-embedding", half_embedding),
    "weights in fp16": ("weights-rounded", half_weights),
    "online for average": ("other-weights", nudge),
}
"""Faults of a graph, with the cause to be named."""
