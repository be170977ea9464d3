from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from onnx import parser

from ddpm_deploy import ModelSpec, linear
from ddpm_deploy.export.attention import split_queries
from ddpm_deploy.export.memory import LargestTensor, MemoryEstimate, estimate_memory
from ddpm_deploy.export.to_onnx import export_network
from ddpm_deploy.model import UNet
from tests.support import tiny_network, tiny_spec


def estimate(body: str, *, types: str = "", batch: int = 1) -> MemoryEstimate:
    """Estimates a graph from x to out, each float32 (batch, 4): 16 bytes a sample."""
    text = f"""
    <ir_version: 10, opset_import: ["" : 20, "other" : 1]>
    g (float[batch, 4] x) => (float[batch, 4] out) {types}
    {{ {body} }}
    """
    return estimate_memory(parser.parse_model(text), batch=batch)


def test_a_pointwise_operator_writes_over_what_nobody_reads_later() -> None:
    # x stays as the caller's; a, b and out follow each other in one buffer.
    found = estimate("a = Relu (x) b = Tanh (a) out = Sigmoid (b)", batch=3)
    assert found.activations == 3 * (16 + 16)


def test_what_is_read_later_is_kept() -> None:
    # a is the residual: it stays beside b, into which the sum goes.
    found = estimate("a = Relu (x) b = Tanh (a) out = Add (a, b)")
    assert found.activations == 16 + 16 + 16


def test_views_share_the_memory_of_what_they_view() -> None:
    body = "a = Relu (x) b = Reshape (a, two) c = Tanh (b) out = Reshape (c, four)"
    found = estimate(body, types="<int64[2] two = {-1, 2}, int64[2] four = {-1, 4}>", batch=2)
    assert found.activations == 2 * (16 + 16)


def test_a_product_is_stored_beside_what_it_reads() -> None:
    # x, then a of 8 columns beside it, then out beside both; the weights are counted apart.
    found = estimate(
        "a = MatMul (x, up) out = MatMul (a, down)",
        types="<float[4, 8] up = {%s}, float[8, 4] down = {%s}>" % ((", ".join("0" * 32),) * 2),
    )
    assert found.activations == 16 + 32 + 16
    assert found.weights == 2 * 4 * 8 * 4
    assert found.total == found.weights + found.activations
    assert found.largest == LargestTensor(name="a", shape=(1, 8), bytes=32)
    assert found.unknown == ()


def test_a_smaller_element_type_takes_less() -> None:
    found = estimate("a = Cast <to = 10> (x) b = Softmax (a) out = Cast <to = 1> (b)", batch=4)
    # x 64 bytes and a 32; then b 32 beside them; then out 64 beside x and b.
    assert found.activations == 64 + 32 + 64


def test_a_tensor_of_unknown_shape_is_named_and_not_counted() -> None:
    found = estimate("a = other.Widen (x) out = other.Narrow (a)")
    assert found.unknown == ("a",)
    assert found.activations == 16 + 16
    assert found.attention == 0


def test_what_a_subgraph_reads_is_kept_for_it() -> None:
    branch = "g1 () => (float[batch, 4] {0}) {{ {0} = Neg (a) }}"
    body = f"""
        a = Softmax (x)
        total = ReduceSum <keepdims = 0> (x)
        zero = Sub (total, total)
        yes = Greater (total, zero)
        out = If (yes) <then_branch = {branch.format("p")}, else_branch = {branch.format("q")}>
    """
    # x, a, which the branches read, and out; with the flag, one byte.
    assert estimate(body).activations == 16 + 16 + 16 + 1


def network(path: Path, built: UNet, spec: ModelSpec) -> onnx.ModelProto:
    return onnx.load(export_network(built, spec, path).path)


def test_activations_grow_with_the_batch_and_weights_do_not(tmp_path: Path) -> None:
    built = tiny_network()
    model = network(tmp_path / "unet.onnx", built, tiny_spec())
    one, eight = (estimate_memory(model, batch=batch) for batch in (1, 8))
    stored = sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in model.graph.initializer)
    assert one.weights == eight.weights == stored
    # The exporter stores equal weights once, such as the ones of norms, and adds shapes.
    parameters = sum(parameter.numel() for parameter in built.parameters())
    assert one.weights == pytest.approx(4 * parameters, rel=0.05)
    # All but a few shapes are a number for each sample.
    assert eight.activations == pytest.approx(8 * one.activations, rel=0.01)
    assert one.unknown == ()
    # 4 heads, 8x8 queries and keys, float32; softmax reads one such matrix and writes another.
    assert one.attention == 4 * 64 * 64 * 4
    assert one.activations >= 2 * one.attention


def test_a_network_with_its_queries_split_needs_less(tmp_path: Path) -> None:
    model = network(tmp_path / "unet.onnx", tiny_network(), tiny_spec())
    split = split_queries(model, batch=8, limit_bytes=8 * 4 * 64 * 4 * 4).model
    whole, parts = (estimate_memory(graph, batch=8) for graph in (model, split))
    assert parts.attention == 8 * 4 * 64 * 4 * 4
    assert parts.activations < whole.activations - 2 * (whole.attention - 2 * parts.attention)
    # But for the lengths of the parts, a few integers for each attention.
    assert whole.weights <= parts.weights < whole.weights + 6 * 64 * 8


PEAK = """
import sys
from pathlib import Path
import numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.enable_cpu_mem_arena = options.enable_mem_pattern = False
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])

def resident(which):
    status = Path("/proc/self/status").read_text()
    return int(status.split(which + ":")[1].split()[0]) * 1024

before = resident("VmRSS")
batch = int(sys.argv[2])
x = np.zeros((batch, 3, 64, 64), np.float32)
session.run(None, {"x": x, "t": np.zeros(batch, np.int64)})
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_estimate_is_what_onnx_runtime_takes(tmp_path: Path) -> None:
    spec = ModelSpec(sample_shape=(3, 64, 64), schedule=linear(), family="dome272")
    torch.manual_seed(0)
    path = tmp_path / "unet.onnx"
    model = network(path, UNet().eval(), spec)
    found = estimate_memory(model, batch=1)
    assert found.attention == 4 * 4096 * 4096 * 4
    peak = subprocess.run(
        [sys.executable, "-c", PEAK, path, "1"], check=True, capture_output=True, text=True
    )
    # 5 %: the loader's memory, freed before, takes some of it, and convolutions add to it.
    assert int(peak.stdout) == pytest.approx(found.activations, rel=0.05)
    split = split_queries(model, batch=8, limit_bytes=64 * 2**20).model
    assert estimate_memory(split, batch=8).total < 300e6 < estimate_memory(model, batch=8).total
