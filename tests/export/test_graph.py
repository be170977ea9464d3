from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, parser
from onnx.reference import ReferenceEvaluator

from ddpm_deploy.errors import ExportError
from ddpm_deploy.export.graph import (
    TensorType,
    constants,
    consumers,
    element_bits,
    is_op,
    producers,
    tensor_types,
)

GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[batch, 4, 8] x, float[8, 2] w) => (float[batch, 4, 2] out)
<int64[3] back = {-1, 4, 2}>
{
    flat_shape = Constant <value = int64[2] {-1, 8}> ()
    flat = Reshape (x, flat_shape)
    product = MatMul (flat, w)
    again = Reshape (product, back)
    out = Add (again, again)
}
"""


def test_a_tensor_knows_who_makes_and_who_reads_it() -> None:
    graph = parser.parse_model(GRAPH).graph
    assert producers(graph)["product"].op_type == "MatMul"
    assert "x" not in producers(graph)
    assert [node.op_type for node in consumers(graph)["flat"]] == ["MatMul"]
    assert [node.op_type for node in consumers(graph)["again"]] == ["Add", "Add"]
    assert set(constants(graph)) == {"back", "flat_shape"}


def test_a_subgraph_reads_through_the_node_that_holds_it() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 20]>
    g (bool yes, float[2] x, float[2] y) => (float[2] out)
    {
        out = If (yes) <
            then_branch = a () => (float[2] p) { p = Neg (x) },
            else_branch = b () => (float[2] q) { q = Neg (y) }
        >
    }
    """
    readers = consumers(parser.parse_model(text).graph)
    assert [node.op_type for node in readers["x"] + readers["y"]] == ["If", "If"]


@pytest.mark.parametrize("batch", [1, 3])
def test_shapes_are_those_that_the_reference_computes(batch: int) -> None:
    model = parser.parse_model(GRAPH)
    names = ["flat", "product", "again", "out"]
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    del whole.graph.output[:]
    whole.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names
    )
    x = np.zeros((batch, 4, 8), np.float32)
    wanted: Any = ReferenceEvaluator(whole).run(None, {"x": x, "w": x[0, :2].T})
    types = tensor_types(model, batch=batch)
    assert [types[name].shape for name in names] == [array.shape for array in wanted]
    assert [types[name].bytes for name in names] == [array.nbytes for array in wanted]


def test_a_batch_of_any_size_takes_no_memory_to_speak_of() -> None:
    """ONNX's inference keeps the row of ones number by number, some 200 bytes each."""
    model = parser.parse_model(
        """
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[batch, 4] x) => (float[?, 4] out)
        {
            sizes = Shape <start = 0, end = 1> (x)
            ones = ConstantOfShape (sizes)
            column = Unsqueeze (ones, axis)
            added = Add (x, column)
            out = Concat <axis = 0> (added, added)
        }
        """
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "axis"))
    types = tensor_types(model, batch=10**8)
    assert types["column"].shape == (10**8, 1)
    assert types["out"].shape == (2 * 10**8, 4)
    assert types["axis"].shape == (1,)


def test_a_shape_that_cannot_be_inferred_is_read_from_the_file_or_unknown() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 20, "other" : 1]>
    g (float[batch, 4] x) => (float[batch, 4] out)
    <float[batch, 7] recorded>
    {
        recorded = other.Widen (x)
        unknown = other.Widen (recorded)
        out = other.Narrow (unknown)
    }
    """
    types = tensor_types(parser.parse_model(text), batch=5)
    assert types["recorded"] == TensorType(TensorProto.FLOAT, (5, 7))
    assert "unknown" not in types or types["unknown"].shape is None


def test_a_constant_without_a_value_is_none() -> None:
    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[N] x) => (float[N] y) { y = Neg (x) }'
    )
    model.graph.node.add(op_type="Constant", output=["c"])
    assert constants(model.graph) == {}


def test_an_axis_that_is_not_the_batch_keeps_its_size() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 20]>
    g (float[batch, 4] x, float[6] row) => (float[batch, 4] out)
    { out = Identity (x) }
    """
    types = tensor_types(parser.parse_model(text), batch=5)
    assert types["row"].shape == (6,)
    assert types["out"].shape == (5, 4)


def test_shapes_that_contradict_each_other_are_refused() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 20]>
    g (float[batch, 4] x, float[5, 2] w) => (float[batch, 2] out)
    { out = MatMul (x, w) }
    """
    with pytest.raises(ExportError, match="contradict each other"):
        tensor_types(parser.parse_model(text), batch=5)


@pytest.mark.parametrize(
    ("elem_type", "bits"),
    [
        (TensorProto.FLOAT, 32),
        (TensorProto.BFLOAT16, 16),
        (TensorProto.BOOL, 8),
        (TensorProto.INT64, 64),
        (TensorProto.INT4, 4),
    ],
)
def test_elements_have_the_size_of_the_standard(elem_type: int, bits: int) -> None:
    assert element_bits(elem_type) == bits


def test_packed_elements_fill_whole_bytes() -> None:
    assert TensorType(TensorProto.INT4, (3,)).bytes == 2


def test_an_operator_of_another_domain_is_not_the_standard_s() -> None:
    assert is_op(onnx.helper.make_node("MatMul", ["a", "b"], ["c"]), "Gemm", "MatMul")
    assert not is_op(onnx.helper.make_node("MatMul", ["a", "b"], ["c"], domain="other"), "MatMul")
    assert not is_op(None, "MatMul")
