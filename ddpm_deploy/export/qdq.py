"""Explicit int8: `QuantizeLinear` and `DequantizeLinear` around a product's input and weights.

Scales are symmetric, zero points 0: for an input one scale, for weights one each output channel.
TensorRT 10 and 11, TensorRT-RTX, ONNX Runtime and OpenVINO all read that form. What a product gives
stays float32, and so does its bias; the runtime fuses the two into one int8 kernel.

The pairs are written by `onnxruntime.quantization`. Which products, and over which range, is said
here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ddpm_deploy.arrays import Array
from ddpm_deploy.engines.base import needs
from ddpm_deploy.export.graph import is_op, producers
from ddpm_deploy.export.onnx_file import metadata
from ddpm_deploy.export.precision import PRODUCTS, float_by_rule

QUANTISED = ("Conv", "Gemm", "MatMul")
"""Operators that every runtime has an int8 kernel for, between a Q/DQ pair and constant weights."""

NO_WEIGHTS = "both operands are computed, as in attention"


def quantisable(model: onnx.ModelProto) -> dict[str, str]:
    """Returns the products that may be int8: the name of the first output to that of the input.

    They have constant weights in a matrix or a kernel, and no rule keeps them in float32.

    Args:
        model: In float32.

    Raises:
        ExportError: The graph branches.
    """
    kept = float_by_rule(model)
    weights = {
        t.name
        for t in model.graph.initializer
        if t.data_type == TensorProto.FLOAT and len(t.dims) >= 2
    }
    return {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if is_op(node, *QUANTISED)
        and node.output[0] not in kept
        and node.input[1] in weights
        and node.input[0] not in weights
    }


def add_pairs(model: onnx.ModelProto, ranges: Mapping[str, float]) -> onnx.ModelProto:
    """Puts Q/DQ pairs around products.

    Args:
        model: In float32; left as it is.
        ranges: A product of `quantisable`, by its first output, to the magnitude of its input that
            127 stands for. Products that read the same input share one pair, the largest range.

    Returns:
        The graph, with the weights of those products in int8.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed.
    """
    with needs("onnxruntime", extra="cpu"):
        from onnxruntime.quantization import CalibrationMethod, QuantType  # noqa: PLC0415
        from onnxruntime.quantization.calibrate import TensorsData  # noqa: PLC0415
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer  # noqa: PLC0415
    if not ranges:
        return _copy(model)
    copy = onnx.shape_inference.infer_shapes(model)
    reads: dict[str, float] = {}
    names = []
    for i, node in enumerate(copy.graph.node):
        node.name = f"{node.name or node.op_type}.{i}"  # the quantiser goes by unique names
        if node.output[0] in ranges:
            names.append(node.name)
            reads[node.input[0]] = max(reads.get(node.input[0], 0.0), ranges[node.output[0]])
    limits = {name: (np.float32(-most), np.float32(most)) for name, most in reads.items()}
    quantiser = QDQQuantizer(
        copy,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, limits),
        nodes_to_quantize=names,
        nodes_to_exclude=[],
        op_types_to_quantize=list(QUANTISED),
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": list(QUANTISED),
        },
    )
    written: onnx.ModelProto = quantiser.quantize_model()
    before = {node.output[0]: node for node in model.graph.node}
    for node in written.graph.node:
        original = before.get(node.output[0])
        if original is None:
            continue
        node.name = original.name
        if node.output[0] not in ranges:
            # The quantiser lets all that read a tensor read its pair: a residual would be rounded.
            del node.input[:]
            node.input.extend(original.input)
    _put_pairs_in_place(written.graph)
    del written.graph.value_info[:]
    written.producer_name, written.producer_version = model.producer_name, model.producer_version
    helper.set_model_props(written, metadata(model))
    return written


def without_pairs(
    pairs: onnx.ModelProto, model: onnx.ModelProto, products: Collection[str]
) -> onnx.ModelProto:
    """Gives products their float32 inputs and weights back.

    Args:
        pairs: From `add_pairs`; left as it is.
        model: What it was made of.
        products: By their first output.
    """
    before = {node.output[0]: node for node in model.graph.node}
    copy = _copy(pairs)
    graph = copy.graph
    for node in graph.node:
        if node.output[0] in products:
            del node.input[:]
            node.input.extend(before[node.output[0]].input)
    _drop_unread(graph)
    have = {tensor.name for tensor in graph.initializer}
    wanted = {name for node in graph.node for name in node.input} - have
    graph.initializer.extend(t for t in model.graph.initializer if t.name in wanted)
    return copy


def shift_output(model: onnx.ModelProto, shift: Array) -> onnx.ModelProto:
    """Subtracts a constant from every channel of the output.

    Rounding moves the mean of a channel a little, always to the same side, and a loop adds
    that up over its steps: it is most of what the pictures lose (Nagel et al. 2019,
    https://arxiv.org/abs/1906.04721, section 4.2, correct it layer by layer).

    Args:
        model: With an output `out` (N, C, ...); left as it is.
        shift: float32, (C,).
    """
    copy = _copy(model)
    graph = copy.graph
    (made,) = (node for node in graph.node if "out" in node.output)
    (value,) = (value for value in graph.output if value.name == "out")
    taken = {name for node in graph.node for name in (*node.input, *node.output)}
    exact, mean = _free("out_unshifted", taken), _free("out_shift", taken)
    made.output[list(made.output).index("out")] = exact
    dims = len(value.type.tensor_type.shape.dim) - 2
    graph.initializer.append(
        numpy_helper.from_array(np.asarray(-shift, np.float32).reshape(1, -1, *[1] * dims), mean)
    )
    graph.node.append(helper.make_node("Add", [exact, mean], ["out"], name=f"{exact}.shift"))
    return copy


def int8_products(model: onnx.ModelProto) -> list[str]:
    """Returns the products between Q/DQ pairs, by their first output."""
    made_by = producers(model.graph)
    return [
        node.output[0]
        for node in model.graph.node
        if is_op(node, *PRODUCTS)
        and all(is_op(made_by.get(name), "DequantizeLinear") for name in node.input[:2])
    ]


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def _put_pairs_in_place(graph: onnx.GraphProto) -> None:
    """Puts Q/DQ nodes, which the quantiser leaves at the end, before what reads them first."""
    made_by = producers(graph)
    nodes: list[onnx.NodeProto] = []
    placed: set[str] = set()

    def place(node: onnx.NodeProto) -> None:
        if node.output[0] in placed:
            return
        placed.add(node.output[0])
        for name in node.input:
            before = made_by.get(name)
            if before is not None and is_op(before, "QuantizeLinear", "DequantizeLinear"):
                place(before)
        nodes.append(node)

    for node in graph.node:
        if not is_op(node, "QuantizeLinear", "DequantizeLinear"):
            place(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Removes nodes whose results nobody reads, and constants that nobody reads then."""
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    initializers = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(initializers)


def _free(wanted: str, taken: set[str]) -> str:
    while wanted in taken:
        wanted += "_"
    taken.add(wanted)
    return wanted
