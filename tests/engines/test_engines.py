"""Each engine is the same function, checks what it is given, and says what it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ddpm_deploy import Engine, open_engine
from ddpm_deploy.engines.build import build_ort
from ddpm_deploy.engines.pytorch import TorchEngine
from ddpm_deploy.errors import EngineBuildError, EngineError
from ddpm_deploy.export.to_onnx import export_network
from tests.support import tiny_network, tiny_spec, write_graph


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engines") / "unet.onnx"
    export_network(tiny_network(classes=3), tiny_spec(classes=3), path)
    return path


@pytest.fixture(params=["onnx", "torch", "built"])
def engine(request: pytest.FixtureRequest, exported: Path, tmp_path: Path) -> Engine:
    if request.param == "torch":
        spec = tiny_spec(classes=3)
        return TorchEngine(tiny_network(classes=3), spec, path=exported, device="cpu")
    if request.param == "built":
        return open_engine(build_ort(exported, tmp_path / "unet.ort.onnx").path)
    return open_engine(exported)


def _inputs(batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x = np.random.default_rng(0).standard_normal((batch, 1, 8, 8)).astype(np.float32)
    return x, np.arange(batch, dtype=np.int64) % 20, np.arange(batch, dtype=np.int64) % 4


def test_an_image_does_not_depend_on_its_batch(engine: Engine) -> None:
    x, t, y = _inputs(12)
    whole = engine(x, t, y=y)
    # ONNX Runtime's CPU kernels work an image at a time: equal to the bit. torch's do not promise
    # that, so its reference is held to rounding.
    tolerance = 2e-6 if engine.name.startswith("torch") else 0
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
    assert described["name"] in {"onnxruntime CPU", "torch CPU"}
    assert described["runtime"].split()[0] in {"onnxruntime", "torch"}
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
    built = build_ort(exported, tmp_path / "unet.ort.onnx")
    assert built.deviation <= 2e-5
    with open_engine(built.path) as engine:
        assert engine.spec == tiny_spec(classes=3)
    assert list(tmp_path.iterdir()) == [built.path]


def test_a_build_never_overwrites_its_graph(exported: Path) -> None:
    before = exported.read_bytes()
    with pytest.raises(EngineBuildError, match="would overwrite the graph"):
        build_ort(exported, exported)
    assert exported.read_bytes() == before
