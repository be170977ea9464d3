from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from ddpm_deploy.export.one_attention import merge_attention
from ddpm_deploy.export.to_onnx import export_network
from tests.export.test_attention import (
    MASKED,
    PLAIN,
    arrays,
    count,
    graph,
    runtime,
    softmax_attention,
    unet_feeds,
)
from tests.support import tiny_network, tiny_spec

# The heads folded into the batch, as OpenAI's code has them.
FOLDED = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[batch, 6, 3] q, float[batch, 5, 3] k, float[batch, 5, 4] v) => (float[batch, 6, 4] out)
<float half = {0.5}, float two = {2.0}, float[batch, 6, 5] scores>
{
    turned = Transpose <perm = [0, 2, 1]> (k)
    scores = MatMul (q, turned)
    less = Mul (scores, half)
    scaled = Div (less, two)
    weights = Softmax <axis = -1> (scaled)
    out = MatMul (weights, v)
}
"""


@pytest.mark.parametrize("batch", [1, 3])
def test_an_attention_becomes_one_operator_of_the_same_function(batch: int) -> None:
    model = graph(PLAIN)
    merged = merge_attention(model)
    assert count(merged, "MultiHeadAttention") == 1
    assert count(merged, "Softmax") == 0
    feeds = arrays(batch)
    np.testing.assert_allclose(runtime(merged, feeds), softmax_attention(feeds), atol=1e-6)
    assert {p.key: p.value for p in merged.metadata_props} == {"kept": "as it was"}
    assert count(model, "Softmax") == 1, "the caller's graph stays"


def test_heads_folded_into_the_batch_are_one_head_each_and_every_scale_counts() -> None:
    merged = merge_attention(graph(FOLDED))
    assert count(merged, "MultiHeadAttention") == 1
    draw = np.random.default_rng(0)
    feeds = {
        name: draw.standard_normal((4, *shape)).astype(np.float32)
        for name, shape in {"q": (6, 3), "k": (5, 3), "v": (5, 4)}.items()
    }
    wanted = softmax_attention(feeds, scale=0.25)
    np.testing.assert_allclose(runtime(merged, feeds), wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        (MASKED, {}),
        (PLAIN, {"axis = -1": "axis = 2"}),
        (PLAIN, {"Softmax <axis = -1> (scores)": "Exp (scores)"}),
        (
            PLAIN,
            {
                "weights = Softmax": "more = Add (scores, scale)\nweights = Softmax",
                "(scores)\n": "(more)\n",
            },
        ),
    ],
    ids=["masked", "over the queries", "no softmax", "biased"],
)
def test_what_the_operator_does_not_do_is_left_alone(text: str, changes: dict[str, str]) -> None:
    model = graph(text, **changes)
    assert merge_attention(model) is model


@pytest.mark.parametrize("scale", ["0", "inf"])
def test_a_scale_that_the_operator_reads_otherwise_is_left_alone(scale: str) -> None:
    model = graph(PLAIN)
    (held,) = model.graph.initializer
    number = np.array(float(scale), np.float32)
    held.CopyFrom(onnx.numpy_helper.from_array(number, "scale"))
    assert merge_attention(model) is model


def test_keys_that_were_not_turned_are_not_taken_for_turned() -> None:
    # Two heads as one matrix of ten rows, turned, and cut into heads again: other numbers.
    text = PLAIN.replace(
        "turned = Transpose <perm = [0, 1, 3, 2]> (k)",
        "flat = Reshape (k, tall)\nacross = Transpose <perm = [0, 2, 1]> (flat)\n"
        "turned = Reshape (across, heads)",
    ).replace(
        "<float scale", "<int64[3] tall = {0, 10, 3}, int64[4] heads = {0, 2, 3, 5}, float scale"
    )
    model = graph(text)
    merged = merge_attention(model)
    assert count(merged, "MultiHeadAttention") == 1
    given = arrays(2)
    np.testing.assert_allclose(runtime(merged, given), runtime(model, given), atol=1e-6)


def test_a_second_pass_changes_nothing() -> None:
    merged = merge_attention(graph(PLAIN))
    assert merge_attention(merged) is merged


def test_the_exported_network_is_the_same_function(tmp_path: Path) -> None:
    spec = tiny_spec()
    export_network(tiny_network(), spec, tmp_path / "unet.onnx")
    model = onnx.load_model(tmp_path / "unet.onnx")
    merged = merge_attention(model)
    assert count(merged, "MultiHeadAttention") == 6
    assert count(merged, "Softmax") == 0
    for batch in (1, 2, 5):
        feeds = unet_feeds(spec, batch)
        np.testing.assert_allclose(runtime(merged, feeds), runtime(model, feeds), atol=1e-5)
