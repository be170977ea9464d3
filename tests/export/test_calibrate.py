"""What half precision does not suit is found where it happens, on the loop's own x_t."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from ddpm_deploy import ModelSpec, open_engine
from ddpm_deploy.engines.ort import run_graph
from ddpm_deploy.errors import ExportError
from ddpm_deploy.export.calibrate import Calibrated, calibrate, noised, sampled
from ddpm_deploy.export.precision import convert
from ddpm_deploy.export.rounding import rounded
from ddpm_deploy.export.to_onnx import export_network
from ddpm_deploy.parity import BUDGETS
from ddpm_deploy.spec import METADATA_KEY
from tests.support import tiny_network, tiny_spec

SPEC = tiny_spec().with_changes(sample_shape=(8,))


def write(path: Path, body: str, **weights: np.ndarray[Any, Any]) -> Path:
    """Writes a network of 8 numbers by hand; `w` is a rotation: nothing grows or shrinks."""
    model = parser.parse_model(
        f"""
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[batch, 8] x, int64[batch] t) => (float[batch, 8] out) {{ {body} }}
        """
    )
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0]
    for name, value in {"w": rotation, **weights}.items():
        model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    onnx.helper.set_model_props(model, {METADATA_KEY: SPEC.to_json()})
    onnx.save_model(model, path)
    return path


PLAIN = "a = MatMul(x, w) b = MatMul(a, w) c = MatMul(b, w) out = MatMul(c, w)"


def error_of(calibrated: Calibrated, graph: Path, folder: Path) -> float:
    """The mixed graph's error on inputs of its own, not those of the calibration."""
    values: dict[str, Any] = {
        "x": np.random.default_rng(9).standard_normal((64, 8)).astype(np.float32),
        "t": np.arange(64, dtype=np.int64) % 20,
    }
    path = folder / "rounded.onnx"
    onnx.save_model(rounded(calibrated.mixed.model), path)
    (given,) = run_graph(path, [values], ["out"])[0]
    (wanted,) = run_graph(graph, [values], ["out"])[0]
    return float(np.abs(given - wanted).max() / np.abs(wanted).max())


def test_a_network_that_half_precision_suits_keeps_nothing_back(tmp_path: Path) -> None:
    graph = write(tmp_path / "g.onnx", PLAIN)
    calibrated = calibrate(graph, "fp16")
    assert calibrated.kept == {}
    assert list(calibrated.errors) == [19, 17, 15, 13, 11, 8, 6, 4, 2, 0]
    assert 2**-14 < calibrated.worst < 2**-9  # a few roundings of 2^-11
    assert calibrated.budget == BUDGETS["fp16"]


def test_what_would_overflow_goes_back_to_float32(tmp_path: Path) -> None:
    scale = np.array(3e4)
    body = "a = MatMul(x, w) b = MatMul(a, w) h = Mul(b, up) c = MatMul(h, v) out = MatMul(c, w)"
    graph = write(tmp_path / "g.onnx", body, up=scale, v=np.eye(8) / scale)
    plain = convert(onnx.load(graph), "fp16")
    assert not error_of(Calibrated(mixed=plain, budget=0), graph, tmp_path) < 1  # it overflows
    calibrated = calibrate(graph, "fp16")
    assert set(calibrated.kept) >= {"h", "c"}
    assert calibrated.kept["h"].startswith("range: ")
    assert calibrated.kept["h"].endswith("comes too near to 6.55e+04")
    assert error_of(calibrated, graph, tmp_path) < 2e-3
    assert calibrate(graph, "bf16").kept == {}  # bfloat16 reaches as far as float32


def test_what_is_too_small_for_fp16_goes_back_to_float32(tmp_path: Path) -> None:
    tiny = np.array(1e-7)
    body = "a = MatMul(x, w) b = MatMul(a, w) h = Mul(b, down) c = MatMul(h, v) out = MatMul(c, w)"
    graph = write(tmp_path / "g.onnx", body, down=tiny, v=np.eye(8) / tiny / 1e3)
    calibrated = calibrate(graph, "fp16")
    assert calibrated.kept["h"].endswith("too small for fp16")
    assert error_of(calibrated, graph, tmp_path) < 2e-3


def test_the_product_that_costs_most_goes_back_first(tmp_path: Path) -> None:
    # In c, large parts cancel: their rounding is 1000 times that of the others.
    cancelling = (
        "a = MatMul(x, w) b = MatMul(a, w) h = Concat<axis = 1>(b, b) c = MatMul(h, v) "
        "e = MatMul(c, w) out = MatMul(e, w)"
    )
    v = np.concatenate([np.eye(8) * 1000.7, -np.eye(8) * 999.6])
    graph = write(tmp_path / "g.onnx", cancelling, v=v)
    loose = calibrate(graph, "fp16", budget=1.0)
    assert loose.kept == {}
    assert loose.worst > 0.02
    calibrated = calibrate(graph, "fp16", budget=3e-3)
    assert list(calibrated.kept) == ["c"]
    assert calibrated.kept["c"].startswith("accuracy: alone it costs")
    assert calibrated.worst <= 3e-3
    assert error_of(calibrated, graph, tmp_path) < 6e-3


def test_a_budget_that_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    chain = " ".join(f"a{i + 1} = MatMul(a{i}, w)" for i in range(9))
    graph = write(tmp_path / "g.onnx", f"a0 = MatMul(x, w) {chain} out = MatMul(a9, w)")
    said: list[str] = []
    with pytest.raises(ExportError, match=r"away from float32, .* the budget is 1e-09") as caught:
        calibrate(graph, "fp16", budget=1e-9, on_progress=said.append)
    assert "--budget" in caught.value.hint
    assert said[0] == "measuring fp16 against float32 on x_t of 10 timesteps"
    assert said[1].startswith("error ")


def test_a_network_that_fp16_suits_nowhere_is_refused(tmp_path: Path) -> None:
    huge = np.eye(8) * 1e6
    body = "a = MatMul(x, up) b = MatMul(a, w) c = MatMul(b, w) out = MatMul(c, down)"
    graph = write(tmp_path / "g.onnx", body, up=huge, down=np.eye(8) / 1e6)
    with pytest.raises(ExportError, match="Every product of this network leaves the range of fp16"):
        calibrate(graph, "fp16")
    assert calibrate(graph, "bf16").kept == {}


def test_numbers_that_are_not_finite_in_float32_are_the_networks_own(tmp_path: Path) -> None:
    graph = write(tmp_path / "g.onnx", PLAIN, w=np.full((8, 8), 1e30))
    with pytest.raises(ExportError, match="The float32 network itself gives numbers that are not"):
        calibrate(graph, "fp16")


def test_clean_samples_are_carried_to_x_t_by_q(tmp_path: Path) -> None:
    graph = write(tmp_path / "g.onnx", PLAIN)
    data = np.full((3, 8), 0.5, np.float32)
    with open_engine(graph) as engine:
        calls = noised(engine, data, 5)
        assert [int(call.feeds["t"][0]) for call in calls] == [19, 14, 10, 5, 0]
        shares = SPEC.schedule.alpha_bar[[19, 0]]
        for call, share in zip((calls[0], calls[-1]), shares, strict=True):
            noise = (call.feeds["x"] - np.sqrt(share) * data) / np.sqrt(1 - share)
            assert abs(noise.mean()) < 1
            assert 0.5 < noise.std() < 1.5
        assert [int(call.feeds["t"][0]) for call in sampled(engine, 3, 2)] == [19, 10, 0]
    assert calibrate(graph, "fp16", data=data, steps=5).kept == {}


@pytest.mark.parametrize("pictures", [None, 8])
def test_a_graph_of_one_batch_is_measured_at_that_batch(
    tmp_path: Path, pictures: int | None
) -> None:
    graph = write(tmp_path / "g.onnx", PLAIN)
    model = onnx.load(graph)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 3
    onnx.save_model(model, graph)
    data = None if pictures is None else np.ones((pictures, 8), np.float32)
    assert 0 < calibrate(graph, "fp16", data=data).worst < 5e-3


def test_a_mixed_graph_is_taken_as_it_is(tmp_path: Path) -> None:
    graph = write(tmp_path / "g.onnx", PLAIN)
    mixed = convert(onnx.load(graph), "fp16").model
    onnx.save_model(mixed, tmp_path / "mixed.onnx")
    again = calibrate(tmp_path / "mixed.onnx", "fp16")
    assert again.errors == {}
    assert again.mixed.model.SerializeToString() == mixed.SerializeToString()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_real_architecture_keeps_the_budget_of_its_precision(
    tmp_path: Path, precision: Any
) -> None:
    spec: ModelSpec = tiny_spec(classes=3)
    export_network(tiny_network(classes=3), spec, tmp_path / "unet.onnx")
    calibrated = calibrate(tmp_path / "unet.onnx", precision)
    assert 0 < calibrated.worst <= BUDGETS[precision]
    strict = calibrate(tmp_path / "unet.onnx", precision, budget=calibrated.worst * 0.8)
    assert strict.worst <= calibrated.worst * 0.8
    assert strict.kept
