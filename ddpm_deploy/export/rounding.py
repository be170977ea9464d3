"""What half precision does to a graph, seen on any machine.

ONNX Runtime's CPU provider computes half-precision graphs in float32 and rounds where it likes.
Here a mixed graph becomes a float32 graph that rounds every half-precision result to its type, and
nothing else: products are summed in float32 and rounded once, as tensor cores do. It runs at nearly
the speed of the float32 graph.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ddpm_deploy.export.graph import tensor_types
from ddpm_deploy.export.precision import MOVES

_HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def rounded(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns the float32 graph whose results are rounded as the mixed graph's are.

    Args:
        model: A mixed graph, by `convert` or by another tool. Left as it is.
    """
    types = tensor_types(model, batch=2)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    del graph.node[:], graph.value_info[:]
    for tensor in graph.initializer:
        if tensor.data_type in _HALF:
            tensor.CopyFrom(_widened(tensor))
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in _HALF:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in model.graph.node:
        written = onnx.NodeProto()
        written.CopyFrom(node)
        for attribute in written.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in _HALF:
                attribute.i = TensorProto.FLOAT
            if attribute.HasField("t") and attribute.t.data_type in _HALF:
                attribute.t.CopyFrom(_widened(attribute.t))
        after = []
        for i, name in enumerate(node.output):
            kind = types[name].elem_type if name in types else TensorProto.UNDEFINED
            exact = node.op_type in MOVES - {"Resize"} or node.op_type == "Constant"
            if kind in _HALF and not exact:
                written.output[i] = f"{name}.exact"
                after += [
                    helper.make_node("Cast", [f"{name}.exact"], [f"{name}.rounded"], to=kind),
                    helper.make_node("Cast", [f"{name}.rounded"], [name], to=TensorProto.FLOAT),
                ]
        graph.node.extend([written, *after])
    return copy


def _widened(tensor: onnx.TensorProto) -> onnx.TensorProto:
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)
