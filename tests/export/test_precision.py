"""A mixed graph: what computes in half precision, what does not, and how near it stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, parser
from onnx.reference import ReferenceEvaluator

from ddpm_deploy import ModelSpec, open_engine
from ddpm_deploy.engines.ort import run_graph
from ddpm_deploy.errors import ExportError, SpecError
from ddpm_deploy.export.graph import constants, tensor_types
from ddpm_deploy.export.precision import CONDITIONING, ENDS, STATISTICS, convert
from ddpm_deploy.export.rounding import rounded
from ddpm_deploy.export.to_onnx import export_network
from ddpm_deploy.precision import METADATA_KEY as PRECISION_KEY
from ddpm_deploy.precision import Half
from ddpm_deploy.spec import METADATA_KEY
from tests.support import tiny_network, tiny_spec

HALF = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("precision") / "unet.onnx"
    export_network(tiny_network(classes=3), tiny_spec(classes=3), path)
    return path


@pytest.fixture(scope="module")
def model(graph: Path) -> onnx.ModelProto:
    return onnx.load(graph)


def feeds(batch: int = 3) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return {
        "x": rng.standard_normal((batch, 1, 8, 8)).astype(np.float32),
        "t": np.linspace(0, 19, batch).astype(np.int64),
        "y": np.arange(batch, dtype=np.int64) % 4,
    }


def run(model: onnx.ModelProto, folder: Path) -> np.ndarray[Any, Any]:
    path = folder / "run.onnx"
    onnx.save_model(model, path)
    return run_graph(path, [feeds()], ["out"])[0][0]


def read_types(model: onnx.ModelProto, op_type: str) -> list[int]:
    """The element type of what each operator of a kind reads first."""
    types = tensor_types(model, batch=2)
    return [types[n.input[0]].elem_type for n in model.graph.node if n.op_type == op_type]


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_products_compute_in_half_precision_and_statistics_in_float32(
    model: onnx.ModelProto, name: Half
) -> None:
    mixed = convert(model, name).model
    convolutions = read_types(mixed, "Conv")
    assert convolutions[0] == convolutions[-1] == TensorProto.FLOAT  # x is read, out is written
    assert set(convolutions[1:-1]) == {HALF[name]}
    assert set(read_types(mixed, "MatMul")) == {HALF[name]}
    for statistics in ("InstanceNormalization", "LayerNormalization", "Softmax"):
        assert set(read_types(mixed, statistics)) == {TensorProto.FLOAT}
    for conditioning in ("Gemm", "Sin", "Cos", "Sigmoid"):
        assert set(read_types(mixed, conditioning)) == {TensorProto.FLOAT}


def test_the_doors_of_the_graph_stay_as_they_are(model: onnx.ModelProto) -> None:
    mixed = convert(model, "fp16").model
    assert list(mixed.graph.input) == list(model.graph.input)
    assert list(mixed.graph.output) == list(model.graph.output)
    kept = {entry.key: entry.value for entry in mixed.metadata_props}
    assert ModelSpec.from_json(kept[METADATA_KEY]) == tiny_spec(classes=3)


def test_nothing_that_the_timestep_alone_decides_is_rounded(
    model: onnx.ModelProto, tmp_path: Path
) -> None:
    names = [n.output[0] for n in model.graph.node if n.op_type in {"Sin", "Cos", "Gemm"}]
    values = []
    for each in (model, rounded(convert(model, "fp16").model)):
        probe = onnx.ModelProto()
        probe.CopyFrom(each)
        probe.graph.output.extend(
            onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names
        )
        onnx.save_model(probe, tmp_path / "probe.onnx")
        values.append(run_graph(tmp_path / "probe.onnx", [feeds()], names)[0])
    for wanted, given in zip(*values, strict=True):
        np.testing.assert_array_equal(given, wanted)


def test_the_weights_of_products_are_kept_once_and_in_half_the_bytes(
    model: onnx.ModelProto,
) -> None:
    def total(of: onnx.ModelProto, elem_type: int) -> int:
        return sum(
            int(np.prod(t.dims))
            for t in constants(of.graph).values()
            if t.data_type == elem_type and len(t.dims) > 1
        )

    mixed = convert(model, "fp16").model
    everything = total(model, TensorProto.FLOAT)
    assert total(mixed, TensorProto.FLOAT16) + total(mixed, TensorProto.FLOAT) == everything
    assert total(mixed, TensorProto.FLOAT16) > 0.8 * everything


def test_a_mixed_graph_is_not_converted_again(model: onnx.ModelProto) -> None:
    once = convert(model, "fp16")
    twice = convert(once.model, "fp16")
    assert twice.model.SerializeToString() == once.model.SerializeToString()
    assert twice.groups == once.groups
    with pytest.raises(ExportError, match="in fp16 already; bf16 cannot be made of it"):
        convert(once.model, "bf16")


def test_the_callers_graph_is_left_alone(model: onnx.ModelProto) -> None:
    before = model.SerializeToString()
    convert(model, "bf16")
    assert model.SerializeToString() == before


def test_every_reason_is_told_with_its_operators(model: onnx.ModelProto) -> None:
    mixed = convert(model, "fp16")
    (record,) = [e.value for e in mixed.model.metadata_props if e.key == PRECISION_KEY]
    assert json.loads(record) == {"precision": "fp16", "groups": mixed.groups, "error": None}
    assert "2 Conv" in mixed.groups[f"float32, {ENDS}"]
    assert "6 Gemm" in mixed.groups[f"float32, {CONDITIONING}"]
    assert "12 LayerNormalization" in mixed.groups[f"float32, {STATISTICS}"]
    assert "36 MatMul" in mixed.groups["fp16"]


@pytest.mark.parametrize(("name", "limit"), [("fp16", 2e-3), ("bf16", 2e-2)])
def test_the_rounded_graph_is_near_float32_but_not_the_same(
    model: onnx.ModelProto, tmp_path: Path, name: Half, limit: float
) -> None:
    wanted = run(model, tmp_path)
    given = run(rounded(convert(model, name).model), tmp_path)
    error = np.abs(given - wanted).max() / np.abs(wanted).max()
    assert limit / 100 < error < limit


def true_half(model: onnx.ModelProto, values: dict[str, np.ndarray[Any, Any]]) -> Any:
    """What onnx.reference gives, which computes in NumPy's float16."""
    evaluator: Any = ReferenceEvaluator(model)
    return evaluator.run(["out"], values)[0]


def test_rounding_costs_what_true_half_precision_costs(
    model: onnx.ModelProto, tmp_path: Path
) -> None:
    # Two orders of summation round differently, so the two are compared by the size of their error.
    mixed = convert(model, "fp16").model
    exact = run(model, tmp_path)
    true = true_half(mixed, feeds())
    assert true.dtype == np.float32
    ratio = np.mean((run(rounded(mixed), tmp_path) - exact) ** 2) / np.mean((true - exact) ** 2)
    assert 0.5 < ratio < 2


def test_one_operator_rounds_as_true_half_precision_does(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    model = hand_made("a = MatMul(x, w) b = MatMul(a, v) c = Relu(b) out = MatMul(c, w)")
    weights = rng.standard_normal((4, 4)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "v"))
    mixed = convert(model, "fp16").model
    assert convert(model, "fp16").groups["fp16"] == "1 MatMul, 1 Relu"
    x = rng.standard_normal((1000, 4)).astype(np.float32)
    values: dict[str, Any] = {"x": x, "t": np.zeros(1000, np.int64)}
    onnx.save_model(rounded(mixed), tmp_path / "g.onnx")
    given = run_graph(tmp_path / "g.onnx", [values], ["out"])[0][0]
    true = true_half(mixed, values)
    assert np.array_equal(given, given.astype(np.float16))  # every number is one of half precision
    assert np.mean(given == true) > 0.9
    np.testing.assert_allclose(given, true, rtol=2**-9, atol=2**-11)


def test_a_float32_graph_is_its_own_rounded_graph(model: onnx.ModelProto, tmp_path: Path) -> None:
    np.testing.assert_array_equal(run(rounded(model), tmp_path), run(model, tmp_path))


def test_onnx_runtime_and_openvino_load_and_run_the_mixed_graph(
    model: onnx.ModelProto, tmp_path: Path
) -> None:
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    path = tmp_path / "unet.fp16.onnx"
    onnx.save_model(convert(model, "fp16").model, path)
    wanted = run(model, tmp_path)
    limit = 5e-3 * np.abs(wanted).max()
    with open_engine(path) as engine:
        assert engine.precision == "fp16"
        values = feeds()
        given = engine(values["x"], values["t"], y=values["y"])
        assert np.abs(given - wanted).max() < limit
    # On processors with bfloat16 OpenVINO would use it, whatever the graph says.
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert np.abs(compiled(feeds())["out"] - wanted).max() < limit


def test_bfloat16_is_written_in_an_opset_that_has_it(model: onnx.ModelProto) -> None:
    mixed = convert(model, "bf16").model
    assert [entry.version for entry in mixed.opset_import if not entry.domain] == [22]
    assert "GroupNormalization" not in {node.op_type for node in mixed.graph.node}


def hand_made(body: str, more: str = "") -> onnx.ModelProto:
    return parser.parse_model(
        f"""
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[batch, 4] x, int64[batch] t) => (float[batch, 4] out)
        <float[4, 4] w = {{1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}}{more}>
        {{ {body} }}
        """
    )


def test_a_tensor_is_stored_once_and_read_back_by_float32(tmp_path: Path) -> None:
    # b is read by a product and by a softmax: both see the number that is stored.
    model = hand_made(
        "a = MatMul(x, w) b = Relu(a) c = MatMul(b, w) s = Softmax(b) "
        "d = Add(c, s) out = MatMul(d, w)"
    )
    mixed = convert(model, "fp16").model
    types = tensor_types(mixed, batch=1)
    assert types["b"].elem_type == types["c"].elem_type == TensorProto.FLOAT16
    (softmax,) = [n for n in mixed.graph.node if n.op_type == "Softmax"]
    (back,) = [n for n in mixed.graph.node if softmax.input[0] in n.output]
    assert (back.op_type, list(back.input)) == ("Cast", ["b"])
    x = np.array([[1 / 3, 2, 3, 4]], np.float32)
    onnx.save_model(rounded(mixed), tmp_path / "g.onnx")
    call: dict[str, Any] = {"x": x, "t": np.zeros(1, np.int64)}
    model_out = run_graph(tmp_path / "g.onnx", [call], ["out"])[0][0]
    stored = x.astype(np.float16).astype(np.float32)
    powers = np.exp(stored - stored.max())
    np.testing.assert_allclose(model_out, stored + powers / powers.sum(), rtol=1e-6)


def test_an_operator_stays_float32_when_it_is_asked_for(model: onnx.ModelProto) -> None:
    name = [n.output[0] for n in model.graph.node if n.op_type == "MatMul"][3]
    mixed = convert(model, "fp16", keep={name: "accuracy: it must be"})
    assert mixed.groups["float32, accuracy: it must be"] == "1 MatMul"
    assert read_types(mixed.model, "MatMul").count(TensorProto.FLOAT) == 1
    with pytest.raises(ValueError, match="no such operators"):
        convert(model, "fp16", keep={"nothing": "why"})


def test_a_weight_beyond_half_precision_stays_float32() -> None:
    model = hand_made(
        "a = MatMul(x, w) b = MatMul(a, v) c = MatMul(b, w) out = Relu(c)",
        ", float[4, 4] v = {0, 7e4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}",
    )
    assert convert(model, "fp16").groups["float32, a constant is beyond fp16"] == "1 MatMul"
    assert "1 MatMul" in convert(model, "bf16").groups["bf16"]


def test_a_graph_that_branches_is_refused() -> None:
    model = parser.parse_model(
        """
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[batch, 4] x, int64[batch] t, bool yes) => (float[batch, 4] out)
        {
            out = If (yes) <
                then_branch = a () => (float[batch, 4] p) { p = Neg (x) },
                else_branch = b () => (float[batch, 4] q) { q = Relu (x) }
            >
        }
        """
    )
    with pytest.raises(ExportError, match=r"The graph branches at out \(If\)"):
        convert(model, "fp16")


def test_a_graph_that_others_made_mixed_is_refused(model: onnx.ModelProto) -> None:
    from onnxconverter_common import float16

    plain = hand_made("a = MatMul(x, w) out = Relu(a)")
    foreign = float16.convert_float_to_float16(plain, keep_io_types=True)
    with pytest.raises(ExportError, match="already, chosen elsewhere"):
        convert(foreign, "fp16")


def test_an_unknown_precision_is_refused(model: onnx.ModelProto) -> None:
    with pytest.raises(ValueError, match="precision is 'int8'; there are fp16, bf16"):
        convert(model, "int8")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "said",
    [
        "{",
        "null",
        "[]",
        '{"precision": "int4", "groups": {}}',
        '{"precision": "fp16", "groups": [1]}',
        '{"precision": "fp16", "groups": {"fp16": 3}}',
        '{"precision": "fp16", "groups": {}, "error": "small"}',
    ],
)
def test_a_precision_that_cannot_be_read_is_refused(model: onnx.ModelProto, said: str) -> None:
    damaged = onnx.ModelProto()
    damaged.CopyFrom(model)
    damaged.metadata_props.add(key=PRECISION_KEY, value=said)
    with pytest.raises(SpecError, match="is in mixed precision, but not how"):
        convert(damaged, "fp16")


def test_an_operator_that_onnx_cannot_carry_over_is_an_error_of_the_graph() -> None:
    model = parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[batch, 4] x, int64[batch] t) => (float[batch, 4] out)
        <float[1] one = {1.0}>
        { out = GroupNormalization <num_groups = 1> (x, one, one) }
        """
    )
    with pytest.raises(ExportError, match=r"needs opset 22; this graph is of opset 17") as caught:
        convert(model, "bf16")
    assert "--opset 22" in caught.value.hint
