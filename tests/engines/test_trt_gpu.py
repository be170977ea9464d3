"""Plans in the runtime itself. Building for TensorRT-RTX needs no GPU; running one does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")

from ddpm_deploy import Engine, SeededNoise, open_engine
from ddpm_deploy.capability import rtx_runs_on
from ddpm_deploy.engines import match
from ddpm_deploy.engines.cuda import Cuda
from ddpm_deploy.engines.flavour import Flavour, installed, load
from ddpm_deploy.engines.match import Runtimes, checked_record
from ddpm_deploy.engines.plan import PlanRecord, Profile, read_record, sidecar
from ddpm_deploy.engines.runtime_cache import RuntimeCache
from ddpm_deploy.engines.trt import TrtEngine
from ddpm_deploy.engines.trt_network import TrtNetwork
from ddpm_deploy.errors import EngineError, PlanMismatchError
from ddpm_deploy.export.fuse_step import fuse_step
from ddpm_deploy.export.to_onnx import export_network
from ddpm_deploy.files import sha256
from ddpm_deploy.fused import denoise_fused
from ddpm_deploy.sampling import denoise
from tests.support import tiny_network, tiny_spec

CLASSES = 3
PROFILES = (Profile(least=1, best=2, most=2), Profile(least=2, best=8, most=8))


def build(graph: Path, flavour: Flavour, plan: Path) -> Path:
    """Builds a plan and its sidecar with the runtime's own interface, in a few lines.

    Args:
        graph: The network.
        flavour: What builds.
        plan: Where to.
    """
    trt: Any = load(flavour)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    flags = 0
    for name in ("EXPLICIT_BATCH", "STRONGLY_TYPED"):
        if hasattr(trt.NetworkDefinitionCreationFlag, name):
            flags |= 1 << int(getattr(trt.NetworkDefinitionCreationFlag, name))
    network = builder.create_network(0 if flavour == "tensorrt_rtx" else flags)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(graph))
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # what is compared below is float32
    for profile in PROFILES:
        shapes = builder.create_optimization_profile()
        for i in range(network.num_inputs):
            tensor = network.get_input(i)
            sizes = (profile.least, profile.best, profile.most)
            if tensor.shape[0] == -1:
                shapes.set_shape(tensor.name, *((n, *tuple(tensor.shape)[1:]) for n in sizes))
        assert config.add_optimization_profile(shapes) >= 0
    content = builder.build_serialized_network(network, config)
    assert content is not None
    plan.write_bytes(content)
    here = Runtimes.here()
    device = Cuda.open().device if flavour == "tensorrt" else None
    record = PlanRecord(
        spec=tiny_spec(classes=CLASSES),
        plan_sha256=sha256(plan),
        plan_bytes=plan.stat().st_size,
        graph=graph.name,
        graph_sha256=sha256(graph),
        flavour=flavour,
        version=trt.__version__,
        platform=here.platform,
        device=device.name if device else "",
        compute_capabilities=(device.compute_capability,) if device else (),
        profiles=PROFILES,
        precision="fp32",
        fused_step=graph.stem == "fused",
        command=f"ddpm-deploy build {graph.name} --fp32 -o {plan.name}",
    )
    sidecar(plan).write_text(record.to_json(), encoding="utf-8")
    return plan


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    export_network(tiny_network(classes=CLASSES), tiny_spec(classes=CLASSES), folder / "unet.onnx")
    onnx.save_model(fuse_step(onnx.load_model(folder / "unet.onnx")), folder / "fused.onnx")
    return folder


@pytest.fixture(scope="module")
def ahead_of_time(graphs: Path) -> Path:
    if "tensorrt_rtx" not in installed():
        pytest.skip("TensorRT-RTX is not installed: pip install 'ddpm-deploy[rtx]'")
    return build(graphs / "unet.onnx", "tensorrt_rtx", graphs / "ahead.plan")


def test_a_plan_built_without_a_gpu_says_that_it_wants_one(ahead_of_time: Path) -> None:
    try:
        Cuda.open()
    except EngineError as error:
        with pytest.raises(EngineError, match=str(error).split("(")[0]):
            open_engine(ahead_of_time)
    else:
        pytest.skip("there is a GPU")
    with pytest.raises(EngineError, match="The device is 'cpu'; a plan runs on a GPU alone"):
        open_engine(ahead_of_time, device="cpu")


def test_what_the_runtime_says_against_a_plan_reaches_the_user(ahead_of_time: Path) -> None:
    cut_short = ahead_of_time.with_name("short.plan")
    cut_short.write_bytes(ahead_of_time.read_bytes()[:1000])
    cache = RuntimeCache(cut_short, {})
    # Without a GPU the runtime complains of that, with one of the plan: either way it says why.
    with pytest.raises(EngineError, match=r"cannot load .*short\.plan: ") as caught:
        TrtNetwork(load("tensorrt_rtx"), cut_short, read_record(ahead_of_time), cache)
    assert "it gives no reason" not in str(caught.value)
    assert "Build it again: ddpm-deploy build unet.onnx --fp32" in caught.value.hint


def test_a_built_plan_is_refused_by_another_version(
    ahead_of_time: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Runtimes.here()
    monkeypatch.setattr(
        match.Runtimes, "here", lambda: replace(here, versions={"tensorrt_rtx": "1.8.0.1"})
    )
    with pytest.raises(PlanMismatchError, match=r"here is TensorRT-RTX 1\.8\.0\.1") as caught:
        open_engine(ahead_of_time)
    assert caught.value.command == "ddpm-deploy build unet.onnx --fp32 -o ahead.plan"


def test_a_byte_of_a_built_plan_decides(ahead_of_time: Path, tmp_path: Path) -> None:
    content = bytearray(ahead_of_time.read_bytes())
    content[len(content) // 2] ^= 1
    plan = tmp_path / "ahead.plan"
    plan.write_bytes(content)
    sidecar(plan).write_bytes(sidecar(ahead_of_time).read_bytes())
    with pytest.raises(EngineError, match="It was changed, or the sidecar belongs to another"):
        open_engine(plan)


Opened = Callable[..., TrtEngine]


@pytest.fixture(params=["tensorrt", "tensorrt_rtx"])
def opened(request: pytest.FixtureRequest, graphs: Path, tmp_path: Path) -> Opened:
    """Opens a plan of a graph that it builds, in each flavour that is installed."""
    flavour: Flavour = request.param
    if flavour not in installed():
        pytest.skip(f"{flavour} is not installed")
    try:
        device = Cuda.open().device
    except EngineError as error:
        pytest.skip(f"no GPU: {error}")
    if flavour == "tensorrt_rtx" and not rtx_runs_on(device.compute_capability):
        pytest.skip(f"TensorRT-RTX does not run on compute capability {device.compute_capability}")

    def make(name: str = "unet", *, graphs_on: bool = True) -> TrtEngine:
        graph, plan = graphs / f"{name}.onnx", tmp_path / f"{name}.plan"
        if not plan.exists():
            build(graph, flavour, plan)
        return TrtEngine.open(plan, checked_record(plan), graphs=graphs_on)

    return make


def _inputs(batch: int) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    x = np.random.default_rng(0).standard_normal((batch, 1, 8, 8)).astype(np.float32)
    y = np.arange(batch, dtype=np.int64) % (CLASSES + 1)
    return x, np.arange(batch, dtype=np.int64) % 20, {"y": y}


def _far(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def _last(engine: Engine, batch: int) -> np.ndarray:
    noise = SeededNoise(0, range(batch), engine.spec.sample_shape)
    y = _inputs(batch)[2]
    *_, step = denoise(lambda x, t: engine(x, t, **y), engine.spec.table(), noise)
    return step.x


def _last_fused(engine: Engine, batch: int) -> np.ndarray:
    noise = SeededNoise(0, range(batch), engine.spec.sample_shape)
    with engine.stepper(batch) as stepper:
        stepper.start(noise(0), _inputs(batch)[2])
        for _ in denoise_fused(stepper, engine.spec.table(), noise):
            pass
        return stepper.read()


# float32 without TF32: what is left are sums in another order, 2e-5 of the peak between ONNX
# Runtime and PyTorch, and other kernels for exp and rsqrt.
PER_CALL = 1e-4
# Twenty steps, of which each carries on what the ones before it were off.
WHOLE_LOOP = 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["unet", "fused"])
def test_a_plan_gives_what_onnx_runtime_gives_at_any_batch(
    opened: Opened, graphs: Path, name: str
) -> None:
    with opened(name) as engine, open_engine(graphs / "unet.onnx", device="cpu") as reference:
        for batch in (1, 2, 8, 8, 8, 5, 20, 3):
            x, t, y = _inputs(batch)
            assert _far(engine(x, t, **y), reference(x, t, **y)) < PER_CALL


@pytest.mark.gpu
def test_the_whole_loop_ends_where_onnx_runtime_s_does(opened: Opened, graphs: Path) -> None:
    with opened() as engine, open_engine(graphs / "unet.onnx", device="cpu") as reference:
        for batch in (8, 20):
            assert _far(_last(engine, batch), _last(reference, batch)) < WHOLE_LOOP


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 8, 20])
def test_the_fused_loop_ends_where_the_loop_does(opened: Opened, batch: int) -> None:
    with opened("fused") as fused, opened() as engine:
        assert _far(_last_fused(fused, batch), _last(engine, batch)) < WHOLE_LOOP


@pytest.mark.gpu
def test_a_graph_computes_what_plain_launches_do(opened: Opened) -> None:
    with opened("fused") as captured, opened("fused", graphs_on=False) as plain:
        x, t, y = _inputs(8)
        for _ in range(3):
            assert np.array_equal(captured(x, t, **y), plain(x, t, **y))
        assert np.array_equal(_last_fused(captured, 8), _last_fused(plain, 8))
        assert captured.describe()["cuda_graph"] in {"on", "off: the runtime makes its own"}


@pytest.mark.gpu
def test_a_second_start_finds_what_the_first_compiled(opened: Opened) -> None:
    x, t, y = _inputs(8)
    engine = opened()
    with engine:
        first = engine(x, t, **y)
        cache = engine.path.with_name(engine.path.name + ".cache")
        assert cache.exists() == (engine.record.flavour == "tensorrt_rtx")
    with opened() as again:
        assert np.array_equal(again(x, t, **y), first)


@pytest.mark.gpu
def test_two_plans_that_are_open_do_not_disturb_each_other(opened: Opened) -> None:
    x, t, y = _inputs(8)
    with opened("fused") as other:
        with opened() as engine:
            first = engine(x, t, **y)
            for _ in range(3):
                other(x, t, **y)
                assert np.array_equal(engine(x, t, **y), first)
        assert _far(other(x, t, **y), first) < PER_CALL  # with the other's runtime gone


@pytest.mark.gpu
def test_a_loop_goes_on_where_it_was_after_calls_in_another_profile(opened: Opened) -> None:
    other, t, label = _inputs(1)
    with opened("fused") as engine:
        expected = _last_fused(engine, 8)
        noise = SeededNoise(0, range(8), engine.spec.sample_shape)
        with engine.stepper(8) as stepper:
            stepper.start(noise(0), _inputs(8)[2])
            for k, _ in denoise_fused(stepper, engine.spec.table(), noise):
                if k % 5 == 0:
                    engine(other, t, **label)
            assert np.array_equal(stepper.read(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["unet", "fused"])
def test_memory_that_host_and_device_share_gives_the_same(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    x, t, y = _inputs(8)
    with opened(name) as engine:
        expected = engine(x, t, **y)
        path = _last_fused if engine.fused else _last
        loop = path(engine, 8)
    # A discrete GPU reads mapped memory too, over the bus: the addresses and their order are ours.
    apart = Cuda.open()
    shared = Cuda(replace(apart.device, integrated=True))
    monkeypatch.setattr(Cuda, "open", lambda: shared)
    with opened(name) as engine:
        assert engine.describe()["zero_copy"] is (name == "unet")
        for _ in range(3):
            assert np.array_equal(engine(x, t, **y), expected)
        assert np.array_equal(path(engine, 8), loop)


@pytest.mark.gpu
def test_a_program_that_ends_without_closing_ends_quietly(opened: Opened) -> None:
    with opened() as engine:
        plan = engine.path
    program = f"""
import numpy as np
from ddpm_deploy import open_engine
engine = open_engine({str(plan)!r})
x = np.zeros((8, 1, 8, 8), dtype=np.float32)
zeros = np.zeros(8, dtype=np.int64)
for _ in range(3):
    engine(x, zeros, y=zeros)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
