"""Our side of an engine on a GPU: batches, buffers, their order. Host memory stands in for the GPU,
and ONNX Runtime for the plan: see `host_gpu`. What TensorRT does is in `test_trt_gpu`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")

from ddpm_deploy import SeededNoise, open_engine
from ddpm_deploy.arrays import Samples
from ddpm_deploy.engines.plan import Profile
from ddpm_deploy.engines.trt import TrtEngine
from ddpm_deploy.engines.trt_network import load_hint
from ddpm_deploy.errors import EngineError, EngineInputError
from ddpm_deploy.sampling import denoise
from tests.engines.host_gpu import HostCuda, HostNetwork
from tests.engines.plans import record
from tests.support import tiny_spec, write_graph

Open = Callable[..., tuple[TrtEngine, HostCuda, HostNetwork]]


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return write_graph(tmp_path / "unet.onnx", tiny_spec(classes=4))


@pytest.fixture
def opened(graph: Path) -> Open:
    def make(
        *profiles: str,
        fused: bool = False,
        integrated: bool = False,
        cannot_capture: str = "",
        graphs: bool = True,
        precision: str = "fp16",
        **network: Any,
    ) -> tuple[TrtEngine, HostCuda, HostNetwork]:
        parsed = tuple(Profile.parse(text) for text in profiles or ["1:8:8"])
        said = record(
            spec=tiny_spec(classes=4), profiles=parsed, fused_step=fused, precision=precision
        )
        cuda = HostCuda(integrated=integrated, cannot_capture=cannot_capture)
        batches = [range(p.least, p.most + 1) for p in parsed]
        stand_in = HostNetwork(cuda, graph, batches, fused=fused, **network)
        return TrtEngine(Path("unet.plan"), said, cuda, stand_in, graphs=graphs), cuda, stand_in

    return make


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_plan_s_precision_is_its_sidecar_s(opened: Open, precision: str) -> None:
    engine, _, _ = opened(precision=precision)
    assert engine.precision == precision


def test_a_plan_is_given_the_batch_that_it_is_fastest_at(opened: Open) -> None:
    engine, _, _ = opened("1:1:1", "1:4:8")
    assert engine.best_batch == 4


def test_what_a_runtime_says_of_another_gpu_is_not_taken_for_want_of_memory() -> None:
    """In TensorRT-RTX 1.7.1's words on an H100."""
    said = (
        "IRuntime::deserializeCudaEngine: Error Code 6: API Usage Error (The engine cannot run on "
        "this GPU, which has compute capability 9.0. Supported compute capabilities: 8.0 8.6)"
    )
    hint = load_hint(said, record(), Path("unet.plan"))
    assert hint.startswith("It is not for this GPU. ")
    assert "ddpm-deploy[tensorrt]" in hint
    assert "memory" not in hint
    assert "memory" in load_hint("Error Code 2: OutOfMemory", record(), Path("unet.plan"))


def test_without_a_gpu_the_graph_s_own_name_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing() -> HostCuda:
        raise EngineError("There is no GPU.", hint="Put one in.")

    monkeypatch.setattr("ddpm_deploy.engines.trt.Cuda.open", nothing)
    path, said = Path("small.plan"), record(graph="small.onnx")
    with pytest.raises(EngineError, match=r"^small\.plan does not run here\. There is no") as none:
        TrtEngine.open(path, said)
    assert none.value.hint == "Put one in.\nOr run its graph on the CPU: --engine small.onnx"
    with pytest.raises(EngineError, match=r"The device is 'cpu'; .* and small\.plan is one") as cpu:
        TrtEngine.open(path, said, device="cpu")
    assert cpu.value.hint == "Run its graph on the CPU: --engine small.onnx"


def _inputs(batch: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x = np.random.default_rng(seed).standard_normal((batch, 1, 8, 8)).astype(np.float32)
    return x, np.arange(batch, dtype=np.int64) % 20, np.arange(batch, dtype=np.int64) % 5


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("integrated", [False, True])
@pytest.mark.parametrize("timestep", ["int64", "int32"])
def test_any_batch_gives_what_the_network_gives(
    opened: Open, graph: Path, fused: bool, integrated: bool, timestep: str
) -> None:
    engine, cuda, _ = opened("2:4:8", fused=fused, integrated=integrated, timestep=timestep)
    reference = open_engine(graph)
    for number, batch in enumerate([1, 8, 8, 8, 20, 3, 20, 1]):
        x, t, y = _inputs(batch, number)
        before = x.copy()
        out = engine(x, t, y=y)
        assert np.array_equal(out, reference(x, t, y=y))
        assert np.array_equal(x, before)
        out[:] = 7  # the caller's own
    engine.close()
    engine.close()
    assert cuda.live == {}


def test_a_batch_above_the_largest_profile_is_cut_into_equal_calls(opened: Open) -> None:
    engine, _, network = opened("1:1:1", "2:4:8")
    for batch in (20, 1, 20, 5):
        x, t, y = _inputs(batch)
        engine(x, t, y=y)
    assert network.bound == [(1, 7), (0, 1), (1, 7), (1, 5)]
    assert network.calls == 3 + 1 + 3 + 1


@pytest.mark.parametrize("integrated", [False, True])
def test_padding_is_zeros_whatever_stood_there(opened: Open, integrated: bool) -> None:
    engine, _, network = opened("4", integrated=integrated)
    for batch in (4, 3):
        x, t, y = _inputs(batch)
        engine(x, t + 1, y=y)
    assert [value[3:].any() for value in network.fed.values()] == [False, False, False]
    assert [value[:3].any() for value in network.fed.values()] == [True, True, True]


def test_a_call_is_one_launch_from_the_second_of_its_batch_on(opened: Open) -> None:
    engine, cuda, _ = opened()
    x, t, y = _inputs(4)
    plain = ["copy", "copy", "copy", "copy"]  # x, t, y; out
    for expected in (plain, ["capture", *plain, "launch"], ["launch"], ["launch"]):
        cuda.calls.clear()
        engine(x, t, y=y)
        assert cuda.calls == expected
    assert engine.describe()["cuda_graph"] == "on"


def test_the_network_alone_is_timed_without_copies(opened: Open) -> None:
    engine, cuda, network = opened()
    assert engine.network_seconds(20, repeat=5) > 0
    assert network.calls == 2 + 5 * 3  # 20 samples are three calls of 7
    assert "copy" not in cuda.calls


def test_where_host_and_device_share_memory_nothing_is_copied(opened: Open) -> None:
    engine, cuda, _ = opened(integrated=True)
    x, t, y = _inputs(4)
    engine(x, t, y=y)
    assert cuda.calls == []
    assert engine.describe()["zero_copy"] is True


def test_a_capture_that_fails_leaves_plain_launches_and_its_reason(
    opened: Open, graph: Path
) -> None:
    engine, cuda, _ = opened(cannot_capture="cudaErrorStreamCaptureUnsupported", fused=True)
    x, t, y = _inputs(4)
    for _ in range(4):
        assert np.array_equal(engine(x, t, y=y), open_engine(graph)(x, t, y=y))
    assert cuda.calls.count("capture") == 1
    assert engine.describe()["cuda_graph"] == (
        "off: capture failed: cudaErrorStreamCaptureUnsupported"
    )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"graphs": False}, "off: not wanted"),
        ({"captures_itself": True}, "off: the runtime makes its own"),
    ],
)
def test_without_graphs_every_launch_is_plain(
    opened: Open, options: dict[str, Any], reason: str
) -> None:
    engine, cuda, _ = opened(**options)
    x, t, y = _inputs(4)
    for _ in range(3):
        engine(x, t, y=y)
    assert "capture" not in cuda.calls
    assert engine.describe()["cuda_graph"] == reason


def test_what_was_compiled_is_kept_after_the_first_call_of_a_batch_and_at_the_end(
    opened: Open,
) -> None:
    engine, _, network = opened()
    x, t, y = _inputs(4)
    for _ in range(3):
        engine(x, t, y=y)
    assert network.kept == 1
    engine.close()
    assert network.kept == 2


def _reference(graph: Path, table: Any, noise: SeededNoise, y: np.ndarray) -> Samples:
    engine = open_engine(graph)
    *_, last = denoise(lambda x, t: engine(x, t, y=y), table, noise)
    return last.x


@pytest.mark.parametrize("integrated", [False, True])
@pytest.mark.parametrize("batch", [1, 8, 20])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dome272"])
def test_the_fused_loop_gives_what_the_loop_in_numpy_gives(
    opened: Open, graph: Path, integrated: bool, batch: int, sampler: Any
) -> None:
    engine, cuda, network = opened("2:4:8", fused=True, integrated=integrated)
    table = engine.spec.table(sampler)
    noise = SeededNoise(3, range(batch), engine.spec.sample_shape)
    y = _inputs(batch)[2]
    with engine.stepper(batch) as stepper:
        for _ in range(2):  # a stepper starts anew as often as it is asked to
            network.calls = 0
            stepper.start(noise(0), {"y": y})
            for k, row in enumerate(table, start=1):
                z = noise(k) if row.x_from_noise else None
                stepper.step(row, z)
                if z is not None:
                    z[:] = np.nan  # ours again once `step` has returned
            x = stepper.read()
            # float32 sums in another order than the loop's: some roundings of numbers up to 4.
            np.testing.assert_allclose(x, _reference(graph, table, noise, y), rtol=0, atol=2e-5)
            assert network.calls == len(table) * -(-batch // 8)
    engine.close()
    assert cuda.live == {}


@pytest.mark.parametrize("integrated", [False, True])
def test_steps_are_given_without_waiting_until_both_slots_are_in_use(
    opened: Open, integrated: bool
) -> None:
    engine, cuda, network = opened(fused=True, integrated=integrated)
    row = engine.spec.table("ddpm")[0]
    x, _, y = _inputs(4)
    with engine.stepper(4) as stepper:
        stepper.start(x, {"y": y})
        done = []
        for _ in range(6):
            stepper.step(row, x)
            done.append(network.calls)
        assert done == [0, 0, 1, 2, 3, 4]  # the third waits for the first, which has the same slot
        cuda.calls.clear()
        stepper.step(row, x)
        assert cuda.calls == ["wait", "launch"]


@pytest.mark.parametrize("integrated", [False, True])
def test_calls_in_between_leave_the_state_of_a_stepper_alone(
    opened: Open, graph: Path, integrated: bool
) -> None:
    engine, _, _ = opened("1:4:8", fused=True, integrated=integrated)
    table = engine.spec.table("ddpm")
    noise = SeededNoise(3, range(4), engine.spec.sample_shape)
    y = _inputs(4)[2]
    with engine.stepper(4) as stepper:
        stepper.start(noise(0), {"y": y})
        for k, row in enumerate(table, start=1):
            stepper.step(row, noise(k) if row.x_from_noise else None)
            x, t, other = _inputs([4, 2, 20][k % 3], k)
            assert np.array_equal(engine(x, t, y=other), open_engine(graph)(x, t, y=other))
        state = stepper.read()
    np.testing.assert_allclose(state, _reference(graph, table, noise, y), rtol=0, atol=2e-5)


@pytest.mark.parametrize("integrated", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_an_error_of_the_device_is_raised_once_and_all_is_given_back(
    opened: Open, fused: bool, integrated: bool
) -> None:
    engine, cuda, _ = opened(fused=fused, integrated=integrated)
    x, t, y = _inputs(4)

    def run() -> None:
        with engine:
            engine(x, t, y=y)
            if not fused:
                cuda.broken = "cudaErrorIllegalAddress"
                engine(x, t, y=y)
            with engine.stepper(4) as stepper:
                stepper.start(x, {"y": y})
                cuda.broken = "cudaErrorIllegalAddress"
                stepper.step(engine.spec.table("ddpm")[0], x)
                stepper.read()

    with pytest.raises(EngineError, match="cudaErrorIllegalAddress") as caught:
        run()
    assert caught.value.__context__ is None  # nothing failed while it went up
    assert cuda.live == {}


@pytest.mark.parametrize("integrated", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_where_memory_runs_out_all_that_was_taken_is_given_back(
    opened: Open, fused: bool, integrated: bool
) -> None:
    engine, cuda, _ = opened(fused=fused, integrated=integrated)
    x, t, y = _inputs(4)

    def take(room: int) -> bool:
        cuda.room = room
        try:
            if fused:
                engine.stepper(4).close()
            else:
                engine(x, t, y=y)
        except EngineError:
            return False
        finally:
            engine._release()
            assert cuda.live == {}
        return True

    enough = [take(room) for room in range(0, 1 << 14, 64)]
    assert set(enough) == {False, True}
    assert enough == sorted(enough)


def test_a_stepper_refuses_what_does_not_fit(opened: Open) -> None:
    engine, _, _ = opened(fused=True)
    row = engine.spec.table("ddpm")[0]
    x, _, y = _inputs(4)
    with engine.stepper(4) as stepper:
        with pytest.raises(
            EngineInputError, match=r"x is float32 \(3, 1, 8, 8\); this engine takes"
        ):
            stepper.start(x[:3], {"y": y[:3]})
        with pytest.raises(EngineInputError, match="The conditions given are none"):
            stepper.start(x, {})
        stepper.start(x, {"y": y})
        with pytest.raises(EngineInputError, match=r"z is float32 \(3, 1, 8, 8\)"):
            stepper.step(row, x[:3])
        with pytest.raises(EngineInputError, match="adds noise, and z is None"):
            stepper.step(row, None)


def test_a_plan_without_the_step_has_no_stepper(opened: Open) -> None:
    engine, _, _ = opened()
    assert not engine.fused
    with pytest.raises(EngineError, match="no fused step") as caught:
        engine.stepper(4)
    assert "--fuse-step" in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fused_step": True}, r"its sidecar says .*row float32 \(9,\)"),
        ({"spec": tiny_spec()}, r"has .*y int64 \(-1,\); its sidecar says output out"),
        (
            {"spec": tiny_spec(classes=4, size=16)},
            r"its sidecar says .*x float32 \(-1, 1, 16, 16\)",
        ),
    ],
)
def test_a_plan_whose_inputs_are_not_its_sidecar_s_is_refused(
    graph: Path, changes: dict[str, Any], said: str
) -> None:
    cuda = HostCuda()
    network = HostNetwork(cuda, graph, [range(1, 9)])
    with pytest.raises(EngineError, match=said) as caught:
        TrtEngine(
            Path("unet.plan"), record(**({"spec": tiny_spec(classes=4)} | changes)), cuda, network
        )
    assert caught.value.hint == ("Build it again: ddpm-deploy build unet.onnx --fp16 -o unet.plan")
