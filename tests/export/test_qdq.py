"""What is written is explicit, symmetric int8, which every runtime takes, and nothing besides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from ddpm_deploy.engines.ort import run_graph
from ddpm_deploy.export.describe import layers
from ddpm_deploy.export.graph import constants, producers
from ddpm_deploy.export.qdq import (
    add_pairs,
    int8_products,
    quantisable,
    shift_output,
    without_pairs,
)
from ddpm_deploy.spec import METADATA_KEY
from tests.support import tiny_spec

BODY = """
    first = Conv <pads = [1, 1, 1, 1]> (x, w_first)
    a = Tanh(first)
    b = Conv <pads = [1, 1, 1, 1]> (a, w_b, bias)
    c = Conv <pads = [1, 1, 1, 1]> (a, w_c)
    d = Add(b, c)
    rows = Transpose <perm = [0, 2, 3, 1]> (d)
    e = MatMul(rows, w_e)
    turned = Transpose <perm = [0, 1, 3, 2]> (rows)
    scores = MatMul(turned, e)
    mixed = MatMul(rows, scores)
    back = Transpose <perm = [0, 3, 1, 2]> (mixed)
    f = Conv <pads = [1, 1, 1, 1]> (back, w_f)
    out = Conv(f, w_out)
"""


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    """Convolutions that share an input, a product of a matrix, and one of two computed operands."""
    model = parser.parse_model(
        f"""
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[batch, 1, 8, 8] x, int64[batch] t) => (float[batch, 1, 8, 8] out) {{ {BODY} }}
        """
    )
    rng = np.random.default_rng(0)
    shapes = {
        "w_first": (4, 1, 3, 3),
        "w_b": (4, 4, 3, 3),
        "w_c": (4, 4, 3, 3),
        "w_e": (4, 6),
        "w_f": (4, 6, 3, 3),
        "w_out": (1, 4, 1, 1),
        "bias": (4,),
    }
    for name, shape in shapes.items():
        values = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        values *= np.geomspace(1, 30, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
        model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
    onnx.helper.set_model_props(model, {METADATA_KEY: tiny_spec().to_json(), "other": "kept"})
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.fixture(scope="module")
def ranges(model: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """The largest magnitude of what each layer reads."""
    layers = quantisable(model)
    seen = onnx.ModelProto()
    seen.CopyFrom(model)
    seen.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in sorted(set(layers.values()))
    )
    names = list(layers.values())
    tensors = run(seen, tmp_path_factory.mktemp("ranges"), names)
    return {
        layer: float(np.abs(tensor).max()) for layer, tensor in zip(layers, tensors, strict=True)
    }


def run(
    model: onnx.ModelProto, folder: Path, outputs: Sequence[str] = ("out",)
) -> list[np.ndarray[Any, Any]]:
    path = folder / "g.onnx"
    onnx.save_model(model, path)
    x = np.random.default_rng(1).standard_normal((2, 1, 8, 8)).astype(np.float32)
    (given,) = run_graph(path, [{"x": x, "t": np.zeros(2, np.int64)}], outputs, as_written=True)
    return given


def test_ends_and_products_of_two_computed_operands_are_left_alone(model: onnx.ModelProto) -> None:
    assert quantisable(model) == {"b": "a", "c": "a", "e": "rows", "f": "back"}


def test_scales_are_symmetric_and_weights_have_one_for_each_output_channel(
    model: onnx.ModelProto, ranges: dict[str, float]
) -> None:
    pairs = add_pairs(model, ranges)
    onnx.checker.check_model(pairs, full_check=True)
    tensors, made_by = constants(pairs.graph), producers(pairs.graph)
    assert int8_products(pairs) == ["b", "c", "e", "f"]
    for node in pairs.graph.node:
        if node.op_type in {"QuantizeLinear", "DequantizeLinear"}:
            zero = numpy_helper.to_array(tensors[node.input[2]])
            assert zero.dtype == np.int8
            assert not zero.any()
    before = constants(model.graph)
    for name, axis, weights in (("b", 0, "w_b"), ("e", 1, "w_e"), ("f", 0, "w_f")):
        read = next(node for node in pairs.graph.node if node.output[0] == name)
        kernel = made_by[read.input[1]]
        scale = numpy_helper.to_array(tensors[kernel.input[1]])
        wanted = numpy_helper.to_array(before[weights])
        over = tuple(i for i in range(wanted.ndim) if i != axis)
        np.testing.assert_allclose(scale, np.abs(wanted).max(axis=over) / 127, rtol=1e-5)
        assert np.abs(numpy_helper.to_array(tensors[kernel.input[0]])).max() == 127
        given = made_by[read.input[0]]
        assert numpy_helper.to_array(tensors[given.input[1]]) == pytest.approx(ranges[name] / 127)


def test_all_else_stays_as_it_was(model: onnx.ModelProto, ranges: dict[str, float]) -> None:
    before = model.SerializeToString()
    pairs = add_pairs(model, ranges)
    assert model.SerializeToString() == before
    added = {"QuantizeLinear", "DequantizeLinear"}
    assert [
        (n.name, n.op_type, list(n.output)) for n in pairs.graph.node if n.op_type not in added
    ] == [(n.name, n.op_type, list(n.output)) for n in model.graph.node]
    assert {e.key: e.value for e in pairs.metadata_props}["other"] == "kept"
    assert (pairs.opset_import[0].version, pairs.ir_version) == (20, 10)
    assert [layer.precision for layer in layers(pairs)].count("int8") == 4
    assert add_pairs(model, {}).SerializeToString() == before


def test_layers_that_read_one_input_share_its_pair(
    model: onnx.ModelProto, ranges: dict[str, float]
) -> None:
    pairs = add_pairs(model, ranges)
    b, c = (next(n for n in pairs.graph.node if n.output[0] == name) for name in "bc")
    assert b.input[0] == c.input[0]
    assert sum(node.op_type == "QuantizeLinear" for node in pairs.graph.node) == 3


def test_what_else_reads_a_layer_s_input_reads_it_unrounded(
    model: onnx.ModelProto, ranges: dict[str, float]
) -> None:
    pairs = add_pairs(model, ranges)
    (turned,) = (node for node in pairs.graph.node if node.output[0] == "turned")
    (mixed,) = (node for node in pairs.graph.node if node.output[0] == "mixed")
    assert (turned.input[0], mixed.input[0]) == ("rows", "rows")  # as layer e reads


def test_int8_is_near_to_float32(
    model: onnx.ModelProto, tmp_path: Path, ranges: dict[str, float]
) -> None:
    (wanted,), (given,) = (run(g, tmp_path) for g in (model, add_pairs(model, ranges)))
    error = np.abs(given - wanted).max() / np.abs(wanted).max()
    assert 1e-4 < error < 0.1


def test_layers_that_go_back_are_those_of_the_float32_graph(
    model: onnx.ModelProto, tmp_path: Path, ranges: dict[str, float]
) -> None:
    pairs = add_pairs(model, ranges)
    assert int8_products(without_pairs(pairs, model, ["b", "f"])) == ["c", "e"]
    none = without_pairs(pairs, model, list(ranges))
    assert not {n.op_type for n in none.graph.node} & {"QuantizeLinear", "DequantizeLinear"}
    assert {t.name for t in none.graph.initializer} == {t.name for t in model.graph.initializer}
    np.testing.assert_array_equal(run(none, tmp_path), run(model, tmp_path))


def test_a_shift_is_taken_off_the_output(model: onnx.ModelProto, tmp_path: Path) -> None:
    shifted = shift_output(model, np.array([0.25], np.float32))
    onnx.checker.check_model(shifted, full_check=True)
    (wanted,), (given,) = (run(g, tmp_path) for g in (model, shifted))
    np.testing.assert_array_equal(given, wanted - np.float32(0.25))
