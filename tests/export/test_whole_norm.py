from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import parser

from ddpm_deploy.arrays import Array
from ddpm_deploy.export.to_onnx import export_network
from ddpm_deploy.export.whole_norm import merge_single_groups
from tests.export.test_attention import count, graph, reference, runtime, unet_feeds
from tests.support import tiny_network, tiny_spec

NORM = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[batch, 4, 3, 5] x) => (float[batch, 4, 3, 5] out)
<int64[3] row = {0, 1, -1}, float[1] own_scale = {2}, float[1] own_bias = {0.5},
 float[4, 1, 1] scale = {1, 2, 3, 4}, float[4, 1, 1] bias = {0, -1, 1, 2}>
{
    flat = Reshape (x, row)
    normal = InstanceNormalization <epsilon = 0.001> (flat, own_scale, own_bias)
    shape = Shape (x)
    back = Reshape (normal, shape)
    scaled = Mul (back, scale)
    out = Add (scaled, bias)
}
"""

COLUMN = np.arange(1, 5, dtype=np.float64).reshape(4, 1, 1)
BIAS = np.array([0, -1, 1, 2], np.float64).reshape(4, 1, 1)


def x(batch: int = 3) -> Array:
    return np.random.default_rng(0).standard_normal((batch, 4, 3, 5)).astype(np.float32) * 3 + 1


def normal(x: Array) -> Array:
    """Normalises each sample by its definition, in float64."""
    wide = x.astype(np.float64)
    mean = wide.mean((1, 2, 3), keepdims=True)
    variance = wide.var((1, 2, 3), keepdims=True)
    return np.asarray((wide - mean) / np.sqrt(variance + 1e-3))


def test_a_normalisation_of_one_group_becomes_one_operator() -> None:
    merged = merge_single_groups(graph(NORM))
    assert [node.op_type for node in merged.graph.node] == ["LayerNormalization"]
    wanted = (2 * normal(x()) + 0.5) * COLUMN + BIAS
    np.testing.assert_allclose(reference(merged, {"x": x()}), wanted, atol=1e-5)


def test_what_follows_is_taken_in_only_as_far_as_it_belongs_to_the_normalisation() -> None:
    text = NORM.replace("scaled = Mul (back, scale)", "scaled = Mul (back, x)")
    merged = merge_single_groups(graph(text))
    assert [n.op_type for n in merged.graph.node] == ["LayerNormalization", "Mul", "Add"]
    wanted = (2 * normal(x()) + 0.5) * x() + BIAS
    np.testing.assert_allclose(reference(merged, {"x": x()}), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            "{0, 1, -1}, float[1] own_scale = {2}, float[1] own_bias = {0.5}",
            "{0, 2, -1}, float[2] own_scale = {2, 2}, float[2] own_bias = {0.5, 0}",
        ),
        ("shape = Shape (x)", "shape = Shape (x)\nseen = Relu (normal)"),
        ("] out)", "] out, float[batch, 1, 60] normal)"),
    ],
    ids=["two groups", "read elsewhere", "an output"],
)
def test_what_is_no_such_normalisation_is_left_alone(old: str, new: str) -> None:
    assert old in NORM
    model = parser.parse_model(NORM.replace(old, new))
    assert merge_single_groups(model) is model


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("float[4, 1, 1] scale = {1, 2, 3, 4}", "float[1, 1, 1, 1] scale = {2}"),
        ("float[4, 1, 1] scale = {1, 2, 3, 4}", "float scale = {2}"),
        ("batch, 4, 3, 5] x", "batch, 1, 3, 5] x"),
    ],
    ids=["four axes", "a number", "one channel"],
)
def test_a_scale_of_any_shape_is_the_same_function(old: str, new: str) -> None:
    assert old in NORM
    model = parser.parse_model(NORM.replace(old, new))
    given = {"x": x()[:, :1] if "1, 3, 5] x" in new else x()}
    merged = merge_single_groups(model)
    np.testing.assert_allclose(reference(merged, given), reference(model, given), atol=1e-5)


def test_an_older_opset_is_left_alone() -> None:
    model = parser.parse_model(NORM.replace('"" : 20', '"" : 16'))
    assert merge_single_groups(model) is model


def test_the_exported_network_is_the_same_function(tmp_path: Path) -> None:
    spec = tiny_spec()
    export_network(tiny_network(), spec, tmp_path / "unet.onnx")
    model = onnx.load_model(tmp_path / "unet.onnx")
    merged = merge_single_groups(model)
    assert count(model, "InstanceNormalization") == 32
    assert count(merged, "InstanceNormalization") == 0
    for batch in (1, 3):
        feeds = unet_feeds(spec, batch)
        np.testing.assert_allclose(reference(merged, feeds), runtime(model, feeds), atol=1e-5)
