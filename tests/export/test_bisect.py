"""Two graphs walked side by side: the first node that differs, and the first that is not finite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ddpm_deploy.engines.ort import optimise
from ddpm_deploy.errors import ExportError
from ddpm_deploy.export.attention import split_queries
from ddpm_deploy.export.bisect import Bisection, bisect_graphs, first_not_finite
from ddpm_deploy.export.fuse_step import fuse_step
from ddpm_deploy.export.graph import producers
from ddpm_deploy.export.precision import convert
from ddpm_deploy.export.to_onnx import export_network
from ddpm_deploy.parity import BUDGETS, TOLERANCE
from ddpm_deploy.precision import Half
from tests.support import tiny_network, tiny_spec

Fault = Callable[[onnx.GraphProto], None]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bisect") / "unet.onnx"
    export_network(tiny_network(classes=3), tiny_spec(classes=3), path)
    return path


@pytest.fixture(scope="module")
def model(path: Path) -> onnx.ModelProto:
    return onnx.load(path)


def feeds(batch: int = 2) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return {
        "x": rng.standard_normal((batch, 1, 8, 8)).astype(np.float32),
        "t": np.linspace(0, 19, batch).astype(np.int64),
        "y": np.arange(batch, dtype=np.int64),
    }


def with_fault(model: onnx.ModelProto, fault: Fault) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    fault(copy.graph)
    return copy


def bisect(model: onnx.ModelProto, engine: onnx.ModelProto, budget: float = TOLERANCE) -> Bisection:
    return bisect_graphs(model, engine, feeds(), budget=budget, threads=1)


def floats(model: onnx.ModelProto) -> int:
    """Tensors that nodes of the exported graph make in float32, told by what makes the others."""
    whole = {"Shape", "Slice"}
    made = [n for n in model.graph.node if n.op_type not in whole]
    shapes = {n.output[0] for n in made if n.op_type == "Concat" and "val_" in n.output[0]}
    return sum(len(n.output) for n in made if n.output[0] not in shapes)


def test_a_graph_is_itself(model: onnx.ModelProto) -> None:
    found = bisect(model, model, budget=0)
    assert found.first is None
    assert found.crossing is None
    assert found.not_finite is None
    assert found.uncompared == 0
    assert len(found.tensors) == floats(model)
    assert found.tensors[-1].tensor == "out"
    assert {t.error for t in found.tensors} == {t.local for t in found.tensors} == {0.0}


def test_what_onnx_runtime_fuses_rounds_to_less_than_a_tenth_of_the_budget(
    model: onnx.ModelProto, path: Path, tmp_path: Path
) -> None:
    optimise(path, tmp_path / "unet.ort.onnx", device="cpu")
    found = bisect(model, onnx.load(tmp_path / "unet.ort.onnx"))
    assert found.first is found.crossing is None
    assert max(t.local for t in found.tensors) < TOLERANCE / 10
    assert len(found.tensors) > 0.9 * floats(model)


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_half_precision_is_inside_its_own_budget_and_beyond_float32_s(
    model: onnx.ModelProto, name: Half
) -> None:
    mixed = convert(model, name).model
    assert bisect(model, mixed, BUDGETS[name]).first is None
    found = bisect(model, mixed)
    assert len(found.tensors) == floats(model)
    assert found.uncompared > 0  # what stands before casts, and behind them
    assert found.first is not None
    unit = {"fp16": 2.0**-11, "bf16": 2.0**-8}[name]
    assert unit / 8 < found.first.local < 4 * unit


def test_the_step_and_cut_attention_are_no_differences(model: onnx.ModelProto) -> None:
    fused, cut = fuse_step(model), split_queries(model, batch=1, limit_bytes=2**10).model
    assert len(cut.graph.node) > len(model.graph.node)
    for engine in (fused, cut, fuse_step(cut)):
        found = bisect(model, engine)
        assert found.first is found.crossing is None
    assert bisect(fused, fused, budget=0).tensors[-1].tensor == "x_s"


def nodes(graph: onnx.GraphProto, op_type: str) -> list[onnx.NodeProto]:
    return [node for node in graph.node if node.op_type == op_type]


def set_attribute(node: onnx.NodeProto, name: str, value: Any) -> None:
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def scale(graph: onnx.GraphProto, name: str, factor: float) -> None:
    tensor = next(t for t in graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * factor, name))


def put_behind(graph: onnx.GraphProto, name: str, op_type: str) -> None:
    """Puts an operator between a tensor and all who read it."""
    for node in graph.node:
        for i, read in enumerate(node.input):
            if read == name:
                node.input[i] = f"{name}.changed"
    at = 1 + next(i for i, node in enumerate(graph.node) if name in node.output)
    graph.node.insert(at, helper.make_node(op_type, [name], [f"{name}.changed"]))


def reader(graph: onnx.GraphProto, name: str) -> str:
    return next(str(n.output[0]) for n in graph.node if name in n.input)


def test_gelu_by_tanh_is_named(model: onnx.ModelProto) -> None:
    wanted = nodes(model.graph, "Gelu")[3].output[0]

    def fault(graph: onnx.GraphProto) -> None:
        set_attribute(nodes(graph, "Gelu")[3], "approximate", "tanh")

    first = bisect(model, with_fault(model, fault)).first
    assert first is not None
    assert (first.tensor, first.node.op_type) == (wanted, "Gelu")
    assert first.node.where == "after down1.maxpool_conv.2.double_conv.0"
    # The two forms of GELU are at most 4.7e-4 from each other.
    assert 2e-5 < first.local * first.peak < 4.8e-4
    assert first.input_error == 0
    assert first.growth == np.inf


def test_another_epsilon_is_named(model: onnx.ModelProto) -> None:
    wanted = nodes(model.graph, "InstanceNormalization")[2].output[0]

    def fault(graph: onnx.GraphProto) -> None:
        set_attribute(nodes(graph, "InstanceNormalization")[2], "epsilon", 1e-2)

    found = bisect(model, with_fault(model, fault))
    assert found.first is not None
    assert found.crossing is not None
    assert found.first.tensor == found.crossing.tensor == wanted
    assert found.jumps[0] == found.first


def test_a_changed_weight_is_named_and_nothing_behind_it(model: onnx.ModelProto) -> None:
    name = "down2.maxpool_conv.1.double_conv.3.weight"

    def fault(graph: onnx.GraphProto) -> None:
        scale(graph, name, 1.01)

    found = bisect(model, with_fault(model, fault))
    guilty = [t for t in found.tensors if t.local > TOLERANCE]
    assert [t.tensor for t in guilty] == [reader(model.graph, name)]
    assert guilty[0].node.where == "down2.maxpool_conv.1.double_conv.3"
    assert guilty[0].local == pytest.approx(0.01, rel=1e-3)
    # The normalisation behind it takes the factor away again.
    assert [t.node.op_type for t in found.tensors if t.error > TOLERANCE] == ["Conv", "Reshape"]


def test_two_faults_are_both_seen(model: onnx.ModelProto) -> None:
    names = ["inc.double_conv.3.weight", "up3.conv.0.double_conv.0.weight"]

    def fault(graph: onnx.GraphProto) -> None:
        for name in names:
            scale(graph, name, 1.01)

    found = bisect(model, with_fault(model, fault))
    guilty = [t.tensor for t in found.tensors if t.local > TOLERANCE]
    assert guilty == [reader(model.graph, name) for name in names]
    assert found.crossing is not None
    assert found.crossing.tensor == guilty[0]


def test_a_fault_in_half_precision_is_named_at_the_operator_not_at_its_cast(
    model: onnx.ModelProto,
) -> None:
    mixed = convert(model, "fp16").model
    wanted = nodes(model.graph, "InstanceNormalization")[4].output[0]

    def fault(graph: onnx.GraphProto) -> None:
        set_attribute(nodes(graph, "InstanceNormalization")[4], "epsilon", 1.0)

    first = bisect(model, with_fault(mixed, fault), BUDGETS["fp16"]).first
    assert first is not None
    assert (first.tensor, first.node.op_type) == (wanted, "InstanceNormalization")


def test_no_node_alone_is_beyond_a_budget_that_their_sum_breaks(model: onnx.ModelProto) -> None:
    mixed = convert(model, "bf16").model
    errors = bisect(model, mixed).tensors
    between = max(t.local for t in errors) * 1.01
    assert between < max(t.error for t in errors)
    found = bisect(model, mixed, between)
    assert found.first is None
    assert found.crossing is not None
    assert found.crossing.error > between >= found.crossing.input_error


def test_the_logarithm_of_negative_numbers_is_named_at_the_timestep_that_makes_it(
    model: onnx.ModelProto,
) -> None:
    sine = nodes(model.graph, "Sin")[0].output[0]

    def fault(graph: onnx.GraphProto) -> None:
        put_behind(graph, sine, "Log")

    engine = with_fault(model, fault)
    found = bisect(model, engine).not_finite
    assert found is not None
    # Of t = 0 the sine is 0 and its logarithm -inf; of t = 19 some are negative: NaN.
    assert (found.image, found.value, found.node.output) == (0, "inf", f"{sine}.changed")
    late = {name: value[1:] for name, value in feeds().items()}
    found = first_not_finite(engine, late)
    assert found is not None
    assert (found.value, found.node.op_type) == ("nan", "Log")
    assert 0 < found.largest_input <= 1
    assert "makes nan from numbers of at most" in str(found)
    assert found.limit is None


def test_a_finite_network_has_no_such_node(model: onnx.ModelProto) -> None:
    assert first_not_finite(model, feeds()) is None
    assert first_not_finite(convert(model, "fp16").model, feeds()) is None


def test_an_overflow_of_half_precision_is_named_with_the_number_that_was_too_large(
    model: onnx.ModelProto,
) -> None:
    name = "down1.maxpool_conv.2.double_conv.0.weight"

    def fault(graph: onnx.GraphProto) -> None:
        scale(graph, name, 2e5)  # beyond fp16's 65504 only once it is multiplied and summed

    large = with_fault(model, fault)
    assert first_not_finite(large, feeds()) is None
    weight = next(t for t in large.graph.initializer if t.name == name)
    assert np.abs(numpy_helper.to_array(weight)).max() < 65504
    found = bisect(large, convert(large, "fp16").model, BUDGETS["fp16"])
    assert found.not_finite is not None
    assert found.not_finite.node.output == reader(model.graph, name)
    assert found.not_finite.node.op_type == "Conv"
    assert found.not_finite.limit == 65504
    assert found.not_finite.largest_input > 65504
    assert "is beyond 65504" in str(found.not_finite)
    assert found.first is not None
    assert found.first.tensor == found.not_finite.node.output
    assert found.first.error == np.inf


def test_infinities_that_both_graphs_have_are_no_fault() -> None:
    """A mask of -inf before a softmax, as causal attention has one."""

    def build(gain: float) -> onnx.ModelProto:
        constants = [
            numpy_helper.from_array(np.array(0, np.float32), "zero"),
            numpy_helper.from_array(np.array(-np.inf, np.float32), "never"),
            numpy_helper.from_array(np.array(gain, np.float32), "gain"),
        ]
        steps = [
            helper.make_node("Greater", ["x", "zero"], ["seen"]),
            helper.make_node("Where", ["seen", "x", "never"], ["masked"]),
            helper.make_node("Log", ["zero"], ["log_of_zero"]),
            helper.make_node("Add", ["masked", "log_of_zero"], ["hidden"]),
            helper.make_node("Exp", ["hidden"], ["none"]),
            helper.make_node("Mul", ["x", "gain"], ["scaled"]),
            helper.make_node("Add", ["scaled", "none"], ["out"]),
        ]
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])
        out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", 4])
        graph = helper.make_graph(steps, "mask", [x], [out], constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)

    x = {"x": np.array([[1, -1, 2, -2]], np.float32)}
    found = bisect_graphs(build(1), build(2), x, budget=TOLERANCE)
    assert found.not_finite is None
    assert found.first is not None
    assert (found.first.tensor, found.first.local) == ("scaled", 1.0)


def test_a_batch_of_one_size_is_taken_whole(model: onnx.ModelProto) -> None:
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    found = bisect(fixed, fixed, budget=0)
    assert found.first is None
    assert len(found.tensors) == floats(model)


def test_graphs_with_other_names_are_refused(model: onnx.ModelProto) -> None:
    def fault(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            node.input[:] = [f"{n}_" if n in made else n for n in node.input]
            node.output[:] = [f"{n}_" for n in node.output]
        graph.output[0].name = "out_"
        del graph.value_info[:]

    made = producers(model.graph).keys()
    other = with_fault(model, fault)
    with pytest.raises(ExportError, match="no tensor in common") as caught:
        bisect(model, other)
    assert "from one file" in caught.value.hint
