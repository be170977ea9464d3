"""Each engine is the same function, checks what it is given, and says what it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from ddpm_deploy import Engine, SeededNoise, denoise, open_engine
from ddpm_deploy.engines.build import build_engine
from ddpm_deploy.engines.pytorch import TorchEngine
from ddpm_deploy.errors import EngineBuildError, EngineError, EngineInputError, SpecError
from ddpm_deploy.export.lower import lower_graph, write_engine
from ddpm_deploy.export.to_onnx import export_network
from ddpm_deploy.fused import METADATA_KEY, step_to_json
from ddpm_deploy.runtime import RuntimeRecord
from tests.support import tiny_network, tiny_spec, write_fused, write_graph


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engines") / "unet.onnx"
    export_network(tiny_network(classes=3), tiny_spec(classes=3), path)
    return path


ORT = RuntimeRecord(runtime="onnxruntime")
OPENVINO = RuntimeRecord(runtime="openvino", streams=2)


@pytest.fixture(params=["onnx", "torch", "built", "openvino"])
def engine(request: pytest.FixtureRequest, exported: Path, tmp_path: Path) -> Engine:
    if request.param == "openvino":
        write_engine(lower_graph(exported, "openvino"), OPENVINO, tmp_path / "unet.ov.onnx")
        return open_engine(tmp_path / "unet.ov.onnx")
    if request.param == "torch":
        spec = tiny_spec(classes=3)
        return TorchEngine(tiny_network(classes=3), spec, path=exported, device="cpu")
    if request.param == "built":
        model = lower_graph(exported, "onnxruntime")
        output = tmp_path / "unet.ort.onnx"
        built = build_engine(exported, output, ORT, write=lambda r, p: write_engine(model, r, p))
        return open_engine(built.path)
    return open_engine(exported)


def _inputs(batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x = np.random.default_rng(0).standard_normal((batch, 1, 8, 8)).astype(np.float32)
    return x, np.arange(batch, dtype=np.int64) % 20, np.arange(batch, dtype=np.int64) % 4


def test_an_image_does_not_depend_on_its_batch(engine: Engine) -> None:
    x, t, y = _inputs(12)
    whole = engine(x, t, y=y)
    # ONNX Runtime's CPU kernels work an image at a time: equal to the bit. torch's do not promise
    # that, so its reference is held to rounding.
    tolerance = 2e-6 if engine.name.startswith(("torch", "openvino")) else 0
    for size in (1, 5):
        parts = [
            engine(x[i : i + size], t[i : i + size], y=y[i : i + size]) for i in range(0, 12, size)
        ]
        np.testing.assert_allclose(np.concatenate(parts), whole, rtol=0, atol=tolerance)


def test_inputs_are_left_alone_and_the_output_is_the_caller_s(engine: Engine) -> None:
    x, t, y = _inputs(3)
    before = x.copy()
    first = engine(x, t, y=y)
    first[:] = 7
    second = engine(x, t, y=y)
    assert np.array_equal(x, before)
    assert second.dtype == np.float32
    assert not np.any(second == 7)
    assert second.flags.writeable


def test_an_engine_says_what_it_is(engine: Engine) -> None:
    described = engine.describe()
    assert described["name"] in {"onnxruntime CPU", "openvino CPU fp32", "torch CPU"}
    assert described["runtime"].split()[0] in {"onnxruntime", "openvino", "torch"}
    assert engine.spec == tiny_spec(classes=3)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_nothing_but_speed(exported: Path, threads: int) -> None:
    x, t, y = _inputs(4)
    with open_engine(exported, threads=threads) as some, open_engine(exported) as default:
        np.testing.assert_allclose(some(x, t, y=y), default(x, t, y=y), rtol=0, atol=1e-6)


def test_a_silent_fall_back_from_cuda_is_an_error(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "unet.onnx", tiny_spec())
    with pytest.raises(EngineError, match=r"has no CUDA|could not start CUDA"):
        open_engine(path, device="cuda")


def test_a_build_keeps_the_spec_and_the_function(exported: Path, tmp_path: Path) -> None:
    built = build_engine(exported, tmp_path / "unet.ort.onnx", ORT, write=None)
    assert built.deviation <= 2e-5
    with open_engine(built.path) as engine:
        assert engine.spec == tiny_spec(classes=3)
    assert list(tmp_path.iterdir()) == [built.path]


def test_a_build_never_overwrites_its_graph(exported: Path) -> None:
    before = exported.read_bytes()
    with pytest.raises(EngineBuildError, match="would overwrite the graph"):
        build_engine(exported, exported, ORT, write=None)
    assert exported.read_bytes() == before


# --- The state with the runtime ---


@pytest.fixture
def fused(tmp_path: Path) -> Engine:
    return open_engine(write_fused(tmp_path / "fused.onnx", tiny_spec(classes=3)))


def test_a_stepper_s_steps_are_those_of_the_loop(fused: Engine) -> None:
    table = fused.spec.table()
    noise = SeededNoise(0, range(3), (1, 8, 8))
    y = np.array([0, 1, 3])
    with fused.stepper(3) as stepper:
        for _ in range(2):  # a stepper starts as often as it is asked
            stepper.start(noise(0), {"y": y})
            np.testing.assert_array_equal(stepper.read(), noise(0))
            for step in denoise(lambda x, t: fused(x, t, y=y), table, noise):
                row = table[step.k - 1]
                stepper.step(row, noise(step.k) if row.x_from_noise else None)
                np.testing.assert_array_equal(stepper.read(), step.x)


def test_a_stepper_s_state_is_its_own(fused: Engine) -> None:
    noise = SeededNoise(0, range(2), (1, 8, 8))
    x, z = noise(0), noise(1)
    conditions = {"y": np.array([0, 1])}
    first, last = fused.spec.table()[0], fused.spec.table()[-1]
    with fused.stepper(2) as stepper, fused.stepper(2) as other:
        for each in (stepper, other):
            each.start(x, conditions)
            each.step(first, z)
        read = stepper.read()
        x[:], z[:], conditions["y"][:] = 7, 7, 2  # given arrays stay the caller's
        read[:] = 7
        stepper.step(last, None)
        other.step(last, None)
        assert not np.any(stepper.read() == 7)
        np.testing.assert_array_equal(stepper.read(), other.read())
    stepper.close()  # once more


def test_an_engine_without_a_fused_step_has_no_stepper(engine: Engine) -> None:
    assert not engine.fused
    with pytest.raises(EngineError, match="has no fused step, so 4 samples cannot stay") as caught:
        engine.stepper(4)
    assert "ddpm-deploy build unet.onnx --fuse-step" in caught.value.hint


def test_a_stepper_refuses_what_does_not_fit(fused: Engine) -> None:
    table = fused.spec.table()
    x, y = np.zeros((2, 1, 8, 8), np.float32), np.zeros(2, np.int64)
    with fused.stepper(2) as stepper:
        with pytest.raises(EngineInputError, match=r"x is float32 \(3, .*; this engine takes"):
            stepper.start(np.zeros((3, 1, 8, 8), np.float32), {"y": y})
        with pytest.raises(EngineInputError, match="The conditions given are none"):
            stepper.start(x, {})
        stepper.start(x, {"y": y})
        with pytest.raises(EngineInputError, match=r"z is float32 \(1, 1, 8, 8\); .* \(2, 1, 8, 8"):
            stepper.step(table[0], x[:1])
        with pytest.raises(EngineInputError, match="The step at t = 19 adds noise, and z is None"):
            stepper.step(table[0], None)
        with pytest.raises(EngineInputError, match=r"t is 20\.\.20; this network has timesteps 0"):
            stepper.step(replace(table[0], t=20), x)
        with pytest.raises(EngineInputError, match=r"needs a learned variance; .* gives none"):
            stepper.step(replace(table[0], log_std=(0.0, 0.5)), x)


def test_a_file_that_only_says_that_it_is_fused_is_refused(tmp_path: Path) -> None:
    model = onnx.load_model(write_graph(tmp_path / "unet.onnx", tiny_spec()))
    model.metadata_props.add(key=METADATA_KEY, value=step_to_json())
    onnx.save_model(model, tmp_path / "lie.onnx")
    with pytest.raises(SpecError, match=r"has the inputs t .*, but its spec says row .* \(9\)"):
        open_engine(tmp_path / "lie.onnx")
