"""What an ONNX file is: its size, its operators, its attention, and the memory it needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper
from onnx.defs import ONNX_DOMAIN

from ddpm_deploy.export.graph import TensorType, constants, is_op, producers, tensor_types
from ddpm_deploy.export.onnx_file import external_files, metadata
from ddpm_deploy.export.precision import PRODUCTS
from ddpm_deploy.precision import LayerPrecision

LAYERS = PRODUCTS | {
    "BatchNormalization",
    "ConvInteger",
    "GroupNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "LpNormalization",
    "MatMulInteger",
    "MeanVarianceNormalization",
    "QLinearConv",
    "QLinearMatMul",
    "RMSNormalization",
    "Softmax",
}
"""Operators whose precision a reader of a graph asks for: products, normalisations, softmax."""

_PRECISIONS: Mapping[int, str] = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.INT8: "int8",
    TensorProto.UINT8: "int8",
}


@dataclass(frozen=True, kw_only=True)
class GraphDescription:
    """What a graph says of itself.

    Attributes:
        opset: Of the ONNX standard's operators; 0 where it uses none.
        ir_version: Version of the file format.
        producer: The program that wrote it; empty where it does not say.
        operators: How many nodes of each operator.
        weights: Numbers in its constants.
        weight_bytes: Their size.
        external: Names of the files that hold weights besides this one.
        inputs: Name to type and shape: `float32 (batch, 3, 32, 32)`.
        outputs: The same.
        metadata: Its `metadata_props`.
    """

    opset: int
    ir_version: int
    producer: str
    operators: Mapping[str, int]
    weights: int
    weight_bytes: int
    external: tuple[str, ...]
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    metadata: Mapping[str, str]


def describe_graph(model: onnx.ModelProto) -> GraphDescription:
    """Counts what a graph holds.

    Args:
        model: Left as it is. Its weights are not read.
    """
    tensors = constants(model.graph)
    fixed = {tensor.name for tensor in model.graph.initializer}
    types = [TensorType(tensor.data_type, tuple(tensor.dims)) for tensor in tensors.values()]
    opsets = {entry.domain or ONNX_DOMAIN: entry.version for entry in model.opset_import}
    return GraphDescription(
        opset=opsets.get(ONNX_DOMAIN, 0),
        ir_version=model.ir_version,
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        operators=dict(Counter(node.op_type for node in model.graph.node).most_common()),
        weights=sum(int(np.prod(tensor.dims, dtype=np.int64)) for tensor in tensors.values()),
        weight_bytes=sum(kind.bytes or 0 for kind in types),
        external=external_files(model),
        inputs={v.name: _type(v) for v in model.graph.input if v.name not in fixed},
        outputs={v.name: _type(v) for v in model.graph.output},
        metadata=metadata(model),
    )


def layers(model: onnx.ModelProto) -> list[LayerPrecision]:
    """Returns what each convolution, product, normalisation and softmax computes in, in order.

    A product whose operands both come out of `DequantizeLinear` computes in int8, as runtimes fuse
    the two.

    Args:
        model: Left as it is. Its weights are not read.

    Raises:
        ExportError: The shapes contradict each other.
    """
    types, made_by = tensor_types(model, batch=1), producers(model.graph)
    found = []
    for node in model.graph.node:
        if not is_op(node, *LAYERS):
            continue
        operands = [made_by.get(name) for name in node.input[:2]]
        if node.op_type in PRODUCTS and all(is_op(o, "DequantizeLinear") for o in operands):
            precision = "int8"
        else:
            kind = types[node.input[0]].elem_type if node.input[0] in types else 0
            precision = _PRECISIONS.get(kind) or TensorProto.DataType.Name(kind).lower()
        found.append(
            LayerPrecision(
                name=node.name or node.output[0], op_type=node.op_type, precision=precision
            )
        )
    return found


def _type(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    known = tensor.elem_type in helper.get_all_tensor_dtypes()
    name = helper.tensor_dtype_to_np_dtype(tensor.elem_type).name if known else "unknown"
    name = "string" if name == "object" else name
    sizes = [
        dim.dim_param or (str(dim.dim_value) if dim.HasField("dim_value") else "?")
        for dim in tensor.shape.dim
    ]
    return f"{name} ({', '.join(sizes)})"
