from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ddpm_deploy.engines.ort import read_graph
from ddpm_deploy.errors import EngineError
from ddpm_deploy.export.describe import describe_graph, layers
from ddpm_deploy.export.onnx_file import load_graph
from ddpm_deploy.precision import LayerPrecision
from ddpm_deploy.spec import METADATA_KEY
from tests.support import tiny_spec, write_graph


def test_a_graph_is_counted_and_not_run(tmp_path: Path) -> None:
    spec = tiny_spec(classes=4)
    described = describe_graph(load_graph(write_graph(tmp_path / "unet.onnx", spec)))
    assert (described.opset, described.ir_version, described.external) == (20, 10, ())
    assert described.operators == {"Mul": 3, "Add": 3, "Cast": 2, "Reshape": 2, "Tanh": 1}
    assert (described.weights, described.weight_bytes) == (4 + 4, 4 * 8 + 4 * 4)
    assert described.metadata == {METADATA_KEY: spec.to_json()}


def test_onnx_and_onnx_runtime_tell_the_same(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "unet.onnx", tiny_spec(classes=4))
    described = describe_graph(load_graph(path))
    assert read_graph(path) == (described.inputs, described.outputs, described.metadata)
    assert described.inputs["x"] == "float32 (batch, 1, 8, 8)"


def test_weights_in_another_file_are_counted_without_it(tmp_path: Path) -> None:
    weights = numpy_helper.from_array(np.ones((1000,), np.float16), "w")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT16, [1000])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT16, [None])
    node = helper.make_node("Add", ["x", "w"], ["y"])
    model = helper.make_model(helper.make_graph([node], "g", [x], [y], [weights]))
    path = tmp_path / "large.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="large.bin", size_threshold=0)
    (tmp_path / "large.bin").unlink()
    described = describe_graph(load_graph(path, weights=False))
    assert (described.weights, described.weight_bytes) == (1000, 2000)
    assert described.external == ("large.bin",)
    assert described.outputs == {"y": "float16 (?)"}


def test_types_without_a_size_are_named() -> None:
    text = helper.make_tensor_value_info("s", TensorProto.STRING, [3])
    many = helper.make_tensor_sequence_value_info("q", TensorProto.STRING, [3])
    node = helper.make_node("SequenceConstruct", ["s"], ["q"])
    described = describe_graph(helper.make_model(helper.make_graph([node], "g", [text], [many])))
    assert described.inputs == {"s": "string (3)"}
    assert described.outputs == {"q": "unknown ()"}


@pytest.mark.parametrize(
    ("content", "why"), [(b"text", "Error parsing"), (b"", "it holds no graph")]
)
def test_what_is_no_graph_is_refused(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "unet.onnx").write_bytes(content)
    with pytest.raises(EngineError, match=rf"unet\.onnx is no ONNX file: {why}"):
        load_graph(tmp_path / "unet.onnx")


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "unet.onnx", tiny_spec())
    path.write_bytes(path.read_bytes().replace(b"scaled", b"sc\xff\xfeed"))
    with pytest.raises(EngineError, match="is no ONNX file"):
        load_graph(path)


def mixed_graph() -> onnx.ModelProto:
    """A convolution in int8 by Q/DQ, one in fp16, a softmax in fp32, a product in bf16."""
    scale = numpy_helper.from_array(np.array(0.1, np.float32), "scale")
    zero = numpy_helper.from_array(np.array(0, np.int8), "zero")
    kernel = numpy_helper.from_array(np.ones((2, 2, 1, 1), np.int8), "kernel")
    half = numpy_helper.from_array(np.ones((2, 2, 1, 1), np.float16), "half")
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"]),
        helper.make_node("DequantizeLinear", ["kernel", "scale", "zero"], ["w"]),
        helper.make_node("Conv", ["dq", "w"], ["a"], name="first"),
        helper.make_node("Cast", ["a"], ["a16"], to=TensorProto.FLOAT16),
        helper.make_node("Conv", ["a16", "half"], ["b16"], name="second"),
        helper.make_node("Cast", ["b16"], ["b"], to=TensorProto.FLOAT),
        helper.make_node("Softmax", ["b"], ["c"]),
        helper.make_node("Cast", ["c"], ["cb"], to=TensorProto.BFLOAT16),
        helper.make_node("MatMul", ["cb", "cb"], ["d"], name="last"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2, 4, 4])
    d = helper.make_tensor_value_info("d", TensorProto.BFLOAT16, ["batch", 2, 4, 4])
    graph = helper.make_graph(nodes, "mixed", [x], [d], [scale, zero, kernel, half])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_layers_are_told_in_order_with_what_they_compute_in() -> None:
    model = mixed_graph()
    onnx.checker.check_model(model, full_check=True)
    assert layers(model) == [
        LayerPrecision(name="first", op_type="Conv", precision="int8"),
        LayerPrecision(name="second", op_type="Conv", precision="fp16"),
        LayerPrecision(name="c", op_type="Softmax", precision="fp32"),
        LayerPrecision(name="last", op_type="MatMul", precision="bf16"),
    ]
