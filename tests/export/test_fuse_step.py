"""The fused step is the step: compared with the loop in NumPy over whole loops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from ddpm_deploy import Engine, ModelSpec, SeededNoise, denoise, linear, open_engine
from ddpm_deploy.errors import EngineError, ExportError, SpecError
from ddpm_deploy.export.fuse_step import fuse_file, fuse_step
from ddpm_deploy.fused import METADATA_KEY, denoise_fused, row_of
from ddpm_deploy.sampling import Table
from ddpm_deploy.spec import METADATA_KEY as SPEC_KEY
from tests.support import tiny_spec, write_fused, write_graph

SPEC = tiny_spec()
LEARNED = ("learned", "learned_range")


def load(path: Path, spec: ModelSpec | None = SPEC, *, bias: float = 0.0) -> onnx.ModelProto:
    return onnx.load_model(write_graph(path / "unet.onnx", spec, bias=bias))


def with_variance(model: onnx.ModelProto) -> onnx.ModelProto:
    """Doubles the channels of a graph of `write_graph`: v is 0.9 · out."""
    nodes = model.graph.node
    nodes[-1].output[0] = "prediction"
    nodes.extend(
        [
            helper.make_node("Mul", ["prediction", "gain"], ["v"]),
            helper.make_node("Concat", ["prediction", "v"], ["out"], axis=1),
        ]
    )
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value *= 2
    return model


def opened(folder: Path, spec: ModelSpec, *, fused: bool) -> Engine:
    model = load(folder, spec)
    if spec.variance in LEARNED:
        model = with_variance(model)
    path = folder / ("fused.onnx" if fused else "plain.onnx")
    onnx.save_model(fuse_step(model) if fused else model, path)
    return open_engine(path, threads=1)


LOOPS: dict[str, tuple[dict[str, object], Callable[[ModelSpec], Table]]] = {
    "ddpm, small variance": ({}, lambda spec: spec.table("ddpm")),
    "ddpm, large variance": ({"variance": "fixed_large"}, lambda spec: spec.table("ddpm")),
    "ddim": ({}, lambda spec: spec.table("ddim", eta=0.5)),
    "dome272": ({"clip": None}, lambda spec: spec.table("dome272")),
    "x_0": ({"prediction": "sample"}, lambda spec: spec.table("ddpm")),
    "v": ({"prediction": "v_prediction"}, lambda spec: spec.table("ddpm")),
    "learned range": ({"variance": "learned_range"}, lambda spec: spec.table("ddpm")),
    "learned": ({"variance": "learned"}, lambda spec: spec.table("ddpm", 100)),
    "learned, unused": ({"variance": "learned_range"}, lambda spec: spec.table("ddim", 50, eta=1)),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_a_thousand_fused_steps_are_those_of_the_loop(tmp_path: Path, loop: str) -> None:
    changes, table_of = LOOPS[loop]
    spec = ModelSpec(sample_shape=(1, 8, 8), schedule=linear()).with_changes(**changes)
    table = table_of(spec)
    noise = SeededNoise(3, range(2), spec.sample_shape)
    *_, wanted = denoise(opened(tmp_path, spec, fused=False), table, noise)
    with opened(tmp_path, spec, fused=True).stepper(2) as stepper:
        stepper.start(noise(0), {})
        visited = list(denoise_fused(stepper, table, noise))
        given = stepper.read()
    assert visited == [(k, row.t) for k, row in enumerate(table, start=1)]
    # The same operations in float32 in the same order, but that ONNX Runtime's exponential is not
    # NumPy's to the last bit.
    learned = any(row.log_std for row in table)
    np.testing.assert_allclose(given, wanted.x, rtol=0, atol=1e-5 if learned else 0)
    assert np.isfinite(given).all()


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_a_step_in_onnx_s_own_evaluator_is_that_of_the_loop(tmp_path: Path, variance: str) -> None:
    spec = SPEC.with_changes(variance=variance)
    model = load(tmp_path, spec)
    fused = fuse_step(with_variance(model) if variance in LEARNED else model)
    evaluator = ReferenceEvaluator(fused)
    noise = SeededNoise(0, range(2), spec.sample_shape)
    for row in spec.table()[::7]:
        x, t = noise(0), np.full(2, row.t, dtype=np.int64)
        feeds = {"x": x, "t": t, "row": row_of(row), "z": noise(1)}
        out, x_s = map(np.asarray, evaluator.run(["out", "x_s"], feeds))
        (step,) = denoise(lambda *_, out=out: out, [row], noise)
        np.testing.assert_allclose(x_s, step.x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_output_that_is_not_finite_shows_although_x0_is_clipped(
    tmp_path: Path, bad: float, clip: float | None
) -> None:
    spec = tiny_spec().with_changes(clip=clip)
    engine = open_engine(write_fused(tmp_path / "unet.onnx", spec, bias=bad))
    noise = SeededNoise(0, [0], spec.sample_shape)
    for row in [spec.table()[0], spec.table()[-1], spec.table("ddim", 5)[2]]:
        with engine.stepper(1) as stepper:
            stepper.start(noise(0), {})
            stepper.step(row, noise(1))
            assert not np.isfinite(stepper.read()).any()


def test_the_network_s_output_stays_the_same_bits(tmp_path: Path) -> None:
    spec = tiny_spec(classes=4)
    plain = open_engine(write_graph(tmp_path / "unet.onnx", spec))
    fused = open_engine(write_fused(tmp_path / "fused.onnx", spec))
    assert (plain.fused, fused.fused) == (False, True)
    x = SeededNoise(0, range(3), spec.sample_shape)(0)
    t, y = np.array([0, 7, 19]), np.array([0, 3, 4])
    np.testing.assert_array_equal(fused(x, t, y=y), plain(x, t, y=y))


def test_the_graph_is_sound_and_says_that_it_is_fused(tmp_path: Path) -> None:
    model = load(tmp_path, tiny_spec(classes=4))
    before = model.SerializeToString()
    fused = fuse_step(model)
    assert model.SerializeToString() == before
    onnx.checker.check_model(fused, full_check=True)
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*fused.graph.input, *fused.graph.output)
    }
    image = ["batch", 1, 8, 8]
    assert list(shapes) == ["x", "t", "y", "row", "z", "out", "x_s"]
    assert shapes["row"] == [9]
    assert shapes["x"] == shapes["z"] == shapes["x_s"] == image
    properties = {entry.key: entry.value for entry in fused.metadata_props}
    assert properties.keys() == {SPEC_KEY, METADATA_KEY}
    assert properties[SPEC_KEY] == tiny_spec(classes=4).to_json()


def test_a_fused_graph_is_fused_once(tmp_path: Path) -> None:
    fused = fuse_step(load(tmp_path))
    assert fuse_step(fused) is fused


def test_a_step_follows_networks_of_other_ranks(tmp_path: Path) -> None:
    spec = tiny_spec().with_changes(sample_shape=(6, 16))
    x, out = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 6, 16])
        for name in ("x", "out")
    )
    t = helper.make_tensor_value_info("t", TensorProto.INT64, ["N"])
    tanh = helper.make_node("Tanh", ["x"], ["out"])
    graph = helper.make_graph([tanh], "sequence", [x, t], [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, {SPEC_KEY: spec.to_json()})
    onnx.save_model(fuse_step(model), tmp_path / "policy.onnx")
    noise = SeededNoise(0, range(2), (6, 16))
    with open_engine(tmp_path / "policy.onnx").stepper(2) as stepper:
        stepper.start(noise(0), {})
        for _ in denoise_fused(stepper, spec.table(), noise):
            pass
        given = stepper.read()
    *_, wanted = denoise(lambda x, _: np.tanh(x), spec.table(), noise)
    np.testing.assert_allclose(given, wanted.x, rtol=0, atol=1e-5)  # another tanh


def _second_output(model: onnx.ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("tanh", TensorProto.FLOAT, None))


def _half_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16


def _taken(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "z"))


def _later_format(model: onnx.ModelProto) -> None:
    model.metadata_props.add(key=METADATA_KEY, value='{"format": 2}')


def _no_spec(model: onnx.ModelProto) -> None:
    del model.metadata_props[:]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (_second_output, ExportError, r"from x, t to out \(FLOAT\), tanh \(FLOAT\); the step foll"),
        (_half_output, ExportError, r"goes from x, t to out \(FLOAT16\); the step follows"),
        (_taken, ExportError, "a tensor called z, a name that the fused step needs"),
        (_later_format, SpecError, "fused step in this graph has format 2; this release reads"),
        (_no_spec, SpecError, "This graph carries no ddpm-deploy spec"),
    ],
)
def test_a_graph_that_the_step_cannot_follow_is_refused(
    tmp_path: Path,
    change: Callable[[onnx.ModelProto], None],
    error: type[Exception],
    message: str,
) -> None:
    model = load(tmp_path)
    change(model)
    with pytest.raises(error, match=message):
        fuse_step(model)


def test_a_file_that_is_no_onnx_is_named(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"garbage")
    with pytest.raises(EngineError, match=r"garbage\.onnx is no ONNX file"):
        fuse_file(garbage, tmp_path / "fused.onnx")
    assert list(tmp_path.iterdir()) == [garbage]
