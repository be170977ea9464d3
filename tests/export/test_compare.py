"""Two graphs of one network, read side by side: each planted fault is named, and no healthy one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from ddpm_deploy.arrays import Array
from ddpm_deploy.engines.ort import optimise
from ddpm_deploy.export.attention import split_queries
from ddpm_deploy.export.compare import differences, weight_differences
from ddpm_deploy.export.difference import Difference
from ddpm_deploy.export.fuse_step import fuse_step
from ddpm_deploy.export.lower import lower
from ddpm_deploy.export.precision import convert
from ddpm_deploy.export.rounding import rounded
from ddpm_deploy.export.to_onnx import export_network
from ddpm_deploy.model import UNet
from ddpm_deploy.precision import Half
from ddpm_deploy.runtime import Runtime
from tests.support import tiny_network, tiny_spec, write_graph

Edit = Callable[[onnx.GraphProto], None]


@pytest.fixture(scope="module")
def network() -> UNet:
    """Three channels, and biases that are not 0 as those of a trained network."""
    found = tiny_network(channels=3, classes=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return found


def export(network: UNet, path: Path, opset: int = 20) -> onnx.ModelProto:
    spec = replace(tiny_spec(classes=3), sample_shape=(3, 8, 8))
    export_network(network, spec, path, opset=opset)
    return onnx.load(path)


@pytest.fixture(scope="module")
def path(network: UNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compare") / "unet.onnx"
    export(network, path)
    return path


@pytest.fixture(scope="module")
def model(path: Path) -> onnx.ModelProto:
    return onnx.load(path)


@pytest.fixture(scope="module")
def state(network: UNet) -> dict[str, Array]:
    return {name: value.numpy() for name, value in network.state_dict().items()}


def edited(model: onnx.ModelProto, edit: Edit) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    edit(copy.graph)
    return copy


def with_weights(
    model: onnx.ModelProto, changes: Mapping[str, Callable[[Array], Array]]
) -> onnx.ModelProto:
    def edit(graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            if tensor.name in changes:
                values = changes[tensor.name](numpy_helper.to_array(tensor).copy())
                tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))

    return edited(model, edit)


def all_weights(model: onnx.ModelProto) -> list[str]:
    return [t.name for t in model.graph.initializer if t.data_type == 1 and len(t.raw_data) > 4]


def only(found: list[Difference]) -> Difference:
    assert len(found) == 1, found
    assert found[0].where in found[0].says or found[0].evidence
    return found[0]


def nodes(graph: onnx.GraphProto, op_type: str) -> list[onnx.NodeProto]:
    return [node for node in graph.node if node.op_type == op_type]


def set_attribute(node: onnx.NodeProto, name: str, value: Any) -> None:
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def weight_of(model: onnx.ModelProto, bias: str) -> str:
    """The weight of the product that a bias is added to."""
    (add,) = [n for n in model.graph.node if bias in n.input]
    (product,) = [n for n in model.graph.node if n.output[0] == add.input[0]]
    return str(product.input[1])


# Healthy


def test_one_graph_and_its_step_and_its_attention_in_parts_do_not_differ(
    model: onnx.ModelProto,
) -> None:
    cut = split_queries(model, batch=1, limit_bytes=2**10).model
    assert len(cut.graph.node) > len(model.graph.node)
    for engine in (model, fuse_step(model), cut, fuse_step(cut)):
        assert differences(model, engine) == []
        assert differences(engine, model) == []


def test_what_onnx_runtime_fuses_does_not_differ(
    model: onnx.ModelProto, path: Path, tmp_path: Path
) -> None:
    optimise(path, tmp_path / "unet.ort.onnx", device="cpu")
    fused = onnx.load(tmp_path / "unet.ort.onnx")
    assert any(node.domain == "com.microsoft" for node in fused.graph.node)
    assert differences(model, fused) == []


@pytest.mark.parametrize("runtime", get_args(Runtime))
@pytest.mark.parametrize("classes", [0, 3])
def test_what_is_written_for_a_runtime_does_not_differ_and_hides_no_fault(
    tmp_path: Path, runtime: Runtime, classes: int
) -> None:
    spec = replace(tiny_spec(classes=classes), sample_shape=(3, 8, 8))
    export_network(tiny_network(channels=3, classes=classes), spec, tmp_path / "unet.onnx")
    model = onnx.load(tmp_path / "unet.onnx")
    assert differences(model, lower(model, runtime)) == []
    weight = "down1.maxpool_conv.1.double_conv.0.weight"
    scaled = with_weights(model, {weight: lambda array: array * np.float32(1.5)})
    (found,) = differences(model, lower(scaled, runtime))
    assert weight in found.says


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_half_precision_rounds_weights_and_nothing_else(
    model: onnx.ModelProto, state: dict[str, Array], name: Half
) -> None:
    mixed = convert(model, name).model
    for engine in (mixed, split_queries(mixed, batch=1, limit_bytes=2**10).model, rounded(mixed)):
        for found in (differences(model, engine), weight_differences(state, engine)):
            assert only(found).kind == "weights-rounded"
            assert only(found).evidence["type"] == name
            assert only(found).evidence["weights"] > 30


@pytest.mark.parametrize("opset", [18, 20])
def test_another_export_of_one_network_does_not_differ(
    model: onnx.ModelProto, network: UNet, state: dict[str, Array], tmp_path: Path, opset: int
) -> None:
    again = export(network, tmp_path / "again.onnx", opset)
    assert differences(model, again) == []
    assert weight_differences(state, again) == []


def test_a_checkpoint_is_its_graph(model: onnx.ModelProto, state: dict[str, Array]) -> None:
    assert weight_differences(state, model) == []


# Operators


def test_gelu_by_tanh(model: onnx.ModelProto) -> None:
    found = only(differences(model, edited(model, gelu_by_tanh)))
    assert found.kind == "gelu"
    assert (found.evidence["reference"], found.evidence["engine"]) == ("erf", "tanh")
    assert found.evidence["nodes"] == len(nodes(model.graph, "Gelu"))


def test_gelu_by_tanh_written_out(model: onnx.ModelProto) -> None:
    def edit(graph: onnx.GraphProto) -> None:
        gelu = nodes(graph, "Gelu")[1]
        at = list(graph.node).index(gelu)
        x, y = gelu.input[0], gelu.output[0]
        for name, value in {"half": 0.5, "one": 1, "root": 0.7978845608, "cube": 0.044715}.items():
            graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
        graph.initializer.append(numpy_helper.from_array(np.array(3, np.float32), "three"))
        steps = [
            ("Pow", [x, "three"], "g0"),
            ("Mul", ["g0", "cube"], "g1"),
            ("Add", [x, "g1"], "g2"),
            ("Mul", ["g2", "root"], "g3"),
            ("Tanh", ["g3"], "g4"),
            ("Add", ["g4", "one"], "g5"),
            ("Mul", [x, "g5"], "g6"),
            ("Mul", ["g6", "half"], y),
        ]
        del graph.node[at]
        for i, (op_type, read, made) in enumerate(steps):
            graph.node.insert(at + i, helper.make_node(op_type, read, [made]))

    found = only(differences(model, edited(model, edit)))
    assert (found.kind, found.where) == ("gelu", "after down1.maxpool_conv.1.double_conv.0")
    assert found.evidence["engine"] == "tanh"


def test_the_epsilon_of_norms(model: onnx.ModelProto) -> None:
    def edit(graph: onnx.GraphProto) -> None:
        for node in nodes(graph, "InstanceNormalization"):
            set_attribute(node, "epsilon", 1e-6)

    found = only(differences(model, edited(model, edit)))
    assert found.kind == "epsilon"
    assert "epsilon of InstanceNormalization is 1e-06" in found.says
    assert "in the reference it is 1e-05" in found.says


def test_a_resize_that_repeats_pixels(model: onnx.ModelProto) -> None:
    def edit(graph: onnx.GraphProto) -> None:
        for node in nodes(graph, "Resize"):
            set_attribute(node, "mode", "nearest")

    found = only(differences(model, edited(model, edit)))
    assert found.kind == "resize"
    assert "mode of Resize is nearest at 3 nodes; in the reference it is linear" in found.says


def test_a_convolution_s_padding(model: onnx.ModelProto) -> None:
    def edit(graph: onnx.GraphProto) -> None:
        set_attribute(nodes(graph, "Conv")[0], "pads", [0, 0, 2, 2])

    found = only(differences(model, edited(model, edit)))
    assert (found.kind, found.where) == ("attribute", "inc.double_conv.0")
    assert "(0, 0, 2, 2)" in found.says


def test_another_operator(model: onnx.ModelProto) -> None:
    def edit(graph: onnx.GraphProto) -> None:
        nodes(graph, "Sin")[0].op_type = "Cos"

    found = only(differences(model, edited(model, edit)))
    assert found.kind == "operator-replaced"
    assert found.evidence == {"reference": "Sin", "engine": "Cos"}


def leave_out_residual(graph: onnx.GraphProto) -> None:
    """The first sum that a GELU reads: x + h becomes h."""
    gelus = [n.input[0] for n in nodes(graph, "Gelu")]
    sums = [n for n in nodes(graph, "Add") if n.output[0] in gelus]
    add = next(n for n in sums if n.output[0].startswith("add_"))
    for node in graph.node:
        node.input[:] = [add.input[1] if n == add.output[0] else n for n in node.input]


def test_a_residual_that_is_left_out(model: onnx.ModelProto) -> None:
    found = only(differences(model, edited(model, leave_out_residual)))
    assert found.kind == "wiring"
    assert found.where == "after inc.double_conv.3"


def test_a_layer_that_is_left_out(model: onnx.ModelProto) -> None:
    def edit(graph: onnx.GraphProto) -> None:
        conv = nodes(graph, "Conv")[1]
        for node in graph.node:
            node.input[:] = [conv.input[0] if n == conv.output[0] else n for n in node.input]
        graph.node.remove(conv)

    found = differences(model, edited(model, edit))
    assert found[0].kind == "structure"
    assert found[0].where == "inc.double_conv.3"
    conv = len(nodes(model.graph, "Conv"))
    assert f"{conv - 1} convolutions, the reference {conv}" in found[0].says


# Queries and keys


def swap_parts(graph: onnx.GraphProto) -> None:
    split = nodes(graph, "Split")[0]
    q, k = split.output[:2]
    for node in graph.node:
        if node is not split:
            node.input[:] = [{q: k, k: q}.get(name, name) for name in node.input]


def swap_outputs(graph: onnx.GraphProto) -> None:
    split = nodes(graph, "Split")[0]
    q, k, v = split.output
    split.output[:] = [k, q, v]


@pytest.mark.parametrize("edit", [swap_parts, swap_outputs])
def test_queries_for_keys_in_the_graph(model: onnx.ModelProto, edit: Edit) -> None:
    for engine in (model, convert(model, "fp16").model):
        found = [d for d in differences(model, edited(engine, edit)) if d.kind != "weights-rounded"]
        assert (only(found).kind, only(found).where) == ("q-k-swapped", "sa1.mha.in_proj")


def test_queries_for_keys_in_the_weights(model: onnx.ModelProto, state: dict[str, Array]) -> None:
    bias = "sa3.mha.in_proj_bias"
    weight = weight_of(model, bias)

    def swap(array: Array) -> Array:
        q, k, v = np.split(array, 3, axis=-1)
        return np.concatenate([k, q, v], axis=-1)

    engine = with_weights(model, {weight: swap, bias: swap})
    for found in (differences(model, engine), weight_differences(state, engine)):
        assert {d.kind for d in found} == {"q-k-swapped"}
        assert all("sa3.mha.in_proj" in d.where for d in found)
        assert all("in the order k, q, v" in d.says for d in found)


def gelu_by_tanh(graph: onnx.GraphProto) -> None:
    for node in nodes(graph, "Gelu"):
        set_attribute(node, "approximate", "tanh")


@pytest.mark.parametrize(
    ("edit", "kind"),
    [(gelu_by_tanh, "gelu"), (swap_parts, "q-k-swapped"), (leave_out_residual, "wiring")],
)
def test_a_fault_shows_through_what_onnx_runtime_fuses(
    model: onnx.ModelProto, tmp_path: Path, edit: Edit, kind: str
) -> None:
    onnx.save(edited(model, edit), tmp_path / "unet.onnx")
    optimise(tmp_path / "unet.onnx", tmp_path / "unet.ort.onnx", device="cpu")
    assert only(differences(model, onnx.load(tmp_path / "unet.ort.onnx"))).kind == kind


# Weights


def tail(value: float) -> Callable[[Array], Array]:
    def cut(array: Array) -> Array:
        flat = array.ravel()
        noise = np.random.default_rng(0).standard_normal(len(flat) - len(flat) // 2)
        flat[len(flat) // 2 :] = value * noise
        return flat.reshape(array.shape)

    return cut


CONV = "down2.maxpool_conv.1.double_conv.3.weight"
Case = tuple[str, Callable[[Array], Array], str, str]
WEIGHTS: dict[str, Case] = {
    # The weight, what is done to it, and the kind and some words of what is said.
    "kernel": (CONV, lambda a: a.transpose(0, 1, 3, 2), "weight-transposed", "0, 1, 3, 2"),
    "in for out": (CONV, lambda a: a.transpose(1, 0, 2, 3), "weight-transposed", "1, 0, 2, 3"),
    "turned": (CONV, lambda a: a[:, :, ::-1, ::-1], "weight-flipped", "(2, 3)"),
    "mirrored": (CONV, lambda a: a[:, :, :, ::-1], "weight-flipped", "(3,)"),
    "truncated": (CONV, tail(0), "weight-truncated", "then zero"),
    "garbage": (CONV, tail(7), "weight-truncated", "then something else"),
    "scaled": (CONV, lambda a: a * np.float32(1.25), "weight-scaled", "1.25 times"),
    "zero": (CONV, np.zeros_like, "weight-zero", "is zero"),
    "one number": (CONV, lambda a: np.where(a == a.max(), -a, a), "weight-changed", "differs in"),
    "no bias": ("down1.emb_layer.1.bias", np.zeros_like, "bias-missing", "is zero"),
    "bgr in": (
        "inc.double_conv.0.weight",
        lambda a: a[:, ::-1],
        "channels-permuted",
        "input channels in the order 2, 1, 0",
    ),
    "bgr out": (
        "outc.weight",
        lambda a: a[::-1],
        "channels-permuted",
        "output channels in the order 2, 1, 0",
    ),
    "bgr bias": ("outc.bias", lambda a: a[::-1], "channels-permuted", "in the order 2, 1, 0"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_what_was_done_to_a_weight(
    model: onnx.ModelProto, state: dict[str, Array], case: str
) -> None:
    name, made, kind, words = WEIGHTS[case]
    for engine in (with_weights(model, {name: made}), with_weights(fuse_step(model), {name: made})):
        for found in (differences(model, engine), weight_differences(state, engine)):
            assert (only(found).kind, only(found).where) == (kind, name)
            assert words in only(found).says


def test_a_fault_shows_through_half_precision(model: onnx.ModelProto) -> None:
    name, made, kind, _ = WEIGHTS["kernel"]
    found = differences(model, convert(with_weights(model, {name: made}), "fp16").model)
    assert [d.kind for d in found] == [kind, "weights-rounded"]
    assert found[0].where == name


def test_a_linear_layer_s_weight_transposed(
    model: onnx.ModelProto, state: dict[str, Array]
) -> None:
    weight = weight_of(model, "sa2.ff_self.1.bias")
    engine = with_weights(model, {weight: lambda a: a.T})
    found = only(differences(model, engine))
    assert (found.kind, found.where) == ("weight-transposed", "sa2.ff_self.1 (MatMul)")
    found = only(weight_differences(state, engine))
    assert (found.kind, found.where) == ("weight-transposed", "sa2.ff_self.1.weight")


def test_a_norm_s_gain(model: onnx.ModelProto, state: dict[str, Array]) -> None:
    norm = next(n for n in model.graph.node if n.op_type == "Mul" and n.input[1].startswith("val_"))
    engine = with_weights(model, {norm.input[1]: lambda a: a * np.float32(2)})
    assert only(differences(model, engine)).kind == "weight-scaled"
    found = only(weight_differences(state, engine))
    assert (found.kind, found.where) == ("weight-scaled", "inc.double_conv.1.weight")


def test_a_bias_that_is_not_added(model: onnx.ModelProto, state: dict[str, Array]) -> None:
    def edit(graph: onnx.GraphProto) -> None:
        (conv,) = [n for n in graph.node if "outc.bias" in n.input]
        del conv.input[2]

    engine = edited(model, edit)
    for found in (differences(model, engine), weight_differences(state, engine)):
        assert (only(found).kind, only(found).where) == ("bias-missing", "outc.bias")


def to_tf32(array: Array) -> Array:
    """By frexp: 11 bits of the fraction, the first of which float32 does not store."""
    fraction, exponent = np.frexp(array.astype(np.float64))
    made: Array = np.ldexp(np.rint(fraction * 2**11) / 2**11, exponent).astype(np.float32)
    return made


def to_int8(array: Array) -> Array:
    step = np.abs(array).max() / 127
    made: Array = (np.rint(array / step) * step).astype(np.float32)
    return made


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("fp16", lambda a: a.astype(np.float16).astype(np.float32)),
        ("bf16", lambda a: a.astype(ml_dtypes.bfloat16).astype(np.float32)),
        ("tf32", to_tf32),
        ("int8", to_int8),
    ],
)
def test_a_float32_graph_with_rounded_weights(
    model: onnx.ModelProto, name: str, grid: Callable[[Array], Array]
) -> None:
    convolutions = [str(n.input[1]) for n in nodes(model.graph, "Conv")]
    found = only(differences(model, with_weights(model, dict.fromkeys(convolutions, grid))))
    assert found.kind == "weights-rounded"
    assert found.evidence["type"] == name
    assert found.evidence["weights"] == len(convolutions)


@pytest.mark.parametrize("step", [0.01, 1.0])
def test_all_weights_of_another_step_or_of_another_network(
    model: onnx.ModelProto, state: dict[str, Array], step: float
) -> None:
    rng = np.random.default_rng(0)

    def move(array: Array) -> Array:
        if array.size == 1:
            return array
        noise = rng.standard_normal(array.shape)
        length = np.linalg.norm(array) / np.linalg.norm(noise)
        moved: Array = (array + step * length * noise).astype(np.float32)
        return moved

    engine = with_weights(model, dict.fromkeys(all_weights(model), move))
    for found in (differences(model, engine), weight_differences(state, engine)):
        assert found[0].kind == "other-weights"
        assert found[0].evidence["median"] == pytest.approx(step, rel=0.05)
        assert found[0].evidence["little"] == (step == 0.01)


def test_another_network_is_said_in_a_few_lines(model: onnx.ModelProto, tmp_path: Path) -> None:
    other = onnx.load(write_graph(tmp_path / "other.onnx", None))
    found = differences(model, other)
    assert found[0].kind == "structure"
    assert "0 convolutions" in found[0].says
    assert len(found) <= 10
