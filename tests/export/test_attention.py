from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import parser
from onnx.reference import ReferenceEvaluator

from ddpm_deploy import linear
from ddpm_deploy.arrays import Array
from ddpm_deploy.errors import ExportError
from ddpm_deploy.export.attention import Attention, find_attention, split_queries
from ddpm_deploy.export.to_onnx import export_network
from ddpm_deploy.model import UNet
from ddpm_deploy.spec import ModelSpec
from tests.support import tiny_network, tiny_spec

# 2 heads, 6 queries, 5 keys of size 3: the scores of a query take 2 x 5 x 4 = 40 bytes a sample.
PLAIN = """
<ir_version: 10, opset_import: ["" : 20], metadata_props: ["kept": "as it was"]>
g (float[batch, 2, 6, 3] q, float[batch, 2, 5, 3] k, float[batch, 2, 5, 3] v)
    => (float[batch, 2, 6, 3] out)
<float scale = {0.5}, float[batch, 2, 6, 5] scores>
{
    turned = Transpose <perm = [0, 1, 3, 2]> (k)
    scaled = Mul (q, scale)
    scores = MatMul (scaled, turned)
    weights = Softmax <axis = -1> (scores)
    out = MatMul (weights, v)
}
"""

# As a mixed-precision graph has it: a mask with a row a query, and a softmax in float32.
MASKED = """
<ir_version: 10, opset_import: ["" : 20]>
g (float16[batch, 2, 6, 3] q, float16[batch, 2, 5, 3] k, float16[batch, 2, 5, 3] v,
   float[6, 5] mask) => (float16[batch, 2, 6, 3] out)
<float scale = {0.5}>
{
    turned = Transpose <perm = [0, 1, 3, 2]> (k)
    scores = MatMul (q, turned)
    wide = Cast <to = 1> (scores)
    scaled = Mul (scale, wide)
    masked = Add (scaled, mask)
    weights = Softmax (masked)
    narrow = Cast <to = 10> (weights)
    out = MatMul (narrow, v)
}
"""


def graph(text: str, **changes: str) -> onnx.ModelProto:
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    model = parser.parse_model(text)
    onnx.checker.check_model(model, full_check=True)
    return model


def arrays(batch: int, *, dtype: type = np.float32, masked: bool = False) -> dict[str, Array]:
    draw = np.random.default_rng(batch)
    shapes = {"q": (2, 6, 3), "k": (2, 5, 3), "v": (2, 5, 3)}
    feeds: dict[str, Array] = {
        name: draw.standard_normal((batch, *shape)).astype(dtype) for name, shape in shapes.items()
    }
    if masked:
        feeds["mask"] = draw.standard_normal((6, 5)).astype(np.float32)
    return feeds


def reference(model: onnx.ModelProto, feeds: dict[str, Array]) -> Array:
    outputs = ReferenceEvaluator(model).run(None, feeds)
    assert isinstance(outputs, list)
    return np.asarray(outputs[0])


def runtime(model: onnx.ModelProto, feeds: dict[str, Array]) -> Array:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, feeds)[0])


def softmax_attention(feeds: dict[str, Array], scale: float = 0.5) -> Array:
    """Computes attention from its definition, in float64."""
    q, k, v = (feeds[name].astype(np.float64) for name in "qkv")
    scores = q @ k.swapaxes(-1, -2) * scale + feeds.get("mask", np.zeros(1))
    weights = np.exp(scores)
    return np.asarray(weights / weights.sum(-1, keepdims=True) @ v)


def count(model: onnx.ModelProto, op_type: str) -> int:
    return sum(node.op_type == op_type for node in model.graph.node)


def test_an_attention_is_found_by_its_structure() -> None:
    assert find_attention(graph(PLAIN), batch=7) == (
        Attention(
            output="out",
            heads=2,
            queries=6,
            keys=5,
            chunks=1,
            whole_bytes=7 * 2 * 6 * 5 * 4,
            chunk_bytes=7 * 2 * 6 * 5 * 4,
        ),
    )


def test_a_matrix_that_is_cast_counts_in_its_widest_type() -> None:
    (found,) = find_attention(graph(MASKED), batch=3)
    assert found.whole_bytes == 3 * 2 * 6 * 5 * 4


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"axis = -1": "axis = 2"}, "the softmax is over the queries"),
        ({"MatMul (weights, v)": "Mul (weights, weights)", "3] out": "5] out"}, "no values"),
        (
            {"6, 3] out": "3, 5] out", "2, 6, ": "2, 5, ", "(weights, v)": "(turned, weights)"},
            "right",
        ),
        ({"Softmax <axis = -1> (scores)": "Exp (scores)"}, "no softmax"),
        ({"(scores)": "(twice)", "weights =": "twice = Add (scores, scores)\nweights ="}, "joined"),
    ],
)
def test_what_is_not_attention_is_left_alone(changes: dict[str, str], why: str) -> None:
    assert find_attention(graph(PLAIN, **changes), batch=1) == (), why


def test_a_matrix_that_somebody_wants_is_left_whole() -> None:
    model = graph(PLAIN, **{"3] out)\n<": "3] out, float[batch, 2, 6, 5] weights)\n<"})
    assert find_attention(model, batch=1) == ()


def test_queries_as_many_as_the_batch_says_are_left_whole() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 20]>
    g (float[batch, 3] q, float[5, 3] k, float[5, 3] v) => (float[batch, 3] out)
    {
        turned = Transpose <perm = [1, 0]> (k)
        scores = MatMul (q, turned)
        weights = Softmax <axis = -1> (scores)
        out = MatMul (weights, v)
    }
    """
    assert find_attention(graph(text), batch=4) == ()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("limit", [40 * 3, 80 * 3, 160 * 3])
def test_a_split_graph_is_the_same_function_at_any_batch(batch: int, limit: int) -> None:
    split = split_queries(graph(PLAIN), batch=3, limit_bytes=limit).model
    onnx.checker.check_model(split, full_check=True)
    feeds = arrays(batch)
    wanted = softmax_attention(feeds)
    for run in (reference, runtime):
        # Eight numbers are summed: a few units in the last place of float32.
        np.testing.assert_allclose(run(split, feeds), wanted, atol=1e-6)


def test_a_split_float16_graph_rounds_where_the_whole_one_does() -> None:
    model = graph(MASKED)
    split = split_queries(model, batch=3, limit_bytes=3 * 2 * 5 * 4 * 2).model
    assert count(split, "Softmax") == 3
    feeds = arrays(3, dtype=np.float16, masked=True)
    # onnx.reference rounds each operator's result to float16, in both graphs alike.
    assert np.array_equal(reference(split, feeds), reference(model, feeds))
    # Values near 1 in float16: the scores and the output round at 2^-11 each.
    np.testing.assert_allclose(runtime(split, feeds), softmax_attention(feeds), atol=4e-3)


@given(queries=st.integers(1, 40), rows=st.integers(1, 40))
@settings(deadline=None, max_examples=40)
def test_parts_stay_below_the_limit_and_differ_by_one_query(queries: int, rows: int) -> None:
    model = graph(PLAIN.replace("2, 6, ", f"2, {queries}, "))
    limit = rows * 2 * 5 * 4
    split = split_queries(model, batch=1, limit_bytes=limit)
    (found,) = split.attentions
    parts = find_attention(split.model, batch=1)
    assert found.chunks == len(parts)
    assert sum(part.queries for part in parts) == queries
    assert max(part.whole_bytes for part in parts) == found.chunk_bytes <= limit
    sizes = {part.queries for part in parts}
    assert max(sizes) - min(sizes) <= 1
    fewest = -(-queries // rows)
    assert fewest <= len(parts) <= 2 * fewest


def test_parts_are_equal_where_they_can_be() -> None:
    # Four of the six queries fit; two parts of three are equal, and no more parts than 4 + 2.
    split = split_queries(graph(PLAIN), batch=1, limit_bytes=4 * 40)
    assert [part.queries for part in find_attention(split.model, batch=1)] == [3, 3]


def test_what_fits_is_not_split_and_a_second_pass_changes_nothing() -> None:
    model = graph(PLAIN)
    assert split_queries(model, batch=1, limit_bytes=6 * 40).model == model
    once = split_queries(model, batch=1, limit_bytes=2 * 40).model
    assert split_queries(once, batch=1, limit_bytes=2 * 40).model == once


def test_a_split_graph_can_be_split_further() -> None:
    once = split_queries(graph(PLAIN), batch=1, limit_bytes=3 * 40).model
    twice = split_queries(once, batch=1, limit_bytes=40).model
    onnx.checker.check_model(twice, full_check=True)
    assert count(twice, "Softmax") == 6
    feeds = arrays(2)
    np.testing.assert_allclose(reference(twice, feeds), softmax_attention(feeds), atol=1e-6)


def test_the_caller_s_graph_stays_and_its_metadata_are_kept() -> None:
    model = graph(PLAIN)
    before = model.SerializeToString(deterministic=True)
    split = split_queries(model, batch=1, limit_bytes=40).model
    assert model.SerializeToString(deterministic=True) == before
    assert {p.key: p.value for p in split.metadata_props} == {"kept": "as it was"}
    assert [value.name for value in split.graph.value_info] == []


@pytest.mark.parametrize("mask", ["5", "1, 5", "6, 1"])
def test_a_mask_is_cut_where_it_has_a_row_for_each_query(mask: str) -> None:
    model = graph(MASKED.replace("float[6, 5] mask", f"float[{mask}] mask"))
    split = split_queries(model, batch=3, limit_bytes=3 * 2 * 5 * 4 * 2).model
    assert count(split, "Softmax") == 3
    feeds = arrays(3, dtype=np.float16, masked=True)
    feeds["mask"] = feeds["mask"][:, :1] if mask == "6, 1" else feeds["mask"][:1]
    feeds["mask"] = feeds["mask"].reshape([int(size) for size in mask.split(", ")])
    assert np.array_equal(reference(split, feeds), reference(model, feeds))
    np.testing.assert_allclose(runtime(split, feeds), softmax_attention(feeds), atol=4e-3)


def test_keys_that_are_the_queries_too_stay_whole() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 20]>
    g (float[batch, 4, 4] x) => (float[batch, 4, 4] out)
    {
        scores = MatMul (x, x)
        weights = Softmax <axis = -1> (scores)
        out = MatMul (weights, x)
    }
    """
    model = graph(text)
    split = split_queries(model, batch=1, limit_bytes=16).model
    x = np.random.default_rng(0).standard_normal((2, 4, 4)).astype(np.float32)
    assert count(split, "Softmax") == 4
    np.testing.assert_allclose(
        reference(split, {"x": x}), reference(model, {"x": x}), rtol=1e-6, atol=1e-6
    )


def test_a_limit_below_one_query_is_refused_with_its_values() -> None:
    with pytest.raises(ExportError, match=r"out take 120 bytes at batch 3: 2 heads, 5 keys.*119"):
        split_queries(graph(PLAIN), batch=3, limit_bytes=119)


def exported(tmp_path: Path, network: UNet, spec: ModelSpec) -> onnx.ModelProto:
    return onnx.load(export_network(network, spec, tmp_path / "unet.onnx").path)


def unet_feeds(spec: ModelSpec, batch: int) -> dict[str, Array]:
    x = np.random.default_rng(batch).standard_normal((batch, *spec.sample_shape))
    return {"x": x.astype(np.float32), "t": np.arange(batch) % spec.schedule.T}


def build_rtx(model: onnx.ModelProto) -> None:
    """Builds a TensorRT-RTX plan, which needs no GPU, for batches of 1 to 8."""
    trt = pytest.importorskip("tensorrt_rtx", reason="of the extra [rtx]")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network()
    parser_ = trt.OnnxParser(network, logger)
    assert parser_.parse(model.SerializeToString()), parser_.get_error(0).desc()
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for k in range(network.num_inputs):
        tensor = network.get_input(k)
        shapes = [[batch if size == -1 else size for size in tensor.shape] for batch in (1, 4, 8)]
        profile.set_shape(tensor.name, *shapes)
    assert config.add_optimization_profile(profile) >= 0
    assert builder.build_serialized_network(network, config) is not None


def test_tensorrt_rtx_builds_split_graphs() -> None:
    for text, limit in ((PLAIN, 8 * 80), (MASKED, 8 * 80)):
        build_rtx(split_queries(graph(text), batch=8, limit_bytes=limit).model)


def test_openvino_gives_what_the_whole_graph_gives() -> None:
    openvino = pytest.importorskip("openvino", reason="of the extra [openvino]")
    split = split_queries(graph(PLAIN), batch=3, limit_bytes=3 * 80).model
    core = openvino.Core()
    # On some processors its CPU device computes in bfloat16 unless it is told not to.
    compiled = core.compile_model(
        core.read_model(split.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    feeds = arrays(3)
    given_ = compiled(feeds)[0]
    np.testing.assert_allclose(given_, softmax_attention(feeds), atol=1e-6)


def test_the_exported_network_is_the_same_function_when_split(tmp_path: Path) -> None:
    spec = tiny_spec()
    model = exported(tmp_path, tiny_network(), spec)
    found = find_attention(model, batch=2)
    # Three attentions on the way down, at 4x4, 2x2 and 1x1 of an 8x8 image; three on the way up.
    assert [a.queries for a in found] == [a.keys for a in found] == [16, 4, 1, 4, 16, 64]
    assert {a.heads for a in found} == {4}
    split = split_queries(model, batch=2, limit_bytes=2 * 4 * 64 * 4 * 8).model
    assert count(split, "Softmax") > len(found)
    for batch in (1, 2, 5):
        feeds = unet_feeds(spec, batch)
        # What ONNX Runtime's products of other heights may round differently.
        np.testing.assert_allclose(runtime(split, feeds), runtime(model, feeds), atol=1e-5)
    assert ModelSpec.from_json({p.key: p.value for p in split.metadata_props}["ddpm_deploy.spec"])


@pytest.mark.slow
def test_the_real_network_is_the_same_function_when_split(tmp_path: Path) -> None:
    spec = ModelSpec(sample_shape=(3, 64, 64), schedule=linear(), family="dome272")
    torch.manual_seed(0)
    model = exported(tmp_path, UNet().eval(), spec)
    largest = max(find_attention(model, batch=8), key=lambda found: found.whole_bytes)
    # 64x64 pixels: 4 heads x 4096 x 4096 scores in float32 are 268 MB an image.
    assert largest.whole_bytes == 8 * 4 * 4096 * 4096 * 4
    split = split_queries(model, batch=8, limit_bytes=64 * 2**20)
    assert all(found.chunk_bytes <= 64 * 2**20 for found in split.attentions)
    feeds = unet_feeds(spec, 1)
    np.testing.assert_allclose(runtime(split.model, feeds), runtime(model, feeds), atol=1e-4)
    build_rtx(split.model)
